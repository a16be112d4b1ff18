"""`lota diff`: what differs between two checkpoints."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from lota.cli.apply import add_trust_option
from lota.cli.parsers import add_command, say

_SHOWN = 20


def add_parser(commands: Any) -> None:
    parser = add_command(
        commands,
        "diff",
        run,
        summary="print what differs between two checkpoints, tensor by tensor",
        text="""
Compare the models A and B. For every tensor print whether all bits are equal, the share of entries that differ and the
largest difference; also tensors that only one has, and different shapes or dtypes. One tensor of each is in memory at a
time.

The exit status is 0 if every bit is equal, and 1 if something differs.""",
        examples="""
lota diff meta-llama/Llama-3.1-8B runs/gsm8k/merged
lota diff base tuned --json | python -m json.tool""",
    )
    parser.add_argument("a", metavar="A", help="a model's folder, or a name on the hub")
    parser.add_argument("b", metavar="B", help="the second model")
    parser.add_argument("--all", action="store_true", help=f"list every tensor (the {_SHOWN} that differ most)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    add_trust_option(parser)


def run(args: argparse.Namespace) -> int:
    from lota.algebra import ModelTensors, diff
    from lota.delivery.model_folder import locate
    from lota.messages import printable

    trust = args.trust_remote_code
    a, b = (ModelTensors(locate(model), trust_remote_code=trust) for model in (args.a, args.b))
    rows = list(diff(a, b, say))
    differing = [row for row in rows if row.kind != "equal"]
    numel, changed = sum(row.numel for row in rows), sum(row.num_changed for row in rows)
    totals = {
        "tensors": len(rows),
        "equal": len(rows) - len(differing),
        "numel": numel,
        "num_changed": changed,
        "largest": max((row.largest or 0.0 for row in rows), default=0.0),
    }
    if args.json:
        print(
            json.dumps({**totals, "rows": [asdict(row) for row in rows if args.all or row.kind != "equal"]}, indent=2)
        )
        return int(bool(differing))
    differing.sort(key=lambda row: (row.kind == "changed", -row.share))
    shown = rows if args.all else differing[:_SHOWN]
    for row in shown:
        what = (
            f"{row.num_changed:,} of {row.numel:,} ({row.share:.3%}), largest {row.largest:.4g}"
            * (row.kind == "changed")
            or f"{row.kind} {row.a} {row.b}".rstrip()
        )
        print(f"  {printable(row.name)}: {what}")
    if len(differing) > len(shown):
        print(f"  ... {len(differing) - len(shown)} more differ; --all lists them")
    share = changed / numel if numel else 0.0
    print(
        f"{totals['equal']} of {len(rows)} tensors are equal bit for bit; {changed:,} of {numel:,} entries differ "
        f"({share:.4%}), by at most {totals['largest']:.4g}"
    )
    return int(bool(differing))
