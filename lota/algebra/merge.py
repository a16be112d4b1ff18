"""Several tickets of one base become one, tensor by tensor, in memory proportional to their entries.

With d_i = value - base of ticket i (0 where it has no entry), w_i its weight and everything in fp32:

    sum      base + sum w_i d_i
    linear   sum w_i v_i / sum w_i, v_i the value, or the base's where a ticket has no entry
    ties     each d_i trimmed to its largest entries (density), the sign of sum w_i d_i elected for every entry, and the
             weighted mean of those that agree with it added (Yadav et al., arXiv 2306.01708)
    dare     each d_i dropped at random down to density, the rest divided by it, then as sum (Yu et al., arXiv
    2311.03099) della    the same, but large entries are dropped less often: their chance to stay grows with their rank
    in the row
             from density - epsilon to density + epsilon, and they are divided by it (Deep et al., arXiv 2406.11617)

An entry that one ticket alone has, at a weight of 1, keeps that ticket's bits under sum: tickets that share no entry
merge exactly.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from lota.progress import Say, silent, tracked
from lota.ticket import BaseTensor, Mask, Ticket, TicketWriter

METHODS = ("sum", "linear", "ties", "dare", "della")
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Merge:
    """How tickets are merged. weights: one for each ticket (1). of_patterns: other weights for tensors whose names
    match a pattern, the last that matches counts. layers: two numbers a, b: layer l of L counts a + b * l / (L - 1)
    (LiNeS, arXiv 2410.17146); tensors outside of layers count 1. density, epsilon: of ties, dare and della. lam: all of
    the difference is multiplied by it at the end. seed: of dare and della."""

    method: str = "sum"
    weights: Sequence[float] | None = None
    of_patterns: Mapping[str, Sequence[float]] = field(default_factory=dict)
    layers: tuple[float, float] | None = None
    density: float = 1.0
    epsilon: float = 0.1
    lam: float = 1.0
    seed: int = 0

    def check(self, count: int) -> None:
        """ValueError for what cannot be meant for `count` tickets."""
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        for where, weights in (("weights", self.weights), *self.of_patterns.items()):
            if weights is not None and len(weights) != count:
                raise ValueError(f"{where}: expected a weight for each of {count} tickets, got {len(weights)}")
        if not 0 < self.density <= 1:
            raise ValueError(f"density must be above 0 and at most 1, got {self.density}")
        low, high = self.density - self.epsilon, self.density + self.epsilon
        if self.method == "della" and self.density < 1 and not (low > 0 and high < 1):
            raise ValueError(f"della: density -/+ epsilon must lie between 0 and 1, got {low:g} and {high:g}")

    def weights_of(self, name: str, count: int, num_layers: int) -> list[float]:
        """The tickets' weights for one tensor."""
        weights = list(self.weights or [1.0] * count)
        for pattern, others in self.of_patterns.items():
            if fnmatchcase(name, pattern):
                weights = list(others)
        layer = _LAYER.search(f".{name}")
        if self.layers is not None and layer is not None:
            first, grows = self.layers
            factor = first + grows * int(layer[1]) / max(1, num_layers - 1)
            weights = [factor * weight for weight in weights]
        return weights


def merge(
    tickets: Sequence[Ticket],
    out: str | os.PathLike[str],
    how: Merge | None = None,
    *,
    overwrite: bool = False,
    say: Say = silent,
) -> dict[str, int]:
    """Write one ticket for all of them; counts and bytes. ValueError where they are not of one base, have no base
    values, or bring tensors that the base does not have.

    An entry is active where any ticket has it. A tensor of all tickets is in memory, and the indices.
    """
    how = how or Merge()
    how.check(len(tickets))
    if not tickets:
        raise ValueError("expected tickets to merge, got none")
    base, frozen = one_base(tickets)
    names = list(base)

    def indices() -> Any:
        for name in tracked(names, "entries found", say):
            having = [ticket.mask for ticket in tickets if name in ticket.mask.names]
            yield name, having[0].shape(name), _union(having, name)

    mask = Mask.from_indices(indices()).with_base(base, frozen)
    num_layers = 1 + max((int(found[1]) for name in names if (found := _LAYER.search(f".{name}"))), default=0)
    sources = [ticket.provenance for ticket in tickets]
    facts = {
        "class": next((facts["class"] for facts in sources if facts.get("class")), None),
        "model": next((facts["model"] for facts in sources if facts.get("model")), None),
        "merged by": how.method,
        "weights": list(how.weights or [1.0] * len(tickets)),
        "of": [{key: facts[key] for key in ("data", "score", "steps") if key in facts} for facts in sources],
    }
    facts |= {"density": how.density} if how.method in ("ties", "dare", "della") else {}
    facts |= {"seed": how.seed} if how.method in ("dare", "della") else {}
    with TicketWriter(out, mask, {k: v for k, v in facts.items() if v is not None}, overwrite=overwrite) as writer:
        for name in tracked(names, "merged", say):
            writer.add(name, *_merged(tickets, mask, name, how, num_layers))
    return {"num_active": mask.num_active, "num_changed": writer.num_changed or 0, "bytes": writer.num_bytes}


