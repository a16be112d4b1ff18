"""`lota run`: any program that trains with DeepSpeed ZeRO-3 becomes a calibration or a sparse training, unedited."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

from lota import choices
from lota.cli.jobs import CHOICES, help_of
from lota.cli.parsers import add_command, complete
from lota.run.arguments import LotaArguments

_DECLARED = {entry.name: entry for entry in fields(LotaArguments)}
_AFTER = """
COMMAND is what you start today, after `--`: deepspeed, torchrun, accelerate, srun, llamafactory-cli, python. Every rank
opens a lota block at its first DeepSpeed call and finishes it at its end. `{{phase}}` in COMMAND becomes calibration or
training, and LOTA_PHASE in its environment is the same word. {what} appears when COMMAND has ended with 0 and
all ranks have finished, and not otherwise. docs/programs.md has the commands of programs, and what to expect."""

_APART = """

The two runs must not write into one folder. That is refused where it can be seen: before the first run where both
commands name the same output_dir, and before the second where the first left checkpoints in its Trainer's folder."""


def add_parser(commands: Any) -> None:
    parser = add_command(
        commands,
        "run",
        run,
        summary="make another program's DeepSpeed training a ticket, unedited",
        text="""
Start a program that trains with DeepSpeed ZeRO-3 (a script on TRL or transformers, a loop of your own, LLaMA-Factory,
axolotl) so that its training is a calibration, or the training of a ticket. The program is not edited.

Exit status: that of COMMAND where it failed, 3 where it built no DeepSpeed engine that trains, 1 where a rank did not
finish, 2 where the options are wrong.""",
        examples="""
lota run both --out runs/mine -- deepspeed --num_gpus 8 train.py --deepspeed zero3.json --output_dir out/{phase}
lota run calibrate --mask runs/mask --score gradient -- llamafactory-cli train sft.yaml max_steps=100
lota run train --mask runs/mask --ticket runs/ticket -- llamafactory-cli train sft.yaml
lota run both --out runs/mine --calibration_words '--max_steps 200 --learning_rate 1e-6' -- torchrun ... train.py""",
    )
    phases = parser.add_subparsers(metavar="PHASE", required=True)
    _add_calibrate(phases)
    _add_train(phases)
    _add_both(phases)


def _add_calibrate(phases: Any) -> None:
    parser = add_command(
        phases,
        "calibrate",
        _calibrate,
        summary="run COMMAND as a calibration, which ends with a mask",
        text="Run COMMAND as a calibration." + _AFTER.format(what="The mask"),
        examples="""
lota run calibrate --mask runs/mask -- deepspeed --num_gpus 8 train.py --deepspeed zero3.json --max_steps 200
lota run calibrate --mask runs/mask --score gradient --density 0.01 -- llamafactory-cli train sft.yaml""",
    )
    parser.add_argument("--mask", type=Path, required=True, metavar="OUT", help="the mask to write; must not exist")
    _add_calibration_options(parser)
    _add_common(parser)


def _add_train(phases: Any) -> None:
    parser = add_command(
        phases,
        "train",
        _train,
        summary="run COMMAND on the entries of a mask, which ends with a ticket",
        text="Run COMMAND on the active entries of a mask." + _AFTER.format(what="The ticket"),
        examples="""
lota run train --mask runs/mask --ticket runs/ticket -- deepspeed --num_gpus 8 train.py --deepspeed zero3.json
lota run train --mask runs/mask --ticket runs/ticket --shard_group_size 8 -- srun torchrun ... train.py""",
    )
    parser.add_argument("--mask", required=True, metavar="MASK", help="a mask or ticket, or its name on the hub")
    parser.add_argument("--ticket", type=Path, required=True, metavar="OUT", help="the ticket to write; must not exist")
    _add_training_options(parser)
    _add_common(parser)


