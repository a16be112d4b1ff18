"""One planned and counted run: a small model trained two steps by one method, counted from outside, beside its plan."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from tempfile import TemporaryDirectory
from typing import Any

import torch

import lota
import lota.blocks
from lota import plan
from lota.plan.methods import ENCODED_MASK
from lota.retention import Importance
from lota.retention.factors import matrices
from lota.selection import eligible
from lota.zero.compact.mask_counts import mask_counts
from tests.counting import Traffic

DECODER = {
    "vocab_size": 768,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"vocab_size": 768, "n_embd": 192, "n_layer": 4, "n_head": 6, "n_positions": 64}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", DECODER),
    "gpt2": ("GPT2Config", GPT2 | {"bos_token_id": 1, "eos_token_id": 2}),
    "qwen3": ("Qwen3Config", DECODER | {"head_dim": 32}),
    "mixtral": ("MixtralConfig", DECODER | {"num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 3}),
    "gemma": ("GemmaConfig", DECODER | {"head_dim": 32}),
}
METHODS = ("full", "lora", "task_vector", "gradient", "lota 0.1", "lota 0.01")
LORA_RANK, BUCKET, ACCUMULATION = 8, 20_000, 2
# Nothing stays gathered and nothing is gathered ahead: what a step gathers is then known exactly.
ZERO = {
    "stage": 3,
    "reduce_bucket_size": BUCKET,
    "stage3_prefetch_bucket_size": 0,
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
}


def counted(case: str, method: str, options: dict[str, Any]) -> dict[str, Any]:
    """Runs on every rank. options: of `sparse_zero3`; `zero`: changes to the ZeRO section; `communication_data_type`;
    `uneven`: the mask's first rows are denser, and the plan is made from the mask itself."""
    import deepspeed
    import transformers

    options = dict(options)
    zero = ZERO | options.pop("zero", {})
    wire = options.pop("communication_data_type", "fp32")
    kind, settings = MODELS[case]
    config = getattr(transformers, kind)(**settings)
    count = Traffic()
    with count:
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.config.use_cache = False
        block, planned = _block_and_plan(model, config, case, method, options, zero, wire)
        if method == "lora":
            model = _with_adapters(model, case)
        gc.collect()
        with block as run, TemporaryDirectory() as folder:
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            # As a Trainer loads it: the engine would shard it at its start, with the whole model in memory.
            deepspeed.zero.Init(module=model, config_dict_or_path=_config(zero, wire), dtype=torch.bfloat16)
            gc.collect()
            count.restart()
            engine, *_ = deepspeed.initialize(
                model=model, optimizer=torch.optim.AdamW(trained, lr=1e-3, fused=True), config=_config(zero, wire)
            )
            most = {"build": count.most}
            for step in range(2):
                count.restart()
                for micro in range(ACCUMULATION):
                    generator = torch.Generator().manual_seed(10 * step + micro + 100 * torch.distributed.get_rank())
                    ids = torch.randint(3, 768, (1, 8), generator=generator)
                    engine.backward(engine(input_ids=ids, labels=ids).loss)
                    engine.step()
                gc.collect()
            # of the second step: the first one still records in which order weights are used
            held, peak, payload = count.nbytes(), count.peak, dict(count.payload)
            report = run.report() if run is not None else {}
            most["step"] = count.most
            if run is not None:
                most |= _moments(count, engine, run, folder)
            engine.destroy()
    rank = torch.distributed.get_rank()
    return {
        "planned": planned,
        "rank": rank,
        "held": held,
        "peak": peak,
        "most": most,
        "payload": payload,
        "report": report,
    }


def _moments(count: Traffic, engine: Any, run: Any, folder: str) -> dict[str, int]:
    """The most bytes while a checkpoint is written and read, and at the end, while the ticket is written or selection
    chooses. folder: rank 0's serves all ranks."""
    box = [folder]
    torch.distributed.broadcast_object_list(box, src=0)
    moments = {
        "checkpoint": lambda: engine.save_checkpoint(box[0]),
        "resume": lambda: _resume(engine, run, box[0]),
    }
    if hasattr(run, "save_ticket"):
        moments["ticket"] = lambda: run.save_ticket(f"{box[0]}/ticket")
    else:
        moments["selection"] = run.mask
    most = {}
    for name, moment in moments.items():
        gc.collect()
        count.restart()
        moment()
        most[name] = count.most
    torch.distributed.barrier()
    return most


def _resume(engine: Any, run: Any, folder: str) -> None:
    """Without moments of DeepSpeed's optimizer, as a new process has none."""
    if isinstance(run, lota.blocks.Calibration) and run.report()["score"] == "task_vector":
        engine.optimizer.optimizer.state.clear()
    engine.load_checkpoint(folder)


def _config(zero: dict[str, Any], wire: str) -> dict[str, Any]:
    return {
        **({"communication_data_type": wire} if wire != "fp32" else {}),
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
    }


