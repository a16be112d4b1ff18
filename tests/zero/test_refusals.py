"""Whatever cannot run raises before training, on every rank, with what was expected, what came and the cure."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lota
from tests.zero import cases


def _initialize(config: dict[str, Any], score: str | None, make_optimizer=cases.default_optimizer) -> None:
    import deepspeed

    model = cases.make_model()
    merged = cases.config(1, torch.distributed.get_world_size()) | config
    block = (
        lota.calibration_zero3(score=score) if score else lota.sparse_zero3(lota.Mask.from_dense(cases.make_masks()))
    )
    with block:
        deepspeed.initialize(model=model, optimizer=make_optimizer(model), config=merged)


def _zero(**settings: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 3} | settings}


BF16_STATES = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
CONFIGS = [
    ({"zero_optimization": {"stage": 2}}, r"ZeRO stage 3 is required, got stage 2.*shard_group_size=1"),
    ({"zero_optimization": {"stage": 0}}, r"ZeRO stage 3 is required, got stage 0"),
    (_zero(zenflow={"topk_ratio": 0.1}), r"zenflow is not supported.*Delete it"),
    (_zero(offload_optimizer={"device": "cpu", "super_offload": True}), r"SuperOffload"),
    (_zero(offload_optimizer={"device": "cpu"}), r"offload_optimizer is not supported"),
    (_zero(offload_optimizer={"device": "nvme", "nvme_path": "/tmp"}), r"offload_optimizer to nvme is not supported"),
    (_zero(offload_param={"device": "nvme", "nvme_path": "/tmp"}), r"offload_param to nvme is not supported"),
    (_zero(zero_hpz_partition_size=2), r"hpZ.*shard_group_size"),
    (_zero(zero_quantized_weights=True), r"zero_quantized_weights is not supported"),
    (_zero(zero_quantized_nontrainable_weights=True), r"zero_quantized_nontrainable_weights is not supported"),
    (_zero(zero_quantized_gradients=True), r"zero_quantized_gradients is not supported"),
    ({"sequence_parallel_size": 2}, r"sequence parallelism"),
    ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, r"torch_autocast is not supported"),
    ({"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}, r"16-bit master weights"),
    ({"bf16": BF16_STATES}, r"16-bit master weights or optimizer states"),
    ({"prescale_gradients": True}, r"prescale_gradients"),
    ({"gradient_predivide_factor": 2.0}, r"gradient_predivide_factor"),
    ({"compile": {"deepcompile": True}}, r"DeepCompile"),
    ({"checkpoint": {"load_universal": True}}, r"universal checkpoints"),
    ({"managed_gradient_accumulation": False}, r"managed_gradient_accumulation"),
    ({"communication_data_type": "fp16"}, r"communication_data_type: fp16 is not supported"),
    ({"data_types": {"grad_accum_dtype": "bf16"}}, r"grad_accum_dtype is not supported"),
    (_zero(reduce_scatter=False), r"reduce_scatter: false is not supported"),
    ({"hybrid_engine": {"enabled": True}}, r"the hybrid engine .* is not supported"),
]


@pytest.mark.parametrize(("config", "message"), CONFIGS)
def test_configurations(ranks, config, message):
    for outcome in ranks(2).outcomes(_initialize, config, None):
        assert outcome.error_type == "ValueError", outcome.error
        assert _search(message, outcome.error), outcome.error


@pytest.mark.parametrize("key", ["offload_optimizer", "offload_param"])
def test_calibration_cannot_offload_to_nvme(ranks, key):
    for outcome in ranks(2).outcomes(
        _initialize, _zero(**{key: {"device": "nvme", "nvme_path": "/tmp"}}), "task_vector"
    ):
        assert outcome.error_type == "ValueError", outcome.error
        assert f"{key} to nvme is not supported" in outcome.error


def _search(pattern: str, text: str) -> bool:
    import re

    return re.search(pattern, text, re.S) is not None


def _muon(model):
    class MuonWithAuxAdam(torch.optim.SGD):
        pass

    return MuonWithAuxAdam(model.parameters(), lr=0.1)


class RowNorm(torch.optim.SGD):
    """Not element-wise: every update is divided by the norm of the whole tensor's gradient."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad / p.grad.norm())


def _row_norm(model):
    return RowNorm(model.parameters(), lr=0.1)


def _adafactor(model):
    return torch.optim.Adafactor(model.parameters())


def _some_parameters(model):
    return torch.optim.AdamW(model.blocks[0].parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("make_optimizer", "message"),
    [
        (_muon, r"the Muon optimizer is not supported"),
        (_row_norm, r"RowNorm is not element-wise"),
        (_adafactor, r"Adafactor is not element-wise"),
        (_some_parameters, r"the mask trains blocks\.1\..*pass model\.parameters\(\)"),
    ],
)
def test_optimizers(ranks, make_optimizer, message):
    for outcome in ranks(2).outcomes(_initialize, {}, None, make_optimizer):
        assert outcome.error_type == "ValueError", outcome.error
        assert _search(message, outcome.error), outcome.error


