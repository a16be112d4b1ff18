"""The command line does what its rooms do; bad input ends in one line and exit code 2; help needs no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lota.cli import COMMANDS, main
from lota.ticket import Mask, Ticket
from tests.delivery.test_apply import load_checkpoint, same, save_checkpoint
from tests.delivery.test_live import Model, make_ticket

SHAPES = {
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.0.mlp.up_proj.weight": (16, 8),
    "model.layers.1.self_attn.q_proj.weight": (8, 8),
    "lm_head.weight": (32, 8),
}


@pytest.fixture
def ticket(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    mask = Mask.from_dense({name: torch.rand(shape, generator=generator) < 0.25 for name, shape in SHAPES.items()})
    values = {name: torch.full((mask.active(name),), 1.5, dtype=torch.bfloat16) for name in SHAPES}
    base_values = {name: torch.zeros(mask.active(name), dtype=torch.bfloat16) for name in SHAPES}
    Ticket(mask, values, base_values, {"model": "some/base", "steps": 7}).save(tmp_path / "ticket")
    mask.save(tmp_path / "mask")
    return tmp_path / "ticket"


def test_inspect_tells_everything_in_text_and_json(ticket: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(ticket), "--verify", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    loaded = Ticket.load(ticket)
    num_bytes = sum(file.stat().st_size for file in ticket.iterdir())
    assert (facts["num_active"], facts["eligible"]) == (loaded.num_active, loaded.mask.eligible)
    assert facts["num_changed"] == loaded.num_active and facts["verified"] is True
    assert (facts["num_bytes"], facts["bits_per_eligible_weight"]) == (num_bytes, 8 * num_bytes / loaded.mask.eligible)
    assert facts["provenance"] == {"model": "some/base", "steps": 7} and facts["dtypes"] == ["bfloat16"]
    assert {name: tuple(entry["shape"]) for name, entry in facts["tensors"].items()} == SHAPES

    assert main(["inspect", str(ticket)]) == 0
    text = capsys.readouterr().out
    assert f"{loaded.num_active} of 512 eligible entries in 4 tensors" in text and "some/base" in text
    header, *rows = [line.split() for line in text[text.index("layer") :].splitlines()]
    assert header == ["layer", "q_proj", "up_proj", "lm_head", "all"]
    assert [row[0] for row in rows] == ["0", "1", "outside", "all"]
    in_q_proj = f"{100 * loaded.mask.active('model.layers.1.self_attn.q_proj.weight') / 64:.3g}"
    assert rows[1] == ["1", in_q_proj, ".", ".", in_q_proj]

    assert main(["inspect", str(ticket.parent / "mask")]) == 0
    assert capsys.readouterr().out.startswith("mask ")


def test_a_damaged_ticket_is_one_line_on_stderr_and_exit_code_2(
    ticket: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(ticket.parent / "nothing")]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("lota: ") and "expected a ticket's directory" in captured.err

    file = ticket / "ticket.safetensors"
    data = bytearray(file.read_bytes())
    where = data.index(torch.full((4,), 1.5, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes())
    data[where] ^= 1
    file.write_bytes(data)
    assert main(["inspect", str(ticket)]) == 0  # values are checked when they are read
    assert main(["inspect", str(ticket), "--verify"]) == 2
    assert "sha256" in capsys.readouterr().err


def test_apply_and_revert_on_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Model(torch.bfloat16)
    save_checkpoint(model, tmp_path / "base")
    make_ticket(model).save(tmp_path / "ticket")
    base, ticket, out, again = (str(tmp_path / name) for name in ("base", "ticket", "out", "again"))
    assert main(["apply", "--base", base, ticket, "--out", out]) == 0
    assert main(["revert", "--tuned", out, ticket, "--out", again]) == 0
    captured = capsys.readouterr()
    assert "2 tensors have the base's fingerprint; 2 could not be compared" in captured.out
    assert "file 2 of 2" in captured.err
    assert same(load_checkpoint(tmp_path / "again"), model.state_dict())
    assert main(["apply", "--base", base, ticket, "--out", out]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["apply", "--base", str(tmp_path / "none"), ticket, "--out", out]) == 2
    assert "no such folder" in capsys.readouterr().err


HELP = """
import sys
from lota.cli import main
try:
    main({argv!r})
finally:
    assert "torch" not in sys.modules
"""


def test_help_of_every_command_has_examples_and_needs_no_torch() -> None:
    def ask(*argv: str) -> str:
        command = [sys.executable, "-c", HELP.format(argv=[*argv, "--help"])]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    of_modules = [getattr(command, "NAMES", (command.__name__.rsplit(".", 1)[-1],)) for command in COMMANDS]
    names = [name for group in of_modules for name in group]
    overview = ask()
    for name in names:
        assert name in overview
        text = ask(name)
        assert f"lota {name} " in text[text.index("examples:") :]
    assert subprocess.run([sys.executable, "-m", "lota"], capture_output=True, check=False).returncode == 2
