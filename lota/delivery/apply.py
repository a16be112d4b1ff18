"""Tickets on checkpoint folders: assigned, or taken out again, a file at a time; the base verified, all or nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lota.checkpoint_keys import is_quantized
from lota.delivery.card import CARD_NAME, is_card, merged_card
from lota.delivery.live import check_disjoint, check_dtype, check_frozen, check_is_base, flatten, grown, rounded
from lota.delivery.model_folder import read_tensor, stored_dtypes
from lota.delivery.rewrite import Checkpoint, Edit, changed_positions, check_complete, edited, rewrite
from lota.delivery.stacking import Entries
from lota.files import new_folder, read_json_object
from lota.progress import Say, silent
from lota.tensor_names import find_names, need_names
from lota.ticket import Ticket
from lota.ticket.manifest import DTYPES
from lota.ticket.writer import count_changed

_RANDOM = "transformers would fill it with random numbers at every loading"
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass
class Verified:
    """What was held against the base's fingerprints: names of the model's tensors. not_compared: those that the tickets
    do not know (of format version 1), or that the files hold in another form (quantized). fingerprints: of compared
    tensors, with their dtype; a tensor that is known is not read through again."""

    compared: set[str] = field(default_factory=set)
    not_compared: set[str] = field(default_factory=set)
    fingerprints: dict[str, tuple[torch.dtype, str]] = field(default_factory=dict)

    def __str__(self) -> str:
        if not self.compared:
            return "the tickets hold no fingerprints to check the base against"
        text = f"{len(self.compared)} tensors have the base's fingerprint"
        rest = self.not_compared - self.compared
        if not rest:
            return f"all {text}"
        return f"{text}; {len(rest)} could not be compared, {sorted(rest)[0]} among them"


def apply_to_checkpoint(
    base: str | os.PathLike[str],
    tickets: Sequence[Ticket],
    out: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    finish: Callable[[Path], None] | None = None,
    say: Say | None = None,
) -> Verified:
    """Write the checkpoint folder `out`: the safetensors folder `base` with the tickets' values assigned, and a card.

    A file at a time is in memory, and of tensors that the model makes of several (fused experts) one; other files of
    the model are copied. Tensors and rows that the base does not have are added, and config.json names the class that
    has them. Tied weights that the files hold twice are edited twice. Every tensor that the tickets know, frozen ones
    too, is held against its fingerprint. Tickets must be of this base and must not overlap.

    dtype: cast the base's floating tensors first; None takes for each the dtype in which it was trained. Those that
    transformers keeps in fp32 stay so. finish: called with the folder before it appears. `out` appears by one rename
    when it is complete and was read back; ValueError leaves nothing behind. say: called with a line for every file.
    """
    base, say, verified = Path(base), say or silent, Verified()
    with new_folder(out) as folder:
        check_disjoint(tickets)
        checkpoint, placed = _open(base, tickets, trust_remote_code)
        brought = {name for on in placed for name in on.brought}
        _check_whole(checkpoint, base, f"{_RANDOM}. Take the whole model as base", brought)
        cast, is_cast = _casting(checkpoint, placed, dtype, say)
        concerned = {name for on in placed for name in on.names}
        added = sorted({name for on in placed for name in on.brought} - set(checkpoint.names))
        edit = _editor(placed, verified)
        rewrite(checkpoint, folder, edit, concerned=concerned, cast=cast, added=added, say=say)
        _check_all_edited(placed, base)
        if is_cast is not None:
            content = _config(folder)
            _edit_config(folder, {"torch_dtype" if "torch_dtype" in content else "dtype": _plain(is_cast)})
        for ticket in tickets:
            _edit_config(folder, ticket.model.get("config") or {})
        check_complete(folder, checkpoint, _facts(tickets))
        card = merged_card(tickets, _config(base), None if is_cast is None else _plain(is_cast))
        (folder / CARD_NAME).write_text(card, encoding="utf-8")
        if finish is not None:
            finish(folder)
    verified.not_compared |= set(checkpoint.names) - verified.compared
    return verified


class Patch(NamedTuple):
    """Entries of one tensor of a checkpoint folder. In the order of vLLM's CheckpointWeightPatch.

    name: the key in the files. shape, dtype: the stored tensor's. values: 1-D, of dtype. indices: int64, flat.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    values: Tensor
    indices: Tensor


