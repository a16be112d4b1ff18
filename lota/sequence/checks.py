"""What later tasks of a sequence would be refused for, refused before the first: every task's options and rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from lota.data import checks, dataset
from lota.data.options import plan_data
from lota.data.tokenizer import chat_template
from lota.delivery.base import check_base
from lota.evaluate.rows import Row, evaluation_rows, has_rows
from lota.run.folder import resolved
from lota.run.options import LotaArguments, RecipeConfig, parse
from lota.run.resolve import resolve
from lota.sequence.config import Options, SequenceConfig, Task
from lota.ticket import Mask
from lota.train.phase import training_dtype
from lota.train.rehearse import rehearse


@dataclass(frozen=True)
class Prepared:
    """A task that can be run and scored. options: resolved, as a run's config.yaml has them. rows: that it is scored
    on; identity: a digest of them. template: path of the chat template, where it has one of its own. dtype: in which
    its run trains."""

    name: str
    options: dict[str, Any]
    rows: list[Row]
    identity: str
    template: str | None
    batch_rows: int
    dtype: str


@dataclass(frozen=True)
class Base:
    """The model that all tasks begin with, and how it is loaded for scoring."""

    model: str
    revision: str
    trust_remote_code: bool
    attn_implementation: str | None

    def settings(self) -> dict[str, Any]:
        """What all figures depend on."""
        return {
            "model_name_or_path": self.model,
            "model_revision": self.revision,
            "trust_remote_code": self.trust_remote_code,
            "attn_implementation": self.attn_implementation,
        }


def prepare(config: SequenceConfig, trained: Sequence[str]) -> tuple[Base, list[Prepared]]:
    """Every task, as its run will parse it, and the base. trained: names of tasks that are complete, of which only the
    options and the evaluation rows are looked at. Every rank, without collectives; ValueError names the task."""
    found = []
    base: Base | None = None
    for task in config.tasks:
        try:
            args, trl, options = parse_task(config, task)
            if base is None:
                base = Base(options.model, options.revision, options.trust_remote_code, options.attn_implementation)
                check_base(
                    base.model,
                    base.revision,
                    trust_remote_code=base.trust_remote_code,
                    needs_safetensors=options.merged and options.is_sparse,
                )
            if task.name not in trained:
                rehearse(options, trl)
                sets = dataset.load(plan_data(args), trl.seed)
                checks.check(sets, options.model, options.revision, trl, options.trust_remote_code)
            if not has_rows(args):
                raise ValueError(
                    "after every task all tasks are scored, and this one has no evaluation rows: give eval_file, "
                    "eval_split, eval_rows or eval_fraction"
                )
            rows = evaluation_rows(args, trl.seed)[: config.eval_rows_limit]
            template = chat_template(trl.chat_template_path)
            batch_rows, dtype = trl.per_device_eval_batch_size, str(training_dtype(trl)).removeprefix("torch.")
            known = resolved(options, trl)
            found.append(Prepared(task.name, known, rows, _identity(rows, template), template, batch_rows, dtype))
        except ValueError as error:
            raise ValueError(f"task {task.name}: {error}") from error
    assert base is not None
    _check_masks(config.tasks)
    return base, found


def parse_task(config: SequenceConfig, task: Task) -> tuple[LotaArguments, RecipeConfig, Any]:
    """The options of a task's run, but for what earlier tasks add to them."""
    with TemporaryDirectory() as folder:
        path = write_options(Path(folder), task.options | {"output_dir": str(config.output_dir)})
        args, trl = parse(["--config", str(path)])
        options = resolve(args, trl, argv=["--config", str(path), *config.words])
    return args, trl, options


def write_options(folder: Path, options: Options) -> Path:
    """A file that `lota train --config` takes."""
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(options, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path


def _identity(rows: Sequence[Mapping[str, Any]], template: str | None) -> str:
    content = [json.dumps(row, sort_keys=True) for row in rows]
    if template is not None:
        content.append(Path(template).read_text(encoding="utf-8"))
    return hashlib.sha256("\n".join(content).encode()).hexdigest()


def _check_masks(tasks: Sequence[Task]) -> None:
    """ValueError where masks that are given share entries and should not."""
    masks = [(task, Mask.load(task.options["mask"])) for task in tasks if task.options.get("mask")]
    for (one, first), (other, second) in combinations(masks, 2):
        shared = first.overlap(second) if other.disjoint else 0
        if shared:
            raise ValueError(
                f"task {other.name}: its mask shares {shared} entries with that of {one.name}: give other masks, or "
                "let it overlap (disjoint: false)"
            )
