"""Masks made of masks, of a model's zeros, and of the boolean masks of others."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lota.algebra.models import ModelTensors, identity
from lota.delivery.model_folder import read_tensors
from lota.selection import eligible, select
from lota.ticket import BaseTensor, Mask

Shapes = Mapping[str, tuple[int, ...]]


def union(masks: Sequence[Mask]) -> Mask:
    """Entries that are active in any."""
    return _combined(masks, lambda flags, other: flags | other)


def intersection(masks: Sequence[Mask]) -> Mask:
    """Entries that are active in all; tensors that all name."""
    common = set.intersection(*(set(mask.names) for mask in masks))
    return _combined([mask.without([n for n in mask.names if n not in common]) for mask in masks], lambda a, b: a & b)


def minus(masks: Sequence[Mask]) -> Mask:
    """Entries of the first that are active in none of the others."""
    first = set(masks[0].names)
    others = [mask.without([name for name in mask.names if name not in first]) for mask in masks[1:]]
    return _combined([masks[0], *others], lambda flags, other: flags & ~other)


def nonzero(model: ModelTensors, include: Sequence[str] | None = None, exclude: Sequence[str] | None = None) -> Mask:
    """Of a pruned model the entries that are not zero, among the eligible tensors: training leaves the zeros alone."""
    shapes, known = {}, {}
    for name in model.names:
        tensor = model.read(name)
        found = identity(tensor)
        if tensor.is_floating_point() and found is not None:
            shapes[name], known[name] = tuple(tensor.shape), found
    names = eligible(shapes, include, exclude)

    def indices() -> Iterator[tuple[str, tuple[int, ...], Tensor]]:
        for name in names:
            yield name, shapes[name], (model.read(name).reshape(-1) != 0).nonzero().squeeze(1)

    return Mask.from_indices(indices()).with_base(
        {name: known[name] for name in names}, {name: base for name, base in known.items() if name not in names}
    )


def changed(
    base: ModelTensors,
    tuned: ModelTensors,
    density: float,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> Mask:
    """The entries that a fine-tune moved most, by |difference|: exactly round(density * eligible). To protect what a
    model was aligned with, where nobody published a ticket. The mask knows no base: it goes with `tuned` and what
    follows."""
    shapes = {}
    for name in base.names:
        if name not in tuned:
            raise ValueError(f"{tuned.where} has no {name}, which {base.where} has: they are two models")
        one, other = base.read(name), tuned.read(name)
        if one.shape != other.shape:
            raise ValueError(f"{name} has other shapes in {base.where} and {tuned.where}: they are two models")
        if one.is_floating_point() and one.element_size() > 1:
            shapes[name] = tuple(one.shape)
    taken = {name: shapes[name] for name in eligible(shapes, include, exclude)}

    def scores() -> Iterator[tuple[str, int, Tensor]]:
        for name in taken:
            yield name, 0, (tuned.read(name).float() - base.read(name).float()).abs_().reshape(-1)

    return select(scores, taken, density=density, alone=True).mask


def from_file(path: str | os.PathLike[str], true_means: str | None = None) -> Mask:
    """Anyone's boolean masks by tensor name: a .safetensors file, or a .pt that holds a dict of tensors (loaded without
    running code).

    true_means: `active` (True is trained) or `frozen`; None: active for .safetensors, frozen for .pt, as the public
    LoTA code writes them. ValueError for a file with anything but boolean (or 0/1) tensors.
    """
    path = Path(path)
    if true_means not in (None, "active", "frozen"):
        raise ValueError(f"true_means must be active or frozen, got {true_means!r}")
    found = dict(read_tensors(path)) if path.suffix == ".safetensors" else _load_pickle(path)
    is_frozen = (true_means or ("active" if path.suffix == ".safetensors" else "frozen")) == "frozen"
    dense = {}
    for name, tensor in found.items():
        if not isinstance(tensor, Tensor) or not _is_boolean(tensor):
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{path}: expected boolean masks, got {name} of {kind}")
        dense[str(name)] = tensor.bool() ^ is_frozen
    if not dense:
        raise ValueError(f"{path} holds no masks")
    return Mask.from_dense(dense)


def _is_boolean(tensor: Tensor) -> bool:
    return tensor.dtype == torch.bool or bool(((tensor == 0) | (tensor == 1)).all())


def _load_pickle(path: Path) -> dict[str, Any]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # noqa: BLE001 (whatever torch makes of a file from anywhere)
        raise ValueError(
            f"{path}: not a file of tensors that can be loaded without running code: {error!s:.200}"
        ) from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a dict of masks by tensor name, got {type(found).__name__}")
    return found


def _combined(masks: Sequence[Mask], combine: Callable[[Tensor, Tensor], Tensor]) -> Mask:
    """Tensor by tensor, one dense flag for every entry of one tensor at a time."""
    names = dict.fromkeys(name for mask in masks for name in mask.names)
    shapes: dict[str, tuple[int, ...]] = {}
    known: dict[str, BaseTensor] = {}
    for mask in masks:
        for name in mask.names:
            if shapes.setdefault(name, mask.shape(name)) != mask.shape(name):
                raise ValueError(f"{name} has different shapes in two masks: they are of different models")
        for name, base in {**mask.base, **mask.frozen}.items():
            if known.setdefault(name, base) != base:
                raise ValueError(f"two masks are of different bases: {name} differs")
    frozen = {name: base for name, base in known.items() if name not in names}

    def indices() -> Iterator[tuple[str, tuple[int, ...], Tensor]]:
        for name in names:
            flags = [
                mask.dense(name) if name in mask.names else torch.zeros(shapes[name], dtype=torch.bool)
                for mask in masks
            ]
            made = flags[0]
            for other in flags[1:]:
                made = combine(made, other)
            yield name, shapes[name], made.flatten().nonzero().squeeze(1)

    made = Mask.from_indices(indices())
    if not all(name in known for name in names):
        return made
    return made.with_base({name: known[name] for name in names}, frozen)
