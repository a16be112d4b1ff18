"""The first half of every run: calibrate on the base, select the mask. Shared by the recipes that need one."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from lota.algebra import ModelTensors, masks
from lota.blocks import calibration_zero3
from lota.choices import STATIC_SCORES
from lota.data.dataset import Sets
from lota.delivery.model_folder import locate
from lota.ranks.agree import together
from lota.ranks.world import print_once, rank
from lota.run.folder import RunFolder
from lota.run.options import Config
from lota.run.resolve import RunOptions
from lota.ticket import Mask
from lota.train.phase import Phase, timed
from lota.train.policy_server import server_of


def calibrate(
    options: RunOptions,
    config: Config,
    data: Sets,
    folder: RunFolder,
    seconds: dict[str, float],
) -> tuple[Mask, dict[str, Any], Sets]:
    """The mask, the same on every rank; facts for the summary; the data, the training set tokenized by now.

    Resumes a stopped run. Collective; the engine is gone afterwards.
    """
    saved = folder.saved_mask()
    if saved is not None:
        print_once(f"mask of this run's calibration: {saved[0].num_active} of {saved[0].eligible} entries")
        return *saved, data
    chosen = options.calibration
    assert chosen is not None
    print_once(f"score {chosen.score}, {chosen.steps} steps, density {chosen.density:g}, {chosen.budget} budget")
    # What scores best on the evaluation set is for the second phase to say.
    changes: dict[str, Any] = {"max_steps": chosen.steps, "load_best_model_at_end": False}
    if config.save_strategy == "best":
        changes["save_strategy"] = "no"
    if chosen.learning_rate is not None:
        changes["learning_rate"] = chosen.learning_rate
    # Where no weight moves, the model is its own reference as it is; a dense run needs a second one.
    as_reference = None if chosen.score == "task_vector" else nullcontext
    # Scores of the gradient kind and of the weights leave the model alone: its loss would be the base's again.
    evaluation = data.evaluation if chosen.score == "task_vector" else None
    with (
        timed(seconds, "calibration"),
        calibration_zero3(
            score=chosen.score,
            density=chosen.density,
            budget=chosen.budget,
            protect=[*chosen.protect, *_on_base(options), *_protected(options, folder)],
            include=chosen.include,
            exclude=chosen.exclude,
            dense=options.dense,
            seed=config.seed,
            max_skipped_steps=options.max_skipped_steps,
        ) as run,
    ):
        rows = Sets(data.train, evaluation)
        phase = Phase("calibrate", options, config, rows, folder, as_reference=as_reference,
                      server=server_of(options, folder), **changes)  # fmt: skip
        facts = phase.run()
    with timed(seconds, "selection"):
        mask = run.mask(keep=chosen.keep_ranking)
        if chosen.keep_ranking:
            run.save_ranking(folder.path / "ranking")
    report = run.report()
    # Packed rows would be packed again, their boundaries lost, and the reference's answers to preferences added twice;
    # `datasets` finds the tokenized rows in its cache.
    is_prepared_again = options.task != "examples" or config.packing
    data = data if is_prepared_again else Sets(phase.prepared, data.evaluation)
    phase.close()
    if chosen.score in STATIC_SCORES:
        facts = {"seconds": facts["seconds"]}
    per_tensor = report.pop("per_tensor", {})
    print_once(
        f"selected {mask.num_active} of {mask.eligible} eligible entries in {len(mask.names)} tensors: density asked "
        f"{chosen.density:g}, reached {mask.density:.8g}"
    )
    if per_tensor:
        fullest = max(per_tensor, key=lambda name: per_tensor[name] / mask.numel(name))
        print_once(f"densest tensor: {fullest} with {per_tensor[fullest] / mask.numel(fullest):.1%} of its entries")
    if report.get("num_zero_scored"):
        print_once(f"{report['num_zero_scored']} chosen entries have score 0: calibrate longer or lower the density")
    facts |= {"report": report, "num_active_per_tensor": per_tensor}
    provenance = {"model": options.model, "score": chosen.score, "steps": chosen.steps}
    folder.save_mask(mask, facts, provenance)
    return mask, facts, data


def _on_base(options: RunOptions) -> tuple[str, ...]:
    """The tickets on the base, whose entries stay as they are unless the run may overwrite them."""
    return () if options.keeping.overlap else options.keeping.tickets


def _protected(options: RunOptions, folder: RunFolder) -> list[str]:
    """The mask of `protect_from`, kept in the run's folder: rank 0 compares the models, the others wait. Collective."""
    chosen = options.calibration
    if chosen is None or chosen.protect_from is None:
        return []
    path = folder.path / "protected"
    with together():
        if rank() == 0 and not path.is_dir():
            base, tuned, density = chosen.protect_from
            trust = options.trust_remote_code
            models = [ModelTensors(locate(model), trust_remote_code=trust) for model in (base, tuned)]
            mask = masks.changed(models[0], models[1], density, chosen.include, chosen.exclude)
            mask.save(path, {"protects": tuned, "against": base, "density": density})
            print_once(f"protected: the {mask.num_active} entries that {tuned} moved most from {base}")
    return [str(path)]


def mask_facts(options: RunOptions, mask: Mask) -> dict[str, Any]:
    """Counts of a mask, for summary.json."""
    return {
        "density_asked": None if options.calibration is None else options.calibration.density,
        "density": mask.density,
        "num_active": mask.num_active,
        "eligible": mask.eligible,
        "num_tensors": len(mask.names),
        "digest": mask.digest,
    }
