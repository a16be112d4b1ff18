"""Stage `swap`: one ticket for another on a model of 8B shapes.

Two ways. `kernels.exchange_` with index and values on the device, tensor by tensor: what a server that keeps tickets
there would do. And `apply_`, `exchange_` and `revert()` as they are, which decode the ticket's index on the host, with
and without the base's fingerprints.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import lota
from benchmarks.gpu import models
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.sizes import llama_shapes
from benchmarks.timing import median
from lota.kernels import TileIndex, exchange_, gather
from lota.ticket import BaseTensor
from lota.ticket.fingerprint import fingerprint, to_hex

AIM_MS = 10.0  # at 1%, without fingerprints
# Tickets are encoded and decoded on the host, in some 30 ns an entry: not all of the model.
CASES = ((0.01, 0.5), (0.1, 1 / 16))

Shapes = Mapping[str, tuple[int, ...]]


def run(bench: Bench) -> None:
    shapes = llama_shapes(bench.sizes.model_8b)
    model = models.make_bare(shapes, bench.device.torch)
    base = _prints(model)
    for density in (0.01, 0.1):
        part = partial(_resident, bench, model, shapes, density)
        bench.attempt(f"kernels, {density:.0%}", part, seconds=4)
        _check_base(bench, model, base, f"kernels, {density:.0%}")
    for density, share in CASES:
        layers = max(1, round(share * bench.sizes.model_8b["num_hidden_layers"]))
        some = dict(list(shapes.items())[: layers * len(shapes) // bench.sizes.model_8b["num_hidden_layers"]])
        seconds = 2 + density * sum(map(math.prod, some.values())) * 2.5e-7
        part = partial(_tickets, bench, model, some, density, f"{density:.0%} of {layers} layer(s)", base)
        bench.attempt(f"tickets, {density:.0%}", part, seconds=seconds)
        _check_base(bench, model, base, f"tickets, {density:.0%}")


def _resident(bench: Bench, model: nn.Module, shapes: Shapes, density: float) -> None:
    device = bench.device
    generator = torch.Generator(device.torch).manual_seed(2)
    places: list[tuple[Tensor, TileIndex, Tensor]] = []
    for name, shape in shapes.items():
        positions = models.random_positions(math.prod(shape), density, generator)
        index, flat = TileIndex.from_flat(positions, math.prod(shape)), model.get_parameter(name).detach().view(-1)
        values = gather(flat, index, out=flat.new_empty(index.num_active)).add_(1e-3)
        places.append((flat, index, values))

    def swap() -> None:
        for flat, index, values in places:
            exchange_(flat, index, values)

    swap()
    swap()
    watch, took, hosts = device.stopwatch(), [], []
    for _ in range(2 * bench.sizes.swaps):  # an even number puts the base back
        with watch.running():
            started = time.perf_counter()
            swap()
            hosts.append(time.perf_counter() - started)
        took.append(watch.seconds())
    active = sum(index.num_active for _, index, _ in places)
    held = sum(index.nbytes + values.nbytes for _, index, values in places)
    name = f"swap of {density:.0%} on the device"
    at_most = AIM_MS if density == 0.01 else None
    beside = f"{active:,} entries in {len(places)} tensors, {held / 2**30:.3g} GiB a ticket"
    bench.figure(name, median(took) * 1e3, "ms", at_most=at_most, beside=beside)
    bench.figure(f"{name}: host", median(hosts) * 1e3, "ms")


def _tickets(
    bench: Bench, model: nn.Module, shapes: Shapes, density: float, name: str, base: Mapping[str, str]
) -> None:
    one, other = (_ticket(bench, model, shapes, density, seed) for seed in (3, 4))
    known = {key: BaseTensor("bfloat16", base[key]) for key in shapes}
    for what, given in (("without fingerprints", {}), ("with fingerprints", known)):
        first, second = (lota.Ticket(t.mask.with_base(given), _values(t)) for t in (one, other))
        handle, seconds = _timed(bench, lambda t=first: lota.apply_(model, t))
        bench.figure(f"apply_, {name}, {what}", seconds * 1e3, "ms", beside=f"{first.num_active:,} entries")
        handle, seconds = _timed(bench, lambda h=handle, t=second: lota.exchange_(model, h, t))
        at_most = AIM_MS if density == 0.01 and not given else None
        bench.figure(f"exchange_, {name}, {what}", seconds * 1e3, "ms", at_most=at_most)
        bench.check(f"exchange_, {name}, {what}: the new ticket is on", _is_on(model, second), "expected its values")
        _, seconds = _timed(bench, handle.revert)
        bench.figure(f"revert, {name}, {what}", seconds * 1e3, "ms")


def _ticket(bench: Bench, model: nn.Module, shapes: Shapes, density: float, seed: int) -> lota.Ticket:
    """Random entries, moved a little; values stay on the device."""
    mask = models.random_mask(shapes, density, bench.device.torch, seed)
    values = {}
    for name in shapes:
        flat = model.get_parameter(name).detach().view(-1)
        values[name] = flat[mask.indices(name).to(flat.device)].add(1e-3)
    return lota.Ticket(mask, values)


def _values(ticket: lota.Ticket) -> dict[str, Tensor]:
    return {name: ticket.values(name) for name in ticket.names}


def _is_on(model: nn.Module, ticket: lota.Ticket) -> bool:
    name = ticket.names[-1]
    flat = model.get_parameter(name).detach().view(-1)
    return torch.equal(flat[ticket.mask.indices(name).to(flat.device)], ticket.values(name))


def _timed(bench: Bench, call: Callable[[], Any]) -> tuple[Any, float]:
    kept: list[Any] = []
    _, seconds = bench.device.host_seconds(lambda: kept.append(call()))
    return kept[0], seconds


def _prints(model: nn.Module) -> dict[str, str]:
    return {name: to_hex(fingerprint(p.detach().view(-1))) for name, p in model.named_parameters()}


def _check_base(bench: Bench, model: nn.Module, base: Mapping[str, str], name: str) -> None:
    moved = [key for key, value in _prints(model).items() if value != base[key]]
    bench.check(f"{name}: the base is back, bit for bit", not moved, f"{len(moved)} tensors differ, {moved[:2]} first")
