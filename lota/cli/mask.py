"""`lota mask`: masks made of masks, of a pruned model, or of someone else's file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lota.cli.apply import add_trust_option
from lota.cli.parsers import add_command


def add_parser(commands: Any) -> None:
    parser = add_command(
        commands,
        "mask",
        run,
        summary="make a mask of masks, of models, of a kept ranking, or of another tool's file",
        text="""
Write the mask OUT, to train on (mask: OUT) or to protect (protect: [OUT]):

  --union A B ...         entries that are active in any
  --intersection A B ...  entries that are active in all
  --minus A B ...         entries of A that are active in none of the others
  --changed BASE TUNED    the fraction --density of the entries, those that TUNED moved most: protects an aligned model
                          that has no ticket
  --ranking DIR           the entries that scored highest in a ranking that calibration kept (keep_ranking: true): the
                          mask that a calibration with this --density would have chosen
  --nonzero MODEL         entries of a pruned model that are not zero
  --from FILE             boolean masks by tensor name: .safetensors (True is trained), or .pt as the public LoTA code
                          writes it (True is frozen), loaded without running code; --true changes the meaning of True

A and B are masks or tickets.""",
        examples="""
lota mask --union runs/math/ticket runs/sql/ticket --out taken
lota mask --changed models/llama models/llama-chat --density 0.05 --out aligned
lota mask --ranking runs/math/ranking --density 0.001 --out sparser
lota mask --nonzero models/llama-pruned --out alive
lota mask --from masks.pt --out theirs""",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    combined = {"union": "any", "intersection": "all", "minus": "the first and none of the others"}
    for name, which in combined.items():
        source.add_argument(f"--{name}", type=Path, nargs="+", metavar="M", help=f"entries that are active in {which}")
    source.add_argument(
        "--changed", nargs=2, metavar=("BASE", "TUNED"), help="two models: folders, or names on the hub"
    )
    source.add_argument("--ranking", type=Path, metavar="DIR", help="a run's ranking folder")
    source.add_argument("--nonzero", metavar="MODEL", help="a pruned model: a folder, or a name on the hub")
    source.add_argument("--from", dest="file", type=Path, metavar="FILE", help="boolean masks, .safetensors or .pt")
    parser.add_argument("--true", choices=("active", "frozen"), help="the meaning of True in FILE")
    parser.add_argument("--density", type=float, help="fraction of the eligible entries, with --changed, --ranking")
    parser.add_argument(
        "--include", action="append", help="pattern of tensor names, with --nonzero, --changed; repeatable"
    )
    parser.add_argument("--exclude", action="append", help="pattern of tensor names to leave out; repeatable")
    parser.add_argument("--out", type=Path, required=True, help="directory of the mask; must not exist, or be empty")
    add_trust_option(parser)


def run(args: argparse.Namespace) -> None:
    from lota.algebra import ModelTensors, masks
    from lota.choices import check_density
    from lota.delivery.model_folder import locate
    from lota.selection import cut
    from lota.ticket import Mask

    if args.true and args.file is None:
        raise ValueError("--true is for --from")
    if (args.include or args.exclude) and args.nonzero is None and args.changed is None:
        raise ValueError("--include and --exclude are for --nonzero and --changed")
    if (args.density is None) != (args.changed is None and args.ranking is None):
        raise ValueError("--changed and --ranking take a --density, and nothing else does")
    if args.file is not None:
        made = masks.from_file(args.file, args.true)
    elif args.ranking is not None:
        made = cut(args.ranking, check_density(args.density))
    elif args.nonzero is not None:
        model = ModelTensors(locate(args.nonzero), trust_remote_code=args.trust_remote_code)
        made = masks.nonzero(model, args.include, args.exclude)
    elif args.changed is not None:
        base, tuned = (ModelTensors(locate(model), trust_remote_code=args.trust_remote_code) for model in args.changed)
        made = masks.changed(base, tuned, args.density, args.include, args.exclude)
    else:
        kind = next(name for name in ("union", "intersection", "minus") if getattr(args, name))
        made = getattr(masks, kind)([Mask.load(path) for path in getattr(args, kind)])
    if not made.num_active:
        raise ValueError("no entry would be active: nothing is written")
    made.save(args.out, {"made by": "lota mask"})
    print(f"{args.out}: {made.num_active:,} of {made.eligible:,} entries, density {made.density:.6g}")
