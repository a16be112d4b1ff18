"""Which way gradients are reduced when the choice is left to us (`gradient_reduction="auto"`)."""

from __future__ import annotations

from collections.abc import Callable

from lota.plan.methods import MethodPlan
from lota.plan.text import format_bytes

LEFT_FOR_ACTIVATIONS_PERCENT = 20


def choose_reduction(
    plan_of: Callable[[str], MethodPlan], memory: int | None, *, shard_size: int, reduce_every: str
) -> tuple[str, str]:
    """`compact` or `dense`, and why in one line. The same on every rank, because every rank passes the same integers.

    Compact sends `density` times the bytes, so it is taken unless its plan's peak exceeds 80% of the smallest device's
    memory and dense's peak is lower. plan_of(reduction): the plan, asked for only where it matters. memory: bytes of
    that device, None where unknown (CPU).
    """
    if reduce_every == "step":
        return "compact", "compact: reduce_every='step' keeps sums, which only compact ones are small enough for"
    if shard_size == 1:
        return "compact", "compact: every rank holds all weights, so the whole index is its own share"
    if memory is None:
        return "compact", "compact: it sends the fewest bytes, and the accelerator's memory is not known here"
    limit = memory * (100 - LEFT_FOR_ACTIVATIONS_PERCENT) // 100
    compact = plan_of("compact").peak
    needs = f"with the whole index a rank needs {format_bytes(compact)} of {format_bytes(memory)}"
    if compact <= limit:
        return "compact", f"compact: it sends the fewest bytes, and {needs}, at most 80%"
    dense = plan_of("dense").peak
    if dense >= compact:
        return "compact", f"compact: {needs}, more than 80%, but dense would need {format_bytes(dense)}"
    return "dense", f"dense: {needs}, more than 80%; with its own share only, {format_bytes(dense)}"
