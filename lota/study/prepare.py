"""The study's data: tokenizer, texts for pretraining, and rows of every task, as files that a run can name.

    DATA/tokenizer/  pretraining.jsonl  general_train.jsonl  general_test.jsonl  TASK/{train,dev,test}.jsonl

Rows of a task hold prompt and completion, the others a text. `dev` is to choose on and `test` to report, and no run
trains on either.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from lota.demo.small_model import train_tokenizer
from lota.files import new_folder
from lota.study import safety, world
from lota.study.texts import Texts

PARTS = ("train", "dev", "test")
SHARE_REQUESTS = 0.08

Row = dict[str, str]


@dataclass(frozen=True)
class DataConfig:
    """How much of what. conflict, num_texts: of the made-up world."""

    vocab_size: int = 1024
    max_length: int = 128
    num_texts: int = 60000
    num_train: int = 3200
    num_dev: int = 64
    num_test: int = 256
    num_general: int = 512
    conflict: float = 0.5
    seed: int = 11


def prepare(config: DataConfig, tasks: Iterable[str], data: Path | None, out: Path, say: Callable[[str], None]) -> None:
    """Write the folder `out`, unless it is there; then it must be of the same settings, else ValueError."""
    settings = {"data": asdict(config), "tasks": sorted(tasks), "from": None if data is None else str(data.resolve())}
    if out.is_dir():
        if json.loads((out / "settings.json").read_text(encoding="utf-8")) != settings:
            raise ValueError(f"{out} was made with other settings: choose another --out, or remove it")
        return
    say("making texts and rows")
    with new_folder(out) as folder:
        made = World(config) if data is None else Real(config, data)
        requests = safety.rows("requests", config.seed, "pretraining", round(SHARE_REQUESTS * config.num_texts))
        texts = made.pretraining() + [row["prompt"] + row["completion"] for row in requests]
        random.Random(config.seed).shuffle(texts)
        held, texts = texts[: 2 * config.num_general], texts[2 * config.num_general :]
        _write(folder / "pretraining.jsonl", ({"text": text} for text in texts))
        _write(folder / "general_train.jsonl", ({"text": text} for text in held[: config.num_general]))
        _write(folder / "general_test.jsonl", ({"text": text} for text in held[config.num_general :]))
        tokenizer = train_tokenizer(texts[:20000], config.vocab_size)
        tokenizer.save_pretrained(folder / "tokenizer")
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        for task in sorted(tasks):
            (folder / task).mkdir()
            for part, rows in _parts(task, made, tokenizer, config):
                _write(folder / task / f"{part}.jsonl", rows)
        (folder / "settings.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


class World:
    """Where the rows of the made-up world come from."""

    def __init__(self, config: DataConfig) -> None:
        self._config = config
        self._world = world.World(world.WorldConfig(config.seed, config.conflict))

    def pretraining(self) -> list[str]:
        return list(self._world.pretraining(self._config.num_texts))

    def rows(self, task: str, part: str) -> Iterator[Row]:
        """Without those that another part has."""
        config = self._config
        seen = (
            {row["prompt"] for row in self._world.rows(task, "train", 2 * config.num_train)} if part == "test" else ()
        )
        count = 2 * config.num_train if part == "train" else 4 * (config.num_dev + config.num_test)
        return (row for row in self._world.rows(task, part, count) if row["prompt"] not in seen)


class Real:
    """Where the rows of real text come from."""

    def __init__(self, config: DataConfig, data: Path) -> None:
        self._config, self._texts = config, Texts(data, config.seed)

    def pretraining(self) -> list[str]:
        return self._texts.pretraining()

    def rows(self, task: str, part: str) -> Iterator[Row]:
        return self._texts.rows(task, part)


def _parts(task: str, made: World | Real, tokenizer: Any, config: DataConfig) -> Iterator[tuple[str, list[Row]]]:
    """Rows that fit into max_length tokens, whole; dev and test are of the same file."""
    if task in safety.KINDS:
        counts = dict(zip(PARTS, (config.num_train, config.num_dev, config.num_test)))
        yield from ((part, safety.rows(task, config.seed, part, count)) for part, count in counts.items())
        return
    train = list(_fitting(made.rows(task, "train"), tokenizer, config, config.num_train))
    rest = list(_fitting(made.rows(task, "test"), tokenizer, config, config.num_dev + config.num_test))
    if len(rest) < config.num_dev + 8:
        raise ValueError(f"{task}: only {len(rest)} of its test rows fit into {config.max_length} tokens")
    yield from zip(PARTS, (train, rest[: config.num_dev], rest[config.num_dev :]))


def _fitting(rows: Iterable[Row], tokenizer: Any, config: DataConfig, count: int) -> Iterator[Row]:
    for row in rows:
        if count and len(tokenizer(row["prompt"] + row["completion"])["input_ids"]) < config.max_length:
            count -= 1
            yield row


def _write(path: Path, rows: Iterable[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def discard(out: Path) -> None:
    """Remove the folder that `prepare` made."""
    shutil.rmtree(out, ignore_errors=True)