def _with_adapters(model: Any, case: str) -> Any:
    from peft import LoraConfig, get_peft_model

    names = eligible({name: tuple(p.shape) for name, p in model.named_parameters()})
    targets = {name.removesuffix(".weight").rsplit(".", 1)[-1] for name in names if name.endswith(".weight")}
    settings = LoraConfig(
        r=LORA_RANK, target_modules=sorted(targets), task_type="CAUSAL_LM", fan_in_fan_out=case == "gpt2"
    )
    model.enable_input_require_grads()
    return get_peft_model(model, settings, autocast_adapter_dtype=False)


def _block_and_plan(
    model: Any, config: Any, case: str, method: str, options: dict[str, Any], zero: dict[str, Any], wire: str
) -> tuple[Any, plan.MethodPlan]:
    is_uneven = options.pop("uneven", False)
    shapes = plan.shapes_of_config(config, case)
    names = eligible(shapes.shapes)
    layout = plan.RankLayout(
        ranks=torch.distributed.get_world_size(),
        shard_group_size=options.get("shard_group_size"),
        gradient_accumulation_steps=ACCUMULATION,
        bucket=BUCKET,
        persistence_threshold=zero["stage3_param_persistence_threshold"],
        live_parameters=zero["stage3_max_live_parameters"],
        offload_param="offload_param" in zero,
        communication_bytes={"fp32": 4, "bf16": 2}[wire],
    )
    if method == "full":
        return nullcontext(), plan.full(shapes, layout)
    if method == "lora":
        matrices = tuple(name for name in names if len(shapes.shapes[name]) == 2)
        return nullcontext(), plan.lora(shapes, layout, plan.LoraSettings(LORA_RANK, matrices))
    if method in ("task_vector", "gradient"):
        return lota.calibration_zero3(score=method, density=0.1), plan.calibration(shapes, layout, names, method)
    density = float(method.split()[1])
    trained = {name: shapes.shapes[name] for name in names}
    if is_uneven:
        mask = _uneven_mask(trained, density)
        counts = mask_counts(mask, layout.shard_size, torch.distributed.get_rank() % layout.shard_size)
    else:
        mask = _random_mask(trained, density)
        counts = plan.MaskCounts.even(shapes, names, density, layout.shard_size)
    made = plan.lota(
        shapes,
        layout,
        counts,
        reduction=options.get("gradient_reduction", "compact"),
        reduce_every=options.get("reduce_every", "micro_step"),
        is_pulled="pull" in options,
    )
    if "pull" in options:
        options = options | {"retain": [_importance(trained)], "num_steps": 100}
    return lota.sparse_zero3(mask, **options), made


def _importance(shapes: dict[str, tuple[int, ...]]) -> Importance:
    """All entries matter alike."""
    sizes = {name: matrices(shape) for name, shape in shapes.items()}
    rows = {name: torch.full((number * height,), float(width)) for name, (number, height, width) in sizes.items()}
    columns = {name: torch.full((number * width,), float(height)) for name, (number, height, width) in sizes.items()}
    return Importance(shapes, rows, columns)


def _random_mask(shapes: dict[str, tuple[int, ...]], density: float) -> lota.Mask:
    """Exactly `round(density * eligible)` entries, anywhere."""
    numels = [torch.Size(shape).numel() for shape in shapes.values()]
    order = torch.randperm(sum(numels), generator=torch.Generator().manual_seed(1))
    dense = torch.zeros(sum(numels), dtype=torch.bool)
    dense[order[: round(density * sum(numels))]] = True
    pieces = dense.split(numels)
    return lota.Mask.from_dense({n: p.view(s) for (n, s), p in zip(shapes.items(), pieces, strict=True)})


def _uneven_mask(shapes: dict[str, tuple[int, ...]], density: float) -> lota.Mask:
    """The first quarter of every tensor is trained three times as densely as the rest: 50% more than an even share."""
    generator = torch.Generator().manual_seed(1)
    dense = {}
    for name, shape in shapes.items():
        drawn = torch.rand(shape, generator=generator).flatten()
        drawn[: drawn.numel() // 4] /= 3
        dense[name] = (drawn < density * 2 / 3).view(shape)
    return lota.Mask.from_dense(dense)


SENT_BY = {"all_gather": "weights", "reduce_scatter": "gradients", "all_to_all": "gradients"}


def compare(result: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """(planned, counted) bytes: held, and sent by each kind of collective that the plan or the run used."""
    planned: plan.MethodPlan = result["planned"]
    host = planned.host_held - (planned.host.get(ENCODED_MASK, 0) if result["rank"] else 0)
    pairs = {"held": (planned.held + host, result["held"])}
    for kind in ("all_gather", "reduce_scatter", "all_to_all", "all_reduce"):
        pair = (planned.payload(kind), result["payload"].get(kind, 0))
        # norms and flags are all-reduced too: some bytes for every tensor
        if max(pair) > 8192:
            pairs[f"sent, {kind}"] = pair
    return pairs


def allowed(result: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """(planned, counted) most bytes at each moment, device and host memory together, as on CPU ranks they are."""
    planned: plan.MethodPlan = result["planned"]
    held = planned.held + planned.uneven + planned.host_held
    at = planned.at_moments
    return {name: (held + at[name].device + at[name].host, most) for name, most in result["most"].items()}
