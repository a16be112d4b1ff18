"""What the planner says from a config equals what is counted from outside a run: held and sent within 2%. At no moment
does a rank hold more than is planned for it: built, in a step, saved, resumed, at the ticket and at selection.

A plan is of rank 0, which keeps the mask's indices; the others hold less.
"""

from __future__ import annotations

import pytest

from lota.kernels.reference import CPU_CHUNK
from tests.plan.counted import METHODS, MODELS, allowed, compare, counted

QUICK = [("llama", method) for method in METHODS if method != "lota 0.01"] + [("mixtral", "lota 0.01")]
# Activations of eight tokens, random generators' states and the like.
UNPLANNED = 64 << 10
# The norm's squares, in float64 and a chunk at a time on CPUs. Where ranks reduce, buckets take more than that.
NORM = 8 * CPU_CHUNK
REST = [(case, method) for case in MODELS for method in METHODS if (case, method) not in QUICK]


LIMITS = ("stage3_max_live_parameters", "stage3_max_reuse_distance")


def _check(ranks, case, method, options, world=2):
    for result in ranks(world).run(counted, case, method, options):
        for what, (planned, found) in compare(result).items():
            assert planned == pytest.approx(found, rel=0.02), f"{case}, {method}: {what}"
        moments = allowed(result)
        assert set(moments) == set(result["planned"].at_moments), "every moment that is planned is counted"
        if case == "mixtral":
            del moments["step"]  # eager code on CPUs allocates more for stacked experts than is planned
        for moment, (planned, found) in moments.items():
            unplanned = UNPLANNED + (NORM if world == 1 and moment == "step" else 0)
            assert found <= 1.02 * planned + unplanned, f"{case}, {method}: {moment}"


@pytest.mark.parametrize(("case", "method"), QUICK)
def test_held_and_sent(ranks, case, method):
    _check(ranks, case, method, {})


@pytest.mark.slow
@pytest.mark.parametrize(("case", "method"), REST)
def test_held_and_sent_by_the_rest(ranks, case, method):
    _check(ranks, case, method, {})


@pytest.mark.parametrize(
    "options",
    [
        {"shard_group_size": 1},
        {"reduce_every": "step"},
        {"pull": 10.0},
        {"communication_data_type": "bf16"},
        {
            "gradient_reduction": "dense",
            "zero": {"stage3_param_persistence_threshold": 1000} | dict.fromkeys(LIMITS, 10**9),
        },
    ],
)
def test_options(ranks, options):
    _check(ranks, "llama", "lota 0.1", options)


@pytest.mark.parametrize(("method", "options"), [("gradient", {}), ("lota 0.1", {"reduce_every": "step"})])
def test_one_rank(ranks, method, options):
    """Without anybody to reduce with there are no buckets, and no sums of micro steps beside the accumulators."""
    _check(ranks, "llama", method, options, world=1)
    for result in ranks(1).run(counted, "llama", method, options):
        assert "sums of micro steps" not in result["planned"].work
        assert result["planned"].work["reduction buffers"] == result["report"]["bytes_held"]["buffers"] == 0


OFFLOAD = {"offload_param": {"device": "cpu", "pin_memory": False}}


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("gradient", {}),
        ("lota 0.1", {"shard_group_size": 1, "uneven": True}),
        ("lota 0.01", {"shard_group_size": 2, "uneven": True}),
        ("lota 0.1", {"shard_group_size": 4, "uneven": True, "zero": OFFLOAD}),
        pytest.param("lota 0.1", {"shard_group_size": 2}, marks=pytest.mark.slow),
        pytest.param("lota 0.01", {"shard_group_size": 4, "uneven": True}, marks=pytest.mark.slow),
        pytest.param("lota 0.1", {"shard_group_size": 1, "gradient_reduction": "dense"}, marks=pytest.mark.slow),
        pytest.param("lota 0.1", {"shard_group_size": 2, "gradient_reduction": "dense"}, marks=pytest.mark.slow),
        pytest.param("lota 0.1", {"shard_group_size": 2, "reduce_every": "step"}, marks=pytest.mark.slow),
        pytest.param("lota 0.1", {"shard_group_size": 2, "zero": OFFLOAD}, marks=pytest.mark.slow),
    ],
)
def test_four_ranks(ranks, method, options):
    _check(ranks, "llama", method, options, world=4)


def _auto(memory):
    """Two steps with `auto` on an accelerator said to have that much memory."""
    from lota.zero import training
    from tests.zero import cases

    measured = training.smallest_memory
    training.smallest_memory = lambda device: memory
    try:
        report = cases.sparse_run(cases.make_masks(), 1, 1)["report"]
    finally:
        training.smallest_memory = measured
    return report


@pytest.mark.parametrize(("memory", "expected"), [(1 << 40, "compact"), (1 << 10, "dense")])
def test_auto_decides_alike_on_all_ranks_and_says_why(ranks, memory, expected):
    first, *others = ranks(2).run(_auto, memory)
    assert first["gradient_reduction"] == expected
    assert first["gradient_reduction_reason"].startswith(f"{expected}: ")
    assert others[0]["gradient_reduction_reason"] == first["gradient_reduction_reason"]
