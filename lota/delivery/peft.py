"""A ticket as a PEFT adapter of type SHiRA, which stock PEFT loads with nothing of ours installed, logits exact.

Linear weights become sparse fp32 differences (lota/delivery/deltas.py). What PEFT's SHiRA cannot hold goes whole, as a
module of `modules_to_save`: embeddings, norms, convolutions, fused experts, biases, tied weights, and linear weights
that are too full or for which that is smaller. SHiRA wants r * (in + out) entries of every linear module, with one r
for all: r is chosen for the smallest export, and shorter modules are padded with entries that add -0.0.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lota.architecture import build_on_meta, tied_names
from lota.delivery.base_weights import base_weights
from lota.delivery.card import CARD_NAME, peft_card
from lota.delivery.deltas import PADDING, Deltas, deltas
from lota.delivery.live import check_frozen, check_is_base, flatten, grown
from lota.delivery.peft_check import run_adapter
from lota.files import new_folder
from lota.progress import Say, silent, tracked
from lota.tensor_names import find_names, need_names
from lota.ticket import Ticket

_ENTRY_BYTES = 12  # an fp32 difference and two int32 coordinates
_PREFIX = "base_model.model."
_TASK_TYPES = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


@dataclass(frozen=True)
class PeftExport:
    """What was written. num_twice, num_ordered: entries that need two differences, and those of them that are exact in
    one order only (on CPUs), over all sparse modules."""

    rank: int
    num_sparse_modules: int
    num_whole_modules: int
    num_entries: int
    num_twice: int
    num_ordered: int
    num_bytes: int


def export_peft(
    ticket: Ticket,
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    base_name: str | None = None,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    say: Say | None = None,
) -> PeftExport:
    """Write the adapter folder `out` for the checkpoint folder `base`; all or nothing, in memory until it is written.

    Every value is verified: what PEFT adds to the base gives the ticket's value, as rounded to the weights' dtype.
    dtype: in which the base will be loaded (None: as the ticket was trained, else as stored). base_name: what
    adapter_config.json calls the base (None: the folder). ValueError for another base, for values that are not finite,
    and for a tensor that no PEFT adapter can hold. Where PEFT is installed and memory allows, the adapter is loaded on
    the base and run on a few tokens: modules whose weight their model reads past them go whole, and logits that differ
    from the ticket's are a ValueError. `say` says where that was not possible.
    """
    base, dtype, say = Path(base), dtype or ticket.mask.base_dtype, say or silent
    facts = ticket.model or {"class": ticket.provenance.get("class")}
    skeleton = build_on_meta(base, facts, names=ticket.names, trust_remote_code=trust_remote_code)
    prefix = getattr(skeleton, "base_model_prefix", None)
    state = skeleton.state_dict(keep_vars=True)
    renamed = need_names(ticket.names, state, "the model", prefix)
    frozen = find_names(ticket.mask.frozen, state, prefix)
    ticket = ticket.renamed(renamed | {name: other for name, other in frozen.items() if other is not None})
    whole = _whole_modules(skeleton, [name for name in ticket.names if ticket.mask.active(name)])
    # Differences need a base: what it lacks is different in every model that is made to hold the adapter.
    whole |= {_owner(name) for name, tensor in ticket.mask.base.items() if tensor.rows is not None}
    read = _reader(base, skeleton, ticket, dtype)
    _check_frozen(ticket, state, read)
    with new_folder(out) as folder:
        made = _write(ticket, base, folder, base_name or str(base), skeleton, whole, read, dtype, say)
        outcome = run_adapter(folder, base, ticket, type(skeleton), made.targets, dtype, trust_remote_code)
        if not outcome.is_equal and outcome.not_called - whole:
            say(f"{len(outcome.not_called)} modules whose weight is read past them go whole")
            whole |= outcome.not_called
            for file in folder.iterdir():
                file.unlink()
            made = _write(ticket, base, folder, base_name or str(base), skeleton, whole, read, dtype, say)
            outcome = run_adapter(folder, base, ticket, type(skeleton), made.targets, dtype, trust_remote_code)
        if not outcome.is_equal:
            raise ValueError(
                f"PEFT does not compute with the ticket's weights in a {type(skeleton).__name__}: the logits of the "
                "adapter are others than those of the ticket. Use --format hf."
            )
        if outcome.reason:
            say(f"the adapter was not run to verify it: {outcome.reason}")
    return made.export


@dataclass(frozen=True)
class _Written:
    export: PeftExport
    targets: tuple[str, ...]


def _write(
    ticket: Ticket,
    base: Path,
    folder: Path,
    base_name: str,
    skeleton: nn.Module,
    whole: Collection[str],
    read: Callable[[str], Tensor],
    dtype: torch.dtype | None,
    say: Say,
) -> _Written:
    """The adapter's files. whole: modules that are stored so."""
    whole = set(whole)
    sparse: dict[str, Deltas] = {}
    for name in tracked(ticket.names, "written", say):
        weight = read(name)
        check_is_base(ticket.mask, name, weight)
        module = _owner(name)
        if module not in whole and ticket.mask.active(name):
            flat, positions = flatten(weight), ticket.mask.indices(name)
            try:
                before = flat[positions]
                sparse[module] = deltas(positions, before, ticket.values_on(name, before).to(flat.dtype))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
    rank, fitting = choose_rank(skeleton, sparse, whole)
    whole |= sparse.keys() - fitting
    sparse = {module: sparse[module] for module in sparse if module in fitting} or _stand_in(skeleton, whole)
    targets, counts = sorted(sparse), [(p.num_entries, p.num_twice, p.num_ordered) for p in sparse.values()]
    tensors: dict[str, Tensor] = {}
    for module in targets:  # each leaves memory as its stored form enters
        tensors |= _sparse_tensors(module, sparse.pop(module), skeleton.get_submodule(module), rank)
    for module in sorted(whole):
        tensors |= _whole_tensors(module, skeleton, ticket, read)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = _config(skeleton, rank, targets, sorted(whole), base_name, ticket)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    entries, twice, ordered = (sum(column) for column in zip(*counts))
    made = PeftExport(rank, len(targets), len(whole), entries, twice, ordered, num_bytes)
    plain = None if dtype is None else str(dtype).removeprefix("torch.")
    card = peft_card(ticket, base_name, {"dtype": plain, **asdict(made)})
    (folder / CARD_NAME).write_text(card, encoding="utf-8")
    return _Written(made, tuple(targets))


