"""Masks cut from a kept ranking are those of fresh selections, entry for entry, ties included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lota.cli import main as cli
from lota.ranking import save_ranking
from lota.selection import cut, select
from lota.selection.ranking import SCORES as SCORES_FILE
from lota.ticket import BaseTensor, Mask

GENERATOR = torch.Generator().manual_seed(3)
SCORES = {
    "gradient": torch.randn(37, 41, generator=GENERATOR).bfloat16(),
    "ties": (torch.randint(0, 4, (1201,), generator=GENERATOR).float() + 1) / 2,
    "none": torch.empty(0, 3),
    "last": torch.tensor([float("inf"), -0.25, 0.5, float("-inf")]).repeat(9),
}
SHAPES = {name: tuple(values.shape) for name, values in SCORES.items()}
BASE = {name: BaseTensor("bfloat16", "0123456789abcdef") for name in SHAPES}
PROTECTED = Mask.from_dense({"last": torch.arange(36) % 5 == 0})
DENSITIES = (0.3, 0.2, 0.05, 0.01, 0.001)


def pieces() -> Any:
    """This rank's even part of every tensor."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    for name, values in SCORES.items():
        flat = values.flatten()
        width = -(-flat.numel() // size)
        yield name, min(rank * width, flat.numel()), flat[rank * width : (rank + 1) * width]


def write(path: str, asked: dict[str, Any]) -> None:
    chosen = select(pieces, SHAPES, density=DENSITIES[0], base=BASE, protect=[PROTECTED], **asked)
    save_ranking(path, chosen.mask, pieces, density=DENSITIES[0], **{"budget": "global", "seed": 0, **asked})


def write_with_zeros(path: str) -> None:
    def pieces() -> Any:
        yield "w", 0, (torch.arange(100) < 10).float()

    chosen = select(pieces, {"w": (10, 10)}, density=0.5)
    save_ranking(path, chosen.mask, pieces, density=0.5, budget="global", seed=0)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("budget", ["global", "per_tensor"])
def test_five_masks_of_one_ranking(ranks: Any, tmp_path: Path, size: int, budget: str) -> None:
    asked: dict[str, Any] = {"budget": budget, "seed": 5}
    path = tmp_path / "ranking"
    for _ in range(2):  # the second replaces the first
        ranks(size).run(write, str(path), asked)
    made = [cut(path, density) for density in DENSITIES]
    for density, mask in zip(DENSITIES, made, strict=True):
        fresh = select(lambda: ((n, 0, v.flatten()) for n, v in SCORES.items()), SHAPES, density=density, base=BASE,
                       protect=[PROTECTED], **asked).mask  # fmt: skip
        assert mask == fresh and mask.digest == fresh.digest and mask.base == fresh.base
        assert mask.num_active or density == DENSITIES[-1]
    for lower, higher in zip(made[1:], made, strict=False):
        assert lower.overlap(higher) == lower.num_active
    assert cli(["mask", "--ranking", str(path), "--density", "0.05", "--out", str(tmp_path / "cut")]) == 0
    assert Mask.load(tmp_path / "cut") == made[2]
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []


def test_what_a_ranking_refuses(ranks: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "ranking"
    ranks(1).run(write, str(path), {})
    with pytest.raises(ValueError, match=r"ranks a density of 0.3, got 0.4: calibrate with the higher one"):
        cut(path, 0.4)
    with pytest.raises(ValueError, match="keep_ranking: true"):
        cut(tmp_path / "none", 0.1)
    assert cli(["mask", "--ranking", str(path), "--out", str(tmp_path / "out")]) == 2
    assert "take a --density" in capsys.readouterr().err and not (tmp_path / "out").exists()
    damaged = bytearray((path / SCORES_FILE).read_bytes())
    damaged[-1] ^= 1
    (path / SCORES_FILE).write_bytes(damaged)
    with pytest.raises(ValueError, match="damaged"):
        cut(path, 0.1)
    facts = json.loads((path / "ranking.json").read_text())
    (path / "ranking.json").write_text(json.dumps(facts | {"sha256": ["a"]}))
    with pytest.raises(ValueError, match=r"ranking\.json"):
        cut(path, 0.1)
    ranks(1).run(write_with_zeros, str(tmp_path / "zeros"))
    assert cut(tmp_path / "zeros", 0.1).num_active == 10
    with pytest.raises(ValueError, match="takes 10 entries that scored 0"):
        cut(tmp_path / "zeros", 0.2)
