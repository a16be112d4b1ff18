"""TRL's trainers as a run uses them: whole checkpoints, whole steps, and a stop on a signal.

The only file that overrides private methods of transformers' Trainer.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import set_seed
from transformers.trainer_utils import rotate_checkpoints
from trl import DPOTrainer, GRPOTrainer, SFTTrainer
from trl.models import prepare_deepspeed
from trl.trainer.callbacks import SyncRefModelCallback
from trl.trainer.utils import RepeatSampler, add_fused_lm_head, disable_dropout_in_model

from lota.data.trained_tokens import IGNORED
from lota.files import naming_disk_full, sync
from lota.ranks.agree import together
from lota.ranks.stop import leave, signal_received
from lota.run import checkpoint_manifest
from lota.run.batch import Batch, whole_steps
from lota.run.checkpoints import FOLDER, STATE_NAME, step_of
from lota.run.options import Config, PolicyConfig, PreferenceConfig


class WholeCheckpoints:
    """Put before a Trainer class: `checkpoint-N` appears by one rename, after all ranks have written their part.

    The Trainer itself writes into the folder piece by piece under its final name, so a killed save looks complete.
    Older checkpoints are removed only after the new one is there.
    """

    args: Any
    state: Any
    control: Any
    accelerator: Any
    _staging: Path | None = None
    num_training_steps: int | None = None  # as the schedule was made for them

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)  # type: ignore[misc]

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL's would stand in output_dir and speak of a model that is not there; the ticket has a card of its own."""

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Some schedules (polynomial) read the optimizer's defaults, which DeepSpeed's own wrapper does not hand on."""
        self.num_training_steps = num_training_steps
        wrapper = self.optimizer if optimizer is None else optimizer  # type: ignore[attr-defined]
        while not hasattr(wrapper, "defaults") and hasattr(wrapper, "optimizer"):
            if hasattr(wrapper.optimizer, "defaults"):
                wrapper.defaults = wrapper.optimizer.defaults
            wrapper = wrapper.optimizer
        return super().create_scheduler(num_training_steps, optimizer)  # type: ignore[misc]

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """The Trainer checks after a step whether it was the last: resumed from the last checkpoint, it would take one
        more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)  # type: ignore[misc]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Every step of an epoch has all its rows, and the same ones on any number of ranks."""
        sampler = super()._get_train_sampler(train_dataset)  # type: ignore[misc]
        rows = Batch.of(self.args, self.args.world_size).rows
        return whole_steps(sampler, rows, self.args.dataloader_drop_last)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """The random states of a checkpoint of the same number of ranks; on a different number new ones, by seed."""
        if checkpoint is None:
            return
        if checkpoint_manifest.read(Path(checkpoint))[0].ranks == self.args.world_size:
            super()._load_rng_state(checkpoint)  # type: ignore[misc]
        else:
            set_seed(new_seed(self.args.seed, self.state.global_step, self.args.process_index))

    def _remove_later(self, folder: Path) -> None:
        """Remove checkpoints of later steps, left by a run before this one resumed from an older checkpoint: they would
        be the ones to resume from, and rotation would keep them."""
        for path in folder.glob("checkpoint-*"):
            if FOLDER.fullmatch(path.name) and step_of(path) > self.state.global_step:
                shutil.rmtree(path, ignore_errors=True)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(super()._get_output_dir(trial))  # type: ignore[misc]
        name = f"checkpoint-{self.state.global_step}"
        staging = folder / f".{name}.partial"
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit, self._staging = self.args.save_total_limit, None, staging
        try:
            with naming_disk_full(folder / name):
                super()._save_checkpoint(model, trial)  # type: ignore[misc]
        finally:
            self.args.save_total_limit, self._staging = limit, None
        if self.state.best_model_checkpoint == str(staging / name):
            self.state.best_model_checkpoint = str(folder / name)
            if self.args.should_save:
                self.state.save_to_json(str(staging / name / STATE_NAME))
        self.accelerator.wait_for_everyone()
        views: list[checkpoint_manifest.Files | None] = [None] * dist.get_world_size()
        with together():
            view = checkpoint_manifest.list_files(staging / name) if self.args.local_process_index == 0 else None
        dist.all_gather_object(views, view)
        with together(), naming_disk_full(folder / name):
            if self.args.should_save:
                checkpoint_manifest.write(staging / name, Batch.of(self.args, self.args.world_size), views)
                shutil.rmtree(folder / name, ignore_errors=True)  # left from before a resume at an older step
                sync(staging / name)
                os.replace(staging / name, folder / name)
                sync(folder)
                staging.rmdir()
                self._remove_later(folder)
                rotate_checkpoints(str(folder), limit, self.state.best_model_checkpoint, use_mtime=False)


def new_seed(seed: int, step: int, rank: int) -> int:
    """The seed of a rank that resumes from a checkpoint of a different number of ranks; 32 bits."""
    return int.from_bytes(hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()[:4], "little")


class StopsWhenAsked:
    """Put before a Trainer class: at the end of a step, all ranks look whether any was asked to stop.

    A stop saves whatever save_strategy says, and whichever step it is. The step's evaluation, where one is due, comes
    first: the resumed run would not repeat it. Raises Preempted, so that nothing of what the Trainer does after
    its last step is done, such as loading the best checkpoint.
    """

    args: Any
    state: Any
    control: Any
    callback_handler: Any
    saved_step: int | None = None
    has_checkpoints: bool = True  # a phase without any, which is a short one, runs to its end

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)  # type: ignore[misc]
        self.saved_step = self.state.global_step

    def _maybe_log_save_evaluate(
        self, tr_loss: Any, grad_norm: Any, model: Any, trial: Any, *args: Any, **kwargs: Any
    ) -> None:
        number = signal_received() if self.has_checkpoints else 0
        if number:
            self.control.should_log = True  # the losses since the last log are not part of a checkpoint
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)  # type: ignore[misc]
        if number:
            step = self.state.global_step
            if self.saved_step != step:
                self._save_checkpoint(model, trial)
                self.control = self.callback_handler.on_save(self.args, self.state, self.control)
            leave(number, f"after step {step} of {self.state.max_steps}: {self.args.output_dir}/checkpoint-{step}")


