"""Exact selection, mask included, against torch.topk on the same scores in the same run.

    python benchmarks/selection.py --scores 100000000 --threads 2

torch.topk gives k indices of one tensor on one process, ties as they fall. Ours gives the encoded mask, exactly k
entries and ties by hash, from scores in pieces. Both get fp32 scores of a normal distribution that is already there.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from lota.selection import select
from lota.selection.ranks import Ranks
from lota.selection.topk import ScorePiece, chosen_positions, count_high, find_cut
from lota.selection.workers import Workers
from lota.ticket import Mask

NUMEL = 4096 * 1024  # entries per tensor, as in one attention matrix of an 8B model


def seconds(call: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """(elapsed, CPU time of all threads) of the fastest of `repeats` calls; a busy machine shows in the first only."""
    took = []
    for _ in range(repeats):
        start, start_cpu = time.perf_counter(), time.process_time()
        call()
        took.append((time.perf_counter() - start, time.process_time() - start_cpu))
    return min(took)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scores", type=int, default=20_000_000)
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--skip-topk", action="store_true", help="time ours alone")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    scores = torch.randn(options.scores, generator=torch.Generator().manual_seed(0))
    edges = [*range(0, options.scores, NUMEL), options.scores]
    tensors = {f"layer{number}": scores[a:b] for number, (a, b) in enumerate(itertools.pairwise(edges))}
    shapes = {name: tuple(values.shape) for name, values in tensors.items()}
    k = round(options.density * options.scores)
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {_cpu()}, {options.threads} threads")
    print(f"{options.scores} fp32 scores in {len(shapes)} tensors, density {options.density:g}: {k} entries")

    def report(name: str, took: tuple[float, float]) -> None:
        per_score = took[0] / options.scores * 1e9
        print(f"{name:<44}{took[0]:8.3f} s{per_score:8.2f} ns per score{took[1]:8.3f} s of CPU", flush=True)

    def pieces():
        return ((name, 0, values) for name, values in tensors.items())

    ours = {}
    for budget in ("global", "per_tensor"):
        choose = partial(select, pieces, shapes, density=options.density, budget=budget)
        ours[budget] = seconds(choose, options.repeats)
        report(f"select, {budget}, with the encoded mask", ours[budget])
    _report_parts(tensors, k, options.repeats, report)
    if options.skip_topk:
        return
    magnitudes = scores.abs()
    for is_sorted in (False, True):
        rival = seconds(partial(torch.topk, magnitudes, k, sorted=is_sorted), options.repeats)
        report(f"torch.topk, sorted={is_sorted}", rival)
        for budget, took in ours.items():
            print(f"  {budget} selection takes {took[0] / rival[0]:.3f} of it, in CPU time {took[1] / rival[1]:.3f}")


def _report_parts(
    tensors: dict[str, torch.Tensor], k: int, repeats: int, report: Callable[[str, tuple[float, float]], None]
) -> None:
    """Where the time of the global budget goes."""
    walk = [ScorePiece(name, 0, NUMEL * number, values) for number, (name, values) in enumerate(tensors.items())]
    with Workers() as workers:

        def parts(function: Callable[[ScorePiece], Any]) -> list[Any]:
            return [part for piece in walk for part in workers.each(function, piece)]

        counts = torch.stack([high for high, _ in parts(count_high)]).sum(0)
        second = partial(find_cut, counts, walk.__iter__, k, Ranks(), 0, workers.each)
        final = partial(chosen_positions, cut=second(), seed=0)
        positions = {piece.name: (tuple(piece.scores.shape), torch.cat(workers.each(final, piece))) for piece in walk}
        report("  first pass: keys, bincount of 15 bits", seconds(partial(parts, count_high), repeats))
        report("  second pass: scan, bincount of 16 bits", seconds(second, repeats))
        report("  final pass: compare, nonzero", seconds(partial(parts, final), repeats))
        report("  the mask's codec, on one thread", seconds(partial(Mask.from_indices, positions), repeats))
    print(
        "  bound: instructions of bincount and nonzero, about 1 and 1.7 ns per score and core; scores are read 3 times"
    )


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
