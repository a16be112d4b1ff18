"""A checkpoint folder written anew, a file at a time, with some of its tensors edited under the model's names."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lota.architecture import build_on_meta, tied_names
from lota.checkpoint_keys import CheckpointKeys, Origin, missing_names
from lota.delivery.model_folder import INDEX_NAME, SINGLE_NAME, read_tensor, read_tensors, tensor_files
from lota.delivery.side_files import copy_side_files
from lota.files import read_json_object
from lota.progress import Progress, Say

Edit = Callable[[str, Tensor | None], Tensor | None]
"""What becomes of a model's tensor (None: the checkpoint has none of that name); None: it is left out."""


@dataclass
class Checkpoint:
    """A folder of a model, and which of its keys make which of the model's tensors.

    model: on the meta device; None for files that transformers makes no model of (or where it is not installed): their
    keys are the names. homes: the file of every key.
    """

    path: Path
    homes: dict[str, Path]
    model: Any
    keys: CheckpointKeys | None
    tied: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def open(
        cls, path: Path, names: Collection[str], facts: Mapping[str, Any] | None, trust_remote_code: bool = False
    ) -> Checkpoint:
        """names: tensors that the model is to have. facts: the class that was trained, and entries of its config."""
        homes = tensor_files(path)
        try:
            model = build_on_meta(path, facts, names=names, trust_remote_code=trust_remote_code)
        except ModuleNotFoundError:  # the core alone: what nearly all tied models call the two
            return cls(path, homes, None, None, _tied_by_name(path))
        except ValueError:
            return cls(path, homes, None, None)
        return cls(path, homes, model, CheckpointKeys(model, homes), tied_names(model))

    @property
    def names(self) -> list[str]:
        """The tensors that it can be edited by: those of the model that keys make, tied ones under all names."""
        if self.keys is None:
            made = dict.fromkeys(self.homes)
        else:
            made = dict.fromkeys(self.keys.of_name)
        return list(dict.fromkeys(alias for name in made for alias in (name, *self.tied.get(name, ()))))

    @property
    def prefix(self) -> str | None:
        return getattr(self.model, "base_model_prefix", None)

    def origin(self, key: str) -> Origin | None:
        """Which tensors key `key` takes part in; None: none that the model has."""
        return Origin((key,), (key,)) if self.keys is None else self.keys.of_key.get(key)

    def key_of(self, name: str) -> str | None:
        """The key that holds tensor `name` as it is; None: it is made of several, or of none."""
        if self.keys is None:
            return name if name in self.homes else None
        origin = self.keys.of_name.get(name)
        return origin.keys[0] if origin is not None and origin.converter is None else None

    def read(self, origin: Origin) -> dict[str, Tensor]:
        """The keys' tensors."""
        return {key: read_tensor(self.homes[key], key) for key in origin.keys}

    def missing(self) -> list[str]:
        """The model's parameters that no key makes: transformers would fill them with random numbers."""
        return [] if self.model is None else missing_names(self.model, self.homes.keys())

    def is_copy(self, name: str, other: str) -> bool:
        """Whether two tied names are stored twice with the same values, which transformers ties (others it does
        not)."""
        keys = self.key_of(name), self.key_of(other)
        if None in keys or keys[0] == keys[1]:
            return True
        first, second = (read_tensor(self.homes[str(key)], str(key)) for key in keys)
        return first.dtype == second.dtype and torch.equal(first, second)


