"""The training jobs, in five acts: parse, load data, calibrate, train, deliver.

`main` makes a ticket (or, to compare, trains the whole model or an adapter) from examples, `main_dpo` from preferences,
`main_grpo` from a reward, and `main_mask` stops at the mask. Every rank runs them, under `lota.ranks.process.run_job`.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch

from lota.blocks import sparse_zero3
from lota.data import checks, dataset
from lota.data.dataset import Sets
from lota.data.options import DataPlan, plan_data
from lota.data.tokenizer import chat_template
from lota.delivery.base import check_base
from lota.ranks.agree import check_output_dir, check_same, checked_together
from lota.ranks.process import watch_ranks
from lota.ranks.stop import listening
from lota.ranks.world import join_world, print_once, world_size
from lota.run import ds_config
from lota.run.arguments import LotaArguments
from lota.run.folder import RunFolder, versions
from lota.run.options import Config, PolicyConfig, PreferenceConfig, RecipeConfig, parse, require_output_dir
from lota.run.resolve import RunOptions, resolve
from lota.ticket import Mask, Ticket
from lota.train import lora, rewards, whole_model
from lota.train.calibrate import calibrate, mask_facts
from lota.train.dial import kept_rows, turn
from lota.train.divergence import divergence_from_base
from lota.train.importance import leave_importance, pull_line, retained
from lota.train.phase import Phase, timed, training_dtype
from lota.train.policy_server import connect, server_of
from lota.train.print_plan import print_plan
from lota.train.rehearse import rehearse
from lota.zero.deepspeed.dense_report import dense_report


def main(argv: list[str] | None = None, config_class: type[Config] = RecipeConfig) -> None:
    """config_class: RecipeConfig trains on examples, PreferenceConfig on preferences, PolicyConfig on a reward. argv:
    None takes sys.argv."""
    with listening(), ExitStack() as closing:
        job = parse_options(argv, config_class)
        load_data(job)
        closing.callback(job.folder.close)
        if job.options.is_sparse:
            find_mask(job)
            deliver_ticket(job, train(job))
        else:
            deliver_model(job, train_whole(job))
        finish(job)


def main_dpo(argv: list[str] | None = None) -> None:
    """The same on preferences."""
    main(argv, PreferenceConfig)


def main_grpo(argv: list[str] | None = None) -> None:
    """The same on a reward: the model writes answers to prompts, and functions of the user's judge them."""
    main(argv, PolicyConfig)


def main_mask(argv: list[str] | None = None) -> None:
    """Calibrate, and stop at the mask."""
    with listening(), ExitStack() as closing:
        job = parse_options(argv, mask_only=True)
        load_data(job)
        closing.callback(job.folder.close)
        find_mask(job)
        print_once(f"mask in {job.folder.path / 'mask'}")
        finish(job)


@dataclass
class Job:
    """One run of this process: what was asked for, what it reads and writes, and what the summary will say of it."""

    args: LotaArguments
    config: Config
    options: RunOptions
    started: float
    seconds: dict[str, float] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    plan: DataPlan = field(init=False)
    sets: Sets = field(init=False)
    folder: RunFolder = field(init=False)
    mask: Mask | None = None  # until training has it, which keeps its indices on rank 0 only
    is_disjoint: bool = True  # of the tickets that are on the base


@dataclass
class Trained:
    """The outcome of training. phase: holds the engine until it is delivered. run: of a ticket, the block's."""

    phase: Phase
    facts: dict[str, Any]
    run: Any = None


def parse_options(argv: list[str] | None, config_class: type[Config] = RecipeConfig, mask_only: bool = False) -> Job:
    """Join the other ranks, settle the options, print the plan. Collective; ValueError on every rank for bad ones."""
    started = time.monotonic()
    join_world()
    with checked_together():
        args, config = parse(argv, config_class)
        require_output_dir(argv)
    watch_ranks()
    with checked_together():
        options = resolve(args, config, mask_only=mask_only, argv=argv)
        check_base(
            options.model,
            options.revision,
            trust_remote_code=options.trust_remote_code,
            is_whole=not options.dense,
            needs_safetensors=options.merged and options.is_sparse,
        )
        if not mask_only:
            rehearse(options, config)
        rewards.load(options.rewards)
    if not mask_only:
        print_plan(options, config)
    check_output_dir(str(config.output_dir))
    return Job(args, config, options, started)


