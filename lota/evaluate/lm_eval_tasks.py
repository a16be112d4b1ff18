"""Tasks of EleutherAI's lm-evaluation-harness on a model that is loaded already."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lota.messages import did_you_mean

MISSING = "tasks need lm-eval, which is not installed: pip install 'lota[eval]' (or leave tasks out)"


@dataclass(frozen=True)
class TaskSettings:
    """What decides a task's figures beside the model. None: as the task's own file has it."""

    num_fewshot: int | None = None
    limit: int | None = None
    apply_chat_template: bool = False
    tasks_path: str | None = None
    seed: int = 0


class Harness:
    """Runs tasks one by one. Built before the model is loaded: it finds a missing package and a misspelt name."""

    def __init__(self, tasks: Sequence[str], settings: TaskSettings) -> None:
        """ValueError where lm-eval is missing, or knows no such task (with the nearest name)."""
        try:
            from lm_eval.tasks import TaskManager
        except ModuleNotFoundError as error:
            raise ValueError(MISSING) from error
        # Its start says at length how it falls back and what it found; errors still come through.
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        if settings.tasks_path is not None and not Path(settings.tasks_path).is_dir():
            raise ValueError(f"tasks_path must be a folder of lm-eval task files, got {settings.tasks_path}")
        self.tasks, self.settings = list(tasks), settings
        # Indexing the thousands of tasks that come with it takes seconds; a folder with all that was named needs none.
        own = settings.tasks_path
        self._manager = TaskManager(include_path=own, **({"include_defaults": False} if own is not None else {}))
        if own is not None and not set(tasks) <= set(self._manager.all_tasks):
            self._manager = TaskManager(include_path=own)
        known = self._manager.all_tasks
        for task in tasks:
            if task not in known:
                raise ValueError(
                    f"lm-eval has no task {task!r}"
                    + did_you_mean(task, known)
                    + (" Local task files are found with tasks_path." if settings.tasks_path is None else "")
                )

    def run(self, task: str, model: Any, tokenizer: Any, batch_rows: int) -> dict[str, Any]:
        """The figures of one task (of a group: of its members too), by name: metric values as lm-eval names them."""
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        model.eval()
        output = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_rows),
            tasks=[task],
            num_fewshot=self.settings.num_fewshot,
            limit=self.settings.limit,
            apply_chat_template=self.settings.apply_chat_template,
            task_manager=self._manager,
            log_samples=False,
            # Standard errors by formula where lm-eval has one; resampling would cost minutes for some metrics.
            bootstrap_iters=0,
            random_seed=self.settings.seed,
            numpy_random_seed=self.settings.seed,
            torch_random_seed=self.settings.seed,
            fewshot_random_seed=self.settings.seed,
        )
        counts = output.get("n-samples", {})
        return {
            name: {key: float(value) for key, value in figures.items() if _is_figure(key, value)}
            | ({"num_rows": counts[name]["effective"]} if name in counts else {})
            for name, figures in output["results"].items()
        }


def headline(figures: dict[str, float]) -> dict[str, float]:
    """Metrics for a table: no standard errors, no counts; `acc_norm` for `acc_norm,none`, filters in brackets."""
    shown = {}
    for key, value in figures.items():
        name, _, chosen_by = key.partition(",")
        if not name.endswith("_stderr") and key != "num_rows":
            shown[name if chosen_by in ("", "none") else f"{name} ({chosen_by})"] = value
    return shown


def _is_figure(key: str, value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and key not in ("alias", "sample_len", "name")
