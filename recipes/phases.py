"""One phase of a run: load the base, train it under TRL inside the block that the caller opened, let it go again."""

from __future__ import annotations

import gc
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import deepspeed
import torch
from datasets import Dataset, disable_progress_bars
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, ProgressCallback, TrainerCallback
from trl import DPOTrainer, SFTTrainer

from recipes import contents, examples, job, lora
from recipes.arguments import Config, LotaArguments, PreferenceConfig
from recipes.batch import Batch, world_size
from recipes.checkpoints import WholeCheckpoints, adopt, chosen, is_complete, step_of
from recipes.data import Sets
from recipes.one_view import alike, from_rank_0
from recipes.preemption import StopsWhenAsked, leave_if_asked
from recipes.run_folder import RunFolder, rank, say
from recipes.tokenizer import load_tokenizer

_DOING = {"calibrate": "calibration", "train": "training"}


class Phase:
    """A trainer on a freshly loaded base. Build and run it inside a lota block; `close()` frees the engine."""

    def __init__(
        self,
        name: str,
        args: LotaArguments,
        config: Config,
        data: Sets,
        folder: RunFolder,
        **changes: Any,
    ) -> None:
        """changes: values of TrainingArguments for this phase only. Arguments are made afresh for each phase, because
        DeepSpeed's "auto" values are filled into them."""
        train, evaluation = data
        self.name = name
        where = folder.checkpoints_of(name)
        self._checkpoint = from_rank_0(lambda: chosen(config.resume_from_checkpoint, where))
        with alike():
            if self._checkpoint is not None and not is_complete(self._checkpoint):
                raise ValueError(f"{self._checkpoint} is not a complete checkpoint")
        self._log = _Log(name, folder, 0 if self._checkpoint is None else step_of(self._checkpoint))
        # Evaluating at step 0 gives the base's loss from the very engine that trains.
        changes["eval_on_start"] = evaluation is not None and self._checkpoint is None
        if evaluation is None:
            changes |= {"eval_strategy": "no", "load_best_model_at_end": False}
        changes |= {"output_dir": str(where), "report_to": "none"}
        self.config = replace(config, **changes)
        if rank() > 0 or not sys.stderr.isatty():
            disable_progress_bars()
        # On CPU ranks the arguments set up torch.distributed alone; zero.Init would take the world for one rank.
        deepspeed.init_distributed()
        leave_if_asked(f"before {_DOING[name]}")
        # Loading rewinds: nothing of an earlier phase is reused. from_pretrained shards at once, because the
        # arguments above registered the ZeRO-3 configuration.
        model = load_model(args, config)
        # Where embeddings are frozen, reentrant checkpointing cuts the graph unless their output asks for a gradient.
        if self.config.gradient_checkpointing:
            model.enable_input_require_grads()
        self.trainer = trainer_class(config)(
            model=model,
            **({"ref_model": load_model(args, config)} if needs_reference(args, config) else {}),
            args=self.config,
            train_dataset=train,
            eval_dataset=evaluation,
            processing_class=load_tokenizer(args),
            peft_config=lora.peft_config(args) if args.method == "lora" else None,
        )
        self.trainer.saved_step = None if self._checkpoint is None else step_of(self._checkpoint)
        self.trainer.remove_callback(ProgressCallback)
        self.folder = folder
        self._num_dropped = 0 if getattr(self.config, "packing", False) else len(train) - len(self.prepared)
        self._log.num_skipped = lambda: self.trainer.deepspeed.skipped_steps
        self.trainer.add_callback(self._log)
        if name == "calibrate":
            self.trainer.add_callback(_NoLastCheckpoint())
        # Calibration comes first on the run's one axis of steps.
        first_step = (args.calibration_steps or 0) if name == "train" else 0
        for callback in folder.tracking(config).callbacks(name, first_step):
            self.trainer.add_callback(callback)
        if not self.config.disable_tqdm:
            self.trainer.add_callback(_Progress(name))

    @property
    def prepared(self) -> Dataset:
        """The training set as TRL tokenized it, which the next phase can take as it is."""
        return self.trainer.train_dataset

    @property
    def num_micro_steps(self) -> int:
        """Backwards of the training so far."""
        return self._log.num_micro_steps

    def run(self) -> dict[str, Any]:
        """Train, evaluate where there is an evaluation set, and say what happened. Collective."""
        leave_if_asked(f"before {_DOING[self.name]}")  # loading takes a while
        say(f"{self.name}: {batch_arithmetic(self.config, self.trainer.train_dataset)}")
        if self._num_dropped:
            say(f"{self.name}: {self._num_dropped} rows dropped, of whose answers max_length leaves nothing")
        self._show_examples()
        if self._checkpoint is not None:
            say(f"{self.name}: going on from {self._checkpoint}")
            ranks = contents.read(self._checkpoint)[0].ranks
            if ranks != world_size():
                say(
                    f"{self.name}: the checkpoint has the random states of {ranks} ranks; these {world_size()} begin "
                    "with new ones, from the seed, the step and the rank"
                )
        started = time.monotonic()
        output = self.trainer.train(None if self._checkpoint is None else str(self._checkpoint))
        # The Trainer's own mean leaves out what came before it was resumed.
        facts: dict[str, Any] = {"steps": output.global_step, "train_loss": mean_loss(self.trainer.state.log_history)}
        if self._checkpoint is not None:
            facts["resumed_from_step"] = step_of(self._checkpoint)
        facts["last_step_loss"] = self._log.last_loss
        self._leave_if_complete()
        if self.trainer.eval_dataset is not None:
            facts["eval_loss_before"] = self._log.first_eval_loss
            scores = self.trainer.evaluate()
            facts["eval_loss"] = scores["eval_loss"]
            facts |= {name: value for name, value in scores.items() if name.startswith("eval_rewards/")}
            self._leave_if_complete()
        facts["seconds"] = round(time.monotonic() - started, 2)
        return facts

    def _leave_if_complete(self) -> None:
        """After the last step a run stops only where a checkpoint of that step brings it back here. Without one, to
        finish loses less."""
        if self.trainer.saved_step == self.trainer.state.global_step:
            leave_if_asked(f"after the last step of {_DOING[self.name]}")

    def _show_examples(self) -> None:
        """What the model will see of the first rows, once a run: two on the terminal, some more in examples.txt."""
        if self.folder.is_writer and not self.folder.has_examples:
            tokenizer = self.trainer.processing_class
            found = examples.first_examples(self.trainer, examples.NUM_WRITTEN)
            for example in found[: examples.NUM_SHOWN]:
                say(f"example of {examples.show(tokenizer, *example)}")
            self.folder.write_examples(examples.render(tokenizer, found))

    def close(self) -> None:
        """Destroy the engine and drop model and optimizer, so that the next phase has the memory."""
        for model in (self.trainer, getattr(self.trainer, "ref_model", None)):
            engine = getattr(model, "deepspeed", None) if model is self.trainer else model
            if engine is not None:
                engine.destroy()
        self.trainer.accelerator.free_memory()
        del self.trainer
        gc.collect()
        if torch.accelerator.is_available():
            torch.accelerator.memory.empty_cache()


