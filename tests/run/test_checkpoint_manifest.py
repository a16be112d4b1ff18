"""A checkpoint says what is in it and who made it; cut anywhere, it is refused by the name of the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lota.run import checkpoint_manifest
from lota.run.batch import Batch
from lota.run.checkpoints import newest
from lota.run.resume import Resume

BATCH = Batch(2, 4, 3)


def make(folder: Path) -> Path:
    (folder / "global_step4").mkdir(parents=True)
    (folder / "trainer_state.json").write_text("{}" * 20)
    (folder / "rng_state_0.pth").write_bytes(b"r" * 99)
    (folder / "global_step4" / "state.safetensors").write_bytes(b"s" * (checkpoint_manifest.LARGEST_HASHED + 1))
    checkpoint_manifest.write(folder, BATCH, [checkpoint_manifest.list_files(folder)])
    return folder


def test_what_was_written_is_read(tmp_path: Path) -> None:
    folder = make(tmp_path / "checkpoint-4")
    assert checkpoint_manifest.verify(folder) == BATCH
    files = checkpoint_manifest.read(folder)[1]
    assert files.keys() == {"trainer_state.json", "rng_state_0.pth", "global_step4/state.safetensors"}
    assert files["global_step4/state.safetensors"] == {"bytes": checkpoint_manifest.LARGEST_HASHED + 1}


def test_cut_anywhere(tmp_path: Path) -> None:
    good = make(tmp_path / "checkpoint-2")
    folder = make(tmp_path / "checkpoint-4")
    assert newest(tmp_path) == folder
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        data = path.read_bytes()
        for cut in (0, 1, len(data) // 2, len(data) - 1):
            path.write_bytes(data[:cut])
            named = path.relative_to(folder)
            with pytest.raises(ValueError, match=f"is damaged: {named}.*the newest complete one is {good}: give"):
                Resume.decide("true", tmp_path)
        path.unlink()
        if path.name == checkpoint_manifest.NAME:
            assert newest(tmp_path) == good and Resume.decide("true", tmp_path).batch == BATCH
            with pytest.raises(ValueError, match=f"not a complete checkpoint; the newest complete one is {good}"):
                Resume.decide(str(folder), tmp_path)
        else:
            with pytest.raises(ValueError, match=f"is damaged: {path.relative_to(folder)} is not there"):
                Resume.decide("true", tmp_path)
        path.write_bytes(data)
    flipped = folder / "rng_state_0.pth"
    flipped.write_bytes(b"r" * 98 + b"q")
    with pytest.raises(ValueError, match=r"rng_state_0\.pth does not have the sha256 that was written"):
        Resume.decide("true", tmp_path)


def test_edited_or_of_another_version(tmp_path: Path) -> None:
    folder = make(tmp_path / "checkpoint-4")
    path = folder / checkpoint_manifest.NAME
    body = json.loads(path.read_text())
    for change, message in (
        ({"batch": {"micro": 2, "accumulation": 4, "ranks": 4}}, "does not match its own sha256"),
        ({"version": 2}, "expected version 1 of contents.json, got 2"),
        ({"format": "x"}, "does not say format"),
    ):
        path.write_text(json.dumps(body | change))
        with pytest.raises(ValueError, match=message):
            checkpoint_manifest.read(folder)


def test_a_disk_that_shows_files_late(tmp_path: Path) -> None:
    """Rank 0 sees a file of another machine cut, or not at all; its machine saw it whole."""
    folder = make(tmp_path / "checkpoint-4")
    whole = checkpoint_manifest.list_files(folder)
    late = {name: facts for name, facts in whole.items() if name != "rng_state_0.pth"}
    late["global_step4/state.safetensors"] = {"bytes": 3, "sha256": "?"}
    checkpoint_manifest.write(folder, BATCH, [late, None, whole])
    assert checkpoint_manifest.verify(folder) == BATCH and checkpoint_manifest.read(folder)[1] == whole
