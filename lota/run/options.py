"""The options of a run as they are given: from a YAML file, the command line, and TRL's own configuration."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from trl import DPOConfig, SFTConfig, TrlParser

from lota.messages import did_you_mean
from lota.run import ds_config
from lota.run.arguments import LotaArguments


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


def require_output_dir(argv: list[str] | None) -> None:
    """ValueError where no folder was named for the run: TRL's default would put every run into the same one."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if "output_dir" not in {*keys_of_config(argv), *names_on_command_line(argv)}:
        raise ValueError("output_dir is missing: name a new folder for this run, such as --output_dir runs/mine")


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
