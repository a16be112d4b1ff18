"""`lota study`: evidence about tickets that anyone can rerun."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from lota.cli.parsers import add_command

PRESETS = ("cpu", "smoke", "gpu", "paper")


def add_parser(commands: Any) -> None:
    parser = add_command(
        commands,
        "study",
        run,
        summary="measure what tickets learn, forget and keep, against full fine-tuning and LoRA",
        text="""
Pretrain a small base on the spot, train it by every method at an equal sweep of rates, and write one table of all runs
(OUT/runs.csv), tables and figures made from it. Every run is one of lota train, kept under a digest of its options,
base and data: stopped at any time, the same command resumes, and once it is complete, nothing changes.

  cpu    two cores, no data needed: made-up tasks; with --data real text
  smoke  the same in minutes, to see that it runs; its figures mean nothing
  gpu    one GPU: a larger base, bf16
  paper  Llama 3 8B and Mistral 7B on 8 GPUs: --plan prints the commands""",
        examples="""
lota study cpu --out runs/study
lota study cpu --data ../shared/data --out runs/study-text
lota study cpu --out runs/study --recompute 'q2/quell/full/0.001/s0@1'
lota study paper --plan""",
    )
    parser.add_argument("preset", choices=PRESETS, metavar="PRESET", help=", ".join(PRESETS))
    parser.add_argument("--out", type=Path, help="folder of the study (runs/study-PRESET)")
    parser.add_argument("--data", type=Path, help="real text: a folder of .jsonl files, or a YAML file that names them")
    parser.add_argument("--questions", nargs="+", metavar="Q", help="some of q1 to q5, overlap (all of the preset's)")
    parser.add_argument("--methods", nargs="+", metavar="M", help="some of question 2's: full, 'ticket 10%%', ...")
    parser.add_argument("--workers", type=int, help="runs side by side, one core each (the cores; 1 with a GPU)")
    parser.add_argument("--minutes", type=float, help="stop after so long, with status 75; the same command resumes")
    parser.add_argument("--plan", action="store_true", help="print the runs and an estimate, and do nothing")
    parser.add_argument("--recompute", metavar="ROW", help="do the run of one row of runs.csv again, and compare")


def run(args: argparse.Namespace) -> int | None:
    from dataclasses import replace

    import torch

    from lota.messages import did_you_mean
    from lota.study.presets import chosen
    from lota.study.questions import q2_methods
    from lota.study.study import Place, TimeIsOver, recompute, show_plan, study

    if args.preset == "paper":
        from lota.study.paper import show

        if not args.plan:
            raise ValueError("the preset paper is for a cluster: --plan prints its runs, each a command")
        show()
        return None
    preset = chosen(args.preset, args.data is not None)
    if args.questions:
        unknown = set(args.questions) - set(preset.questions)
        if unknown:
            raise ValueError(f"--questions: {args.preset} has {', '.join(preset.questions)}, got {', '.join(unknown)}")
        preset = replace(preset, questions=tuple(args.questions))
    if args.methods:
        known = [method.name for method in q2_methods(preset)]
        for name in args.methods:
            if name not in known:
                raise ValueError(f"--methods: one of {', '.join(known)}, got {name!r}" + did_you_mean(name, known))
        preset = replace(preset, methods=tuple(args.methods))
    has_gpu = torch.accelerator.is_available()
    workers = args.workers or (1 if has_gpu else os.cpu_count() or 1)
    if workers < 1:
        raise ValueError(f"--workers must be at least 1, got {workers}")
    place = Place(args.out or Path("runs") / f"study-{args.preset}", args.data, workers, args.minutes)
    if args.plan:
        show_plan(preset, place)
    elif args.recompute:
        return 0 if recompute(preset, place, args.recompute) else 1
    else:
        try:
            study(preset, place)
        except TimeIsOver as over:
            print(f"the time is over: {over}")
            return 75  # try again
        print(f"{place.out / 'runs.csv'}, tables.md and figures/ there")
    return None
