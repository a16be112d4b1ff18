"""MaskedAdamW and MaskedRMSprop equal a dense reference, and the ZeRO-3 path bit for bit; frozen bits stay.

With a pull they equal the same followed by the pull, and reach as much of it as was asked for.
"""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import lota
from lota.kernels import Pull, pull_, pull_rate, rounding_key, using
from lota.kernels.rounding import random_bits, to_bf16
from lota.optim import MaskedAdamW, MaskedRMSprop
from tests.no_sync import NoSync
from tests.zero import cases

RMSPROP = {"lr": 1e-3, "alpha": 0.9, "eps": 1e-6, "weight_decay": 0.01}


def _mask() -> lota.Mask:
    return lota.Mask.from_dense(cases.make_masks())


def _importance(seed: int = 0) -> dict[str, torch.Tensor]:
    """Of a mean of about 1, from nearly 0 to some tens."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(_mask().active(name), generator=generator).square() for name in _mask().names}


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


@pytest.mark.parametrize("pull", [None, 10.0])
@pytest.mark.parametrize("rounding_seed", [None, 5])
@pytest.mark.parametrize("kind", [MaskedAdamW, MaskedRMSprop])
def test_resuming_equals_not_stopping(kind, rounding_seed, pull):
    """bf16 weights, so that state in the weights' dtype would show; the scheduler's learning rate comes along, and what
    the pull needs: the old weights, the importance, the sum of the run's learning rates and how much of it is used."""
    options = {} if pull is None else {"pull": pull, "importance": _importance(), "num_steps": 6}

    def make():
        model = cases.make_model(torch.bfloat16)
        optimizer = kind(model, _mask(), lr=1e-2, max_norm=cases.CLIP, rounding_seed=rounding_seed, **options)
        return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    model, optimizer, scheduler = make()
    _train(model, optimizer, 6, scheduler=scheduler)
    stopped, first, first_scheduler = make()
    _train(stopped, first, 3, scheduler=first_scheduler)
    file = io.BytesIO()
    torch.save({"model": stopped.state_dict(), "optimizer": first.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    options |= {} if pull is None else {"importance": _importance(1), "num_steps": 7}  # the checkpoint's count
    resumed, second, second_scheduler = make()
    resumed.load_state_dict(saved["model"])
    second.load_state_dict(saved["optimizer"])
    second_scheduler.load_state_dict(first_scheduler.state_dict())
    _train(resumed, second, 3, first=4, scheduler=second_scheduler)
    _assert_same_bits(model, resumed)
    # The same additions of float64; planned and used sums differ in their order only where a step is skipped.
    assert second.pull_reached == optimizer.pull_reached == pytest.approx([pull or 0.0], rel=1e-12)
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
    pull = {"pull": 3.0, "importance": _importance(), "num_steps": 10}
    optimizer = kind(model, _mask(), max_norm=1.0, rounding_seed=5, **pull)
    _train(model, optimizer, 1)  # makes the state
    ((x, flags, target),) = cases.micro_batches(2, 1)
    F.cross_entropy(model(x.bfloat16(), flags).float(), target).backward()
    with using(kernels), NoSync():
        optimizer.step()
    with pytest.raises(AssertionError, match="waits for the device"), NoSync():
        float(model.head.weight.sum())


def test_a_norm_that_is_not_finite_skips_the_step():
    model = cases.make_model(torch.bfloat16)
    optimizer = MaskedAdamW(model, _mask(), max_norm=1.0, pull=3.0, importance=_importance(), num_steps=10)
    _train(model, optimizer, 1)
    before, state = _bits(model), {k: {n: t.clone() for n, t in s.items()} for k, s in optimizer.state.items()}
    for param in model.parameters():
        param.grad = torch.full_like(param, float("nan"))
    optimizer.step()
    assert all(torch.equal(bits, before[name]) for name, bits in _bits(model).items())
    assert all(torch.equal(t, state[k][n]) for k, s in optimizer.state.items() for n, t in s.items())
    assert float(optimizer.param_groups[0]["step"]) == 1
    assert optimizer.pull_reached == pytest.approx([3.0 / 10]), "of one step"


def test_a_pulled_run_equals_dense_steps_and_the_pull_by_hand():
    """Every entry of the tensors active, torch's AdamW in fp32, a learning rate that warms up and falls, and after each
    step `w = old + (w - old) / (1 + c)`."""
    masks = {name: torch.ones_like(mask) for name, mask in cases.make_masks().items()}
    generator = torch.Generator().manual_seed(2)
    importance = {name: torch.rand(mask.numel(), generator=generator).bfloat16() for name, mask in masks.items()}
    model, dense, start = (cases.make_model() for _ in range(3))
    names = [name for name, _ in dense.named_parameters() if name in masks]
    theirs = torch.optim.AdamW([dense.get_parameter(name) for name in names], foreach=False, **cases.SETTINGS)
    ours = MaskedAdamW(model, lota.Mask.from_dense(masks), **cases.SETTINGS, pull=4, importance=importance, num_steps=6)
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step + 1, 6 - step) / 3)
        for optimizer in (theirs, ours)
    ]
    rates = [cases.SETTINGS["lr"] * min(step + 1, 6 - step) / 3 for step in range(6)]
    for step in range(6):
        _train(model, ours, 1, first=step + 1, scheduler=schedulers[1])
        ((x, flags, target),) = cases.micro_batches(step + 1, 1)
        F.cross_entropy(dense(x, flags), target).backward()
        for name in names:
            parameter = dense.get_parameter(name)
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        theirs.step()
        theirs.zero_grad()
        schedulers[0].step()
        with torch.no_grad():
            for name in names:
                weight, old = dense.get_parameter(name), start.get_parameter(name)
                c = 4 * rates[step] / sum(rates) * importance[name].float().view(weight.shape)
                weight.copy_(old + (weight - old) / (1 + c))
    for name, weight in dense.named_parameters():
        # As of the run without a pull above: fp32 in another order of additions.
        assert (model.get_parameter(name) - weight).abs().max() <= 2e-5 * weight.abs().max(), name
    assert ours.pull_reached == pytest.approx([4.0], rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", [MaskedAdamW, MaskedRMSprop])
def test_a_pulled_step_is_a_step_and_the_pull_alone_bit_for_bit(kind, dtype):
    """Towards the weights of the first step, with importance as bf16."""
    model, plain, start = (cases.make_model(dtype) for _ in range(3))
    pulled = kind(model, _mask(), lr=1e-2, pull=30.0, importance=_importance(), num_steps=5)
    optimizer = kind(plain, _mask(), lr=1e-2)
    for step in range(1, 4):
        _train(model, pulled, 1, first=step)
        _train(plain, optimizer, 1, first=step)
        for name in _mask().names:
            weight, positions = plain.get_parameter(name), _mask().indices(name)
            master = optimizer.state[weight]["master"][: len(positions)]
            old, importance = start.get_parameter(name).view(-1)[positions], _importance()[name].bfloat16()
            pull_(master, Pull(old.detach(), importance, pull_rate(weight.device, lr=1e-2, mu=30.0 / (5 * 1e-2))))
            weight.data.view(-1)[positions] = master.to(dtype)
        _assert_same_bits(model, plain)
    assert pulled.pull_reached == pytest.approx([30.0 * 3 / 5])


@pytest.mark.parametrize("kind", [MaskedAdamW, MaskedRMSprop])
def test_what_has_no_importance_is_not_pulled(kind):
    zeros = {name: torch.zeros(_mask().active(name)) for name in _mask().names}
    model, plain = cases.make_model(torch.bfloat16), cases.make_model(torch.bfloat16)
    _train(model, kind(model, _mask(), lr=1e-2, pull=30.0, importance=zeros, num_steps=4), 4)
    _train(plain, kind(plain, _mask(), lr=1e-2), 4)
    _assert_same_bits(model, plain)


class Factors:
    """Importance that is made when it is asked for."""

    def at_active(self, mask: lota.Mask, name: str) -> torch.Tensor:
        return _importance()[name][: mask.active(name)]


def test_importance_may_be_an_object():
    given, made = cases.make_model(), cases.make_model()
    options: dict[str, Any] = {"lr": 1e-2, "pull": 30.0, "num_steps": 3}
    _train(given, MaskedAdamW(given, _mask(), importance=_importance(), **options), 3)
    _train(made, MaskedAdamW(made, _mask(), importance=Factors(), **options), 3)
    _assert_same_bits(given, made)


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


def test_the_schedule_that_a_trainer_makes_is_found(tmp_path):
    """`optimizers=(optimizer, None)`: nothing says how long the run is but the Trainer's own scheduler. A run that is
    stopped half way and resumed ends where one that does not stop ends."""
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 2:
                control.should_training_stop = control.should_save = True

    def run(folder: str, resume: bool = False, callbacks=()):
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
        )
        parameters = {name: p for name, p in model.named_parameters() if "mlp" in name}
        mask = lota.Mask.from_dense({name: torch.ones_like(p, dtype=torch.bool) for name, p in parameters.items()})
        ones = {name: torch.ones(p.numel()) for name, p in parameters.items()}
        optimizer = MaskedAdamW(model, mask, lr=1e-2, pull=10.0, importance=ones)
        arguments = TrainingArguments(
            str(tmp_path / folder),
            max_steps=4,
            warmup_steps=1,
            lr_scheduler_type="cosine",
            per_device_train_batch_size=4,
            max_grad_norm=0.0,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        rows = [{"input_ids": ids, "labels": ids} for ids in torch.arange(64).remainder(40).view(8, 8)]
        trainer = Trainer(
            model, arguments, train_dataset=rows, optimizers=(optimizer, None), callbacks=list(callbacks)
        )
        trainer.train(resume_from_checkpoint=resume)
        return model, optimizer

    whole, optimizer = run("whole")
    assert optimizer.pull_reached == pytest.approx([10.0], rel=1e-12)
    _, stopped = run("parts", callbacks=[Stop()])
    assert 1 < stopped.pull_reached[0] < 9
    resumed, optimizer = run("parts", resume=True)
    assert optimizer.pull_reached == pytest.approx([10.0], rel=1e-12)
    _assert_same_bits(whole, resumed)


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


def test_a_pull_that_does_not_fit_is_refused():
    name = next(iter(_mask().names))
    count = _mask().active(name)

    def make(**options):
        return MaskedAdamW(cases.make_model(), _mask(), **{"pull": 3.0, "importance": _importance(), **options})

    for pull in (0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=r"pull must be positive and finite, got .*; leave it out for no pull"):
            make(pull=pull)
    with pytest.raises(ValueError, match="importance and num_steps only count for the pull"):
        make(pull=None)
    with pytest.raises(ValueError, match="importance and num_steps only count for the pull"):
        make(pull=None, importance=None, num_steps=3)
    with pytest.raises(ValueError, match="pull needs importance"):
        make(importance=None)
    with pytest.raises(ValueError, match="num_steps must be a positive integer"):
        make(num_steps=0)
    with pytest.raises(ValueError, match=f"importance lacks {name}"):
        make(importance={key: value for key, value in _importance().items() if key != name})
    with pytest.raises(ValueError, match=re.escape(f"no {name}s, which importance names. Did you mean '{name}'")):
        make(importance={**_importance(), f"{name}s": torch.ones(3)})
    for wrong, got in (
        (torch.ones(count - 1), rf"torch\.float32 of shape \({count - 1},\)"),
        (torch.ones(1, count), rf"shape \(1, {count}\)"),
        (torch.ones(count, dtype=torch.int64), r"torch\.int64"),
    ):
        with pytest.raises(ValueError, match=rf"float of shape \({count},\), a value for each .*, got .*{got}"):
            make(importance={**_importance(), name: wrong})
    for value in (-1e-3, float("nan"), float("inf"), 3.4e38):
        with pytest.raises(ValueError, match=f"importance of {name} must be finite and at least 0"):
            make(importance={**_importance(), name: torch.full((count,), value)})
    model = cases.make_model()
    before = _bits(model)
    for options, message in (
        ({}, "to know how long the run is, and there is no scheduler: pass num_steps"),
        ({"lr": 0.0, "num_steps": 5}, r"the learning rates of the run sum to 0\.0"),
    ):
        with pytest.raises(ValueError, match=message):
            _train(model, MaskedAdamW(model, _mask(), pull=3.0, importance=_importance(), **options), 1)
        model.zero_grad()
    assert all(torch.equal(bits, before[key]) for key, bits in _bits(model).items())


def test_state_with_and_without_a_pull_is_kept_apart():
    model = cases.make_model()
    plain = MaskedAdamW(model, _mask())
    pulled = MaskedAdamW(model, _mask(), pull=3.0, importance=_importance(), num_steps=3)
    with pytest.raises(ValueError, match="of a run with no pull, this optimizer has a pull"):
        pulled.load_state_dict(plain.state_dict())
    with pytest.raises(ValueError, match="of a run with a pull, this optimizer has no pull"):
        plain.load_state_dict(pulled.state_dict())
    _train(model, pulled, 1)
    saved = pulled.state_dict()
    saved["state"][0]["importance"] = saved["state"][0]["importance"].float()
    with pytest.raises(ValueError, match=r"importance of optimizer state 0 must not be torch\.float32"):
        pulled.load_state_dict(saved)
