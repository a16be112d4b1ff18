"""Sequences of tasks: one after another into one model, with a ledger of what each owns and a matrix of what became of
it."""
