"""The training jobs: a ticket (or, to compare, the whole model or an adapter) on examples or preferences, or a mask."""

from __future__ import annotations

import time
from typing import Any

import torch

from lota.blocks import sparse_zero3
from lota.data import checks, dataset
from lota.ranks.agree import alike, check_output_dir, check_same
from lota.ranks.process import watch_ranks
from lota.ranks.stop import listening
from lota.ranks.world import join_world, say, world_size
from lota.run import ds_config
from lota.run.folder import RunFolder, versions
from lota.run.options import Config, LotaArguments, PreferenceConfig, RecipeConfig, parse
from lota.run.validate import validate
from lota.ticket import Mask
from lota.train import lora, whole_model
from lota.train.calibrate import calibrate, mask_facts
from lota.train.phase import Phase, timed, training_dtype
from lota.train.say_plan import say_plan
from lota.zero.compact.groups import check_shard_group_size
from lota.zero.deepspeed.dense_report import dense_report


@listening()
def main(config_class: type[Config] = RecipeConfig) -> None:
    """config_class: RecipeConfig fine-tunes on examples, PreferenceConfig (recipes/train_dpo.py) on preferences."""
    started = time.monotonic()
    join_world()
    with alike():
        args, config = parse(config_class=config_class)
    watch_ranks()
    with alike():
        notes = validate(args, config)
        check_shard_group_size(args.shard_group_size, world_size())
    say_plan(args, config)
    check_output_dir(str(config.output_dir))
    with alike():
        sets = dataset.load(args, config.seed, is_preference=config_class is PreferenceConfig)
        notes += checks.check(sets, args, config)
    check_same("rows", dataset.identity(sets))
    folder = RunFolder(args, config)
    for note in notes:
        say(note)
    say(f"{args.method} on {args.model_name_or_path}, {world_size()} ranks, weights in {training_dtype(config)}")

    seconds: dict[str, float] = {}
    summary: dict[str, Any] = {"method": args.method, "model": args.model_name_or_path, "world_size": world_size()}
    if args.method in ("full", "lora"):
        train_densely(args, config, sets, folder, seconds, summary)
    else:
        train_ticket(args, config, sets, folder, seconds, summary)

    seconds["total"] = round(time.monotonic() - started, 2)
    summary |= {"seconds": seconds, "versions": versions()}
    folder.draw_report(summary)
    folder.write_summary(summary)
    say(f"done in {seconds['total']:.0f} s; {folder.path / 'summary.json'} has the figures")


def train_densely(
    args: LotaArguments,
    config: Any,
    sets: Any,
    folder: RunFolder,
    seconds: dict[str, float],
    summary: dict[str, Any],
) -> None:
    """Train all weights, or an adapter, with DeepSpeed's own ZeRO-3; `summary` gets what LoTA's would. Collective."""
    with timed(seconds, "training"):
        phase = Phase("train", args, config, sets, folder)
        facts = phase.run()
    engine = phase.trainer.deepspeed
    report = dense_report(engine, phase.num_micro_steps)
    summary["training"] = facts | {"report": report}
    say(f"held {sum(report['bytes_held'].values()) / 2**20:.1f} MiB a rank for model states")
    if args.method == "lora":
        with timed(seconds, "adapter"):
            summary["adapter"] = lora.save_adapter(engine, folder.path / "adapter", args)
    if args.merged:
        with timed(seconds, "merged"):
            whole_model.save_sharded(engine, folder.path / "merged", args)
    phase.close()


def train_ticket(
    args: LotaArguments,
    config: Any,
    sets: Any,
    folder: RunFolder,
    seconds: dict[str, float],
    summary: dict[str, Any],
) -> None:
    """Find the mask, rewind, train the active entries, and write the ticket; what was seen goes into `summary`.
    Collective."""
    if args.mask is not None:
        mask = Mask.load(args.mask)
        say(f"mask from {args.mask}: {mask.num_active} of {mask.eligible} entries, density {mask.density:.8g}")
    else:
        mask, summary["calibration"], sets = calibrate(args, config, sets, folder, seconds)
    summary["mask"] = mask_facts(args, mask)
    changes, notes = ds_config.for_sparse_training(config)
    for note in notes:
        say(note)
    with (
        timed(seconds, "training"),
        sparse_zero3(
            mask,
            dense=args.dense,
            shard_group_size=args.shard_group_size,
            gradient_reduction=args.gradient_reduction,
            kernels=args.kernels,
            max_skipped_steps=args.max_skipped_steps,
            rounding_seed=args.rounding_seed,
        ) as run,
    ):
        del mask  # once the engine is built, only rank 0 keeps its indices
        phase = Phase("train", args, config, sets, folder, **changes)
        facts = phase.run()
    report = run.report()
    summary["training"] = facts | {"report": report}
    with timed(seconds, "ticket"):
        ticket = run.save_ticket(
            folder.path / "ticket",
            provenance={
                "model": args.model_name_or_path,
                "revision": args.model_revision,
                "score": args.score or "from a mask",
                "data": dataset.describe(args),
                "steps": facts["steps"],
                "learning_rate": config.learning_rate,
                "versions": versions(),
            },
            dtype=torch.float32 if args.ticket_dtype == "float32" else None,
            overwrite=True,  # of a run that was stopped between its ticket and its summary
        )
    folder.write_card(
        {
            "density asked": args.density,
            "calibration steps": summary.get("calibration", {}).get("steps"),
            "evaluation loss before": facts.get("eval_loss_before"),
            "evaluation loss after": facts.get("eval_loss"),
            "training loss at the last step": facts["last_step_loss"],
        }
    )
    phase.close()
    summary["ticket"] = ticket | {"bits_per_eligible_weight": 8 * ticket["bytes"] / run.mask.eligible}
    held, dense = sum(report["bytes_held"].values()), sum(report["bytes_held_dense"].values())
    say(f"held {held / 2**20:.1f} MiB a rank for model states; dense ZeRO-3 would hold {dense / 2**20:.1f} MiB")
    say(f"{ticket['num_changed']} of {ticket['num_active']} trained entries changed")
    say(f"ticket: {ticket['bytes'] / 2**20:.2f} MiB in {folder.path / 'ticket'}")
    if args.merged:
        with timed(seconds, "merged"):
            whole_model.save_applied(args, training_dtype(config), folder.path / "ticket", folder.path / "merged")


def main_dpo() -> None:
    """The same job on preferences."""
    main(PreferenceConfig)


@listening()
def main_mask() -> None:
    started = time.monotonic()
    join_world()
    with alike():
        args, config = parse()
    watch_ranks()
    with alike():
        notes = validate(args, config, mask_only=True)
    check_output_dir(str(config.output_dir))
    with alike():
        sets = dataset.load(args, config.seed)
        notes += checks.check(sets, args, config)
    check_same("rows", dataset.identity(sets))
    folder = RunFolder(args, config)
    for note in notes:
        say(note)

    seconds: dict[str, float] = {}
    mask, facts, _ = calibrate(args, config, sets, folder, seconds)
    seconds["total"] = round(time.monotonic() - started, 2)
    summary: dict[str, Any] = {"model": args.model_name_or_path, "world_size": world_size(), "calibration": facts}
    summary |= {"mask": mask_facts(args, mask), "seconds": seconds, "versions": versions()}
    folder.draw_report(summary)
    folder.write_summary(summary)
    say(f"mask in {folder.path / 'mask'}, done in {seconds['total']:.0f} s")
