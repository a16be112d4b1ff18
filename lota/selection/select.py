"""Selection: scores that lie in pieces on many ranks become a mask with an exact number of active entries."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lota.choices import check_budget, check_density
from lota.selection.budget import count_global, count_per_tensor
from lota.selection.pieces import PieceReader, Pieces
from lota.selection.protection import Protection
from lota.selection.ranks import Ranks
from lota.selection.topk import NUM_HIGH_BINS, Cut, ScorePiece, Walk, chosen_positions, count_high, find_cut
from lota.selection.workers import Workers
from lota.ticket import BaseTensor, Mask
from lota.ticket.rows import Rows, span, whole

_EncodableTensor = tuple[str, tuple[int, ...], Tensor]


@dataclass(frozen=True)
class Selection:
    """A mask and the facts of how it was chosen; all fields are the same on every rank."""

    mask: Mask
    eligible: int
    threshold: float  # the smallest |score| chosen, as fp32 (per_tensor: over all tensors)
    num_tied: int  # entries that share the threshold's score and were ranked by hash; 0 if all of them were taken
    num_zero_scored: int  # chosen although their score is 0: density asks for more than calibration ranked

    @property
    def num_active(self) -> int:
        return self.mask.num_active

    @property
    def density(self) -> float:
        return self.num_active / self.eligible

    @property
    def per_tensor(self) -> dict[str, int]:
        return {name: self.mask.active(name) for name in self.mask.names}

    def facts(self) -> dict[str, Any]:
        """What a run's summary records: plain JSON, without the counts per tensor."""
        fields = ("num_active", "eligible", "density", "threshold", "num_tied", "num_zero_scored")
        return {field: getattr(self, field) for field in fields}


@torch.no_grad()
def select(
    pieces: Pieces,
    shapes: Mapping[str, Sequence[int]],
    *,
    density: float,
    budget: str = "global",
    protect: Sequence[Mask] = (),
    seed: int = 0,
    group: dist.ProcessGroup | None = None,
    alone: bool = False,
    base: Mapping[str, BaseTensor] | None = None,
    rows: Mapping[str, Rows] | None = None,
) -> Selection:
    """The entries with the largest |score|: exactly round(density * eligible) of them, whatever the number of ranks.

    Collective over `group` (None: all ranks, or one process when torch.distributed is not initialised); alone: this
    process has every tensor whole and asks nobody.

    pieces: gives this rank's share as (name, offset, scores): a contiguous run of tensor `name` from flat position
    `offset`, 1-D, any float dtype, all on one device. Any cut over the ranks is allowed, empty pieces and absent
    tensors included; together the ranks must cover every tensor once. Tensors come in the order of `shapes`, several
    pieces of one tensor by ascending offset. It is called three times with the global budget (five at most, when ties
    must be broken), once with per_tensor, and must give the same scores every time. This rank's pieces of one tensor
    and the piece after them are alive at a time; beside them a rank holds histograms, a chunk, one tensor's chosen
    positions, and with `protect` a bool per entry of one tensor.
    shapes: the full shape of every eligible tensor, the same on all ranks; its order numbers the entries of the model.
    budget: "global" ranks all entries together; "per_tensor" chooses round(density * numel) in each tensor.
    protect: entries active in any of these masks are never chosen; the counts asked for stay as they are.
    seed: ties are ranked by a hash of (position in the model, seed), so a lower density's mask is a subset.
    base: identities of the base's tensors, checked against those of `protect` and stored in the mask.
    rows: of tensors that take part with some of their rows only, which; what lies outside is neither chosen nor counted
    as eligible, but scored.

    Scores rank by |score| in fp32; infinity is legal. ValueError, the same on every rank: bad arguments or arguments
    that differ between ranks, NaN (names the tensor), scores that are zero everywhere, scores missing or given twice,
    and a budget that does not fit beside the protected entries (says how many are left and which density fits).
    """
    density, budget, seed = check_density(density), check_budget(budget), _validate_seed(seed)
    full, protection, budgets = _plan(shapes, density, budget, protect, base, rows or {})
    with Workers() as workers:
        reader = PieceReader(pieces, full, protection, workers)
        asked = sum(budgets.values())
        ranks = Ranks(group, alone)
        told = _fingerprint(full, density, budget, seed, protect, rows or {}, ranks)
        ranks.same(told, "shapes, density, budget, protect and seed")
        chooser = _Chooser(reader, full, ranks, workers, seed)
        encodable = chooser.choose_globally(asked) if budget == "global" else chooser.choose_per_tensor(budgets)
        mask = Mask.from_indices(
            encodable, base=None if base is None else {name: base[name] for name in full}, rows=rows
        )
    if mask.num_active != asked:
        raise RuntimeError(
            f"{mask.num_active} entries were chosen where {asked} were asked for: pieces() gave other scores when it "
            f"was called again. {reader.problem or ''}"
        )
    return Selection(
        mask=mask,
        eligible=mask.eligible,
        threshold=min(cut.threshold for cut in chooser.cuts),
        num_tied=sum(cut.num_tied for cut in chooser.cuts if cut.last_hash is not None),
        num_zero_scored=sum(cut.num_taken for cut in chooser.cuts if cut.key == 0),
    )


