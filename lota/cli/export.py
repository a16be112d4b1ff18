"""`lota export`: a ticket in another tool's format."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lota.cli.apply import add_base_options, say
from lota.cli.parsers import add_command


def add_parser(commands: Any) -> None:
    parser = add_command(
        commands,
        "export",
        run,
        summary="write a ticket as a merged checkpoint or as a PEFT adapter",
        text="""
Write a ticket for tools that know nothing of tickets; OUT appears whole or not at all.

  hf    the merged checkpoint, as `lota apply` writes it
  peft  an adapter of PEFT's type SHiRA: stock PEFT loads it, and computes with exactly the ticket's weights. It takes
        12 bytes an entry; tensors that SHiRA cannot hold are stored whole. The adapter is run once on the base, and its
        logits compared with the ticket's. Its README says how to load it.

The base is verified tensor by tensor against the ticket's fingerprints; another model or revision is refused.""",
        examples="""
lota export runs/gsm8k/ticket --base meta-llama/Llama-3.1-8B --format peft --out llama-gsm8k-adapter
lota export runs/gsm8k/ticket --base models/llama --format hf --out llama-gsm8k""",
    )
    parser.add_argument("ticket", type=Path, metavar="TICKET", help="ticket directory")
    add_base_options(parser)
    parser.add_argument("--format", required=True, choices=("hf", "peft"), help="what to write")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist, or be empty")


def run(args: argparse.Namespace) -> None:
    import torch

    from lota.delivery.apply import apply_to_checkpoint
    from lota.delivery.model_folder import locate
    from lota.delivery.peft import export_peft
    from lota.ticket import Ticket

    ticket = Ticket.load(args.ticket)
    base = locate(args.base, args.revision)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    if args.format == "hf":
        verified = apply_to_checkpoint(
            base, [ticket], args.out, dtype=dtype, trust_remote_code=args.trust_remote_code, say=say
        )
        print(f"{args.out}: the base with {ticket.num_active:,} entries assigned; {verified}")
        return
    made = export_peft(
        ticket,
        base,
        args.out,
        base_name=args.base,
        dtype=dtype,
        trust_remote_code=args.trust_remote_code,
        say=say,
    )
    print(
        f"{args.out}: {made.num_sparse_modules} modules sparse with {made.num_entries:,} entries (r {made.rank}), "
        f"{made.num_whole_modules} whole, {made.num_bytes / 2**20:.2f} MiB"
    )
    if made.num_ordered:
        print(f"{made.num_ordered:,} entries are exact on CPUs only: README.md there explains")
