"""Stochastic rounding to bf16, with random bits that depend on a seed, a step and a place and on nothing else.

A value between two bf16 neighbours becomes the upper one with the probability of its place between them: its lower 16
bits plus 16 random ones, cut off. So the mean of many roundings is the value itself, exact values stay, infinities stay
and a NaN stays a NaN. The random bits are a hash of integers, which every backend computes the same way:
bit for bit the same for any number of ranks, tiles and threads, and for a resumed run.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)  # of SplitMix64 (Steele, Lea and Flood 2014); odd, so places stay distinct
_MULTIPLIERS = (0xFF51AFD7ED558CCD - (1 << 64), 0xC4CEB9FE1A85EC53 - (1 << 64))


def rounding_key(seed: int, step: Tensor) -> Tensor:
    """The int64 device scalar that stands for a seed and a step in `adamw_` and `rmsprop_`; nothing is read back.

    `fmix64(fmix64(step) + seed)`. seed: in [0, 2**63). step: device scalar, the number of this step.
    """
    if not 0 <= seed < 1 << 63:
        raise ValueError(f"the seed of stochastic rounding must be in [0, 2**63), got {seed}")
    return fmix64(fmix64(step.to(torch.int64)) + seed)


def random_bits(key: Tensor, places: Tensor) -> Tensor:
    """16 random bits for each int64 place, as int64: the upper ones of `fmix64(place * 0x9E3779B97F4A7C15 + key)`."""
    return (fmix64(places * _GAMMA + key) >> 48).bitwise_and_(0xFFFF)


def to_bf16(values: Tensor, random: Tensor) -> Tensor:
    """fp32 values rounded to bf16 by 16 random bits for each."""
    bits = values.view(torch.int32)
    rounded = (bits + random.to(torch.int32)) >> 16
    return torch.where(values.isnan(), (bits >> 16) | 0x40, rounded).to(torch.int16).view(torch.bfloat16)


def fmix64(keys: Tensor) -> Tensor:
    """MurmurHash3's fmix64, a bijection, on int64 that stand for uint64: wrapping products, logical shifts."""
    for multiplier in _MULTIPLIERS:
        keys = (keys ^ ((keys >> 33) & 0x7FFFFFFF)) * multiplier
    return keys ^ ((keys >> 33) & 0x7FFFFFFF)
