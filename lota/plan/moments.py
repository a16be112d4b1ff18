"""What the moments of a run that come once in a while take beside what is held: built, saved, resumed, selected.

All of it is bounded: a chunk of positions, a piece of a tensor, or what one tensor holds. docs/planning_formulas.md
lists the terms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lota.kernels import CHUNK
from lota.plan.counts import MaskCounts
from lota.plan.model import ModelShapes
from lota.ticket.codec import choose, num_bytes

_FINGERPRINT_ENTRIES = 1 << 22
"""Entries that a fingerprint looks at together, as int64 (lota.ticket.fingerprint)."""
_SELECTION_ENTRIES = 1 << 24
"""Scores that selection looks at together on an accelerator (lota.selection.topk)."""
_HISTOGRAMS = 3 * 8 * ((1 << 15) + (1 << 16))
"""Both passes' histograms, alive as a chunk's, this rank's and the sum over ranks."""
_POSITIONS = 4 * 8
"""Bytes of a chunk's positions for each entry: decoded, moved, compared, their distances."""


@dataclass(frozen=True)
class Moment:
    """Bytes that a moment adds to what is held between steps, on the device and in host memory."""

    device: int = 0
    host: int = 0


def build(
    model: ModelShapes,
    size: int,
    trained: Sequence[str],
    *,
    is_regrouped: bool = False,
    chunk: int = 0,
    index: int = 0,
    state: int = 0,
    base_values: int = 0,
) -> Moment:
    """The engine is made: DeepSpeed moves the trained pieces into one buffer through host memory, the weights are
    fingerprinted, and where shard groups are smaller than the world each tensor is gathered once.

    chunk: entries of a mask that are decoded together. index, state: bytes that are held on the device afterwards and
    not yet while weights are gathered and fingerprinted (the state not either while the index is made); base_values:
    the same in host memory. What is less than they are adds nothing.
    """
    whole = model.item_bytes * model.largest() if is_regrouped else 0
    pieces = model.item_bytes * model.pieces(size, trained)
    positions = _POSITIONS * chunk
    device = max(0, max(whole, _fingerprint(model, size)) - index - state, positions - state)
    return Moment(device, max(0, pieces - base_values, positions))


def chunk_of(counts: Mapping[str, int]) -> int:
    """Entries of the largest chunk of a mask."""
    return min(CHUNK, max(counts.values(), default=0))


def ticket(model: ModelShapes, mask: MaskCounts, size: int, own: int) -> Moment:
    """A ticket is written: all weights are fingerprinted, and of one tensor at a time the values and the base's reach
    rank 0, one after the other, which counts the changed ones. own: the most entries that the rank has of a tensor."""
    counts, item = mask.spread.counts, model.item_bytes
    most = max(counts.values(), default=0)
    encoded = max((_encoded(mask.numels[name], count) for name, count in counts.items()), default=0)
    positions = _POSITIONS * chunk_of(counts)
    device = max(_fingerprint(model, size), positions, item * (most + 2 * own))
    return Moment(device, max(positions, (2 * item + 1) * most + 2 * item * own + encoded))


def checkpoint(own: int) -> Moment:
    """State is written one vector after another; `own` entries in the longest."""
    return Moment(host=4 * own)


def resume(own: int) -> Moment:
    """A vector is read, and joined where it comes from several files."""
    return Moment(host=2 * 4 * own)


def selection(model: ModelShapes, ranks: int, eligible: Sequence[str], score: str) -> Moment:
    """Scores become a mask: the scores of a tensor's piece and of the next one, histograms and a chunk, and of one
    tensor the chosen positions, at worst all of them; the encoded mask is held afterwards."""
    piece, numel = model.largest_piece(ranks, eligible), model.largest(eligible)
    scores = {"task_vector": 8 + 4 + 4 + model.item_bytes, "snip": 8 + 8, "random": 8 + 4, "magnitude": 8 + 4}
    # |scores| of a chunk and what is compared of them, or the rank's own positions twice and everyone's as int32
    found = max(16 * min(_SELECTION_ENTRIES, piece), 16 * piece + (4 * numel if ranks > 1 else 0))
    # positions as int64, their high bits and numbers, and the bits of the tensor encoded
    return Moment(
        scores.get(score, 8 + 4) * piece + found + _HISTOGRAMS // 3,
        3 * 8 * numel + numel + _HISTOGRAMS,
    )


def _encoded(numel: int, count: int) -> int:
    codec, low_bits = choose(numel, count)
    return num_bytes(codec, numel, count, low_bits)


def _fingerprint(model: ModelShapes, size: int) -> int:
    return 8 * min(_FINGERPRINT_ENTRIES, model.largest_piece(size))
