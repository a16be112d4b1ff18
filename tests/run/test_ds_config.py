"""The DeepSpeed file of a recipe: read before anything runs, and changed for the sparse phase only as it is said."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lota.packaged import DS_CONFIGS
from lota.run import ds_config
from lota.run.options import parse

OFFLOADED: dict[str, Any] = {
    "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # Python 3.13 points at the comma, earlier ones behind it.
        ('{"bf16": {"enabled": true},\n}', r"zero\.json, line [12], column \d+: not JSON .*no comma after a last"),
        ('{"stage": 3 // three\n}', r"line 1, column 13: not JSON .*JSON knows no comments"),
        ("[3]", r"zero\.json must hold a JSON object, got list"),
    ],
)
def test_a_file_that_is_no_json_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "zero.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        parse(["--model_name_or_path", "base", "--deepspeed", str(tmp_path / "zero.json")])


def test_an_offloaded_optimizer_is_for_calibration(tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    path.write_text(json.dumps(OFFLOADED), encoding="utf-8")
    for given in (str(path), OFFLOADED):
        config = SimpleNamespace(deepspeed=given)
        ds_config.check(config, is_sparse=True)
        changes, (note,) = ds_config.for_sparse_training(config)
        assert changes == {"deepspeed": {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}}
        assert "offload_optimizer is set aside for the sparse phase" in note
    assert "offload_optimizer" in OFFLOADED["zero_optimization"]
    plain = SimpleNamespace(deepspeed={"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "none"}}})
    assert ds_config.for_sparse_training(plain) == ({}, [])


def test_accelerates_configuration_takes_the_defaults_place(monkeypatch: pytest.MonkeyPatch) -> None:
    default = ds_config.DEFAULT
    packaged = str(DS_CONFIGS / "zero3.json")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert ds_config.choose(default) == packaged  # set by every accelerator, after a first phase
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    assert ds_config.choose(default) is None
    assert ds_config.choose(OFFLOADED) == OFFLOADED  # then accelerate says that there are two
    config = SimpleNamespace(deepspeed=None, deepspeed_plugin=SimpleNamespace(deepspeed_config=OFFLOADED))
    assert ds_config.content(config) == OFFLOADED
    ds_config.check(config, is_sparse=False)
    with pytest.raises(ValueError, match="set offload_optimizer_device to none there"):
        ds_config.check(config, is_sparse=True)
