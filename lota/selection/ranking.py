"""A kept ranking: the scores of a mask's entries, out of which every lower density's mask is cut without calibrating.

ranking/                  a mask folder, as any other
  ticket.json, ticket.safetensors
  scores.safetensors      fp32 [active entries] by tensor: |score|, in order of flat position
  ranking.json            how the mask was selected, and the sha256 of the scores by tensor
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from lota.files import naming_disk_full, naming_odd, read_json_object, write_text
from lota.ranks.agree import together
from lota.selection.pieces import Pieces
from lota.selection.ranks import Ranks
from lota.selection.select import select
from lota.ticket import Mask
from lota.ticket.container import StreamWriter, read_bytes, read_header

FACTS, SCORES = "ranking.json", "scores.safetensors"


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
        with together(), naming_disk_full(path):
            problem: OSError | None = None
            for name, scores in _gathered(mask, pieces, ranks):
                try:  # the other ranks are in the next sum: they hear of it afterwards
                    if file is not None and problem is None:
                        sha256[name] = file.add(name, scores)
                except OSError as error:
                    problem = error
            if problem is not None:
                raise problem
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


def cut(path: str | os.PathLike[str], density: float) -> Mask:
    """The mask that a selection with `density` would have chosen, at most the ranking's own density. Local.

    ValueError: no sound ranking, a higher density, or one that asks for entries that calibration gave a score of 0.
    """
    path = Path(path)
    if not (path / FACTS).is_file():
        raise ValueError(f"{path}: expected a ranking with {FACTS}, got none: calibrate with keep_ranking: true")
    mask = Mask.load(path)
    with naming_odd(f"{path / FACTS}"):
        facts = read_json_object(path / FACTS)
        written = facts["format"], facts["version"]
        budget, seed, kept, sha256 = facts["budget"], facts["seed"], facts["density"], facts["sha256"]
        is_odd = not isinstance(sha256, dict) or not isinstance(kept, float)
        if is_odd or written != ("lota-ranking", 1) or facts["mask"] != mask.digest or sha256.keys() != set(mask.names):
            raise ValueError(f"{path}: expected {FACTS} of the mask beside it, lota-ranking version 1. It is damaged")
    if density > kept:
        raise ValueError(f"{path} ranks a density of {kept:g}, got {density:g}: calibrate with the higher one")
    stored = read_header(path / SCORES)

    def pieces() -> Iterator[tuple[str, int, Tensor]]:
        for name in mask.names:
            if name not in stored or stored[name].num_bytes != 4 * mask.active(name):
                raise ValueError(f"{path / SCORES}: expected {mask.active(name)} scores of {name}. It is damaged")
            scores = torch.zeros(mask.numel(name), dtype=torch.float32)
            scores[mask.indices(name)] = read_bytes(stored[name], sha256[name], name).view(torch.float32)
            yield name, 0, scores

    shapes = {name: mask.shape(name) for name in mask.names}
    selection = select(pieces, shapes, density=density, budget=budget, seed=seed, alone=True, rows=mask.restricted_rows)
    if selection.num_zero_scored:
        raise ValueError(
            f"{path}: a density of {density:g} takes {selection.num_zero_scored} entries that scored 0, whose order a "
            "ranking does not keep: ask for a lower one, or calibrate with this one"
        )
    return selection.mask.with_base(mask.base, mask.frozen)


def _gathered(mask: Mask, pieces: Pieces, ranks: Ranks) -> Iterator[tuple[str, Tensor]]:
    """|score| at the active entries of each tensor, fp32 on the CPU; every entry is one rank's, the others add 0."""
    walk = iter(pieces())
    piece = next(walk, None)
    for name in mask.names:
        positions = mask.indices(name)
        scores = torch.zeros(positions.numel(), dtype=torch.float32)
        while piece is not None and piece[0] == name:
            _, start, values = piece
            ends = torch.tensor([start, start + values.numel()])
            low, high = torch.searchsorted(positions, ends).tolist()
            inside = (positions[low:high] - start).to(values.device)
            scores[low:high] = values.detach().reshape(-1)[inside].float().abs().cpu()
            piece = next(walk, None)
        yield name, ranks.sum(scores)
    assert piece is None, f"{piece[0]} is not among the ranked tensors"
