"""Stage `8b`: a model of Llama-3.1-8B's shape on one GPU, calibrated by gradients, trained at 1%; beside the plan."""

from __future__ import annotations

import tempfile
import time
from typing import Any

import torch

import lota
from benchmarks.gpu import engines, models
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.training import measure_shares, measure_steps, one_step
from benchmarks.timing import median
from lota import plan
from lota.plan.advice import Choice, advise
from lota.selection import eligible

DENSITY = 0.01
NAME = "8B"


def run(bench: Bench) -> None:
    planned = bench.attempt("the plan", lambda: _planned(bench), seconds=2) or ("", "")
    engines.join_world_of_one(bench.device)
    mask = _calibrate(bench, planned[0])
    bench.device.collect()
    bench.attempt("sparse training", lambda: _train(bench, mask, planned[1]), seconds=10)


def _planned(bench: Bench) -> tuple[str, str]:
    """What each method would need of this device besides activations; of calibration and sparse training, in words."""
    config = models.llama_config(bench.sizes.model_8b)
    shapes = plan.shapes_of_config(config, NAME)
    layout = plan.RankLayout(ranks=1, gradient_checkpointing=True)
    names = eligible(shapes.shapes)
    counts = plan.MaskCounts.even(shapes, names, DENSITY, 1)
    plans = [
        plan.calibration(shapes, layout, names, "gradient"),
        plan.lota(shapes, layout, counts),
        plan.full(shapes, layout),
    ]
    for made in plans:
        bench.figure(f"{NAME} planned: {made.name}, peak", made.peak / 2**30, "GiB")
    memory = bench.device.memory_bytes()
    for text in advise(Choice(layout, lambda choice: plan.full(shapes, choice.layout)), memory):
        bench.note(text.strip())
    calibration, sparse, _ = (f"planned {plan.format_bytes(made.peak)} besides activations" for made in plans)
    return calibration, sparse


def _model(bench: Bench) -> Any:
    started = time.perf_counter()
    model = models.make_llama(bench.sizes.model_8b, bench.device.torch)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    bench.device.synchronize()
    bench.figure(f"{NAME}: making the model", time.perf_counter() - started, "s")
    return model


def _calibrate(bench: Bench, planned: str) -> lota.Mask:
    device, tokens = bench.device, bench.sizes.tokens
    with lota.calibration_zero3(score="gradient", density=DENSITY) as run:
        engine = _built(bench, _model(bench), "calibration")
        device.reset_peak()
        took = []
        for step in range(bench.sizes.calibration_steps):
            device.synchronize()
            started = time.perf_counter()
            one_step(engine, tokens, step)
            device.synchronize()
            took.append(time.perf_counter() - started)
    bench.figure(f"{NAME} calibration: tokens/s", tokens / median(took[1:]), "", beside=f"first step {took[0]:.3g} s")
    bench.figure(f"{NAME} calibration: peak memory", device.peak_bytes() / 2**30, "GiB", beside=planned)
    device.reset_peak()
    started = time.perf_counter()
    mask = run.mask()
    device.synchronize()
    bench.figure(f"{NAME} selection", time.perf_counter() - started, "s")
    bench.figure(f"{NAME} selection: peak memory", device.peak_bytes() / 2**30, "GiB")
    expected = round(DENSITY * mask.eligible)
    bench.check(f"{NAME}: entries chosen", mask.num_active == expected, f"{mask.num_active:,}, expected {expected:,}")
    engine.destroy()
    return mask


def _train(bench: Bench, mask: lota.Mask, planned: str) -> None:
    """From the same base, made again: its fingerprints must be those in the mask."""
    with lota.sparse_zero3(mask) as run:
        engine = _built(bench, _model(bench), "sparse training")
        measure_steps(bench, engine, f"{NAME} sparse", planned=planned)
        bench.attempt("shares", lambda: measure_shares(bench, engine, f"{NAME} sparse"), seconds=3)
        report = run.report()
        held = sum(size for kind, size in report["bytes_held"].items() if not kind.endswith("_host"))
        bench.figure(f"{NAME} sparse: counted by report()", held / 2**30, "GiB")
        bench.check(f"{NAME}: no step was skipped", report["skipped_steps"] == 0, f"{report['skipped_steps']} skipped")
        bench.attempt("the ticket", lambda: _deliver(bench, run, mask), seconds=25)


def _deliver(bench: Bench, run: Any, mask: lota.Mask) -> None:
    """Writing the ticket first verifies that nothing else moved; RuntimeError otherwise."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        run.save_ticket(f"{folder}/ticket")
        bench.figure(f"{NAME} sparse: verifying and writing the ticket", time.perf_counter() - started, "s")
        saved = lota.Ticket.load(f"{folder}/ticket")
        bench.check(f"{NAME}: the ticket is of the mask", saved.mask == mask, f"{saved}, expected {mask}")
        changed = saved.num_changed / saved.num_active
        bench.figure(f"{NAME} sparse: entries whose bits changed", changed, "of active ones")


def _built(bench: Bench, model: Any, what: str) -> Any:
    bench.device.collect()
    started = time.perf_counter()
    engine = engines.build(model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True))
    bench.device.synchronize()
    bench.figure(f"{NAME} {what}: building the engine", time.perf_counter() - started, "s")
    return engine