def checkpoint_patches(
    base: str | os.PathLike[str],
    tickets: Sequence[Ticket],
    *,
    reverse: bool = False,
    trust_remote_code: bool = False,
) -> list[Patch]:
    """What the tickets change in the files of `base`, by the files' own keys and positions, for servers that take
    sparse patches: every entry whose bits change, with its new value; reverse: with the base's, which takes them off.

    All of them or ValueError, in memory that is the tickets': whoever takes them never holds a part of them. The base
    is read once, a tensor at a time (one that the model makes of several files' tensors whole), and verified
    on the way as `apply_to_checkpoint` does. ValueError where a patch cannot say it: tensors or rows that the base does
    not have, and a base that is stored in another dtype than it was trained in.
    """
    patches = []
    for key, shape, entries in _changes(Path(base), tickets, trust_remote_code, Verified()):
        values = entries.base if reverse else entries.values
        patches.append(Patch(key, shape, values.dtype, values, entries.positions))
    return patches


class Change(NamedTuple):
    """The entries of one tensor of a checkpoint folder whose bits a ticket changes, with both values. name: the key in
    the files; entries: int64 flat positions, ascending, and values in the stored dtype."""

    name: str
    shape: tuple[int, ...]
    entries: Entries


def checkpoint_changes(
    base: str | os.PathLike[str], ticket: Ticket, *, verified: Verified | None = None, trust_remote_code: bool = False
) -> list[Change]:
    """`checkpoint_patches` of one ticket, both ways at once, with the same checks and errors. verified: of earlier
    calls for the same files, which did not change since; this call's is added."""
    return list(_changes(Path(base), [ticket], trust_remote_code, Verified() if verified is None else verified))


def _changes(base: Path, tickets: Sequence[Ticket], trust_remote_code: bool, verified: Verified) -> Iterator[Change]:
    """Every tensor of the files that the tickets change; the whole base is verified once all were asked for."""
    check_disjoint(tickets)
    checkpoint, placed = _open(base, tickets, trust_remote_code)
    for on in placed:
        if on.brought:
            raise ValueError(f"{base} does not have {min(on.brought)}: a patch changes what is there. Use lota apply")
    _check_whole(checkpoint, base, f"{_RANDOM}. Take the whole model as base")
    cast, is_cast = _casting(checkpoint, placed, None, silent)
    if is_cast is not None:
        raise ValueError(f"{base} is stored in another dtype than {_plain(is_cast)}, in which the ticket was trained: "
                         "a patch keeps the dtype. Write the base in it with lota apply --dtype first")  # fmt: skip
    edit, concerned = _editor(placed, verified), {name for on in placed for name in on.names}
    done: dict[str, Tensor | None] = {}
    for key in sorted(checkpoint.homes):
        stored = read_tensor(checkpoint.homes[key], key)
        if key not in done:
            done |= edited(checkpoint, key, stored.clone(), edit, concerned, cast)
        made = done.pop(key)
        if made is None or made.dtype != stored.dtype or made.shape != stored.shape:
            raise ValueError(f"{key} of {base} changes its dtype or shape: a patch keeps both. Use lota apply")
        where = changed_positions(made, stored)
        if where.numel():
            entries = Entries(where, made.reshape(-1)[where], stored.reshape(-1)[where])
            yield Change(key, tuple(stored.shape), entries)
    _check_all_edited(placed, base)


