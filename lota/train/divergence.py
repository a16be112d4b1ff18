"""How far a run moved the model on its own task's inputs: the Kullback-Leibler divergence from the base, which predicts
forgetting better than norms or counts of weights do (Shenfeld et al., RL's Razor, arXiv 2509.04259)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from lota.data.trained_tokens import IGNORED
from lota.train.phase import Phase

MAX_BATCHES = 16
"""Evaluation batches of each rank that are looked at: the base's values are exchanged in and out for each."""


@torch.no_grad()
def divergence_from_base(phase: Phase, run: Any) -> float | None:
    """Nats per answer token, the mean of KL(base || trained) over the first evaluation batches; None without
    evaluation rows. Collective.

    run: the block's. No second model: for the base's forward pass its values are put back at the active entries.
    """
    trainer = phase.trainer
    if trainer.eval_dataset is None:
        return None
    engine = trainer.deepspeed
    was_training = engine.module.training
    engine.module.eval()
    total = torch.zeros(2, dtype=torch.float64, device=get_accelerator().current_device_name())
    for number, batch in enumerate(trainer.get_eval_dataloader()):
        if number == MAX_BATCHES:
            break
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
        is_answer = batch["labels"][:, 1:] != IGNORED
        with run.base():
            base = _log_probabilities(engine(**inputs).logits, is_answer)
        trained = _log_probabilities(engine(**inputs).logits, is_answer)
        total[0] += (base.exp() * (base - trained)).sum(dtype=torch.float64)
        total[1] += base.shape[0]
    engine.module.train(was_training)
    if dist.get_world_size() > 1:
        dist.all_reduce(total)
    return float(total[0] / total[1]) if float(total[1]) else None


def _log_probabilities(logits: Tensor, is_answer: Tensor) -> Tensor:
    """fp32 `[answer tokens, vocabulary]`: of the tokens that an answer's token follows."""
    return torch.log_softmax(logits[:, :-1][is_answer].float(), -1)