def _with_mask(masks: dict[str, torch.Tensor], change: str) -> None:
    import deepspeed

    model = cases.make_model()
    mask = lota.Mask.from_dense(masks)
    if change == "frozen":
        model.blocks[0].up.weight.requires_grad_(False)
    if change == "other base":
        from lota.ticket import BaseTensor

        mask = mask.with_base({name: BaseTensor("float32", "0" * 16) for name in mask.names})
    if change == "differs" and torch.distributed.get_rank() == 1:
        name = mask.names[0]
        mask = lota.Mask.from_dense(masks | {name: ~masks[name]})
    with lota.sparse_zero3(mask):
        deepspeed.initialize(model=model, optimizer=cases.default_optimizer(model), config=cases.config(1, 2))


def test_masks(ranks):
    masks = cases.make_masks()
    name = "blocks.0.up.weight"
    other = {key.replace("up", "upp"): mask for key, mask in masks.items()}
    tries = [
        (masks | {name: masks[name][:5]}, "", r"blocks\.0\.up\.weight.*shape"),
        (other, "", r"the mask names blocks\.\d\.upp\.weight, which the model does not have\. Did you mean"),
        ({key: torch.zeros_like(mask) for key, mask in masks.items()}, "", r"no active entry"),
        (masks, "frozen", r"requires_grad is False"),
        (masks, "other base", r"base"),
        (masks, "differs", r"the mask differs between ranks"),
    ]
    for given, change, message in tries:
        for outcome in ranks(2).outcomes(_with_mask, given, change):
            assert outcome.error_type == "ValueError", (message, outcome.error)
            assert _search(message, outcome.error), (message, outcome.error)


def _misuse(kind: str) -> None:
    import deepspeed

    model, second = cases.make_model(), cases.make_model()
    config = cases.config(1, torch.distributed.get_world_size())
    mask = lota.Mask.from_dense(cases.make_masks())
    if kind == "no engine":
        with lota.sparse_zero3(mask):
            pass
    if kind == "no engine in calibration":
        with lota.calibration_zero3(score="gradient"):
            pass
    if kind == "nested":
        with lota.sparse_zero3(mask), lota.sparse_zero3(mask):
            pass
    if kind == "two engines":
        with lota.sparse_zero3(mask):
            for each in (model, second):
                deepspeed.initialize(model=each, optimizer=cases.default_optimizer(each), config=config)
    if kind == "shard group":
        with lota.sparse_zero3(mask, shard_group_size=3):
            deepspeed.initialize(model=model, optimizer=cases.default_optimizer(model), config=config)
    if kind == "version":
        deepspeed.__version__ = "0.20.1"
        try:
            with lota.sparse_zero3(mask):
                pass
        finally:
            deepspeed.__version__ = deepspeed.version
    if kind == "coalesce":
        with lota.sparse_zero3(mask):
            engine, *_ = deepspeed.initialize(model=model, optimizer=cases.default_optimizer(model), config=config)
            with engine.coalesce_grad_reduction():
                pass


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no engine", r"ended and no trainable DeepSpeed engine was built"),
        ("no engine in calibration", r"ended and no trainable DeepSpeed engine was built"),
        ("nested", r"another lota block is open"),
        ("two engines", r"a second trainable engine"),
        ("shard group", r"shard_group_size 3 does not divide the 2 ranks; use one of \[1, 2\]"),
        ("version", r"DeepSpeed 0\.19\.x .* is required, found 0\.20\.1"),
        ("coalesce", r"reduce_every='step'"),
    ],
)
def test_misuse(ranks, kind, message):
    for outcome in ranks(2).outcomes(_misuse, kind):
        assert outcome.error, kind
        assert _search(message, outcome.error), outcome.error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0}, r"density must be in \(0, 1\], got 0"),
        ({"density": 90}, r"density must be in \(0, 1\], got 90"),
        ({"density": float("nan")}, r"density must be in \(0, 1\], got nan"),
        ({"score": "gradients"}, r"score must be one of task_vector, .*got 'gradients'. Did you mean 'gradient'\?"),
        ({"budget": "per-tensor"}, r"budget must be .*per_tensor"),
        ({"protect": ["/nowhere/ticket"]}, r"/nowhere/ticket"),
        ({"protect": [3]}, r"expected a lota\.Mask, a lota\.Ticket or the path of one, got int"),
    ],
)
def test_calibration_options(options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message), lota.calibration_zero3(**options):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_reduction": "sparse"}, r"gradient_reduction must be one of auto, compact, dense, got 'sparse'"),
        ({"gradient_reduction": "dense", "reduce_every": "step"}, r"would keep whole gradients"),
        ({"reduce_every": "epoch"}, r"reduce_every must be one of micro_step, step"),
        ({"kernels": "cuda"}, r"kernels must be one of auto, torch, triton"),
        ({"kernels": "triton"}, r"kernels='triton' needs tensors on a CUDA or ROCm device, got cpu; use 'auto'"),
    ],
)
def test_sparse_options(options, message):
    mask = lota.Mask.from_dense(cases.make_masks())
    with pytest.raises(ValueError, match=message), lota.sparse_zero3(mask, **options):
        pass


