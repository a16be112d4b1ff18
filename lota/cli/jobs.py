"""`lota train`, `dpo`, `grpo`, `calibrate`, `sequence`, `evaluate`: the jobs, on this process or as a launcher's ranks.

Their options are read by the job itself, from the command line and from `--config FILE`, because TRL's belong to them;
the parsers here only explain and complete them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from typing import Any

from lota import choices
from lota.cli.parsers import add_command, complete

_BOOLEANS = ("true", "false")
CHOICES = {
    "method": choices.METHODS,
    "score": choices.SCORES,
    "budget": choices.BUDGETS,
    "gradient_reduction": choices.GRADIENT_REDUCTIONS,
    "kernels": choices.KERNELS,
    "shard_group_size": ("node", "world"),
    "ticket_dtype": ("float32",),
    "fisher": choices.FISHERS,
    "reference": choices.REFERENCES,
    "ticket_form": choices.TICKET_FORMS,
    "metrics": ("loss", "exact", "number", "rouge"),
}
"""What a shell offers as the value of an option; the job itself checks it."""
_LAUNCH = """
On one GPU or CPU run it as it is. On several, start it as a launcher starts a module:

  deepspeed --module lota {name} --config FILE                     all GPUs of this machine
  torchrun --nproc-per-node 8 -m lota {name} --config FILE
  deepspeed --hostfile hosts --module lota {name} --config FILE --shard_group_size node     several machines"""


def add_parsers(commands: Any) -> dict[str, Callable[[list[str]], None]]:
    """Declares the jobs; by name, what runs each with the words after its name."""
    from lota.run.arguments import LotaArguments

    training = "Options go into the YAML file or onto the command line, which wins: these, and all of TRL's {trl}."
    declared = (
        ("train", _train, LotaArguments, "fine-tune a model as a ticket", training.format(trl="SFTConfig")),
        ("dpo", _dpo, LotaArguments, "the same on preferences (DPO)", training.format(trl="DPOConfig")),
        ("grpo", _grpo, LotaArguments, "the same on a reward (GRPO)", training.format(trl="GRPOConfig")),
        ("calibrate", _calibrate, LotaArguments, "calibrate, and stop at the mask", training.format(trl="SFTConfig")),
    )
    for name, _, arguments, summary, text in declared:
        parser = add_command(
            commands,
            name,
            _unreachable,
            summary=summary,
            text=f"{summary[0].upper()}{summary[1:]}. {text}\n{_LAUNCH.format(name=name)}",
            examples=f"lota config llama31_8b_gsm8k > run.yaml\nlota {name} --config run.yaml --output_dir out",
        )
        parser.add_argument("--config", metavar="FILE", help="YAML file with options")
        parser.add_argument("--output_dir", help="folder of the run")
        add_fields(parser, arguments)
    evaluate = add_command(
        commands,
        "evaluate",
        _unreachable,
        summary="score a base and tickets on it",
        text="""
Score a base model and tickets on it, on local rows and on lm-eval's tasks. The model is loaded once. Takes the data
options of a training run, also from its --config file. docs/evaluation.md defines the metrics.""",
        examples="""
lota evaluate --config run.yaml --tickets runs/mine/ticket --metrics loss exact --output results.json""",
    )
    from lota.evaluate.arguments import EvaluateArguments

    evaluate.add_argument("--config", metavar="FILE", help="YAML file with options, which may be a training run's")
    add_fields(evaluate, EvaluateArguments)
    _add_sequence(commands)
    own = {"calibrate": _calibrate, "sequence": _sequence, "evaluate": _evaluate}
    return {"train": _train, "dpo": _dpo, "grpo": _grpo, **own}


def _add_sequence(commands: Any) -> None:
    from lota.sequence.arguments import SequenceArguments

    sequence = add_command(
        commands,
        "sequence",
        _unreachable,
        summary="train tasks one after another into one model, and keep the books",
        text=f"""
