"""Recipes: programs that run from the checkout, thin and readable top to bottom."""
