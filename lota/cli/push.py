"""`lota push`: a ticket on the hub."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lota.cli.parsers import add_command


def add_parser(commands: Any) -> None:
    parser = add_command(
        commands,
        "push",
        run,
        summary="publish a ticket on the hub",
        text="""
Upload the ticket T as NAME. Its card names the base and the licence that you give; the base model's terms apply. Paths
of this machine are left out of the provenance, and the command prints what was left out.

Afterwards NAME (or NAME@REVISION) works wherever a ticket's path does.""",
        examples="""
lota push runs/gsm8k/ticket me/llama-gsm8k-1 --licence llama3.1
lota push runs/gsm8k/ticket me/llama-gsm8k-1 --licence llama3.1 --base meta-llama/Llama-3.1-8B --to public
lota apply --base meta-llama/Llama-3.1-8B me/llama-gsm8k-1 --out llama-gsm8k""",
    )
    parser.add_argument("ticket", type=Path, metavar="T", help="ticket directory")
    parser.add_argument("name", metavar="NAME", help="owner/name on the hub")
    parser.add_argument("--licence", "--license", required=True, help="the hub's identifier of it, such as apache-2.0")
    parser.add_argument("--base", help="the base's name on the hub, if the ticket was made on a folder")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--revision", help="branch to upload to (main)")
    parser.add_argument(
        "--to", type=Path, metavar="FOLDER", help="write what would be uploaded here, and upload nothing"
    )


def run(args: argparse.Namespace) -> None:
    from lota.delivery.publish import dumps, prepare, push

    options = {"licence": args.licence, "base": args.base}
    if args.to is not None:
        args.to.mkdir(parents=True, exist_ok=True)
        left = prepare(args.ticket, args.to, **options)
        where = f"{args.to / 'ticket'}: nothing was uploaded"
    else:
        where, left = push(args.ticket, args.name, private=args.private, revision=args.revision, **options)
    print(where + (f"; left out: {dumps(left)}" if left else ""))
