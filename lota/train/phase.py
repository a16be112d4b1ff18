"""One phase of a run: load the base, train it under TRL inside the block that the caller opened, let it go again."""

from __future__ import annotations

import gc
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import pyarrow.compute as pc
import torch
from datasets import Dataset, disable_progress_bars
from deepspeed.accelerator import get_accelerator
from transformers import AutoModelForCausalLM, ProgressCallback
from transformers.utils import logging as transformers_logging

from lota.data import trained_tokens
from lota.data.dataset import Sets
from lota.data.tokenizer import chat_template, load_tokenizer
from lota.ranks.stop import leave_if_asked
from lota.ranks.world import print_once, rank, world_size
from lota.run import checkpoint_manifest
from lota.run.batch import Batch
from lota.run.checkpoints import step_of
from lota.run.folder import RunFolder
from lota.run.options import Config, PolicyConfig
from lota.run.resolve import RunOptions
from lota.ticket import Ticket
from lota.train import lora, rewards
from lota.train.callbacks import Log, NoLastCheckpoint, Progress
from lota.train.policy_server import PolicyServer
from lota.train.tracking import tracking_of
from lota.train.trainer import SelfReference, trainer_class
from lota.zero.assign import assign

_DROPOUT = (torch.nn.Dropout, torch.nn.Dropout1d, torch.nn.Dropout2d, torch.nn.Dropout3d, torch.nn.AlphaDropout)
_DOING = {"calibrate": "calibration", "train": "training"}


