"""The rows that a model is evaluated on: those of the training options' evaluation set, as prompt and answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any

from lota.data import dataset
from lota.data.options import DataArguments, Source, plan_data

Row = dict[str, Any]
"""prompt and completion: texts, or lists of messages."""


def has_rows(args: DataArguments) -> bool:
    """Whether the options name an evaluation set."""
    return args.eval_rows is not None or args.eval_fraction is not None or _evaluation_set(args) is not None


def evaluation_rows(args: DataArguments, seed: int) -> list[Row]:
    """The evaluation set as a training run has it; eval_file comes before every other. ValueError for bad input.

    Of a conversation the last turn is the answer; a plain text is an answer without a prompt.
    """
    source = _evaluation_set(args)
    if source is not None:
        rows = dataset.load(plan_data(source), seed).train
    else:
        found = dataset.load(plan_data(args), seed).evaluation
        assert found is not None
        rows = found
    return [_row(row, number) for number, row in enumerate(rows, start=1)]


def reference(row: Mapping[str, Any]) -> str:
    """The text that an answer is compared with."""
    completion = row["completion"]
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def _evaluation_set(args: DataArguments) -> DataArguments | None:
    """Options that name the evaluation set in the place of training data; None where there is no set of its own."""
    alone = asdict(args)
    if args.eval_file is None and isinstance(args.mixture, list):
        names = {entry.name for entry in fields(Source)}
        sources = [Source(**{n: v for n, v in entry.items() if n in names}) for entry in args.mixture]
        evaluated = [asdict(_to_the_front(source)) for source in sources if source.eval_file or source.eval_split]
        return DataArguments(mixture=evaluated) if evaluated else None
    if args.eval_file is None and (args.dataset_name is None or args.eval_split is None):
        return None
    source = Source(**{entry.name: alone[entry.name] for entry in fields(Source)})
    return DataArguments(**asdict(_to_the_front(source)))


def _to_the_front(source: Source) -> Source:
    if source.eval_file is not None:
        return replace(source, train_file=source.eval_file, eval_file=None, eval_split=None,
                       dataset_name=None, dataset_config=None)  # fmt: skip
    assert source.eval_split is not None
    return replace(source, train_file=None, train_split=source.eval_split, eval_split=None)


def _row(row: Mapping[str, Any], number: int) -> Row:
    if "text" in row:
        return {"prompt": "", "completion": row["text"]}
    if "messages" in row:
        *prompt, answer = row["messages"]
        if answer["role"] != "assistant" or not prompt:
            raise ValueError(
                f"evaluation row {number}: expected a conversation that ends with an assistant's answer to something, "
                f"got roles {', '.join(message['role'] for message in row['messages'])}"
            )
        return {"prompt": prompt, "completion": [answer], **_beside(row)}
    return {"prompt": row["prompt"], "completion": row["completion"], **_beside(row)}


def _beside(row: Mapping[str, Any]) -> Row:
    return {"tools": row["tools"]} if row.get("tools") is not None else {}
