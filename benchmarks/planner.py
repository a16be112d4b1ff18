"""The planner's bytes beside those counted from outside a run: five small models, six methods, two ranks.

    OMP_NUM_THREADS=1 python -m benchmarks.planner > docs/planned_and_counted.csv

Prints CSV, planned beside counted: bytes that a rank holds between steps (device and host memory, which are one on CPU
ranks), and bytes of the buffers that its collectives move in a step of two micro steps. Differences go to stderr. The
same runs are the test tests/plan/test_counted.py (the complete ones under the mark `slow`).
"""

from __future__ import annotations

import sys

import torch

from tests.plan.counted import METHODS, MODELS, compare, counted
from tests.rank_pool import RankPool


def main() -> None:
    ranks = RankPool(2)
    print("model,method,held_planned,held_counted,sent_planned,sent_counted", flush=True)
    worst = 0.0
    for case in MODELS:
        for method in METHODS:
            pairs = compare(ranks.run(counted, case, method, {})[0])
            held = pairs.pop("held")
            sent = tuple(sum(pair[side] for pair in pairs.values()) for side in (0, 1))
            worst = max(worst, *(abs(_difference(pair)) for pair in (held, *pairs.values())))
            print(",".join([case, method, *map(str, (*held, *sent))]), flush=True)
            print(f"{case} {method}: held {_difference(held):+.2f}%, sent {_difference(sent):+.2f}%", file=sys.stderr)
    print(f"largest difference of a single quantity: {worst:.2f}%. torch {torch.__version__}", file=sys.stderr)
    ranks.close()


def _difference(pair: tuple[int, int] | tuple[int, ...]) -> float:
    return 100 * (pair[0] - pair[1]) / max(1, pair[1])


if __name__ == "__main__":
    main()
