"""Tickets on live models and on model folders, model cards, and other tools' formats."""
