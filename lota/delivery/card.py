"""Model cards: the README.md, with the hub's YAML front matter, of a ticket and of what is made from one."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lota.files import write_text
from lota.messages import printable
from lota.ticket import Manifest, Mask, Ticket, read_manifest

CARD_NAME = "README.md"
_MARK = "<!-- written by lota -->"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_DATA = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(/[\w.-]+)? \([\w.-]+\)")  # name/configuration (split)
_PAPER = "[LoTA](https://arxiv.org/abs/2406.16797)"


def write_ticket_card(path: str | os.PathLike[str], facts: Mapping[str, Any] | None = None) -> None:
    """Put a card into the ticket directory `path`, in place of an earlier one. facts: further rows of its table."""
    path = Path(path)
    write_text(path / CARD_NAME, ticket_card(read_manifest(path), facts))


def ticket_card(manifest: Manifest, facts: Mapping[str, Any] | None = None) -> str:
    """The card of a ticket: what it is, of which base, how it was made, how to apply and revert it."""
    provenance = manifest.provenance
    base = str(provenance.get("model") or "its base model")
    density = manifest.num_active / manifest.eligible if manifest.eligible else 0.0
    dtypes = sorted({record.base.dtype for record in manifest.tensors if record.base and not record.is_dense})
    dtypes = dtypes or sorted({record.base.dtype for record in manifest.tensors if record.base})
    brought = [record.name for record in manifest.tensors if record.base and record.base.rows is not None]
    rows = {
        "base": _base_text(provenance),
        "base weights": ", ".join(dtypes) + (", fingerprinted tensor by tensor" if dtypes else "not recorded"),
        "density": f"{density:.6g}",
        "active entries": f"{manifest.num_active:,} of {manifest.eligible:,} in {len(manifest.tensors)} tensors",
        "not in the base": ", ".join(brought) or None,
        "changed entries": None if manifest.num_changed is None else f"{manifest.num_changed:,}",
        **{key: value for key, value in provenance.items() if key not in ("model", "revision", "versions")},
        **(facts or {}),
        "versions": provenance.get("versions"),
    }
    dtype = f", dtype=torch.{dtypes[0]}" if len(dtypes) == 1 else ""
    loader, arguments, resized = _loading(_model_of(manifest.model, manifest.provenance), "model")
    undo = (
        "It holds the base's values too, so `lota revert --tuned MERGED TICKET --out BASE` makes the base again from "
        "a merged folder."
        if manifest.has_base_values
        else "It holds no base values: keep the base to return to it."
    )
    return f"""{front_matter(provenance, "lota", "adapter")}
# A lottery ticket for {_cell(_short(base))}

{density:.3%} of the eligible weights of the base, with their new values; every other weight of the model stays the
base's, bit for bit ({_PAPER}).

{_table(rows)}

## Apply and revert

```python
import lota, torch
from transformers import {loader}

model = {loader}.from_pretrained({json.dumps(base)}{arguments}{dtype}){resized}
applied = lota.apply_(model, lota.Ticket.load("TICKET"))  # this folder; refuses any other base
applied.revert()                                          # every bit as it was
```

    lota inspect TICKET
    lota apply --base {shlex.quote(printable(base))} TICKET --out MERGED
    lota export TICKET --base {shlex.quote(printable(base))} --format peft --out ADAPTER

{undo}
"""


def merged_card(tickets: Sequence[Ticket], config: Mapping[str, Any], cast_to: str | None = None) -> str:
    """The card of a checkpoint with tickets applied. config: the base's config.json. cast_to: the dtype that the base
    was cast to first; None: it was not."""
    provenance = tickets[0].provenance if tickets else {}
    rows = {
        "base": _base_text(provenance),
        "model type": config.get("model_type"),
        "entries assigned": f"{sum(ticket.num_active for ticket in tickets):,}",
    }
    for number, ticket in enumerate(tickets, 1):
        rows[f"ticket {number}"] = f"{_of(ticket.mask)}; " + _plain(
            {key: value for key, value in ticket.provenance.items() if key not in ("model", "revision", "versions")}
        )
    title = f"{_short(str(provenance.get('model') or 'A base model'))} with {len(tickets)} lottery tickets applied"
    if len(tickets) == 1:
        title = title.replace("tickets applied", "ticket applied")
    exactness = "bit for bit" if cast_to is None else f"cast to {cast_to} as for the training"
    again = "" if cast_to is None else f", in {cast_to}"
    return f"""{front_matter(provenance, "transformers", "finetune")}
# {_cell(title)}

The base model with the entries below assigned; every other weight is the base's, {exactness} ({_PAPER}). It loads as
any transformers model. With the ticket, `lota revert --tuned THIS TICKET --out BASE` makes the base again{again}.

{_table(rows)}
"""


def peft_card(ticket: Ticket, base: str, facts: Mapping[str, Any]) -> str:
    """The card of a PEFT adapter. facts: `num_entries`, `num_twice`, `num_ordered` and `num_whole_modules` as exported,
    and the `dtype` that the base must be loaded in (None: its own)."""
    dtype = facts["dtype"]
    load = f", dtype=torch.{dtype}" if dtype else ""
    loader, arguments, resized = _loading(_model_of(ticket.model, ticket.provenance), "base")
    order = (
        f"{facts['num_ordered']:,} of its {facts['num_entries']:,} entries are made of two differences that must be "
        "added in order, as CPUs do. GPUs add in any order and may miss the value of such an entry, which lies much "
        "closer to zero than the base's, by half an fp32 unit of the base's."
        if facts["num_ordered"]
        else "No entry depends on the order in which a device adds."
    )
    whole = f" {facts['num_whole_modules']} modules that SHiRA cannot hold are stored whole." * bool(
        facts["num_whole_modules"]
    )
    return f"""{front_matter(ticket.provenance, "peft", "adapter")}
