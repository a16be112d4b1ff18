"""Tickets in other tools' formats."""
