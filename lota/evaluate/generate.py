"""Answers that a model writes to prompts, in batches padded on the left, with transformers' own generate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from lota.evaluate.answer_loss import encode_prompt


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
    # Prompts of like length share a batch; the longest come first, so that what does not fit fails at once.
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    texts = [""] * len(prompts)
    for start in range(0, len(order), batch_rows):
        numbers = order[start : start + batch_rows]
        longest = max(len(prompts[number]) for number in numbers)
        input_ids = torch.full((len(numbers), longest), tokenizer.pad_token_id, dtype=torch.int64)
        attention_mask = torch.zeros_like(input_ids)
        for line, number in enumerate(numbers):
            input_ids[line, longest - len(prompts[number]) :] = torch.tensor(prompts[number], dtype=torch.int64)
            attention_mask[line, longest - len(prompts[number]) :] = 1
        device = next(model.parameters()).device
        written = model.generate(
            input_ids=input_ids.to(device),
            attention_mask=attention_mask.to(device),
            generation_config=_generation_config(model, tokenizer, decoding),
            **({"stop_strings": list(decoding.stop), "tokenizer": tokenizer} if decoding.stop else {}),
        )
        for number, ids in zip(numbers, written[:, longest:].tolist(), strict=True):
            texts[number] = cut(tokenizer.decode(ids, skip_special_tokens=True), decoding.stop)
        progress(len(numbers))
    model.train(was_training)
    return texts


def cut(text: str, stop: Sequence[str]) -> str:
    """`text` up to the first place where any text of `stop` begins."""
    return text[: min([place for place in map(text.find, stop) if place >= 0], default=len(text))]


def _generation_config(model: Any, tokenizer: Any, decoding: Decoding) -> GenerationConfig:
    """Nothing of the model's own sampling settings but its end tokens (chat models have several)."""
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    if tokenizer.eos_token_id is not None:
        ends = [*ends, *([] if tokenizer.eos_token_id in ends else [tokenizer.eos_token_id])]
    # What is left unset here, generate takes from the model's folder, so everything that changes an answer is set.
    return GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        min_length=0,
        do_sample=decoding.temperature > 0,
        temperature=decoding.temperature or 1.0,
        top_k=0 if decoding.temperature else 50,  # 50 is the value that greedy decoding ignores without a warning
        top_p=1.0,
        num_beams=1,
        use_cache=True,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=ends or None,
        pad_token_id=tokenizer.pad_token_id,
    )
