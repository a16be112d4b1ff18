"""The rows of a step: a run keeps their number on any number of ranks, and every rank count sees the same ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.utils.data import RandomSampler, SequentialSampler


@dataclass(frozen=True)
class Batch:
    """What makes a step: rows of a micro batch, micro steps, ranks."""

    micro: int
    accumulation: int
    ranks: int

    @classmethod
    def of(cls, config: Any, ranks: int) -> Batch:
        """config: TrainingArguments."""
        return cls(config.per_device_train_batch_size, config.gradient_accumulation_steps, ranks)

    @property
    def rows(self) -> int:
        """The global batch."""
        return self.micro * self.accumulation * self.ranks

    def __str__(self) -> str:
        ranks = "1 rank" if self.ranks == 1 else f"{self.ranks} ranks"
        return f"{self.rows} rows a step ({self.micro} a micro batch x {self.accumulation} micro steps x {ranks})"

    def cure(self, rows: int) -> str:
        """What to give on these ranks so that a step has `rows` rows."""
        if rows % self.ranks:
            return f"{rows} rows cannot be shared out over {self.ranks} ranks: use {_divisors_around(rows, self.ranks)}"
        each = rows // self.ranks
        given = []
        if each % self.micro == 0:  # the same micro batches: only the order of sums differs
            given.append(f"--gradient_accumulation_steps {each // self.micro}")
        if each % self.accumulation == 0:
            given.append(f"--per_device_train_batch_size {each // self.accumulation}")
        if not given:
            micro = _largest(each, self.micro)
            given.append(f"--per_device_train_batch_size {micro} --gradient_accumulation_steps {each // micro}")
        return f"on {self.ranks} ranks give {' or '.join(given)}"


def set_accumulation(config: Any, global_batch_size: int, ranks: int, given: set[str]) -> None:
    """Set `config.gradient_accumulation_steps` so that a step has `global_batch_size` rows; ValueError where no whole
    number does. given: names of the options that the user gave."""
    if "gradient_accumulation_steps" in given:
        raise ValueError("give global_batch_size or gradient_accumulation_steps, not both: one follows from the other")
    micro = config.per_device_train_batch_size
    if global_batch_size < 1 or global_batch_size % ranks:
        raise ValueError(
            f"global_batch_size must be a multiple of the number of ranks, {ranks}, got {global_batch_size}: change it"
            + (f", or use {_divisors_around(global_batch_size, ranks)}" if global_batch_size > 0 else "")
        )
    steps, rest = divmod(global_batch_size, micro * ranks)
    if rest:
        raise ValueError(
            f"global_batch_size must be a multiple of per_device_train_batch_size x ranks, {micro} x {ranks}, got "
            f"{global_batch_size}: give --per_device_train_batch_size {_largest(global_batch_size // ranks, micro)}"
        )
    config.gradient_accumulation_steps = steps


def whole_steps(sampler: Any, rows: int, drop_last: bool) -> Any:
    """The sampler of an epoch, filled up to whole steps of `rows` rows by rows drawn once more; with `drop_last` cut.

    The Trainer alone would fill up to whole micro batches of all ranks, so that the last step of an epoch had other
    rows on other ranks. Samplers that look at batches or ranks themselves are returned as they are.
    """
    if type(sampler) not in (RandomSampler, SequentialSampler):
        return sampler
    length = len(sampler.data_source)
    whole = (length if drop_last else length + rows - 1) // rows * rows
    if whole == 0:
        raise ValueError(
            f"dataloader_drop_last leaves nothing of {length} rows at {rows} rows a step: remove it, or lower the "
            "global batch"
        )
    if whole == length:
        return sampler
    if isinstance(sampler, SequentialSampler):
        return [row % length for row in range(whole)]
    return RandomSampler(sampler.data_source, num_samples=whole)


def _largest(rows: int, limit: int) -> int:
    """The largest micro batch up to `limit` that divides `rows`."""
    return max(size for size in range(1, limit + 1) if rows % size == 0)


def _divisors_around(rows: int, ranks: int) -> str:
    below = max(count for count in range(1, min(ranks, rows) + 1) if rows % count == 0)
    above = [count for count in range(ranks + 1, rows + 1) if rows % count == 0][:1]
    return f"{' or '.join(map(str, [below, *above]))} ranks"
