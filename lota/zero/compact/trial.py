"""Which optimizers may run on compact state: found out by running them as training and checkpoints do.

An optimizer is admitted where the update of a weight depends on that weight and its gradients alone, and where its
state can be kept. For both, copies of it step the same values three times: as one long tensor for each parameter group;
cut into odd pieces, padded as masters are; and so again, but stopped in the middle, kept by the codec of checkpoints,
given to a fresh copy and cut in different places. All three must end in the same bits.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lota.kernels import TILE
from lota.zero.checkpoint import state_codec
from lota.zero.compact.flat_optimizer import FlatOptimizer, Part

# Odd, tiny, a tile and its neighbours, and long enough for optimizers that treat long tensors otherwise, as those with
# quantized states do. All of it below the length from which torch shares an operation between threads.
PIECES = (1, 3, 1021, 4099, 1024, 12_345)
STEPS, STOP = 8, 4
_LEARNING_RATE = 0.1  # a warmup begins with 0, and a small one would hide differences


class _DifferingError(ValueError):
    """State beside the entries differs between tensors of a parameter group; a checkpoint keeps it once for a group."""


@dataclass
class _Outcome:
    """What a run ended with, by group: the weights, state for each of them by path, and the rest of the state."""

    weights: list[Tensor]
    entries: list[dict[str, Tensor]]
    kept: list[dict[str, Any]]


def check_admitted(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """ValueError, with the reason, for an optimizer that cannot run on compact state and be resumed from checkpoints.

    Its own state, groups and hooks are left alone, and so are torch's random numbers.
    """
    name, given = type(optimizer).__name__, FlatOptimizer(optimizer)
    cure = "Use AdamW, RMSprop or another optimizer that updates every weight from its own gradient."
    if all(callable(getattr(optimizer, swap, None)) for swap in ("train", "eval")):
        raise ValueError(
            f"optimizer {name} exchanges the weights for others between train() and eval(), which it could not do on "
            f"compact state: what is evaluated and saved would be the wrong ones. {cure}"
        )
    not_element_wise = (
        f"optimizer {name} is not element-wise: its update of a weight depends on other weights of the tensor (as "
        "norms, matrices and block-wise 8-bit states do) or on chance, which compact state does not keep"
    )
    try:
        with _own_chance(device):
            whole = _run(given, device, (sum(PIECES),))
            pieces = _run(given, device, PIECES)
    except _DifferingError as error:
        raise ValueError(f"{not_element_wise}; {error}. {cure}") from None
    except Exception as error:  # foreign code, which may fail in any way
        raise ValueError(
            f"optimizer {name} cannot run on compact state: a trial on flat tensors failed ({_short(error)}). {cure}"
        ) from error
    if not _are_equal(whole, pieces):
        raise ValueError(f"{not_element_wise}. {cure}")
    try:
        with _own_chance(device):
            resumed = _run(given, device, PIECES, resumes=True)
    except Exception as error:
        raise ValueError(
            f"optimizer {name} cannot be resumed: keeping its state and resuming from it failed in a trial "
            f"({_short(error)}). {cure}"
        ) from error
    if not _are_equal(pieces, resumed):
        raise ValueError(
            f"optimizer {name} cannot be resumed: in a trial it resumed differently from what a checkpoint keeps, so "
            f"it remembers something beside its state and its parameter groups. {cure}"
        )


def _run(given: FlatOptimizer, device: torch.device, sizes: Sequence[int], resumes: bool = False) -> _Outcome:
    """STEPS steps of a fresh copy on the trial's values, cut by `sizes`."""
    optimizer = given.fresh()
    for group in optimizer.groups:
        if isinstance(group.get("lr"), Tensor):
            group["lr"].fill_(_LEARNING_RATE)
        elif isinstance(group.get("lr"), (int, float)):
            group["lr"] = _LEARNING_RATE
    count, generator = sum(PIECES), torch.Generator().manual_seed(0)
    start = [torch.randn(count, generator=generator, dtype=torch.float32).to(device) for _ in optimizer.groups]
    flats = [_cut(values, sizes) for values in start]
    for step in range(STEPS):
        if resumes and step == STOP:
            sizes = sizes[::-1]
            optimizer, flats = _stopped(given, optimizer, flats, sizes)
        parts = []
        for number, pieces in enumerate(flats):
            gradient = torch.randn(count, generator=generator, dtype=torch.float32) * (1.0, 10.0, 0.1)[step % 3]
            gradient[:1500] *= step % 2  # zero in every other step
            gradient[2000:2010] *= 1000
            parts += [Part(*both, number) for both in zip(pieces, _cut(gradient.to(device), sizes), strict=True)]
        optimizer.step(parts, with_hooks=False)
    return _outcome(optimizer, flats, sizes)


