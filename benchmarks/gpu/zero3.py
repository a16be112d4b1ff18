"""Stage `zero3`: both phases through DeepSpeed with one process, saved and resumed with fused AdamW, bit for bit.

The riskiest comes last: an illegal access on the device ends everything after it in this process.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import lota
from benchmarks.gpu import engines
from benchmarks.gpu.bench import Bench
from tests.zero import cases, test_importance, test_pull

STEPS, STOP, DENSITY = 6, 3, 0.1


def run(bench: Bench) -> None:
    engines.join_world_of_one(bench.device)
    mask = lota.Mask.from_dense(cases.make_masks())
    calibration = partial(lota.calibration_zero3, density=DENSITY, include=["blocks*"])
    parts: list[tuple[str, Callable[[], None]]] = [
        ("sparse against a dense reference", lambda: equals_reference(bench)),
        ("gradient scores against autograd", lambda: equals_autograd(bench)),
        ("importance against one process", lambda: importance_equals_autograd(bench)),
        ("pulled against a dense reference", lambda: pulled_equals_replay(bench)),
        ("sparse, resumed", lambda: resumed(bench, "sparse", lambda: lota.sparse_zero3(mask))),
        ("gradient, resumed", lambda: resumed(bench, "gradient", lambda: calibration(score="gradient"))),
        ("task_vector, resumed", lambda: resumed(bench, "task_vector", lambda: calibration(score="task_vector"))),
    ]
    for name, part in parts:
        bench.attempt(name, part, seconds=4)


def equals_reference(bench: Bench) -> None:
    """fp32 sparse steps against a dense masked AdamW in float64 that shares no code with ours."""
    masks = cases.make_masks()
    with lota.sparse_zero3(lota.Mask.from_dense(masks)) as run:
        engine = _engine(bench, torch.float32)
        _train(bench, engine, 1, STEPS)
        report = run.report()
        after = {name: weight.cpu() for name, weight in cases.gathered(engine.module).items()}
        with tempfile.TemporaryDirectory() as folder:
            run.save_ticket(f"{folder}/ticket")  # RuntimeError where a frozen bit moved
            saved = lota.Ticket.load(f"{folder}/ticket")
            ticket_values = {name: saved.values(name) for name in saved.names}
        engine.destroy()
    run.release()
    _, expected, _ = cases.reference(masks, STEPS, 1)
    # fp32 against float64: a few units in the last place a step
    worst = max(float((after[name].double() - expected[name]).abs().max()) for name in after)
    bench.check("sparse against a dense reference", worst < 1e-5, f"largest difference {worst:.1e}, expected < 1e-5")
    is_kernel = report["kernels"] == ("triton" if bench.device.kind == "cuda" else report["kernels"])
    bench.check("sparse: kernels", is_kernel, f"{report['kernels']}, expected triton on a GPU")
    start = cases.make_model()
    moved = [n for n in after if n not in masks and not torch.equal(after[n], start.get_parameter(n))]
    bench.check("sparse: frozen tensors keep their bits", not moved, f"moved: {moved}, expected none")
    values = {n: after[n].flatten()[saved.mask.indices(n)] for n in ticket_values}
    bench.check("sparse: the ticket holds the weights' bits", _same(values, ticket_values), "expected the same bits")


def equals_autograd(bench: Bench) -> None:
    """The chosen entries have the highest mean |gradient|, which plain autograd computes in float64 on the CPU."""
    with lota.calibration_zero3(score="gradient", density=DENSITY, include=["blocks*"]) as run:
        engine = _engine(bench, torch.float32)
        _train(bench, engine, 1, STOP)
    mask = run.mask()
    engine.destroy()
    model = cases.make_model().double()
    parameters = {name: model.get_parameter(name) for name in mask.names}
    total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for step in range(1, STOP + 1):
        x, flags, target = _batch(step)
        loss = F.cross_entropy(model(x.double(), flags), target)
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            total[name] += gradient.abs() / STOP
    everything = torch.cat([total[name].flatten() for name in mask.names])
    limit = everything.topk(mask.num_active).values[-1]
    chosen = torch.cat([total[name].flatten()[mask.indices(name)] for name in mask.names])
    # fp32 gradients may swap neighbours around the limit, and nothing else
    below = int((chosen < limit * (1 - 1e-4)).sum())
    expected = round(DENSITY * mask.eligible)
    bench.check("gradient scores: how many", mask.num_active == expected, f"{mask.num_active}, expected {expected}")
    bench.check("gradient scores against autograd", below == 0, f"{below} chosen entries have lower scores, expected 0")


def importance_equals_autograd(bench: Bench) -> None:
    """Squared fp32 gradients of the device's engine, beside those of plain autograd on the CPU."""
    mask = lota.Mask.from_dense(cases.make_masks())
    with lota.importance_zero3(include=["blocks*"], mask=mask) as run:
        engine = _engine(bench, torch.float32)
        for number in range(test_importance.MICRO_BATCHES):
            x, flags, target = (tensor.to(bench.device.torch) for tensor in test_importance.micro_batch(number))
            engine.backward(F.cross_entropy(engine(x, flags), target))
            engine.step()
        found = run.importance({"data": "made up"})
        engine.destroy()
    expected = test_importance.of_one_process(cases.make_masks())
    sizes = {name: cases.make_model().get_parameter(name).numel() for name in found.names}
    every = {name: torch.arange(size, dtype=torch.int64) for name, size in sizes.items()}
    mean = sum(float(expected.at(name, every[name]).double().sum()) for name in sizes) / sum(sizes.values())
    pairs = [(found.at(name, every[name]), expected.at(name, every[name]) / mean) for name in sizes]
    pairs += [(found.at_active(mask, name), expected.at_active(mask, name) / mean) for name in mask.names]
    worst = max(float(((one - other).abs() / (other.abs() + 1e-3)).max()) for one, other in pairs)
    detail = f"largest relative difference {worst:.1e}, expected < 2e-2 (two roundings to bf16)"
    bench.check("importance against one process", worst < 2e-2, detail)


