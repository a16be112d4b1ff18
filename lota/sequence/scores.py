"""Scores all tasks on the models that a sequence had: every stage that lacks figures, with one load of the base."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from lota.delivery.live import apply_
from lota.evaluate import run as evaluation
from lota.evaluate.answer_loss import check_causal
from lota.evaluate.arguments import EvaluateArguments
from lota.evaluate.generate import Decoding
from lota.evaluate.scoring import RowSettings, check_fit, score_rows
from lota.sequence.checks import Base, Prepared
from lota.sequence.state import Stage, State
from lota.ticket import Ticket


def fill_in(state: State, folder: Path, base: Base, tasks: Sequence[Prepared], write: Callable[[], None]) -> None:
    """Score every task of `tasks` on every stage that lacks its figures and whose model is at hand. Collective; `write`
    is called after every task, with `state` up to date on every rank."""
    todo = [stage for stage in state.stages if any(task.name not in stage.scores for task in tasks)]
    held = _Held(state, folder, base, tasks[0].dtype)
    try:
        for stage in todo:
            model, tokenizer = held.of_stage(stage)
            if model is None:
                continue
            own_template = tokenizer.chat_template
            for task in tasks:
                if task.name in stage.scores:
                    continue
                tokenizer.chat_template = own_template
                if task.template is not None:
                    tokenizer.chat_template = Path(task.template).read_text(encoding="utf-8")
                try:
                    check_fit(model, tokenizer, task.rows, 0)
                except ValueError as error:
                    raise ValueError(f"task {task.name}, evaluation {error}") from error
                how = RowSettings(("loss",), Decoding(), task.batch_rows)
                stage.scores[task.name] = score_rows(model, tokenizer, task.rows, how, f"{stage.after}: {task.name}")
                write()
            tokenizer.chat_template = own_template
    finally:
        held.release()


class _Held:
    """The model that is loaded, and the tasks that are on it. A later stage adds tickets; any other loads anew."""

    def __init__(self, state: State, folder: Path, base: Base, dtype: str) -> None:
        self._state, self._folder, self._base, self._dtype = state, folder, base, dtype
        self._loaded: tuple[Any, Any] | None = None
        self._on: tuple[str, ...] = ()

    def of_stage(self, stage: Stage) -> tuple[Any, Any]:
        """Model and tokenizer of a stage; (None, None) where its model was not kept."""
        path = self._path(stage)
        if path is None:
            return None, None
        is_sparse = self._state.method == "lota"
        if self._loaded is None or not is_sparse or stage.tasks[: len(self._on)] != self._on:
            self.release()
            self._loaded = self._load(path)
            if self._state.method == "lota":
                self._on = ()
        model, tokenizer = self._loaded
        if is_sparse:
            for name in stage.tasks[len(self._on) :]:
                # The first is held against the base's fingerprints. Later ones find entries of earlier ones in their
                # tensors; where masks overlap, the last task's value is the model's.
                apply_(model, self._ticket(name), verify=not self._on)
                self._on = (*self._on, name)
        return model, tokenizer

    def release(self) -> None:
        """Let go of the model."""
        self._loaded, self._on = None, ()
        gc.collect()
        if torch.accelerator.is_available():
            torch.accelerator.memory.empty_cache()

    def _ticket(self, name: str) -> Ticket:
        task = self._state.task(name)
        assert task is not None
        return Ticket.load(self._folder / self._state.place_of(task) / "ticket")

    def _path(self, stage: Stage) -> str | None:
        """The model folder that a stage begins with, or is."""
        if self._state.method == "lota" or not stage.tasks:
            return self._base.model
        task = self._state.task(stage.tasks[-1])
        assert task is not None
        merged = self._folder / self._state.place_of(task) / "merged"
        return str(merged) if merged.is_dir() else None

    def _load(self, path: str) -> tuple[Any, Any]:
        args = EvaluateArguments(
            model_name_or_path=path,
            model_revision=self._base.revision if path == self._base.model else "main",
            attn_implementation=self._base.attn_implementation,
            trust_remote_code=self._base.trust_remote_code,
            dtype=self._dtype,
        )
        model, tokenizer = evaluation.load(args)
        check_causal(model)
        return model, tokenizer
