"""The checks of a run's options, before anything expensive happens, and the defaults that depend on other options."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import fields

from lota.blocks import GRADIENT_REDUCTIONS
from lota.kernels import using
from lota.messages import did_you_mean
from lota.ranks.world import world_size
from lota.run import ds_config
from lota.run.batch import settle
from lota.run.options import (
    DEFAULT_CALIBRATION_STEPS,
    METHODS,
    SCORES,
    STATIC_SCORES,
    Config,
    LotaArguments,
    keys_of_config,
    names_on_command_line,
)
from lota.selection import validate_budget, validate_density
from lota.ticket import Mask
from lota.zero.compact.skipped_steps import check_max_skipped_steps
from lota.zero.training import check_rounding_seed


def validate(
    args: LotaArguments, config: Config, *, mask_only: bool = False, argv: list[str] | None = None
) -> list[str]:
    """Refuse what cannot work and fill in the defaults of `args`, in place. Every rank, before any collective.

    Returns notes for the user: options of the config file that this method does not use. The same on the command
    line is an error, so that one file serves `--method lota`, `--method full` and `--mask PATH`.
    """
    argv = sys.argv[1:] if argv is None else argv
    unused = _Unused(args, argv)
    if not args.model_name_or_path:
        raise ValueError("model_name_or_path is missing: give a folder or a name on the hub")
    if config.save_only_model and config.save_strategy != "no":
        raise ValueError(
            "save_only_model would leave checkpoints that hold neither the ticket nor anything to resume from: remove "
            "it; the ticket is written at the end, and the whole model with merged: true"
        )
    if config.push_to_hub:
        raise ValueError(
            "push_to_hub would upload the Trainer's folders and not the ticket: remove it, and upload RUN/ticket "
            "when the run is done"
        )
    if config.enable_jit_checkpoint:
        raise ValueError(
            "enable_jit_checkpoint is the Trainer's way to save on SIGTERM: remove it; here SIGTERM and SIGUSR1 save a "
            "checkpoint always (docs/cluster.md)"
        )
    if config.save_on_each_node:
        raise ValueError(
            "save_on_each_node would let every node write the same checkpoint in output_dir, which all of them share: "
            "remove it"
        )
    if config.auto_find_batch_size:
        raise ValueError(
            "auto_find_batch_size would change the rows of a step while the run goes on: remove it, and give "
            "per_device_train_batch_size"
        )
    idle = unused.on_command_line & {"save_steps", "save_total_limit"} if config.save_strategy == "no" else set()
    if idle:
        raise ValueError(
            f"save_strategy is 'no', so {', '.join(sorted(idle))} would be ignored: add --save_strategy steps"
        )
    if args.global_batch_size is not None:
        in_file = set(keys_of_config(argv))
        if "global_batch_size" in unused.on_command_line and "gradient_accumulation_steps" in in_file:
            note = "global_batch_size is given; not used from the config file: gradient_accumulation_steps"
            unused.notes.append(note)
            in_file = set()
        settle(config, args.global_batch_size, world_size(), unused.on_command_line | in_file)
    _choice("method", args.method, METHODS)
    ds_config.check(config, is_sparse=args.method == "lota" and not mask_only)
    if args.ticket_dtype not in (None, "float32"):
        raise ValueError(f"ticket_dtype must be float32 or left out (the weights' own), got {args.ticket_dtype!r}")
    check_max_skipped_steps(args.max_skipped_steps)
    _choice("gradient_reduction", args.gradient_reduction, GRADIENT_REDUCTIONS)
    with using(args.kernels, config.device):
        pass  # refused now, not after calibration
    if args.method != "lora":
        unused.drop(f"method: {args.method} has no adapter", _LORA)
    if args.method in ("full", "lora"):
        if mask_only:
            raise ValueError(f"method: {args.method} has no mask to calibrate; use method: lota")
        what = "every weight" if args.method == "full" else "an adapter"
        ours = (*_CALIBRATION, "mask", "dense", *_SPARSE, "max_skipped_steps")
        unused.drop(f"method: {args.method} trains {what}", ours)
        if args.method == "lora":
            _fill_lora(args)
    elif args.mask is not None:
        if mask_only:
            raise ValueError("mask is given, so there is nothing to calibrate; remove it")
        unused.drop("mask skips calibration", _CALIBRATION)
        Mask.load(args.mask)
    else:
        _fill_calibration(args, config, unused)
    if mask_only:
        unused.drop("the run ends with the mask", (*_SPARSE, "merged"))
    _check_rounding(args.rounding_seed, config)
    for path in args.protect or ():
        Mask.load(path)
    return unused.notes


_CALIBRATION = (
    "density", "budget", "score", "calibration_steps", "calibration_learning_rate", "protect", "include", "exclude",
)  # fmt: skip


_SPARSE = ("shard_group_size", "gradient_reduction", "kernels", "rounding_seed", "ticket_dtype")


_LORA = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_rslora")


def _fill_lora(args: LotaArguments) -> None:
    """TRL's defaults, on every linear layer: LoTA may choose from all of them, too."""
    if importlib.util.find_spec("peft") is None:
        raise ValueError("method: lora needs PEFT, which is not installed: pip install 'peft>=0.19'")
    args.lora_r = 16 if args.lora_r is None else args.lora_r
    args.lora_alpha = 32 if args.lora_alpha is None else args.lora_alpha
    args.lora_dropout = 0.05 if args.lora_dropout is None else args.lora_dropout
    args.lora_target_modules = args.lora_target_modules or ["all-linear"]
    args.use_rslora = bool(args.use_rslora)
    for name in ("lora_r", "lora_alpha"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(args, name)}")
    if not 0 <= args.lora_dropout < 1:
        raise ValueError(f"lora_dropout must be in [0, 1), got {args.lora_dropout}")


