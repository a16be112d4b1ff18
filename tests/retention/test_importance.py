"""Importance: its sums are those of the exact squared gradients, its mean is 1, and files come back bit for bit."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lota.retention import FILE_NAME, Importance, strength
from lota.retention.factors import ExactSums, SquareSums, at, matrices
from lota.ticket import Mask

SHAPES = {"plain": (6, 5), "experts": (3, 4, 2), "vector": (7,), "one": (1, 1), "wide": (1, 9), "empty": (0, 4)}


def gradients(seed: int, count: int = 4) -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(seed)
    return [{name: torch.randn(shape) * 1e-3 for name, shape in SHAPES.items()} for _ in range(count)]


def collected(batches: list[dict[str, torch.Tensor]], mask: Mask | None = None) -> Importance:
    sums = {name: SquareSums(shape, torch.device("cpu")) for name, shape in SHAPES.items()}
    exact = None if mask is None else ExactSums(mask, {})
    for batch in batches:
        for name, gradient in batch.items():
            sums[name].add(gradient)
            if exact is not None:
                exact.add(name, gradient)
    return Importance.of_sums(SHAPES, sums, exact)


def whole(importance: Importance, name: str) -> torch.Tensor:
    shape = SHAPES[name]
    return importance.at(name, torch.arange(math.prod(shape), dtype=torch.int64)).view(shape)


@pytest.mark.parametrize("name", SHAPES)
def test_row_and_column_sums_are_those_of_the_exact_diagonal(name: str) -> None:
    batches = gradients(0)
    importance = collected(batches)
    exact = sum(batch[name].double() ** 2 for batch in batches)
    mean = sum(float((batch[n].double() ** 2).sum()) for batch in batches for n in SHAPES)
    mean /= sum(math.prod(shape) for shape in SHAPES.values())
    found = whole(importance, name).double()
    number, num_rows, num_columns = matrices(SHAPES[name])
    found, exact = (x.reshape(number, num_rows, num_columns) for x in (found, exact / mean))
    torch.testing.assert_close(found.sum(2), exact.sum(2), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.sum(1), exact.sum(1), rtol=1e-5, atol=0)
    if name in ("vector", "one", "wide"):  # a product of two vectors says all of it
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=0)


def test_its_mean_over_all_entries_is_one_whatever_the_scale_of_the_loss() -> None:
    batches = gradients(1)
    scaled = [{name: gradient * 1024 for name, gradient in batch.items()} for batch in batches]
    total = sum(float(whole(collected(batches), name).double().sum()) for name in SHAPES)
    assert total == pytest.approx(sum(math.prod(shape) for shape in SHAPES.values()), rel=1e-6)
    for name in SHAPES:
        assert torch.equal(whole(collected(scaled), name), whole(collected(batches), name))


def test_tensors_of_no_gradient_count_as_zero_and_tiny_ones_do_not_vanish() -> None:
    batch = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    batch["plain"] = torch.full(SHAPES["plain"], 1e-15)  # squares of 1e-30: a product of two sums would be below fp32
    found = collected([batch])
    assert torch.equal(whole(found, "experts"), torch.zeros(SHAPES["experts"]))
    assert bool((whole(found, "plain") > 1).all())


def test_exact_at_a_masks_entries_and_refused_for_another_mask() -> None:
    batches = gradients(2)
    torch.manual_seed(3)
    mask = Mask.from_dense({name: torch.rand(shape) < 0.4 for name, shape in SHAPES.items()})
    importance = collected(batches, mask)
    mean = sum(float((batch[n].double() ** 2).sum()) for batch in batches for n in SHAPES)
    mean /= sum(math.prod(shape) for shape in SHAPES.values())
    for name in mask.names:
        exact = sum(batch[name].double() ** 2 for batch in batches).flatten()[mask.indices(name)] / mean
        torch.testing.assert_close(importance.at_active(mask, name).double(), exact, rtol=2**-8, atol=0)  # bf16
    other = Mask.from_dense({name: torch.rand(shape) < 0.4 for name, shape in SHAPES.items()})
    with pytest.raises(ValueError, match="entries of another mask"):
        importance.at_active(other, "plain")


def test_several_tasks_add_up_and_what_one_does_not_know_counts_as_zero() -> None:
    first, second = collected(gradients(4)), collected(gradients(5))
    mask = Mask.from_dense({name: torch.ones(shape, dtype=torch.bool) for name, shape in SHAPES.items()})
    both = strength([first, second], mask, "plain")
    assert torch.equal(both, first.at_active(mask, "plain") + second.at_active(mask, "plain"))
    part = Importance({"plain": (6, 5)}, {"plain": torch.ones(6)}, {"plain": torch.ones(5)})
    assert torch.equal(strength([part], mask, "experts"), torch.zeros(24))


def test_a_file_comes_back_bit_for_bit_and_again_the_same_bytes(tmp_path) -> None:
    mask = Mask.from_dense({name: torch.ones(shape, dtype=torch.bool) for name, shape in SHAPES.items()})
    importance = collected(gradients(6), mask)
    size = importance.save(tmp_path)
    assert size == (tmp_path / FILE_NAME).stat().st_size
    again = Importance.load(tmp_path)
    assert again.digest == importance.digest and again.mask_digest == mask.digest and again.facts == importance.facts
    again.save(tmp_path / "second.safetensors")
    assert (tmp_path / "second.safetensors").read_bytes() == (tmp_path / FILE_NAME).read_bytes()


def test_damage_and_absence_are_refused_by_name(tmp_path) -> None:
    importance = collected(gradients(7))
    importance.save(tmp_path / "x.safetensors")
    content = bytearray((tmp_path / "x.safetensors").read_bytes())
    content[-3] ^= 1
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.safetensors: not a sound importance file.*sha256"):
        Importance.load(tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").write_bytes(content[:100])
    with pytest.raises(ValueError, match="not a sound importance file"):
        Importance.load(tmp_path / "x.safetensors")
    save_file({"a": torch.zeros(2)}, tmp_path / "y.safetensors")
    with pytest.raises(ValueError, match="not a sound importance file"):
        Importance.load(tmp_path / "y.safetensors")
    (tmp_path / "ticket").mkdir()
    with pytest.raises(ValueError, match="keep_importance: true"):
        Importance.load(tmp_path / "ticket")
    with pytest.raises(ValueError, match="found none"):
        Importance.load(tmp_path / "nowhere")


def test_a_newer_version_is_refused(tmp_path) -> None:
    collected(gradients(8)).save(tmp_path)
    with safe_open(tmp_path / FILE_NAME, framework="pt") as file:
        about = json.loads(file.metadata()["lota"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    save_file(tensors, tmp_path / FILE_NAME, metadata={"lota": json.dumps(about | {"version": 2})})
    with pytest.raises(ValueError, match="update lota"):
        Importance.load(tmp_path)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_sums_that_are_not_finite_or_negative_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="a: the importance of its rows is not finite or below 0"):
        Importance({"a": (2, 2)}, {"a": torch.tensor([1.0, bad])}, {"a": torch.ones(2)})


def test_no_gradient_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="no gradient arrived"):
        Importance({"a": (2, 2)}, {"a": torch.zeros(2)}, {"a": torch.zeros(2)})


def test_another_models_importance_does_not_fit() -> None:
    importance = collected(gradients(9))
    with pytest.raises(ValueError, match="knows none of the tensors"):
        importance.check_fits({"x": (2, 2)})
    with pytest.raises(ValueError, match=r"plain: expected shape \(6, 5\), as in the importance, got \(5, 6\)"):
        importance.check_fits({"plain": (5, 6)})
    importance.check_fits({"plain": (6, 5), "head.weight": (2, 2)})


def test_a_plain_model_is_left_as_it_was() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=40, num_key_value_heads=1, **sizes))
    model.lm_head.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.randint(0, 40, (6, 4, 9))
    batches = [{"input_ids": rows, "labels": rows} for rows in ids]
    importance = Importance.collect(model, batches)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.lm_head.weight.requires_grad and model.model.norm.weight.requires_grad
    name = "model.layers.1.mlp.down_proj.weight"
    exact = torch.zeros(16, 24, dtype=torch.float64)
    for batch in batches:
        (gradient,) = torch.autograd.grad(model(**batch).loss, [model.get_parameter(name)])
        exact += gradient.double() ** 2
    found = importance.at(name, torch.arange(16 * 24)).view(16, 24).double()
    torch.testing.assert_close(found.sum(1) / found.sum(), exact.sum(1) / exact.sum(), rtol=1e-5, atol=0)
    assert at((2, 2), torch.zeros(2), torch.zeros(2), torch.arange(4)).tolist() == [0.0] * 4