# A lottery ticket for {_cell(_short(base))}, as a PEFT adapter

Made from a ticket ({_of(ticket.mask)}; {_PAPER}) in the format of PEFT's SHiRA; stock PEFT loads it.{whole}

```python
import torch
from peft import PeftModel
from transformers import {loader}

base = {loader}.from_pretrained({json.dumps(base)}{arguments}{load}){resized}
model = PeftModel.from_pretrained(base, ".")  # this folder
```

## What is exact

Loaded like this, on the base in {dtype or "its own dtype"}, every weight that the model computes with is the ticket's
or the base's (only the sign of a zero may differ), and `model.merge_and_unload()` gives those weights. {order}

Not exact, in 16-bit dtypes: `low_cpu_mem_usage=True` and `autocast_adapter_dtype=False`, because both round the
differences to the base's dtype; `unmerge_adapter()`, which subtracts; other scales than 1. The ticket itself is applied
and taken out again exactly in all cases.

The forward pass adds all differences anew for every layer: merge for speed (PEFT 0.21 cannot merge whole modules that
have no `weight`, such as fused experts).
"""


def is_card(text: str) -> bool:
    """Whether a README.md is one of these."""
    return _MARK in text


def front_matter(provenance: Mapping[str, Any], library: str, relation: str) -> str:
    """The YAML of a card. base_model and datasets only where they are names on the hub, which refuses local paths."""
    lines = ["---"]
    base, data = provenance.get("model"), provenance.get("data")
    named = [item.get("data") for item in data if isinstance(item, Mapping)] if isinstance(data, list) else [data]
    known = [match.group(1) for match in map(_HUB_DATA.fullmatch, map(str, named)) if match]
    if _is_on_hub(base):
        lines += [f"base_model: {base}", f"base_model_relation: {relation}"]
    if known:
        lines += ["datasets:", *(f"- {name}" for name in known)]
    lines += [f"library_name: {library}", "tags:", "- lota", "- lottery-ticket", "- sparse-fine-tuning"]
    return "\n".join([*lines, "# license: yours to choose; the base model's terms apply", "---", "", _MARK])


def _model_of(model: Mapping[str, Any], provenance: Mapping[str, Any]) -> Mapping[str, Any]:
    """What is known of the trained class: a causal language model is what its Auto class loads."""
    trained = str(provenance.get("class") or "")
    is_causal = trained.endswith(("ForCausalLM", "LMHeadModel"))
    return model or ({"class": trained} if trained and not is_causal and _is_of_transformers(trained) else {})


def _is_of_transformers(name: str) -> bool:
    try:
        import transformers
    except ModuleNotFoundError:
        return False
    return hasattr(transformers, name)


def _loading(model: Mapping[str, Any], variable: str) -> tuple[str, str, str]:
    """The class to load a base with for a ticket's `model`, the arguments for its head, and the line that adds rows."""
    config = model.get("config") or {}
    labels, vocabulary = config.get("id2label"), config.get("vocab_size")
    resized = f"\n{variable}.resize_token_embeddings({vocabulary})" if isinstance(vocabulary, int) else ""
    arguments = f", num_labels={len(labels)}" if isinstance(labels, (dict, list)) else ""
    name = str(model.get("class") or "")
    known = name if name.isidentifier() else "AutoModelForCausalLM"
    return known, arguments, resized


def _base_text(provenance: Mapping[str, Any]) -> str | None:
    base, revision = provenance.get("model"), provenance.get("revision")
    if base is None:
        return None
    return f"{base}, revision {revision}" if revision and _is_on_hub(base) else str(base)


def _is_on_hub(name: Any) -> bool:
    return isinstance(name, str) and bool(_HUB_NAME.fullmatch(name)) and not Path(name).exists()


def _short(model: str) -> str:
    """A model's name for a title: a local folder's last part."""
    return model if _is_on_hub(model) else Path(model).name or model


def _of(mask: Mask) -> str:
    return f"density {mask.density:.6g}, {mask.num_active:,} of {mask.eligible:,} entries"


def _table(rows: Mapping[str, Any]) -> str:
    """A Markdown table; rows without a value are left out."""
    shown = {key.replace("_", " "): _plain(value) for key, value in rows.items() if value is not None}
    lines = [f"| {_cell(key)} | {_cell(value)} |" for key, value in shown.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key.replace('_', ' ')} {_plain(item)}" for key, item in value.items())
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return "; ".join(map(_plain, value))
    return value if isinstance(value, str) else json.dumps(value)


def _cell(text: str) -> str:
    """Text for a cell of a Markdown table, where it is text and nothing else."""
    text = printable(text.replace("\n", " "))
    return re.sub(r"([|`*_\[\]#])", r"\\\1", text).replace("<", "&lt;") if _ODD.search(text) else text


_ODD = re.compile(r"[|`<>*\[\]#]")
