"""What the trainer will see of its rows, and which of their tokens are trained: counted, and shown for the first ones.

A position is trained where its label is one and a token stands before it: the first token of a row, or of every text in
a packed row, is predicted from nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import Tensor

IGNORED = -100
PREFERENCE = ("prompt", "chosen", "rejected")
OPEN, CLOSE = "⟦", "⟧"
NUM_SHOWN, NUM_WRITTEN = 2, 8


def num_trained_tokens(train: Dataset, max_length: int | None = None) -> int:
    """Tokens that count in the loss, in rows as TRL prepared them. ValueError where there is none.

    max_length: where preferences are cut, which the collator does; all other rows are cut already.
    """
    count = 0
    for batch in train.with_format("arrow").iter(1000):
        if "chosen_ids" in batch.column_names:  # preferences: both answers count
            prompts, *answers = (pc.list_value_length(batch.column(f"{part}_ids")).to_numpy() for part in PREFERENCE)
            longest = max_length or np.inf
            count += sum(int((np.minimum(prompts + n, longest) - np.minimum(prompts, longest)).sum()) for n in answers)
            continue
        rows = batch.column("labels").combine_chunks()
        is_label = rows.flatten().to_numpy(zero_copy_only=False) != IGNORED
        texts = batch.column("seq_lengths").combine_chunks() if "seq_lengths" in batch.column_names else None
        lengths = (rows.value_lengths() if texts is None else texts.flatten()).to_numpy(zero_copy_only=False)
        starts = np.cumsum(lengths) - lengths
        count += int(is_label.sum() - is_label[starts[lengths > 0]].sum())
    if count == 0:
        raise ValueError(
            "no token of any row is trained: max_length cut all completions or answers away, or they are empty"
        )
    return count


def trained_positions(batch: dict[str, Tensor]) -> Tensor:
    """Which positions of the collator's batch are predicted and count in the loss: bool, in the shape of its ids."""
    trained = batch["labels"] != IGNORED if "labels" in batch else batch["completion_mask"].bool()
    trained[:, 0] = False
    return trained


def first_examples(trainer: Any, count: int) -> list[tuple[list[int], list[bool]]]:
    """Ids, and whether each is trained, of the first rows, from the trainer's own rows and collator.

    A preference gives two, the better answer and the worse one.
    """
    examples = []
    for number in range(min(count, len(trainer.train_dataset))):
        batch = trainer.data_collator([trainer.train_dataset[number]])
        is_text = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        for ids, trained, kept in zip(batch["input_ids"], trained_positions(batch), is_text):
            examples.append((ids[kept].tolist(), trained[kept].tolist()))
    return examples


def marked(tokenizer: Any, ids: Sequence[int], trained: Sequence[bool]) -> str:
    """The text of `ids`, special tokens included, with ⟦ and ⟧ around what is trained."""
    text, before = "", ""
    for is_trained, run in groupby(range(len(ids)), key=lambda k: trained[k]):
        numbers = list(run)
        start, end = numbers[0], numbers[-1] + 1
        # Decoded from the first token on: a part alone would lose the space before it.
        whole = tokenizer.decode(ids[:end])
        part = whole[len(before) :] if whole.startswith(before) else tokenizer.decode(ids[start:end])
        before = whole
        text += f"{OPEN}{part}{CLOSE}" if is_trained else part
    return text


def pieces(tokenizer: Any, ids: Sequence[int], trained: Sequence[bool]) -> str:
    """One token after the other, trained ones between ⟦ and ⟧."""
    names = [name.replace("\n", "\\n") for name in tokenizer.convert_ids_to_tokens(list(ids))]
    return " ".join(f"{OPEN}{name}{CLOSE}" if is_trained else name for name, is_trained in zip(names, trained))


def show(tokenizer: Any, ids: Sequence[int], trained: Sequence[bool], longest: int = 1500) -> str:
    """One example for the terminal, in the middle of a long one a gap."""
    text = marked(tokenizer, ids, trained)
    if len(text) > longest:
        text = f"{text[: longest // 2]} ... {text[-longest // 2 :]}"
    return f"{len(ids)} tokens, {sum(trained)} of them trained ({OPEN}...{CLOSE}):\n{text}"


def render(tokenizer: Any, examples: Sequence[tuple[list[int], list[bool]]]) -> str:
    """The file examples.txt: text and tokens of every example."""
    parts = [f"{OPEN}...{CLOSE} is trained; everything else is only read."]
    for number, (ids, trained) in enumerate(examples, start=1):
        head = f"row {number}: {len(ids)} tokens, {sum(trained)} of them trained"
        parts.append(f"{head}\n{marked(tokenizer, ids, trained)}\n\ntokens: {pieces(tokenizer, ids, trained)}")
    return f"\n\n{'-' * 80}\n".join(parts) + "\n"
