"""The demo: a small base model made on the spot, trained in full and as a ticket, and compared."""
