"""Skipped steps, loss scaling, parameter groups, schedulers, other optimizers and DeepSpeed's accessors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import lota
from tests.zero import cases


def _train(
    steps: int,
    make_optimizer: Any = cases.default_optimizer,
    dtype: torch.dtype = torch.float32,
    poison: tuple[int, int] | None = None,
    schedule: bool = False,
    **overrides: Any,
) -> dict[str, Any]:
    """Train a few steps; poison=(step, rank) makes that rank's loss infinite once."""
    import deepspeed

    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    cases.allow_fp16_on_cpu()
    model = cases.make_model(dtype)
    masks = cases.make_masks()
    optimizer = make_optimizer(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)) if schedule else None
    snapshots = []
    with lota.sparse_zero3(lota.Mask.from_dense(masks)) as run:
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, lr_scheduler=scheduler, config=cases.config(1, world, **overrides)
        )
        rows = slice(rank * cases.ROWS // world, (rank + 1) * cases.ROWS // world)
        for step in range(1, steps + 1):
            ((x, flags, target),) = cases.micro_batches(step, 1)
            loss = F.cross_entropy(engine(x[rows].to(dtype), flags[rows]).float(), target[rows])
            engine.backward(loss * float("inf") if poison == (step, rank) else loss)
            engine.step()
            snapshots.append(cases.gathered(engine.module) | {"applied": engine.was_step_applied()})
        states = [{"master": s.master.clone(), **{k: v.clone() for k, v in s.moments.items()}} for s in run.core.states]
        result = {
            "snapshots": snapshots,
            "report": run.report(),
            "states": states,
            "scale": engine.optimizer.loss_scale,
            "norm": float(engine.get_global_grad_norm()),
        }
        engine.destroy()
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_non_finite_norm_skips_the_step_on_every_rank(ranks, dtype):
    overrides: dict[str, Any] = {}
    if dtype == torch.bfloat16:
        overrides["bf16"] = {"enabled": True}
    if dtype == torch.float16:
        overrides["fp16"] = {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 1000, "hysteresis": 1}
    poisoned = ranks(2).run(_run, 4, dtype, (2, 1), overrides)
    clean = ranks(2).run(_run, 4, dtype, None, overrides)
    for result in poisoned:
        first, second, third, _ = result["snapshots"]
        assert all(torch.equal(second[name], first[name]) for name in cases.make_masks()), (
            "the poisoned step wrote nothing"
        )
        assert not all(torch.equal(third[name], second[name]) for name in cases.make_masks())
        assert [snapshot["applied"] for snapshot in result["snapshots"]] == [True, False, True, True]
        assert result["report"]["skipped_steps"] == 1
        assert all(torch.isfinite(value).all() for state in result["states"] for value in state.values())
        if dtype == torch.float16:
            assert result["scale"] == 2**7, "the loss scale was halved"
    assert all(result["report"]["skipped_steps"] == 0 for result in clean)


def _run(steps, dtype, poison, overrides):
    return _train(steps, dtype=dtype, poison=poison, **overrides)


def test_fp16_gradients_are_unscaled_before_they_are_used(ranks):
    """Moments and norms are in the units of the loss, whatever its scale (AdamW's weights alone would not tell)."""
    small, large = (
        ranks(2).run(_run, 1, torch.float16, None, {"fp16": {"enabled": True, "loss_scale": scale}, **NO_CLIPPING})[0]
        for scale in (1, 64)
    )
    for one, other in zip(small["states"], large["states"], strict=True):
        # fp16 gradients of a scaled loss round differently
        assert torch.allclose(one["exp_avg"], other["exp_avg"], rtol=2e-2, atol=1e-5)
    assert small["norm"] == pytest.approx(large["norm"], rel=1e-2)
    assert small["norm"] > 0.1


NO_CLIPPING = {"gradient_clipping": 0.0}


def _two_groups(model):
    up = [p for name, p in model.named_parameters() if "up" in name]
    rest = [p for name, p in model.named_parameters() if "up" not in name]
    groups = [{"params": up, "lr": 1e-2, "weight_decay": 0.3}, {"params": rest, "lr": 1e-3, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, **cases.SETTINGS)


def _rmsprop(model):
    return torch.optim.RMSprop(model.parameters(), lr=1e-3, alpha=0.9, weight_decay=0.01)


def _sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True)


def _amsgrad(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, amsgrad=True)


def _adam_l2(model):
    return torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=0.1)


def _with_optimizer(make_optimizer, schedule):
    return _train(6, make_optimizer=make_optimizer, schedule=schedule, gradient_clipping=0.0)


