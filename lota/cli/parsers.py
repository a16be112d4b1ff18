"""How a command's parser is declared: a help text that explains, and examples that can be copied."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from typing import Any

_IS_QUIET: ContextVar[bool] = ContextVar("is_quiet", default=False)


def say(text: str) -> None:
    """Progress, on stderr, unless --quiet was given."""
    if not _IS_QUIET.get():
        print(text, file=sys.stderr, flush=True)


@contextmanager
def quietly() -> Iterator[None]:
    """For the length of a command nothing is printed but errors."""
    token = _IS_QUIET.set(True)
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            yield
    finally:
        _IS_QUIET.reset(token)


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int | None], *, summary: str, text: str, examples: str
) -> argparse.ArgumentParser:
    """A parser for `lota name`. run: may return an exit status of its own. summary: its line in `lota --help`; text,
    examples: shown by `lota name --help`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=text.strip(),
        epilog="examples:\n" + "\n".join(f"  {line}" for line in examples.strip().splitlines()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quiet", action="store_true", help="print errors only; the exit status reports the rest")
    parser.set_defaults(run=run)
    return parser


def complete(option: argparse.Action, values: Iterable[str]) -> None:
    """A shell offers these values after `option`; any others are still taken. argcomplete reads the attribute."""
    offered = list(values)
    option.completer = lambda **_: offered  # type: ignore[attr-defined]
