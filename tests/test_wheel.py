"""The wheel is the product: with nothing but its files, away from any checkout, every command is there; the core alone
inspects, applies and steps; and what needs more names the extra that brings it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lota
from lota.cli.needs import missing
from lota.packaged import CONFIGS, DS_CONFIGS

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = ("deepspeed", "transformers", "trl", "datasets", "accelerate", "peft", "yaml", "pandas", "matplotlib", "tqdm")
# Run first in a process: modules of the extras cannot be found, as where only the core is installed.
CORE_ALONE = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {EXTRAS!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name.split(".")[0])
sys.meta_path.insert(0, Absent())
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the wheel, as pip lays them out."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*command, str(ROOT)], check=True, capture_output=True)
    (wheel,) = folder.glob("lota-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run(site: Path, folder: Path, *words: str, code: str = "") -> subprocess.CompletedProcess[str]:
    """`lota WORDS` from the wheel's files, in `folder`; code: run before."""
    start = f"{code}\nimport sys\nfrom lota.cli import main\nsys.exit(main({list(words)!r}))"
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"}
    return subprocess.run(
        [sys.executable, "-c", start], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


def test_the_wheel_holds_all_that_runs_and_nothing_else(site: Path) -> None:
    held = {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()}
    wanted = {path.relative_to(ROOT).as_posix() for path in (ROOT / "lota").rglob("*.py")}
    wanted |= {"lota/py.typed", "lota/kernels/cpu_kernels.c"}
    wanted |= {f"lota/packaged/configs/{path.name}" for path in CONFIGS.iterdir() if path.suffix != ".md"}
    wanted |= {f"lota/packaged/ds_configs/{path.name}" for path in DS_CONFIGS.glob("*.json")}
    assert wanted <= held
    assert all(name.startswith("lota") for name in held), "neither recipes nor tests"


def test_every_command_explains_itself_away_from_the_checkout(site: Path, tmp_path: Path) -> None:
    for command in (
        *("train", "dpo", "calibrate", "sequence", "evaluate", "demo", "plan", "config", "report", "inspect", "apply"),
        *("ledger", "matrix"),
    ):
        done = run(site, tmp_path, command, "--help", code=CORE_ALONE)
        assert "examples:" in done.stdout, (command, done.stderr)
    done = run(site, tmp_path, "--version")
    assert done.stdout.startswith("lota ")


def test_packaged_configurations_are_listed_and_written(site: Path, tmp_path: Path) -> None:
    listed = run(site, tmp_path, "config", code=CORE_ALONE).stdout
    assert "llama31_8b_gsm8k" in listed and "zero3" in listed and "plain_chat" in listed
    assert run(site, tmp_path, "config", "zero3", "--out", "mine/zero3.json").returncode == 0
    assert json.loads((tmp_path / "mine" / "zero3.json").read_text())["zero_optimization"]["stage"] == 3
    assert run(site, tmp_path, "config", "llama31_8b_gsm8k").stdout == (CONFIGS / "llama31_8b_gsm8k.yaml").read_text()
    done = run(site, tmp_path, "config", "zero33")
    assert done.returncode == 2 and "Did you mean 'zero3'" in done.stderr
    done = run(site, tmp_path, "config", "zero3", "--out", "mine/zero3.json")
    assert done.returncode == 2 and "exists already" in done.stderr


def test_the_core_alone_inspects_applies_and_steps(site: Path, tmp_path: Path) -> None:
    """torch, numpy and safetensors are enough for tickets and kernels."""
    base = {"model.embed_tokens.weight": torch.arange(12.0).view(4, 3), "norm.weight": torch.ones(3)}
    base["lm_head.weight"] = base["model.embed_tokens.weight"].clone()
    (tmp_path / "base").mkdir()
    save_file(base, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "base" / "config.json").write_text(json.dumps({"tie_word_embeddings": True}))
    mask = lota.Mask.from_indices({"model.embed_tokens.weight": ((4, 3), torch.tensor([1, 7]))})
    lota.Ticket(mask, {"model.embed_tokens.weight": torch.tensor([-1.0, -7.0])}).save(tmp_path / "ticket")
    done = run(site, tmp_path, "inspect", "ticket", code=CORE_ALONE)
    assert done.returncode == 0, done.stderr
    done = run(site, tmp_path, "apply", "--base", "base", "ticket", "--out", "merged", code=CORE_ALONE)
    assert done.returncode == 0, done.stderr
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert merged["model.embed_tokens.weight"].flatten()[[1, 7]].tolist() == [-1.0, -7.0]
    assert torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])
    for words in (
        ["diff", "base", "merged", "--json"],
        ["verify", "ticket", "--base", "base", "--tuned", "merged"],
        ["extract", "--base", "base", "--tuned", "merged", "--out", "extracted"],
        ["pack", "extracted", "--out", "packed"],
        ["merge", "extracted", "extracted", "--out", "both", "--method", "linear"],
        ["mask", "--changed", "base", "merged", "--density", "0.1", "--include", "*", "--out", "changed"],
        ["revert", "packed", "--tuned", "merged", "--out", "again"],
    ):
        done = run(site, tmp_path, *words, code=CORE_ALONE)
        assert done.returncode == int(words[0] == "diff"), (words, done.stderr)
    step = "import torch, lota\nfrom lota.kernels import adamw_\nfrom lota.optim import MaskedAdamW\n"
    assert run(site, tmp_path, "--version", code=CORE_ALONE + step).returncode == 0


@pytest.mark.parametrize(
    ("words", "extra"),
    [
        (["train", "--config", "x.yaml"], "lota[recipes]"),
        (["demo"], "lota[recipes]"),
        (["plan", "base"], "lota[train]"),
        (["evaluate", "--model_name_or_path", "x"], "lota[eval]"),
    ],
)
def test_what_needs_more_names_the_extra(site: Path, tmp_path: Path, words: list[str], extra: str) -> None:
    done = run(site, tmp_path, *words, code=CORE_ALONE)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "is not installed" in done.stderr and extra in done.stderr


@pytest.mark.parametrize(
    ("command", "module", "extra"),
    [("extract", "peft", "recipes"), ("extract", "transformers", "train"), ("overlap", "matplotlib", "recipes")],
)
def test_an_option_that_needs_more_names_the_extra_with_that_module(command: str, module: str, extra: str) -> None:
    text = missing(ModuleNotFoundError(name=module), [command, "--out", "x"])
    assert f"needs {module}, which is not installed: pip install 'lota[{extra}]'" in text
    declared = re.search(rf"^{extra} = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)
    assert declared is not None and f'"{module}' in declared.group(1)


def test_the_blocks_name_their_extra(site: Path, tmp_path: Path) -> None:
    code = "import lota\ntry:\n    lota.sparse_zero3\nexcept ModuleNotFoundError as error:\n    print(error)"
    assert "pip install 'lota[train]'" in run(site, tmp_path, "--version", code=CORE_ALONE + code).stdout
