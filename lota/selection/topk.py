"""Exact top-k by |score| over scores that lie in pieces on many ranks: two radix passes, and ties by hash.

key(score) = the 31 low bits of the score as fp32: ordered as |score| is, with NaN above infinity. Pass one counts the
upper 15 bits of all keys, pass two the lower 16 bits of those in the bin that holds the k-th largest. The counts are
summed over the ranks, so every rank finds the same threshold key. Entries at the threshold are ranked by a bijective
hash of their position in the whole model: a total order that owes nothing to the cut, and nested for smaller k. (Ties
by position would fill whole early layers: bf16 deltas take few values.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from lota.kernels import fmix64
from lota.selection.ranks import Ranks

LOW_BITS = 16
NUM_HIGH_BINS = 1 << 15
LOW_MASK = (1 << LOW_BITS) - 1
KEY_MASK = 0x7FFFFFFF
INFINITY_KEY = 0x7F800000
PROTECTED_KEY = -1
# Elements per chunk: a CPU core's temporaries stay in its cache; accelerators want fewer launches.
_CPU_CHUNK, _ACCELERATOR_CHUNK = 1 << 18, 1 << 24
MAX_GATHERED_TIES = 1 << 20  # the most tied hashes that may be gathered and sorted (8 MB); above, one more radix pass


@dataclass(frozen=True)
class ScorePiece:
    """A rank's contiguous run of one tensor's scores: flat, never empty, any float dtype."""

    name: str
    start: int  # flat position of its first score inside the tensor
    model_start: int  # the same inside the concatenation of all eligible tensors
    scores: Tensor
    free: Tensor | None = None  # bool, False where protected; None: nothing is

    def chunks(self) -> Iterator[tuple[int, Tensor]]:
        """(offset inside the piece, int32 keys, -1 where protected); the keys are overwritten by the next chunk's."""
        size = _CPU_CHUNK if self.scores.device.type == "cpu" else _ACCELERATOR_CHUNK
        # One buffer, because memory that is new costs more than the arithmetic: the system maps and zeroes its pages.
        buffer = torch.empty(min(size, self.scores.numel()), dtype=torch.int32, device=self.scores.device)
        for offset in range(0, self.scores.numel(), size):
            bits = self.scores[offset : offset + size].float().contiguous().view(torch.int32)
            keys = torch.bitwise_and(bits, KEY_MASK, out=buffer[: bits.numel()])
            if self.free is not None:
                keys.masked_fill_(~self.free[offset : offset + size], PROTECTED_KEY)
            yield offset, keys

    def split(self, num_parts: int) -> list[ScorePiece]:
        """The piece in at most `num_parts` parts of equal length, the last one shorter."""
        numel = self.scores.numel()
        length = max(1, -(-numel // (32 * max(1, num_parts)))) * 32
        return [
            replace(
                self,
                start=self.start + begin,
                model_start=self.model_start + begin,
                scores=self.scores[begin : begin + length],
                free=None if self.free is None else self.free[begin : begin + length],
            )
            for begin in range(0, numel, length)
        ]

    def count_nan(self) -> int:
        """NaN among all the scores, the protected ones too."""
        return sum(int((keys > INFINITY_KEY).sum()) for _, keys in replace(self, free=None).chunks())


Walk = Callable[[], Iterable[ScorePiece]]
Each = Callable[[Callable[[ScorePiece], Tensor], ScorePiece], list[Tensor]]


def inline(function: Callable[[ScorePiece], Tensor], piece: ScorePiece) -> list[Tensor]:
    """The piece as its only part."""
    return [function(piece)]


@dataclass(frozen=True)
class Cut:
    """Take every key above `key` and, of those equal to it, the ones whose hash is at most `last_hash`."""

    key: int
    num_above: int
    num_tied: int  # free entries whose key equals `key`, chosen or not
    num_taken: int  # of those, how many are chosen
    last_hash: int | None  # None: all of them

    @property
    def threshold(self) -> float:
        return float(torch.tensor(self.key, dtype=torch.int32, device="cpu").view(torch.float32))


def count_high(piece: ScorePiece) -> tuple[Tensor, int]:
    """(int64 counts of the free keys' upper bits, number of NaN in the whole piece), counts on the scores' device."""
    counts = torch.zeros(NUM_HIGH_BINS, dtype=torch.int64, device=piece.scores.device)
    for _, keys in piece.chunks():
        high = keys.bitwise_right_shift_(LOW_BITS)
        counts += torch.bincount(high if piece.free is None else high[high >= 0], minlength=NUM_HIGH_BINS)
    # Infinity is legal and shares its bin with some NaN: look closely only when there is something to see.
    has_suspects = piece.free is not None or bool(counts[INFINITY_KEY >> LOW_BITS :].any())
    return counts, piece.count_nan() if has_suspects else 0


def find_cut(high_counts: Tensor, walk: Walk, k: int, ranks: Ranks, seed: int, each: Each = inline) -> Cut:
    """Where to cut for exactly k entries, 1 <= k <= sum(high_counts); the same on every rank. Collective.

    high_counts: count_high over all pieces of all ranks, on the CPU. walk: this rank's pieces; walked once, and once or
    twice more only when a tie must be broken. each: applies a function to the parts of a piece.
    """
    bin_high, num_above = _descend(high_counts, k)
    low_counts = torch.zeros(1 << LOW_BITS, dtype=torch.int64, device="cpu")
    for piece in walk():
        for counts in each(partial(count_low, bin_high=bin_high), piece):
            low_counts = low_counts.to(counts.device)
            low_counts += counts
    low_counts = ranks.sum(low_counts)
    bin_low, num_above_inside = _descend(low_counts, k - num_above)
    num_above += num_above_inside
    key = bin_high << LOW_BITS | bin_low
    num_tied = int(low_counts[bin_low])
    num_taken = k - num_above
    last_hash = None if num_taken == num_tied else _last_hash(walk, key, num_tied, num_taken, ranks, seed)
    return Cut(key, num_above, num_tied, num_taken, last_hash)


def count_low(piece: ScorePiece, bin_high: int) -> Tensor:
    """int64 counts of the lower bits of the keys whose upper bits are `bin_high`, on the scores' device."""
    counts = torch.zeros(1 << LOW_BITS, dtype=torch.int64, device=piece.scores.device)
    for _, keys in piece.chunks():
        counts += torch.bincount(_lower_bits(keys, bin_high), minlength=1 << LOW_BITS)
    return counts


def chosen_positions(piece: ScorePiece, cut: Cut, seed: int) -> Tensor:
    """Ascending int64 flat positions inside the tensor of what `cut` takes from this piece, on the scores' device."""
    found = []
    for offset, keys in piece.chunks():
        if cut.last_hash is None:
            local = keys.ge_(cut.key).nonzero()[:, 0]  # in place: int32 compares several times faster than to bool
        else:
            local = (keys >= cut.key).nonzero()[:, 0]
            tied = keys[local] == cut.key
            keep = ~tied
            keep[tied] = tie_hash(local[tied] + (piece.model_start + offset), seed) <= cut.last_hash
            local = local[keep]
        found.append(local.add_(piece.start + offset))
    return found[0] if len(found) == 1 else torch.cat(found)


def tie_hash(positions: Tensor, seed: int) -> Tensor:
    """MurmurHash3's 64-bit finalizer of position + seed * odd: int64, a bijection, so no two hashes are equal."""
    return fmix64(positions + _signed(seed * 0x9E3779B97F4A7C15))


def _last_hash(walk: Walk, key: int, num_tied: int, num_taken: int, ranks: Ranks, seed: int) -> int:
    """The num_taken-th smallest hash among the free entries whose key is `key`."""
    top: int | None = None  # the hash's upper 16 bits, once a radix pass has narrowed the search to them
    if num_tied > MAX_GATHERED_TIES:
        counts = torch.zeros(1 << 16, dtype=torch.int64, device="cpu")
        for hashes in _tied_hashes(walk, key, seed):
            counts = counts.to(hashes.device)
            counts += torch.bincount((hashes >> 48) + (1 << 15), minlength=1 << 16)
        bin_top, num_below = _ascend(ranks.sum(counts), num_taken)
        top, num_taken = bin_top - (1 << 15), num_taken - num_below
    mine = [torch.empty(0, dtype=torch.int64, device="cpu")]
    for hashes in _tied_hashes(walk, key, seed):
        mine.append((hashes if top is None else hashes[hashes >> 48 == top]).cpu())
    return int(ranks.join(torch.cat(mine).sort().values, 1 << 63).kthvalue(num_taken).values)


def _tied_hashes(walk: Walk, key: int, seed: int) -> Iterator[Tensor]:
    for piece in walk():
        for offset, keys in piece.chunks():
            local = (keys == key).nonzero()[:, 0]
            if local.numel():
                yield tie_hash(local + (piece.model_start + offset), seed)


def _lower_bits(keys: Tensor, bin_high: int) -> Tensor:
    """The lower bits of the keys whose upper bits are `bin_high`.

    Few are, so rows of 32 are looked at together, and only rows that hold one are looked at closely. Comparing in
    place keeps int32, which is several times faster than a comparison that makes bool.
    """
    if keys.numel() % 32 == 0:
        is_inside = (keys & ~LOW_MASK).eq_(bin_high << LOW_BITS).view(-1, 32)
        keys = keys.view(-1, 32)[is_inside.amax(1).nonzero()[:, 0]].view(-1)
    return keys[keys >> LOW_BITS == bin_high] & LOW_MASK


def _descend(counts: Tensor, k: int) -> tuple[int, int]:
    """(bin that holds the k-th largest, how many lie in bins above it)."""
    mirrored, num_above = _ascend(counts.flip(0), k)
    return counts.numel() - 1 - mirrored, num_above


def _ascend(counts: Tensor, k: int) -> tuple[int, int]:
    """(bin that holds the k-th smallest, how many lie in bins below it)."""
    up_to = counts.cumsum(0)
    found = int(torch.searchsorted(up_to, k))
    if found == counts.numel():
        raise RuntimeError("fewer scores than in the pass before: pieces() must give the same scores every time.")
    return found, int(up_to[found] - counts[found])


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value
