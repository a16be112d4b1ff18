"""The importance phase of a run: what a task needs of all weights, collected by a few micro-batches without a step."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset

from lota.blocks import importance_zero3
from lota.choices import IMPORTANCE_ROWS
from lota.data import checks, dataset
from lota.data.dataset import Sets
from lota.data.options import DataPlan
from lota.ranks.agree import check_same, checked_together, from_rank_0, together
from lota.ranks.world import print_once, rank, world_size
from lota.retention import Importance
from lota.run.folder import RunFolder
from lota.run.options import Config, PreferenceConfig
from lota.run.resolve import RunOptions
from lota.train.phase import Phase, timed


def retained(
    options: RunOptions, config: Config, folder: RunFolder, seconds: dict[str, float]
) -> list[str | Importance]:
    """What this run is pulled to: paths as they were given, and importance collected from rows on the model that the
    run begins with, kept in the run's folder. Collective."""
    found: list[str | Importance] = []
    for number, item in enumerate(options.keeping.retain):
        if isinstance(item, str):
            found.append(item)
            continue
        path = folder.path / "retained" / f"{number}.safetensors"
        if not from_rank_0(path.is_file):
            with checked_together():
                sets = dataset.load(item, config.seed, options.task)
                check_rows(options, config, item, sets)
            check_same("rows to retain", dataset.identity(sets))
            made = _collect(options, config, sets.train, folder, (), seconds, {"data": item.describe()})
            _write(made, path)
        found.append(str(path))
    return found


def leave_importance(
    options: RunOptions, config: Config, train: Dataset, folder: RunFolder, seconds: dict[str, float]
) -> dict[str, Any]:
    """Collect the importance of the run's own task on the model with its ticket, into the ticket's folder. Its facts.
    Collective."""
    ticket = folder.path / "ticket"
    made = _collect(options, config, train, folder, (ticket,), seconds, {"model": options.model})
    size = _write(made, ticket)
    print_once(f"importance of this task: {size / 2**20:.2f} MiB in {ticket}, for retain of later runs")
    return {"bytes": size, **made.facts}


def pull_line(report: Mapping[str, Any]) -> str:
    """What became of the pull, in one line of the log."""
    reached = report["reached"]
    text = f"pull: asked {report['asked']:g}, reached {', '.join(f'{value:.4g}' for value in reached)}"
    if any(abs(value - report["asked"]) > 0.01 * report["asked"] for value in reached):
        text += "; the schedule ended earlier, or was a different one, than it announced at the first step"
    return text


def _collect(
    options: RunOptions,
    config: Config,
    train: Dataset,
    folder: RunFolder,
    tickets: Sequence[Path],
    seconds: dict[str, float],
    facts: Mapping[str, Any],
) -> Importance:
    """On the base with the run's tickets and these."""
    chosen = options.calibration
    steps = math.ceil(options.keeping.importance_batches / world_size())
    # The unit is one rank's micro-batch with its own mean loss, so that the ranks do not matter.
    changes: dict[str, Any] = {
        "max_steps": steps,
        "per_device_train_batch_size": min(IMPORTANCE_ROWS, config.per_device_train_batch_size),
        "gradient_accumulation_steps": 1,
        "average_tokens_across_devices": False,
        "save_strategy": "no",
        "load_best_model_at_end": False,
        "eval_strategy": "no",
        "dataloader_drop_last": False,
        "logging_steps": max(1, steps),
    }
    if isinstance(config, PreferenceConfig):
        changes["precompute_ref_log_probs"] = False
    with (
        timed(seconds, "importance"),
        importance_zero3(
            include=None if chosen is None else chosen.include,
            exclude=None if chosen is None else chosen.exclude,
            max_skipped_steps=options.max_skipped_steps,
        ) as run,
    ):
        phase = Phase(
            "importance",
            replace(options, adapter=None),
            config,
            Sets(train, None),
            folder,
            tickets=tickets,
            samples_answers=options.keeping.fisher == "true",
            as_reference=None if tickets else nullcontext,  # with its own ticket on it, the base is another model
            **changes,
        )
        phase.run()
        rows = changes["per_device_train_batch_size"]
        made = run.importance({**facts, "rows": rows, "fisher": options.keeping.fisher})
    phase.close()
    if rank() == 0:
        shutil.rmtree(folder.checkpoints_of("importance"), ignore_errors=True)  # empty: the Trainer makes it
    return made


def _write(importance: Importance, path: Path) -> int:
    """On rank 0; its bytes on every rank. Collective."""
    with together():
        if rank() == 0:
            (path if path.is_dir() else path.parent).mkdir(exist_ok=True)
            importance.save(path)
    return from_rank_0(lambda: (path / "importance.safetensors" if path.is_dir() else path).stat().st_size)


def check_rows(options: RunOptions, config: Config, plan: DataPlan, sets: Sets) -> None:
    """ValueError for rows beside the run's own that could not be trained on. Every rank."""
    no_evaluation: dict[str, Any] = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
    checks.check(
        sets,
        options.model,
        options.revision,
        replace(config, **no_evaluation),
        options.trust_remote_code,
        lambda roles: dataset.place_of_roles(plan, roles, options.task),
    )
