"""The planner's bytes beside those counted from outside a run: five small models, six methods, two ranks.

    OMP_NUM_THREADS=1 python -m benchmarks.planner --output docs/planned_and_counted.csv

Writes CSV, planned beside counted: bytes that a rank holds between steps (device and host memory, which are one on CPU
ranks), and bytes of the buffers that its collectives move in a step of two micro steps. Prints the differences. The
same runs are the test tests/plan/test_counted.py (the complete ones under the mark `slow`).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from tests.plan.counted import METHODS, MODELS, compare, counted
from tests.rank_pool import RankPool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="CSV file to write")
    output = parser.parse_args().output
    ranks = RankPool(2)
    lines = ["model,method,held_planned,held_counted,sent_planned,sent_counted"]
    worst = 0.0
    for case in MODELS:
        for method in METHODS:
            pairs = compare(ranks.run(counted, case, method, {})[0])
            held = pairs.pop("held")
            sent = tuple(sum(pair[side] for pair in pairs.values()) for side in (0, 1))
            worst = max(worst, *(abs(_difference(pair)) for pair in (held, *pairs.values())))
            lines.append(",".join([case, method, *map(str, (*held, *sent))]))
            print(f"{case} {method}: held {_difference(held):+.2f}%, sent {_difference(sent):+.2f}%", flush=True)
    ranks.close()
    output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"largest difference of a single quantity: {worst:.2f}%. torch {torch.__version__}, two CPU ranks.")


def _difference(pair: tuple[int, int] | tuple[int, ...]) -> float:
    return 100 * (pair[0] - pair[1]) / max(1, pair[1])


if __name__ == "__main__":
    main()