def trainer_class(config: Config) -> type[Any]:
    """TRL's trainer for the kind of training that `config` describes, with checkpoints that appear whole."""
    return _PreferenceTrainer if isinstance(config, PreferenceConfig) else _SupervisedTrainer


class _SupervisedTrainer(StopsWhenAsked, WholeCheckpoints, SFTTrainer):
    pass


class _PreferenceTrainer(StopsWhenAsked, WholeCheckpoints, DPOTrainer):
    pass


def load_model(args: LotaArguments, config: Config) -> Any:
    """The base as it is trained, sharded at once where a ZeRO-3 configuration was registered."""
    model = AutoModelForCausalLM.from_pretrained(
        args.model_name_or_path,
        revision=args.model_revision,
        attn_implementation=args.attn_implementation,
        dtype=training_dtype(config),
    )
    model.config.use_cache = False
    return model


def needs_reference(args: LotaArguments, config: Config) -> bool:
    """Whether DPO loads the base once more. An adapter is switched off instead, and with precompute_ref_log_probs TRL
    asks the model before it is trained."""
    return isinstance(config, PreferenceConfig) and not config.precompute_ref_log_probs and args.method != "lora"


def mean_loss(history: Sequence[Mapping[str, Any]]) -> float | None:
    """Mean loss of all steps from the Trainer's log, where each entry is the mean since the one before."""
    total, last = 0.0, 0
    for entry in history:
        if "loss" in entry:
            total += entry["loss"] * (entry["step"] - last)
            last = entry["step"]
    return total / last if last else None


def training_dtype(config: Config) -> torch.dtype:
    """The dtype the weights are trained in. The engine keeps the dtype it finds, so loading decides it."""
    return torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else torch.float32


def batch_arithmetic(config: Config, train: Dataset) -> str:
    """How many rows make a step, and how many steps there are."""
    batch = Batch.of(config, world_size())
    length = len(train)
    steps = config.max_steps if config.max_steps > 0 else math.ceil(length / batch.rows * config.num_train_epochs)
    num_trained = examples.num_trained_tokens(train, config.max_length)
    rest = length % batch.rows
    return (
        f"{batch}, about {steps} steps over {length} rows with {num_trained} trained tokens, learning rate "
        f"{config.learning_rate:g}"
        + (f"; the last step of an epoch has {rest} of them and {batch.rows - rest} drawn once more" if rest else "")
    )


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the block's wall time to seconds[name]."""
    started = time.monotonic()
    yield
    seconds[name] = round(seconds.get(name, 0.0) + time.monotonic() - started, 2)


class _Log(TrainerCallback):
    """Every log of the Trainer into metrics.jsonl, and the two losses that the summary wants.

    first_step: where a resumed phase goes on; what was logged later will be logged again.
    """

    def __init__(self, phase: str, folder: RunFolder, first_step: int) -> None:
        self.phase, self.folder = phase, folder
        rows = folder.keep_metrics(phase, first_step)
        self.first_eval_loss: float | None = next((row["eval_loss"] for row in rows if "eval_loss" in row), None)
        self.last_loss: float | None = next((row["loss"] for row in reversed(rows) if "loss" in row), None)
        self.num_micro_steps = 0
        self.num_skipped: Callable[[], int] = lambda: 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        adopt(state, args)
        job.training(True)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        job.training(False)

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.num_micro_steps += 1

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.num_micro_steps += 1

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        row = dict(logs or {})
        row.pop("total_flos", None)
        if self.first_eval_loss is None:
            self.first_eval_loss = row.get("eval_loss")
        self.last_loss = row.get("loss", self.last_loss)
        if "loss" in row:
            row["skipped_steps"] = self.num_skipped()
        self.folder.add_metrics({"phase": self.phase, "step": state.global_step} | row)


class _NoLastCheckpoint(TrainerCallback):
    """The Trainer saves after its last step, whatever save_steps is; after calibration the mask takes that place."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_save &= state.global_step < state.max_steps

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.on_step_end(args, state, control)


class _Progress(ProgressCallback):
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
            say(f"{self.phase}: step {state.global_step} of {state.max_steps}, {facts}")
