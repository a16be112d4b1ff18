"""`lota apply`: a base checkpoint with tickets assigned, as a new checkpoint folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lota.cli.parsers import add_command, say

DTYPES = ("bfloat16", "float16", "float32")


def add_parser(commands: Any) -> None:
    parser = add_command(
        commands,
        "apply",
        run,
        summary="write a base checkpoint with tickets applied",
        text="""
Write the checkpoint folder OUT: the base with the tickets' values assigned, in safetensors files like the base's, with
its configuration and tokenizer and a model card. It loads like any model in transformers, vLLM and similar tools.

Every tensor of the base is compared with the tickets' fingerprints, frozen ones too if the tickets know them (those of
format version 2 do). A different model or revision is refused. A base stored in another dtype than that of training is
cast first, as the training did. Several tickets must not share an entry. The result is read back, and OUT appears whole
or not at all.""",
        examples="""
lota apply --base meta-llama/Llama-3.1-8B runs/gsm8k/ticket --out llama-gsm8k
lota apply --base models/llama runs/math/ticket runs/sql/ticket --out llama-math-sql""",
    )
    add_base_options(parser)
    parser.add_argument("tickets", type=Path, nargs="+", metavar="TICKET", help="ticket directories")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist, or be empty")


def add_base_options(parser: argparse.ArgumentParser) -> None:
    """--base, --revision and --dtype."""
    parser.add_argument("--base", required=True, help="the base model: a folder, or a name on the hub")
    parser.add_argument("--revision", help="branch, tag or commit of a base on the hub")
    parser.add_argument("--dtype", choices=DTYPES, help="cast the base (default: the dtype of training)")
    add_trust_option(parser)


def add_trust_option(parser: argparse.ArgumentParser) -> None:
    """--trust-remote-code."""
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the Python code that the model's folder brings along"
    )


def run(args: argparse.Namespace) -> None:
    import torch

    from lota.delivery.apply import apply_to_checkpoint
    from lota.delivery.model_folder import locate
    from lota.ticket import Ticket

    tickets = [Ticket.load(path) for path in args.tickets]
    dtype = getattr(torch, args.dtype) if args.dtype else None
    verified = apply_to_checkpoint(
        locate(args.base, args.revision),
        tickets,
        args.out,
        dtype=dtype,
        trust_remote_code=args.trust_remote_code,
        say=say,
    )
    num_active = sum(ticket.num_active for ticket in tickets)
    print(f"{args.out}: the base with {num_active:,} entries assigned; {verified}")


