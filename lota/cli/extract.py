"""`lota extract`: a ticket out of any two checkpoints, or out of a LoRA adapter."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lota.cli.apply import add_base_options
from lota.cli.parsers import add_command, say


def add_parser(commands: Any) -> None:
    parser = add_command(
        commands,
        "extract",
        run,
        summary="make a ticket of any two checkpoints, or of a LoRA adapter",
        text="""
Write the ticket OUT that turns BASE into TUNED. Without --density it holds every entry whose bits differ: applied to
BASE it gives TUNED bit for bit, and reverting gives BASE. With --density it holds that fraction of the eligible
entries, those that moved most, and the command prints what is lost.

--lora takes an adapter that PEFT can merge in place of TUNED, which gives a LoRA an exact undo.""",
        examples="""
lota extract --base meta-llama/Llama-3.1-8B --tuned runs/full/merged --out full-ticket
lota extract --base models/llama --tuned models/llama-math --density 0.01 --score relative --out math-1
lota extract --base models/llama --lora adapters/sql --out sql-ticket""",
    )
    add_base_options(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--tuned", help="the fine-tuned model: a folder, or a name on the hub")
    source.add_argument(
        "--lora", type=Path, metavar="ADAPTER", help="a PEFT adapter's folder, merged as PEFT merges it"
    )
    parser.add_argument("--out", type=Path, required=True, help="directory of the ticket; must not exist, or be empty")
    parser.add_argument("--density", type=float, help="fraction of the eligible entries to keep (all that differ)")
    parser.add_argument(
        "--score", default="magnitude", choices=("magnitude", "relative"), help="what ranks differences (magnitude)"
    )
    parser.add_argument("--include", action="append", help="pattern of tensor names, with --density; repeatable")
    parser.add_argument("--exclude", action="append", help="pattern of tensor names to leave out; repeatable")


def run(args: argparse.Namespace) -> None:
    import torch

    from lota.algebra import ModelTensors, extract
    from lota.delivery.model_folder import locate

    if args.density is None and (args.include or args.exclude or args.score != "magnitude"):
        raise ValueError(
            "--score, --include and --exclude choose entries, and without --density all that differ are kept"
        )
    dtype = getattr(torch, args.dtype) if args.dtype else None
    base = ModelTensors(locate(args.base, args.revision), trust_remote_code=args.trust_remote_code)
    tuned = (
        _merged(args)
        if args.lora is not None
        else ModelTensors(locate(args.tuned), names=base.names, trust_remote_code=args.trust_remote_code)
    )
    made = extract(
        base,
        tuned,
        args.out,
        density=args.density,
        score=args.score,
        include=args.include,
        exclude=args.exclude,
        dtype=dtype,
        provenance={"model": args.base, "tuned": str(args.lora or args.tuned)},
        say=say,
    )
    lost = (
        f"; {made.num_lost:,} that differ are lost, {made.lost_norm:.2%} of the difference's norm"
        if made.num_lost
        else ""
    )
    print(
        f"{args.out}: {made.num_active:,} entries of {made.num_changed:,} that differ{lost}; "
        f"{made.num_bytes / 2**20:.2f} MiB"
    )


def _merged(args: argparse.Namespace) -> Any:
    """The base with the adapter merged, by PEFT, in memory."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from lota.algebra import ModelTensors
    from lota.delivery.model_folder import locate

    model = AutoModelForCausalLM.from_pretrained(
        locate(args.base, args.revision), dtype=args.dtype or "auto", trust_remote_code=args.trust_remote_code
    )
    return ModelTensors(PeftModel.from_pretrained(model, str(args.lora)).merge_and_unload())
