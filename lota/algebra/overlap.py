"""What tickets share: entries, signs, and what would be lost if they were added."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch

from lota.algebra.change import differences
from lota.ticket import Ticket


@dataclass(frozen=True)
class Overlap:
    """Two tickets, a and b by number, on one tensor ("": on all). shared: entries active in both, of `active_a` and
    `active_b`. conflicts: shared entries that they move in opposite directions. lost: 1 - |d_a + d_b| / (|d_a| +
    |d_b|), summed over all entries: the part of what both change that cancels when they are added; 0 where the
    differences are not known."""

    a: int
    b: int
    name: str
    active_a: int
    active_b: int
    shared: int
    conflicts: int
    lost: float


def overlap(tickets: Sequence[Ticket], *, per_tensor: bool = False) -> Iterator[Overlap]:
    """For every pair, what it shares in all, after (`per_tensor`) a line for every tensor that both name."""
    for one, other in combinations(range(len(tickets)), 2):
        a, b = tickets[one], tickets[other]
        shared = conflicts = 0
        mass = kept = 0.0
        for name in dict.fromkeys((*a.names, *b.names)):
            found = _tensor(a, b, name)
            shared, conflicts = shared + found[0], conflicts + found[1]
            mass, kept = mass + found[2], kept + found[3]
            if per_tensor and name in a.names and name in b.names:
                lost = 1 - found[3] / found[2] if found[2] else 0.0
                yield Overlap(one, other, name, a.mask.active(name), b.mask.active(name), found[0], found[1], lost)
        lost = 1 - kept / mass if mass else 0.0
        yield Overlap(one, other, "", a.num_active, b.num_active, shared, conflicts, lost)


def _tensor(a: Ticket, b: Ticket, name: str) -> tuple[int, int, float, float]:
    """Shared entries, those in conflict, the mass of both, and the mass of their sum."""
    known = a.has_base_values and b.has_base_values
    parts = [
        differences(ticket, name).double() if known and name in ticket.names else torch.zeros(0, dtype=torch.float64)
        for ticket in (a, b)
    ]
    mass = sum(float(part.abs().sum()) for part in parts)
    if name not in a.names or name not in b.names:
        return 0, 0, mass, mass
    if a.mask.shape(name) != b.mask.shape(name):
        raise ValueError(f"{name} has different shapes in the two tickets: they are of different models")
    one, other = a.mask.indices(name), b.mask.indices(name)
    if not one.numel() or not other.numel():
        return 0, 0, mass, mass
    at = torch.searchsorted(other, one).clamp_(max=other.numel() - 1)
    both = other[at] == one
    shared = int(both.sum())
    if not known or not shared:
        return shared, 0, mass, mass
    first, second = parts[0][both], parts[1][at[both]]
    conflicts = int((first * second < 0).sum())
    kept = mass - float((first.abs() + second.abs() - (first + second).abs()).sum())
    return shared, conflicts, mass, kept
