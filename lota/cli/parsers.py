"""How a command's parser is declared: a help text that explains, and examples that can be copied."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any


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
    parser.set_defaults(run=run)
    return parser
