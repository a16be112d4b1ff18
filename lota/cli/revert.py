"""`lota revert`: a checkpoint with tickets applied becomes its base again, bit for bit."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lota.cli.apply import add_trust_option
from lota.cli.parsers import add_command, say


def add_parser(commands: Any) -> None:
    parser = add_command(
        commands,
        "revert",
        run,
        summary="write the base again from a checkpoint with tickets applied",
        text="""
Write the checkpoint folder OUT: TUNED with the base values that the tickets hold put back.

First every entry of the tickets must have the ticket's value. Then every tensor that the tickets know, frozen ones too,
must have the base's fingerprint. Otherwise OUT is not written. The last line has the number of tensors that were
compared. Give all the tickets that were applied.""",
        examples="""
lota revert --tuned llama-gsm8k runs/gsm8k/ticket --out llama-again""",
    )
    parser.add_argument("--tuned", required=True, help="the checkpoint folder that `lota apply` wrote")
    parser.add_argument("tickets", type=Path, nargs="+", metavar="TICKET", help="ticket directories")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist, or be empty")
    add_trust_option(parser)


def run(args: argparse.Namespace) -> None:
    from lota.delivery.apply import revert_checkpoint
    from lota.delivery.model_folder import locate
    from lota.ticket import Ticket

    tickets = [Ticket.load(path) for path in args.tickets]
    verified = revert_checkpoint(
        locate(args.tuned), tickets, args.out, trust_remote_code=args.trust_remote_code, say=say
    )
    print(f"{args.out}: the base again; {verified}")