class Phase:
    """A trainer on a freshly loaded base. Build and run it inside a lota block; `close()` frees the engine."""

    def __init__(
        self,
        name: str,
        options: RunOptions,
        config: Config,
        data: Sets,
        folder: RunFolder,
        *,
        tickets: Sequence[str | Path] = (),
        kept: Mapping[str, Dataset] | None = None,
        as_reference: Callable[[], AbstractContextManager[Any]] | None = None,
        server: PolicyServer | None = None,
        samples_answers: bool = False,
        **changes: Any,
    ) -> None:
        """tickets: on the model beside those of the run. kept: more rows, by name, for `loss_on`. as_reference: of
        a job whose reference is the model itself, what makes it that for a forward pass. server: what writes the
        answers to prompts, in place of the model here. samples_answers:
        of the model, in place of the rows' own. changes: values of
        TrainingArguments for this phase only. Arguments are made afresh for each phase, because DeepSpeed's "auto"
        values are filled into them."""
        train, evaluation = data
        self.name, self._server = name, server
        where = folder.checkpoints_of(name)
        self._checkpoint = folder.resume.of_phase(where)
        self._log = Log(name, folder, 0 if self._checkpoint is None else step_of(self._checkpoint))
        # Evaluating at step 0 gives the base's loss from the very engine that trains.
        changes["eval_on_start"] = evaluation is not None and self._checkpoint is None
        if evaluation is None:
            changes |= {"eval_strategy": "no", "load_best_model_at_end": False}
        changes |= {"output_dir": str(where), "report_to": "none"}
        if getattr(config, "chat_template_path", None) is not None:
            changes["chat_template_path"] = chat_template(config.chat_template_path)
        self.config = replace(config, **changes)
        if rank() > 0 or not sys.stderr.isatty():
            disable_progress_bars()
            transformers_logging.disable_progress_bar()
        # On CPU ranks the arguments set up torch.distributed alone; zero.Init would take the world for one rank.
        deepspeed.init_distributed()
        self._leave_if_asked()
        # Loading rewinds: nothing of an earlier phase is reused. from_pretrained shards at once, because the
        # arguments above registered the ZeRO-3 configuration.
        model = load_model(options, config, tickets)
        if name == "importance":
            without_dropout(model)
        # Where embeddings are frozen, reentrant checkpointing cuts the graph unless their output asks for a gradient.
        if self.config.gradient_checkpointing:
            model.enable_input_require_grads()
        refers_to_itself = options.reference == "ticket" and as_reference is not None
        has_second = options.reference is not None and not refers_to_itself and options.reference != "precompute"
        second = load_model(options, config) if has_second else None
        own: dict[str, Any] = {}
        if options.is_policy:
            callbacks = [] if server is None else [server]
            own = {"reward_funcs": rewards.load(options.rewards), "rollout_func": server, "callbacks": callbacks}
        elif second is not None:
            own = {"ref_model": second}
        if refers_to_itself and not options.is_policy:
            self.config.precompute_ref_log_probs = True
        self.trainer = trainer_class(config, refers_to_itself, samples_answers)(
            model=model,
            args=self.config,
            train_dataset=train,
            eval_dataset=evaluation if not kept else dict(kept) | ({"eval": evaluation} if evaluation else {}),
            processing_class=self._tokenizer(options),
            peft_config=None if options.adapter is None else lora.peft_config(options.adapter),
            **own,
        )
        if refers_to_itself and as_reference is not None:
            reference = SelfReference(self.trainer, as_reference)
            if options.is_policy:
                self.trainer.refer_to(reference)
            else:
                self.trainer.ref_model = reference
        elif options.is_policy and second is not None:
            self.trainer.refer_to(second)
        self._kept: dict[str, Dataset] = {}
        if kept:
            self._kept = dict(self.trainer.eval_dataset)
            self.trainer.eval_dataset = self._kept.pop("eval", None)
        if options.is_policy:
            check_prompts(model.config, self.trainer, self.config)
        else:
            check_positions(model.config, self.prepared, self.config)
        self.trainer.saved_step = None if self._checkpoint is None else step_of(self._checkpoint)
        self.trainer.has_checkpoints = name != "importance"
        self.trainer.remove_callback(ProgressCallback)
        self.folder = folder
        self._num_dropped = 0 if getattr(self.config, "packing", False) else len(train) - len(self.prepared)
        self._log.num_skipped = lambda: self.trainer.deepspeed.skipped_steps
        self.trainer.add_callback(self._log)
        if name == "calibrate":
            self.trainer.add_callback(NoLastCheckpoint())
        # Calibration comes first on the run's one axis of steps.
        first_step = options.calibration.steps if options.calibration is not None and name == "train" else 0
        tracking = tracking_of(folder.path, config.report_to)
        for callback in tracking.callbacks(name, first_step) if name != "importance" else ():
            self.trainer.add_callback(callback)
        if not self.config.disable_tqdm:
            self.trainer.add_callback(Progress(name))

    def _tokenizer(self, options: RunOptions) -> Any:
        tokenizer = load_tokenizer(options.model, options.revision, options.trust_remote_code)
        template = chat_template(getattr(self.config, "chat_template_path", None))
        if options.is_policy and template is not None:  # the other trainers of TRL read the file themselves
            tokenizer.chat_template = Path(template).read_text(encoding="utf-8")
        return tokenizer

    @property
    def prepared(self) -> Dataset:
        """The training set as TRL tokenized it, which the next phase can take as it is."""
        return self.trainer.train_dataset

    def loss_on(self, name: str | None) -> float:
        """The model's loss now on the evaluation rows (None), or on kept rows. Collective."""
        evaluation = self.trainer.eval_dataset
        prefix = "dial" if name is None else f"dial_{name}"
        # By a name: TRL would tokenize, and pack, rows once more that are handed over as they are.
        self.trainer.eval_dataset = {"rows": evaluation if name is None else self._kept[name]}
        try:
            return float(self.trainer.evaluate("rows", metric_key_prefix=prefix)[f"{prefix}_loss"])
        finally:
            self.trainer.eval_dataset = evaluation

    @property
    def num_micro_steps(self) -> int:
        """Backwards of the training so far."""
        return self._log.num_micro_steps

    def run(self) -> dict[str, Any]:
        """Train, evaluate where there is an evaluation set, and say what happened. Collective."""
        self._leave_if_asked()  # loading takes a while
        print_once(f"{self.name}: {batch_arithmetic(self.config, self.trainer.train_dataset)}")
        if self._num_dropped:
            print_once(f"{self.name}: {self._num_dropped} rows dropped, of whose answers max_length leaves nothing")
        self._show_examples()
        if self._checkpoint is not None:
            print_once(f"{self.name}: resuming from {self._checkpoint}")
            ranks = checkpoint_manifest.read(self._checkpoint)[0].ranks
            if ranks != world_size():
                print_once(
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
        if self._log.rewards:
            facts["reward_at_start"], facts["reward_at_end"] = ends(self._log.rewards)
        self._leave_if_complete()
        if self.trainer.eval_dataset is not None:
            facts["eval_loss_before"] = self._log.first_eval_loss
            scores = self.trainer.evaluate()
            facts["eval_loss"] = scores["eval_loss"]
            facts |= {name: value for name, value in scores.items() if name.startswith("eval_rewards/")}
            if "eval_reward" in scores:
                facts |= {"eval_reward_before": self._log.first_eval_reward, "eval_reward": scores["eval_reward"]}
            self._leave_if_complete()
        if self._server is not None:
            facts["server"] = self._server.facts
        facts["seconds"] = round(time.monotonic() - started, 2)
        print_once(f"{self.name}: {losses_line(facts)}")
        return facts

    def _leave_if_asked(self) -> None:
        """Collecting the importance takes a minute and has no checkpoints: the run is then asked again behind it."""
        if self.name != "importance":
            leave_if_asked(f"before {_DOING[self.name]}")

    def _leave_if_complete(self) -> None:
        """After the last step a run stops only where a checkpoint of that step brings it back here. Without one, to
        finish loses less."""
        if self.trainer.saved_step == self.trainer.state.global_step:
            leave_if_asked(f"after the last step of {_DOING[self.name]}")

    def _show_examples(self) -> None:
        """What the model will see of the first rows, once a run: two on the terminal, some more in examples.txt."""
        if self.folder.is_writer and not self.folder.has_examples:
            tokenizer = self.trainer.processing_class
            if isinstance(self.config, PolicyConfig):
                rows = self.prepared[: trained_tokens.NUM_WRITTEN]["prompt"]
                found = [(ids, [False] * len(ids)) for ids in self.trainer.prompt_ids(rows)]
            else:
                found = trained_tokens.first_examples(self.trainer, trained_tokens.NUM_WRITTEN)
            for example in found[: trained_tokens.NUM_SHOWN]:
                print_once(f"example of {trained_tokens.show(tokenizer, *example)}")
            self.folder.write_examples(trained_tokens.render(tokenizer, found))

    def close(self) -> None:
        """Destroy the engine and drop model and optimizer, so that the next phase has the memory. A server has its base
        afterwards. Collective."""
        if self._server is not None:
            self._server.close()
        for model in (self.trainer, getattr(self.trainer, "ref_model", None)):
            engine = getattr(model, "deepspeed", None) if model is self.trainer else model
            if engine is not None and not isinstance(engine, SelfReference):
                engine.destroy()
        self.trainer.accelerator.free_memory()
        del self.trainer
        gc.collect()
        if torch.accelerator.is_available():
            torch.accelerator.memory.empty_cache()


def load_model(options: RunOptions, config: Config, tickets: Sequence[str | Path] = ()) -> Any:
    """The base with the run's tickets and these, as it is trained: sharded at once, because a ZeRO-3 configuration was
    registered. Collective."""
    model = AutoModelForCausalLM.from_pretrained(
        options.model,
        revision=options.revision,
        attn_implementation=options.attn_implementation,
        trust_remote_code=options.trust_remote_code,
        dtype=training_dtype(config),
    )
    model.config.use_cache = False
    on_it = [Ticket.load(path) for path in (*options.keeping.tickets, *tickets)]
    if on_it:
        assign(model, on_it, torch.device(get_accelerator().current_device_name()))
    _name_as_trl_expects(model)
    return model


def _name_as_trl_expects(model: Any) -> None:
    """What TRL 1.16 looks for under one name, and some architectures have under another: the backbone (Llama 4's text
    part), and the number of experts, for the router's loss (Llama 4, Phi-MoE, Granite)."""
    if model.base_model is model and hasattr(model, "model"):
        model.base_model_prefix = "model"
    config = model.config.get_text_config()
    experts = getattr(config, "num_local_experts", None)
    if experts is not None and not hasattr(config, "num_experts"):
        config.num_experts = experts


def without_dropout(model: torch.nn.Module) -> None:
    """No dropout, in train mode too, where gradient checkpointing works: gradients are then the same on any ranks."""
    for module in model.modules():
        if isinstance(module, _DROPOUT):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("dropout" in name or name.endswith("pdrop")):
                setattr(module, name, 0.0)


def check_positions(model_config: Any, rows: Dataset, config: Any) -> None:
    """ValueError where a row has more tokens than the model has positions: what it learns there means nothing, and some
    models read past a table."""
    positions = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1 or getattr(config, "packing", False):
        return
    longest = 0
    for batch in rows.with_format("arrow").iter(1000):
        if "input_ids" in batch.column_names:
            lengths = pc.list_value_length(batch.column("input_ids"))
        else:
            prompt, chosen, rejected = (
                pc.list_value_length(batch.column(f"{part}_ids")) for part in ("prompt", "chosen", "rejected")
            )
            lengths = pc.add(prompt, pc.max_element_wise(chosen, rejected))
        longest = max(longest, pc.max(lengths).as_py() or 0)
    longest = min(longest, config.max_length or longest)
    if longest > positions:
        raise ValueError(
            f"a row has {longest} tokens, and the model has {positions} positions: set max_length: {positions}, or "
            "remove such rows"
        )


def check_prompts(model_config: Any, trainer: Any, config: PolicyConfig) -> None:
    """ValueError where a prompt and its answer have more tokens than the model has positions; TRL cuts no prompt."""
    positions = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    rows = trainer.train_dataset
    longest = max(len(ids) for batch in rows.iter(1000) for ids in trainer.prompt_ids(batch["prompt"]))
    length = longest + config.max_completion_length
    if isinstance(positions, int) and length > positions:
        raise ValueError(
            f"a prompt has {longest} tokens, and with max_completion_length {config.max_completion_length} it needs "
            f"{length} positions, of which the model has {positions}: lower it, or remove such rows"
        )


def ends(values: Sequence[float]) -> tuple[float, float]:
    """The means of the first and of the last tenth."""
    count = max(1, len(values) // 10)
    return sum(values[:count]) / count, sum(values[-count:]) / count


def losses_line(facts: Mapping[str, Any]) -> str:
    """What a phase came to, in one line of the log."""
    parts = [f"{facts['steps']} steps in {facts['seconds']:.0f} s"]
    if facts.get("last_step_loss") is not None:
        parts.append(f"training loss {facts['last_step_loss']:.4g} at the end")
    if facts.get("eval_loss") is not None:
        before = facts.get("eval_loss_before")
        parts.append(f"evaluation loss {facts['eval_loss']:.4g}" + (f", {before:.4g} before" if before else ""))
    for name, what in (("eval_reward", "evaluation reward"), ("reward_at_end", "reward")):
        if facts.get(name) is not None:
            before = facts.get(f"{name}_before", facts.get("reward_at_start"))
            parts.append(f"{what} {facts[name]:.4g}" + ("" if before is None else f", {before:.4g} before"))
    return ", ".join(parts)


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
    if isinstance(config, PolicyConfig):
        prompts = batch.rows / config.num_generations / config.num_iterations
        whole = len(train) * config.num_generations // config.generation_batch_size * config.generation_batch_size
        steps = whole * config.num_iterations / batch.rows * config.num_train_epochs
        return (
            f"{batch}, {config.num_generations} answers to each of {prompts:g} prompts a step, about "
            f"{config.max_steps if config.max_steps > 0 else math.ceil(steps)} steps over {len(train)} prompts, "
            f"learning rate {config.learning_rate:g}"
        )
    length = len(train)
    of_epoch = length // batch.rows if config.dataloader_drop_last else math.ceil(length / batch.rows)
    steps = config.max_steps if config.max_steps > 0 else math.ceil(of_epoch * config.num_train_epochs)
    num_trained = trained_tokens.num_trained_tokens(train, config.max_length)
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
