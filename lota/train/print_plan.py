"""Prints, before anything is loaded, what each rank will hold and send."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lota import plan
from lota.ranks.world import print_once, rank, world_size
from lota.run import ds_config
from lota.run.options import Config
from lota.run.resolve import RunOptions
from lota.selection import candidates, eligible, left_out, left_out_lines
from lota.ticket import Mask
from lota.train.phase import training_dtype
from lota.zero.compact.groups import check_shard_group_size, local_size


def print_plan(options: RunOptions, config: Config) -> None:
    """Print the short plan on rank 0. A model that cannot be planned is no reason to stop: loading it will say why."""
    if rank() > 0:
        return
    try:
        layout = layout_of(options, config)
        lines = [*plan.short_lines(plans_of(options, config, layout), layout), *lines_of_left_out(options, config)]
    except (ValueError, OSError, ImportError) as error:
        lines = [f"no plan: {error}"]
    for line in lines:
        print_once(line)


def plans_of(options: RunOptions, config: Config, layout: plan.RankLayout) -> list[plan.MethodPlan]:
    """The phases of this run, in order."""
    model = _model(options, config)
    plans = _phases(options, model, layout)
    is_dense = options.calibration is not None and options.calibration.score == "task_vector"
    has_second = [options.reference == "model" or (options.reference == "ticket" and is_dense and one is plans[0])
                  for one in plans]  # fmt: skip
    plans = [_with_reference(one, model, layout) if has else one for one, has in zip(plans, has_second)]
    if not options.is_policy or options.server is not None or not config.ds3_gather_for_generation:
        return plans
    *before, last = plans
    group = layout.shard_group() if options.is_sparse else layout.world()
    return [*(_with_generation(one, model, layout.world()) for one in before), _with_generation(last, model, group)]


def lines_of_left_out(options: RunOptions, config: Config) -> list[str]:
    """What the calibration of this run, if it has one, leaves out of the model."""
    chosen_by = options.calibration
    if chosen_by is None:
        return []
    shapes = _model(options, config).shapes
    chosen = candidates(shapes, chosen_by.include, chosen_by.exclude, options.dense)
    return left_out_lines(left_out(shapes, {*chosen.names, *chosen.dense}))


def _model(options: RunOptions, config: Config) -> plan.ModelShapes:
    dtype = str(training_dtype(config)).removeprefix("torch.")
    return plan.read_model(
        options.model, revision=options.revision, dtype=dtype, trust_remote_code=options.trust_remote_code
    )


def _phases(options: RunOptions, model: plan.ModelShapes, layout: plan.RankLayout) -> list[plan.MethodPlan]:
    if options.method == "full":
        return [plan.full(model, layout)]
    if options.adapter is not None:
        targets = _lora_targets(options.adapter.target_modules, model)
        return [plan.lora(model, layout, plan.LoraSettings(options.adapter.r, targets))]
    before: list[plan.MethodPlan] = []
    if options.calibration is not None:
        asked = options.calibration
        chosen = candidates(model.shapes, asked.include, asked.exclude, options.dense)
        trained = [*chosen.names, *(chosen.dense if asked.score == "task_vector" else ())]
        before = [plan.calibration(model, layout, trained, asked.score)]
        taken = {"rows": chosen.rows, "dense": chosen.dense}
        counts = plan.MaskCounts.even(model, chosen.names, asked.density, layout.shard_size, **taken)
    else:
        assert options.mask is not None
        mask = Mask.load(options.mask)
        known = [name for name in mask.names if name in model.shapes]  # it may name buffers too
        counts = plan.MaskCounts.even(model, known, mask.density, layout.shard_size)
    reduction = "dense" if options.gradient_reduction == "dense" else "compact"
    return [*before, plan.lota(model, layout, counts, reduction=reduction, is_pulled=options.keeping.pull is not None)]


def _lora_targets(targets: Sequence[str], model: plan.ModelShapes) -> tuple[str, ...]:
    """The matrices that get an adapter, by PEFT's rules: one word is `all-linear` or an expression for whole names,
    several are ends of names."""
    if tuple(targets) == ("all-linear",):
        return tuple(name for name in eligible(model.shapes) if len(model.shapes[name]) == 2)
    pattern = targets[0] if len(targets) == 1 else rf"(.*\.)?({'|'.join(map(re.escape, targets))})"
    found = re.compile(pattern)
    matrices = (name for name, shape in model.shapes.items() if len(shape) == 2)
    return tuple(name for name in matrices if found.fullmatch(name.removesuffix(".weight")))


def _with_reference(phase: plan.MethodPlan, model: plan.ModelShapes, layout: plan.RankLayout) -> plan.MethodPlan:
    """Beside it, the base once more, sharded over all ranks and gathered for one forward pass a micro step."""
    forwards = model.item_bytes * model.numel() * layout.gradient_accumulation_steps
    return replace(
        phase,
        device={**phase.device, "reference": model.item_bytes * model.pieces(layout.ranks)},
        transfers=[*phase.transfers, plan.Transfer("reference", "all_gather", forwards, layout.world())],
    )


def _with_generation(phase: plan.MethodPlan, model: plan.ModelShapes, group: range) -> plan.MethodPlan:
    """With the whole model on every rank, gathered once a step, while answers are generated."""
    if len(group) == 1:
        return phase
    whole = model.item_bytes * model.numel()
    moment = plan.Moment(whole - model.item_bytes * model.pieces(len(group)))
    return replace(
        phase,
        moments={**phase.moments, "generation": moment},
        transfers=[*phase.transfers, plan.Transfer("generation", "all_gather", whole, group)],
    )


def layout_of(options: RunOptions, config: Config) -> plan.RankLayout:
    """Ranks from the launcher's environment, bucket and limits from the DeepSpeed configuration if it has them."""
    content = ds_config.content(config)
    zero = content.get("zero_optimization", {})
    limits = [zero.get(f"stage3_{name}") for name in ("max_live_parameters", "max_reuse_distance")]
    shard_size = check_shard_group_size(options.shard_group_size, world_size())
    return plan.RankLayout(
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
