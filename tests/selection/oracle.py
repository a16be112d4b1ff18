"""A slow selection that shares no code with the library: Python integers, one sort over all entries."""

from __future__ import annotations

import torch

_MASK = (1 << 64) - 1


def tie_hash(position: int, seed: int) -> int:
    z = (position + seed * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 33)) * 0xFF51AFD7ED558CCD) & _MASK
    z = ((z ^ (z >> 33)) * 0xC4CEB9FE1A85EC53) & _MASK
    z ^= z >> 33
    return z - (1 << 64) if z >> 63 else z


def ranked(scores: dict[str, torch.Tensor], seed: int = 0, protected: set[tuple[str, int]] = frozenset()):
    """(name, flat position) of every entry that may be chosen, best first."""
    entries, start = [], 0
    for name, values in scores.items():
        magnitudes = values.flatten().to(torch.float32).abs().tolist()
        for flat, magnitude in enumerate(magnitudes):
            if (name, flat) not in protected:
                entries.append((-magnitude, tie_hash(start + flat, seed), name, flat))
        start += len(magnitudes)
    return [(name, flat) for _, _, name, flat in sorted(entries)]


def chosen(scores, density, budget="global", seed=0, protected=frozenset()) -> dict[str, list[int]]:
    """Ascending flat positions per tensor."""
    best = ranked(scores, seed, protected)
    if budget == "global":
        taken = best[: round(density * sum(values.numel() for values in scores.values()))]
    else:
        taken = []
        for name, values in scores.items():
            taken += [entry for entry in best if entry[0] == name][: round(density * values.numel())]
    return {name: sorted(flat for owner, flat in taken if owner == name) for name in scores}


def pieces_of(scores: dict[str, torch.Tensor]):
    """`pieces` and `shapes` of one process that holds everything."""
    return (
        lambda: ((name, 0, values.flatten()) for name, values in scores.items()),
        {name: tuple(values.shape) for name, values in scores.items()},
    )


def positions_of(mask) -> dict[str, list[int]]:
    return {name: mask.indices(name).tolist() for name in mask.names}
