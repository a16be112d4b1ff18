"""Stage `facts`: single questions that no CPU answers. The letters are those of the review that asked them."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import torch

from benchmarks.gpu.bench import Bench
from lota.kernels import TileIndex
from lota.selection.topk import ScorePiece, count_high
from lota.ticket.fingerprint import fingerprint

# In a child: an illegal access would end this process.
_FUSED = """
import sys, torch
device = sys.argv[1]
p = torch.nn.Parameter(torch.ones(4096, device=device))
o = torch.optim.AdamW([p], lr=1e-3, fused=True)
o.state[p].update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p), step=torch.tensor(5.0))
p.grad = torch.ones_like(p)
o.step()
print("went through, largest weight", float(p.detach().max()), "step", float(o.state[p]["step"]))
"""


def run(bench: Bench) -> None:
    bench.attempt("D fingerprints and histograms", lambda: same_on_both(bench), seconds=2)
    bench.attempt("B building an index", lambda: index_peak(bench), seconds=3)
    bench.attempt("F whole gradients", lambda: whole_gradients(bench), seconds=2)
    bench.attempt("A fused AdamW, step on the CPU", lambda: fused_with_step_on_cpu(bench), seconds=8)
    if bench.device.kind != "cuda" or torch.cuda.device_count() < 2:
        bench.leave_out("E each rank on its own device in a plain loop", "it needs two GPUs")


def same_on_both(bench: Bench) -> None:
    """D. uint16 and uint32 to int64 in fingerprints, int32 bincount in histograms: does the device have them?"""
    generator = torch.Generator().manual_seed(0)
    count = 3 * 65536 + 11 if bench.sizes.name == "tiny" else 3 * 65536 * 70 + 11
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        values = torch.randn(count, generator=generator).to(dtype)
        here, there = fingerprint(values, 5), fingerprint(values.to(bench.device.torch), 5)
        bench.check(f"D fingerprint of {dtype}", here == there, f"{there:016x}, expected the CPU's {here:016x}")
    scores = torch.randn(1_000_001, generator=generator)
    counts = [count_high(ScorePiece("x", 0, 0, values))[0].cpu() for values in (scores, scores.to(bench.device.torch))]
    bench.check("D histogram of scores", torch.equal(*counts), "expected the CPU's counts")


def index_peak(bench: Bench) -> None:
    """B. Device memory while an index at 10% is built from 200 pieces."""
    device, count, pieces = bench.device, bench.sizes.index_entries, 200
    device.collect()
    device.reset_peak()
    before = device.held_bytes()
    positions = (torch.arange(t * count // pieces * 10, (t + 1) * count // pieces * 10, 10) for t in range(pieces))
    index = TileIndex.from_pieces(positions, count, 10 * count, device.torch)
    device.synchronize()
    peak = device.peak_bytes() - before
    is_as_expected = index.offset.dtype == torch.int16 and index.nbytes <= 2.1 * count + 4096
    bench.check("B index at 10%", is_as_expected, f"{index.nbytes / count:.2f} bytes an entry held, expected about 2")
    last = index.positions(count - 3, count).tolist()
    expected = [10 * (count - 3), 10 * (count - 2), 10 * (count - 1)]
    bench.check("B its last positions", last == expected, f"{last}, expected {expected}")
    bench.figure("B index: peak while it is built", peak / count, "bytes an entry", at_most=3.5)


def whole_gradients(bench: Bench) -> None:
    """F. Host time of cutting one gradient into stretches for 64 ranks (gradient_reduction=dense, gradient scores)."""
    from lota.zero.compact.reduction import GradientReducer, ReductionGroups
    from lota.zero.compact.whole_gradients import WholeGradients

    count, device, bucket = bench.sizes.whole_gradient, bench.device, bench.sizes.bucket
    whole = WholeGradients([count], 64, bucket)
    gradient = torch.randn(count, device=device.torch).bfloat16()
    written: list[torch.Tensor] = []
    is_kept = True

    def deliver(_: range, values: torch.Tensor) -> None:
        if is_kept:
            written.append(values.clone())

    # Without process groups the buckets that 64 ranks would share out are delivered as they were filled.
    groups = ReductionGroups(None, None, None, shard_size=64, world_size=1, shard_rank=0)
    reducer = GradientReducer(
        whole.counts,
        bucket_numel=bucket,
        groups=groups,
        deliver=deliver,
        device=torch.device(device.torch),
        by_owner=True,
    )

    def write() -> None:
        for slot in reversed(whole.slots[0]):
            reducer.add_rows(slot, whole.writer(slot, gradient))
        reducer.finish()

    write()
    is_kept = False
    host, both = device.host_seconds(write)
    totals = torch.cat(written).sort().values, gradient.float().sort().values
    bench.check("F every entry is written once", torch.equal(*totals), "expected the gradient's entries, reordered")
    num = len(whole.slots[0])
    bench.figure(f"F whole gradient of {count:,}, {num} stretches x 64 ranks: host", host * 1e3, "ms")
    bench.figure(f"F whole gradient of {count:,}: with the device", both * 1e3, "ms")


def fused_with_step_on_cpu(bench: Bench) -> None:
    """A. What torch itself does then; whether ours resumes rightly is `zero3`'s question."""
    command = [sys.executable, "-c", textwrap.dedent(_FUSED), str(bench.device.torch)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=max(5.0, bench.left() - 1))
    lines = (run.stdout + run.stderr).strip().splitlines() or ["no output"]
    bench.note(f"A torch's fused AdamW with its step on the CPU: exit status {run.returncode}, {lines[-1][:200]}")
