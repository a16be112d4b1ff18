"""A run that stops at a checkpoint and resumes gives the very bits of one that never stopped; wrong or damaged
checkpoints are refused on every rank and change nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import lota
from tests.zero import cases

STEPS, STOP = 6, 3


def _optimizer(kind: str, model: torch.nn.Module) -> torch.optim.Optimizer:
    blocks = [p for n, p in model.named_parameters() if n.startswith("blocks.0")]
    rest = [p for n, p in model.named_parameters() if not n.startswith("blocks.0")]
    groups = [{"params": blocks, "lr": 2e-3}, {"params": rest}]
    if kind == "adamw":
        return torch.optim.AdamW(groups, **cases.SETTINGS)
    if kind == "rmsprop":
        return torch.optim.RMSprop(groups, lr=1e-3, weight_decay=0.01)
    if kind == "nadam":  # runs as it is, and keeps a tensor that is no moment
        return torch.optim.NAdam(groups, lr=1e-3)
    raise AssertionError(kind)


def _build(optimizer_kind: str, dtype: torch.dtype, **overrides: Any) -> Any:
    import deepspeed

    world = torch.distributed.get_world_size()
    model = cases.make_model(dtype)
    optimizer = _optimizer(optimizer_kind, model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, lr_scheduler=schedule, config=cases.config(2, world, **overrides)
    )
    return engine


def _steps(engine: Any, first: int, last: int, dtype: torch.dtype) -> None:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    rows = slice(rank * cases.ROWS // world, (rank + 1) * cases.ROWS // world)
    for step in range(first, last + 1):
        for x, flags, target in cases.micro_batches(step, 2):
            if not hasattr(engine.optimizer, "core"):
                flags.fill_(True)  # DeepSpeed's own ZeRO-3 hangs where ranks use different weights
            logits = engine(x[rows].to(dtype), flags[rows])
            engine.backward(F.cross_entropy(logits.float(), target[rows]))
            engine.step()


def _state(engine: Any) -> dict[str, Any]:
    core = engine.run.core
    vectors = {v.key: v.get().clone() for v in core.vectors()}
    return {
        "weights": cases.gathered(engine.module),
        "vectors": vectors,
        "lr": [group["lr"] for group in engine.optimizer.param_groups],
        "counters": [engine.global_steps, engine.global_samples, engine.micro_steps, engine.skipped_steps],
        "steps": getattr(core, "num_steps", None),
        "scale": engine.optimizer.loss_scaler.cur_scale,
    }


def _block(kind: str, shards: int | None) -> Any:
    if kind in ("gradient", "task_vector"):
        return lota.calibration_zero3(score=kind, density=0.1, include=["blocks*"])
    return lota.sparse_zero3(lota.Mask.from_dense(cases.make_masks()), shard_group_size=shards)


def _straight_and_resumed(folder: str, kind: str, dtype: torch.dtype, shards: int | None) -> dict[str, Any]:
    """One run of six steps that saves after three, and one that resumes from there; what each ends with."""
    cases.allow_fp16_on_cpu()
    overrides = (
        {"fp16": {"enabled": True, "initial_scale_power": 17, "hysteresis": 1}} if dtype == torch.float16 else {}
    )
    optimizer_kind = kind if kind in ("adamw", "rmsprop", "nadam") else "adamw"
    with _block(kind, shards):
        engine = _build(optimizer_kind, dtype, **overrides)
        _steps(engine, 1, STOP, dtype)
        engine.save_checkpoint(folder, client_state={"epoch": 1.5})
        written = {p.name: p.stat().st_mtime_ns for p in Path(folder, f"global_step{STOP}").iterdir()}
        torch.distributed.barrier()  # no rank saves again before the other has looked
        engine.save_checkpoint(folder)
        again = {p.name: p.stat().st_mtime_ns for p in Path(folder, f"global_step{STOP}").iterdir()}
        at_stop = _state(engine)
        _steps(engine, STOP + 1, STEPS, dtype)
        straight = _state(engine)
        engine.destroy()
    engine.run.release()
    with _block(kind, shards):
        engine = _build(optimizer_kind, dtype, **overrides)
        path, client_state = engine.load_checkpoint(folder)
        at_resume = _state(engine)
        _steps(engine, STOP + 1, STEPS, dtype)
        resumed = _state(engine)
        engine.destroy()
    engine.run.release()
    return {
        "pairs": [(at_stop, at_resume), (straight, resumed)],
        "path": path,
        "client_state": client_state,
        "rewritten": written != again,
    }


def _assert_same(one: Any, other: Any) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            _assert_same(one[key], other[key])
    else:
        assert one == other


@pytest.mark.parametrize(
    ("kind", "dtype", "ranks_", "shards", "bytes_an_entry"),
    [
        ("adamw", torch.bfloat16, 2, None, 12),
        ("adamw", torch.float16, 2, 1, 12),
        ("rmsprop", torch.float32, 2, None, 8),
        ("nadam", torch.bfloat16, 4, 2, 12),
        ("gradient", torch.bfloat16, 2, None, 4),
        ("task_vector", torch.bfloat16, 2, None, 12),
    ],
)
def test_resumed_is_uninterrupted(ranks, tmp_path, kind, dtype, ranks_, shards, bytes_an_entry):
    for result in ranks(ranks_).run(_straight_and_resumed, str(tmp_path), kind, dtype, shards):
        for one, other in result["pairs"]:
            _assert_same(one, other)
        first, last = result["pairs"][0][0], result["pairs"][1][0]
        assert any(not torch.equal(first["vectors"][key], last["vectors"][key]) for key in first["vectors"])
        assert result["path"] == str(tmp_path / f"global_step{STOP}")
        assert result["client_state"] == {"epoch": 1.5}
        assert not result["rewritten"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"global_step{STOP}", "latest"]
    num_files = shards or ranks_
    names = [f"state-{n + 1:05d}-of-{num_files:05d}.safetensors" for n in range(num_files)]
    folder = tmp_path / f"global_step{STOP}"
    assert sorted(p.name for p in folder.iterdir()) == ["checkpoint.json", *names]
    masks = cases.make_masks()
    dense = sum(p.numel() for name, p in cases.make_model().named_parameters() if name.startswith("blocks"))
    entries = dense if kind in ("gradient", "task_vector") else sum(int(mask.sum()) for mask in masks.values())
    manifest = json.loads((folder / "checkpoint.json").read_text())
    lengths = [length for file in manifest["files"] for length, _ in file["vectors"].values()]
    assert sum(lengths) * 4 == bytes_an_entry * entries


def _save(folder: str) -> dict[str, torch.Tensor]:
    with _block("adamw", None):
        engine = _build("adamw", torch.bfloat16)
        _steps(engine, 1, 2, torch.bfloat16)
        engine.save_checkpoint(folder)
        weights = _state(engine)["weights"]
        engine.destroy()
    engine.run.release()
    return weights


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory):
    """A checkpoint of two ranks, and the weights at that time."""
    folder = tmp_path_factory.mktemp("saved")
    return folder, ranks(2).run(_save, str(folder))[0]


def _load(folder: str) -> dict[str, torch.Tensor]:
    import deepspeed

    model = cases.make_model(torch.bfloat16)
    with _block("adamw", None):
        config = cases.config(2, torch.distributed.get_world_size())
        engine, *_ = deepspeed.initialize(model=model, optimizer=_optimizer("adamw", model), config=config)
        engine.load_checkpoint(folder)
        weights = _state(engine)["weights"]
        engine.destroy()
    engine.run.release()
    return weights


@pytest.mark.parametrize("size", [1, 4])
def test_another_number_of_ranks_finds_its_entries(ranks, saved, size):
    folder, weights = saved
    for found in ranks(size).run(_load, str(folder)):
        _assert_same(found, weights)


def _mistaken(folder: str, mistake: str) -> dict[str, Any]:
    """Load with one thing wrong; the error, and whether anything changed."""
    import deepspeed

    masks = cases.make_masks(0.25 if mistake == "mask" else 0.3)
    model = cases.make_model(torch.bfloat16)
    if mistake == "base":
        with torch.no_grad():
            model.head.weight[0, 0] += 1
    config = cases.config(4 if mistake == "global batch" else 2, torch.distributed.get_world_size())
    kind = "gradient" if mistake == "kind" else "sparse"
    block = _block("gradient", None) if kind == "gradient" else lota.sparse_zero3(lota.Mask.from_dense(masks))
    with block:
        optimizer = _optimizer("rmsprop" if mistake == "optimizer" else "adamw", model)
        if mistake == "groups":
            optimizer = cases.default_optimizer(model)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        before = _state(engine)
        try:
            engine.load_checkpoint(folder, load_module_only=mistake == "options")
        except ValueError as error:
            message = str(error)
        _assert_same(_state(engine), before)
        engine.destroy()
    engine.run.release()
    return {"message": message}


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("mask", "made with another mask: digest"),
        ("base", "made on another base model: head.weight was bfloat16"),
        ("optimizer", "made with another optimizer: adamw; this run has rmsprop"),
        ("groups", "made with another parameter groups: 2; this run has 1"),
        ("global batch", "made with another global batch: 16; this run has 32"),
        ("kind", "is a checkpoint of sparse training, this is calibration"),
        ("options", "load it whole"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(ranks, saved, mistake, message):
    for result in ranks(2).run(_mistaken, str(saved[0]), mistake):
        assert message in result["message"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("cut", "is damaged.*bytes of data"),
        ("flip", "is damaged.*sha256"),
        ("missing", "is damaged.*expected a file, got none"),
        ("manifest cut", "is damaged.*checkpoint.json"),
        ("manifest edited", "does not match its own sha256"),
        ("no manifest", "It was not finished"),
        ("nothing", "holds no file 'latest'"),
    ],
)
def test_a_damaged_checkpoint_is_refused(ranks, saved, tmp_path, damage, message):
    folder = tmp_path / "copy"
    shutil.copytree(saved[0], folder)
    state = folder / "global_step2" / "state-00002-of-00002.safetensors"
    manifest = folder / "global_step2" / "checkpoint.json"
    if damage == "cut":
        os.truncate(state, state.stat().st_size - 1)
    elif damage == "flip":
        data = bytearray(state.read_bytes())
        data[-5] ^= 4
        state.write_bytes(data)
    elif damage == "missing":
        state.unlink()
    elif damage == "manifest cut":
        os.truncate(manifest, manifest.stat().st_size // 2)
    elif damage == "manifest edited":
        manifest.write_text(manifest.read_text().replace('"global_steps": 2', '"global_steps": 9'))
    elif damage == "no manifest":
        manifest.unlink()
    else:
        shutil.rmtree(folder)
        folder.mkdir()
    for result in ranks(2).run(_mistaken, str(folder), damage):
        assert re.search(message, result["message"]), result["message"]


def _failing_save(folder: str, failure: str) -> list[str]:
    """A good save, then one that fails on rank 1 only (disk) or that is asked for at the wrong time."""
    from lota.zero.checkpoint import vectors

    errors = []
    whole = vectors._write_vectors

    def fail(*args: Any) -> Any:
        whole(*args)
        raise OSError(28, "No space left on device")

    with _block("adamw", None):
        engine = _build("adamw", torch.bfloat16)
        _steps(engine, 1, 1, torch.bfloat16)
        engine.save_checkpoint(folder, tag="kept")
        _steps(engine, 2, 2, torch.bfloat16)
        if failure == "between":
            x, flags, target = cases.micro_batches(3, 1)[0]
            engine.backward(F.cross_entropy(engine(x.bfloat16(), flags).float(), target))
        if failure == "disk" and torch.distributed.get_rank() == 1:
            vectors._write_vectors = fail
        try:
            engine.save_checkpoint(folder, tag="kept", client_state={"it": object()} if failure == "client" else {})
        except (ValueError, OSError) as error:
            errors.append(f"{type(error).__name__}: {error}")
        finally:
            vectors._write_vectors = whole
        engine.destroy()
    engine.run.release()
    return errors


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ("disk", "OSError: [Errno 28] No space left on device"),
        ("between", "ValueError: save_checkpoint between backward and step"),
        ("client", "ValueError: a checkpoint keeps numbers, text, lists and dicts, got object"),
    ],
)
def test_a_save_that_fails_fails_on_all_ranks_and_keeps_the_old_one(ranks, tmp_path, failure, message):
    for errors in ranks(2).run(_failing_save, str(tmp_path), failure):
        assert len(errors) == 1 and errors[0].startswith(message)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kept", "latest"]
    manifest = json.loads((tmp_path / "kept" / "checkpoint.json").read_text())
    assert manifest["progress"]["counters"]["global_steps"] == 1


def test_an_older_format_is_refused_and_says_so(ranks, saved, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(saved[0], folder)
    manifest = folder / "global_step2" / "checkpoint.json"
    manifest.write_text(manifest.read_text().replace('"version": 2', '"version": 1'))
    for result in ranks(2).run(_mistaken, str(folder), "version"):
        assert "expected version 2 of the format, got 1: resume with the version of lota that" in result["message"]
