"""`lota serve`: which tickets are on a running vLLM server, and a switch to others."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any

from lota.choices import STACKING_RULES
from lota.cli.parsers import add_command

_BROKEN = 3


def add_parser(commands: Any) -> None:
    parser = add_command(
        commands,
        "serve",
        run,
        summary="switch a running vLLM server to other tickets, or print what is on it",
        text="""
Switch a running vLLM server to exactly these tickets of the model that it serves, or with --base back to the model
itself. Without either, print what is on it. The server reads and verifies the tickets first. Then it ends the requests
that are running, lets new ones wait, writes, and continues: no answer is made by two models, and a ticket of another
base is refused with the server as it was.

Paths are those of the server's machine. Start the server, in an environment that has vllm and lota, with

  VLLM_SERVER_DEV_MODE=1 vllm serve BASE --weight-transfer-config '{"backend": "lota"}'

The exit status is 0 if the server has what was asked, 2 if it refused or there is none, and 3 if it is left paused
because a switch failed half done.""",
        examples="""
lota serve http://127.0.0.1:8000
lota serve http://127.0.0.1:8000 runs/math/ticket
lota serve http://127.0.0.1:8000 runs/math/ticket runs/sql/ticket --rule sum
lota serve http://127.0.0.1:8000 --base""",
    )
    parser.add_argument("url", metavar="URL", help="address of the server")
    parser.add_argument("tickets", nargs="*", metavar="TICKET", help="ticket directories, or names on the hub")
    parser.add_argument("--base", action="store_true", help="take all tickets off")
    parser.add_argument(
        "--rule",
        choices=STACKING_RULES,
        default="refuse",
        help="what an entry gets that several tickets change (refuse)",
    )
    parser.add_argument(
        "--take-over", action="store_true", help="end an update that another program began and left open"
    )
    parser.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="for each answer (600)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a line")


def run(args: argparse.Namespace) -> int:
    from lota.messages import printable
    from lota.serve import Server, ServerBroken, as_server_knows, status, switch

    if args.base and args.tickets:
        raise ValueError("expected tickets or --base, got both")
    server = Server(args.url, timeout=args.timeout)
    try:
        if args.base or args.tickets:
            tickets = [as_server_knows(ticket) for ticket in args.tickets]
            found = switch(server, tickets, rule=args.rule, take_over=args.take_over)
        else:
            found = status(server)
    except ServerBroken as error:
        print(f"lota: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        return _BROKEN
    if args.json:
        print(json.dumps(asdict(found), indent=2))
        return 0
    on = "weights that lota did not put there" if found.tickets is None else ", ".join(found.tickets) or "the base"
    took = ""
    if found.prepare_seconds is not None:
        took = f" (prepared in {found.prepare_seconds:.2f} s, paused for {found.pause_seconds:.2f} s)"
    print(printable(f"{args.url}: {on}{took}{', paused' if found.is_paused else ''}"))
    return 0