def one_base(tickets: Sequence[Ticket]) -> tuple[dict[str, BaseTensor], dict[str, BaseTensor]]:
    """Identity of the tensors that any ticket names, and of the others that any knows. ValueError where two differ."""
    known: dict[str, BaseTensor] = {}
    named: dict[str, None] = {}
    for number, ticket in enumerate(tickets, 1):
        if not ticket.has_base_values:
            raise ValueError(f"ticket {number} holds no base values, so its differences are not known")
        if not ticket.mask.base:
            raise ValueError(f"ticket {number} does not know its base, so nothing says that it is the others'")
        if any(base.rows is not None for base in ticket.mask.base.values()):
            raise ValueError(f"ticket {number} brings tensors or rows that the base does not have: it cannot be merged")
        for name, base in {**ticket.mask.base, **ticket.mask.frozen}.items():
            if known.setdefault(name, base) != base:
                raise ValueError(f"ticket {number} is of another base than the ones before it: {name} differs")
        named |= dict.fromkeys(ticket.names)
    return {name: known[name] for name in named}, {n: base for n, base in known.items() if n not in named}


def _union(masks: Sequence[Mask], name: str) -> Tensor:
    """Positions that are active in any of the masks, ascending."""
    parts = [mask.indices(name) for mask in masks]
    if len(parts) == 1:
        return parts[0]
    numel = masks[0].numel(name)
    if any(mask.shape(name) != masks[0].shape(name) for mask in masks):
        raise ValueError(f"{name} has different shapes in two tickets: they are of different models")
    if sum(map(len, parts)) > numel // 256:  # a flag for every element is faster than sorting
        flags = torch.zeros(numel, dtype=torch.bool)
        for part in parts:
            flags[part] = True
        return flags.nonzero().squeeze(1)
    return torch.cat(parts).unique()


def _merged(tickets: Sequence[Ticket], mask: Mask, name: str, how: Merge, num_layers: int) -> tuple[Tensor, Tensor]:
    """Values and base values of one tensor of the merged ticket."""
    where = mask.indices(name)
    having = [number for number, ticket in enumerate(tickets) if name in ticket.names and ticket.mask.active(name)]
    places = {number: torch.searchsorted(where, tickets[number].mask.indices(name)) for number in having}
    own = [tickets[number].values(name) for number in having]
    base_dtype: torch.dtype = getattr(torch, mask.base[name].dtype)
    base = torch.zeros(where.numel(), dtype=base_dtype)
    for number in having:
        base[places[number]] = tickets[number].base_values(name)
    if not having:
        return base.clone(), base
    dtype = torch.float32 if any(values.dtype == torch.float32 for values in own) else base_dtype
    if base_dtype not in _FLOATS:
        return _only_one(name, having, own), base
    weights = how.weights_of(name, len(tickets), num_layers)
    base32 = base.float()
    made = torch.zeros(len(tickets), where.numel(), dtype=torch.float32)
    if how.method == "linear":
        made[:] = base32
    for number, values in zip(having, own, strict=True):
        there = places[number]
        made[number, there] = values.float() if how.method == "linear" else values.float() - base32[there]
    if how.method == "linear":
        result = _linear(made, weights)
        if how.lam != 1:
            result = base32 + how.lam * (result - base32)
        return result.to(dtype), base
    for number in having if how.method != "sum" and how.density < 1 else ():
        made[number] = _sparser(made[number], where, mask, name, how, number)
    scales = torch.tensor(weights, dtype=torch.float32).unsqueeze(1)
    made.mul_(scales)
    change = _elected(made, scales) if how.method == "ties" else made.sum(0)
    if how.lam != 1:
        change *= how.lam
    result = (base32 + change).to(dtype)
    if how.method == "sum" and how.lam == 1:
        _keep_bits(result, tickets, having, places, own, weights)
    return result, base


