"""State, gradients and updates of active entries on the partitions of one rank. No DeepSpeed here."""