def _protecting(masks: dict[str, torch.Tensor], options: dict[str, Any], other_base: bool) -> None:
    import deepspeed

    from lota.ticket import BaseTensor

    model = cases.make_model()
    mask = lota.Mask.from_dense(masks)
    if other_base:
        mask = mask.with_base({name: BaseTensor("float32", "0" * 16) for name in mask.names})
    with lota.calibration_zero3(score="gradient", protect=[mask], include=["*blocks*"], **options):
        deepspeed.initialize(model=model, optimizer=cases.default_optimizer(model), config=cases.config(1, 2))
        raise AssertionError("refused too late")


def test_protected_tickets_are_checked_before_training(ranks):
    masks = cases.make_masks()
    all_but_five = {name: torch.ones_like(mask) for name, mask in masks.items()}
    next(iter(all_but_five.values())).view(-1)[:5] = False
    tries = [
        (masks | {"blocks.0.up.weight": masks["blocks.0.up.weight"][:3]}, {"density": 0.1}, False, r"shape"),
        (masks, {"density": 0.1}, True, r"base"),
        (all_but_five, {"density": 0.1}, False, r"leave only 149\..*largest density"),
        (all_but_five, {"density": 0.1, "budget": "per_tensor"}, False, r"leave only"),
        (masks, {"density": 1e-9}, False, r"rounds to none"),
    ]
    for given, options, other_base, message in tries:
        for outcome in ranks(2).outcomes(_protecting, given, options, other_base):
            assert outcome.error_type == "ValueError", (message, outcome.error)
            assert _search(message, outcome.error), (message, outcome.error)


def _check(raw: dict[str, Any], has_mpu: bool) -> None:
    """The check alone: DeepSpeed sets process-wide switches for these before it builds an engine."""
    from deepspeed.runtime.config import DeepSpeedConfig

    from lota.zero.deepspeed.supported import check_config

    check_config(
        DeepSpeedConfig(cases.config(1, 1) | raw), is_sparse=True, is_compact=True, mpu=object() if has_mpu else None
    )


@pytest.mark.parametrize(
    ("raw", "has_mpu", "message"),
    [
        ({"tensor_parallel": {"autotp_size": 2}}, False, r"AutoTP"),
        ({"expert_parallel": {"enabled": True, "autoep_size": 2}}, False, r"AutoEP"),
        ({}, True, r"model parallel unit"),
        ({"optimizer": {"type": "muon", "params": {"lr": 0.1}}}, False, r"Muon"),
    ],
)
def test_other_parallelism(ranks, raw, has_mpu, message):
    (outcome,) = ranks(1).outcomes(_check, raw, has_mpu)
    assert outcome.error_type == "ValueError" and _search(message, outcome.error), outcome.error


def _pipeline() -> None:
    import deepspeed
    from deepspeed.pipe import PipelineModule

    model = PipelineModule([torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)], num_stages=1, loss_fn=torch.nn.MSELoss())
    with lota.sparse_zero3(lota.Mask.from_dense(cases.make_masks())):
        deepspeed.initialize(model=model, model_parameters=model.parameters(), config=cases.config(1, 1))


def test_pipeline_engine(ranks):
    (outcome,) = ranks(1).outcomes(_pipeline)
    assert _search(r"pipeline parallelism .* is not supported inside a lota block", outcome.error), outcome.error


def _foreign_group(kind: str) -> None:
    """A model sharded over a group of its own: DeepSpeed's reduction would let copies diverge, ours mistake pieces."""
    import deepspeed

    groups = [torch.distributed.new_group([rank]) for rank in range(2)]
    model = cases.make_model()
    deepspeed.zero.Init(module=model, data_parallel_group=groups[torch.distributed.get_rank()])
    mask = lota.Mask.from_dense(cases.make_masks())
    block = {
        "task_vector": lambda: lota.calibration_zero3(score="task_vector", include=["*blocks*"]),
        "gradient": lambda: lota.calibration_zero3(score="gradient", include=["*blocks*"]),
        "sparse": lambda: lota.sparse_zero3(mask),
        "sparse in groups": lambda: lota.sparse_zero3(mask, shard_group_size=1),
    }[kind]()
    with block:
        deepspeed.initialize(model=model, optimizer=cases.default_optimizer(model), config=cases.config(1, 2))


@pytest.mark.parametrize("kind", ["task_vector", "gradient", "sparse", "sparse in groups"])
def test_foreign_group_is_refused(ranks, kind):
    for outcome in ranks(2).outcomes(_foreign_group, kind):
        assert outcome.error_type == "ValueError"
        assert "sharded over a group of its own" in outcome.error
        assert ("pass shard_group_size" in outcome.error) == kind.startswith("sparse")
