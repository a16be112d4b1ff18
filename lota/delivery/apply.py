"""Tickets on checkpoint folders: assigned, or taken out again, a file at a time; the base verified, all or nothing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lota.architecture import build_on_meta, missing_names, tied_names, without_zero3
from lota.delivery.card import CARD_NAME, is_card, merged_card
from lota.delivery.live import check_disjoint, check_is_base, flatten, grown
from lota.delivery.model_folder import (
    INDEX_NAME,
    WEIGHT_SUFFIXES,
    read_tensor,
    read_tensors,
    stored_dtypes,
    tensor_files,
)
from lota.files import new_folder
from lota.messages import did_you_mean
from lota.ticket import Ticket
from lota.ticket.manifest import DTYPES
from lota.ticket.writer import count_changed

Edit = Callable[[str, Tensor | None], Tensor | None]
"""What becomes of a tensor (None: the source has none of that name); None: it is left out."""
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

    A file at a time is in memory; other files (configuration, tokenizer) are copied. Tensors and rows that the base
    does not have are added, and config.json names the class that has them. Tied weights that the files hold twice are
    edited twice. Where the checkpoint names its tensors differently from the loaded model (mixtures of experts),
    transformers loads and saves it whole instead. Tickets must be of this base and must not overlap. dtype: cast the
    base's floating tensors first; None takes the dtype in which the tickets were trained. `out` appears by one rename
    when it is complete; ValueError leaves nothing
    behind. say: called with a line for every file.
    """
    base = Path(base)
    names = [frozenset(ticket.names) for ticket in tickets]

    def edit(name: str, tensor: Tensor | None) -> Tensor | None:
        concerned = [ticket for ticket, known in zip(tickets, names) if name in known]
        for ticket in concerned:
            tensor = grown(ticket.mask, name, tensor)
        for ticket in concerned:
            assert tensor is not None
            check_is_base(ticket.mask, name, tensor)
        for ticket in concerned:
            if ticket.mask.active(name):
                assert tensor is not None
                flat = flatten(tensor)
                flat.index_copy_(0, ticket.mask.indices(name), ticket.values(name).to(flat.dtype))
        return tensor

    with new_folder(out) as folder:
        check_disjoint(tickets)
        _rewrite(base, folder, tickets, edit, dtype, say or _silent)
        for ticket in tickets:
            _edit_config(folder, ticket.model.get("config") or {})
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

    def edit(name: str, tensor: Tensor | None) -> Tensor | None:
        concerned = [ticket for ticket, known in zip(tickets, names) if name in known]
        if concerned and tensor is None:
            raise ValueError(f"the ticket names {name}, which {tuned} does not hold: it is not this ticket applied")
        for ticket in concerned:
            assert tensor is not None
            _put_back(ticket, name, tensor, tuned)
        for ticket in concerned:
            assert tensor is not None
            try:
                check_is_base(ticket.mask, name, tensor)
            except ValueError as error:
                raise ValueError(
                    f"{error} Entries outside of the ticket are not the base's: either {tuned} carries another ticket "
                    "(give all of them), or it was changed since."
                ) from None
        rows = min(
            (base.rows for t in concerned if (base := t.mask.base.get(name)) and base.rows is not None), default=None
        )
        if rows is None or tensor is None:
            return tensor
        return tensor[:rows].clone() if rows else None

    for ticket in tickets:
        if not ticket.has_base_values:
            raise ValueError("this ticket holds no base values to put back: take the base model itself")
        if ticket.model and ticket.model.get("base_config") is None:
            raise ValueError("this ticket does not know the base's config.json: take the base model itself")
    with new_folder(out) as folder:
        check_disjoint(tickets)
        _rewrite(tuned, folder, tickets, edit, None, say or _silent)
        for ticket in reversed(tickets):
            entries = dict.fromkeys(ticket.model.get("config") or {})
            _edit_config(folder, entries | (ticket.model.get("base_config") or {}))
        _check_complete(folder, tuned)
        card = folder / CARD_NAME
        if card.is_file() and is_card(card.read_text(encoding="utf-8")):
            card.unlink()


