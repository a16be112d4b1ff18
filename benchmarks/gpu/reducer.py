"""Stage `reducer`: the reducer's asynchronous path, C of the review, with groups of one rank.

Shard, replica and world are process groups, so the all-to-all, the second leg, `wait()` and the streams are those of a
run on many ranks. A slow product keeps the stream busy before every gradient, and memory that was just given back is
filled with NaN: who reads too early or keeps too little is found out.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.engines import join_world_of_one
from lota.zero.compact.reduction import GradientReducer, ReductionGroups


def run(bench: Bench) -> None:
    join_world_of_one(bench.device)
    groups = [dist.new_group([0]) for _ in range(3)]
    both_legs = ReductionGroups(groups[0], groups[1], groups[2], 1, 1, 0)
    first_leg = ReductionGroups(groups[0], None, groups[0], 1, 1, 0)
    second_leg = ReductionGroups(None, groups[1], groups[2], 1, 1, 0)
    cases = [
        ("both legs", both_legs, {"wire": torch.float32}),
        ("both legs, bf16", both_legs, {"wire": torch.bfloat16}),
        ("both legs, once per step", both_legs, {"reduce_every": "step"}),
        ("all-to-all only", first_leg, {}),
        ("all-reduce only", second_leg, {}),
    ]
    for name, legs, options in cases:
        bench.attempt(f"C {name}", lambda n=name, g=legs, o=options: _turns(bench, n, g, o), seconds=3)


def _turns(bench: Bench, name: str, groups: ReductionGroups, options: dict[str, Any]) -> None:
    sizes, device = bench.sizes, bench.device.torch
    counts = [[count] for count in sizes.slots for _ in range(4)]
    summed: dict[int, Tensor] = {}

    def deliver(slots: range, values: Tensor) -> None:
        for slot in slots:
            count = counts[slot][0]
            summed.setdefault(slot, torch.zeros(count, device=device)).add_(values[:count])
            values = values[count:]

    reducer = GradientReducer(
        counts, bucket_numel=sizes.bucket, groups=groups, deliver=deliver, device=torch.device(device), **options
    )
    wrong, started = torch.zeros((), dtype=torch.int64, device=device), time.perf_counter()
    for turn in range(sizes.turns):
        summed.clear()
        is_used_again = turn % 3 == 0
        _one_backward(reducer, counts, turn, is_used_again, bench)
        for slot in range(len(counts)):
            expected = slot + turn + (1.0 if slot == 0 and is_used_again else 0.0)  # all are exact in bf16
            wrong += (summed[slot] != expected).sum()
    bench.device.synchronize()
    took = (time.perf_counter() - started) / sizes.turns
    bench.check(f"C {name}", int(wrong) == 0, f"{int(wrong)} wrong entries of {sum(n for n, in counts)} a turn")
    sent = f"{reducer.bytes_sent:,} bytes sent"
    bench.figure(f"C {name}: a turn, busy stream included", took * 1e3, "ms", beside=sent)


def _one_backward(
    reducer: GradientReducer, counts: list[list[int]], turn: int, is_used_again: bool, bench: Bench
) -> None:
    device, width = bench.device.torch, bench.sizes.busy_width
    busy = torch.randn(width, width, device=device)
    for slot in reversed(range(len(counts))):
        busy = (busy @ busy).mul_(1e-2).clamp_(-1, 1)
        source = torch.full((counts[slot][0],), float(slot + turn), device=device)
        reducer.add(slot, lambda out, is_first, source=source: out.copy_(source) if is_first else out.add_(source))
        del source
        torch.empty(counts[slot][0], device=device).fill_(float("nan"))
    if is_used_again:
        reducer.add(0, lambda out, is_first: out.add_(1.0))
    reducer.finish()
