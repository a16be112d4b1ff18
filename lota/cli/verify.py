"""`lota verify`: proof that a model is a base plus exactly these tickets."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lota.cli.apply import add_trust_option
from lota.cli.parsers import add_command, say

_SHOWN = 20


def add_parser(commands: Any) -> None:
    parser = add_command(
        commands,
        "verify",
        run,
        summary="prove that a model is a base plus exactly these tickets",
        text="""
  --base A --tuned B   every bit of B is A's, or a ticket's where it is active
  --tuned B            with the tickets' base values put back, B has the base's fingerprints; needs no base
  --base A             A is the base of the tickets; for use before anything is written
  neither              the tickets' files are sound

--protected P (a ticket or mask, with both models) also proves that none of its entries moved.

The exit status is 0 if all is proved, and 1 if not; each error has its line.""",
        examples="""
lota verify runs/gsm8k/ticket --base meta-llama/Llama-3.1-8B --tuned runs/gsm8k/merged
lota verify runs/gsm8k/ticket --tuned served-model --json
lota verify math sql --base models/llama --tuned both --protected safety/ticket""",
    )
    parser.add_argument("tickets", type=Path, nargs="+", metavar="TICKET", help="ticket directories")
    parser.add_argument("--base", help="the base model: a folder, or a name on the hub")
    parser.add_argument("--tuned", help="the model that should be base plus tickets")
    parser.add_argument(
        "--protected", type=Path, action="append", default=[], metavar="P", help="ticket or mask; repeatable"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    add_trust_option(parser)


def run(args: argparse.Namespace) -> int:
    from lota.algebra import ModelTensors, verify
    from lota.delivery.model_folder import locate
    from lota.messages import printable
    from lota.ticket import Mask, Ticket

    tickets = [Ticket.load(path) for path in args.tickets]
    names = [name for ticket in tickets for name in ticket.names]
    facts = {"class": next((t.provenance["class"] for t in tickets if t.provenance.get("class")), None)}

    def opened(model: str | None) -> ModelTensors | None:
        if model is None:
            return None
        return ModelTensors(locate(model), names, facts, trust_remote_code=args.trust_remote_code)

    verdict = verify(
        tickets,
        base=opened(args.base),
        tuned=opened(args.tuned),
        protected=[Mask.load(path) for path in args.protected],
        say=say,
    )
    if args.json:
        print(json.dumps({"proved": verdict.is_proved, **asdict(verdict)}, indent=2))
        return int(not verdict.is_proved)
    for problem in verdict.problems[:_SHOWN]:
        print(f"  {printable(problem)}")
    if len(verdict.problems) > _SHOWN:
        print(f"  ... and {len(verdict.problems) - _SHOWN} more; --json lists them")
    unknown = f"; nothing is known of {len(verdict.not_compared)} others" if verdict.not_compared else ""
    counted = f" ({len(verdict.compared)} tensors compared{unknown})" if verdict.compared else ""
    print(f"{'proved' if verdict.is_proved else 'NOT proved'}: {verdict.how}{counted}")
    return int(not verdict.is_proved)
