"""Whole models on disk, a shard file at a time: a base with its ticket applied, or the model of a ZeRO-3 engine."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from safetensors.torch import save_file
from torch import Tensor

from lota.delivery.apply import apply_to_checkpoint
from lota.delivery.model_folder import locate
from lota.delivery.side_files import copy_side_files
from lota.files import make_readable, read_json_object, sync, write_text
from lota.ranks.agree import together
from lota.ranks.world import barrier, print_once, rank
from lota.run.resolve import RunOptions
from lota.ticket import Ticket
from lota.train import lora

SHARD_BYTES = 4 << 30


def save_applied(
    options: RunOptions,
    dtype: torch.dtype,
    ticket_path: Path,
    path: Path,
    template: str | None = None,
    *,
    is_disjoint: bool = True,
) -> None:
    """Write the base, cast to `dtype`, with the run's tickets and this one assigned. template: path of the chat
    template that the run used, which the folder then has. is_disjoint: whether this one shares no entry with the
    others; else they are applied one after another. Rank 0 works, the others wait."""
    with together():
        if rank() == 0:
            shutil.rmtree(path, ignore_errors=True)  # of a run that was stopped before its summary
            base: Path = locate(options.model, options.revision)
            tickets = [Ticket.load(other) for other in [*options.keeping.tickets, str(ticket_path)]]
            steps = [tickets] if is_disjoint else [[one] for one in tickets]
            for number, on_it in enumerate(steps, start=1):
                is_last = number == len(steps)
                target = path if is_last else path.with_name(f".merged.partial-{number}")
                shutil.rmtree(target, ignore_errors=True)
                apply_to_checkpoint(
                    base,
                    on_it,
                    target,
                    dtype=dtype,
                    trust_remote_code=options.trust_remote_code,
                    finish=lambda folder: _write_template(folder, template),
                    say=print_once,
                )
                if number > 1:
                    shutil.rmtree(base)
                base = target
            print_once(f"merged model in {path}")


def _write_template(folder: Path, template: str | None) -> None:
    if template is not None:
        write_text(folder / "chat_template.jinja", Path(template).read_text(encoding="utf-8"))


def save_sharded(engine: Any, path: Path, options: RunOptions, template: str | None = None) -> None:
    """Write the model of a ZeRO-3 engine as a Hugging Face folder, with all that its base's folder holds beside the
    weights. Collective.

    Tensors are gathered one at a time, an adapter merged into them, and rank 0 holds at most one shard file. Tied
    tensors are written once, as transformers does.
    """
    engine.empty_partition_cache()  # a forward pass leaves prefetched tensors in flight, which cannot be gathered
    model = engine.module
    temporary = path.with_name(f".{path.name}.partial")
    if rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dtypes: set[str] = set()
    shard: dict[str, Tensor] = {}
    shards: list[list[str]] = []
    total = 0
    for name, tensor in lora.merged_tensors(model) if options.adapter is not None else _tensors(model):
        if tensor is not None:
            shard[name] = tensor
            total += tensor.nbytes
            dtypes |= {str(tensor.dtype).removeprefix("torch.")} if tensor.is_floating_point() else set()
        if sum(tensor.nbytes for tensor in shard.values()) >= SHARD_BYTES:
            shards.append(_write_shard(temporary, len(shards), shard))
            shard = {}
    if rank() == 0:
        if shard:
            shards.append(_write_shard(temporary, len(shards), shard))
        _name_shards(temporary, shards, total)
        _add_side_files(temporary, model, options, next(iter(dtypes)) if len(dtypes) == 1 else None)
        _write_template(temporary, template)
        make_readable(temporary)
        sync(temporary)
        shutil.rmtree(path, ignore_errors=True)  # of a run that was stopped before its summary
        os.replace(temporary, path)
        print_once(f"trained model in {path}")
    barrier()


def _add_side_files(folder: Path, model: Any, options: RunOptions, dtype: str | None) -> None:
    """The base's own files, byte for byte but for the dtype in config.json; where the trained class is not the base's
    (the text part of a multimodal one), the configuration is the trained one's."""
    copy_side_files(locate(options.model, options.revision), folder, print_once)
    config = read_json_object(folder / "config.json")
    unwrapped = model.get_base_model() if hasattr(model, "get_base_model") else model
    if type(unwrapped).__name__ not in (config.get("architectures") or []):
        unwrapped.config.use_cache = True
        unwrapped.config.save_pretrained(folder)
        config = read_json_object(folder / "config.json")
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    if dtype is not None and config.get(key) != dtype:
        write_text(folder / "config.json", json.dumps(config | {key: dtype}, indent=2) + "\n")


def _tensors(model: Any) -> Iterator[tuple[str, Tensor | None]]:
    """Every tensor, whole, on rank 0. Collective."""
    for name, param in model.named_parameters():
        with deepspeed.zero.GatheredParameters([param]):
            yield name, param.detach().cpu().clone() if rank() == 0 else None


def _write_shard(folder: Path, number: int, tensors: dict[str, Tensor]) -> list[str]:
    save_file(tensors, folder / f"{number}.safetensors", metadata={"format": "pt"})
    return list(tensors)


def _name_shards(folder: Path, shards: list[list[str]], total: int) -> None:
    """Give the files the names that transformers looks for, and an index where there is more than one."""
    if len(shards) == 1:
        os.replace(folder / "0.safetensors", folder / "model.safetensors")
        return
    weight_map: dict[str, Any] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        os.replace(folder / f"{number}.safetensors", folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
