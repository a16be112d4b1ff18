"""The first lines of a run: what each rank will hold, need and send, said before anything is loaded."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

from lota import plan
from lota.ranks.world import rank, say, world_size
from lota.run import ds_config
from lota.run.options import Config, LotaArguments
from lota.selection import candidates, eligible, left_out, left_out_lines
from lota.ticket import Mask
from lota.train.phase import needs_reference, training_dtype
from lota.zero.compact.groups import check_shard_group_size, local_size


def say_plan(args: LotaArguments, config: Config) -> None:
    """Print the short plan on rank 0. A model that cannot be planned is no reason to stop: loading it will tell."""
    if rank() > 0:
        return
    try:
        layout = layout_of(args, config)
        lines = [*plan.short_lines(plans_of(args, config, layout), layout), *lines_of_left_out(args, config)]
    except (ValueError, OSError, ImportError) as error:
        lines = [f"no plan: {error}"]
    for line in lines:
        say(line)


def plans_of(args: LotaArguments, config: Config, layout: plan.Layout) -> list[plan.MethodPlan]:
    """The phases of this run, in order."""
    model = _model(args, config)
    plans = _phases(args, model, layout)
    return [_with_reference(one, model, layout) for one in plans] if needs_reference(args, config) else plans


def lines_of_left_out(args: LotaArguments, config: Config) -> list[str]:
    """What the calibration of this run, if it has one, leaves out of the model."""
    if args.method != "lota" or args.mask is not None:
        return []
    shapes = _model(args, config).shapes
    chosen = candidates(shapes, args.include, args.exclude, args.dense)
    return left_out_lines(left_out(shapes, {*chosen.names, *chosen.dense}))


def _model(args: LotaArguments, config: Config) -> plan.ModelShapes:
    assert args.model_name_or_path is not None
    dtype = str(training_dtype(config)).removeprefix("torch.")
    return plan.read_model(args.model_name_or_path, revision=args.model_revision, dtype=dtype)


def _phases(args: LotaArguments, model: plan.ModelShapes, layout: plan.Layout) -> list[plan.MethodPlan]:
    if args.method == "full":
        return [plan.full(model, layout)]
    if args.method == "lora":
        return [plan.lora(model, layout, plan.LoraSettings(args.lora_r or 16, _lora_targets(args, model)))]
    if args.mask is not None:
        mask = Mask.load(args.mask)
        known = [name for name in mask.names if name in model.shapes]  # it may name buffers too
        counts = plan.MaskCounts.even(model, known, mask.density, layout.shard_size)
        before = []
    else:
        chosen = candidates(model.shapes, args.include, args.exclude, args.dense)
        score, taken = args.score or "task_vector", {"rows": chosen.rows, "dense": chosen.dense}
        trained = [*chosen.names, *(chosen.dense if score == "task_vector" else ())]
        before = [plan.calibration(model, layout, trained, score)]
        counts = plan.MaskCounts.even(model, chosen.names, args.density or 0.1, layout.shard_size, **taken)
    reduction = "dense" if args.gradient_reduction == "dense" else "compact"
    return [*before, plan.lota(model, layout, counts, reduction=reduction)]


def _lora_targets(args: LotaArguments, model: plan.ModelShapes) -> tuple[str, ...]:
    """The matrices that get an adapter, by PEFT's rules: one word is `all-linear` or an expression for whole names,
    several are ends of names."""
    targets = args.lora_target_modules or ["all-linear"]
    if targets == ["all-linear"]:
        return tuple(name for name in eligible(model.shapes) if len(model.shapes[name]) == 2)
    pattern = targets[0] if len(targets) == 1 else rf"(.*\.)?({'|'.join(map(re.escape, targets))})"
    found = re.compile(pattern)
    matrices = (name for name, shape in model.shapes.items() if len(shape) == 2)
    return tuple(name for name in matrices if found.fullmatch(name.removesuffix(".weight")))


def _with_reference(phase: plan.MethodPlan, model: plan.ModelShapes, layout: plan.Layout) -> plan.MethodPlan:
    """Beside it, the base once more, sharded over all ranks and gathered for one forward pass a micro step."""
    forwards = model.item_bytes * model.numel() * layout.gradient_accumulation_steps
    return replace(
        phase,
        device={**phase.device, "reference": model.item_bytes * model.pieces(layout.ranks)},
        transfers=[*phase.transfers, plan.Transfer("reference", "all_gather", forwards, layout.world())],
    )


def layout_of(args: LotaArguments, config: Config) -> plan.Layout:
    """Ranks from the launcher's environment, bucket and limits from the DeepSpeed configuration if it has them."""
    content = ds_config.content(config)
    zero = content.get("zero_optimization", {})
    limits = [zero.get(f"stage3_{name}") for name in ("max_live_parameters", "max_reuse_distance")]
    shard_size = check_shard_group_size(args.shard_group_size, world_size())
    return plan.Layout(
        ranks=world_size(),
        node_size=local_size() or world_size(),
        shard_group_size=None if shard_size == world_size() else shard_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        gradient_checkpointing=config.gradient_checkpointing,
        bucket=_number(zero.get("reduce_bucket_size")),
        persistence_threshold=_number(zero.get("stage3_param_persistence_threshold")),
        live_parameters=min((n for n in map(_number, limits) if n is not None), default=1_000_000_000),
        communication_bytes=2 if content.get("communication_data_type") == "bf16" else 4,
        offload_param=_is_offloaded(zero, "offload_param"),
        offload_optimizer=_is_offloaded(zero, "offload_optimizer"),
    )


def _number(value: Any) -> int | None:
    return int(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _is_offloaded(zero: dict[str, Any], key: str) -> bool:
    return (zero.get(key) or {}).get("device", "none") != "none"
