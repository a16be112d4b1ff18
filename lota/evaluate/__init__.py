"""Scores of a base model and tickets on it."""