def _stopped(
    given: FlatOptimizer, optimizer: FlatOptimizer, flats: Sequence[Sequence[Tensor]], sizes: Sequence[int]
) -> tuple[FlatOptimizer, list[list[Tensor]]]:
    """A fresh copy with what a checkpoint keeps of `optimizer`, its values cut by `sizes`."""
    outcome = _outcome(optimizer, flats, sizes[::-1])
    groups, kept = json.loads(
        json.dumps([[state_codec.encode_group(group) for group in optimizer.groups], outcome.kept])
    )
    resumed, made = given.fresh(), []
    for number, (group, weights) in enumerate(zip(resumed.groups, outcome.weights, strict=True)):
        state_codec.restore_group(group, groups[number], weights.device)
        made.append(_cut(weights, sizes))
        for flat in made[-1]:
            resumed.give_back(flat, number, kept[number])
        for path, values in outcome.entries[number].items():
            for flat, cut in zip(made[-1], _cut(values, sizes), strict=True):
                resumed.keep(flat)[1][path].copy_(cut)
    return resumed, made


def _outcome(optimizer: FlatOptimizer, flats: Sequence[Sequence[Tensor]], sizes: Sequence[int]) -> _Outcome:
    outcome = _Outcome([], [], [])
    for pieces in flats:
        kept, entries = zip(*(optimizer.keep(flat) for flat in pieces), strict=True)
        differing = {key for one in kept for key in {*one, *kept[0]} if one.get(key) != kept[0].get(key)}
        if differing:
            raise _DifferingError(f"{sorted(differing)[0]} of its state differs between tensors of one parameter group")
        if "master" in entries[0]:
            raise ValueError("its state has the name master, which a checkpoint uses for the fp32 weights")
        outcome.kept.append(kept[0])
        outcome.weights.append(_joined(pieces, sizes))
        outcome.entries.append({path: _joined([own[path] for own in entries], sizes) for path in entries[0]})
    return outcome


def _cut(values: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Pieces of these sizes, each padded with zeros to whole tiles."""
    return [torch.nn.functional.pad(piece, (0, -piece.numel() % TILE)) for piece in values.split(list(sizes))]


def _joined(pieces: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    return torch.cat([piece[:size] for piece, size in zip(pieces, sizes, strict=True)])


def _are_equal(one: _Outcome, other: _Outcome) -> bool:
    """Bit for bit; what is kept beside tensors as JSON."""
    if one.kept != other.kept or any(a.keys() != b.keys() for a, b in zip(one.entries, other.entries, strict=True)):
        return False
    pairs = [*zip(one.weights, other.weights, strict=True)]
    for mine, yours in zip(one.entries, other.entries, strict=True):
        pairs += [(mine[path], yours[path]) for path in mine]
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)


def _own_chance(device: torch.device) -> AbstractContextManager[None]:
    """Leaves torch's random numbers as they were."""
    if device.type == "cpu":
        return torch.random.fork_rng([])
    return torch.random.fork_rng([device], device_type=device.type)


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:300]
