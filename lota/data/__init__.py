"""Rows of files and of the hub become what a trainer reads: sources, columns, mixtures, checks, tokenizers."""