def _check_complete(folder: Path, tuned: Path) -> None:
    """ValueError where the model of config.json has tensors that the files do not hold: some other class of model was
    saved there since, and transformers would fill the base with random numbers."""
    try:
        model = build_on_meta(folder)
    except (ValueError, OSError, ModuleNotFoundError):
        return
    missing = missing_names(model, tensor_files(folder).keys())
    if missing:
        more = f" (and {len(missing) - 1} more tensors)" if missing[1:] else ""
        raise ValueError(
            f"{tuned} does not hold {missing[0]}{more}, which {type(model).__name__} has: it was saved again as "
            "another kind of model since the tickets were applied. Take the base model itself"
        )


def _rewrite(
    source: Path, folder: Path, tickets: Sequence[Ticket], edit: Edit, dtype: torch.dtype | None, say: Say
) -> None:
    """Fill `folder` with the checkpoint `source`, cast, and edited tensor by tensor."""
    homes = tensor_files(source)
    edit = _on_aliases(edit, _aliases(source, {name for ticket in tickets for name in ticket.names}, homes))
    new = {name for ticket in tickets for name, base in ticket.mask.base.items() if base.rows == 0} - homes.keys()
    names = {name: None for ticket in tickets for name in ticket.names if name not in new}
    missing = next((name for name in names if name not in homes), None)
    for other in source.iterdir():
        if other.is_file() and other.suffix not in WEIGHT_SUFFIXES and not (missing and other.name == INDEX_NAME):
            shutil.copy(other, folder / other.name)
    if missing is not None:
        _rewrite_by_transformers(source, folder, tickets, edit, dtype, missing, homes, say)
        return
    dtype = dtype or _other_dtype(tickets, homes, say)
    files = sorted(set(homes.values()))
    total, kept = 0, dict[str, str]()
    for number, file in enumerate(files, 1):
        say(f"{file.name}: {file.stat().st_size / 2**20:,.1f} MiB, file {number} of {len(files)}")
        added = sorted(new) if number == len(files) else []
        written = _rewrite_file(file, folder / file.name, edit, dtype, added)
        total += sum(written.values())
        kept |= dict.fromkeys(written, file.name)
    if dtype is not None or kept.keys() != homes.keys() or any(ticket.model for ticket in tickets):
        _note_contents(folder, dtype, total, kept)


def _aliases(source: Path, names: Collection[str], homes: Mapping[str, Path]) -> dict[str, str]:
    """Further names under which the files hold tensors `names`: tied weights that were stored twice. transformers ties
    them where both are equal, and keeps them apart where they are not."""
    try:
        tied = tied_names(build_on_meta(source))
    except ModuleNotFoundError:  # the core alone: what nearly all tied models call the two
        tied = _tied_by_name(source)
    except (ValueError, OSError):  # no configuration that transformers knows: names are the files' alone
        return {}
    pairs = {
        alias: name
        for name in names & tied.keys() & homes.keys()
        for alias in tied[name]
        if alias != name and alias in homes and alias not in names
    }
    return {alias: name for alias, name in pairs.items() if _are_equal(homes, alias, name)}


def _tied_by_name(source: Path) -> dict[str, list[str]]:
    if _config(source).get("tie_word_embeddings") is False:
        return {}
    embeddings = ("model.embed_tokens.weight", "transformer.wte.weight", "gpt_neox.embed_in.weight")
    return {name: [name, "lm_head.weight", "embed_out.weight"] for name in embeddings}


def _are_equal(homes: Mapping[str, Path], one: str, other: str) -> bool:
    first, second = read_tensor(homes[one], one), read_tensor(homes[other], other)
    return first.dtype == second.dtype and torch.equal(first, second)


def _on_aliases(edit: Edit, aliases: Mapping[str, str]) -> Edit:
    return lambda name, tensor: edit(aliases.get(name, name), tensor)


