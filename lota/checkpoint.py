"""Tickets on checkpoint folders: assigned, or taken out again, a file at a time; the base verified, all or nothing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lota.apply import check_disjoint, check_is_base, flatten
from lota.architecture import build_on_meta
from lota.card import CARD_NAME, is_card, merged_card
from lota.folder import INDEX_NAME, WEIGHT_SUFFIXES, new_folder, read_tensors, stored_dtypes, tensor_files
from lota.ticket import Ticket
from lota.ticket.writer import count_changed
from lota.wording import did_you_mean

Edit = Callable[[str, Tensor], None]
Say = Callable[[str], None]


def apply_to_checkpoint(
    base: str | os.PathLike[str],
    tickets: Sequence[Ticket],
    out: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    say: Say | None = None,
) -> None:
    """Write the checkpoint folder `out`: the safetensors folder `base` with the tickets' values assigned, and a card.

    A file at a time is in memory; other files (configuration, tokenizer) are copied. Where the checkpoint names its
    tensors otherwise than the loaded model does (mixtures of experts), transformers loads and saves it whole instead.
    Tickets must be of this base and must not overlap. dtype: cast the base's floating tensors first; None takes the
    dtype in which the tickets were trained. `out` appears by one rename when it is complete; ValueError leaves nothing
    behind. say: told of every file.
    """
    base = Path(base)
    names = [frozenset(ticket.names) for ticket in tickets]

    def edit(name: str, tensor: Tensor) -> None:
        concerned = [ticket for ticket, known in zip(tickets, names) if name in known]
        for ticket in concerned:
            check_is_base(ticket.mask, name, tensor)
        for ticket in concerned:
            if ticket.mask.active(name):
                flat = flatten(tensor)
                flat.index_copy_(0, ticket.mask.indices(name), ticket.values(name).to(flat.dtype))

    with new_folder(out) as folder:
        check_disjoint(tickets)
        _rewrite(base, folder, tickets, edit, dtype, say or _silent)
        (folder / CARD_NAME).write_text(merged_card(tickets, _config(base)), encoding="utf-8")


def revert_checkpoint(
    tuned: str | os.PathLike[str], tickets: Sequence[Ticket], out: str | os.PathLike[str], *, say: Say | None = None
) -> None:
    """Write the folder `out`: the checkpoint `tuned` with the tickets' base values put back, which is their base again.

    tickets: all that are on it, with base values. Each must be there: every active entry holds its value. The outcome
    is held against the base's fingerprints, so it is the base bit for bit, or ValueError and nothing is written. Other
    files are copied, but for a card that `apply_to_checkpoint` wrote.
    """
    tuned = Path(tuned)
    names = [frozenset(ticket.names) for ticket in tickets]

    def edit(name: str, tensor: Tensor) -> None:
        concerned = [ticket for ticket, known in zip(tickets, names) if name in known]
        for ticket in concerned:
            _put_back(ticket, name, tensor, tuned)
        for ticket in concerned:
            try:
                check_is_base(ticket.mask, name, tensor)
            except ValueError as error:
                raise ValueError(
                    f"{error} Entries outside of the ticket are not the base's: either {tuned} carries another ticket "
                    "(give all of them), or it was changed since."
                ) from None

    for ticket in tickets:
        if not ticket.has_base_values:
            raise ValueError("this ticket holds no base values to put back: take the base model itself")
    with new_folder(out) as folder:
        check_disjoint(tickets)
        _rewrite(tuned, folder, tickets, edit, None, say or _silent)
        card = folder / CARD_NAME
        if card.is_file() and is_card(card.read_text(encoding="utf-8")):
            card.unlink()


def _rewrite(
    source: Path, folder: Path, tickets: Sequence[Ticket], edit: Edit, dtype: torch.dtype | None, say: Say
) -> None:
    """Fill `folder` with the checkpoint `source`, cast, and edited in place tensor by tensor."""
    homes = tensor_files(source)
    missing = next((name for ticket in tickets for name in ticket.names if name not in homes), None)
    for other in source.iterdir():
        if other.is_file() and other.suffix not in WEIGHT_SUFFIXES and not (missing and other.name == INDEX_NAME):
            shutil.copy(other, folder / other.name)
    if missing is not None:
        _rewrite_by_transformers(source, folder, edit, dtype or _dtype_of_training(tickets), missing, homes, say)
        return
    dtype = dtype or _other_dtype(tickets, homes, say)
    files = sorted(set(homes.values()))
    total = 0
    for number, file in enumerate(files, 1):
        say(f"{file.name}: {file.stat().st_size / 2**20:,.1f} MiB, file {number} of {len(files)}")
        total += _rewrite_file(file, folder / file.name, edit, dtype)
    if dtype is not None:
        _note_dtype(folder, dtype, total)


def _rewrite_file(file: Path, out: Path, edit: Edit, dtype: torch.dtype | None) -> int:
    """Returns the bytes of the tensors."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in read_tensors(file):
        tensors[name] = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
        edit(name, tensors[name])
    save_file(tensors, out, metadata={"format": "pt"})
    return sum(tensor.nbytes for tensor in tensors.values())


