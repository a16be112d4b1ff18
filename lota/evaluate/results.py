"""The results file of an evaluation: one entry a model, written as it comes and continued later."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lota.evaluate.lm_eval_tasks import headline
from lota.files import naming_odd, read_json_object, write_text


def _check_entry(entry: Any) -> None:
    """TypeError or KeyError where a model's entry is not one that `put` writes."""
    figures = [entry["rows"] or {}, *(part for task in entry["tasks"].values() for part in task.values())]
    is_sound = isinstance(entry["digests"], list) and isinstance(entry["seconds"], dict)
    if not is_sound or not all(isinstance(part, dict) for part in figures):
        raise TypeError("an entry of a model is none")
    for value in (value for part in figures for value in part.values()):
        if not isinstance(value, (int, float)):
            raise TypeError(f"{value!r:.80} is no figure")


class Scoreboard:
    """results.json, read when it is built; rank 0 builds it, and `put` writes it, there alone."""

    def __init__(self, path: str | Path, settings: Mapping[str, Any], versions: Mapping[str, str]) -> None:
        """Continue the file at `path` where there is one. ValueError when it was made with different settings."""
        self.path = Path(path)
        # As JSON gives them back, so that they compare.
        self.settings = json.loads(json.dumps(dict(settings)))
        self.versions = dict(versions)
        self.models: dict[str, dict[str, Any]] = {}
        if self.path.is_dir() or self.path.suffix != ".json":
            raise ValueError(f"output must name a .json file, got {self.path}")
        if not self.path.exists():
            return
        try:
            with naming_odd("its content"):
                found = read_json_object(self.path)
                before, models = dict(found["settings"].items()), dict(found["models"].items())
                for entry in models.values():
                    _check_entry(entry)
        except ValueError as error:
            raise ValueError(f"{self.path} is no results file of an evaluation: choose another output") from error
        differ = [name for name in {**before, **self.settings} if before.get(name) != self.settings.get(name)]
        if differ:
            what = "; ".join(
                f"{name:.60}: {before.get(name)!r:.80} there, {self.settings.get(name)!r:.80} asked for"
                for name in differ[:8]
            )
            raise ValueError(
                f"{self.path} holds results with other settings ({what}). Choose another output, or remove it"
            )
        self.models = models

    def entry(self, model: str, digests: Sequence[str]) -> dict[str, Any]:
        """What is known of a model; nothing where its tickets' contents have changed since.

        digests: what identifies the contents of its tickets.
        """
        found = self.models.get(model)
        if found is None or found["digests"] != list(digests):
            return {"digests": list(digests), "rows": None, "tasks": {}, "seconds": {}}
        return found

    def put(self, model: str, entry: dict[str, Any]) -> None:
        """Set a model's entry and write the file."""
        self.models[model] = entry
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {"settings": self.settings, "versions": self.versions, "models": self.models}
        write_text(self.path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def table(self, models: Sequence[str]) -> str:
        """Models as columns where there are few of them, one metric a line: names of metrics and paths are long."""
        lines: dict[str, dict[str, float]] = {}
        for model in models:
            entry = self.models[model]
            for name, value in (entry["rows"] or {}).items():
                if not name.startswith("num_") and not name.endswith("_stderr"):
                    lines.setdefault(name, {})[model] = value
            for task in entry["tasks"].values():
                for member, figures in task.items():
                    for name, value in headline(figures).items():
                        lines.setdefault(f"{member} {name}", {})[model] = value
        titles = [model if len(model) <= 24 else f"({number})" for number, model in enumerate(models, start=1)]
        left = max(map(len, ["", *lines]))
        widths = [max(8, len(title)) for title in titles]
        rows = ["  ".join([" " * left, *(t.rjust(w) for t, w in zip(titles, widths, strict=True))])]
        for name, values in lines.items():
            cells = [f"{values[m]:.4f}" if m in values else "-" for m in models]
            rows.append("  ".join([name.ljust(left), *(c.rjust(w) for c, w in zip(cells, widths, strict=True))]))
        rows += [f"{title} = {model}" for title, model in zip(titles, models, strict=True) if title != model]
        return "\n".join(rows)
