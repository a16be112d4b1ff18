"""Which ranks share the weights: numbers, nodes and the world, what is refused, and that groups are connected early."""

from __future__ import annotations

import pytest

from lota.zero.compact.groups import check_shard_group_size
from tests.zero import cases


def _on(monkeypatch: pytest.MonkeyPatch, **environment: str) -> None:
    for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(("asked", "size"), [(None, 8), ("world", 8), (2, 2), ("2", 2), (8, 8), ("node", 4)])
def test_sizes(monkeypatch, asked, size):
    _on(monkeypatch, RANK="6", LOCAL_RANK="2", LOCAL_WORLD_SIZE="4")
    assert check_shard_group_size(asked, 8) == size


def test_deepspeeds_launcher_has_a_name_of_its_own(monkeypatch):
    _on(monkeypatch, RANK="6", LOCAL_RANK="2", LOCAL_SIZE="4")
    assert check_shard_group_size("node", 8) == 4


def test_a_process_that_nothing_launched_is_a_node(monkeypatch):
    _on(monkeypatch)
    assert check_shard_group_size("node", 1) == 1


@pytest.mark.parametrize(
    ("asked", "environment", "message"),
    [
        (3, {}, r"shard_group_size 3 does not divide the 8 ranks; use one of \[1, 2, 4, 8\]"),
        ("3", {}, r"shard_group_size 3 does not divide"),
        (0, {}, "must be a positive integer, node or world, got 0"),
        (True, {}, "must be a positive integer, node or world, got True"),
        ("nodes", {}, "must be a positive integer, node or world, got 'nodes'"),
        ("node", {"RANK": "6"}, "expected RANK, LOCAL_RANK and LOCAL_WORLD_SIZE in the environment, got '6', '' and"),
        ("node", {"RANK": "6", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}, "rank 6 is number 1 of 4 on its node"),
        (
            "node",
            {"RANK": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "3"},
            r"does not divide the 8 ranks \(3 on this node\); every node needs the same number",
        ),
    ],
)
def test_refused(monkeypatch, asked, environment, message):
    _on(monkeypatch, **environment)
    with pytest.raises(ValueError, match=message):
        check_shard_group_size(asked, 8)


def _on_two_nodes(sizes: list[int]) -> list[int]:
    """The shard group size of a run whose ranks are told these numbers of ranks on their nodes."""
    import os

    rank = int(os.environ["RANK"])
    node_of, first = next(
        (size, start) for size, start in zip(sizes, _starts(sizes), strict=True) if start <= rank < start + size
    )
    before = {name: os.environ[name] for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    os.environ.update(LOCAL_RANK=str(rank - first), LOCAL_WORLD_SIZE=str(node_of))
    try:
        return cases.sparse_run(cases.make_masks(), 1, 1, shard_group_size="node")["report"]["shard_group_size"]
    finally:
        os.environ.update(before)


def _starts(sizes: list[int]) -> list[int]:
    return [sum(sizes[:place]) for place in range(len(sizes))]


def test_the_ranks_of_a_node_share(ranks):
    assert ranks(4).run(_on_two_nodes, [2, 2]) == [2] * 4


def test_nodes_of_different_sizes_are_refused_on_every_rank(ranks):
    for outcome in ranks(4).outcomes(_on_two_nodes, [2, 1, 1]):
        assert outcome.error_type == "ValueError"
        assert "means 2 ranks on rank 0 and 1 on rank 2" in outcome.error


def test_scripts_that_differ_are_refused_on_every_rank(ranks):
    for outcome in ranks(2).outcomes(_differing):
        assert outcome.error_type == "ValueError"
        assert "means" in outcome.error


def _differing() -> None:
    import torch

    cases.sparse_run(cases.make_masks(), 1, 1, shard_group_size=1 + torch.distributed.get_rank())


def _collectives(folder: str, shard_group_size: int, reduction: str) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """Kinds and ranks of the collectives on groups that carry gradients: while the engine is built, and afterwards."""
    import deepspeed
    import torch
    from torch import distributed as dist
    from torch.nn import functional as F

    import lota

    rank, world = dist.get_rank(), dist.get_world_size()
    found: dict[str, list[tuple[str, tuple[int, ...]]]] = {"built": [], "trained": []}
    when = "built"
    names = ("all_to_all_single", "all_reduce", "send", "recv", "isend", "irecv", "batch_isend_irecv")
    originals = {name: getattr(dist, name) for name in names}

    def seen(name: str, *args: object, **kwargs: object) -> object:
        group = kwargs.get("group")
        if group is not None:
            found[when].append((name, tuple(dist.get_process_group_ranks(group))))
        return originals[name](*args, **kwargs)

    model = cases.make_model()
    mask = lota.Mask.from_dense(cases.make_masks())
    try:
        for name in names:
            setattr(dist, name, lambda *args, _name=name, **kwargs: seen(_name, *args, **kwargs))
        with lota.sparse_zero3(mask, shard_group_size=shard_group_size, gradient_reduction=reduction) as run:
            engine, *_ = deepspeed.initialize(
                model=model, optimizer=cases.default_optimizer(model), config=cases.config(1, world)
            )
            when = "trained"
            ((x, flags, target),) = cases.micro_batches(1, 1)
            rows = slice(rank * cases.ROWS // world, (rank + 1) * cases.ROWS // world)
            engine.backward(F.cross_entropy(engine(x[rows], flags[rows]), target[rows]))
            engine.step()
            run.save_ticket(folder)
            weights = cases.gathered(engine.module)
            engine.destroy()
    finally:
        for name, function in originals.items():
            setattr(dist, name, function)
    if rank == 0:
        ticket = lota.Ticket.load(folder)
        for name in ticket.names:
            positions = mask.indices(name)
            assert torch.equal(ticket.values(name), weights[name].flatten()[positions])
            assert torch.equal(ticket.base_values(name), cases.make_model().get_parameter(name).flatten()[positions])
    return found


@pytest.mark.parametrize(
    ("world", "size", "reduction"), [(2, 2, "compact"), (2, 1, "compact"), (4, 2, "dense"), (4, 4, "compact")]
)
def test_no_communicator_is_made_after_the_engine_is_built(ranks, tmp_path, world, size, reduction):
    """NCCL makes one at the first collective of a group, and one for a pair of ranks at their first send."""
    for found in ranks(world).run(_collectives, str(tmp_path / "ticket"), size, reduction):
        assert found["trained"] and set(found["trained"]) <= set(found["built"])
        assert {kind for kind, _ in found["trained"]} <= {"all_to_all_single", "all_reduce"}
