"""The proximal pull of a step: which values the masters are pulled to, how strongly each, and the rate of the step."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Pull(NamedTuple):
    """What `adamw_`, `rmsprop_` and `pull_` need to pull new fp32 masters w towards old values.

    In fp32, one rounding an operation, after the step has made w and before w is stored and cast into the weights:
        c = rate * importance;  w = w - (w - old) * (c / (1 + c))
    That is `old + (w - old) / (1 + c)`: the proximal operator of `c / 2 * (w - old)**2` (Parikh and Boyd, Proximal
    Algorithms, 2014), so it converges for any c and never overshoots. Importance weights it as elastic weight
    consolidation does (arXiv 1612.00796), and it is decoupled from the gradient and its moments, as the weight decay of
    AdamW is (arXiv 1711.05101). Written so, a rate of 0 leaves every finite master as it is (but a negative zero may
    become a positive one).

    old: compact, bf16, fp16 or fp32 (in practice the weights' dtype). importance: compact, bf16 or fp32, finite and at
    least 0, which is not checked on the device. Both are as long as the masters, padded to whole tiles. rate: one fp32
    value on the device, the learning rate of this step times mu; see `pull_rate`.
    """

    old: Tensor
    importance: Tensor
    rate: Tensor
