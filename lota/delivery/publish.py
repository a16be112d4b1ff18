"""Tickets on the hub: nothing local in them, a licence that somebody chose, and a card that names the base."""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from lota.delivery.card import CARD_NAME, ticket_card
from lota.retention import FILE_NAME, Importance
from lota.ticket import Mask, Ticket, TicketWriter, read_manifest

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LICENCES = "https://huggingface.co/docs/hub/repositories-licenses"


def prepare(source: str | os.PathLike[str], folder: Path, *, licence: str, base: str | None = None) -> dict[str, Any]:
    """Write into `folder` the ticket `source` as it can be published, and its card; what was left out, by key.

    licence: an identifier of the hub's (`apache-2.0`, `llama3.1`, `other`). base: the base's name on the hub, needed
    where the ticket was made on a local folder. Paths of this machine are taken out of the provenance. ValueError where
    no base has a name.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", licence):
        raise ValueError(f"licence must be an identifier such as apache-2.0 ({_LICENCES}), got {licence!r}")
    ticket = Ticket.load(source)
    facts = ticket.provenance
    name = base or facts.get("model")
    if not isinstance(name, str) or not _HUB_NAME.fullmatch(name) or (base is None and Path(name).exists()):
        raise ValueError(
            f"the ticket's base is {facts.get('model')!r}, which nobody else finds: give its name on the hub (base)"
        )
    kept: dict[str, Any] = {}
    left: dict[str, Any] = {}
    for key, value in facts.items():
        (left if key != "model" and _is_local(value) else kept)[key] = value
    kept["model"] = name
    _copy(ticket, folder / "ticket", kept)
    if (importance := Path(source) / FILE_NAME).is_file():
        _copy_importance(importance, folder / "ticket", name)
    card = ticket_card(read_manifest(folder / "ticket"))
    card = re.sub(r"# license: .*", f"license: {licence}", card, count=1)
    (folder / "ticket" / CARD_NAME).write_text(card, encoding="utf-8")
    return left


def push(
    source: str | os.PathLike[str],
    name: str,
    *,
    licence: str,
    base: str | None = None,
    private: bool = False,
    revision: str | None = None,
) -> tuple[str, dict[str, Any]]:
    """Publish a ticket as `name` (owner/name): its address, and what was left out of the provenance."""
    if not _HUB_NAME.fullmatch(name):
        raise ValueError(f"expected a name like owner/ticket, got {name!r}")
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as temporary:
        left = prepare(source, Path(temporary), licence=licence, base=base)
        api = HfApi()
        api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=name,
            folder_path=str(Path(temporary) / "ticket"),
            revision=revision,
            commit_message="A lottery ticket, by lota push",
        )
    return f"https://huggingface.co/{name}", left


def _copy(ticket: Ticket, folder: Path, provenance: dict[str, Any]) -> None:
    if ticket.is_packed:
        raise ValueError(
            "this ticket is packed: publish it with its values (lota unpack), which need no base to be read"
        )
    mask: Mask = ticket.mask
    with TicketWriter(folder, mask, provenance, model=ticket.model) as writer:
        for name in ticket.names:
            writer.add(name, ticket.values(name), ticket.base_values(name) if ticket.has_base_values else None)


def _copy_importance(path: Path, folder: Path, base: str) -> None:
    """What the ticket's task needs of all weights, for later tasks to retain; no path of this machine in its facts."""
    importance = Importance.load(path)
    facts = {key: value for key, value in importance.facts.items() if key == "model" or not _is_local(value)}
    importance.facts = facts | ({"model": base} if "model" in facts else {})
    importance.save(folder)


def _is_local(value: Any) -> bool:
    """Whether a value names a file or folder of this machine."""
    if isinstance(value, (list, dict)):
        return any(map(_is_local, value.values() if isinstance(value, dict) else value))
    if not isinstance(value, str):
        return False
    parts = re.split(r"[\s,;]+", value)
    return any(
        part.startswith(("/", "./", "../", "~")) or re.search(r"\.(jsonl|json|csv|parquet|txt)$", part) or "\\" in part
        for part in parts
    ) or (("/" in value or os.sep in value) and Path(value).exists())


def dumps(left: dict[str, Any]) -> str:
    """What was left out, in one line."""
    return ", ".join(f"{key} ({json.dumps(value)[:60]})" for key, value in left.items())