def _add_both(phases: Any) -> None:
    parser = add_command(
        phases,
        "both",
        _both,
        summary="run COMMAND twice: calibration, then training",
        text="Run COMMAND twice: as a calibration, then on the mask that it made." + _AFTER.format(what="An outcome")
        + _APART,
        examples="""
lota run both --out runs/mine -- deepspeed --num_gpus 8 train.py --deepspeed zero3.json --output_dir out/{phase}
lota run both --out runs/mine -- llamafactory-cli train sft.yaml output_dir=saves/{phase}""",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of mask/ and ticket/")
    parser.add_argument(
        "--calibration_words", metavar="WORDS", default="",
        help="words to add to COMMAND in calibration: fewer steps, another learning rate",
    )  # fmt: skip
    _add_calibration_options(parser)
    _add_training_options(parser)
    _add_common(parser)


def _add_calibration_options(parser: argparse.ArgumentParser) -> None:
    _add(parser, "score", default=choices.SCORE)
    _add(parser, "density", type=float, default=choices.DENSITY)
    _add(parser, "budget", default=choices.BUDGET)
    for name in ("include", "exclude", "protect"):
        _add(parser, name, nargs="+")
    parser.add_argument("--seed", type=int, default=0, help="for score random and for ties (0)")


def _add_training_options(parser: argparse.ArgumentParser) -> None:
    _add(parser, "shard_group_size")
    _add(parser, "gradient_reduction", default="auto")
    option = parser.add_argument(
        "--reduce_every", metavar="VALUE", default=choices.REDUCE_EVERY[0],
        help="micro_step, or step, which sends less often and holds more (micro_step)",
    )  # fmt: skip
    complete(option, choices.REDUCE_EVERY)
    _add(parser, "kernels", default="auto")
    _add(parser, "rounding_seed", type=int)
    parser.add_argument("--retain", nargs="+", metavar="TICKET", help="earlier tasks to be pulled to")
    _add(parser, "pull", type=float)
    _add(parser, "ticket_dtype")
    _add(parser, "ticket_form", default=choices.TICKET_FORMS[0])
    parser.add_argument(
        "--num_steps", type=int, metavar="N",
        help="how many steps COMMAND makes: for the rates of --pull, and a run that makes another number has failed",
    )  # fmt: skip


def _add_common(parser: argparse.ArgumentParser) -> None:
    _add(parser, "dense", nargs="+")
    _add(parser, "max_skipped_steps", type=int, default=choices.MAX_SKIPPED_STEPS)
    parser.add_argument("command", nargs="+", metavar="COMMAND", help="the program's own command, after `--`")
    parser.usage = f"{parser.prog} [options] -- COMMAND..."


def _add(parser: argparse.ArgumentParser, name: str, **settings: Any) -> None:
    """An option that `lota train` has too."""
    option = parser.add_argument(
        f"--{name}", metavar="VALUE", help=help_of(_DECLARED[name]).replace("%", "%%"), **settings
    )
    if name in CHOICES:
        complete(option, CHOICES[name])


def run(args: argparse.Namespace) -> int:
    raise AssertionError("a phase has a function of its own")


def _calibrate(args: argparse.Namespace) -> int:
    from lota.wrap import checks
    from lota.wrap.launch import launch
    from lota.wrap.order import CALIBRATION

    status, _ = launch(args.command, CALIBRATION, args.mask, options=checks.calibration_options(vars(args)))
    return status


def _train(args: argparse.Namespace) -> int:
    from lota.wrap import checks
    from lota.wrap.launch import launch
    from lota.wrap.order import TRAINING

    options, save = checks.training_options(vars(args), args.mask)
    num_steps = checks.check_num_steps(args.num_steps)
    status, _ = launch(args.command, TRAINING, args.ticket, options=options, save=save, num_steps=num_steps)
    return status


def _both(args: argparse.Namespace) -> int:
    from lota.wrap import checks
    from lota.wrap.both import both

    options, save = checks.training_options(vars(args), None)
    return both(
        args.command,
        args.out,
        calibration=checks.calibration_options(vars(args)),
        training=options | {"dense": None},  # the mask has them
        save=save,
        num_steps=checks.check_num_steps(args.num_steps),
        calibration_words=shlex.split(args.calibration_words),
    )