def load_data(job: Job) -> None:
    """Read and check the rows, and open the run's folder. Collective."""
    options, config = job.options, job.config
    with checked_together():
        job.plan = plan_data(job.args)
        job.sets = dataset.load(job.plan, config.seed, options.task)
        notes = [
            *options.notes,
            *_check_rows(job),
        ]
        if options.rewards:
            rewards.try_out(rewards.load(options.rewards), job.sets.train)
    check_same("rows", dataset.identity(job.sets))
    connect(options)
    job.folder = RunFolder(options, config, job.plan)
    job.summary |= {"method": options.method, "model": options.model, "world_size": world_size()}
    for note in notes:
        print_once(note)
    ranks = "1 rank" if world_size() == 1 else f"{world_size()} ranks"
    print_once(f"{options.method} on {options.model}, {ranks}, weights in {training_dtype(config)}")


def _check_rows(job: Job) -> list[str]:
    options = job.options
    return checks.check(
        job.sets,
        options.model,
        options.revision,
        job.config,
        options.trust_remote_code,
        lambda roles: dataset.place_of_roles(job.plan, roles, options.task),
    )


def find_mask(job: Job) -> None:
    """Load the mask that was given, or calibrate and select one. Collective."""
    if job.options.mask is not None:
        mask = Mask.load(job.options.mask)
        counts = f"{mask.num_active} of {mask.eligible} entries, density {mask.density:.8g}"
        print_once(f"mask from {job.options.mask}: {counts}")
    else:
        mask, job.summary["calibration"], job.sets = calibrate(
            job.options, job.config, job.sets, job.folder, job.seconds
        )
    job.summary["mask"] = mask_facts(job.options, mask)
    job.mask = mask
    keeping = job.options.keeping
    for path in keeping.tickets:
        shared = mask.overlap(Mask.load(path))
        job.is_disjoint &= shared == 0
        if shared and not keeping.overlap:
            raise ValueError(
                f"the mask shares {shared} entries with {path}, which is on the base: take another mask, or set "
                "overlap: true to overwrite them"
            )


def train(job: Job) -> Trained:
    """Rewind to the base and train the active entries. Collective."""
    options = job.options
    mask, job.mask = job.mask, None
    retain = retained(job.options, job.config, job.folder, job.seconds)
    kept = kept_rows(options, job.config)
    changes, notes = ds_config.for_sparse_training(job.config)
    for note in notes:
        print_once(note)
    with (
        timed(job.seconds, "training"),
        sparse_zero3(
            mask,
            dense=options.dense,
            shard_group_size=options.shard_group_size,
            gradient_reduction=options.gradient_reduction,
            kernels=options.kernels,
            max_skipped_steps=options.max_skipped_steps,
            rounding_seed=options.rounding_seed,
            retain=retain,
            pull=options.keeping.pull,
        ) as run,
    ):
        del mask  # once the engine is built, only rank 0 keeps its indices
        phase = Phase("train", options, job.config, job.sets, job.folder, kept=kept, as_reference=run.base,
                      server=server_of(options, job.folder, run), **changes)  # fmt: skip
        if run.retained is not None:
            run.retained.num_steps = lambda: phase.trainer.num_training_steps
        facts = phase.run()
    if kept:
        with timed(job.seconds, "dial"):
            facts |= turn(options, phase, run, job.sets)
    if options.task == "examples":
        with timed(job.seconds, "divergence"):
            facts["kl_to_base"] = divergence_from_base(phase, run)
        if facts["kl_to_base"] is not None:
            print_once(f"divergence from the base on the evaluation rows: {facts['kl_to_base']:.4g} nats per token")
    report = run.report()
    if "pull" in report:
        print_once(pull_line(report["pull"]))
    return Trained(phase, facts | {"report": report}, run)


def train_whole(job: Job) -> Trained:
    """Train all weights, or an adapter, with DeepSpeed's own ZeRO-3, to compare. Collective."""
    with timed(job.seconds, "training"):
        phase = Phase("train", job.options, job.config, job.sets, job.folder)
        facts = phase.run()
    return Trained(phase, facts | {"report": dense_report(phase.trainer.deepspeed, phase.num_micro_steps)})


