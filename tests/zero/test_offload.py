"""Offloading to the CPU changes where things lie, not what comes out: weights in training, the optimizer in
calibration, and both in a recipe.

torch's Adam on offloaded states does the same arithmetic, so bits are compared. DeepSpeed's own (`DeepSpeedCPUAdam`,
compiled at its first use for about a minute) fuses it, so its scores are compared to a bound.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import lota
from tests.data import tiny
from tests.train import jobs
from tests.zero import cases
from tests.zero.test_calibration import STEPS, _batches

TO_CPU = {"device": "cpu"}


def _sparse(masks: dict[str, torch.Tensor], folder: str, offload: bool, options: dict[str, Any]) -> dict[str, Any]:
    zero = {"offload_param": TO_CPU} if offload else {}
    result = cases.sparse_run(
        masks, 5, 2, f"{folder}/{'offloaded' if offload else 'plain'}", config={"zero": zero}, **options
    )
    return {key: result[key] for key in ("first", "norms", "after")}


@pytest.mark.parametrize("options", [{}, {"gradient_reduction": "dense"}, {"shard_group_size": 1}])
def test_offloaded_weights_train_to_the_same_bits(ranks, tmp_path, options):
    masks = cases.make_masks()
    plain, offloaded = (ranks(2).run(_sparse, masks, str(tmp_path), offload, options) for offload in (False, True))
    for one, other in zip(plain, offloaded, strict=True):
        assert one["norms"] == other["norms"]
        for kind in ("first", "after"):
            assert all(torch.equal(one[kind][name], other[kind][name]) for name in one[kind])
    _assert_same_ticket(tmp_path / "plain", tmp_path / "offloaded")


def _assert_same_ticket(one: Path, other: Path) -> None:
    first, second = lota.Ticket.load(one), lota.Ticket.load(other)
    assert first.mask == second.mask and first.num_changed > 0.8 * first.num_active
    for name in first.names:
        assert torch.equal(first.values(name), second.values(name)), name
        assert torch.equal(first.base_values(name), second.base_values(name)), name


def _calibrate(offload: bool, with_deepspeeds: bool) -> dict[str, Any]:
    """Three steps of dense training and the mask of their task vector."""
    import deepspeed

    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model = cases.make_model()
    rows = cases.ROWS // world
    config = cases.config(2, world, zero={"offload_optimizer": TO_CPU} if offload else {}, gradient_clipping=0.0)
    optimizer = cases.default_optimizer(model)
    if with_deepspeeds:
        optimizer = deepspeed.ops.adam.DeepSpeedCPUAdam(model.parameters(), **cases.SETTINGS, adamw_mode=True)
    else:
        config["zero_force_ds_cpu_optimizer"] = False
    with lota.calibration_zero3(score="task_vector", density=0.2, include=["*blocks*"]) as run:
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        is_offloaded = bool(engine.optimizer.offload_optimizer)
        for step in range(1, STEPS + 1):
            for x, flags, target in _batches(step, 2):
                mine = slice(rank * rows, (rank + 1) * rows)
                logits = engine(x[mine], torch.ones_like(flags[mine]))
                engine.backward(torch.nn.functional.cross_entropy(logits, target[mine]))
                engine.step()
    scores = {name: values.clone() for name, _, values in run._run.scores()}
    result = {"scores": scores, "mask": run.mask(), "is_offloaded": is_offloaded}
    engine.destroy()
    return result


def _both(with_deepspeeds: bool) -> list[dict[str, Any]]:
    return [_calibrate(False, False), _calibrate(True, with_deepspeeds)]


@pytest.mark.parametrize("with_deepspeeds", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_calibration_with_an_offloaded_optimizer_chooses_the_same_mask(ranks, with_deepspeeds):
    for plain, offloaded in ranks(2).run(_both, with_deepspeeds):
        assert [plain["is_offloaded"], offloaded["is_offloaded"]] == [False, True]
        assert plain["mask"] == offloaded["mask"]
        for name, expected in plain["scores"].items():
            found = offloaded["scores"][name]
            if with_deepspeeds:
                # fused multiply-adds round each of three updates of about lr, and the weight below 2 they are added to
                assert (found - expected).abs().max() < 1e-6, name
            else:
                assert torch.equal(found, expected), name


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(5)
    tiny.save(folder, hidden_size=32, intermediate_size=64, initializer_range=0.2)
    rows = [{"prompt": a + " " + b, "completion": b + " " + a} for a in tiny.WORDS for b in tiny.WORDS]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return folder


def _recipe(base: Path, output: Path, zero: dict[str, Any]) -> list[str]:
    """Both phases with torch's Adam."""
    raw = json.loads((jobs.ROOT / "ds_configs" / "zero3.json").read_text(encoding="utf-8"))
    raw["zero_optimization"] |= zero
    path = output.with_suffix(".json")
    path.write_text(json.dumps(raw | {"zero_force_ds_cpu_optimizer": False}), encoding="utf-8")
    chosen = {
        "model_name_or_path": base,
        "train_file": base / "rows.jsonl",
        "output_dir": output,
        "deepspeed": path,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "score": "task_vector",
        "calibration_steps": 3,
        "density": 0.3,
        "bf16": "true",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
    }
    return [word for key, value in chosen.items() for word in (f"--{key}", str(value))]


def test_a_recipe_with_both_writes_the_same_ticket(ranks, base, tmp_path):
    both = {"offload_optimizer": TO_CPU, "offload_param": TO_CPU}
    for name, zero in (("plain", {}), ("offloaded", both)):
        ranks(2).run(jobs.run_recipe, "train_lota", _recipe(base, tmp_path / name, zero))
    _assert_same_ticket(tmp_path / "plain" / "ticket", tmp_path / "offloaded" / "ticket")
