"""Stage `step`: the compact AdamW step against its byte floor and its rivals, and the launch shapes tried.

The floor is the bytes that must move (docs/performance.md, counted on the positions at hand) over the bandwidth of a
copy timed in the same rounds. Results are compared with plain torch's first: no figure while they are wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import Any

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.kernels import ADAMW, Case, dense_steps
from benchmarks.timing import median, rounds
from lota.kernels.backend import backend, backend_name

DENSITIES = (0.1, 0.01, 0.001)
AIM = 0.8
CHECKED = "step, stochastic rounding, pull, gather_add_ and exchange_"
OURS = ("adamw_", "adamw_, pull", "three launches", "exchange_")
FUSED, FOREACH = "dense torch.optim.AdamW(fused)", "dense torch.optim.AdamW(foreach)"
# (entries of a program, warps); the usual one comes first.
LAUNCH_SHAPES = ((1024, 4), (1024, 2), (1024, 8), (512, 1), (512, 2), (512, 4), (256, 1), (256, 2))


def run(bench: Bench) -> None:
    bench.note(f"kernels: {backend_name(bench.device.torch)}")
    for size, numel in bench.sizes.weights.items():
        rivals = dict(islice(dense_steps(numel, bench.device.torch), 2))
        for density in DENSITIES:
            name = f"{size} at {density:.1%}"
            bench.attempt(name, partial(_measure, bench, name, numel, density, rivals), seconds=4)
        del rivals
        bench.device.collect()


def _measure(bench: Bench, name: str, numel: int, density: float, rivals: dict[str, Callable[[], Any]]) -> None:
    case = Case(numel, density, bench.device.torch)
    case.check()
    bench.check(f"{name}: the bits are plain torch's", True, CHECKED)
    source = torch.ones(bench.sizes.copied_bytes // 4, device=bench.device.torch)
    ours = {key: call for key, call in case.calls().items() if key in OURS}
    shapes = _launch_shapes(bench, name, case)
    copy = partial(torch.empty_like(source).copy_, source)
    working = {key: call for key, call in rivals.items() if bench.works(f"{name}: {key}", call)}
    if not bench.works(f"{name}: three launches", ours["three launches"]):
        del ours["three launches"]
    took = rounds({"copy": copy, **working, **ours, **shapes}, bench.sizes.rounds, bench.device.torch)
    typical = {key: median(values) for key, values in took.items()}
    bandwidth = 2 * bench.sizes.copied_bytes / typical["copy"]
    floor = case.floor_bytes("adamw_") / bandwidth
    step = typical["adamw_"]
    bench.figure(f"{name}: copy", bandwidth / 1e9, "GB/s")
    bench.figure(f"{name}: step", step * 1e3, "ms", beside=f"floor {floor * 1e3:.4g} ms")
    bench.figure(f"{name}: step, share of the floor", floor / step, "", at_least=AIM)
    hosts = [bench.device.host_seconds(ours["adamw_"])[0] for _ in range(bench.sizes.rounds)]
    bench.figure(f"{name}: step, until the call returns", median(hosts) * 1e3, "ms")
    pulled = typical["adamw_, pull"]
    share = case.floor_bytes("adamw_, pull") / bandwidth / pulled
    bench.figure(f"{name}: step with a pull, of the step", pulled / step, "", beside=f"{share:.3f} of its floor")
    exchange = case.floor_bytes("exchange_") / bandwidth / typical["exchange_"]
    bench.figure(f"{name}: exchange, share of the floor", exchange, "", beside=f"{typical['exchange_'] * 1e3:.4g} ms")
    for rival in (key for key in (FUSED, FOREACH, "three launches") if key in typical):
        bench.figure(f"{name}: of {rival}", step / typical[rival], "", beside=f"{typical[rival] * 1e3:.4g} ms")
    best = min(shapes, key=lambda shape: typical[shape])
    told = ", ".join(f"{shape}: {typical[shape] * 1e3:.4g}" for shape in shapes)
    bench.figure(f"{name}: best launch shape", typical[best] * 1e3, "ms", beside=f"{best} (ms: {told})")


def _launch_shapes(bench: Bench, name: str, case: Case) -> dict[str, Callable[[], Any]]:
    """The step launched in every shape. Only Triton's has any; elsewhere it is the one that there is."""
    is_triton = backend_name(bench.device.torch) == "triton"
    shapes = {f"{block}/{warps} warps": {"block": block, "num_warps": warps} for block, warps in LAUNCH_SHAPES}
    calls: dict[str, Callable[[], Any]] = {}
    usual: list[torch.Tensor] | None = None
    for shape, options in shapes.items() if is_triton else [("the only one", {})]:
        tensors = [tensor.clone() for tensor in (case.weights, *case.state)]
        if not bench.works(f"{name}: launched as {shape}", partial(_step, bench, case, tensors, options)):
            continue
        usual = usual or tensors
        is_same = all(torch.equal(one, other) for one, other in zip(tensors, usual, strict=True))
        bench.check(f"{name}: launched as {shape}", is_same, "expected the bits of the usual launch")
        calls[shape] = partial(_step, bench, case, [case.weights, *case.state], options)
    return calls


def _step(bench: Bench, case: Case, tensors: list[torch.Tensor], options: dict[str, int]) -> None:
    weights, *state = tensors
    numbers = ADAMW["beta1"], ADAMW["beta2"], ADAMW["eps"]
    backend(bench.device.torch).adamw_(
        weights, case.compact, case.index, *state, case.scalars, *numbers, True, None, 0, None, **options
    )
