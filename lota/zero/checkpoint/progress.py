"""Saving and resuming a block: its state, plus engine counters and optimizer group settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist

from lota.files import naming_odd, write_text
from lota.ranks.agree import together
from lota.zero.checkpoint import state_codec, vectors
from lota.zero.checkpoint.vectors import Vector

COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")
LATEST = "latest"


class Resumable(Protocol):
    """State that a checkpoint holds: sparse training, or scores."""

    def is_mid_step(self) -> bool:
        """Whether gradients wait for a step, which a checkpoint does not hold."""
        ...

    def numbers(self) -> dict[str, Any]:
        """What is not a vector, as JSON, the same on every rank."""
        ...

    def vectors(self) -> list[Vector]:
        """This rank's share of every vector, the same keys in the same order on every rank that owns entries."""
        ...

    def prepare_restore(self, numbers: Mapping[str, Any], keys: set[str]) -> None:
        """Make room for what a checkpoint with these vectors holds; before `vectors()` is asked for."""
        ...

    def restored(self, numbers: Mapping[str, Any]) -> None:
        """The vectors are back: take the numbers and make everything else follow."""
        ...


def save(
    engine: Any,
    core: Resumable,
    identity: Mapping[str, Any],
    folder: Path,
    *,
    file_number: int | None,
    num_files: int,
    client_state: Mapping[str, Any],
) -> None:
    """Write the checkpoint `folder`. Collective over the world."""
    with together():
        if core.is_mid_step():
            raise ValueError(
                "save_checkpoint between backward and step: a checkpoint holds no gradients; call engine.step() first"
            )
        facts = {
            "identity": dict(identity),
            "progress": _progress(engine),
            "client_state": state_codec.encode(dict(client_state), "the client state"),
            "numbers": core.numbers(),
        }
        held = core.vectors()
    vectors.write(folder, held, facts, file_number=file_number, num_files=num_files)


def load(
    engine: Any, core: Resumable, identity: Mapping[str, Any], folder: Path, *, load_lr_scheduler_states: bool
) -> dict[str, Any]:
    """Restore the checkpoint `folder`; returns its client state. Collective over the world.

    ValueError on every rank, and nothing changed, where the folder is damaged, or is of another mask, base, score,
    optimizer or global batch.
    """
    with together():
        stored = vectors.Stored(folder)
        check_same(stored.facts["identity"], json.loads(json.dumps(identity)), folder)
        stored.verify(dist.get_rank(), dist.get_world_size())
    # Nothing has been changed so far, and every byte of the checkpoint was found sound by some rank.
    numbers, progress = stored.facts["numbers"], stored.facts["progress"]
    odd = f"checkpoint {folder} is damaged: {vectors.MANIFEST_NAME}"
    with together(), naming_odd(odd):
        client_state: dict[str, Any] = state_codec.decode(stored.facts["client_state"])
        for kept in (
            *(value for group in progress["param_groups"] for value in group.values()),
            progress["lr_scheduler"],
        ):
            state_codec.decode(kept)  # all of it, before anything is changed
    with together(), naming_odd(odd):
        core.prepare_restore(numbers, stored.keys())
        held = core.vectors()
    vectors.restore(stored, held)
    with naming_odd(odd):
        core.restored(numbers)
        _restore_progress(engine, progress, load_lr_scheduler_states)
    return client_state


def check_same(found: Mapping[str, Any], expected: Mapping[str, Any], folder: Path) -> None:
    """ValueError where a checkpoint is of something else than the run that wants to resume from it."""
    cure = "Resume with what it was made with, or start a new run."
    if found["kind"] != expected["kind"]:
        raise ValueError(
            f"{folder} is a checkpoint of {found['kind']:.80}, this is {expected['kind']}: choose a checkpoint of "
            f"{expected['kind']}"
        )
    base, here = found["base"], expected["base"]
    for name in sorted({*base, *here}):
        if base.get(name) != here.get(name):
            raise ValueError(
                f"{folder} was made on another base model: {name} was {base.get(name)}, here it is {here.get(name)}. "
                f"{cure}"
            )
    for key in sorted(set(expected) - {"base", "kind"}):
        if found.get(key) != expected[key]:
            raise ValueError(
                f"{folder} was made with another {key.replace('_', ' ')}: {_short(found.get(key))}; this run has "
                f"{_short(expected[key])}. {cure}"
            )


def mark_latest(save_dir: Path, tag: str) -> None:
    """Name the newest checkpoint in `save_dir`, as DeepSpeed does."""
    write_text(save_dir / LATEST, tag)


def latest_tag(save_dir: Path) -> str:
    try:
        return (save_dir / LATEST).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        raise ValueError(
            f"{save_dir} holds no file {LATEST!r}, so it holds no complete checkpoint: pass a folder that "
            "save_checkpoint wrote to, or a tag"
        ) from None


def _progress(engine: Any) -> dict[str, Any]:
    scheduler = engine.lr_scheduler
    return {
        "counters": {name: int(getattr(engine, name)) for name in COUNTERS},
        "param_groups": [state_codec.encode_group(group) for group in engine.optimizer.param_groups],
        "loss_scaler": _numbers_of(engine.optimizer.loss_scaler),
        "lr_scheduler": None if scheduler is None else state_codec.encode(scheduler.state_dict(), "the scheduler"),
    }


def _restore_progress(engine: Any, progress: Mapping[str, Any], load_lr_scheduler_states: bool) -> None:
    for name, value in progress["counters"].items():
        setattr(engine, name, value)
    # DeepSpeed counts the micro steps of a step from here: other ranks may take other numbers of them.
    engine.micro_steps -= engine.micro_steps % engine.gradient_accumulation_steps()
    for group, saved in zip(engine.optimizer.param_groups, progress["param_groups"], strict=True):
        state_codec.restore_group(group, saved, engine.device)
    for name, value in progress["loss_scaler"].items():
        setattr(engine.optimizer.loss_scaler, name, value)
    if load_lr_scheduler_states and engine.lr_scheduler is not None and progress["lr_scheduler"] is not None:
        engine.lr_scheduler.load_state_dict(state_codec.decode(progress["lr_scheduler"], engine.device))


def _numbers_of(thing: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(thing).items() if isinstance(value, (bool, int, float))}


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_short(item)}" for key, item in value.items())
    return f"{len(value)} tensors" if isinstance(value, list) else str(value)[:40]
