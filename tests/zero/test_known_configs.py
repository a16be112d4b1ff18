"""DeepSpeed files that people have, by content: both blocks work under them, or name the line to delete."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.zero import trainers

AUTO = dict.fromkeys(
    ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto"
)
FP16 = {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2}
ZERO = {
    "stage": 3,
    "overlap_comm": True,
    "contiguous_gradients": True,
    "sub_group_size": 1e9,
    "reduce_bucket_size": "auto",
    "stage3_prefetch_bucket_size": "auto",
    "stage3_param_persistence_threshold": "auto",
    "stage3_max_live_parameters": 1e9,
    "stage3_max_reuse_distance": 1e9,
    "stage3_gather_16bit_weights_on_model_save": True,
}
TO_CPU = {"device": "cpu", "pin_memory": True}
CONFIGS: dict[str, dict[str, Any]] = {
    # transformers' documentation, ds_config_zero3.json, without its offload_optimizer
    "transformers": AUTO
    | {
        "fp16": FP16 | {"min_loss_scale": 1},
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")},
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": dict.fromkeys(("total_num_steps", "warmup_min_lr", "warmup_max_lr", "warmup_num_steps"), "auto"),
        },
        "zero_optimization": ZERO | {"offload_param": TO_CPU},
        "steps_per_print": 2000,
        "wall_clock_breakdown": False,
    },
    # axolotl, zero3_bf16_cpuoffload_params.json
    "axolotl": AUTO
    | {
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": ZERO
        | {
            "offload_param": TO_CPU,
            "sub_group_size": 0,
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
        },
        "bf16": {"enabled": True},
        "fp16": FP16 | {"enabled": False},
        "steps_per_print": 2000,
    },
    # LLaMA-Factory, ds_z3_config.json, with the bucket sizes of DeepSpeed's own examples
    "llama-factory": AUTO
    | {
        "zero_allow_untested_optimizer": True,
        "fp16": FP16 | {"min_loss_scale": 1},
        "bf16": {"enabled": "auto"},
        "zero_optimization": ZERO
        | {
            "overlap_comm": False,
            "reduce_bucket_size": 5e8,
            "stage3_prefetch_bucket_size": 5e8,
            "stage3_param_persistence_threshold": 1e6,
        },
    },
}


def _both_blocks(folder: str, score: str, config: dict[str, Any]) -> dict[str, Any]:
    """Calibrate and train with one DeepSpeed file."""
    return trainers.calibrate_and_train("trainer", folder, score, deepspeed=config)


@pytest.mark.parametrize("name", CONFIGS)
def test_both_blocks(ranks, tmp_path, name):
    base = trainers.make_base(tmp_path / "base")
    score = "task_vector" if name == "transformers" else "gradient"
    results = ranks(2).run(_both_blocks, str(base), score, CONFIGS[name])
    for result in results:
        mask = result["mask"]
        assert mask.num_active == round(0.1 * mask.eligible)
        assert result["report"]["update"] == "adamw" and result["report"]["steps"] == 3
        # Their bucket sizes are not taken over for what is reduced here.
        assert result["report"]["bytes_held"]["buffers"] < 1 << 17
        for tensor, before in result["before"].items():
            active = mask.dense(tensor) if tensor in mask.names else torch.zeros_like(before, dtype=torch.bool)
            assert torch.equal(result["after"][tensor][~active], before[~active]), tensor
    assert results[0]["saved"]["num_changed"] > 0.5 * mask.num_active
