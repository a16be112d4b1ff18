"""`lota matrix`: what every task of a sequence scored after every stage, and sequences side by side."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from lota.cli.parsers import add_command


def add_parser(commands: Any) -> None:
    parser = add_command(
        commands,
        "matrix",
        run,
        summary="what each task scored after each stage of a sequence, or of several",
        text="""
Prints the matrix task x stage of every sequence (in brackets where a task is not in the model), and what it comes to:
average, forgetting, backward and forward transfer, as docs/sequences.md defines them. Of several sequences, such as the
same tasks by --method lota, full and lora, --plot draws all in one picture, of one scale.""",
        examples="""
lota matrix runs/five
lota matrix runs/five runs/five_full runs/five_lora --plot methods.png
lota matrix runs/five --json""",
    )
    parser.add_argument("folders", type=Path, nargs="+", metavar="SEQUENCE", help="folders of sequences")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a picture (.png, .pdf, .svg)")


def run(args: argparse.Namespace) -> None:
    from lota.sequence.matrix import METRICS, Matrix, figure_lines, table
    from lota.sequence.state import read_state

    found = [(str(folder), Matrix.of(read_state(folder))) for folder in args.folders]
    for folder, matrix in found:
        if not any(stage.scores for stage in matrix.stages):
            raise ValueError(f"{folder} has scored nothing yet")
    if args.plot is not None:
        from lota.sequence.picture import draw_matrices

        draw_matrices(found, args.plot)
    if args.json:
        print(json.dumps({folder: _content(matrix) for folder, matrix in found}, indent=2))
        return
    for metric in METRICS:
        for folder, matrix in found:
            print("\n".join([f"{folder}: {table(matrix, metric)[0]}", *table(matrix, metric)[1:], ""]))
        print("\n".join([*figure_lines(found, metric), ""]))


def _content(matrix: Any) -> dict[str, Any]:
    from lota.sequence.matrix import METRICS

    stages = [{"after": stage.after, "tasks": stage.tasks, "scores": stage.scores} for stage in matrix.stages]
    return {"stages": stages, "figures": {metric: matrix.figures(metric) for metric in METRICS}}
