"""The mask does not depend on the cut: 1, 2, 3 and 5 real ranks agree with one process, and errors reach every rank."""

from __future__ import annotations

import datetime
import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from lota.selection import select, topk
from lota.ticket import Mask

WORLD = 5
SIZES = [1, 2, 3, 5]
GENERATOR = torch.Generator().manual_seed(7)
SCORES = {
    "gradient": torch.randn(37, 41, generator=GENERATOR),
    "ties": torch.randint(-2, 3, (1201,), generator=GENERATOR).float() / 2,
    "one": torch.tensor([[0.5]]),
    "none": torch.empty(0, 3),
    "last": torch.tensor([float("inf"), -0.0, 0.5, float("-inf")]).repeat(9),
}
SHAPES = {name: tuple(values.shape) for name, values in SCORES.items()}
PROTECTED = Mask.from_dense({name: SCORES[name].abs() > 0.9 for name in ("gradient", "last")})
CUTS = ["even", "ragged", "one rank has all", "reversed", "whole tensors"]
CASES: list[dict[str, Any]] = [
    {"density": 0.1},
    {"density": 0.45, "seed": 3},
    {"density": 0.3, "protect": [PROTECTED]},
    {"density": 0.1, "budget": "per_tensor"},
    {"density": 0.2, "budget": "per_tensor", "protect": [PROTECTED], "seed": 3},
]


def _cut(how: str, rank: int, size: int, scores=SCORES):
    """This rank's pieces. Every way but "even" leaves some rank with empty pieces, or with none of some tensor."""
    for number, (name, values) in enumerate(scores.items()):
        flat = values.flatten()
        numel = flat.numel()
        if how == "even":  # as ZeRO-3 partitions: equal width, the last one short
            width = -(-numel // size)
            start, stop = min(rank * width, numel), min((rank + 1) * width, numel)
        elif how == "ragged":
            edges = torch.randint(0, numel + 1, (size - 1,), generator=torch.Generator().manual_seed(number)).tolist()
            edges = sorted([0, *edges, numel])
            start, stop = edges[rank], edges[rank + 1]
        elif how == "one rank has all":
            start, stop = (0, numel) if rank == size // 2 else (0, 0)
        elif how == "reversed":  # the last rank holds the beginning
            place = size - 1 - rank
            start, stop = numel * place // size, numel * (place + 1) // size
        else:
            if number % size != rank:
                continue
            start, stop = 0, numel
        yield name, start, flat[start:stop]


def _outcome(call) -> Any:
    try:
        return call()
    except ValueError as error:
        return str(error)


def _digest_and_facts(pieces, group, **options):
    selection = select(pieces, SHAPES, group=group, **options)
    return [selection.mask.digest, selection.facts(), selection.per_tensor]


def _broken(how: str, rank: int, size: int):
    """Pieces with one fault on the last rank only."""
    for name, start, scores in _cut("even", rank, size):
        if rank == size - 1 and name == "ties":
            if how == "nan":
                scores = torch.cat([scores[:-1], torch.tensor([float("nan")])])
            elif how == "padding":
                scores = torch.cat([scores, torch.zeros(3)])
            elif how == "unknown":
                name = "mistyped"
            elif how == "missing":
                continue
            elif how == "error of the caller":
                raise ValueError("the caller's own")
        yield name, start, scores


def _rank_main(rank: int, port: int, out_dir: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=60),
    )
    results: dict[str, Any] = {}
    for size in SIZES:
        group = dist.new_group(list(range(size)))
        if rank >= size:
            continue
        for ties in (topk.MAX_GATHERED_TIES, 3):
            topk.MAX_GATHERED_TIES, kept = ties, topk.MAX_GATHERED_TIES
            for number, options in enumerate(CASES):
                for how in CUTS if ties > 3 else CUTS[:1]:
                    got = _digest_and_facts(lambda how=how, size=size: _cut(how, rank, size), group, **options)
                    results[f"{size}|{ties}|{number}|{how}"] = got
            topk.MAX_GATHERED_TIES = kept
    for how in FAULTS:
        for budget in ("global", "per_tensor"):
            results[f"{how}|{budget}"] = _outcome(
                lambda how=how, budget=budget: _digest_and_facts(
                    lambda: _broken(how, rank, WORLD), None, density=0.1, budget=budget
                )
            )
    results["zero"] = _outcome(
        lambda: _digest_and_facts(
            lambda: ((name, start, scores * 0) for name, start, scores in _cut("even", rank, WORLD, FINITE)),
            None,
            density=0.1,
        )
    )
    results["arguments differ"] = _outcome(
        lambda: _digest_and_facts(lambda: _cut("even", rank, WORLD), None, density=0.1 if rank else 0.2)
    )
    results["afterwards"] = _digest_and_facts(lambda: _cut("even", rank, WORLD), None, **CASES[0])
    Path(out_dir, f"{rank}.json").write_text(json.dumps(results), encoding="utf-8")
    dist.destroy_process_group()


FINITE = {name: values.nan_to_num(posinf=1, neginf=1) for name, values in SCORES.items()}
FAULTS = {
    "nan": "got 1 NaN in ties",
    "padding": "scores of ties must lie in [0, 1201), got [964, 1204)",
    "unknown": "gave scores for mistyped",
    "missing": "expected 1201 scores for ties over all ranks, got 964",
    "error of the caller": "the caller's own",
}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict[str, Any]]:
    out_dir = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(_rank_main, args=(port, str(out_dir)), nprocs=WORLD)
    return [json.loads((out_dir / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(WORLD)]


@pytest.mark.parametrize("number", range(len(CASES)))
@pytest.mark.parametrize("size", SIZES)
def test_same_mask_for_every_cut(results, size, number):
    expected = _digest_and_facts(lambda: _cut("even", 0, 1), None, **CASES[number])
    for ties in (topk.MAX_GATHERED_TIES, 3):
        for how in CUTS if ties > 3 else CUTS[:1]:
            for rank in range(size):
                assert results[rank][f"{size}|{ties}|{number}|{how}"] == json.loads(json.dumps(expected)), how


@pytest.mark.parametrize("budget", ["global", "per_tensor"])
@pytest.mark.parametrize("how", FAULTS)
def test_a_fault_on_one_rank_is_the_same_error_on_all(results, how, budget):
    messages = {results[rank][f"{how}|{budget}"] for rank in range(WORLD)}
    assert len(messages) == 1
    assert FAULTS[how] in messages.pop()


def test_all_zero_on_all_ranks(results):
    assert {"got 0 for all that may be chosen" in results[rank]["zero"] for rank in range(WORLD)} == {True}


def test_arguments_that_differ_between_ranks(results):
    message = "expected the same shapes, density, budget, protect and seed on every rank, got different ones."
    assert {results[rank]["arguments differ"] for rank in range(WORLD)} == {message}


def test_ranks_stay_in_step_after_errors(results):
    expected = _digest_and_facts(lambda: _cut("even", 0, 1), None, **CASES[0])
    assert all(results[rank]["afterwards"] == json.loads(json.dumps(expected)) for rank in range(WORLD))