def revert_checkpoint(
    tuned: str | os.PathLike[str],
    tickets: Sequence[Ticket],
    out: str | os.PathLike[str],
    *,
    trust_remote_code: bool = False,
    say: Say | None = None,
) -> Verified:
    """Write the folder `out`: the checkpoint `tuned` with the tickets' base values put back, which is their base again.

    tickets: all that are on it, with base values. Each must be there: every active entry holds its value. The outcome,
    frozen tensors too, is held against the base's fingerprints, so what they cover is the base bit for bit, or
    ValueError and nothing is written. Other files are copied, but for a card that `apply_to_checkpoint` wrote.
    """
    tuned, say, verified = Path(tuned), say or silent, Verified()
    for ticket in tickets:
        if not ticket.has_base_values:
            raise ValueError("this ticket holds no base values to put back: take the base model itself")
        if ticket.model and ticket.model.get("base_config") is None:
            raise ValueError("this ticket does not know the base's config.json: take the base model itself")
    with new_folder(out) as folder:
        check_disjoint(tickets)
        checkpoint, placed = _open(tuned, tickets, trust_remote_code, is_tuned=True)

        def edit(name: str, tensor: Tensor | None) -> Tensor | None:
            assert tensor is not None
            concerned = [(on, on.names[name]) for on in placed if name in on.names]
            for on, own in concerned:
                if own in on.active:
                    on.edited.add(own)
                    _put_back(on.ticket, own, tensor, tuned)
            for on, own in concerned:
                try:
                    _verify(on, own, name, tensor, verified)
                except ValueError as error:
                    raise ValueError(
                        f"{error} Entries outside of the ticket are not the base's: either {tuned} carries another "
                        "ticket (give all of them), or it was changed since."
                    ) from None
            bases = [on.ticket.mask.base.get(own) for on, own in concerned]
            rows = min((base.rows for base in bases if base is not None and base.rows is not None), default=None)
            if rows is None:
                return tensor
            return tensor[:rows].clone() if rows else None

        concerned = {name for on in placed for name in on.names}
        rewrite(checkpoint, folder, edit, concerned=concerned, cast=lambda _, tensor: tensor, say=say)
        _check_all_edited(placed, tuned)
        for ticket in reversed(tickets):
            entries = dict.fromkeys(ticket.model.get("config") or {})
            _edit_config(folder, entries | (ticket.model.get("base_config") or {}))
        reverted = Checkpoint.open(folder, (), None)
        why = "it was saved again as another kind of model since the tickets were applied. Take the base model itself"
        _check_whole(reverted, tuned, why)
        card = folder / CARD_NAME
        if card.is_file() and is_card(card.read_text(encoding="utf-8")):
            card.unlink()
    verified.not_compared |= set(checkpoint.names) - verified.compared
    return verified


@dataclass
class _Placed:
    """A ticket beside a checkpoint. names: by the model's name of a tensor, the ticket's, of frozen tensors too.
    active: the ticket's own names. brought: tensors of it that the base does not have. edited: own names that were."""

    ticket: Ticket
    names: dict[str, str]
    active: frozenset[str]
    brought: frozenset[str]
    edited: set[str] = field(default_factory=set)


def _editor(placed: Sequence[_Placed], verified: Verified) -> Edit:
    """Assigns the tickets' values to a tensor, once it is known to be the base's."""

    def edit(name: str, tensor: Tensor | None) -> Tensor | None:
        concerned = [(on, on.names[name]) for on in placed if name in on.names]
        for on, own in concerned:
            if own in on.active:
                tensor = grown(on.ticket.mask, own, tensor)
        assert tensor is not None
        for on, own in concerned:
            _verify(on, own, name, tensor, verified)
        for on, own in concerned:
            if own in on.active:
                on.edited.add(own)
                _assign(on.ticket, own, tensor)
        return tensor

    return edit


def _open(
    path: Path, tickets: Sequence[Ticket], trust_remote_code: bool, is_tuned: bool = False
) -> tuple[Checkpoint, list[_Placed]]:
    """The checkpoint as the tickets' model, and where each ticket's tensors are in it."""
    wanted = {name for ticket in tickets for name in ticket.names if is_tuned or not _is_brought(ticket, name)}
    checkpoint = Checkpoint.open(path, wanted, _facts(tickets), trust_remote_code)
    return checkpoint, [_place(ticket, checkpoint, is_tuned) for ticket in tickets]


