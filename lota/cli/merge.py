"""`lota merge`: several tickets of one base become one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lota.cli.parsers import add_command, say


def add_parser(commands: Any) -> None:
    parser = add_command(
        commands,
        "merge",
        run,
        summary="merge several tickets of one base into one",
        text="""
Write the ticket OUT, made of all TICKETs. Memory is proportional to their entries. d is value - base:

  sum     base + the weighted sum of d; exact, bit for bit, where tickets share no entry
  linear  the weighted mean of the models
  ties    d trimmed to its largest (--density), a sign elected for every entry, the mean of those that agree with it
  dare    d dropped at random to --density of its entries, the rest divided by it
  della   the same, but large d are dropped less often (--density -/+ --epsilon, by rank in the row)

Everything is computed in fp32. Seeds are fixed: the same call gives the same bytes.""",
        examples="""
lota merge runs/math/ticket runs/sql/ticket --out both
lota merge a b c --method ties --density 0.2 --weights 1 0.5 0.5 --out abc
lota merge a b --weights-of '*.mlp.*=1,0.3' --layers 0.4 0.8 --out deep""",
    )
    parser.add_argument("tickets", type=Path, nargs="+", metavar="TICKET", help="ticket directories, with base values")
    parser.add_argument("--out", type=Path, required=True, help="directory of the ticket; must not exist, or be empty")
    parser.add_argument("--method", default="sum", choices=("sum", "linear", "ties", "dare", "della"), help="(sum)")
    parser.add_argument("--weights", type=float, nargs="+", help="one for each ticket (1)")
    parser.add_argument(
        "--weights-of",
        action="append",
        default=[],
        metavar="PATTERN=W,W,...",
        help="weights for tensors whose names match; repeatable, the last match counts",
    )
    parser.add_argument(
        "--layers", type=float, nargs=2, metavar=("A", "B"), help="weight of layer l of L: A + B l / (L - 1) (LiNeS)"
    )
    parser.add_argument("--density", type=float, default=1.0, help="of ties, dare and della (1)")
    parser.add_argument("--epsilon", type=float, default=0.1, help="of della (0.1)")
    parser.add_argument("--lambda", dest="lam", type=float, default=1.0, help="factor of the whole difference (1)")
    parser.add_argument("--seed", type=int, default=0, help="of dare and della (0)")


def run(args: argparse.Namespace) -> None:
    from lota.algebra import Merge, merge
    from lota.ticket import Ticket

    how = Merge(
        args.method,
        args.weights,
        dict(_weights(text) for text in args.weights_of),
        None if args.layers is None else (args.layers[0], args.layers[1]),
        args.density,
        args.epsilon,
        args.lam,
        args.seed,
    )
    made = merge([Ticket.load(path) for path in args.tickets], args.out, how, say=say)
    print(f"{args.out}: {made['num_active']:,} entries, {made['bytes'] / 2**20:.2f} MiB")


def _weights(text: str) -> tuple[str, list[float]]:
    pattern, separator, numbers = text.rpartition("=")
    try:
        if not separator:
            raise ValueError
        return pattern, [float(number) for number in numbers.split(",")]
    except ValueError:
        raise ValueError(f"--weights-of takes PATTERN=W,W,... with a weight for each ticket, got {text!r}") from None
