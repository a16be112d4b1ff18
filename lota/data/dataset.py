"""From files or the hub to the columns that TRL trains on: the one front of all recipes that need rows.

    plan = plan_data(args)
    sets = load(plan, seed)                      # SFT: prompt and completion, messages, or text
    sets = load(plan, seed, "preferences")       # DPO: prompt, chosen and rejected, or chosen and rejected alone
    sets = load(plan, seed, "prompts")           # GRPO: prompt, and all other fields for the reward

Columns come from fields of the same name, or from `X_field` and `X_template` with X one of prompt, completion,
messages, text, chosen, rejected. Preferences whose chosen and rejected are whole conversations have no prompt column:
TRL takes out of them what they have in common. docs/data.md shows every form.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, concatenate_datasets, disable_progress_bars
from datasets.exceptions import DatasetGenerationError

from lota.data import columns, mixture, sources, templates
from lota.data.columns import Form
from lota.data.options import DataPlan, Source
from lota.data.sources import Row, read_jsonl
from lota.data.templates import is_missing
from lota.ranks.world import print_once, rank

__all__ = ["Sets", "identity", "load", "read_jsonl"]


class Sets(NamedTuple):
    """What a run trains and is evaluated on."""

    train: Dataset
    evaluation: Dataset | None


def load(plan: DataPlan, seed: int = 0, task: str = "examples") -> Sets:
    """The rows of a run, mixed and set aside by `seed` as the plan says, the same on every rank. task: of `TASKS`.
    ValueError for bad input."""
    if rank() > 0 or not sys.stderr.isatty():
        disable_progress_bars()
    found = plan.parts
    firsts = [_first(_files(part.source, "train"), part.source.skip_empty) for part in found]
    forms = [columns.choose_form(part.source, row, place, task) for part, (place, row) in zip(found, firsts)]
    forms = columns.one_form(forms, [part.source.describe() for part in found])
    for part, form, (_, row) in zip(found, forms, firsts):
        unread = [name for name in row if name not in form.fields and not form.keeps_rest]
        if unread:
            print_once(f"data: fields of {part.source.describe()} that are not read: {', '.join(unread)}")
    train = [_build(part.source, "train", form) for part, form in zip(found, forms)]
    evaluation = [_build(part.source, "eval", form) for part, form in zip(found, forms) if _files(part.source, "eval")]
    if plan.eval_rows is not None or plan.eval_fraction is not None:
        train, evaluation = _set_aside(plan, train, seed)
    return Sets(_mix(plan, train, seed), concatenate_datasets(evaluation) if evaluation else None)


def place_of_roles(plan: DataPlan, roles: tuple[str, ...], task: str) -> str:
    """File and line of the first row whose conversation has these roles."""
    for part in plan.parts:
        for which in ("train", "eval"):
            files = _files(part.source, which)
            form = None
            for place, row in _rows(files) if files else ():
                if form is None:
                    form = columns.choose_form(part.source, row, place, task)
                if form.is_empty(row):
                    continue
                made = columns.columns(row, form, place)
                parts = [made[name] for name in ("prompt", "completion", "messages", "chosen") if name in made]
                found = tuple(message["role"] for part_of in parts if isinstance(part_of, list) for message in part_of)
                if found == roles:
                    return place
    return "a row"


def identity(sets: Sets) -> str:
    """Numbers of rows and a digest of some of them, for comparing what two ranks loaded."""
    told = []
    for name, rows in zip(("training", "evaluation"), sets):
        if rows is not None:
            some = rows.select(range(0, len(rows), max(1, len(rows) // 64)))
            content = json.dumps([some.column_names, *some], default=str)
            told.append(f"{len(rows)} {name} rows ({hashlib.sha256(content.encode()).hexdigest()[:12]})")
    return ", ".join(told)


Files = tuple[str, ...]
"""("file", path, ...) or ("hub", name, configuration or "", split)."""


def _files(source: Source, which: str) -> Files:
    """Where the rows for training or for evaluation are; empty where there are none for evaluation."""
    patterns = source.train_file if which == "train" else source.eval_file
    if patterns is not None:
        return ("file", *map(str, sources.find_files(patterns)))
    split = source.train_split if which == "train" else source.eval_split
    if source.dataset_name is None or split is None:
        return ()
    return ("hub", source.dataset_name, source.dataset_config or "", split)


def _rows(files: Files) -> Iterator[Row]:
    kind, *where = files
    if kind == "hub":
        name, config, split = where
        return sources.hub_rows(name, config or None, split)
    return chain.from_iterable(sources.file_rows(Path(path)) for path in where)


def _first(files: Files, skip_empty: bool) -> Row:
    """The row that the form is read off: the first, or where nulls are left out the first without any."""
    row = next(_rows(files), None)
    if skip_empty:
        full = (found for found in _rows(files) if not any(map(is_missing, found[1].values())))
        row = next(full, row)
    if row is None:
        raise ValueError(f"{', '.join(files[1:])} holds no rows")
    return row


def _build(source: Source, which: str, form: Form) -> Dataset:
    """The columns of all rows, in a file of the cache of `datasets`; the first rank there writes it."""
    files = _files(source, which)
    try:
        # `datasets` knows a function by its name only, so files and code are named in what it hashes.
        return Dataset.from_generator(
            _generate,
            features=form.features,
            gen_kwargs={"files": files, "form": form, "state": _state(files), "code": _code_digest()},
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):
            raise error.__cause__ from None
        raise
    except ValueError as error:
        if "corresponds to no data" in str(error):
            raise ValueError(f"{', '.join(files[1:])} holds no rows") from None
        raise


def _generate(files: Files, form: Form, state: str, code: str) -> Iterator[dict[str, Any]]:
    num_skipped, empty = 0, Counter[str]()
    for place, row in _rows(files):
        if form.skip_empty and form.is_empty(row):
            num_skipped += 1
            continue
        yield columns.columns(row, form, place)
        empty.update(name for template in form.templates.values() for name in template.missing(row))
    named = ", ".join(files[1:])
    if num_skipped:
        print_once(f"data: {num_skipped} rows of {named} left out, because a column of theirs is empty")
    for name, count in empty.items():
        print_once(f"data: {name!r} is empty in {count} rows of {named}: nothing stands in its place in the template")


def _state(files: Files) -> str:
    """Changes when the rows may have: times and sizes of local files; on the hub the commit, part of the cache's path.

    A text, because `from_generator` takes a list for shards and calls once for each of its items.
    """
    kind, *where = files
    if kind == "file":
        return str([(status.st_mtime_ns, status.st_size) for status in (Path(path).stat() for path in where)])
    name, config, split = where
    return str([entry["filename"] for entry in sources.hub_set(name, config or None, split).cache_files])


def _code_digest() -> str:
    modules = (sources, columns, templates)
    return hashlib.sha256(b"".join(Path(str(module.__file__)).read_bytes() for module in modules)).hexdigest()


def _set_aside(plan: DataPlan, train: list[Dataset], seed: int) -> tuple[list[Dataset], list[Dataset]]:
    """Take evaluation rows out of every set's training rows, before any of them is repeated."""
    sizes = [len(rows) for rows in train]
    if plan.eval_fraction is not None:
        fraction = Fraction(str(plan.eval_fraction))
        counts = [max(1, round(fraction * size)) for size in sizes]
    else:
        assert plan.eval_rows is not None
        counts = mixture.apportion(plan.eval_rows, [Fraction(size, sum(sizes)) for size in sizes])
    kept, aside = [], []
    for number, (rows, count) in enumerate(zip(train, counts)):
        if count >= len(rows):
            raise ValueError(
                f"{plan.parts[number].source.describe()} holds {len(rows)} rows, and {count} for evaluation leave none "
                "to train on: lower eval_rows or eval_fraction"
            )
        stay, drawn = mixture.set_aside(len(rows), count, f"{seed} evaluation {number}")
        kept.append(rows.select(stay))
        aside += [rows.select(drawn)] if drawn else []
    print_once(f"data: {sum(counts)} evaluation rows taken out of the training rows by seed {seed}")
    return kept, aside


def _mix(plan: DataPlan, train: list[Dataset], seed: int) -> Dataset:
    """One set of the rows of an epoch, in the files' order where there is one source, else shuffled by seed."""
    if not plan.is_mixture:
        return train[0]
    sizes = [len(rows) for rows in train]
    weights = [part.weight for part in plan.parts if part.weight is not None]
    counts = mixture.epoch_counts(sizes, weights, plan.mixture_rows) if weights else sizes
    chosen = []
    for number, (rows, count) in enumerate(zip(train, counts)):
        chosen.append(rows.select(mixture.choose(len(rows), count, f"{seed} mixture {number}")))
        share = f"{count} of its {len(rows)} rows" if count <= len(rows) else f"{count} rows, of {len(rows)} repeated"
        print_once(f"data: {plan.parts[number].source.describe()}: {share} in an epoch ({count / sum(counts):.2%})")
    whole = concatenate_datasets(chosen)
    return whole.select(mixture.shuffled(len(whole), f"{seed} mixture"))