def _reader(base: Path, skeleton: nn.Module, ticket: Ticket, dtype: torch.dtype | None) -> Callable[[str], Tensor]:
    """`base_weights`, with the tensors and rows that the base lacks as zeros for the ticket to fill."""
    identity = ticket.mask.base
    new = {name for name in ticket.names if name in identity and identity[name].rows == 0}
    read_stored = base_weights(base, skeleton, [name for name in ticket.names if name not in new], None)

    def read_base(name: str) -> Tensor:
        tensor, known = read_stored(name), ticket.mask.identity(name)
        is_kept = known is not None and known.dtype == "float32"  # transformers keeps it so in any model
        wanted = torch.float32 if is_kept else dtype
        is_plain = tensor.is_floating_point() and tensor.element_size() > 1  # float8 means nothing without its scale
        return tensor.to(wanted) if wanted is not None and is_plain else tensor

    tied = tied_names(skeleton)

    def read(name: str) -> Tensor:
        known = next((alias for alias in tied.get(name, [name]) if alias in identity), None)
        if known is None:
            return read_base(name)
        return grown(ticket.mask, known, None if known in new else read_base(known))

    return read


def _check_frozen(ticket: Ticket, state: Collection[str], read: Callable[[str], Tensor]) -> None:
    """ValueError where a tensor that the ticket leaves as it is is not the base's."""
    for name in ticket.mask.frozen:
        if name not in state:
            continue
        try:
            tensor = read(name)
        except ValueError:
            continue  # a buffer that the files do not hold
        check_frozen(ticket.mask, name, tensor)


