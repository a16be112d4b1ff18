"""Answer loss and exact match of a causal model on prompt and completion, in one forward pass and no generation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IGNORED = -100


@dataclass(frozen=True)
class AnswerScore:
    """Per row: nats over its answer, its answer tokens, and whether every one of them is the model's first choice."""

    row_losses: tuple[float, ...]
    row_tokens: tuple[int, ...]
    row_exact: tuple[bool, ...]

    @property
    def loss(self) -> float:
        """Nats per answer token, over all tokens."""
        return math.fsum(self.row_losses) / max(sum(self.row_tokens), 1)

    @property
    def exact(self) -> float:
        """Part of the rows whose every answer token is predicted."""
        return sum(self.row_exact) / max(self.num_rows, 1)

    @property
    def num_rows(self) -> int:
        return len(self.row_exact)


@torch.no_grad()
def score_answers(
    model: torch.nn.Module,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    batch_rows: int = 128,
    progress: Callable[[int], Any] = lambda _: None,
) -> AnswerScore:
    """Score `rows` (prompt, completion; the end token belongs to the answer), in the model's dtype, losses in fp32.

    Exact match under teacher forcing is exact match of greedy decoding: greedy decoding leaves the reference at the
    first token that teacher forcing gets wrong, and not before. progress: called with the rows of each batch done.
    """
    was_training = model.training
    model.eval()
    encoded = [encode(tokenizer, row) for row in rows]
    losses: list[float] = []
    tokens: list[int] = []
    exact: list[bool] = []
    for start in range(0, len(encoded), batch_rows):
        input_ids, labels = collate(encoded[start : start + batch_rows], tokenizer.pad_token_id)
        device = next(model.parameters()).device
        logits = model(input_ids=input_ids.to(device)).logits[:, :-1]
        targets = labels[:, 1:].to(logits.device)
        counted = targets != IGNORED
        nats = torch.zeros(targets.shape, dtype=torch.float64, device=logits.device)
        # Only the answer's logits are cast: with a large vocabulary the prompt's would take more than the model.
        nats[counted] = torch.nn.functional.cross_entropy(
            logits[counted].float(), targets[counted], reduction="none"
        ).double()
        losses += nats.sum(1).tolist()
        tokens += counted.sum(1).tolist()
        exact += ((logits.argmax(-1) == targets) | ~counted).all(1).tolist()
        progress(input_ids.shape[0])
    model.train(was_training)
    return AnswerScore(tuple(losses), tuple(tokens), tuple(exact))


def encode(tokenizer: Any, row: Mapping[str, Any]) -> tuple[list[int], int]:
    """Ids of prompt and completion, and how many belong to the prompt, as TRL does it.

    Texts get the end token; messages get what the tokenizer's chat template puts there.
    """
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str):
        whole = [*tokenizer(prompt + completion)["input_ids"], tokenizer.eos_token_id]
    else:
        text = tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)
        whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    return whole, len(encode_prompt(tokenizer, row))


def encode_prompt(tokenizer: Any, row: Mapping[str, Any]) -> list[int]:
    """Ids after which the model is to write the answer."""
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def collate(rows: Sequence[tuple[list[int], int]], padding: int) -> tuple[Tensor, Tensor]:
    """Ids and labels `[rows, longest]` (int64), padded at the end, which causal attention never looks at.

    rows: token ids, and how many of them at the start are a prompt: their labels, and the padding's, are -100.
    """
    longest = max(len(ids) for ids, _ in rows)
    input_ids = torch.full((len(rows), longest), padding, dtype=torch.int64)
    labels = torch.full((len(rows), longest), IGNORED, dtype=torch.int64)
    for number, (ids, num_prompt) in enumerate(rows):
        input_ids[number, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
        labels[number, num_prompt : len(ids)] = torch.tensor(ids[num_prompt:], dtype=torch.int64)
    return input_ids, labels
