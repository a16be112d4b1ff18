"""The options of a run as they are given: from a YAML file, the command line, and TRL's own configuration."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from trl import DPOConfig, SFTConfig, TrlParser

from lota import choices
from lota.data.options import SourceArguments
from lota.messages import did_you_mean
from lota.run import ds_config


@dataclass
class LotaArguments(SourceArguments):
    """Data, model, and what is LoTA's own. None means: not given, the default in the help applies."""

    method: str = field(
        default="lota",
        metadata={"help": "lota (calibrate, select, train a ticket), or full (all weights) or lora for comparison."},
    )
    density: float | None = field(
        default=None, metadata={"help": f"Fraction of the eligible weights to train ({choices.DENSITY})."}
    )
    budget: str | None = field(default=None, metadata={"help": "global or per_tensor (global)."})
    score: str | None = field(
        default=None, metadata={"help": f"What ranks the weights: {', '.join(choices.SCORES)} ({choices.SCORE})."}
    )
    calibration_steps: int | None = field(
        default=None,
        metadata={"help": f"Optimizer steps, or global batches for gradients ({choices.CALIBRATION_STEPS})."},
    )
    calibration_learning_rate: float | None = field(
        default=None, metadata={"help": "For score task_vector (a tenth of learning_rate)."}
    )
    mask: str | None = field(default=None, metadata={"help": "A mask or ticket to train on; skips calibration."})
    protect: list[str] | None = field(default=None, metadata={"help": "Tickets whose entries must not be chosen."})
    include: list[str] | None = field(
        default=None,
        metadata={"help": "Patterns of tensors, or rows name[a:b], instead of (`default`) all matrices of the blocks."},
    )
    exclude: list[str] | None = field(default=None, metadata={"help": "Patterns of tensor names to leave out."})
    dense: list[str] | None = field(
        default=None, metadata={"help": "Patterns of tensors, or rows name[a:b], to train and store whole besides."}
    )
    global_batch_size: int | None = field(
        default=None, metadata={"help": "Rows a step over all ranks; gradient_accumulation_steps follows from it."}
    )
    shard_group_size: str | None = field(
        default=None, metadata={"help": "Ranks that share one copy of the weights: a number, node or world (world)."}
    )
    gradient_reduction: str = field(default="auto", metadata={"help": "auto, compact or dense."})
    kernels: str = field(default="auto", metadata={"help": "auto, torch or triton."})
    max_skipped_steps: int = field(
        default=choices.MAX_SKIPPED_STEPS,
        metadata={"help": "So many steps in a row without finite gradients end the run."},
    )
    rounding_seed: int | None = field(
        default=None,
        metadata={"help": "Round fp32 masters into bf16 weights stochastically, by this seed (to nearest)."},
    )
    ticket_dtype: str | None = field(default=None, metadata={"help": "float32 keeps masters (the weights' own dtype)."})
    lora_r: int | None = field(default=None, metadata={"help": "Rank of the adapter (16)."})
    lora_alpha: int | None = field(default=None, metadata={"help": "The adapter is scaled by alpha / r (32)."})
    lora_dropout: float | None = field(default=None, metadata={"help": "Dropout before the adapter (0.05)."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules that get an adapter (all-linear: every linear layer but the head)."}
    )
    use_rslora: bool | None = field(default=None, metadata={"help": "Scale by alpha / sqrt(r) instead (false)."})
    merged: bool = field(default=False, metadata={"help": "Also write the trained model to output_dir/merged."})


@dataclass
class _Defaults:
    """What the recipes set otherwise than TRL: ZeRO-3, and CPU ranks where there is no GPU."""

    deepspeed: dict[str, Any] | str | None = field(
        default=ds_config.DEFAULT,
        metadata={"help": "DeepSpeed JSON file, or zero3, lota's own (zero3, or what accelerate launch brings)."},
    )

    def __post_init__(self) -> None:
        if not torch.accelerator.is_available():
            self.use_cpu = True
        given, self.deepspeed = self.deepspeed, ds_config.choose(self.deepspeed)
        super().__post_init__()  # type: ignore[misc]
        if self.deepspeed is not None:
            self.deepspeed = given  # a packaged file keeps its name, which holds on every machine


@dataclass
class RecipeConfig(_Defaults, SFTConfig):
    """TRL's SFTConfig with the defaults of these recipes."""


@dataclass
class PreferenceConfig(_Defaults, DPOConfig):
    """TRL's DPOConfig with the defaults of these recipes."""


Config = RecipeConfig | PreferenceConfig


def parse(argv: list[str] | None = None, config_class: type[Config] = RecipeConfig) -> tuple[LotaArguments, Config]:
    """Options from `--config FILE` and the command line; a misspelt key is refused with the nearest right one."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = TrlParser((LotaArguments, config_class))
    known = {option.removeprefix("--") for action in parser._actions for option in action.option_strings}
    refuse_unknown([*keys_of_config(argv), *names_on_command_line(argv)], known | {"config", "env", "local_rank"})
    lota_args, config = parser.parse_args_and_config(argv)
    return lota_args, config


def refuse_unknown(names: Sequence[str], known: set[str]) -> None:
    """ValueError for the first option that nothing knows, with the nearest that something does."""
    for name in names:
        if name not in known:
            raise ValueError(f"unknown option {name!r}" + did_you_mean(name, known))


def names_on_command_line(argv: Sequence[str]) -> list[str]:
    """The options given as --name value or --name=value."""
    return [word[2:].split("=")[0] for word in argv if word.startswith("--")]


def keys_of_config(argv: list[str]) -> list[str]:
    """The keys of the file given by --config; none without one."""
    if "--config" not in argv:
        return []
    import yaml

    path = Path(argv[argv.index("--config") + 1])
    if not path.is_file():
        raise ValueError(f"--config: no such file: {path}")
    return [str(key) for key in (yaml.safe_load(path.read_text(encoding="utf-8")) or {})]


