def choose_rank(skeleton: nn.Module, sparse: Mapping[str, Deltas], whole: Collection[str] = ()) -> tuple[int, set[str]]:
    """SHiRA's r, and the modules to keep sparse, for the fewest bytes; the other modules go whole, as `whole` do."""
    if not sparse:
        return 1, set()
    rows = []  # module, in + out, the least r, the largest that SHiRA allows, bytes of the whole module
    for module, parts in sparse.items():
        linear = skeleton.get_submodule(module)
        assert isinstance(linear, nn.Linear)
        size, numel = linear.in_features + linear.out_features, linear.weight.numel()
        num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in linear.parameters())
        rows.append((module, size, max(1, -(-parts.positions.numel() // size)), numel // size, num_bytes))
    # PEFT wants at least one SHiRA module: a linear one without a change, or else one of these.
    has_stand_in = bool(_linears(skeleton, {*whole, *sparse}))
    best: tuple[int, int, set[str]] | None = None
    for rank in sorted({1, *(least for _, _, least, _, _ in rows)}):
        fits = {module: least <= rank <= most for module, _, least, most, _ in rows}
        cost = sum(_ENTRY_BYTES * rank * size if fits[module] else held for module, size, _, _, held in rows)
        if (best is None or cost < best[0]) and (has_stand_in or any(fits.values())):
            best = cost, rank, {module for module in fits if fits[module]}
    return best[1:] if best is not None and best[2] else (1, set())


def _whole_modules(skeleton: nn.Module, active: Collection[str]) -> set[str]:
    """The modules with active entries that SHiRA cannot hold. ValueError where PEFT can hold them in no way."""
    tied = tied_names(skeleton)
    whole = set()
    for name in active:
        names = tied.get(name, [name])
        for alias in names:
            module = skeleton.get_submodule(_owner(alias)) if _has(skeleton, alias) else None
            if module is None:
                continue  # base_weights names it
            if not _owner(alias) or any(child.state_dict() for child in module.children()):
                raise ValueError(
                    f"{alias} belongs to {type(module).__name__} itself, which has weights in modules below it too: "
                    "a PEFT adapter cannot hold it. Use --format hf."
                )
            if len(names) > 1 or type(module) is not nn.Linear or not alias.endswith(".weight"):
                whole.add(_owner(alias))
    return whole


def _stand_in(skeleton: nn.Module, whole: Collection[str]) -> dict[str, Deltas]:
    """PEFT wants at least one SHiRA module: where all go whole, the smallest linear one (untied, if there is any) with
    nothing to add, for which r = 1 is enough."""
    linears = _linears(skeleton, whole)
    if not linears:
        raise ValueError("no linear module is left for PEFT's SHiRA to hold on to. Use --format hf.")
    nothing = torch.empty(0, dtype=torch.int64)
    return {min(linears)[2]: Deltas(nothing, nothing.float(), 0, 0, 0)}


def _linears(skeleton: nn.Module, taken: Collection[str]) -> list[tuple[bool, int, str]]:
    """The linear modules beside `taken` that SHiRA can hold: whether tied, their entries, their names."""
    tied = tied_names(skeleton)
    return [
        (len(tied[f"{name}.weight"]) > 1, module.weight.numel(), name)
        for name, module in skeleton.named_modules()
        if type(module) is nn.Linear
        and name not in taken
        and module.in_features + module.out_features <= module.weight.numel()
    ]


def _sparse_tensors(module: str, parts: Deltas, linear: nn.Module, rank: int) -> dict[str, Tensor]:
    assert isinstance(linear, nn.Linear)
    length = rank * (linear.in_features + linear.out_features)
    indices = torch.zeros(2, length, dtype=torch.int32)
    values = torch.full((length,), PADDING, dtype=torch.float32)
    count = parts.positions.numel()
    indices[0, :count] = parts.positions // linear.in_features
    indices[1, :count] = parts.positions % linear.in_features
    values[:count] = parts.values
    return {f"{_PREFIX}{module}.shira_weight": values, f"{_PREFIX}{module}.shira_indices": indices}


def _whole_tensors(
    module: str, skeleton: nn.Module, ticket: Ticket, read: Callable[[str], Tensor]
) -> dict[str, Tensor]:
    """Every tensor of the module's state, the ticket applied."""
    tied, known = tied_names(skeleton), set(ticket.names)
    made = {}
    for key in skeleton.get_submodule(module).state_dict():
        name = f"{module}.{key}"
        tensor = read(name).clone(memory_format=torch.contiguous_format)
        alias = next((alias for alias in tied.get(name, [name]) if alias in known), None)
        if alias is not None and ticket.mask.active(alias):
            flat, positions = tensor.view(-1), ticket.mask.indices(alias)
            flat.index_copy_(0, positions, ticket.values_on(alias, flat[positions]).to(tensor.dtype))
        made[_PREFIX + name] = tensor
    return made


def _config(
    skeleton: nn.Module, rank: int, sparse: list[str], whole: list[str], base_name: str, ticket: Ticket
) -> dict[str, object]:
    """adapter_config.json. mask_type: any name but "random" makes PEFT take the indices from the file."""
    kind = type(skeleton).__name__
    task_type = next((task for suffix, task in _TASK_TYPES.items() if kind.endswith(suffix)), None)
    return {
        "peft_type": "SHIRA",
        "task_type": task_type,
        "base_model_name_or_path": base_name,
        "revision": ticket.provenance.get("revision"),
        "inference_mode": True,
        "r": rank,
        "mask_type": "lota",
        "target_modules": sparse,
        "modules_to_save": whole or None,
        "fan_in_fan_out": False,
        "init_weights": True,
    }


def _owner(name: str) -> str:
    """The path of the module that holds parameter `name`."""
    return name.rpartition(".")[0]


def _has(skeleton: nn.Module, name: str) -> bool:
    try:
        skeleton.get_parameter(name)
    except AttributeError:
        return False
    return True
