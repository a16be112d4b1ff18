"""Gradients travel while backward still computes earlier layers' ones: asynchronously, and waited for at its end."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional as F

import lota
from tests.zero import cases


def _events(options: dict[str, Any]) -> list[str]:
    """What happens in one backward, in order: tensors whose gradients arrive, asynchronous sends, its end."""
    import deepspeed

    rank, world = dist.get_rank(), dist.get_world_size()
    model = cases.make_model()
    events: list[str] = []

    def recorded(function: Any, what: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            events.append(what(*args, **kwargs))
            return function(*args, **kwargs)

        return wrapped

    def kind(*_: Any, async_op: bool = False, **__: Any) -> str:
        return "sent" if async_op else "agreed"

    with lota.sparse_zero3(lota.Mask.from_dense(cases.make_masks()), **options) as run:
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=cases.default_optimizer(model), config=cases.config(1, world)
        )
        rows = slice(rank * cases.ROWS // world, (rank + 1) * cases.ROWS // world)
        ((x, flags, target),) = cases.micro_batches(2, 1)
        loss = F.cross_entropy(engine(x[rows], torch.ones_like(flags[rows])), target[rows])
        run.core.add_gradient = recorded(run.core.add_gradient, lambda name, gradient: name)
        run.core.finish_backward = recorded(run.core.finish_backward, lambda last: "end")
        originals = {name: getattr(dist, name) for name in ("all_to_all_single", "all_reduce")}
        try:
            for name, function in originals.items():
                setattr(dist, name, recorded(function, kind))
            engine.backward(loss)
        finally:
            for name, function in originals.items():
                setattr(dist, name, function)
        events.append("over")
        in_flight = len(run.core._reducer._flights)
        engine.destroy()
    assert in_flight == 0
    return events


OPTIONS = [{}, {"shard_group_size": 1}, {"gradient_reduction": "dense"}]


def _all() -> list[list[str]]:
    return [_events(options) for options in OPTIONS]


def test_buckets_leave_during_backward(ranks):
    for found in ranks(2).run(_all):
        for options, events in zip(OPTIONS, found, strict=True):
            arrivals = [event for event in events if event.startswith("blocks.")]
            assert len(arrivals) == 6 and arrivals[-1].startswith("blocks.0"), options
            assert "sent" in events[: events.index(arrivals[3])], "before half of the gradients are there"
            during, after = events[: events.index("end")], events[events.index("end") :]
            assert during.count("sent") >= 4 and "agreed" not in during, (options, events)
            assert "sent" not in after, "every tensor was used, so every bucket was full before the end"