def _rewrite_by_transformers(
    source: Path, folder: Path, edit: Edit, dtype: torch.dtype | None, missing: str, homes: dict[str, Path], say: Say
) -> None:
    """For checkpoints whose names are not the model's: transformers renames both ways; whole in memory."""
    try:
        skeleton: Any = build_on_meta(source)
    except ValueError:  # no configuration that transformers knows: names are the files' alone
        skeleton = torch.nn.Module()
    if missing not in dict(skeleton.named_parameters(remove_duplicate=False)):
        raise ValueError(f"the ticket names {missing}, which {source} does not hold" + did_you_mean(missing, homes))
    say(f"{source} names its tensors otherwise than the model does: loading it whole with transformers")
    model = type(skeleton).from_pretrained(source, dtype=dtype or "auto")
    for name, parameter in model.named_parameters():
        edit(name, parameter.data)
    model.save_pretrained(folder, max_shard_size="5GB")
    lost = sorted(homes.keys() - tensor_files(folder).keys())
    if lost:
        say(f"{len(lost)} tensors that transformers does not load from this checkpoint are left out, {lost[0]} first")


def _put_back(ticket: Ticket, name: str, tensor: Tensor, tuned: Path) -> None:
    """Assign the base values, if the ticket's own values are what is there."""
    ticket.mask.check_base(name, tuple(tensor.shape), str(tensor.dtype), None)
    flat = flatten(tensor)
    positions, values = ticket.mask.indices(name), ticket.values(name).to(flat.dtype)
    num_other = count_changed(flat[positions], values)
    if num_other:
        raise ValueError(
            f"{name}: expected the ticket's values at its {positions.numel()} entries, got others at {num_other}: "
            f"{tuned} is not this ticket applied to its base"
        )
    flat.index_copy_(0, positions, ticket.base_values(name).to(flat.dtype))


def _dtype_of_training(tickets: Sequence[Ticket]) -> torch.dtype | None:
    """The dtype in which all the tickets were trained, where it is one."""
    dtypes = {ticket.mask.base_dtype for ticket in tickets}
    return dtypes.pop() if len(dtypes) == 1 else None


def _other_dtype(tickets: Sequence[Ticket], homes: dict[str, Path], say: Say) -> torch.dtype | None:
    """The dtype to cast a checkpoint to that is stored in another one than the tickets were trained in, else None."""
    dtype = _dtype_of_training(tickets)
    names = {name for ticket in tickets for name in ticket.names}
    stored = stored_dtypes(names, homes)
    if dtype is None or stored <= {dtype}:
        return None
    say(f"stored in {', '.join(sorted(map(_plain, stored)))}, trained in {_plain(dtype)}: writing {_plain(dtype)}")
    return dtype


def _note_dtype(folder: Path, dtype: torch.dtype, total: int) -> None:
    """Set what the configuration and the index tell of dtype and size."""
    config, index = folder / "config.json", folder / INDEX_NAME
    if config.is_file():
        content = json.loads(config.read_text(encoding="utf-8"))
        content["torch_dtype" if "torch_dtype" in content else "dtype"] = _plain(dtype)
        config.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if index.is_file():
        content = json.loads(index.read_text(encoding="utf-8"))
        content.setdefault("metadata", {})["total_size"] = total
        index.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _silent(_: str) -> None:
    pass
