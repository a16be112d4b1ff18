"""Selection: scores that lie in pieces on many ranks become a mask with an exact number of active entries."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lota.selection.budget import count_global, count_per_tensor, validate_budget, validate_density
from lota.selection.pieces import PieceReader, Pieces
from lota.selection.protection import Protection
from lota.selection.ranks import Ranks
from lota.selection.topk import NUM_HIGH_BINS, Cut, Piece, chosen_positions, count_high, find_cut
from lota.ticket import BaseTensor, Mask

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
    base: Mapping[str, BaseTensor] | None = None,
) -> Selection:
    """The entries with the largest |score|: exactly round(density * eligible) of them, whatever the number of ranks.

    Collective over `group` (None: all ranks, or one process when torch.distributed is not initialised).

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

    Scores rank by |score| in fp32; infinity is legal. ValueError, on every rank alike: bad arguments or arguments that
    differ between ranks, NaN (names the tensor), scores that are zero everywhere, scores missing or given twice, and
    a budget that does not fit beside the protected entries (says how many are left and which density fits).
    """
    density, budget, seed = validate_density(density), validate_budget(budget), _validate_seed(seed)
    if not shapes:
        raise ValueError("expected at least one eligible tensor in `shapes`, got none.")
    if base is not None and (missing := [name for name in shapes if name not in base]):
        raise ValueError(f"base must identify every eligible tensor, got none for {missing[0]} ({len(missing)} lack).")
    full = {name: tuple(int(size) for size in shape) for name, shape in shapes.items()}
    protection = Protection(protect, full, base)
    reader = PieceReader(pieces, full, protection)
    num_free = {name: protection.num_free(name) for name in full}
    if budget == "global":
        budget_global = count_global(density, reader.eligible, sum(num_free.values()))
    else:
        budgets = count_per_tensor(density, reader.numel, num_free)
    ranks = Ranks(group)
    ranks.same(_fingerprint(full, density, budget, seed, protect, ranks), "shapes, density, budget, protect and seed")

    cuts: list[Cut] = []
    if budget == "global":
        encodable = _choose_globally(reader, full, budget_global, ranks, seed, cuts)
        asked = budget_global
    else:
        encodable = _choose_per_tensor(reader, full, budgets, ranks, seed, cuts)
        asked = sum(budgets.values())
    mask = Mask.from_indices(encodable, base=None if base is None else {name: base[name] for name in full})
    if mask.num_active != asked:
        raise RuntimeError(
            f"{mask.num_active} entries were chosen where {asked} were asked for: pieces() gave other scores when it "
            f"was called again. {reader.problem or ''}"
        )
    return Selection(
        mask=mask,
        eligible=reader.eligible,
        threshold=min(cut.threshold for cut in cuts),
        num_tied=sum(cut.num_tied for cut in cuts if cut.last_hash is not None),
        num_zero_scored=sum(cut.num_taken for cut in cuts if cut.key == 0),
    )


def _choose_globally(
    reader: PieceReader, shapes: Mapping[str, tuple[int, ...]], k: int, ranks: Ranks, seed: int, cuts: list[Cut]
) -> Iterator[_EncodableTensor]:
    high_counts = _count_high(reader.walk(), reader, reader.names, ranks)
    cut = find_cut(high_counts, reader.walk, k, ranks, seed)
    cuts.append(cut)
    _refuse_all_zero(cuts)
    for name, mine in reader.walk_by_tensor():
        yield name, shapes[name], _join(mine, cut, reader.numel[name], ranks, seed)


def _choose_per_tensor(
    reader: PieceReader,
    shapes: Mapping[str, tuple[int, ...]],
    budgets: Mapping[str, int],
    ranks: Ranks,
    seed: int,
    cuts: list[Cut],
) -> Iterator[_EncodableTensor]:
    for name, mine in reader.walk_by_tensor():
        high_counts = _count_high(mine, reader, [name], ranks)
        if budgets[name] == 0:
            yield name, shapes[name], torch.empty(0, dtype=torch.int64, device="cpu")
            continue
        cut = find_cut(high_counts, mine.__iter__, budgets[name], ranks, seed)
        cuts.append(cut)
        yield name, shapes[name], _join(mine, cut, reader.numel[name], ranks, seed)
    _refuse_all_zero(cuts)


def _join(mine: list[Piece], cut: Cut, numel: int, ranks: Ranks, seed: int) -> Tensor:
    found = [chosen_positions(piece, cut, seed) for piece in mine]
    if not found:
        found = [torch.empty(0, dtype=torch.int64, device="cpu")]
    return ranks.join(torch.cat(found) if len(found) > 1 else found[0], numel)


def _count_high(walk: Iterable[Piece], reader: PieceReader, names: list[str], ranks: Ranks) -> Tensor:
    """First radix pass over this rank's pieces of `names`, summed over the ranks: int64 [NUM_HIGH_BINS] on the CPU.

    One collective carries the counts, what each tensor got, its NaN and whether a rank met misuse, so that every rank
    raises the same ValueError.
    """
    row = {name: number for number, name in enumerate(names)}
    given = torch.zeros(2, len(names), dtype=torch.int64, device="cpu")  # scores and NaN per tensor
    high_counts = torch.zeros(NUM_HIGH_BINS, dtype=torch.int64, device="cpu")
    for piece in walk:
        counts, num_nan = count_high(piece)
        high_counts = high_counts.to(counts.device)
        high_counts += counts
        given[0, row[piece.name]] += piece.scores.numel()
        given[1, row[piece.name]] += num_nan
    has_problem = torch.tensor([reader.problem is not None], dtype=torch.int64, device="cpu")
    total = ranks.sum(torch.cat([has_problem, given.flatten(), high_counts.cpu()]))
    if total[0]:
        raise ValueError(ranks.first_message(reader.problem))
    given = total[1 : 1 + given.numel()].view_as(given)
    for name, num_scores in zip(names, given[0].tolist(), strict=True):
        if num_scores != reader.numel[name]:
            raise ValueError(
                f"expected {reader.numel[name]} scores for {name} over all ranks, got {num_scores}. "
                f"pieces() must cover every tensor of `shapes` exactly once, in that order."
            )
    if (bad := given[1].nonzero()[:, 0]).numel():
        also = f" (and some in {bad.numel() - 1} other tensors)" if bad.numel() > 1 else ""
        raise ValueError(
            f"expected scores that are numbers, got {int(given[1, bad[0]])} NaN in {names[int(bad[0])]}{also}. "
            f"Calibration diverged: lower its learning rate, or check the data and the precision."
        )
    return total[1 + given.numel() :]


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
    shapes: Mapping[str, tuple[int, ...]], density: float, budget: str, seed: int, protect: Sequence[Mask], ranks: Ranks
) -> int:
    if ranks.size == 1:
        return 0
    told = json.dumps([list(shapes.items()), density, budget, seed, [mask.digest for mask in protect]])
    return int.from_bytes(hashlib.sha256(told.encode()).digest()[:7], "big")
