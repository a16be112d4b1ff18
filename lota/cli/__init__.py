"""The command line: `lota COMMAND ...`, also `python -m lota`.

A command is a module of this package with `add_parser(commands)`, which declares its options, and `run(args)`, which
does the work; the jobs are in `jobs`. Only what runs imports torch and the rooms, so that `--help` answers at once.
"""
# PYTHON_ARGCOMPLETE_OK

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from lota.cli import (
    apply,
    change,
    config,
    demo,
    diff,
    export,
    extract,
    inspect,
    jobs,
    ledger,
    mask,
    matrix,
    merge,
    overlap,
    plan,
    push,
    report,
    revert,
    serve,
    study,
    verify,
)
from lota.cli.needs import missing
from lota.cli.parsers import quietly
from lota.messages import printable

COMMANDS = (
    *(plan, config, inspect, apply, revert, verify, export),
    *(diff, extract, merge, overlap, change, mask),
    *(ledger, matrix),
    *(push, serve, report, demo, study),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Exit code 0 (diff, verify: 1 where something differs), or 2 with one line on stderr for what the
    user gave or the disk refused."""
    argv = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal of ASCII shows escapes
    parser = argparse.ArgumentParser(
        prog="lota",
        description="Sparse fine-tuning by lottery tickets: train them, inspect them, apply them to models and remove "
        "them, merge them, and export them for other tools.",
        epilog="lota COMMAND --help explains a command and gives examples. Completion in bash and zsh: "
        'eval "$(register-python-argcomplete lota)" (pip install argcomplete).',
    )
    parser.add_argument("--version", action="version", version=f"lota {_version()}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    known = jobs.add_parsers(commands)
    for command in COMMANDS:
        command.add_parser(commands)
    _offer_completion(parser)
    try:
        job = jobs.job_of(argv, known)
        if job is not None:
            name, words = job
            known[name](words)
            return 0
        args = parser.parse_args(argv)
        with quietly() if args.quiet else contextlib.nullcontext():
            return args.run(args) or 0
    except BrokenPipeError:  # `lota inspect ... | head` closed it: nothing is wrong
        sys.stderr.close()
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "lota":
            raise
        print(f"lota: {missing(error, argv)}", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"lota: {_one_line(error)}", file=sys.stderr)
        return 2
    return 0


def _version() -> str:
    try:
        return version("lota")
    except PackageNotFoundError:
        return "(a checkout that is not installed)"


def _offer_completion(parser: argparse.ArgumentParser) -> None:
    try:
        import argcomplete
    except ModuleNotFoundError:
        return
    argcomplete.autocomplete(parser)


def _one_line(error: Exception) -> str:
    return printable(" ".join(str(error).split()))
