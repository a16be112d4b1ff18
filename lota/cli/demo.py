"""`lota demo`: the whole method on a small base model made on the spot, without a GPU and without a network."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lota.cli.parsers import add_command


def add_parser(commands: Any) -> None:
    parser = add_command(
        commands,
        "demo",
        run,
        summary="make a small base, fine-tune it whole and as a ticket, compare",
        text="""
Make a small base model (kept in ~/.cache/lota), fine-tune it whole and as a ticket on two ranks, and print what each
learned, forgot, held in memory and sent. It needs no GPU and no network, and about 5 minutes on two free cores.""",
        examples="lota demo --output_dir runs/demo",
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("runs") / "demo",
        help="folder to write; an earlier demo there is removed first (runs/demo)",
    )


def run(args: argparse.Namespace) -> None:
    from lota.demo.run import demo

    demo(args.output_dir)
