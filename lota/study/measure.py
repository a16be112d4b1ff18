"""What became of a model: losses on all tasks, KL to the model as it was, and how far it moved, at points between.

The model is loaded once; the points between start and outcome (`alpha`) are made by exchanging entries in place.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lota.algebra import ModelTensors
from lota.data.dataset import read_jsonl
from lota.data.tokenizer import encode, load_tokenizer
from lota.delivery.live import flatten
from lota.evaluate.answer_loss import IGNORED, AnswerScore, collate, score_answers
from lota.evaluate.generate import Decoding, write_answers
from lota.files import write_text
from lota.retention import Importance
from lota.study import safety
from lota.ticket import Ticket

KL_ROWS = 48
GENERAL_ROWS = 128
Row = dict[str, Any]


class Dial:
    """A model between start (0) and outcome (1): entries that moved, by position; both ends have exact bits."""

    def __init__(self, model: torch.nn.Module, outcome: Path) -> None:
        """outcome: a run's folder, with ticket/ or merged/."""
        self._parameters = dict(model.named_parameters())
        self._moved: list[tuple[str, Tensor, Tensor, Tensor]] = []
        for name, positions, after in _outcome(outcome):
            flat = flatten(self._parameters[name])
            before = flat[positions] if positions is not None else flat.clone()
            after = after.to(flat.dtype)
            where = (before != after).nonzero().squeeze(1)
            at = where if positions is None else positions[where]
            self._moved.append((name, at, before[where], after[where]))

    def to(self, alpha: float) -> None:
        for name, at, before, after in self._moved:
            values = after if alpha == 1 else before + alpha * (after - before)
            flatten(self._parameters[name])[at] = values if alpha else before

    def movement(self, importance: Importance | None = None) -> dict[str, float]:
        """Of the whole way: entries that changed, the norm of the difference, the same over the norm of the weights;
        with importance the sum of f d^2, f of mean 1 over all entries that have one."""
        self.to(0)
        whole = math.fsum(float(p.detach().double().square().sum()) for p in self._parameters.values())
        squares = math.fsum(float((after - before).double().square().sum()) for _, _, before, after in self._moved)
        found = {
            "num_changed": float(sum(at.numel() for _, at, _, _ in self._moved)),
            "moved": math.sqrt(squares),
            "moved_share": math.sqrt(squares / whole),
        }
        if importance is not None:
            found["fd2"] = math.fsum(
                float((importance.at(name, at).double() * (after - before).cpu().double().square()).sum())
                for name, at, before, after in self._moved
                if name in importance.shapes
            )
        return found


@dataclass(frozen=True)
class Measured:
    """points: one a value of alpha, `TASK dev`, `TASK test`, their standard errors, rises against the start, kl.
    movement: of the whole way."""

    points: list[dict[str, float]]
    movement: dict[str, float]


def measure(
    start: Path,
    outcome: Path | None,
    tasks: Sequence[Path],
    general: Path,
    alphas: Sequence[float],
    starts: Path,
    generate: Sequence[Path] = (),
    importance: Importance | None = None,
    batch_rows: int = 64,
) -> Measured:
    """Score the points of `alphas`; without an outcome the start itself. tasks: folders with dev.jsonl and test.jsonl;
    KL is taken on the first one's dev rows. starts: a file for what the start scores, made where it is missing."""
    model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32).eval()
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    tokenizer = load_tokenizer(str(start))
    rows = {f"{task.name} {part}": read_jsonl(task / f"{part}.jsonl") for task in tasks for part in ("dev", "test")}
    rows["general test"] = [{"prompt": "", "completion": row["text"]} for row in read_jsonl(general)[:GENERAL_ROWS]]
    before = _start_scores(model, tokenizer, rows, starts, batch_rows)
    kept = list(_answer_logits(model, tokenizer, rows[f"{tasks[0].name} dev"][:KL_ROWS]))
    dial = None if outcome is None else Dial(model, outcome)
    points = []
    for alpha in alphas if dial is not None else (0.0,):
        if dial is not None:
            dial.to(alpha)
        point: dict[str, float] = {"alpha": alpha}
        for name, some in rows.items():
            score = before[name] if dial is None else score_answers(model, tokenizer, some, batch_rows)
            point |= _figures(name, score, before[name])
        point["kl"] = _divergence(kept, _answer_logits(model, tokenizer, rows[f"{tasks[0].name} dev"][:KL_ROWS]))
        for folder in generate:
            point |= _judged(model, tokenizer, folder)
        points.append(point)
    return Measured(points, {} if dial is None else dial.movement(importance))


