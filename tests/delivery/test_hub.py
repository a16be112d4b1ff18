"""Tickets by name out of the hub's own cache, and what would be uploaded: nothing local, a licence, a card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml

from lota.cli import main as cli
from lota.delivery.publish import prepare, push
from lota.retention import Importance
from lota.ticket import Mask, Ticket, read_manifest
from tests.algebra.test_algebra import ticket_of
from tests.delivery.test_folders import save_base

COMMIT = "a" * 40


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ticket:
    """A ticket in a cache as huggingface_hub lays it out: blobs, and a snapshot of links to them."""
    ticket = ticket_of(save_base(tmp_path / "base"), 1)
    cache = tmp_path / "cache"
    repository = cache / "models--me--math"
    (repository / "refs").mkdir(parents=True)
    for name in ("main", "v2"):
        (repository / "refs" / name).write_text(COMMIT)
    ticket.save(tmp_path / "plain")
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for file in (tmp_path / "plain").iterdir():
        (repository / "blobs" / file.name).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return ticket


def test_names_stand_where_paths_do(published: Ticket, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("me/math", "me/math@v2", f"me/math@{COMMIT}"):
        assert Ticket.load(name).mask == published.mask == Mask.load(name)
    assert read_manifest("me/math").num_active == published.num_active
    assert cli(["inspect", "me/math"]) == 0 and "me/math" in capsys.readouterr().out
    assert cli(["apply", "--base", "base", "me/math@v2", "--out", "out"]) == 0
    assert cli(["verify", "me/math", "--tuned", "out"]) == 0
    for name in ("me/none", "me/math@v3", "nothing"):
        assert cli(["inspect", name]) == 2
        assert "expected a ticket's directory" in capsys.readouterr().err
    (tmp_path / "me" / "math").mkdir(parents=True)  # what is here comes before the hub
    assert cli(["inspect", "me/math"]) == 2


def test_its_importance_is_uploaded_and_found_by_name(published: Ticket, tmp_path: Path) -> None:
    shapes = {name: published.mask.shape(name) for name in published.names}
    rows = {name: torch.ones(shape[0]) for name, shape in shapes.items()}
    columns = {name: torch.full((shape[1],), shape[0] / shape[1]) for name, shape in shapes.items()}
    facts = {"model": "/home/me/base", "data": "/home/me/rows.jsonl", "micro_batches": 64}
    Importance(shapes, rows, columns, facts=facts).save(tmp_path / "plain")
    prepare(tmp_path / "plain", tmp_path / "out", licence="mit", base="meta/base")
    copied = Importance.load(tmp_path / "out" / "ticket")
    assert copied.facts == {"model": "meta/base", "micro_batches": 64}
    assert copied.digest == Importance.load(tmp_path / "plain").digest
    snapshot = tmp_path / "cache" / "models--me--math" / "snapshots" / COMMIT
    copied.save(snapshot)
    assert Importance.load("me/math").digest == copied.digest


def test_what_is_uploaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticket = ticket_of(save_base(tmp_path / "base"), 1)
    facts = {
        "model": str(tmp_path / "base"),
        "data": "data/train.jsonl",
        "tuned": "/home/me/x",
        "steps": 3,
        "score": "fisher",
        "class": "LlamaForCausalLM",
    }
    local = Ticket(
        ticket.mask,
        {name: ticket.values(name) for name in ticket.names},
        {name: ticket.base_values(name) for name in ticket.names},
        facts,
    )
    local.save(tmp_path / "t")
    with pytest.raises(ValueError, match="give its name on the hub"):
        prepare(tmp_path / "t", tmp_path / "p", licence="mit")
    with pytest.raises(ValueError, match="licence must be an identifier"):
        prepare(tmp_path / "t", tmp_path / "p", licence="my own!")
    with pytest.raises(ValueError, match="a name like owner/ticket"):
        push(tmp_path / "t", "ticket", licence="mit", base="meta/llama")

    calls: list[tuple[str, dict[str, Any]]] = []
    found: dict[str, Any] = {}

    def upload(_: Any, **options: Any) -> None:
        folder = Path(options["folder_path"])
        found.update({path.name: path.read_bytes() for path in folder.iterdir()})
        found["ticket"] = read_manifest(folder)
        calls.append(("upload_folder", options))

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda _, name, **options: calls.append((name, options)))
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    where, left = push(tmp_path / "t", "me/math", licence="llama3.1", base="meta/llama", private=True)
    assert where.endswith("/me/math") and left.keys() == {"data", "tuned"}
    assert calls[0] == ("me/math", {"private": True, "exist_ok": True}) and calls[1][1]["repo_id"] == "me/math"
    assert found["ticket"].provenance == {"model": "meta/llama", "steps": 3, "score": "fisher", "class": facts["class"]}
    assert found.keys() == {"ticket", "ticket.json", "ticket.safetensors", "README.md"}
    card = found["README.md"].decode()
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == "meta/llama" and front["license"] == "llama3.1"
    assert not any(str(tmp_path).encode() in content for name, content in found.items() if name != "ticket")
    words = ["push", str(tmp_path / "t"), "me/math", "--licence", "mit", "--base", "meta/llama"]
    assert cli([*words, "--to", str(tmp_path / "dry")]) == 0 and len(calls) == 2
    assert Ticket.load(tmp_path / "dry" / "ticket").mask == ticket.mask
