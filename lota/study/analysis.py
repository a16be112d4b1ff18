"""From the rows of a study to the figures of its tables: curves of methods, shares of full fine-tuning, intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lota.study.frontier import Interval, Point, interval, levels, rise_at
from lota.study.rows import Rows

BESIDE = ("kl", "general_rise", "moved_share", "fd2", "new_exact", "old_exact")
REFERENCE = "full"


def points(rows: Rows, question: str, method: str, seed: int, task: str | None = None) -> list[Point]:
    """A method's points at a seed; the last one is the start. What rises is the old task's loss; of one task, that of
    general text."""
    made: list[Point] = []
    start = None
    for row in rows:
        if (row["question"], row["method"], row["seed"]) != (question, method, seed):
            continue
        if task is not None and row["new_task"] != task:
            continue
        test, dev = ("general", "general") if row["new_task"] == row["old_task"] else ("old_test", "old_dev")
        beside = {name: float(row[name]) for name in BESIDE if row.get(name) not in (None, "")}
        beside["alpha"] = row["alpha"]
        made.append(
            Point(row["new_test"], row[f"{test}_rise"], row["new_dev"], row[f"{dev}_rise"], str(row["setting"]), beside)
        )
        before = [row[f"new_{part}"] - row[f"new_{part}_rise"] for part in ("test", "dev")]
        start = Point(before[0], 0.0, before[1], 0.0)
    return [*made, *([start] if start else [])]


def methods_of(rows: Rows, question: str, task: str | None = None) -> list[str]:
    """In the order of the table."""
    return list(
        dict.fromkeys(
            str(row["method"]) for row in rows if row["question"] == question and task in (None, row["new_task"])
        )
    )


def repeated(rows: Rows, question: str, method: str, task: str | None = None) -> dict[int, list[Point]]:
    """A method's points by seed: of the settings that every one of its seeds has."""
    seeds = sorted({int(row["seed"]) for row in rows if (row["question"], row["method"]) == (question, method)})
    found = {seed: points(rows, question, method, seed, task) for seed in seeds}
    found = {seed: own for seed, own in found.items() if own}
    common = set.intersection(*({p.setting for p in own} for own in found.values())) if found else set()
    return {seed: [p for p in own if p.setting in common] for seed, own in found.items()}


def best_setting(rows: Rows, question: str, method: str, seed: int, task: str) -> str | None:
    """The setting with the lowest dev loss of the new task, whole way; None where nothing is known."""
    own = [p for p in points(rows, question, method, seed, task) if p.setting and p.beside["alpha"] == 1]
    return min(own, key=lambda p: p.new_dev).setting if own else None


class Compared:
    """Methods at matched quality of the new task: levels are shares of what the reference gains, a seed each."""

    def __init__(self, rows: Rows, question: str, shares: Sequence[float], task: str | None = None) -> None:
        self._of = {name: repeated(rows, question, name, task) for name in methods_of(rows, question, task)}
        self.methods = list(self._of)
        self._shares = list(shares)
        reference = self._of.get(REFERENCE, {})
        self.levels = {seed: levels(own[-1].new, own, shares) for seed, own in reference.items()}

    def values(self, method: str, share: float, beside: str | None = None) -> dict[int, float]:
        """By seed, where its curve reaches the level: what rises, or another figure."""
        at = self._shares.index(share)
        found = {
            seed: rise_at(own, self.levels[seed][at], beside)
            for seed, own in self._of[method].items()
            if seed in self.levels
        }
        return {seed: value for seed, value in found.items() if value is not None}

    def relative(self, method: str, share: float) -> Interval | None:
        """What rises, over that of the reference at the same seed and level."""
        own, other = self.values(method, share), self.values(REFERENCE, share)
        return interval([own[seed] / other[seed] for seed in own.keys() & other.keys() if other[seed] > 0])

    def difference(self, one: str, other: str, share: float) -> Interval | None:
        """Of two methods' relative values, by seed."""
        first, second, whole = (self.values(name, share) for name in (one, other, REFERENCE))
        seeds = first.keys() & second.keys() & whole.keys()
        return interval([(first[seed] - second[seed]) / whole[seed] for seed in seeds if whole[seed] > 0])

    def best(self, methods: Sequence[str], share: float) -> str | None:
        """The one whose relative mean is lowest."""
        known = {name: found for name in methods if name in self._of and (found := self.relative(name, share))}
        return min(known, key=lambda name: known[name].mean) if known else None

    def whole(self, method: str, share: float, beside: str | None = None) -> Interval | None:
        """Mean over seeds of a figure itself."""
        return interval(list(self.values(method, share, beside).values()))