def deliver_ticket(job: Job, trained: Trained) -> None:
    """Write the ticket and its card, and on request the merged model. Collective."""
    options, folder, run, facts = job.options, job.folder, trained.run, trained.facts
    report = facts["report"]
    job.summary["training"] = facts
    with timed(job.seconds, "ticket"):
        ticket = run.save_ticket(
            folder.path / "ticket",
            provenance={
                "model": options.model,
                "revision": options.revision,
                "score": options.calibration.score if options.calibration else "from a mask",
                "data": job.plan.describe(),
                **({"reward": list(options.rewards)} if options.rewards else {}),
                "steps": facts["steps"],
                "learning_rate": job.config.learning_rate,
                **({"tickets": list(options.keeping.tickets)} if options.keeping.tickets else {}),
                **({"pull": report["pull"]["asked"]} if "pull" in report else {}),
                **({"alpha": facts["dial"]["alpha"]} if "dial" in facts else {}),
                "versions": versions(),
            },
            dtype=torch.float32 if options.ticket_dtype == "float32" else None,
            overwrite=True,  # of a run that was stopped between its ticket and its summary
            form=options.ticket_form,
            beside=[Ticket.load(path) for path in options.keeping.tickets] if job.is_disjoint else (),
        )
    folder.write_card(
        {
            "density asked": options.calibration.density if options.calibration else None,
            "calibration steps": job.summary.get("calibration", {}).get("steps"),
            **(
                {}
                if options.is_policy
                else {
                    "evaluation loss before": facts.get("eval_loss_before"),
                    "evaluation loss after": facts.get("eval_loss"),
                }
            ),
            "reward before": facts.get("eval_reward_before", facts.get("reward_at_start")),
            "reward after": facts.get("eval_reward", facts.get("reward_at_end")),
            "training loss at the last step": facts["last_step_loss"],
        }
    )
    trained.phase.close()
    job.summary["ticket"] = ticket | {"bits_per_eligible_weight": 8 * ticket["bytes"] / run.mask.eligible}
    held, dense = sum(report["bytes_held"].values()), sum(report["bytes_held_dense"].values())
    print_once(f"held {held / 2**20:.1f} MiB a rank for model states; dense ZeRO-3 would hold {dense / 2**20:.1f} MiB")
    print_once(f"{ticket['num_changed']} of {ticket['num_active']} trained entries changed")
    print_once(f"ticket: {ticket['bytes'] / 2**20:.2f} MiB in {folder.path / 'ticket'}")
    if options.keeping.keep_importance:
        job.summary["importance"] = leave_importance(options, job.config, job.sets.train, folder, job.seconds)
    if options.merged:
        with timed(job.seconds, "merged"):
            whole_model.save_applied(
                options,
                training_dtype(job.config),
                folder.path / "ticket",
                folder.path / "merged",
                _template(job),
                is_disjoint=job.is_disjoint,
            )


def deliver_model(job: Job, trained: Trained) -> None:
    """Write the adapter, and on request the whole model. Collective."""
    options, folder, engine = job.options, job.folder, trained.phase.trainer.deepspeed
    job.summary["training"] = trained.facts
    held = sum(trained.facts["report"]["bytes_held"].values())
    print_once(f"held {held / 2**20:.1f} MiB a rank for model states")
    if options.adapter is not None:
        with timed(job.seconds, "adapter"):
            job.summary["adapter"] = lora.save_adapter(engine, folder.path / "adapter", options)
    if options.merged:
        with timed(job.seconds, "merged"):
            whole_model.save_sharded(engine, folder.path / "merged", options, _template(job))
    trained.phase.close()


def _template(job: Job) -> str | None:
    """The path of the chat template that the run trains with, where it is not the tokenizer's own."""
    return chat_template(getattr(job.config, "chat_template_path", None))


def finish(job: Job) -> None:
    """The picture and summary.json, with which the run is complete."""
    job.seconds["total"] = round(time.monotonic() - job.started, 2)
    job.summary |= {"seconds": job.seconds, "versions": versions()}
    job.folder.draw_report(job.summary)
    job.folder.write_summary(job.summary)
    print_once(f"done in {job.seconds['total']:.0f} s; {job.folder.path / 'summary.json'} has the figures")
