"""Answer loss and exact match of a causal model on prompt and completion, in one forward pass and no generation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lota.data.tokenizer import encode

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


@torch.no_grad()
def check_causal(model: torch.nn.Module) -> None:
    """ValueError where a token's logits depend on the tokens after it: no loss of such a model means anything. (An
    encoder that is loaded as a causal model, without `is_decoder`, is one.)"""
    device = next(model.parameters()).device
    ids = torch.arange(1, 9, dtype=torch.int64, device=device).unsqueeze(0)
    other = ids.clone()
    other[:, -1] = 10
    was_training = model.training
    model.eval()
    one, two = (model(input_ids=tokens).logits[:, :-1].float() for tokens in (ids, other))
    model.train(was_training)
    if bool((one - two).abs().max() > 0.1 * one.std().clamp(min=1e-6)):
        raise ValueError(
            f"{type(model).__name__} is not causal: what it says of a token depends on the tokens after it, so its "
            "answers cannot be scored. An encoder's config.json needs is_decoder: true"
        )


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
