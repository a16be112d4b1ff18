"""`lota overlap`: what tickets share, and what would cancel."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lota.cli.parsers import add_command


def add_parser(commands: Any) -> None:
    parser = add_command(
        commands,
        "overlap",
        run,
        summary="print entries that tickets share, signs in conflict, and what would cancel",
        text="""
For every pair of tickets print the entries active in both, those that the two move in opposite directions, and the
part of their differences that cancels when they are added (lota merge). --per-tensor adds tensors, --plot draws.""",
        examples="""
lota overlap runs/math/ticket runs/sql/ticket runs/chat/ticket
lota overlap a b --per-tensor --json
lota overlap a b c --plot overlap.png""",
    )
    parser.add_argument("tickets", type=Path, nargs="+", metavar="TICKET", help="two ticket directories or more")
    parser.add_argument("--per-tensor", action="store_true", help="also print a line for every tensor")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a picture of the pairs (.png, .pdf, .svg)")


def run(args: argparse.Namespace) -> None:
    from lota.algebra import overlap
    from lota.messages import printable
    from lota.ticket import Ticket

    if len(args.tickets) < 2:
        raise ValueError("overlap compares two tickets or more, got one")
    rows = list(overlap([Ticket.load(path) for path in args.tickets], per_tensor=args.per_tensor))
    names = [str(path) for path in args.tickets]
    if args.plot is not None:
        _draw(args.plot, names, [row for row in rows if not row.name])
    if args.json:
        print(json.dumps({"tickets": names, "pairs": [asdict(row) for row in rows]}, indent=2))
        return
    for row in rows:
        what = printable(row.name) if row.name else f"{printable(names[row.a])} and {printable(names[row.b])}"
        share = row.shared / min(row.active_a, row.active_b) if min(row.active_a, row.active_b) else 0.0
        conflicts = row.conflicts / row.shared if row.shared else 0.0
        print(
            f"{'  ' * bool(row.name)}{what}: {row.shared:,} shared ({share:.2%} of the smaller), {row.conflicts:,} in "
            f"conflict ({conflicts:.1%} of them), {row.lost:.2%} of the change cancels"
        )


def _draw(path: Path, names: list[str], rows: list[Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    count = len(names)
    parts = (
        ("entries shared, of the smaller", lambda row: row.shared / max(1, min(row.active_a, row.active_b))),
        ("signs in conflict, of the shared", lambda row: row.conflicts / max(1, row.shared)),
        ("of the change that cancels", lambda row: row.lost),
    )
    figure, axes = pyplot.subplots(1, 3, figsize=(4 * 3, 1.2 + 0.6 * count), layout="constrained")
    for axis, (title, value) in zip(axes, parts, strict=True):
        grid = [[float("nan")] * count for _ in range(count)]
        for row in rows:
            grid[row.a][row.b] = grid[row.b][row.a] = value(row)
        axis.imshow(grid, vmin=0, cmap="viridis")
        for row in rows:
            for x, y in ((row.a, row.b), (row.b, row.a)):
                axis.text(x, y, f"{value(row):.1%}", ha="center", va="center", fontsize=8, color="white")
        axis.set_title(title, fontsize=9)
        axis.set_xticks(range(count), [Path(name).name for name in names], rotation=30, fontsize=7)
        axis.set_yticks(range(count), [Path(name).name for name in names], fontsize=7)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