def check(
    shapes: Mapping[str, Sequence[int]],
    *,
    density: float,
    budget: str = "global",
    protect: Sequence[Mask] = (),
    base: Mapping[str, BaseTensor] | None = None,
    rows: Mapping[str, Rows] | None = None,
) -> None:
    """Raise what `select` would raise before it looks at a score, so that a run can ask before it trains. Local."""
    _plan(shapes, check_density(density), check_budget(budget), protect, base, rows or {})


def _plan(
    shapes: Mapping[str, Sequence[int]],
    density: float,
    budget: str,
    protect: Sequence[Mask],
    base: Mapping[str, BaseTensor] | None,
    rows: Mapping[str, Rows],
) -> tuple[dict[str, tuple[int, ...]], Protection, dict[str, int]]:
    """Full shapes, the protected entries, and how many entries to choose: per tensor, or under "" for all together."""
    if not shapes:
        raise ValueError("expected at least one eligible tensor in `shapes`, got none.")
    if base is not None and (missing := [name for name in shapes if name not in base]):
        raise ValueError(f"base must identify every eligible tensor, got none for {missing[0]} ({len(missing)} lack).")
    full = {name: tuple(int(size) for size in shape) for name, shape in shapes.items()}
    spans = {name: span(shape, rows.get(name, whole(shape))) for name, shape in full.items()}
    numels = {name: stop - start for name, (start, stop) in spans.items()}
    protection = Protection(protect, full, base, spans)
    num_free = {name: protection.num_free(name) for name in full}
    if budget == "global":
        return full, protection, {"": count_global(density, sum(numels.values()), sum(num_free.values()))}
    return full, protection, count_per_tensor(density, numels, num_free)


