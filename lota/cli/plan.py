"""`lota plan`: what each rank will hold and send, before anything is loaded, and what makes it fit."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lota.choices import DENSITY, GRADIENT_REDUCTIONS, REDUCE_EVERY, SCORES, check_density, check_reductions
from lota.cli.apply import add_trust_option
from lota.cli.parsers import add_command

if TYPE_CHECKING:
    from lota.plan import MethodPlan, ModelShapes, RankLayout
    from lota.plan.advice import Choice
    from lota.selection import LeftOut

METHODS = ("full", "lora", "calibration", "lota")


def add_parser(commands: Any) -> None:
    parser = add_command(
        commands,
        "plan",
        run,
        summary="print the bytes that each rank will hold and send, from a model's config alone",
        text="""
Print what a rank holds, needs at most and sends per step, from config.json alone: side by side for full fine-tuning
(dense ZeRO-3, AdamW), LoRA, LoTA's calibration and LoTA's sparse training. With --memory also print what fits, and for
each plan that does not fit every single change that would help.

Activations are not planned; leave memory for them. Masks are assumed to be even over ranks, with an allowance for the
fullest one; --mask counts a real one. docs/planning_formulas.md has the formulas.""",
        examples="""
lota plan meta-llama/Llama-3.1-8B --ranks 8 --node_size 8 --density 0.01 --memory 80GiB
lota plan models/llama-70b --ranks 64 --node_size 8 --shard_group_size 8 --density 0.1
lota plan models/llama-8b --ranks 8 --method lota --mask runs/gsm8k/mask
lota plan models/llama-8b --ranks 8 --json | python -m json.tool""",
    )
    add = parser.add_argument
    add("model", help="a folder with a config.json, that file, or a name on the hub")
    add("--ranks", type=int, default=1, help="number of ranks, one a GPU (1)")
    add("--node_size", type=int, help="ranks on one node (all)")
    add("--method", action="append", choices=METHODS, help="plan only this one; may be repeated (all)")
    add("--density", type=float, default=DENSITY, help=f"fraction of the eligible weights to train ({DENSITY})")
    add("--mask", type=Path, help="a mask or ticket, counted instead of an even one of --density")
    add("--score", choices=SCORES, help="what calibration ranks weights by (task_vector and gradient, for comparison)")
    add("--shard_group_size", help="ranks that share one copy of the weights: a number, node or world (world)")
    add("--communication_data_type", default="fp32", choices=("fp32", "bf16"), help="of compact gradients (fp32)")
    add("--gradient_reduction", default="auto", choices=GRADIENT_REDUCTIONS, help="see docs/planning.md (auto)")
    add("--reduce_every", default="micro_step", choices=REDUCE_EVERY, help="when gradients are reduced (micro_step)")
    add("--lora_rank", type=int, default=16, help="of the adapters that LoRA is planned with (16)")
    add("--include", action="append", help="pattern of tensor names, instead of all blocks' (default); repeatable")
    add("--exclude", action="append", help="pattern of tensor names to leave out; repeatable")
    add("--dense", action="append", help="pattern of tensors (or rows, name[a:b]) to also train whole; repeatable")
    add("--gradient_accumulation_steps", type=int, default=1, help="micro steps in a step (1)")
    add("--gradient_checkpointing", action="store_true", help="compute activations twice")
    add("--offload_param", action="store_true", help="keep sparse training's weights and state in host memory")
    add("--offload_optimizer", action="store_true", help="keep dense training's optimizer state in host memory")
    add("--architecture", help="transformers class to plan, such as LlamaForSequenceClassification (a causal LM)")
    add(
        "--set",
        action="append",
        metavar="ENTRY=VALUE",
        help="change an entry of config.json for the plan: num_labels=3 of a head, vocab_size=128264 if rows were "
        "added; repeatable",
    )
    add("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"), help="of the weights (bfloat16)")
    add("--revision", default="main", help="branch, tag or commit on the hub (main)")
    add("--memory", help="of one accelerator, such as 80GiB: prints what fits, and what would make it fit")
    add_trust_option(parser)
    add("--json", action="store_true", help="one JSON object instead of a table")


def run(args: argparse.Namespace) -> None:
    from lota.plan import RankLayout, advise, format_bytes, parse_bytes, read_model, table
    from lota.selection import eligible, left_out, left_out_lines

    memory = None if args.memory is None else parse_bytes(args.memory)
    layout = RankLayout(
        ranks=args.ranks,
        node_size=args.node_size,
        shard_group_size=_group_size(args.shard_group_size, args.node_size, args.ranks),
        communication_bytes={"fp32": 4, "bf16": 2}[args.communication_data_type],
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        gradient_checkpointing=args.gradient_checkpointing,
        offload_param=args.offload_param,
        offload_optimizer=args.offload_optimizer,
    )
    architecture, entries = model_choice(args)
    model = read_model(
        args.model,
        revision=args.revision,
        dtype=args.dtype,
        architecture=architecture,
        entries=entries,
        trust_remote_code=args.trust_remote_code,
    )
    choices = make_choices(args, model, layout, memory)
    plans = [choice.make(choice) for choice in choices]
    advice = [] if memory is None else [line for choice in choices for line in advise(choice, memory)]
    rows = [] if args.mask is not None else left_out(model.shapes, eligible(model.shapes, args.include, args.exclude))
    if args.json:
        print(json.dumps(as_json(model, layout, plans, advice, rows), indent=2))
        return
    nodes = f" on {layout.num_nodes} nodes" if layout.num_nodes > 1 else ""
    group = f", shard groups of {layout.shard_size}" if layout.shard_size < layout.ranks else ""
    print(f"{model.name}: {model.numel() / 1e9:.4g}B parameters, {layout.ranks} ranks{nodes}{group}, {args.dtype}\n")
    print(table(plans, layout, memory))
    notes = [plan.note for plan in plans if plan.note]
    print("\n" + "\n".join([*notes, *advice]) if notes or advice else "")
    if memory is not None:
        print(f"A plan fits where its peak is at most {format_bytes(memory)}; leave some of it for activations.")
    for line in left_out_lines(rows):
        print(line)


def model_choice(args: argparse.Namespace) -> tuple[str | None, dict[str, Any] | None]:
    """The class and the entries of config.json to plan with: those of `--architecture` and `--set`, else those
    in the ticket of `--mask`, if its model has more tensors than the base."""
    facts: dict[str, Any] = {}
    if args.mask is not None:
        from lota.ticket import read_manifest

        facts = read_manifest(args.mask).model
    entries = {key: value for key, value in (facts.get("config") or {}).items() if key != "architectures"}
    for text in args.set or ():
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise ValueError(f"--set takes ENTRY=VALUE, such as num_labels=3, got {text!r}")
        try:
            entries[key] = json.loads(value)
        except json.JSONDecodeError:
            entries[key] = value
    return args.architecture or facts.get("class"), entries or None


def _group_size(asked: str | None, node_size: int | None, ranks: int) -> int | None:
    if asked in (None, "world"):
        return None
    if asked == "node":
        return None if node_size is None else min(node_size, ranks)
    if not str(asked).isdecimal():
        raise ValueError(f"shard_group_size must be a positive integer, node or world, got {asked!r}")
    return int(str(asked))


def make_choices(
    args: argparse.Namespace, model: ModelShapes, layout: RankLayout, memory: int | None = None
) -> list[Choice]:
    """One choice for each method asked for. ValueError for what the options cannot mean."""
    from lota.plan import LoraSettings, MaskCounts, calibration, choose_reduction, full, lora, lota
    from lota.plan.advice import Choice
    from lota.selection import candidates

    check_density(args.density)
    check_reductions(args.gradient_reduction, args.reduce_every)
    if args.lora_rank < 1:
        raise ValueError(f"lora_rank must be at least 1, got {args.lora_rank}")
    part = candidates(model.shapes, args.include, args.exclude, args.dense)
    names = list(part.names)
    mask = None if args.mask is None else _load_mask(args.mask, model)
    if mask is not None:
        names = list(mask.names)
    matrices = LoraSettings(args.lora_rank, tuple(name for name in names if len(model.shapes[name]) == 2))

    def counts_of(choice: Choice) -> MaskCounts:
        if mask is None or choice.density != args.density:
            density = choice.density or args.density
            taken = {"rows": part.rows, "dense": part.dense}
            return MaskCounts.even(model, names, density, choice.layout.shard_size, **taken)
        from lota.zero.compact.mask_counts import mask_counts

        return mask_counts(mask, choice.layout.shard_size)

    def lota_plan(choice: Choice) -> MethodPlan:
        settings: dict[str, Any] = {"reduce_every": choice.reduce_every}
        counts = counts_of(choice)
        return lota(model, choice.layout, counts, reduction=choice.reduction or "compact", **settings)

    def calibration_plan(choice: Choice) -> MethodPlan:
        whole = part.dense if choice.score == "task_vector" and mask is None else ()
        return calibration(model, choice.layout, [*names, *whole], choice.score or "")

    sparse = Choice(
        layout, lota_plan, density=args.density, reduction=args.gradient_reduction, reduce_every=args.reduce_every
    )
    if args.gradient_reduction == "auto":
        chosen, _ = choose_reduction(
            lambda kind: lota_plan(replace(sparse, reduction=kind)),
            memory,
            shard_size=layout.shard_size,
            reduce_every=args.reduce_every,
        )
        sparse = replace(sparse, reduction=chosen)
    scores = ["task_vector", "gradient"] if args.score is None else [args.score]
    made = {
        "full": [Choice(layout, lambda choice: full(model, choice.layout))],
        "lora": [Choice(layout, lambda choice: lora(model, choice.layout, matrices))],
        "calibration": [Choice(layout, calibration_plan, score=score) for score in scores],
        "lota": [sparse],
    }
    return [choice for method in METHODS if method in (args.method or METHODS) for choice in made[method]]


def _load_mask(path: Path, model: ModelShapes) -> Any:
    from lota.ticket import Mask

    mask = Mask.load(path)
    for name in mask.names:
        if name not in model.shapes:
            raise ValueError(
                f"{path} names {name}, which {model.name} does not have: it is a mask of another model, or of another "
                "class of this one, which --architecture names"
            )
        if mask.shape(name) != model.shapes[name]:
            raise ValueError(
                f"{path}: {name} has shape {mask.shape(name)}, in {model.name} it has {model.shapes[name]}"
            )
    return mask


def as_json(
    model: ModelShapes, layout: RankLayout, plans: list[MethodPlan], advice: list[str], left_out: list[LeftOut]
) -> dict[str, Any]:
    """All integers of the plans."""
    rows = []
    for plan in plans:
        inside, across = plan.sent(layout)
        rows.append(
            {
                "name": plan.name,
                "note": plan.note,
                "trained": plan.trained,
                "held": plan.held,
                "peak": plan.peak,
                "peak_moment": plan.peak_moment,
                "host_peak": plan.host_peak,
                "host_peak_moment": plan.host_peak_moment,
                "moments": {name: vars(moment) for name, moment in plan.at_moments.items()},
                "device": dict(plan.device),
                "work": dict(plan.work),
                "step": plan.step,
                "uneven": plan.uneven,
                "host": dict(plan.host),
                "sent_inside_node": inside,
                "sent_across_nodes": across,
                "payload": [{"what": t.what, "kind": t.kind, "bytes": t.payload} for t in plan.transfers],
                "checkpoint": plan.checkpoint,
                "outcome": plan.product,
            }
        )
    return {
        "model": model.name,
        "parameters": model.numel(),
        "ranks": layout.ranks,
        "plans": rows,
        "left_out": [asdict(row) for row in left_out],
        "advice": advice,
    }
