"""More runs of a study that is there: a method's sweep in question 2 with other options, trained and measured alike."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lota.study.analysis import points
from lota.study.frontier import Point, levels, rise_at
from lota.study.jobs import Job, work
from lota.study.methods import base_run
from lota.study.presets import PRESETS
from lota.study.questions import q2
from lota.study.rows import read
from lota.study.runs import Plan, Run

PRESET = PRESETS["cpu"]


class Study:
    """A folder of `lota study cpu --questions q2`, at its first seed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._runs = {run.name: run for run in (base_run(PRESET), *q2(PRESET, []))}
        self._plan = Plan(folder, self._runs)

    def sweep(self, method: str) -> list[Run]:
        """The runs of a method of question 2."""
        begins = f"q2/{PRESET.tasks.new}/{method}/"
        return [run for name, run in self._runs.items() if name.startswith(begins) and run.facts["seed"] == 0]

    def options(self, run: Run) -> dict[str, Any]:
        """Of `lota train`, with paths in place of names."""
        return dict(self._plan.resolved(dict(run.options)))

    def measure(self, run: Run) -> dict[str, Any]:
        """What is scored, with paths in place of names."""
        assert run.measure is not None
        return dict(self._plan.resolved(vars(run.measure)))

    def rows(self, run: Run, place: Path, changes: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Train with changed options and score the points between start and outcome; kept in `place`, where the same
        call finds them again. None as a value takes an option out."""
        if not (place / "result.json").is_file():
            options = {key: value for key, value in {**self.options(run), **changes}.items() if value is not None}
            starts = place.parent.parent / "starts.json"
            work(Job(run.name, "train", options, self.measure(run), place, self.folder / "data", starts, keeps=False))
        result = json.loads((place / "result.json").read_text(encoding="utf-8"))
        new, old = (Path(task).name for task in self.measure(run)["tasks"][:2])
        for point in result["points"]:
            yield {
                "setting": run.facts["setting"],
                "alpha": point["alpha"],
                "new_dev": point[f"{new} dev"],
                "new_test": point[f"{new} test"],
                "old_dev_rise": point[f"{old} dev rise"],
                "old_test_rise": point[f"{old} test rise"],
                "general_rise": point["general test rise"],
                "kl": point["kl"],
            }

    def ratios(self, rows: Iterable[Mapping[str, Any]]) -> list[float | None]:
        """Forgetting at the levels of the preset, over what full fine-tuning forgets there; None where one does not
        reach so far."""
        full = points(read(self.folder / "runs.csv"), "q2", "full", PRESET.seeds[0], PRESET.tasks.new)
        own = [Point(row["new_test"], row["old_test_rise"], row["new_dev"], row["old_dev_rise"]) for row in rows]
        found = []
        for level in levels(full[-1].new, full[:-1], PRESET.levels):
            one, whole = rise_at([*own, full[-1]], level), rise_at(full, level)
            found.append(None if one is None or not whole else one / whole)
        return found


def print_ratios(name: str, ratios: Iterable[float | None]) -> None:
    print(f"  {name:<14}", *("     -" if ratio is None else f"{ratio:6.2f}" for ratio in ratios), flush=True)


def print_levels() -> None:
    shares = ", ".join(f"{level:.0%}" for level in PRESET.levels)
    print(f"forgetting over full fine-tuning's, at {shares} of its gain, one seed")
