"""MaskedAdamW and MaskedRMSprop equal a dense reference, and the ZeRO-3 path bit for bit; frozen bits stay."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import lota
from lota.kernels import rounding_key, using
from lota.kernels.rounding import random_bits, to_bf16
from lota.optim import MaskedAdamW, MaskedRMSprop
from tests.no_sync import NoSync
from tests.zero import cases

RMSPROP = {"lr": 1e-3, "alpha": 0.9, "eps": 1e-6, "weight_decay": 0.01}


def _mask() -> lota.Mask:
    return lota.Mask.from_dense(cases.make_masks())


def _train(model, optimizer, steps, first=1, accumulation=1, rows=slice(None), scheduler=None) -> None:
    for step in range(first, first + steps):
        for x, flags, target in cases.micro_batches(step, accumulation):
            dtype = model.head.weight.dtype if hasattr(model, "head") else torch.float32
            loss = F.cross_entropy(model(x[rows].to(dtype), flags[rows]).float(), target[rows])
            (loss / accumulation).backward()
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()


def _bits(model) -> dict[str, torch.Tensor]:
    views = {4: torch.int32, 2: torch.int16}
    return {name: p.detach().clone().view(views[p.element_size()]) for name, p in model.named_parameters()}


def _assert_same_bits(one: Any, other: Any) -> None:
    for name, bits in _bits(one).items():
        assert torch.equal(bits, _bits(other)[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_with_clipping_equals_a_dense_reference(dtype):
    model, before = cases.make_model(dtype), cases.make_model(dtype)
    optimizer = MaskedAdamW(model, _mask(), max_norm=cases.CLIP, **cases.SETTINGS)
    _train(model, optimizer, 5, accumulation=2)
    _, expected, _ = cases.reference(cases.make_masks(), 5, 2)
    for name, param in model.named_parameters():
        active = cases.make_masks().get(name, torch.zeros(param.shape, dtype=torch.bool))
        assert torch.equal(param[~active], before.get_parameter(name)[~active]), f"{name}: frozen bits"
        if dtype == torch.float32:  # bf16 gradients differ by more than AdamW forgives
            assert (param - expected[name]).abs().max() <= 2e-5 * expected[name].abs().max(), name
        assert param.requires_grad == bool(active.any()), "tensors without active entries are frozen"


def _zero(make_optimizer: str, steps: int, clip: float, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    def optimizer(model):
        kind = torch.optim.AdamW if make_optimizer == "adamw" else torch.optim.RMSprop
        return kind(model.parameters(), **(cases.SETTINGS if make_optimizer == "adamw" else RMSPROP))

    config = {"gradient_clipping": clip, "bf16": {"enabled": dtype == torch.bfloat16}}
    return cases.sparse_run(cases.make_masks(), steps, 1, config=config, make_optimizer=optimizer, dtype=dtype)["after"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["adamw", "rmsprop"])
@pytest.mark.parametrize("clip", [0.0, cases.CLIP])
def test_equals_zero3_on_one_rank_bit_for_bit(ranks, kind, clip, dtype):
    """Eight steps, one micro batch each; the clipping factor is fp32, so the order of the norm's sum does not show."""
    (expected,) = ranks(1).run(_zero, kind, 8, clip, dtype)
    model = cases.make_model(dtype)
    if kind == "adamw":
        optimizer = MaskedAdamW(model, _mask(), max_norm=clip or None, **cases.SETTINGS)
    else:
        optimizer = MaskedRMSprop(model, _mask(), max_norm=clip or None, **RMSPROP)
    _train(model, optimizer, 8)
    for name, weight in expected.items():
        assert torch.equal(model.get_parameter(name), weight), name