class _Chooser:
    """Yields (name, shape, chosen positions) tensor by tensor, as Mask encodes them; keeps the cuts it made."""

    def __init__(
        self, reader: PieceReader, shapes: Mapping[str, tuple[int, ...]], ranks: Ranks, workers: Workers, seed: int
    ) -> None:
        self._reader, self._shapes, self._ranks, self._workers, self._seed = reader, shapes, ranks, workers, seed
        self.cuts: list[Cut] = []

    def choose_globally(self, k: int) -> Iterator[_EncodableTensor]:
        high_counts = self._count_high(self._reader.walk(), self._reader.names)
        cut = self._find_cut(high_counts, self._reader.walk, k)
        _refuse_all_zero(self.cuts)
        for name, mine in self._reader.walk_by_tensor():
            yield name, self._shapes[name], self._join(name, mine, cut)

    def choose_per_tensor(self, budgets: Mapping[str, int]) -> Iterator[_EncodableTensor]:
        for name, mine in self._reader.walk_by_tensor():
            high_counts = self._count_high(mine, [name])
            positions = torch.empty(0, dtype=torch.int64, device="cpu")
            if budgets[name]:
                positions = self._join(name, mine, self._find_cut(high_counts, mine.__iter__, budgets[name]))
            yield name, self._shapes[name], positions
        _refuse_all_zero(self.cuts)

    def _find_cut(self, high_counts: Tensor, walk: Walk, k: int) -> Cut:
        self.cuts.append(find_cut(high_counts, walk, k, self._ranks, self._seed, self._workers.each))
        return self.cuts[-1]

    def _join(self, name: str, mine: list[ScorePiece], cut: Cut) -> Tensor:
        find = partial(chosen_positions, cut=cut, seed=self._seed)
        found = [part for piece in mine for part in self._workers.each(find, piece)]
        if not found:
            found = [torch.empty(0, dtype=torch.int64, device="cpu")]
        return self._ranks.join(torch.cat(found) if len(found) > 1 else found[0], self._reader.numel[name])

    def _count_high(self, walk: Iterable[ScorePiece], names: list[str]) -> Tensor:
        """First radix pass over this rank's pieces of `names`, summed over the ranks: int64 [NUM_HIGH_BINS], CPU.

        One collective carries the counts, what each tensor got, its NaN and whether a rank met misuse, so that every
        rank raises the same ValueError.
        """
        row = {name: number for number, name in enumerate(names)}
        given = torch.zeros(2, len(names), dtype=torch.int64, device="cpu")  # scores and NaN per tensor
        high_counts = torch.zeros(NUM_HIGH_BINS, dtype=torch.int64, device="cpu")
        for piece in walk:
            for counts, num_nan in self._workers.each(count_high, piece):
                high_counts = high_counts.to(counts.device)
                high_counts += counts
                given[1, row[piece.name]] += num_nan
            given[0, row[piece.name]] += piece.scores.numel()
        has_problem = torch.tensor([self._reader.problem is not None], dtype=torch.int64, device="cpu")
        total = self._ranks.sum(torch.cat([has_problem, given.flatten(), high_counts.cpu()]))
        if total[0]:
            raise ValueError(self._ranks.first_message(self._reader.problem))
        num_scores, num_nan_of = total[1 : 1 + given.numel()].view_as(given).tolist()
        self._refuse_missing(names, num_scores)
        _refuse_nan(names, num_nan_of)
        return total[1 + given.numel() :]

    def _refuse_missing(self, names: list[str], num_scores: list[int]) -> None:
        for name, got in zip(names, num_scores, strict=True):
            if got != self._reader.numel[name]:
                raise ValueError(
                    f"expected {self._reader.numel[name]} scores for {name} over all ranks, got {got}. "
                    f"pieces() must cover every tensor of `shapes` exactly once, in that order."
                )


def _refuse_nan(names: list[str], num_nan: list[int]) -> None:
    bad = [(name, count) for name, count in zip(names, num_nan, strict=True) if count]
    if bad:
        also = f" (and some in {len(bad) - 1} other tensors)" if len(bad) > 1 else ""
        raise ValueError(
            f"expected scores that are numbers, got {bad[0][1]} NaN in {bad[0][0]}{also}. "
            f"Calibration diverged: lower its learning rate, or check the data and the precision."
        )


def _refuse_all_zero(cuts: list[Cut]) -> None:
    if all(cut.key == 0 and cut.num_above == 0 for cut in cuts):
        raise ValueError(
            "expected scores that rank the entries, got 0 for all that may be chosen. Calibration moved "
            "nothing there: run more steps, raise its learning rate, or check that gradients reach these tensors."
        )


def _validate_seed(seed: object) -> int:
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 63:
        raise ValueError(f"seed must be an integer in [0, 2**63), got {seed!r}.")
    return seed


def _fingerprint(
    shapes: Mapping[str, tuple[int, ...]],
    density: float,
    budget: str,
    seed: int,
    protect: Sequence[Mask],
    rows: Mapping[str, Rows],
    ranks: Ranks,
) -> int:
    if ranks.size == 1:
        return 0
    masks = [mask.digest for mask in protect]
    told = json.dumps([list(shapes.items()), density, budget, seed, masks, sorted(rows.items())])
    return int.from_bytes(hashlib.sha256(told.encode()).digest()[:7], "big")
