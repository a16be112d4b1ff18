"""From files or the hub to prompt and completion, the two columns that TRL's completion-only loss knows."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from string import Formatter
from typing import Any

from datasets import Dataset, load_dataset

from recipes.arguments import SourceArguments


def load(args: SourceArguments) -> tuple[Dataset, Dataset | None]:
    """Training and evaluation sets with columns prompt and completion. Every rank; ValueError for what is missing."""
    if (args.train_file is None) == (args.dataset_name is None):
        raise ValueError("give either train_file (a local .jsonl) or dataset_name (on the hub)")
    prompt = _template("prompt", args.prompt_field, args.prompt_template)
    completion = _template("completion", args.completion_field, args.completion_template)
    if args.train_file is not None:
        if args.eval_split is not None:
            raise ValueError("eval_split belongs to dataset_name; with train_file give eval_file")
        train = _fill(read_jsonl(args.train_file), prompt, completion, args.train_file)
    else:
        rows = load_dataset(args.dataset_name, args.dataset_config, split=args.train_split)
        train = _fill(rows, prompt, completion, f"{args.dataset_name} ({args.train_split})")
    evaluation = None
    if args.eval_file is not None:
        evaluation = _fill(read_jsonl(args.eval_file), prompt, completion, args.eval_file)
    elif args.eval_split is not None:
        rows = load_dataset(args.dataset_name, args.dataset_config, split=args.eval_split)
        evaluation = _fill(rows, prompt, completion, f"{args.dataset_name} ({args.eval_split})")
    return train, evaluation


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """All rows of a .jsonl file; ValueError names the line that is not a JSON object."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    if path.suffix != ".jsonl":
        raise ValueError(f"expected a .jsonl file (one JSON object a line), got {path}")
    rows = []
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: expected a JSON object, got {type(row).__name__}")
            rows.append(row)
    return rows


def _template(side: str, name: str | None, template: str | None) -> str:
    if name is not None and template is not None:
        raise ValueError(f"give {side}_field or {side}_template, not both")
    if template is not None:
        if not any(part[1] for part in Formatter().parse(template)):
            raise ValueError(f"{side}_template names no field: write for example '{{question}}', got {template!r}")
        return template
    return "{" + (name or side) + "}"


def _fill(rows: Iterable[Mapping[str, Any]], prompt: str, completion: str, source: str) -> Dataset:
    names = {part[1] for text in (prompt, completion) for part in Formatter().parse(text) if part[1]}
    columns: dict[str, list[str]] = {"prompt": [], "completion": []}
    for number, row in enumerate(rows, start=1):
        for name in sorted(names - set(row)):
            close = difflib.get_close_matches(name, row, 1)
            raise ValueError(
                f"{source}, row {number} has no field {name!r}; it has {', '.join(map(repr, row))}"
                + (f". Did you mean {close[0]!r}?" if close else "")
            )
        columns["prompt"].append(prompt.format_map(row))
        columns["completion"].append(completion.format_map(row))
    if not columns["prompt"]:
        raise ValueError(f"{source} holds no rows")
    return Dataset.from_dict(columns)
