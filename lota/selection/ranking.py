"""A kept ranking: the scores of a mask's entries, out of which every lower density's mask is cut without calibrating.

ranking/                  a mask folder, as any other
  ticket.json, ticket.safetensors
  scores.safetensors      fp32 [active entries] by tensor: |score|, in order of flat position
  ranking.json            how the mask was selected, and the sha256 of the scores by tensor
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from lota.files import naming_odd, read_json_object
from lota.selection.select import select
from lota.ticket import Mask
from lota.ticket.container import read_bytes, read_header

FACTS, SCORES = "ranking.json", "scores.safetensors"


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