def _fill_calibration(args: LotaArguments, config: Config, unused: _Unused) -> None:
    args.density = 0.1 if args.density is None else args.density
    args.budget = args.budget or "global"
    args.score = args.score or "task_vector"
    validate_density(args.density)
    _choice("score", args.score, SCORES)
    validate_budget(args.budget)
    if args.score in STATIC_SCORES:
        unused.drop(f"score: {args.score} looks at the weights only", ("calibration_steps",))
        args.calibration_steps = 1
    elif args.calibration_steps is None:
        args.calibration_steps = DEFAULT_CALIBRATION_STEPS
    if args.calibration_steps < 1:
        raise ValueError(f"calibration_steps must be at least 1, got {args.calibration_steps}")
    if args.score != "task_vector":
        unused.drop(f"score: {args.score} takes no optimizer step", ("calibration_learning_rate",))
    elif args.calibration_learning_rate is None:
        args.calibration_learning_rate = config.learning_rate / 10
    if args.calibration_learning_rate is not None and not args.calibration_learning_rate > 0:
        raise ValueError(f"calibration_learning_rate must be above 0, got {args.calibration_learning_rate}")


_WITH_ROUNDING = ("adam", "adamw", "adamw_torch", "adamw_torch_fused", "adamw_apex_fused", "rmsprop")


def _check_rounding(seed: int | None, config: Config) -> None:
    """What sparse training would refuse, before calibration."""
    if check_rounding_seed(seed) is None:
        return
    if not config.bf16:
        raise ValueError(
            f"rounding_seed: {seed} rounds bf16 weights stochastically, and this run does not train in "
            "bf16: add --bf16 true, or remove it"
        )
    own = ds_config.content(config).get("optimizer", {}).get("type")
    chosen = str(own or getattr(config.optim, "value", config.optim))
    if chosen.lower() not in _WITH_ROUNDING:
        raise ValueError(
            f"rounding_seed: {seed} rounds stochastically in the kernels of AdamW and RMSprop, and the "
            f"optimizer is {chosen}: use one of those, or remove it"
        )


def _choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        hint = did_you_mean(value, choices)
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}{hint}")


class _Unused:
    """Options that a method does not use: an error from the command line, dropped with a note from the config file."""

    def __init__(self, args: LotaArguments, argv: list[str]) -> None:
        self.args = args
        self.on_command_line = set(names_on_command_line(argv))
        self._defaults = {entry.name: entry.default for entry in fields(args)}
        self.notes: list[str] = []

    def drop(self, reason: str, names: Sequence[str]) -> None:
        given = [name for name in names if getattr(self.args, name) != self._defaults[name]]
        refused = [name for name in given if name in self.on_command_line]
        if refused:
            raise ValueError(
                f"{reason}, so {', '.join(refused)} would be ignored: remove {'it' if len(refused) == 1 else 'them'}"
            )
        for name in given:
            setattr(self.args, name, self._defaults[name])
        if given:
            self.notes.append(f"{reason}; not used from the config file: {', '.join(given)}")
