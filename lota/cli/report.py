"""`lota report`: the picture of a run, drawn again."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from lota.cli.parsers import add_command


def add_parser(commands: Any) -> None:
    parser = add_command(
        commands,
        "report",
        run,
        summary="draw the picture of a run again",
        text="""
Draw RUN/report.png from the run's metrics and ticket: losses, learning rate, gradient norm, and where in the model the
trained weights are. Works on an unfinished run too.""",
        examples="lota report runs/gsm8k",
    )
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="output_dir of a run")


def run(args: argparse.Namespace) -> None:
    from lota.run.report import draw_report

    if not args.run_folder.is_dir():
        raise ValueError(f"{args.run_folder}: expected the output_dir of a run, got no folder")
    path = args.run_folder / "summary.json"
    summary = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    print(draw_report(args.run_folder, summary))
