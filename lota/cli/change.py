"""`lota scale`, `trim`, `pack` and `unpack`: one ticket made of one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lota.cli.apply import add_trust_option
from lota.cli.parsers import add_command

NAMES = ("scale", "trim", "pack", "unpack")


def add_parser(commands: Any) -> None:
    parser = add_command(
        commands,
        "scale",
        run_scale,
        summary="move values between the base's and the ticket's, or beyond",
        text="""
Write the ticket OUT with every value at base + FACTOR * (value - base): 0 is the model as it was, 1 the ticket. All is
computed in fp32; 1 keeps every bit.""",
        examples="lota scale runs/gsm8k/ticket 0.7 --out gsm8k-70",
    )
    parser.add_argument("ticket", type=Path, metavar="TICKET", help="ticket directory, with base values")
    parser.add_argument("factor", type=float, metavar="FACTOR", help="0 the base, 1 the ticket")
    _add_out(parser)
    parser = add_command(
        commands,
        "trim",
        run_trim,
        summary="keep the entries of a ticket that moved most",
        text="""
Write the ticket OUT with exactly round(KEEP * entries) of the entries, those with the largest |value - base|.""",
        examples="lota trim runs/gsm8k/ticket --keep 0.3 --out gsm8k-30",
    )
    parser.add_argument("ticket", type=Path, metavar="TICKET", help="ticket directory, with base values")
    parser.add_argument("--keep", type=float, required=True, help="fraction of its entries, above 0 and at most 1")
    _add_out(parser)
    parser = add_command(
        commands,
        "pack",
        run_pack,
        summary="store a ticket in about half of the bytes, to be read with its base",
        text="""
Write the ticket OUT with coded differences in place of values and base values. The same stream gives the values if you
have the base, and the base if you have the tuned model, bit for bit. lota apply, revert and export, and lota.apply_,
take packed tickets as they are. --values also keeps the values, for use without the base.""",
        examples="lota pack runs/gsm8k/ticket --out gsm8k-packed",
    )
    parser.add_argument("ticket", type=Path, metavar="TICKET", help="ticket directory, with base values")
    parser.add_argument("--values", action="store_true", help="keep the values too: they can be read without the base")
    _add_out(parser)
    parser = add_command(
        commands,
        "unpack",
        run_unpack,
        summary="give a packed ticket its values and base values back",
        text="""
Write the ticket OUT with values and base values, computed from BASE. A different base is refused.""",
        examples="lota unpack gsm8k-packed --base meta-llama/Llama-3.1-8B --out gsm8k",
    )
    parser.add_argument("ticket", type=Path, metavar="TICKET", help="packed ticket directory")
    parser.add_argument("--base", required=True, help="the base model: a folder, or a name on the hub")
    _add_out(parser)
    add_trust_option(parser)


def _add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="directory of the ticket; must not exist, or be empty")


def run_scale(args: argparse.Namespace) -> None:
    from lota.algebra import scale
    from lota.ticket import Ticket

    _say(args.out, scale(Ticket.load(args.ticket), args.factor, args.out))


def run_trim(args: argparse.Namespace) -> None:
    from lota.algebra import trim
    from lota.ticket import Ticket

    _say(args.out, trim(Ticket.load(args.ticket), args.keep, args.out))


def run_pack(args: argparse.Namespace) -> None:
    from lota.algebra import pack
    from lota.ticket import Ticket

    _say(args.out, pack(Ticket.load(args.ticket), args.out, form="values" if args.values else "packed"))


def run_unpack(args: argparse.Namespace) -> None:
    from lota.algebra import ModelTensors, unpack
    from lota.delivery.model_folder import locate
    from lota.ticket import Ticket

    ticket = Ticket.load(args.ticket)
    facts = {"class": ticket.provenance.get("class")}
    base = ModelTensors(locate(args.base), ticket.names, facts, trust_remote_code=args.trust_remote_code)
    _say(args.out, unpack(ticket, base, args.out))


def _say(out: Path, made: dict[str, int]) -> None:
    changed = f"{made['num_changed']:,} of them differ from the base's"
    print(f"{out}: {made['num_active']:,} entries, {changed}; {made['bytes'] / 2**20:.2f} MiB")
