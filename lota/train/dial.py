"""The dial between old and new values: after training, points between them are measured, and one is delivered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset

from lota.data import dataset
from lota.data.dataset import Sets
from lota.ranks.agree import check_same, checked_together
from lota.ranks.world import print_once
from lota.run.options import Config
from lota.run.resolve import RunOptions
from lota.train.importance import check_rows
from lota.train.phase import Phase


def kept_rows(options: RunOptions, config: Config) -> dict[str, Dataset]:
    """The rows to keep, by name, loaded and checked. Collective."""
    found: dict[str, Dataset] = {}
    for name, plan in options.keeping.kept.items():
        with checked_together():
            sets = dataset.load(plan, config.seed, options.task)
            check_rows(options, config, plan, sets)
        check_same(f"kept rows of {name}", dataset.identity(sets))
        found[name] = sets.train
    return found


def turn(options: RunOptions, phase: Phase, run: Any, sets: Sets) -> dict[str, Any]:
    """Measure the new task's loss and the kept ones at every point, without training; make the largest point within the
    budget the outcome. The points, which one was chosen, and its evaluation loss, for the summary. Collective.

    run: the block's, whose engine holds old and new values.
    """
    keeping = options.keeping
    points = []
    for alpha in sorted({0.0, *keeping.alphas, 1.0}):
        with run.at(alpha):
            point: dict[str, Any] = {"alpha": alpha}
            if sets.evaluation is not None:
                point["eval_loss"] = phase.loss_on(None)
            point["kept"] = {name: phase.loss_on(name) for name in keeping.kept}
        points.append(point)
        print_once(f"dial: {_line(point, points[0])}")
    chosen = choose(points, keeping.forget_budget)
    run.settle(chosen)
    if keeping.forget_budget is not None:
        print_once(f"dial: alpha {chosen:g} is the largest within a rise of {keeping.forget_budget:g}")
    facts = {"dial": {"points": points, "alpha": chosen, "forget_budget": keeping.forget_budget}}
    delivered = next(point for point in points if point["alpha"] == chosen)
    return facts | {key: loss for key, loss in delivered.items() if key == "eval_loss"}


def choose(points: Sequence[Mapping[str, Any]], budget: float | None) -> float:
    """The largest alpha at which no kept loss is more than `budget` above the one at alpha 0; 1 without a budget."""
    if budget is None:
        return 1.0
    start = points[0]["kept"]
    return max(p["alpha"] for p in points if all(p["kept"][name] - start[name] <= budget for name in start))


def _line(point: Mapping[str, Any], start: Mapping[str, Any]) -> str:
    parts = [f"alpha {point['alpha']:g}"]
    if "eval_loss" in point:
        parts.append(f"new task {point['eval_loss']:.4f}")
    parts += [f"{name} {loss:.4f} ({loss - start['kept'][name]:+.4f})" for name, loss in point["kept"].items()]
    return ", ".join(parts)
