"""The options of a run as they are given: from a YAML file, the command line, and TRL's own configuration."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, get_args, get_type_hints

import torch
from trl import DPOConfig, GRPOConfig, SFTConfig, TrlParser

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

    task: ClassVar[str] = "examples"


@dataclass
class PreferenceConfig(_Defaults, DPOConfig):
    """TRL's DPOConfig with the defaults of these recipes."""

    task: ClassVar[str] = "preferences"


@dataclass
class PolicyConfig(_Defaults, GRPOConfig):
    """TRL's GRPOConfig with the defaults of these recipes."""

    task: ClassVar[str] = "prompts"
    chat_template_path: str | None = field(
        default=None, metadata={"help": "A .jinja file, or plain_chat, for a tokenizer without a chat template."}
    )

    def __post_init__(self) -> None:
        # TRL fills in both of these and refuses both, as config.yaml and `replace` would give them: one follows from
        # the other, and `resolve` refuses it where the user gives it.
        if self.steps_per_generation is not None:
            self.generation_batch_size = None
        super().__post_init__()


Config = RecipeConfig | PreferenceConfig | PolicyConfig
"""`task`: what it learns from, of `lota.data.options.TASKS`."""


class YamlParser(TrlParser):
    """TRL's parser, for which YAML's own reading of words is no trap: `no` is false to YAML, and 007 is 7."""

    def set_defaults_with_config(self, **options: Any) -> list[str]:
        kinds = {name: kind for each in self.dataclass_types for name, kind in get_type_hints(each).items()}
        read = {name: _as_text(name, value, kinds[name]) if name in kinds else value for name, value in options.items()}
        unread: list[str] = super().set_defaults_with_config(**read)
        return unread


_NUMBERS_TOO = ("shard_group_size", "deepspeed")


def _as_text(name: str, value: Any, kind: Any) -> Any:
    """A value of the file for an option of that type; ValueError where YAML read text as something else."""
    of_items = any(str(part).startswith("list[str]") for part in (kind, *get_args(kind)))
    if isinstance(value, list) and of_items:
        for item in value:
            if not isinstance(item, str):
                raise ValueError(f"{name}: expected text, got {item!r}, which YAML reads so: put it in quotes")
    kinds = {*get_args(kind), kind}
    takes_text = str in kinds or any(isinstance(part, type) and issubclass(part, Enum) for part in kinds)
    is_odd = isinstance(value, (bool, int, float, date)) and not {bool, int, float} & kinds
    if not takes_text or not is_odd:
        return value
    if value is False:
        return "no"  # the word that options with a choice use for nothing: eval_strategy, save_strategy
    if name in _NUMBERS_TOO and not isinstance(value, bool):
        return str(value)
    raise ValueError(f"{name}: expected text, got {value!r}, which YAML reads so: put it in quotes")


def parse(argv: list[str] | None = None, config_class: type[Config] = RecipeConfig) -> tuple[LotaArguments, Config]:
    """Options from `--config FILE` and the command line; a misspelt key is refused with the nearest right one."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = YamlParser((LotaArguments, config_class))
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

    place = argv.index("--config") + 1
    path = Path(argv[place] if place < len(argv) else "")
    if not path.is_file():
        raise ValueError(f"--config: no such file: {path}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ValueError(f"--config: {path} is not YAML: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"--config: {path} must hold options with their values (a YAML mapping)")
    return list(content)
