"""Checkpoints of a block: vectors in safetensors, and all else in JSON."""
