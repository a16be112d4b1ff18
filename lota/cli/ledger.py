"""`lota ledger`: which task owns how much of a model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from lota.cli.parsers import add_command, say


def add_parser(commands: Any) -> None:
    parser = add_command(
        commands,
        "ledger",
        run,
        summary="which task owns how much of the weights, and what is free",
        text="""
For the folder of a sequence, or any tickets of one base in the order of their training: active, changed and shared
entries of each, what it owns (an entry belongs to the last task that has it) and what is left, by layer. Of a sequence
also what each task scored on the base, after its own training and now. Counted from the tickets.""",
        examples="""
lota ledger runs/five
lota ledger runs/math/ticket runs/sql/ticket --per-tensor
lota ledger runs/five --json
lota ledger runs/five --plot ledger.pdf""",
    )
    parser.add_argument(
        "paths", type=Path, nargs="+", metavar="PATH", help="folder of a sequence, or tickets"
    )
    parser.add_argument("--per-tensor", action="store_true", help="a line a tensor instead of a layer")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a picture (.png, .pdf, .svg)")


def run(args: argparse.Namespace) -> None:
    from lota.messages import printable
    from lota.sequence.ledger import layer_table, make_ledger, table
    from lota.sequence.matrix import aligned
    from lota.sequence.state import is_sequence, read_state
    from lota.ticket import Ticket

    kept = None
    if len(args.paths) == 1 and is_sequence(args.paths[0]):
        from lota.sequence.books import kept as scores_of
        from lota.sequence.books import ticket_paths

        state = read_state(args.paths[0])
        places = ticket_paths(state, args.paths[0])
        kept = scores_of(state)
        if state.method != "lota":
            raise ValueError(f"{args.paths[0]} is a sequence of method: {state.method}, which has no tickets to count")
    else:
        places = {_name(path, args.paths): path for path in args.paths}
    ledger = make_ledger(list(places), [Ticket.load(path) for path in places.values()], say)
    if args.plot is not None:
        from lota.sequence.picture import draw_ledger

        draw_ledger(ledger, args.plot)
    if args.json:
        content = ledger.content()
        for task in content["tasks"]:
            task |= {"ticket": str(places[task["name"]])} | ({"kept": kept[task["name"]]} if kept else {})
        print(json.dumps(content, indent=2))
        return
    shares = ledger.tensors if args.per_tensor else ledger.layers
    for line in [*aligned(table(ledger, kept)), "", *aligned(layer_table(ledger, shares))]:
        print(printable(line))


def _name(path: Path, paths: list[Path]) -> str:
    """Short where that says which it is: the folder of the run, for `runs/sql/ticket`."""
    short = path.parent.name if path.name == "ticket" and path.parent.name else path.name
    others = [other for other in paths if other is not path]
    is_own = all(short not in (other.name, other.parent.name) for other in others)
    return short if is_own else str(path)
