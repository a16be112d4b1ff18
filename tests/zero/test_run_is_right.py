"""Sparse ZeRO-3 equals a dense single-process reference on 1, 2 and 4 ranks, and frozen entries keep their bits."""

from __future__ import annotations

import pytest
import torch

from tests.zero import cases

STEPS, ACCUMULATION = 20, 2


@pytest.fixture(scope="module")
def expected():
    masks = cases.make_masks()
    return masks, *cases.reference(masks, STEPS, ACCUMULATION)


@pytest.mark.parametrize(
    ("world", "options"),
    [
        (1, {}),
        (2, {}),
        (2, {"shard_group_size": 1}),
        (2, {"reduce_every": "step"}),
        (4, {}),
        (4, {"shard_group_size": 1}),
        (4, {"shard_group_size": 2}),
        (1, {"gradient_reduction": "dense"}),
        (2, {"gradient_reduction": "dense"}),
        (4, {"gradient_reduction": "dense", "shard_group_size": 2}),
        (2, {"gradient_reduction": "dense", "config": {"zero": {"sub_group_size": 1000}}}),
        (2, {"config": {"zero": {"stage3_param_persistence_threshold": 100_000}}}),
        (2, {"config": {"zero": {"offload_param": {"device": "cpu"}}}}),
        (2, {"config": {"zero": {"sub_group_size": 1000}}}),
    ],
)
def test_equals_the_dense_reference(ranks, expected, world, options):
    masks, first, weights, norms = expected
    for result in ranks(world).run(_run, masks, STEPS, ACCUMULATION, options):
        for name, gradient in first.items():
            # fp32 sums in another order than the reference's float64 ones
            assert (result["first"][name].double() - gradient).abs().max() < 2e-6, name
        assert torch.allclose(torch.tensor(result["norms"]), torch.tensor(norms), rtol=1e-4)
        for name, weight in weights.items():
            assert (result["after"][name].double() - weight).abs().max() <= 1e-5 * weight.abs().max(), name
        _assert_frozen(result, masks)


@pytest.mark.parametrize(("world", "options"), [(1, {}), (2, {}), (4, {"shard_group_size": 2})])
def test_bf16_leaves_frozen_bits_alone(ranks, world, options):
    masks = cases.make_masks()
    options = options | {"dtype": torch.bfloat16, "config": {"bf16": {"enabled": True}}}
    results = ranks(world).run(_run, masks, 5, ACCUMULATION, options)
    for result in results:
        _assert_frozen(result, masks)
        assert all(torch.equal(result["after"][name], results[0]["after"][name]) for name in masks)


@pytest.mark.parametrize(("world", "options"), [(2, {}), (4, {"shard_group_size": 2, "gradient_reduction": "dense"})])
def test_gradients_sent_in_bf16(ranks, expected, world, options):
    masks, first, _, norms = expected
    sent = {}
    for kind in ("fp32", "bf16"):
        options = options | {"config": {"communication_data_type": kind}}
        results = ranks(world).run(_run, masks, 3, ACCUMULATION, options)
        sent[kind] = [result["report"]["bytes_sent"] for result in results]
    assert [2 * count for count in sent["bf16"]] == sent["fp32"] and min(sent["bf16"]) > 0
    for result in results:
        assert result["report"]["communication_dtype"] == "bfloat16"
        for name, gradient in first.items():
            # one rounding to 8 bits for each rank's share, and one more for the sum across groups
            assert (result["first"][name].double() - gradient).abs().max() <= 2**-7 * gradient.abs().max(), name
        assert torch.allclose(torch.tensor(result["norms"]), torch.tensor(norms[:3]), rtol=1e-2)
        assert all(torch.equal(result["after"][name], results[0]["after"][name]) for name in masks)
        _assert_frozen(result, masks)


def _run(masks, steps, accumulation, options):
    return cases.sparse_run(masks, steps, accumulation, **options)


def _assert_frozen(result, masks):
    num_changed = 0
    for name, before in result["before"].items():
        frozen = ~masks.get(name, torch.zeros_like(before, dtype=torch.bool))
        after = result["after"][name]
        assert torch.equal(after[frozen], before[frozen]), name
        num_changed += int((after != before).sum())
    assert num_changed > 0.5 * sum(int(mask.sum()) for mask in masks.values())
    assert all(result["flags"].values()), "requires_grad is restored"
