"""The command line: `lota COMMAND ...`, also `python -m lota`.

A command is a module of this package with `add_parser(commands)`, which declares its options, and `run(args)`, which
does the work. Only `run` imports torch and the rooms, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lota.cli import apply, export, inspect, plan, revert

COMMANDS = (inspect, apply, revert, export, plan)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Exit code 0, or 2 with one line on stderr for what the user gave or the disk refused."""
    parser = argparse.ArgumentParser(
        prog="lota",
        description="Look at tickets, put them on models and take them off, and hand them to other tools.",
        epilog="lota COMMAND --help explains a command and gives examples. Training: recipes/train_lota.py.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(commands)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except BrokenPipeError:  # `lota inspect ... | head` closed it: nothing is wrong
        sys.stderr.close()
    except (ValueError, OSError) as error:
        print(f"lota: {_one_line(error)}", file=sys.stderr)
        return 2
    return 0


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