def _dense_with_optimizer(make_optimizer, schedule) -> dict[str, torch.Tensor]:
    """One process, plain torch: every tensor's active entries as a parameter of their own under the same optimizer."""
    model, masks = cases.make_model().double(), cases.make_masks()
    compact = {
        name: torch.nn.Parameter(p.detach()[masks[name]].clone())
        for name, p in model.named_parameters()
        if name in masks
    }

    class Stand(torch.nn.Module):
        def named_parameters(self, *args, **kwargs):
            return iter(compact.items())

        def parameters(self, *args, **kwargs):
            return iter(compact.values())

    optimizer = make_optimizer(Stand())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step in range(1, 7):
        ((x, flags, target),) = cases.micro_batches(step, 1)
        parameters = {name: p for name, p in model.named_parameters() if name in masks}
        loss = F.cross_entropy(model(x.double(), flags), target)
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            dense = torch.zeros_like(parameters[name]) if gradient is None else gradient
            compact[name].grad = dense[masks[name]]
        optimizer.step()
        if schedule:
            scheduler.step()
        with torch.no_grad():
            for name, p in parameters.items():
                p[masks[name]] = compact[name].detach()
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("make_optimizer", [cases.default_optimizer, _two_groups, _rmsprop, _sgd, _amsgrad, _adam_l2])
@pytest.mark.parametrize("schedule", [False, True])
def test_optimizers_and_schedules_equal_dense_torch(ranks, make_optimizer, schedule):
    expected = _dense_with_optimizer(make_optimizer, schedule)
    for result in ranks(2).run(_with_optimizer, make_optimizer, schedule):
        for name, weight in expected.items():
            got = result["snapshots"][-1][name].double()
            assert (got - weight).abs().max() <= 2e-5 * weight.abs().max(), name


def _accessors() -> dict[str, Any]:
    import deepspeed
    from deepspeed import utils

    rank = torch.distributed.get_rank()
    model, masks = cases.make_model(torch.bfloat16), cases.make_masks()
    with lota.sparse_zero3(lota.Mask.from_dense(masks)) as run:
        config = cases.config(1, 2, bf16={"enabled": True})
        engine, *_ = deepspeed.initialize(model=model, optimizer=cases.default_optimizer(model), config=config)
        ((x, flags, target),) = cases.micro_batches(1, 1)
        rows = slice(rank * 4, rank * 4 + 4)
        engine.backward(F.cross_entropy(engine(x[rows].bfloat16(), flags[rows]).float(), target[rows]))
        param = engine.module.blocks[0].up.weight
        frozen = engine.module.head.weight
        gradient = utils.safe_get_full_grad(param)
        engine.step()
        value = torch.zeros(param.ds_shape)
        refused = {}
        for name, call in {
            "set fp32": lambda: utils.safe_set_full_fp32_param(param, value),
            "set state": lambda: utils.safe_set_full_optimizer_state(param, value, "exp_avg"),
            "set grad": lambda: utils.safe_set_full_grad(param, value),
            "set local grad": lambda: utils.safe_set_local_grad(param, value.flatten()),
            "set local fp32": lambda: utils.safe_set_local_fp32_param(param, value.flatten()),
            "set local state": lambda: utils.safe_set_local_optimizer_state(param, value.flatten(), "exp_avg"),
            "update grads": lambda: utils.safe_update_full_grad_vectorized([param], lambda g, p: g),
            "offload": lambda: engine.offload_states(),
            "load": lambda: engine.load_checkpoint("/nowhere"),
            "state dict": lambda: engine.optimizer.state_dict(),
            "unknown state": lambda: utils.safe_get_full_optimizer_state(param, "momentum"),
        }.items():
            try:
                call()
                refused[name] = ""
            except (NotImplementedError, ValueError) as error:
                refused[name] = str(error)
        with deepspeed.zero.GatheredParameters([param]):
            weights = param.detach().clone()
        result = {
            "gradient": gradient,
            "fp32": utils.safe_get_full_fp32_param(param),
            "exp_avg": utils.safe_get_full_optimizer_state(param, "exp_avg"),
            "local": utils.safe_get_local_fp32_param(param).numel(),
            "frozen": utils.safe_get_full_fp32_param(frozen),
            "weights": weights,
            "refused": refused,
            "norm": float(engine.get_global_grad_norm()),
            "steps": run.report()["steps"],
        }
        engine.destroy()
    return result


