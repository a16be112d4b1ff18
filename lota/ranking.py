"""Writing a ranking: scores that lie in pieces on many ranks become one folder (see lota/selection/ranking.py)."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from lota.files import naming_disk_full, write_text
from lota.ranks.agree import raise_together, together
from lota.selection.pieces import Pieces
from lota.selection.ranking import FACTS, SCORES
from lota.selection.ranks import Ranks
from lota.ticket import Mask
from lota.ticket.container import StreamWriter


def save_ranking(
    path: str | os.PathLike[str],
    mask: Mask,
    pieces: Pieces,
    *,
    density: float,
    budget: str,
    seed: int,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Write the folder `path`, replacing one that is there. Collective over all ranks; `group` has them all.

    mask: what `select` chose with `density`, `budget` and `seed`, the same on every rank. pieces: as `select` had them.
    """
    path, ranks = Path(path), Ranks(group)
    temporary = path.with_name(f".{path.name}.partial")
    file: StreamWriter | None = None
    try:
        with together(), naming_disk_full(path):
            if ranks.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
                mask.save(temporary, {"made by": "calibration", "kept": "its ranking"})
                file = StreamWriter(temporary / SCORES, list(mask.names), 4 * mask.num_active, "F32")
        sha256: dict[str, str] = {}
        problem: OSError | None = None
        for name, scores in _gathered(mask, pieces, ranks):
            try:  # the other ranks are in the next sum: they hear of it afterwards
                if file is not None and problem is None:
                    with naming_disk_full(path):
                        sha256[name] = file.add(name, scores)
            except OSError as error:
                problem = error
        raise_together(problem)
        with together(), naming_disk_full(path):
            if file is not None:
                file.close()
                facts = {
                    "format": "lota-ranking",
                    "version": 1,
                    "density": float(density),
                    "budget": budget,
                    "seed": seed,
                }
                facts |= {"mask": mask.digest, "sha256": sha256}
                write_text(temporary / FACTS, json.dumps(facts, indent=2) + "\n")
                shutil.rmtree(path, ignore_errors=True)
                temporary.rename(path)
    finally:
        if file is not None:
            file.abandon()
            shutil.rmtree(temporary, ignore_errors=True)


def _gathered(mask: Mask, pieces: Pieces, ranks: Ranks) -> Iterator[tuple[str, Tensor]]:
    """|score| at the active entries of each tensor, fp32 on the CPU; every entry is one rank's, the others add 0."""
    walk = iter(pieces())
    piece = next(walk, None)
    for name in mask.names:
        positions = mask.indices(name)
        scores = torch.zeros(positions.numel(), dtype=torch.float32)
        while piece is not None and piece[0] == name:
            _, start, values = piece
            ends = torch.tensor([start, start + values.numel()], dtype=torch.int64)
            low, high = torch.searchsorted(positions, ends).tolist()
            inside = (positions[low:high] - start).to(values.device)
            scores[low:high] = values.detach().reshape(-1)[inside].float().abs().cpu()
            piece = next(walk, None)
        yield name, ranks.sum(scores)
    assert piece is None, f"{piece[0]} is not among the ranked tensors"
