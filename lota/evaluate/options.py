"""The options of recipes/evaluate.py, and what is refused before anything is loaded."""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path

import torch

from lota.data.tokenizer import chat_template
from lota.evaluate.arguments import EvaluateArguments
from lota.evaluate.generate import Decoding
from lota.evaluate.lm_eval_tasks import TaskSettings
from lota.evaluate.metrics import TEXT_METRICS, check_metrics
from lota.evaluate.rows import has_rows
from lota.ranks.world import world_size
from lota.run.options import (
    LotaArguments,
    RecipeConfig,
    YamlParser,
    keys_of_config,
    names_on_command_line,
    refuse_unknown,
)

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def parse(argv: list[str] | None = None) -> EvaluateArguments:
    """Options from the command line and `--config FILE`, which may be a training recipe's: its data options count, its
    training options do not. ValueError for a key that neither knows, and for what cannot be scored."""
    # The deepspeed launcher adds its own --local_rank.
    argv = [a for a in (sys.argv[1:] if argv is None else argv) if not a.startswith("--local_rank")]
    parser = YamlParser((EvaluateArguments,))
    known = {option.removeprefix("--") for action in parser._actions for option in action.option_strings}
    on_command_line = names_on_command_line(argv)
    refuse_unknown(on_command_line, known | {"config"})
    training = {entry.name for kind in (LotaArguments, RecipeConfig) for entry in fields(kind)}
    refuse_unknown(keys_of_config(argv), known | training | {"env"})
    args, _ = parser.parse_args_and_config(argv, return_remaining_strings=True)
    is_set_aside = args.eval_file is None and (args.eval_rows is not None or args.eval_fraction is not None)
    ignored = [name for name in ("train_file", "train_split") if name in on_command_line and not is_set_aside]
    if ignored:
        raise ValueError(f"{', '.join(ignored)} would be ignored: evaluation reads eval_file, or eval_split on the hub")
    args.tasks = [name for text in args.tasks for name in text.split(",") if name]
    args.metrics = [name for text in args.metrics for name in text.split(",") if name]
    _validate(args)
    return args


def _validate(args: EvaluateArguments) -> None:
    if not args.model_name_or_path:
        raise ValueError("model_name_or_path is missing: give a folder or a name on the hub")
    check_metrics(args.metrics)
    rows = has_rows(args)
    if args.metrics and not rows:
        raise ValueError("metrics need rows: give eval_file, or dataset_name with eval_split")
    if not rows and not args.tasks:
        raise ValueError("nothing to score on: give eval_file, or dataset_name with eval_split, or tasks of lm-eval")
    if rows and not args.metrics:
        args.metrics = ["loss"]
    if args.dtype not in ("auto", *DTYPES):
        raise ValueError(f"dtype must be auto, {', '.join(DTYPES)}, got {args.dtype!r}")
    for name in ("batch_size", "limit"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    args.chat_template_path = template = chat_template(args.chat_template_path)
    if template is not None and not (template.endswith((".jinja", ".j2")) and Path(template).is_file()):
        raise ValueError(f"chat_template_path must be a .jinja file that is there, got {template}")
    if args.no_base and not args.tickets:
        raise ValueError("no_base without tickets leaves nothing to score")
    if args.together and len(args.tickets or ()) < 2:
        raise ValueError(f"together needs two tickets or more, got {len(args.tickets or ())}")
    if args.predictions is not None and not set(args.metrics) & set(TEXT_METRICS):
        raise ValueError(f"predictions would be empty: only {', '.join(TEXT_METRICS)} make the model write answers")
    decoding(args).check()
    if args.tasks and world_size() > 1:
        raise ValueError("tasks of lm-eval run in one process: start python without a launcher, or leave tasks out")


def decoding(args: EvaluateArguments) -> Decoding:
    """How the model writes answers."""
    return Decoding(args.max_new_tokens, args.temperature, args.seed, tuple(args.stop or ()))


def task_settings(args: EvaluateArguments) -> TaskSettings:
    """How lm-eval runs its tasks."""
    return TaskSettings(args.num_fewshot, args.limit, args.apply_chat_template, args.tasks_path, args.seed)
