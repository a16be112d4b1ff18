"""The demo's base model and data: made from the demo world once, then found in the cache."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from lota.demo import small_model, world
from lota.demo.small_model import END, Row, SmallModelConfig
from lota.demo.world import World, WorldConfig

# What one batch of pretraining is made of; the rest is plain text.
SHARE_TRANSLATIONS = 0.75


def cache_folder() -> Path:
    """Where made models are kept: $XDG_CACHE_HOME/lota, or ~/.cache/lota."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lota"


def prepare(world_config: WorldConfig, model_config: SmallModelConfig, say: Callable[[str], None]) -> Path:
    """The folder with model/, train.jsonl, test.jsonl and earlier_test.jsonl of this configuration, made if missing.

    The cache key holds both configurations and the source that turns them into data, so a stale cache is never used.
    """
    sources = [Path(str(module.__file__)).read_bytes() for module in (world, small_model)]
    key = hashlib.sha256(json.dumps([asdict(world_config), asdict(model_config)]).encode() + b"".join(sources))
    folder = cache_folder() / f"demo-{key.hexdigest()[:16]}"
    if folder.is_dir():
        say(f"base model: found in {folder}")
        return folder
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _make(World(world_config), model_config, temporary, say)
        if not folder.exists():
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _make(world: World, config: SmallModelConfig, folder: Path, say: Callable[[str], None]) -> None:
    count = world.config
    _write(folder / "train.jsonl", world.new_rows("train", count.num_train))
    _write(folder / "test.jsonl", world.new_rows("test", count.num_test))
    _write(folder / "earlier_test.jsonl", world.earlier_rows("test", count.num_test))

    plain = world.plain_text()
    translations = world.pretraining_rows()
    lines = [*plain, *(row["prompt"] + row["completion"] for row in translations)]
    tokenizer = small_model.train_tokenizer(lines, config.vocab_size)

    def encode(rows: list[dict[str, str]]) -> list[Row]:
        prompts = tokenizer([row["prompt"] for row in rows])["input_ids"]
        whole = tokenizer([row["prompt"] + row["completion"] for row in rows])["input_ids"]
        return [([*ids, END], len(prompt)) for ids, prompt in zip(whole, prompts)]

    plain_rows = [([*ids, END], 1) for ids in tokenizer(plain)["input_ids"]]
    num_translations = int(config.batch_rows * SHARE_TRANSLATIONS)
    streams = [
        _batches(encode(translations), num_translations, config.seed),
        _batches(plain_rows, config.batch_rows - num_translations, config.seed),
    ]
    batches = ([row for stream in streams for row in next(stream)] for _ in range(config.steps))
    model = small_model.pretrain(config, len(tokenizer), batches, say)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


def _batches(rows: Sequence[Row], size: int, seed: int) -> Iterator[list[Row]]:
    """Batches of `size` rows for ever, shuffled anew in every round."""
    rng = random.Random(seed)
    order: list[Row] = []
    while True:
        while len(order) < size:
            order.extend(rng.sample(rows, len(rows)))
        yield order[:size]
        del order[:size]


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