def _place(ticket: Ticket, checkpoint: Checkpoint, is_tuned: bool) -> _Placed:
    known, prefix = set(checkpoint.names), checkpoint.prefix
    brought = frozenset(name for name in ticket.names if _is_brought(ticket, name))
    needed = [name for name in ticket.names if is_tuned or name not in brought]
    if checkpoint.model is not None and is_quantized(checkpoint.model):
        packed = [name for name, other in find_names(needed, known, prefix).items() if other is None]
        state = checkpoint.model.state_dict(keep_vars=True)
        if packed and None not in find_names(packed, state, prefix).values():
            raise ValueError(
                f"{packed[0]} is quantized in {checkpoint.path}, as codes and scales, and a ticket changes plain "
                "weights: load the base with transformers, which dequantizes it, save it in the dtype of training, and "
                "take that folder as base"
            )
    placed = need_names(needed, known, str(checkpoint.path), prefix)
    names = {other: name for name, other in placed.items()}
    if len(names) != len(placed):
        raise ValueError(
            f"two names of the ticket are one tensor of {checkpoint.path}: {', '.join(sorted(placed)[:4])}"
        )
    names |= {name: name for name in brought if name not in names}
    for name, other in find_names(ticket.mask.frozen, known, prefix).items():
        if other is not None:
            names.setdefault(other, name)
    exact = dict(names)
    for other, name in exact.items():
        for alias in checkpoint.tied.get(other, ()):
            if alias not in exact and alias in known and checkpoint.is_copy(other, alias):
                names[alias] = name
    return _Placed(ticket, names, frozenset(ticket.names), brought)


def _check_whole(checkpoint: Checkpoint, folder: Path, why: str, brought: Collection[str] = ()) -> None:
    """ValueError where the files lack a tensor of the model that no ticket brings. folder: for the message."""
    known = set(brought)
    missing = [name for name in checkpoint.missing() if not known & {name, *checkpoint.tied.get(name, ())}]
    if missing:
        more = f" (and {len(missing) - 1} more tensors)" if missing[1:] else ""
        kind = type(checkpoint.model).__name__
        raise ValueError(f"{folder} does not hold {missing[0]}{more}, which {kind} has: {why}")


def _is_brought(ticket: Ticket, name: str) -> bool:
    base = ticket.mask.base.get(name)
    return base is not None and base.rows == 0


def _facts(tickets: Sequence[Ticket]) -> dict[str, Any]:
    """The class that was trained, and entries of its config.json: the first ticket's that knows."""
    for ticket in tickets:
        if ticket.model:
            return {"class": ticket.model.get("class"), "config": ticket.model.get("config") or {}}
    return {"class": next((t.provenance["class"] for t in tickets if t.provenance.get("class")), None)}


def _verify(on: _Placed, own: str, name: str, tensor: Tensor, verified: Verified) -> None:
    """ValueError unless the tensor, in the base's state, has the fingerprint that the ticket knows."""
    mask, base = on.ticket.mask, on.ticket.mask.identity(own)
    known = verified.fingerprints.get(name)
    if known is not None and known[0] == tensor.dtype and base is not None and base.rows is None:
        mask.check_base(own, tuple(tensor.shape), str(tensor.dtype), known[1])
        is_compared = True
    elif own not in on.active:
        is_compared = check_frozen(mask, own, tensor)
    else:
        is_compared = base is not None
        check_is_base(mask, own, tensor)
    if is_compared and base is not None and base.rows is None and str(tensor.dtype) == f"torch.{base.dtype}":
        verified.fingerprints[name] = tensor.dtype, base.fingerprint
    (verified.compared if is_compared else verified.not_compared).add(name)


def _assign(ticket: Ticket, name: str, tensor: Tensor) -> None:
    if ticket.mask.active(name):
        flat, positions = flatten(tensor), ticket.mask.indices(name)
        values = ticket.values_on(name, flat[positions])
        check_dtype(name, tensor.dtype, values.dtype)
        flat.index_copy_(0, positions, rounded(name, values, flat))