def gains(rows: Rows, method: str, task: str) -> Interval | None:
    """Question 1: what a method takes off the test loss, at its best setting by dev rows, over what full does."""

    def gained(name: str) -> dict[int, float]:
        found = {}
        for seed, own in repeated(rows, "q1", name, task).items():
            whole = [p for p in own if p.setting and p.beside["alpha"] == 1]
            found[seed] = own[-1].new - min(whole, key=lambda p: p.new_dev).new
        return found

    own, other = gained(method), gained(REFERENCE)
    return interval([own[seed] / other[seed] for seed in own.keys() & other.keys()])


def survival(rows: Rows, method: str, how: str) -> dict[str, Any] | None:
    """Question 4: the share of each task's gain that is left in the merged model, at the best scale by dev rows."""
    merged = [row for row in rows if row["question"] == "q4" and row["method"] == f"{method}, {how}"]
    if not merged:
        return None
    tasks = [name.removesuffix("_test") for name in merged[0] if _is_task(merged[0], name)]
    alone = {task: _alone(rows, method, task) for task in tasks}

    def shares(row: Mapping[str, Any], part: str) -> list[float]:
        ends = [alone[task][part] for task in tasks]
        return [(start - row[f"{task}_{part}"]) / (start - end) for task, (start, end) in zip(tasks, ends, strict=True)]

    best = max(merged, key=lambda row: sum(shares(row, "dev")))
    found = shares(best, "test")
    return {"scale": best["alpha"], "mean": sum(found) / len(found), "least": min(found), "of": dict(zip(tasks, found))}


def _is_task(row: Mapping[str, Any], name: str) -> bool:
    return name.endswith("_test") and name not in ("new_test", "old_test") and row[name] not in (None, "")


def _alone(rows: Rows, method: str, task: str) -> dict[str, tuple[float, float]]:
    """Losses on dev and test rows, of the base and of the model that was trained on the task alone."""
    seed = min(int(row["seed"]) for row in rows if row["question"] == "q1")
    setting = best_setting(rows, "q1", method, seed, task)
    for row in rows:
        key = (row["question"], row["method"], row["seed"], row["new_task"], row["setting"], row["alpha"])
        if key == ("q1", method, seed, task, setting, 1):
            return {
                part: (row[f"new_{part}"] - row[f"new_{part}_rise"], row[f"new_{part}"]) for part in ("dev", "test")
            }
    raise ValueError(f"no row of {method} on {task} alone")


def matrix(rows: Rows, method: str, seed: int) -> list[dict[str, float]]:
    """Question 3: the tasks' test losses on the base and after every stage; the tasks in the order of the stages."""
    own = [row for row in rows if (row["question"], row["method"], row["seed"]) == ("q3", method, seed)]
    order = list(dict.fromkeys(str(row["after"]) for row in own if row["stage"] > 0))
    made: list[dict[str, float]] = []
    for stage in range(len(order) + 1):
        losses = {str(row["new_task"]): float(row["new_test"]) for row in own if row["stage"] == stage}
        made.append({task: losses[task] for task in order})
    return made


def sequence(rows: Rows, method: str, seed: int) -> dict[str, float]:
    """Of a sequence: the mean over tasks of what each has gained at the end against the base, and the mean rise since
    its own stage of all but the last."""
    base, *stages = matrix(rows, method, seed)
    order = list(base)
    rises = [stages[-1][task] - stages[number][task] for number, task in enumerate(order[:-1])]
    kept = [base[task] - stages[-1][task] for task in order]
    return {"forgetting": sum(rises) / max(len(rises), 1), "gain": sum(kept) / len(kept)}
