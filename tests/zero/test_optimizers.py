"""Every optimizer of torch that works element by element trains like dense torch on the active entries and resumes bit
for bit, in every variant that this machine has; the others are refused by name."""

from __future__ import annotations

import gc
import os
import re
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import optim
from torch.nn import functional as F

import lota
from tests.zero import cases

STEPS, STOP = 5, 2


def _made_by(kind: type[optim.Optimizer], **settings: Any) -> Callable[[Any], optim.Optimizer]:
    """Two groups with different settings, so that what is kept for one would be wrong for the other."""
    second: dict[str, Any] = settings.pop("second", {})

    def make(parameters: list[tuple[str, torch.Tensor]]) -> optim.Optimizer:
        first = [p for name, p in parameters if "blocks.0" in name]
        rest = [p for name, p in parameters if "blocks.0" not in name]
        return kind([{"params": first}, {"params": rest, "lr": 3e-3, **second}], **{"lr": 1e-2, **settings})

    return make


BETAS = {"betas": (0.7, 0.95)}
ADMITTED = {
    "AdamW": _made_by(optim.AdamW, weight_decay=0.1, second=BETAS),
    "AdamW fused": _made_by(optim.AdamW, fused=True),
    "AdamW foreach": _made_by(optim.AdamW, foreach=True),
    "AdamW with a tensor as rate": lambda ps: optim.AdamW([p for _, p in ps], lr=torch.tensor(1e-2)),
    "AdamW amsgrad": _made_by(optim.AdamW, amsgrad=True, second=BETAS),
    "AdamW amsgrad fused": _made_by(optim.AdamW, amsgrad=True, fused=True),
    "AdamW maximize foreach": _made_by(optim.AdamW, maximize=True, foreach=True),
    "Adam": _made_by(optim.Adam),
    "Adam L2": _made_by(optim.Adam, weight_decay=0.1, second=BETAS),
    "Adam L2 fused": _made_by(optim.Adam, weight_decay=0.1, fused=True),
    "Adam L2, a tensor as rate": lambda ps: optim.Adam([p for _, p in ps], lr=torch.tensor(1e-2), weight_decay=0.1),
    "NAdam": _made_by(optim.NAdam, second={"momentum_decay": 0.1}),
    "NAdam decoupled foreach": _made_by(optim.NAdam, decoupled_weight_decay=True, weight_decay=0.1, foreach=True),
    "RAdam": _made_by(optim.RAdam, second={"betas": (0.7, 0.5)}),
    "Adamax": _made_by(optim.Adamax, second=BETAS),
    "Adadelta": _made_by(optim.Adadelta, second={"rho": 0.5}),
    "Adagrad": _made_by(optim.Adagrad, initial_accumulator_value=0.1, second={"lr_decay": 0.1}),
    "Adagrad fused": _made_by(optim.Adagrad, fused=True),
    "ASGD": _made_by(optim.ASGD, t0=2, lambd=0.1, second={"alpha": 0.5}),
    "Rprop": _made_by(optim.Rprop, second={"etas": (0.3, 1.5)}),
    "RMSprop": _made_by(optim.RMSprop, weight_decay=0.1),
    "RMSprop centered momentum": _made_by(optim.RMSprop, centered=True, momentum=0.9),
    "SGD": _made_by(optim.SGD),
    "SGD momentum": _made_by(optim.SGD, momentum=0.9, dampening=0.1, second={"momentum": 0.5}),
    "SGD nesterov foreach": _made_by(optim.SGD, momentum=0.9, nesterov=True, weight_decay=0.1, foreach=True),
    "SGD fused maximize": _made_by(optim.SGD, momentum=0.9, fused=True, maximize=True),
}
REFUSED = {
    "Adafactor": (optim.Adafactor, r"optimizer Adafactor is not element-wise"),
    "LBFGS": (optim.LBFGS, r"optimizer LBFGS cannot run .*closure"),
    "SparseAdam": (optim.SparseAdam, r"optimizer SparseAdam cannot run .*dense gradients"),
    "Muon": (lambda ps: optim.Muon([p for p in ps if p.dim() == 2]), r"the Muon optimizer is not supported"),
    "capturable on a CPU": (
        lambda ps: optim.NAdam(ps, capturable=True),
        r"optimizer NAdam cannot run .*capturable=True.* supported devices",
    ),
}


def _engine(make: Callable[[Any], optim.Optimizer]) -> Any:
    import deepspeed

    model = cases.make_model()
    optimizer = make(list(model.named_parameters()))
    schedule = optim.lr_scheduler.MultiStepLR(optimizer, milestones=[1, 3], gamma=0.5)
    zero = {"sub_group_size": 1000}  # several flat tensors for each parameter group
    config = cases.config(1, torch.distributed.get_world_size(), zero=zero, gradient_clipping=0.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=config)
    return engine


