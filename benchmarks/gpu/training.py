"""Steps of a language model on random tokens: how fast, how much memory, and whose time it is."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench
from benchmarks.timing import median

WARMUP = 2
OUR_SHARE = 0.05
"""Of a step's time, the most that our hooks and our step should take."""


def one_step(engine: Any, tokens: int, seed: int) -> Tensor:
    """Forward, backward and step on one sequence; the loss, a device scalar."""
    device, vocabulary = engine.device, engine.module.config.vocab_size
    generator = torch.Generator(device).manual_seed(seed)
    ids = torch.randint(0, vocabulary, (1, tokens), generator=generator, device=device)
    loss = engine(input_ids=ids, labels=ids).loss
    engine.backward(loss)
    engine.step()
    return loss.detach()


def measure_steps(
    bench: Bench, engine: Any, name: str, *, at_least: float | None = None, planned: str = ""
) -> None:
    """Figures of a few steps after two that warm up: tokens a second, milliseconds, peak and held memory.

    at_least: the tokens a second to reach. planned: what stands beside the peak.
    """
    device, tokens, held = bench.device, bench.sizes.tokens, []
    for step in range(WARMUP):
        one_step(engine, tokens, step)
    device.synchronize()
    device.reset_peak()
    took, losses = [], []
    for step in range(bench.sizes.steps):
        start = time.perf_counter()
        losses.append(one_step(engine, tokens, WARMUP + step))
        device.synchronize()
        took.append(time.perf_counter() - start)
        held.append(device.held_bytes())
    seconds = median(took)
    bench.check(f"{name}: losses are finite", bool(torch.isfinite(torch.stack(losses)).all()), f"{losses}")
    bench.figure(f"{name}: tokens/s", tokens / seconds, "", at_least=at_least)
    bench.figure(f"{name}: step", seconds * 1e3, "ms", beside=f"fastest {min(took) * 1e3:.4g} ms")
    bench.figure(f"{name}: peak memory", device.peak_bytes() / 2**30, "GiB", beside=planned)
    bench.figure(f"{name}: held between steps", held[-1] / 2**30, "GiB")


def measure_shares(bench: Bench, engine: Any, name: str) -> None:
    """Which share of a step our hooks take, and our step: on the device's own clock, in steps of their own."""
    core, run = engine.optimizer.core, engine.run
    hooks, step, whole = (bench.device.stopwatch() for _ in range(3))
    hooks.watch(core, "add_gradient", "finish_backward")
    hooks.watch(run, "before_step", "after_step")
    step.watch(core, "step")
    shares: dict[str, list[float]] = {"our hooks": [], "our step": []}
    for number in range(3):
        with whole.running():
            one_step(engine, bench.sizes.tokens, 1000 + number)
        total = whole.seconds()
        shares["our hooks"].append(hooks.seconds() / total)
        shares["our step"].append(step.seconds() / total)
    for what, values in shares.items():
        bench.figure(f"{name}: {what}", median(values), "of a step")
    both = median([sum(pair) for pair in zip(*shares.values(), strict=True)])
    bench.figure(f"{name}: hooks and step", both, "of a step", at_most=OUR_SHARE)