def pulled_equals_replay(bench: Bench) -> None:
    """The pull in the fused step, against AdamW and a proximal step in float64 that share no code with it."""
    masks, importance, steps = cases.make_masks(), test_pull.make_importance(), test_pull.STEPS
    mask = lota.Mask.from_dense(masks)
    with lota.sparse_zero3(mask, retain=[importance], pull=test_pull.PULL, num_steps=steps) as run:
        engine = _engine(bench, torch.float32, schedule=test_pull.schedule)
        _train(bench, engine, 1, steps)
        after = {name: weight.cpu() for name, weight in cases.gathered(engine.module).items()}
        (reached,) = run.report()["pull"]["reached"]
        engine.destroy()
    run.release()
    expected = test_pull.replay(masks, importance, test_pull.PULL)
    worst = max(float((after[n].double() - w).abs().max() / w.abs().max()) for n, w in expected.items())
    detail = f"largest difference {worst:.1e} of a tensor's largest weight, expected < 1e-5"
    bench.check("pulled against a dense reference", worst < 1e-5, detail)
    bench.check("the pull", abs(reached / test_pull.PULL - 1) < 1e-6, f"{reached}, expected {test_pull.PULL}")


def resumed(bench: Bench, name: str, block: Callable[[], AbstractContextManager[Any]]) -> None:
    """A run that stops at a checkpoint and resumes from it ends with the bits of one that never stopped."""
    with tempfile.TemporaryDirectory() as folder:
        straight, at_stop = _run(bench, block, folder, is_resumed=False)
        again, at_resume = _run(bench, block, folder, is_resumed=True)
    same = "expected the same weights, masters, moments or scores, bit for bit"
    bench.check(f"{name}: the checkpoint gives back the state", _same(at_stop, at_resume), same)
    bench.check(f"{name}: resumed is uninterrupted", _same(straight, again), same)
    has_moved = not _same(at_stop, straight)
    bench.check(f"{name}: steps change the state", has_moved, f"expected other bits after {STEPS - STOP} more steps")


def _run(
    bench: Bench, block: Callable[[], AbstractContextManager[Any]], folder: str, *, is_resumed: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """State at the end, and where the checkpoint was saved or loaded."""
    with block():
        engine = _engine(bench, torch.bfloat16, bf16={"enabled": True})
        if is_resumed:
            engine.load_checkpoint(folder)
        else:
            _train(bench, engine, 1, STOP)
            engine.save_checkpoint(folder)
        at_stop = _state(engine)
        _train(bench, engine, STOP + 1, STEPS)
        at_end = _state(engine)
        engine.destroy()
    engine.run.release()
    return at_end, at_stop


def _engine(bench: Bench, dtype: torch.dtype, schedule: Callable[..., Any] | None = None, **overrides: Any) -> Any:
    import deepspeed

    model = cases.make_model(dtype).to(bench.device.torch)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **cases.SETTINGS)
    scheduler = None if schedule is None else schedule(optimizer)
    config = cases.config(1, 1, **overrides)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=scheduler, config=config)
    return engine


def _train(bench: Bench, engine: Any, first: int, last: int) -> None:
    dtype = next(engine.module.parameters()).dtype
    for step in range(first, last + 1):
        x, flags, target = (tensor.to(bench.device.torch) for tensor in _batch(step))
        engine.backward(F.cross_entropy(engine(x.to(dtype), flags).float(), target))
        engine.step()


def _batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
    ((x, flags, target),) = cases.micro_batches(step, 1)
    return x, flags, target


def _state(engine: Any) -> dict[str, Tensor]:
    """Weights, and all that a checkpoint keeps, copied to the CPU."""
    weights = {name: weight.cpu() for name, weight in cases.gathered(engine.module).items()}
    return weights | {vector.key: vector.get().detach().cpu().clone() for vector in engine.run.core.vectors()}


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
