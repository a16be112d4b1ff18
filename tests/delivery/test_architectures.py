"""Tickets on causal architectures of every kind: planned, applied, reverted, exported, scored; no cell is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import architectures
from tests.delivery.architecture_table import ids, row

KINDS = ("gpt2", "mixtral", "mamba", "qwen3_next", "deepseek_v3", "gpt_oss", "falcon", "llama4_text", "phimoe", "jamba")


@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_architectures(tmp_path: Path, name: str) -> None:
    cells = row(name, tmp_path, train=False)
    assert set(cells.values()) == {"ok"}, cells


@pytest.mark.slow
@pytest.mark.parametrize("name", architectures.names())
def test_every_architecture(tmp_path: Path, name: str) -> None:
    try:
        architectures.check_runs(name, ids())
    except Exception as error:  # noqa: BLE001 (its sizes are not those of tests/architectures.py)
        pytest.skip(f"not made: {error!s:.80}")
    assert not [text for text in row(name, tmp_path, train=False).values() if text.startswith("WRONG")]
