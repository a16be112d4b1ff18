"""Preference training leaves what fine-tuning leaves: a ticket, an adapter or a model, each from TRL's DPO losses."""

from __future__ import annotations

import gc
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lota.ticket import Ticket
from lota.train import trainer
from tests.counting import LiveTensors
from tests.train import jobs
from tests.zero.trainers import make_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_base(tmp_path_factory.mktemp("base"))
    rows = map(json.loads, (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines())
    rows = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": r["other"]} for r in rows]
    (folder / "preferences.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


def run(ranks, base: Path, name: str, *options: str) -> Path:
    ranks(2).run(jobs.run_recipe, "train_dpo", words(base, name, *options))
    return base / name


def words(base: Path, name: str, *options: str) -> list[str]:
    files = {"train_file": base / "preferences.jsonl", "eval_file": base / "preferences.jsonl"}
    settings = {
        "model_name_or_path": base,
        "output_dir": base / name,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
    }
    return [*(word for key, value in (files | settings).items() for word in (f"--{key}", str(value))), *options]


def counted(argv: list[str]) -> int:
    """Run the recipe on this rank; bytes of the tensors that are alive after the last backward, whoever holds them."""
    held = []
    step = trainer.DPOTrainer.training_step

    def counted_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = step(self, *args, **kwargs)
        gc.collect()
        held.append(live.nbytes())
        return loss

    with pytest.MonkeyPatch.context() as patch, LiveTensors() as live:
        patch.setattr(trainer.DPOTrainer, "training_step", counted_step)
        jobs.run_recipe("train_dpo", argv)
    return held[-1]


def test_a_ticket_with_a_reference_and_with_its_answers_computed_beforehand(ranks, base: Path) -> None:
    sparse = ("--calibration_steps", "2", "--score", "task_vector")
    output = run(ranks, base, "reference", *sparse, "--merged", "true")
    mask = str(output / "ticket")
    ahead = run(ranks, base, "ahead", "--mask", mask, "--precompute_ref_log_probs", "true")
    # The policy is its own reference at first: log 2.
    assert jobs.losses(output)[0] == pytest.approx(math.log(2), abs=1e-3)
    assert jobs.losses(output)[-1] < jobs.losses(output)[0]
    assert jobs.losses(ahead) == pytest.approx(jobs.losses(output), abs=2e-2)  # bf16 answers, other batch shapes
    summary = jobs.summary(output)
    assert summary["training"]["eval_loss"] < summary["training"]["eval_loss_before"]
    assert summary["training"]["eval_rewards/accuracies"] > 0.5

    # Of a row both answers are shown, the better one first.
    assert (output / "examples.txt").read_text(encoding="utf-8").count("of them trained") == 2 * 8

    ticket = Ticket.load(output / "ticket")
    assert ticket.num_active == round(0.1 * ticket.mask.eligible) and ticket.num_changed > 0
    before, after = load_file(base / "model.safetensors"), load_file(output / "merged" / "model.safetensors")
    for name, tensor in before.items():
        active = ticket.mask.dense(name) if name in ticket.names else torch.zeros_like(tensor, dtype=torch.bool)
        assert torch.equal(after[name][~active], tensor[~active]), name


@pytest.mark.parametrize(
    ("world", "options"), [(1, ()), (2, ("--gradient_checkpointing", "true", "--shard_group_size", "1"))]
)
def test_the_model_itself_is_as_good_a_reference_as_a_second_one(
    ranks, base: Path, world: int, options: tuple[str, ...]
) -> None:
    """The same losses and tickets, bit for bit, and a copy of the weights less."""
    options = (*options, "--score", "gradient", "--calibration_steps", "2", "--max_steps", "20")
    itself, second = base / f"itself_{world}", base / f"second_{world}"
    held = ranks(world).run(counted, words(base, itself.name, *options))
    more = ranks(world).run(counted, words(base, second.name, *options, "--reference", "model"))
    assert jobs.losses(itself) == jobs.losses(second) and len(jobs.losses(itself)) == 20
    assert len(set(jobs.losses(itself))) > 10
    one, two = Ticket.load(itself / "ticket"), Ticket.load(second / "ticket")
    assert one.mask == two.mask
    assert all(torch.equal(one.values(name), two.values(name)) for name in one.names)
    copy = sum(tensor.nbytes for tensor in load_file(base / "model.safetensors").values())
    for own, both in zip(held, more, strict=True):
        # On several ranks DeepSpeed shards the second model, and keeps small tensors whole beside that. The tolerance
        # is for scalars and buffers, which come with the second one's engine.
        spared = both - own
        assert spared == pytest.approx(copy, rel=0.02) if world == 1 else spared >= copy // world, (spared, copy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "full", "--reference", "ticket"), "needs method: lota"),
        (("--method", "lora", "--reference", "model"), "switches its adapter off"),
        (("--reference", "model", "--precompute_ref_log_probs", "true"), "leave one of them out"),
        (("--reference", "ticket", "--sync_ref_model", "true"), "set reference: model"),
        (("--reference", "tiket"), "Did you mean"),
    ],
)
def test_references_that_cannot_be(ranks, base: Path, options: tuple[str, ...], message: str) -> None:
    with pytest.raises(Exception, match=message):
        run(ranks, base, "refused", *options)


def test_an_adapter_is_switched_off_for_the_reference(ranks, base: Path) -> None:
    output = run(ranks, base, "lora", "--method", "lora", "--lora_dropout", "0")
    assert jobs.losses(output)[0] == pytest.approx(math.log(2), abs=1e-3)
    assert jobs.losses(output)[-1] < jobs.losses(output)[0]
    assert (output / "adapter" / "adapter_model.safetensors").exists()


def test_a_run_that_stopped_after_a_checkpoint_gives_the_same_ticket(ranks, base: Path) -> None:
    options = ("--calibration_steps", "2", "--score", "gradient", "--save_steps", "2", "--max_steps", "5")
    straight = run(ranks, base, "straight", *options)
    stopped = base / "stopped"
    stopped.mkdir()
    for name in ("config.yaml", "run.json", "metrics.jsonl", "calibration.json"):
        shutil.copy(straight / name, stopped / name)
    for name in ("mask", "checkpoint-2"):
        shutil.copytree(straight / name, stopped / name)
    run(ranks, base, "stopped", *options, "--resume_from_checkpoint", "true")
    assert jobs.summary(stopped)["training"]["resumed_from_step"] == 2
    for name in ("ticket.safetensors", "ticket.json"):
        assert (stopped / "ticket" / name).read_bytes() == (straight / "ticket" / name).read_bytes()
    assert jobs.losses(stopped) == jobs.losses(straight) and len(jobs.losses(stopped)) == 5