def test_accessors_are_right_or_refuse(ranks):
    mask = cases.make_masks()["blocks.0.up.weight"]
    for result in ranks(2).run(_accessors):
        assert (result["gradient"][~mask] == 0).all() and (result["gradient"][mask] != 0).all()
        assert torch.equal(result["fp32"].bfloat16(), result["weights"])
        assert torch.equal(result["fp32"][~mask], result["weights"][~mask].float())
        assert (result["fp32"][mask] != result["weights"][mask].float()).any(), "masters, not rounded weights"
        clip = min(1.0, cases.CLIP / result["norm"])
        assert torch.allclose(result["exp_avg"], result["gradient"] * 0.1 * clip, rtol=1e-3, atol=1e-9)
        assert result["local"] == -(-mask.numel() // 2)
        assert result["frozen"] is None
        assert all(result["refused"].values()), result["refused"]


def _tickets(folder: str, shard_group_size: int) -> dict[str, Any]:
    import deepspeed

    rank = torch.distributed.get_rank()
    model, masks = cases.make_model(torch.bfloat16), cases.make_masks()
    with lota.sparse_zero3(lota.Mask.from_dense(masks), shard_group_size=shard_group_size) as run:
        config = cases.config(1, 2, bf16={"enabled": True})
        engine, *_ = deepspeed.initialize(model=model, optimizer=cases.default_optimizer(model), config=config)
        ((x, flags, target),) = cases.micro_batches(1, 1)
        rows = slice(rank * 4, rank * 4 + 4)
        engine.backward(F.cross_entropy(engine(x[rows].bfloat16(), flags[rows]).float(), target[rows]))
        engine.step()
    saved = run.save_ticket(f"{folder}/bits")
    run.save_ticket(f"{folder}/masters", dtype=torch.float32)
    errors = []
    try:
        run.save_ticket(f"{folder}/bits")
    except ValueError as error:
        errors.append(str(error))
    try:
        run.save_ticket(f"{folder}/provenance", provenance=[1, 2])
    except (ValueError, TypeError, RuntimeError) as error:
        errors.append(str(error))
    if rank == 1:
        engine.module.head.weight.ds_tensor.data[0] += 1
    try:
        run.save_ticket(f"{folder}/tampered")
    except RuntimeError as error:
        errors.append(str(error))
    engine.destroy()
    return {"saved": saved, "errors": errors}


@pytest.mark.parametrize("shard_group_size", [1, 2])
def test_tickets_hold_bits_or_masters_and_frozen_changes_are_found(ranks, tmp_path, shard_group_size):
    for result in ranks(2).run(_tickets, str(tmp_path), shard_group_size):
        assert len(result["errors"]) == 3, result["errors"]
        assert "bits" in result["errors"][0]
        assert "provenance" in result["errors"][1]
        assert "head.weight" in result["errors"][2]
    assert not (Path(tmp_path) / "tampered").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bits", "masters"]
    bits, masters = lota.Ticket.load(tmp_path / "bits"), lota.Ticket.load(tmp_path / "masters")
    for name in bits.names:
        assert bits.values(name).dtype == torch.bfloat16 and masters.values(name).dtype == torch.float32
        assert torch.equal(masters.values(name).bfloat16(), bits.values(name))
        positions = bits.mask.indices(name)
        assert torch.equal(
            bits.base_values(name), cases.make_model(torch.bfloat16).get_parameter(name).flatten()[positions]
        )


def _without_asking(kernels: str, dtype: torch.dtype) -> str:
    import deepspeed

    from tests.no_sync import NoSync

    rank = torch.distributed.get_rank()
    model, masks = cases.make_model(dtype), cases.make_masks()
    with lota.sparse_zero3(lota.Mask.from_dense(masks), kernels=kernels) as run:
        config = cases.config(1, 2, bf16={"enabled": dtype == torch.bfloat16})
        engine, *_ = deepspeed.initialize(model=model, optimizer=cases.default_optimizer(model), config=config)
        for step in (1, 2):
            ((x, flags, target),) = cases.micro_batches(step, 1)
            rows = slice(rank * 4, rank * 4 + 4)
            engine.backward(F.cross_entropy(engine(x[rows].to(dtype), flags[rows]).float(), target[rows]))
            with NoSync():
                engine.optimizer.step()
        used = run.report()["kernels"]
        engine.destroy()
    return used


@pytest.mark.parametrize(("kernels", "dtype"), [("auto", torch.bfloat16), ("torch", torch.float32)])
def test_a_step_never_asks_the_device(ranks, kernels, dtype):
    """Nothing is read back in `optimizer.step()`; the norm and the skip flag stay device values."""
    assert ranks(2).run(_without_asking, kernels, dtype) == [{"auto": "c", "torch": "torch"}[kernels]] * 2
