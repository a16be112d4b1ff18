"""Scores of one model on local rows, with tickets applied temporarily; rows are split over ranks."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tqdm.auto import tqdm

from lota.data.tokenizer import encode
from lota.delivery.live import Applied, apply_, exchange_
from lota.evaluate.answer_loss import score_answers
from lota.evaluate.generate import Decoding, write_answers
from lota.evaluate.metrics import TEXT_METRICS, scorer
from lota.evaluate.rows import Row, reference
from lota.files import write_text
from lota.ranks.world import print_once, rank, world_size
from lota.ticket import Ticket


@dataclass(frozen=True)
class RowSettings:
    """Which metrics, and how. predictions: a folder for what the models wrote."""

    metrics: tuple[str, ...]
    decoding: Decoding
    batch_rows: int
    predictions: str | None = None

    @property
    def writes(self) -> bool:
        """Whether the model has to write answers."""
        return bool(set(self.metrics) & set(TEXT_METRICS))


class Switch:
    """Which tickets are on a model. After the `with` block none is: every bit is the base's, whatever happened."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._applied: Applied | None = None

    def __enter__(self) -> Switch:
        return self

    def __exit__(self, *_: object) -> None:
        self.to(())

    def to(self, tickets: Sequence[Ticket], *, verify: bool = True) -> None:
        """Put `tickets` on in place of those that are on; none: the base. ValueError leaves everything as it is.

        verify: hold the model against the tickets' fingerprints, which is needed once for each."""
        if tickets and self._applied is not None:
            self._applied = exchange_(self._model, self._applied, tickets, verify=verify)
        elif tickets:
            self._applied = apply_(self._model, tickets, verify=verify)
        elif self._applied is not None:
            self._applied.revert()
            self._applied = None


def score_rows(model: Any, tokenizer: Any, rows: Sequence[Row], how: RowSettings, name: str) -> dict[str, Any]:
    """Every metric over all rows, means with their standard errors. Collective; every rank gets the figures."""
    mine = rows[rank() :: world_size()]
    figures: dict[str, Any] = {"num_rows": len(rows)}
    if "loss" in how.metrics:
        with _bar(f"{name}: loss", len(mine)) as advance:
            score = score_answers(model, tokenizer, mine, how.batch_rows, advance)
        losses, tokens = _gather(score.row_losses), _gather(score.row_tokens)
        figures |= {"num_answer_tokens": sum(tokens), "loss": math.fsum(losses) / max(sum(tokens), 1)}
        figures |= _mean("exact_tokens", [float(value) for value in _gather(score.row_exact)])
    if how.writes:
        with _bar(f"{name}: answers", len(mine)) as advance:
            texts = write_answers(model, tokenizer, mine, how.decoding, how.batch_rows, advance)
        score_text = scorer(how.metrics)
        scored = _gather([score_text(text, reference(row)) for text, row in zip(texts, mine, strict=True)])
        for metric in scored[0]:
            figures |= _mean(metric, [values[metric] for values in scored])
        texts = _gather(texts)
        if how.predictions is not None and rank() == 0:
            _write_predictions(Path(how.predictions), name, rows, texts, scored)
    return figures


def check_fit(model: Any, tokenizer: Any, rows: Sequence[Row], max_new_tokens: int) -> None:
    """ValueError for a row that needs more positions than the model has: an evaluation cuts nothing off.

    max_new_tokens: what may be written after a prompt, 0 where nothing is.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    for number, row in enumerate(rows, start=1):
        ids, num_prompt = encode(tokenizer, row)
        if num_prompt == 0 and max_new_tokens:
            raise ValueError(f"row {number} has an empty prompt, after which nothing can be written: use metrics loss")
        needed = max(len(ids), num_prompt + max_new_tokens)
        if positions is not None and needed > positions:
            raise ValueError(
                f"row {number} needs {needed} tokens ({num_prompt} of prompt, {len(ids) - num_prompt} of answer, "
                f"{max_new_tokens} new ones at most), and the model has {positions} positions: remove the row"
                + (", or lower max_new_tokens" if max_new_tokens else "")
            )


def _mean(name: str, values: Sequence[float]) -> dict[str, float]:
    """Mean and its standard error (of the sample, sqrt(variance / n)), summed in row order whatever the ranks."""
    count = len(values)
    mean = math.fsum(values) / count
    variance = math.fsum((value - mean) ** 2 for value in values) / max(count - 1, 1)
    return {name: mean, f"{name}_stderr": math.sqrt(variance / count)}


def _gather(mine: Sequence[Any]) -> list[Any]:
    """All ranks' values in the order of the rows, of which rank r holds every world_size()-th from r on."""
    if not dist.is_initialized():
        return list(mine)
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, list(mine))
    whole: list[Any] = [None] * sum(map(len, parts))
    for number, part in enumerate(parts):
        whole[number :: world_size()] = part
    return whole


@contextmanager
def _bar(title: str, total: int) -> Iterator[Callable[[int], Any]]:
    """A progress bar on rank 0's terminal; a line where there is none."""
    if rank() == 0 and not sys.stderr.isatty():
        print_once(f"{title}, {total} rows" + (" a rank" if world_size() > 1 else ""))
    with tqdm(total=total, desc=title, unit="row", disable=rank() > 0 or not sys.stderr.isatty()) as bar:
        yield bar.update


def _write_predictions(
    folder: Path, name: str, rows: Sequence[Row], texts: Sequence[str], scored: Sequence[dict[str, float]]
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (re.sub(r"[^\w.-]+", "_", name).strip("_") + ".jsonl")
    lines = [
        json.dumps({**row, "prediction": text, **values}, ensure_ascii=False)
        for row, text, values in zip(rows, texts, scored, strict=True)
    ]
    write_text(path, "\n".join(lines) + "\n")