def _put_back(ticket: Ticket, name: str, tensor: Tensor, tuned: Path) -> None:
    """Assign the base values, if the ticket's own values are what is there."""
    ticket.mask.check_base(name, tuple(tensor.shape), str(tensor.dtype), None)
    flat, positions = flatten(tensor), ticket.mask.indices(name)
    there = flat[positions]
    before = ticket.base_values_on(name, there)
    check_dtype(name, tensor.dtype, before.dtype)
    # Values that are stored as differences are those of whatever is there; the base's fingerprint then decides.
    values = rounded(name, ticket.values_on(name, before), flat)
    num_other = count_changed(there, values)
    if num_other:
        raise ValueError(
            f"{name}: expected the ticket's values at its {positions.numel()} entries, got others at {num_other}: "
            f"{tuned} is not this ticket applied to its base"
        )
    flat.index_copy_(0, positions, before.to(flat.dtype))


def _check_all_edited(placed: Sequence[_Placed], path: Path) -> None:
    for on in placed:
        left = sorted(on.active - on.edited)
        if left:
            raise ValueError(f"the ticket names {left[0]}, which is in no file of {path}: nothing is written")


def _casting(
    checkpoint: Checkpoint, placed: Sequence[_Placed], dtype: torch.dtype | None, say: Say
) -> tuple[Callable[[str, Tensor], Tensor], torch.dtype | None]:
    """How tensors are cast before they are edited, and the dtype to note in config.json, None where it stays.

    Tensors with entries of a ticket get the dtype in which it knew them. Where those are stored in another one than all
    were trained in, or a dtype was asked for, so do the others. What transformers keeps in fp32 is kept, and only
    floating tensors of 2 to 8 bytes are cast: float8 weights mean nothing without their scales.
    """
    recorded: dict[str, torch.dtype] = {}
    for on in placed:
        for name, own in on.names.items():
            base = on.ticket.mask.identity(own)
            if base is not None and base.dtype in DTYPES:
                recorded.setdefault(name, getattr(torch, base.dtype))
    active = {name for on in placed for name, own in on.names.items() if own in on.active}
    trained = {on.ticket.mask.base_dtype for on in placed}
    common = trained.pop() if len(trained) == 1 else None
    other = dtype
    if dtype is None and common is not None:
        keys = {checkpoint.key_of(name) for name in active & recorded.keys()}
        stored = stored_dtypes({key for key in keys if key is not None}, checkpoint.homes)
        if stored and not stored <= {common}:
            found = ", ".join(sorted(map(_plain, stored)))
            say(f"stored in {found}, trained in {_plain(common)}: writing {_plain(common)}")
            other = common
    stays = _kept_in_fp32(checkpoint.model, other)

    def cast(name: str, tensor: Tensor) -> Tensor:
        if tensor.dtype not in _FLOATS:
            return tensor
        wanted = recorded.get(name) if name in active or other is not None else None
        if wanted is None or (dtype is not None and wanted == common):
            wanted = torch.float32 if stays(name) else other
        return tensor if wanted is None else tensor.to(wanted)

    return cast, other


def _kept_in_fp32(model: Any, dtype: torch.dtype | None) -> Callable[[str], bool]:
    """Which tensors transformers loads in fp32 where the others are loaded in `dtype`."""
    kept = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        kept |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    if not kept or dtype not in (torch.float16, torch.bfloat16):
        return lambda name: False
    from transformers.core_model_loading import build_glob_alternation

    pattern = build_glob_alternation(sorted(kept))[0]
    return lambda name: pattern.search(name) is not None


def _edit_config(folder: Path, entries: Mapping[str, Any]) -> None:
    """Set entries of config.json, those of a multimodal model's text part there; None takes one out."""
    path = folder / "config.json"
    if not entries or not path.is_file():
        return
    content = _config(folder)
    before = json.dumps(content)
    text = content.get("text_config") or {}
    for key, value in entries.items():
        holder = text if key in text and key not in content else content
        if value is None:
            holder.pop(key, None)
        else:
            holder[key] = value
    if json.dumps(content) != before:  # else it stays the base's file, byte for byte
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    return read_json_object(path) if path.is_file() else {}
