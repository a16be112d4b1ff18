"""Everything that a few minutes on a GPU can tell, in one command: `python -m benchmarks.gpu --help`."""