def _outcome(folder: Path) -> Iterator[tuple[str, Tensor | None, Tensor]]:
    """Names, positions (None: all) and new values."""
    if (folder / "ticket").is_dir():
        ticket = Ticket.load(folder / "ticket")
        for name in ticket.names:
            yield name, ticket.mask.indices(name), ticket.values(name)
    else:
        tensors = ModelTensors(folder / "merged")
        for name in tensors.names:
            yield name, None, tensors.read(name).reshape(-1)


def _start_scores(
    model: Any, tokenizer: Any, rows: Mapping[str, list[Row]], path: Path, batch_rows: int
) -> dict[str, AnswerScore]:
    """Read from `path`, or scored and written there."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    made = {name: AnswerScore(*map(tuple, found[name])) for name in rows if name in found}
    missing = [name for name in rows if name not in made]
    for name in missing:
        made[name] = score_answers(model, tokenizer, rows[name], batch_rows)
    if missing:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = found | {n: [s.row_losses, s.row_tokens, s.row_exact] for n, s in made.items()}
        write_text(path, json.dumps(content))
    return made


def _figures(name: str, score: AnswerScore, before: AnswerScore) -> dict[str, float]:
    """Loss in nats per answer token, exact match, rise against the start; standard errors over rows of a ratio."""
    rises = [now - old for now, old in zip(score.row_losses, before.row_losses, strict=True)]
    rise = score.loss - before.loss
    return {
        name: score.loss,
        f"{name} stderr": _stderr(score.row_losses, score.row_tokens, score.loss),
        f"{name} exact": score.exact,
        f"{name} rise": rise,
        f"{name} rise stderr": _stderr(rises, score.row_tokens, rise),
    }


def _stderr(totals: Sequence[float], counts: Sequence[int], ratio: float) -> float:
    """Of sum(totals) / sum(counts), rows being independent."""
    squares = math.fsum((total - ratio * count) ** 2 for total, count in zip(totals, counts, strict=True))
    return math.sqrt(squares * len(counts) / max(len(counts) - 1, 1)) / sum(counts)


@torch.no_grad()
def _answer_logits(model: Any, tokenizer: Any, rows: Sequence[Row], batch_rows: int = 16) -> Iterator[Tensor]:
    """Log-probabilities at every answer token of some rows, `[tokens, vocabulary]` a batch, in fp32."""
    encoded = [encode(tokenizer, row) for row in rows]
    for begin in range(0, len(encoded), batch_rows):
        ids, labels = collate(encoded[begin : begin + batch_rows], tokenizer.pad_token_id)
        logits = model(input_ids=ids.to(model.device)).logits[:, :-1]
        yield torch.log_softmax(logits[(labels[:, 1:] != IGNORED).to(logits.device)].float(), -1)


def _divergence(old: Sequence[Tensor], new: Iterator[Tensor]) -> float:
    """KL(old || new), the mean over tokens, in nats."""
    total, count = 0.0, 0
    for before, after in zip(old, new, strict=True):
        total += float((before.exp() * (before - after)).sum(dtype=torch.float64))
        count += before.shape[0]
    return total / max(count, 1)


def _judged(model: Any, tokenizer: Any, folder: Path, count: int = 96) -> dict[str, float]:
    """What is written to the prompts of a task's test rows: the share that either judge finds refused or answered."""
    rows = read_jsonl(folder / "test.jsonl")[:count]
    texts = write_answers(model, tokenizer, rows, Decoding(max_new_tokens=32), batch_rows=32)
    return {
        f"{folder.name} refused": sum(map(safety.refuses, texts)) / len(texts),
        f"{folder.name} answered": sum(map(safety.complies, texts)) / len(texts),
    }
