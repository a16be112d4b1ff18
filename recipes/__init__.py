"""Recipes: scripts that run from a checkout; the code is in lota."""