def _rewrite_file(file: Path, out: Path, edit: Edit, dtype: torch.dtype | None, added: Sequence[str]) -> dict[str, int]:
    """Returns the bytes of the tensors by name. added: names to be edited though the file does not hold them."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in read_tensors(file):
        cast = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
        _keep(tensors, name, edit(name, cast))
    for name in added:
        _keep(tensors, name, edit(name, None))
    save_file(tensors, out, metadata={"format": "pt"})
    return {name: tensor.nbytes for name, tensor in tensors.items()}


def _keep(tensors: dict[str, Tensor], name: str, tensor: Tensor | None) -> None:
    if tensor is not None:
        tensors[name] = tensor


def _rewrite_by_transformers(
    source: Path,
    folder: Path,
    tickets: Sequence[Ticket],
    edit: Edit,
    dtype: torch.dtype | None,
    missing: str,
    homes: dict[str, Path],
    say: Say,
) -> None:
    """For checkpoints whose names are not the model's: transformers renames both ways; whole in memory."""
    # The class counts, and not yet the rows that were added: the base's own are loaded first.
    facts = next((ticket.model for ticket in tickets if ticket.model), {})
    entries = {key: value for key, value in (facts.get("config") or {}).items() if key != "vocab_size"}
    try:
        skeleton: Any = build_on_meta(source, {"config": entries})
    except ValueError:  # no configuration that transformers knows: names are the files' alone
        skeleton = torch.nn.Module()
    if missing not in dict(skeleton.named_parameters(remove_duplicate=False)):
        raise ValueError(f"the ticket names {missing}, which {source} does not hold" + did_you_mean(missing, homes))
    say(f"{source} names its tensors otherwise than the model does: loading it whole with transformers")
    dtype = dtype or _dtype_of_training(tickets)
    with without_zero3():
        model = type(skeleton).from_pretrained(source, config=skeleton.config, dtype=dtype or "auto")
    stored = model.state_dict(keep_vars=True).keys()
    tensors = dict([*model.named_parameters(), *(item for item in model.named_buffers() if item[0] in stored)])
    unknown = next((name for ticket in tickets for name in ticket.names if name not in tensors), None)
    if unknown is not None:
        raise ValueError(
            f"the ticket names {unknown}, which {type(model).__name__} does not have: {source} is no base of it"
        )
    for name, tensor in tensors.items():
        made = edit(name, tensor.data)
        if made is None:
            raise ValueError(f"{name} cannot be taken out of {source}, whose names are not the model's: take the base")
        tensor.data = made
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
    names = {
        name
        for ticket in tickets
        for name in ticket.names
        if (base := ticket.mask.base.get(name)) is None or (base.rows != 0 and base.dtype in DTYPES)
    }
    stored = stored_dtypes(names, homes)
    if dtype is None or stored <= {dtype}:
        return None
    say(f"stored in {', '.join(sorted(map(_plain, stored)))}, trained in {_plain(dtype)}: writing {_plain(dtype)}")
    return dtype


def _note_contents(folder: Path, dtype: torch.dtype | None, total: int, kept: dict[str, str]) -> None:
    """Set what the configuration and the index tell of dtype and size, and where tensors lie."""
    if dtype is not None:
        content = _config(folder)
        _edit_config(folder, {"torch_dtype" if "torch_dtype" in content else "dtype": _plain(dtype)})
    index = folder / INDEX_NAME
    if index.is_file():
        content = json.loads(index.read_text(encoding="utf-8"))
        content.setdefault("metadata", {})["total_size"] = total
        content["weight_map"] = kept
        index.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _edit_config(folder: Path, entries: Mapping[str, Any]) -> None:
    """Set entries of config.json, those of a multimodal model's text part there; None takes one out."""
    path = folder / "config.json"
    if not entries or not path.is_file():
        return
    content = _config(folder)
    text = content.get("text_config") or {}
    for key, value in entries.items():
        holder = text if key in text and key not in content else content
        if value is None:
            holder.pop(key, None)
        else:
            holder[key] = value
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _silent(_: str) -> None:
    pass
