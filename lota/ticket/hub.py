"""Tickets by their name on the hub, wherever a path is taken: `owner/name`, or `owner/name@revision`."""

from __future__ import annotations

import os
import re
from pathlib import Path

_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")
_FILES = ["ticket.json", "ticket*.safetensors", "importance.safetensors", "README.md"]


def local_directory(path: str | os.PathLike[str]) -> Path:
    """The directory itself where there is one; else, for what can be a name on the hub, where its files are
    (downloaded, or found in the cache). ValueError where the hub gives none."""
    text = os.fspath(path)
    match = _NAME.fullmatch(text)
    if Path(text).exists() or match is None:
        return Path(text)
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ModuleNotFoundError:
        return Path(text)
    try:
        return Path(snapshot_download(match[1], revision=match[2], allow_patterns=_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{text}: expected a ticket's directory with ticket.json; there is none of that name, and the hub gives no "
            f"such ticket: {reason}"
        ) from None