Train any number of tasks one after another, each on the base with the tickets of the tasks before it, on entries that
none of them has (or, with disjoint: false, on any). CONFIG lists the tasks; other options are those of `lota train`,
for every task unless it has its own. After every task all tasks are scored: which forgot what is in matrix.csv and
matrix.png, who owns how much of the weights in ledger.json and ledger.png (docs/sequences.md).

The same command again continues where it stopped, and trains tasks that were added at the end. --method full and
--method lora train the same tasks in sequence for comparison. --remove takes a task out again, bit for bit.
{_LAUNCH.format(name="sequence")}""",
        examples="""
lota config sequence_small --out tasks.yaml
lota sequence tasks.yaml --output_dir runs/five
lota sequence tasks.yaml --output_dir runs/five_full --method full --learning_rate 1e-5
lota sequence runs/five --remove sql
lota ledger runs/five
lota matrix runs/five runs/five_full --plot both.png""",
    )
    sequence.add_argument("config", metavar="CONFIG", nargs="?", help="YAML file, or the folder of a sequence")
    sequence.add_argument("--config", dest="config", metavar="CONFIG", help="the same")
    sequence.add_argument("--output_dir", help="folder of the sequence")
    sequence.add_argument("--remove", metavar="NAME", help="take a task out of the sequence in CONFIG's folder")
    add_fields(sequence, SequenceArguments)


def add_fields(parser: argparse.ArgumentParser, arguments: type[Any]) -> None:
    """An option for every field of a dataclass of options, with its help text."""
    for entry in fields(arguments):
        option = parser.add_argument(f"--{entry.name}", metavar="VALUE", help=help_of(entry).replace("%", "%%"))
        values = CHOICES.get(entry.name) or (_BOOLEANS if str(entry.type).startswith("bool") else ())
        if values:
            complete(option, values)


def help_of(entry: Any) -> str:
    """The help text of a field of a dataclass of options, with its default if the text does not have it."""
    text = str(entry.metadata.get("help", ""))
    has_it = entry.default in (None, MISSING) or text.rstrip(".").endswith(")")
    return text if has_it else f"{text.rstrip('.')} ({entry.default})."


def _unreachable(args: argparse.Namespace) -> None:
    raise AssertionError("a job reads its own command line")


def _run(name: str, argv: list[str], job: Callable[[list[str]], None], advice: str) -> None:
    from lota.ranks.process import run_job

    sys.argv = [f"lota {name}", *argv]
    run_job(lambda: job(argv), advice=advice)


def _train(argv: list[str]) -> None:
    from lota.ranks.process import RESUME
    from lota.train.job import main

    _run("train", argv, main, RESUME)


def _dpo(argv: list[str]) -> None:
    from lota.ranks.process import RESUME
    from lota.train.job import main_dpo

    _run("dpo", argv, main_dpo, RESUME)


def _grpo(argv: list[str]) -> None:
    from lota.ranks.process import RESUME
    from lota.train.job import main_grpo

    _run("grpo", argv, main_grpo, RESUME)


def _calibrate(argv: list[str]) -> None:
    from lota.ranks.process import RESUME
    from lota.train.job import main_mask

    _run("calibrate", argv, main_mask, RESUME)


def _sequence(argv: list[str]) -> None:
    from lota.sequence.run import ADVICE, main

    _run("sequence", argv, main, ADVICE)


def _evaluate(argv: list[str]) -> None:
    from lota.evaluate.run import main

    _run("evaluate", argv, main, "")


def job_of(argv: Sequence[str], jobs: dict[str, Any]) -> tuple[str, list[str]] | None:
    """The job that a command line names, and its own words; None for other commands, and where help is asked for.

    DeepSpeed's launcher puts its --local_rank in front of all.
    """
    words = [word for word in argv if not word.startswith("--local_rank")]
    if not words or words[0] not in jobs or {"-h", "--help"} & set(words[1:]):
        return None
    return words[0], words[1:]