def _linear(values: Tensor, weights: Sequence[float]) -> Tensor:
    total = torch.zeros_like(values[0])
    for row, weight in zip(values, weights, strict=True):
        total.addcmul_(row, torch.tensor(weight, dtype=torch.float32))
    return total.div_(torch.tensor(weights, dtype=torch.float32).sum())


def _elected(made: Tensor, scales: Tensor) -> Tensor:
    """The weighted mean of the differences that have the sign of their sum. made: differences times weights."""
    majority = (made.sum(0) >= 0).float() * 2 - 1
    agree = made.sign() == majority
    divisor = (scales * agree).sum(0)
    divisor[divisor == 0] = 1
    return (made * agree).sum(0).div_(divisor)


def _sparser(row: Tensor, where: Tensor, mask: Mask, name: str, how: Merge, number: int) -> Tensor:
    """One ticket's differences with some of them dropped. Density is of all elements of the tensor for ties, as others
    trim dense differences, and of the entries for dare and della."""
    if how.method == "ties":
        count = max(1, int(how.density * mask.numel(name)))
        held = int(torch.count_nonzero(row))
        if count >= held:
            return row
        kept = torch.argsort(row.abs(), descending=True)[:count]
        return torch.zeros_like(row).index_copy_(0, kept, row[kept])
    seed = hashlib.sha256(f"{how.seed} {number} {name}".encode()).digest()[:8]
    generator = torch.Generator().manual_seed(int.from_bytes(seed, "little") >> 1)
    chance = torch.full_like(row, how.density)
    if how.method == "della":
        chance = how.density - how.epsilon + 2 * how.epsilon * _rank_in_row(row, where, mask, name)
    stays = torch.rand(row.shape, generator=generator, dtype=torch.float32) < chance
    return torch.where(stays, row / chance, torch.zeros((), dtype=torch.float32))


def _rank_in_row(row: Tensor, where: Tensor, mask: Mask, name: str) -> Tensor:
    """For every entry that differs, its place among those of its row of the tensor by size, from 0 to 1."""
    shape = mask.shape(name)
    width = mask.numel(name) // shape[0] if shape else 1
    lines = where // max(1, width)
    held = row != 0
    order = torch.argsort(row.abs(), stable=True)
    order = order[torch.argsort(lines[order], stable=True)]
    order = order[held[order]]
    counts = torch.bincount(lines[held], minlength=int(lines.max()) + 1 if lines.numel() else 0)
    starts = counts.cumsum(0) - counts
    rank = torch.zeros_like(row)
    own_line = lines[order]
    within = torch.arange(order.numel()) - starts[own_line]
    rank[order] = within.float() / (counts[own_line] - 1).clamp(min=1).float()
    return rank


def _keep_bits(
    result: Tensor,
    tickets: Sequence[Ticket],
    having: Sequence[int],
    places: Mapping[int, Tensor],
    own: Sequence[Tensor],
    weights: Sequence[float],
) -> None:
    """Entries of one ticket alone, at a weight of 1, get its own bits: the sum could round."""
    holders = torch.zeros(result.numel(), dtype=torch.int32)
    for number in having:
        holders[places[number]] += 1
    for number, values in zip(having, own, strict=True):
        if weights[number] == 1:
            alone = holders[places[number]] == 1
            result[places[number][alone]] = values[alone].to(result.dtype)


def _only_one(name: str, having: Sequence[int], own: Sequence[Tensor]) -> Tensor:
    """Values of integers and flags, which have no differences: those of the only ticket that has them."""
    if any(not torch.equal(values, own[0]) for values in own):
        raise ValueError(f"{name} is {own[0].dtype}, and {len(having)} tickets have other values of it")
    return own[0]
