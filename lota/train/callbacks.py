"""What a phase does beside training steps: metrics, progress, and no checkpoint after the last calibration step."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback

from lota.ranks import process
from lota.ranks.world import print_once
from lota.run.checkpoints import take_over_state
from lota.run.folder import RunFolder


class Log(TrainerCallback):
    """Every log of the Trainer into metrics.jsonl, and the losses and rewards that the summary wants.

    first_step: where a phase resumes; what was logged later will be logged again.
    """

    def __init__(self, phase: str, folder: RunFolder, first_step: int) -> None:
        self.phase, self.folder = phase, folder
        rows = folder.keep_metrics(phase, first_step)
        self.first_eval_loss: float | None = next((row["eval_loss"] for row in rows if "eval_loss" in row), None)
        self.last_loss: float | None = next((row["loss"] for row in reversed(rows) if "loss" in row), None)
        self.first_eval_reward: float | None = next((row["eval_reward"] for row in rows if "eval_reward" in row), None)
        self.rewards = [row["reward"] for row in rows if row.get("reward") is not None]
        self.num_micro_steps = 0
        self.num_skipped: Callable[[], int] = lambda: 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        take_over_state(state, args)
        process.training(True)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        process.training(False)

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.num_micro_steps += 1

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.num_micro_steps += 1
        control.should_log |= state.global_step >= state.max_steps  # a short run shows its losses all the same

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        row = dict(logs or {})
        row.pop("total_flos", None)
        if self.first_eval_loss is None:
            self.first_eval_loss = row.get("eval_loss")
        if self.first_eval_reward is None:
            self.first_eval_reward = row.get("eval_reward")
        if row.get("reward") is not None:
            self.rewards.append(row["reward"])
        self.last_loss = row.get("loss", self.last_loss)
        if "loss" in row:
            row["skipped_steps"] = self.num_skipped()
        self.folder.add_metrics({"phase": self.phase, "step": state.global_step} | row)


class NoLastCheckpoint(TrainerCallback):
    """The Trainer saves after its last step, whatever save_steps is; after calibration the mask takes that place."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_save &= state.global_step < state.max_steps

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.on_step_end(args, state, control)


class Progress(ProgressCallback):
    """One bar a phase, with loss, learning rate and gradient norm; a line now and then where there is no terminal."""

    def __init__(self, phase: str) -> None:
        super().__init__()
        self.phase = phase
        self.is_terminal = sys.stderr.isatty()
        self.next_line = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.current_step = 0
        if state.is_world_process_zero:
            self.training_bar = tqdm(total=state.max_steps, desc=self.phase, disable=not self.is_terminal)

    def on_prediction_step(self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **_: Any) -> None:
        if self.is_terminal:
            super().on_prediction_step(args, state, control, eval_dataloader)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if self.training_bar is None or not logs or "loss" not in logs:
            return
        names = {"loss": "loss", "learning_rate": "lr", "grad_norm": "norm"}
        shown = {short: f"{float(logs[name]):.3g}" for name, short in names.items() if name in logs}
        if self.is_terminal:
            self.training_bar.set_postfix(shown, refresh=False)
        elif state.global_step >= self.next_line:
            self.next_line = state.global_step + state.max_steps / 8
            facts = ", ".join(f"{short} {value}" for short, value in shown.items())
            print_once(f"{self.phase}: step {state.global_step} of {state.max_steps}, {facts}")