def trainer_class(config: Config, refers_to_itself: bool = False, samples_answers: bool = False) -> type[Any]:
    """TRL's trainer for the kind of training that `config` describes, with checkpoints that appear whole.

    refers_to_itself: for preferences whose reference is the model itself; see `SelfReference`. samples_answers: see
    `_SamplingTrainer`.
    """
    if isinstance(config, PolicyConfig):
        return _PolicyTrainer
    if isinstance(config, PreferenceConfig):
        return _SelfReferenceTrainer if refers_to_itself else _PreferenceTrainer
    return _SamplingTrainer if samples_answers else _SupervisedTrainer


class _SupervisedTrainer(StopsWhenAsked, WholeCheckpoints, SFTTrainer):
    pass


class _SamplingTrainer(_SupervisedTrainer):
    """In place of every token of an answer, one that the model would give there: gradients of the true Fisher.

    Drawn by the run's seed and the number of the micro-batch, counted over all ranks, so that the ranks do not matter.
    """

    _num_drawn = 0

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        labels = inputs["labels"].clone()
        number = self._num_drawn * self.args.world_size + self.args.process_index
        self._num_drawn += 1
        generator = torch.Generator().manual_seed(new_seed(self.args.seed, number, 0))
        kept = {name: inputs[name] for name in ("input_ids", "attention_mask", "position_ids") if name in inputs}
        with torch.no_grad():
            logits = model(**kept).logits
        is_answer = labels[:, 1:] != IGNORED
        # float64 on the host: a draw must not depend on the device
        odds = torch.softmax(logits[:, :-1][is_answer].double().cpu(), -1)
        drawn = torch.multinomial(odds, 1, generator=generator).squeeze(1)
        labels[:, 1:][is_answer] = drawn.to(labels.device, labels.dtype)
        return super().compute_loss(model, {**inputs, "labels": labels}, *args, **kwargs)


class _PreferenceTrainer(StopsWhenAsked, WholeCheckpoints, DPOTrainer):
    pass


class _SelfReferenceTrainer(_PreferenceTrainer):
    """Made with `precompute_ref_log_probs`, so that TRL makes no second model, and then nothing is precomputed: whoever
    makes it sets `ref_model` to a `SelfReference`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.precompute_ref_logps = False

    def _precompute_ref_logps(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset


class _PolicyTrainer(StopsWhenAsked, WholeCheckpoints, GRPOTrainer):
    """Made without a reference model: TRL would load one by the name of the first, without the run's tickets and
    revision. Where beta asks for one and there is no adapter to switch off, whoever makes it calls `refer_to`."""

    _step: int

    def __init__(self, *, args: PolicyConfig, peft_config: Any = None, **others: Any) -> None:
        beta, is_synced = args.beta, args.sync_ref_model
        if peft_config is None:
            args.beta, args.sync_ref_model = 0.0, False
        super().__init__(args=args, peft_config=peft_config, **others)
        args.beta, args.sync_ref_model = beta, is_synced
        self.beta = beta

    def refer_to(self, reference: Any) -> None:
        """reference: a `SelfReference`, or a second model, which is prepared as TRL prepares its own."""
        if isinstance(reference, SelfReference):
            self.ref_model = reference
            return
        if self.args.disable_dropout:
            disable_dropout_in_model(reference)
        add_fused_lm_head(reference, temperature=self.temperature)
        self.ref_model = prepare_deepspeed(reference, self.accelerator)
        if self.args.sync_ref_model:
            self.add_callback(SyncRefModelCallback(ref_model=self.ref_model, accelerator=self.accelerator))

    def prompt_ids(self, prompts: list[Any]) -> list[list[int]]:
        """The tokens that the model is given, one list a prompt, through the chat template where they are chats."""
        ids: list[list[int]] = self._tokenize_prompts(prompts)[0]
        return ids

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(train_dataset)
        sampler.__class__ = _RepeatsOfAnEpoch
        return sampler

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # TRL counts micro steps from the start of the process, and generates by that count.
        self._step = max(self._step, self.state.global_step * self.args.gradient_accumulation_steps)
        super()._run_epoch(*args, **kwargs)


class _RepeatsOfAnEpoch(RepeatSampler):
    """TRL's order of prompts, drawn by the epoch, so that a resumed run has the order of one that was not stopped."""

    def set_epoch(self, epoch: int) -> None:
        if self.shuffle:
            self.generator.manual_seed(new_seed(self.seed, epoch, 0))


class SelfReference:
    """The trained model as its own reference: `as_reference` puts the base's values into it for a forward pass."""

    def __init__(self, trainer: Any, as_reference: Callable[[], AbstractContextManager[Any]]) -> None:
        self._trainer, self._as_reference = trainer, as_reference

    def __call__(self, **inputs: Any) -> Any:
        """What TRL asks its `ref_model` for, inside `torch.no_grad()`. Collective."""
        engine = self._trainer.deepspeed
        was_training = engine.module.training  # the engine's own flag is not the one that evaluation sets
        with self._as_reference():
            engine.module.eval()
            try:
                return engine(**inputs)
            finally:
                engine.module.train(was_training)
