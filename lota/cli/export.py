"""`lota export`: a ticket in another tool's format."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from lota.cli.apply import add_base_options
from lota.cli.parsers import add_command, say


def add_parser(commands: Any) -> None:
    parser = add_command(
        commands,
        "export",
        run,
        summary="write a ticket as a merged checkpoint or as a PEFT adapter",
        text="""
Write a ticket in a format of other tools; OUT appears whole or not at all.

  hf    the merged checkpoint, as `lota apply` writes it
  peft  an adapter of PEFT's type SHiRA: stock PEFT loads it and computes with exactly the ticket's weights. It takes
        12 bytes an entry; tensors that SHiRA cannot hold are stored whole. The adapter is run once on the base, and its
        logits are compared with the ticket's. Its README explains how to load it.

Every tensor of the base is compared with the ticket's fingerprints; a different model or revision is refused.""",
        examples="""
lota export runs/gsm8k/ticket --base meta-llama/Llama-3.1-8B --format peft --out llama-gsm8k-adapter
lota export math sql --base models/llama --format peft --out both-adapter
lota export runs/gsm8k/ticket --base models/llama --format hf --out llama-gsm8k""",
    )
    parser.add_argument(
        "tickets", type=Path, nargs="+", metavar="TICKET", help="ticket directories; they share no entry"
    )
    add_base_options(parser)
    parser.add_argument("--format", required=True, choices=("hf", "peft"), help="what to write")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist, or be empty")


def run(args: argparse.Namespace) -> None:
    import torch

    from lota.algebra import merge
    from lota.delivery.apply import apply_to_checkpoint
    from lota.delivery.live import check_disjoint
    from lota.delivery.model_folder import locate
    from lota.ticket import Ticket

    tickets = [Ticket.load(path) for path in args.tickets]
    base = locate(args.base, args.revision)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    if args.format == "hf":
        verified = apply_to_checkpoint(
            base, tickets, args.out, dtype=dtype, trust_remote_code=args.trust_remote_code, say=say
        )
        print(
            f"{args.out}: the base with {sum(ticket.num_active for ticket in tickets):,} entries assigned; {verified}"
        )
        return
    check_disjoint(tickets)
    with tempfile.TemporaryDirectory() as folder:
        ticket = tickets[0]
        if len(tickets) > 1:  # one adapter for all of them: their sum, which is exact where they share no entry
            merge(tickets, Path(folder) / "merged")
            ticket = Ticket.load(Path(folder) / "merged")
        made = _export(args, ticket, base, dtype)
    print(
        f"{args.out}: {made.num_sparse_modules} modules sparse with {made.num_entries:,} entries (r {made.rank}), "
        f"{made.num_whole_modules} whole, {made.num_bytes / 2**20:.2f} MiB"
    )
    if made.num_ordered:
        print(f"{made.num_ordered:,} entries are exact on CPUs only: README.md there explains")


def _export(args: argparse.Namespace, ticket: Any, base: Path, dtype: Any) -> Any:
    from lota.delivery.peft import export_peft

    return export_peft(
        ticket,
        base,
        args.out,
        base_name=args.base,
        dtype=dtype,
        trust_remote_code=args.trust_remote_code,
        say=say,
    )