def rewrite(
    checkpoint: Checkpoint,
    folder: Path,
    edit: Edit,
    *,
    concerned: Collection[str],
    cast: Callable[[str, Tensor], Tensor],
    added: Sequence[str] = (),
    say: Say,
) -> None:
    """Fill `folder` with the checkpoint, its side files, and its tensors, cast and edited; read back after each file.

    concerned: names of tensors that `edit` is to see (with the tensor as the model has it, cast). cast(name, tensor):
    of keys that make no tensor of the model, the key is the name. added: names to edit though no key makes them.
    """
    copy_side_files(checkpoint.path, folder, say)
    files = sorted(set(checkpoint.homes.values()))
    names = {file: file.name for file in files}
    if len(files) == 1:
        names = {files[0]: SINGLE_NAME}
    done: dict[str, Tensor | None] = {}  # keys of tensors made of several, until their file is written
    total, weight_map = 0, dict[str, str]()
    progress = Progress("read", sum(file.stat().st_size for file in files) / 2**20, "MiB", say)
    for number, file in enumerate(files, 1):
        say(f"{file.name}: {file.stat().st_size / 2**20:,.1f} MiB, file {number} of {len(files)}")
        written: dict[str, Tensor] = {}
        for key, stored in read_tensors(file):
            if key not in done:
                done |= edited(checkpoint, key, stored, edit, concerned, cast)
            made = done.pop(key)
            if made is not None:
                written[key] = made
            progress.add(stored.nbytes / 2**20)
        if number == len(files):
            for name in added:
                made = edit(name, None)
                if made is not None:
                    written[name] = made
        save_file(written, folder / names[file], metadata={"format": "pt"})
        _check_written(folder / names[file], written)
        total += sum(tensor.nbytes for tensor in written.values())
        weight_map |= dict.fromkeys(written, names[file])
    assert not done
    if len(files) > 1:
        index = _index(checkpoint.path)
        metadata = index.get("metadata")
        index["metadata"] = (metadata if isinstance(metadata, dict) else {}) | {"total_size": total}
        index["weight_map"] = weight_map
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def edited(
    checkpoint: Checkpoint,
    key: str,
    stored: Tensor,
    edit: Edit,
    concerned: Collection[str],
    cast: Callable[[str, Tensor], Tensor],
) -> dict[str, Tensor | None]:
    """What becomes of `key`, and of the other keys of the tensors that it takes part in."""
    origin = checkpoint.origin(key)
    if origin is None or not any(name in concerned for name in origin.names):
        return {key: cast(key if origin is None else origin.names[0], stored)}
    if origin.converter is None:
        name = origin.names[0]
        return {key: edit(name, cast(name, stored))}
    assert checkpoint.keys is not None
    tensors = {other: cast(origin.names[0], tensor) for other, tensor in checkpoint.read(origin).items()}
    whole = checkpoint.keys.to_model(origin, tensors)
    made = {}
    for name, tensor in whole.items():
        edited = edit(name, tensor.clone(memory_format=torch.contiguous_format)) if name in concerned else tensor
        if edited is None or edited.shape != tensor.shape:
            raise ValueError(
                f"{name} is made of {len(origin.keys)} tensors of {checkpoint.path}: its rows stay as many"
            )
        made[name] = edited
    # What transformers writes is taken only if it reads as the edited tensors again.
    parts = checkpoint.keys.to_checkpoint(origin, {name: tensor.clone() for name, tensor in made.items()})
    again = checkpoint.keys.to_model(origin, parts)
    wrong = [name for name in made if not same_bits(again[name], made[name])]
    if wrong or any(parts[other].shape != tensors[other].shape for other in tensors):
        raise ValueError(f"transformers does not write {(wrong or list(made))[0]} back as it reads it")
    return {other: parts[other].contiguous().clone() for other in origin.keys}


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal in dtype, shape and every bit (NaN counts as what it holds)."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    flat = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return one.numel() == 0 or torch.equal(*flat)


def changed_positions(one: Tensor, other: Tensor) -> Tensor:
    """Flat positions of the entries whose bits differ; both of one shape and dtype."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.dtype.itemsize]
    first, second = (tensor.contiguous().reshape(-1).view(bits) for tensor in (one, other))
    return (first != second).nonzero().squeeze(1)


def check_complete(folder: Path, checkpoint: Checkpoint, facts: Mapping[str, Any] | None) -> None:
    """ValueError where the folder that was written lacks a tensor of its model that the source had."""
    written = Checkpoint.open(folder, (), facts)
    if written.model is None:
        return
    lost = set(written.missing()) - set(checkpoint.missing())
    if lost:
        raise ValueError(f"{checkpoint.path}: {sorted(lost)[0]} was lost on the way to {folder}: nothing is written")


def _check_written(file: Path, tensors: Mapping[str, Tensor]) -> None:
    found = set()
    for name, tensor in read_tensors(file):
        if name not in tensors or not same_bits(tensor, tensors[name]):
            raise OSError(f"{file}: {name} reads as other values than were written: the disk (or a driver) is at fault")
        found.add(name)
    if found != tensors.keys():
        raise OSError(f"{file}: {sorted(tensors.keys() - found)[0]} was written and is not there")


def _index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX_NAME
    return read_json_object(path) if path.is_file() else {}


def _tied_by_name(folder: Path) -> dict[str, list[str]]:
    path = folder / "config.json"
    if not path.is_file() or read_json_object(path).get("tie_word_embeddings") is False:
        return {}
    embeddings = ("model.embed_tokens.weight", "transformer.wte.weight", "gpt_neox.embed_in.weight")
    return {name: [name, "lm_head.weight", "embed_out.weight"] for name in embeddings}