@pytest.mark.parametrize("rounding_seed", [None, 5])
@pytest.mark.parametrize("kind", [MaskedAdamW, MaskedRMSprop])
def test_resuming_equals_not_stopping(kind, rounding_seed):
    """bf16 weights, so that state in the weights' dtype would show; the scheduler's learning rate comes along."""

    def make():
        model = cases.make_model(torch.bfloat16)
        optimizer = kind(model, _mask(), lr=1e-2, max_norm=cases.CLIP, rounding_seed=rounding_seed)
        return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    model, optimizer, scheduler = make()
    _train(model, optimizer, 6, scheduler=scheduler)
    stopped, first, first_scheduler = make()
    _train(stopped, first, 3, scheduler=first_scheduler)
    file = io.BytesIO()
    torch.save({"model": stopped.state_dict(), "optimizer": first.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed, second, second_scheduler = make()
    resumed.load_state_dict(saved["model"])
    second.load_state_dict(saved["optimizer"])
    second_scheduler.load_state_dict(first_scheduler.state_dict())
    _train(resumed, second, 3, first=4, scheduler=second_scheduler)
    _assert_same_bits(model, resumed)
    sizes = [value.numel() for state in saved["optimizer"]["state"].values() for value in state.values()]
    assert max(sizes) <= max(-(-_mask().active(name) // 1024) * 1024 for name in _mask().names), "state is compact"


@pytest.mark.parametrize("kind", [MaskedAdamW, MaskedRMSprop])
def test_a_rounding_seed_rounds_each_weight_by_its_place(kind):
    """After one step the masters are those of a run without a seed; places count through all tensors that train."""
    plain, model, before = (cases.make_model(torch.bfloat16) for _ in range(3))
    nearest, optimizer = kind(plain, _mask(), lr=1e-2), kind(model, _mask(), lr=1e-2, rounding_seed=5)
    _train(plain, nearest, 1)
    _train(model, optimizer, 1)
    key, origin, num_changed = rounding_key(5, torch.tensor(1)), 0, 0
    for name in (name for name in _mask().names if _mask().active(name)):
        weight, positions = model.get_parameter(name), _mask().indices(name)
        master = optimizer.state[weight]["master"][: len(positions)]
        assert torch.equal(master, nearest.state[plain.get_parameter(name)]["master"][: len(positions)])
        expected = before.get_parameter(name).detach().clone().view(-1)
        expected[positions] = to_bf16(master, random_bits(key, positions + origin))
        assert torch.equal(weight.view(-1), expected), name
        num_changed += int((weight != plain.get_parameter(name)).sum())
        origin += weight.numel()
    assert num_changed > 0.1 * _mask().num_active, "rounding to nearest would have given other weights"


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("kind", [MaskedAdamW, MaskedRMSprop])
def test_a_step_never_asks_the_device(kind, kernels):
    model = cases.make_model(torch.bfloat16)
    optimizer = kind(model, _mask(), max_norm=1.0, rounding_seed=5)
    _train(model, optimizer, 1)  # makes the state
    ((x, flags, target),) = cases.micro_batches(2, 1)
    F.cross_entropy(model(x.bfloat16(), flags).float(), target).backward()
    with using(kernels), NoSync():
        optimizer.step()
    with pytest.raises(AssertionError, match="waits for the device"), NoSync():
        float(model.head.weight.sum())


def test_a_norm_that_is_not_finite_skips_the_step():
    model = cases.make_model(torch.bfloat16)
    optimizer = MaskedAdamW(model, _mask(), max_norm=1.0)
    _train(model, optimizer, 1)
    before, state = _bits(model), {k: {n: t.clone() for n, t in s.items()} for k, s in optimizer.state.items()}
    for param in model.parameters():
        param.grad = torch.full_like(param, float("nan"))
    optimizer.step()
    assert all(torch.equal(bits, before[name]) for name, bits in _bits(model).items())
    assert all(torch.equal(t, state[k][n]) for k, s in optimizer.state.items() for n, t in s.items())
    assert float(optimizer.param_groups[0]["step"]) == 1


def _ddp(steps: int) -> dict[str, torch.Tensor]:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model = cases.make_model()
    optimizer = MaskedAdamW(model, _mask(), max_norm=cases.CLIP, **cases.SETTINGS)
    wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    rows = slice(rank * cases.ROWS // world, (rank + 1) * cases.ROWS // world)
    _train(wrapped, optimizer, steps, rows=rows)
    return {name: param.detach() for name, param in model.named_parameters()}


def test_ddp_on_two_ranks_equals_one_process(ranks):
    first, second = ranks(2).run(_ddp, 5)
    _, expected, _ = cases.reference(cases.make_masks(), 5, 1)
    for name, weight in expected.items():
        assert torch.equal(first[name], second[name]), name
        assert (first[name] - weight).abs().max() <= 2e-5 * weight.abs().max(), name


def test_trainer_takes_it_and_resumes(tmp_path):
    """`optimizers=` of transformers' Trainer; a run that stops and resumes ends where one that does not stop ends."""
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    def run(folder: str, max_steps: int, resume: bool = False):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
        )
        model = LlamaForCausalLM(config)
        generator = torch.Generator().manual_seed(1)
        masks = {
            name: torch.rand(p.shape, generator=generator) < 0.2
            for name, p in model.named_parameters()
            if "mlp" in name or "attn" in name
        }
        optimizer = MaskedAdamW(model, lota.Mask.from_dense(masks), lr=1e-2, max_norm=1.0)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        options = {"save_steps": 2, "per_device_train_batch_size": 4, "max_grad_norm": 0.0, "seed": 0}
        arguments = TrainingArguments(
            str(tmp_path / folder), max_steps=max_steps, report_to=[], use_cpu=True, disable_tqdm=True, **options
        )
        rows = [{"input_ids": ids, "labels": ids} for ids in torch.arange(64).remainder(40).view(8, 8)]
        trainer = Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, scheduler))
        trainer.train(resume_from_checkpoint=resume)
        return model

    whole = run("whole", 4)
    run("parts", 2)
    _assert_same_bits(whole, run("parts", 4, resume=True))


def test_what_does_not_fit_is_refused():
    model, masks = cases.make_model(), cases.make_masks()
    name = next(iter(masks))

    def make(masks=masks, **options):
        return MaskedAdamW(cases.make_model(), lota.Mask.from_dense(masks), **options)

    with pytest.raises(ValueError, match=r"which the model does not have\. Did you mean 'blocks"):
        make({"block" + name.removeprefix("blocks"): masks[name]})
    with pytest.raises(ValueError, match="expected shape"):
        make({name: masks[name][1:]})
    with pytest.raises(ValueError, match="no active entry"):
        make({name: torch.zeros_like(masks[name])})
    with pytest.raises(ValueError, match="max_norm must be positive"):
        make(max_norm=0.0)
    with pytest.raises(ValueError, match=r"rounding_seed=5 rounds bf16 weights .* is torch\.float32"):
        make(rounding_seed=5)
    with pytest.raises(ValueError, match="seed of stochastic rounding must be in"):
        MaskedAdamW(cases.make_model(torch.bfloat16), _mask(), rounding_seed=-1)
    other = make({name: masks[name]})
    optimizer = make()
    with pytest.raises(ValueError, match="belongs to another mask"):
        optimizer.load_state_dict(other.state_dict())
    rmsprop = MaskedRMSprop(model, _mask())
    _train(model, rmsprop, 1)
    with pytest.raises(ValueError, match="holds master, square_avg; MaskedAdamW needs exp_avg"):
        optimizer.load_state_dict(rmsprop.state_dict())
