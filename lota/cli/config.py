"""`lota config`: the run configurations that come with lota, listed or written out."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lota.cli.parsers import add_command, complete
from lota.messages import did_you_mean
from lota.packaged import CONFIGS, DS_CONFIGS


def add_parser(commands: Any) -> None:
    parser = add_command(
        commands,
        "config",
        run,
        summary="print or write a configuration that comes with lota",
        text="""
Without NAME, print the list. With NAME, print the file, or write it to OUT, to be edited and given to `lota train
--config`. There are run configurations (.yaml), a DeepSpeed file (zero3) and a chat template (plain_chat).""",
        examples="""
lota config
lota config llama31_8b_gsm8k --out run.yaml
lota config zero3 --out zero3.json""",
    )
    name = parser.add_argument("name", nargs="?", metavar="NAME", help="a packaged file, without its suffix")
    complete(name, sorted(_packaged()))
    parser.add_argument("--out", type=Path, help="file to write; must not exist (default: print it)")


def run(args: argparse.Namespace) -> None:
    files = _packaged()
    if args.name is None:
        if args.out is not None:
            raise ValueError("--out needs the name of a configuration; `lota config` lists them")
        for name, path in sorted(files.items()):
            print(f"{name:28} {path.suffix.removeprefix('.')}")
        return
    if args.name not in files:
        raise ValueError(f"no configuration {args.name!r} comes with lota" + did_you_mean(args.name, files))
    text = files[args.name].read_text(encoding="utf-8")
    if args.out is None:
        print(text, end="")
        return
    if args.out.exists():
        raise ValueError(f"{args.out} exists already: choose another file, or remove it first")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text, encoding="utf-8")
    print(f"{args.out}: {args.name}")


def _packaged() -> dict[str, Path]:
    """The packaged files by the names that the command knows them by."""
    files = (path for folder in (CONFIGS, DS_CONFIGS) for path in sorted(folder.iterdir()))
    return {path.stem: path for path in files if path.suffix in (".yaml", ".json", ".jinja")}