def _steps(engine: Any, first: int, last: int) -> None:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    rows = slice(rank * cases.ROWS // world, (rank + 1) * cases.ROWS // world)
    for step in range(first, last + 1):
        ((x, flags, target),) = cases.micro_batches(step, 1)
        if not hasattr(engine.optimizer, "core"):
            flags.fill_(True)  # DeepSpeed's own ZeRO-3 hangs where ranks use different weights
        x, flags, target = (part[rows].to(engine.device) for part in (x, flags, target))
        engine.backward(F.cross_entropy(engine(x, flags), target))
        engine.step()


def _state(engine: Any) -> dict[str, Any]:
    core, groups = engine.run.core, engine.optimizer.param_groups
    return {
        "weights": cases.gathered(engine.module),
        "vectors": {vector.key: vector.get().clone() for vector in core.vectors()},
        "numbers": core.numbers(),
        "groups": [{key: repr(value) for key, value in group.items() if key != "params"} for group in groups],
    }


def _straight_and_resumed(folder: str, names: list[str], block: Callable[[], Any]) -> dict[str, Any]:
    found = {}
    gc.freeze()  # every block collects garbage, which is slow where all of the imported modules are looked at
    for name in names:
        where = f"{folder}/{name}"
        with block():
            engine = _engine(ADMITTED[name])
            _steps(engine, 1, STOP)
            engine.save_checkpoint(where)
            _steps(engine, STOP + 1, STEPS)
            straight = _state(engine)
            engine.destroy()
        engine.run.release()
        with block():
            engine = _engine(ADMITTED[name])
            engine.load_checkpoint(where)
            _steps(engine, STOP + 1, STEPS)
            resumed = _state(engine)
            getters = _getters(engine) if hasattr(engine.optimizer, "core") else {}
            engine.destroy()
        engine.run.release()
        found[name] = {"straight": straight, "resumed": resumed, "getters": getters}
    gc.unfreeze()
    return found


def _sparse() -> Any:
    return lota.sparse_zero3(lota.Mask.from_dense(cases.make_masks()))


def _dense() -> Any:
    return lota.calibration_zero3(score="task_vector", density=0.1, include=["blocks*"])


def _getters(engine: Any) -> dict[str, Any]:
    """What DeepSpeed's functions find of the first trained tensor's state, whole and this rank's part."""
    from deepspeed.utils import safe_get_full_optimizer_state, safe_get_local_optimizer_state

    name = "blocks.0.up.weight"
    param, core = engine.module.get_parameter(name), engine.run.core
    return {
        key: (safe_get_full_optimizer_state(param, key), safe_get_local_optimizer_state(param, key))
        for key in core.update.moments(core.slot(name)[0])
    }


def _masked_reference(make: Callable[[Any], optim.Optimizer]) -> dict[str, torch.Tensor]:
    """One process, plain torch in fp32: the active entries of every tensor as a parameter of their own."""
    model, masks = cases.make_model(), cases.make_masks()
    parameters = {name: param for name, param in model.named_parameters() if name in masks}
    compact = {name: torch.nn.Parameter(p.detach()[masks[name]].clone()) for name, p in parameters.items()}
    optimizer = make(list(compact.items()))
    schedule = optim.lr_scheduler.MultiStepLR(optimizer, milestones=[1, 3], gamma=0.5)
    for step in range(1, STEPS + 1):
        ((x, flags, target),) = cases.micro_batches(step, 1)
        loss = F.cross_entropy(model(x, flags), target)
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            dense = torch.zeros_like(parameters[name]) if gradient is None else gradient
            compact[name].grad = dense[masks[name]]
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for name, param in parameters.items():
                param[masks[name]] = compact[name].detach()
    return {name: param.detach() for name, param in model.named_parameters()}


def _assert_same(one: Any, other: Any) -> None:
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            _assert_same(one[key], other[key])
    else:
        assert one == other


@pytest.fixture(scope="module")
def alone(ranks, tmp_path_factory) -> dict[str, Any]:
    """What one rank ends with, by optimizer."""
    (found,) = ranks(1).run(_straight_and_resumed, str(tmp_path_factory.mktemp("alone")), list(ADMITTED), _sparse)
    return found


@pytest.mark.parametrize("name", ADMITTED)
def test_resumed_is_uninterrupted(alone, name):
    _assert_same(alone[name]["resumed"], alone[name]["straight"])


@pytest.mark.parametrize("name", ADMITTED)
def test_equals_dense_torch_on_the_active_entries(alone, name):
    """Lengths differ, so torch's vector loops end elsewhere; the kernels of AdamW and RMSprop have roundings of their
    own."""
    weights, base = alone[name]["straight"]["weights"], cases.make_model().state_dict()
    for key, expected in _masked_reference(ADMITTED[name]).items():
        assert (weights[key] - expected).abs().max() <= 2e-6 * expected.abs().max(), key
    moved = max(float((weights[key] - base[key]).abs().max()) for key in cases.make_masks())
    assert moved > (2e-5 if name == "Adadelta" else 5e-4)


@pytest.mark.parametrize("name", ADMITTED)
def test_getters_find_the_state(alone, name):
    found, vectors = alone[name]["getters"], alone[name]["resumed"]["vectors"]
    mask = cases.make_masks()["blocks.0.up.weight"]
    prefix = "blocks.0.up.weight."
    kinds = {key.removeprefix(prefix) for key in vectors if key.startswith(prefix)}
    assert found.keys() == kinds - {"master"} and (found or name in ("SGD",))
    for key, (whole, local) in found.items():
        assert torch.equal(whole[mask], vectors[prefix + key]) and not whole[~mask].any()
        assert torch.equal(local[: mask.numel()].view(mask.shape), whole)


SOME = ["AdamW", "NAdam", "SGD momentum"]


def test_on_two_ranks(ranks, alone, tmp_path):
    for found in ranks(2).run(_straight_and_resumed, str(tmp_path), SOME, _sparse):
        for name in SOME:
            _assert_same(found[name]["resumed"], found[name]["straight"])
            assert found[name]["straight"]["numbers"] == alone[name]["straight"]["numbers"]
            for key, expected in alone[name]["straight"]["weights"].items():
                # gradients are summed in another order
                assert (found[name]["straight"]["weights"][key] - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_dense_calibration_resumes_with_any_optimizer(ranks, tmp_path):
    names = ["AdamW fused", "NAdam", "SGD momentum"]
    (found,) = ranks(1).run(_straight_and_resumed, str(tmp_path), names, _dense)
    for name in names:
        _assert_same(found[name]["resumed"], found[name]["straight"])


@pytest.mark.parametrize("kind", REFUSED)
def test_the_others_are_refused(ranks, kind):
    (outcome,) = ranks(1).outcomes(_initialize, kind)
    assert outcome.error_type == "ValueError", outcome.error
    assert re.search(REFUSED[kind][1], outcome.error, re.S), outcome.error


def _initialize(kind: str) -> None:
    import deepspeed

    model = cases.make_model()
    with _sparse():
        optimizer = REFUSED[kind][0](list(model.parameters()))
        deepspeed.initialize(model=model, optimizer=optimizer, config=cases.config(1, 1))


def _warnings_of_schedulers(score: str | None) -> list[str]:
    """A plain loop in which the script or the engine steps one of torch's schedulers."""
    import deepspeed

    found: list[str] = []
    for name, by_engine in (("AdamW", False), ("SGD", True)):
        block = _sparse() if score is None else lota.calibration_zero3(score=score, density=0.1, include=["blocks*"])
        with warnings.catch_warnings(record=True) as caught, block:
            warnings.simplefilter("always")
            model = cases.make_model()
            optimizer = ADMITTED[name](list(model.named_parameters()))
            schedule = optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
            engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                lr_scheduler=schedule if by_engine else None,
                config=cases.config(1, 1),
            )
            for step in (1, 2):
                _steps(engine, step, step)
                if not by_engine:
                    schedule.step()
            assert schedule.last_epoch == 2
            engine.destroy()
        found += [str(one.message) for one in caught if "scheduler" in str(one.message)]
        engine.run.release()
    return found


@pytest.mark.parametrize("score", [None, "gradient", "task_vector"])
def test_schedulers_do_not_warn(ranks, score):
    assert ranks(1).run(_warnings_of_schedulers, score) == [[]]


ON_A_GPU = {
    "AdamW fused": ADMITTED["AdamW fused"],
    "AdamW amsgrad fused": ADMITTED["AdamW amsgrad fused"],
    "SGD fused maximize": ADMITTED["SGD fused maximize"],
    "NAdam capturable": _made_by(optim.NAdam, capturable=True),
    "ASGD": ADMITTED["ASGD"],
}


def _resume_on_the_device(folder: str) -> None:
    """Both phases; step counts of fused and capturable optimizers must be on the device, where they are read."""
    import deepspeed

    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    ADMITTED.update(ON_A_GPU)
    for block in (_dense, _sparse):
        for name, found in _straight_and_resumed(f"{folder}/{block.__name__}", list(ON_A_GPU), block).items():
            _assert_same(found["resumed"], found["straight"])
            kept = str(found["straight"]["numbers"])
            on_device = name == "ASGD" or "fused" in name or "capturable" in name
            if block is _dense and torch.cuda.is_available() and "'tensor'" in kept:
                assert ("'device': 'own'" in kept) == on_device, (name, kept)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_fused_and_capturable_optimizers_resume_on_a_gpu(tmp_path):
    """In a child, which an access to a host address on the device would end. NCCL, one rank."""
    code = f"from tests.zero import test_optimizers as t; t._resume_on_the_device({str(tmp_path)!r}); print('equal')"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    one = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    child = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **one, "MASTER_PORT": port},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert child.returncode == 0 and child.stdout.endswith("equal\n"), child.stdout + child.stderr
