"""A sample of `make soak`'s mutated files: none ends in a traceback, a hang, or a file elsewhere."""

from __future__ import annotations

from tests.soak_inputs import run


def test_mutated_files_are_read_or_refused() -> None:
    counts = run(number=504, seed=1)
    kinds = {line.split(":")[0] for line in counts}
    assert sum(counts.values()) == 504 and len(kinds) == 14
    assert any(line.endswith("refused") for line in counts) and any(line.endswith("ok") for line in counts)
