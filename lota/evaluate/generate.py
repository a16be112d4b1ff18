"""Answers that a model writes to prompts, in batches padded on the left, with transformers' own generate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from lota.data.tokenizer import encode_prompt


@dataclass(frozen=True)
class Decoding:
    """How answers are written. temperature 0 is greedy; above it, plain sampling from the whole vocabulary."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def check(self) -> None:
        """ValueError for what cannot decode anything."""
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 (greedy) or above, got {self.temperature}")
        if any(not text for text in self.stop):
            raise ValueError("stop holds an empty text, which would end every answer before it begins")


@torch.no_grad()
def write_answers(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    decoding: Decoding,
    batch_rows: int = 16,
    progress: Callable[[int], Any] = lambda _: None,
) -> list[str]:
    """The text after each row's prompt, in the order of `rows`: up to an end token, a stop text (left out), or the
    limit of tokens. Special tokens are left out."""
    was_training = model.training
    model.eval()
    if decoding.temperature:
        torch.manual_seed(decoding.seed)
    prompts = [encode_prompt(tokenizer, row) for row in rows]
    texts = [""] * len(prompts)
    own, model.generation_config = model.generation_config, GenerationConfig()  # of which only end tokens count
    try:
        ends = _ends(own, tokenizer)
        may_pad = len({len(prompt) for prompt in prompts}) < 2 or _may_pad(model, prompts, tokenizer.pad_token_id)
        for numbers in _batches(prompts, batch_rows, may_pad):
            written = _generate(model, tokenizer, [prompts[number] for number in numbers], decoding, ends)
            for number, ids in zip(numbers, written, strict=True):
                texts[number] = cut(tokenizer.decode(ids, skip_special_tokens=True), decoding.stop)
            progress(len(numbers))
    finally:
        model.generation_config = own
        model.train(was_training)
    return texts


def _batches(prompts: Sequence[Sequence[int]], batch_rows: int, may_pad: bool) -> Iterator[list[int]]:
    """Numbers of the prompts that share a batch: those of like length, or where nothing may be padded of the same. The
    longest come first, so that what does not fit fails at once."""
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    for _, alike in groupby(order, key=lambda number: None if may_pad else len(prompts[number])):
        numbers = list(alike)
        for start in range(0, len(numbers), batch_rows):
            yield numbers[start : start + batch_rows]


def _may_pad(model: Any, prompts: Sequence[Sequence[int]], padding: int) -> bool:
    """Whether padding on the left leaves the next token's logits as they are. State-space models read the padding, and
    some models count positions from it. Measured on the shortest prompt; rounding is allowed for."""
    shortest = min((prompt for prompt in prompts if prompt), key=len, default=None)
    if shortest is None:
        return True
    device = next(model.parameters()).device

    def next_logits(num_padding: int) -> Tensor:
        ids = torch.tensor([[padding] * num_padding + list(shortest)], dtype=torch.int64, device=device)
        mask = torch.ones_like(ids)
        mask[:, :num_padding] = 0
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=GenerationConfig(
                max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True,
                pad_token_id=padding, eos_token_id=None,
            ),
        )  # fmt: skip
        logits: Tensor = out.logits[0].float()
        return logits

    alone, padded = next_logits(0), next_logits(5)
    return bool((alone - padded).abs().max() <= _ROUNDING * alone.std().clamp(min=1e-6))


_ROUNDING = 0.1
"""Of the spread of the logits: bf16 sums in another order are off by a tenth of this, positions that are off by far
more."""


def _generate(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], decoding: Decoding, ends: list[int]
) -> list[list[int]]:
    """The ids after each prompt, padding included."""
    longest = max(map(len, prompts))
    input_ids = torch.full((len(prompts), longest), tokenizer.pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for line, prompt in enumerate(prompts):
        input_ids[line, longest - len(prompt) :] = torch.tensor(prompt, dtype=torch.int64)
        attention_mask[line, longest - len(prompt) :] = 1
    device = next(model.parameters()).device
    written = model.generate(
        input_ids=input_ids.to(device),
        attention_mask=attention_mask.to(device),
        generation_config=_generation_config(tokenizer, decoding, ends),
        **({"stop_strings": list(decoding.stop), "tokenizer": tokenizer} if decoding.stop else {}),
    )
    ids: list[list[int]] = written[:, longest:].tolist()
    return ids


def cut(text: str, stop: Sequence[str]) -> str:
    """`text` up to the first place where any text of `stop` begins."""
    return text[: min([place for place in map(text.find, stop) if place >= 0], default=len(text))]


def _ends(own: GenerationConfig, tokenizer: Any) -> list[int]:
    """The model's own end tokens (chat models have several), and the tokenizer's."""
    ends = own.eos_token_id
    ends = [] if ends is None else list(ends) if isinstance(ends, (list, tuple)) else [ends]
    return ends + [tokenizer.eos_token_id] * (tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends)


def _generation_config(tokenizer: Any, decoding: Decoding, ends: list[int]) -> GenerationConfig:
    """What changes an answer, and nothing else: the model's own, from which generate takes what is left out, is empty
    meanwhile."""
    return GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        do_sample=decoding.temperature > 0,
        temperature=decoding.temperature or 1.0,
        top_k=0 if decoding.temperature else 50,  # 50 is the value that greedy decoding ignores without a warning
        top_p=1.0,
        use_cache=True,
        eos_token_id=ends or None,
        pad_token_id=tokenizer.pad_token_id,
    )
