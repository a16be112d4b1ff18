"""Attention implementations and Liger go to transformers as they are: not ignored; a missing package is its error."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lota.train.phase import load_model
from tests.train import jobs
from tests.zero.trainers import make_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_attention(base: Path, name: str) -> None:
    args: Any = SimpleNamespace(
        model=str(base), revision="main", attn_implementation=name, trust_remote_code=False
    )
    args.keeping = SimpleNamespace(tickets=())
    model = load_model(args, SimpleNamespace(bf16=True, fp16=False))  # type: ignore[arg-type]
    assert model.config._attn_implementation == name


@pytest.mark.parametrize(
    ("options", "package", "message"),
    [
        (["--attn_implementation", "flash_attention_2"], "flash_attn", "flash_attn"),
        (["--use_liger_kernel", "true"], "liger_kernel", "iger"),
    ],
)
def test_a_missing_package(ranks, base: Path, options: list[str], package: str, message: str) -> None:
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed here: the error of its absence cannot be seen")
    argv = ["--method", "full", "--model_name_or_path", str(base), "--train_file", str(base / "rows.jsonl")]
    argv += ["--learning_rate", "1e-3", "--max_steps", "1", "--output_dir", str(base / package), *options]
    for outcome in ranks(2).outcomes(jobs.run_recipe, "train_lota", argv):
        assert outcome.error_type == "ImportError" and message in outcome.error, outcome.error
