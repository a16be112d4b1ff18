"""Answer loss and exact match of a causal model on prompt and completion, in one forward pass and no generation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IGNORED = -100


@dataclass(frozen=True)
class AnswerScore:
    """loss: nats per answer token, over all tokens. exact: part of the rows whose every answer token is predicted."""

    loss: float
    exact: float
    num_rows: int


@torch.no_grad()
def score_answers(
    model: torch.nn.Module, tokenizer: Any, rows: Sequence[Mapping[str, str]], batch_rows: int = 128
) -> AnswerScore:
    """Score `rows` (prompt, completion; the end token belongs to the answer), in the model's dtype, logits in fp32.

    Exact match under teacher forcing is exact match of greedy decoding: greedy decoding leaves the reference at the
    first token that teacher forcing gets wrong, and not before.
    """
    was_training = model.training
    model.eval()
    encoded = [_encode(tokenizer, row["prompt"], row["completion"]) for row in rows]
    loss_sum, num_tokens, num_exact = 0.0, 0, 0
    for start in range(0, len(encoded), batch_rows):
        input_ids, labels = collate(encoded[start : start + batch_rows], tokenizer.pad_token_id)
        device = next(model.parameters()).device
        logits = model(input_ids=input_ids.to(device)).logits[:, :-1].float()
        targets = labels[:, 1:].to(device)
        counted = targets != IGNORED
        loss_sum += float(torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="sum"))
        num_tokens += int(counted.sum())
        num_exact += int(((logits.argmax(-1) == targets) | ~counted).all(1).sum())
    model.train(was_training)
    return AnswerScore(loss_sum / max(num_tokens, 1), num_exact / max(len(encoded), 1), len(encoded))


def _encode(tokenizer: Any, prompt: str, completion: str) -> tuple[list[int], int]:
    """Ids of prompt and completion with the end token, and how many belong to the prompt: as TRL does it."""
    num_prompt = len(tokenizer(prompt)["input_ids"])
    return [*tokenizer(prompt + completion)["input_ids"], tokenizer.eos_token_id], num_prompt


def collate(rows: Sequence[tuple[list[int], int]], padding: int) -> tuple[Tensor, Tensor]:
    """Ids and labels `[rows, longest]` (int64), padded at the end, which causal attention never looks at.

    rows: token ids, and how many of them at the start are a prompt: their labels, and the padding's, are -100.
    """
    longest = max(len(ids) for ids, _ in rows)
    input_ids = torch.full((len(rows), longest), padding)
    labels = torch.full((len(rows), longest), IGNORED)
    for number, (ids, num_prompt) in enumerate(rows):
        input_ids[number, : len(ids)] = torch.tensor(ids)
        labels[number, num_prompt : len(ids)] = torch.tensor(ids[num_prompt:])
    return input_ids, labels
