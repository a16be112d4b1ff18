"""A run resumes only as the run that it is; what does not make another one of it may change, and is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lota.data import sources
from lota.data.options import plan_data
from lota.packaged import DS_CONFIGS
from lota.run import checkpoint_manifest
from lota.run.batch import Batch
from lota.run.folder import RunFolder
from lota.run.options import parse
from lota.run.resolve import resolve


class Job:
    """Starts of one run, each with its number of ranks."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self._patch = folder, monkeypatch
        self.rows = folder / "rows.jsonl"
        self.rows.write_text('{"prompt": "a", "completion": "b"}\n' * 9, encoding="utf-8")

    def start(self, ranks: int = 2, **changes: Any) -> RunFolder:
        chosen = {
            "model_name_or_path": "base",
            "train_file": self.rows,
            "output_dir": self.folder / "run",
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 4,
        } | changes
        words = [word for key, value in chosen.items() if value is not None for word in (f"--{key}", str(value))]
        self._patch.delenv("WORLD_SIZE", raising=False)
        args, config = parse(words)
        self._patch.setenv("WORLD_SIZE", str(ranks))
        folder = RunFolder(resolve(args, config, argv=words), config, plan_data(args))
        folder.close()
        return folder

    def go_on(self, ranks: int = 2, **changes: Any) -> RunFolder:
        return self.start(ranks, resume_from_checkpoint="true", **changes)

    def save(self, ranks: int = 2) -> None:
        """A checkpoint, as far as the folder looks at it."""
        checkpoint = self.folder / "run" / "checkpoint-4"
        checkpoint.mkdir()
        checkpoint_manifest.write(checkpoint, Batch(2, 4, ranks), [checkpoint_manifest.list_files(checkpoint)])

    def config(self) -> dict[str, Any]:
        return yaml.safe_load((self.folder / "run" / "config.yaml").read_text(encoding="utf-8"))


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    return Job(tmp_path, monkeypatch)


def test_ranks_may_change_and_rows_may_not(job: Job) -> None:
    job.start(2)
    job.save(2)
    with pytest.raises(
        ValueError, match=r"holds a run of 16 rows a step \(2 a micro batch x 4 micro steps x 2 ranks\)"
    ):
        job.go_on(4)
    with pytest.raises(ValueError, match="on 4 ranks give --gradient_accumulation_steps 2 or --per_device_train"):
        job.go_on(4)
    with pytest.raises(ValueError, match="16 rows cannot be shared out over 3 ranks: use 2 or 4 ranks"):
        job.go_on(3)
    job.go_on(4, gradient_accumulation_steps=2, shard_group_size=2, gradient_reduction="dense", logging_steps=3)
    assert (job.config()["gradient_accumulation_steps"], job.config()["logging_steps"]) == (2, 3)
    assert json.loads((job.folder / "run" / "run.json").read_text())["batch"] == {
        "micro": 2, "accumulation": 2, "ranks": 4,
    }  # fmt: skip
    job.go_on(8, gradient_accumulation_steps=None, global_batch_size=16)
    assert "gradient_accumulation_steps" not in job.config() and job.config()["global_batch_size"] == 16
    assert "resume_from_checkpoint" not in job.config()
    with pytest.raises(ValueError, match="max_steps was None, now 7"):
        job.go_on(2, max_steps=7)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_stock_deepspeed_stays_on_its_ranks(job: Job, method: str) -> None:
    job.start(2, method=method)
    job.go_on(4, method=method, gradient_accumulation_steps=2)  # nothing was saved: it begins again
    job.save(2)
    with pytest.raises(ValueError, match=f"method: {method} trains with stock DeepSpeed.*: 2, and here are 4"):
        job.go_on(4, method=method, gradient_accumulation_steps=2)
    job.go_on(2, method=method)


def test_what_deals_rows_out_by_ranks_stays_on_them(job: Job) -> None:
    grouped = {"train_sampling_strategy": "group_by_length"}
    job.start(2, **grouped)
    job.save(2)
    job.go_on(2, **grouped)
    with pytest.raises(ValueError, match="train_sampling_strategy: group_by_length orders rows by micro batches and"):
        job.go_on(4, gradient_accumulation_steps=2, **grouped)


def test_accelerators_ways_of_dealing_stay_too(job: Job) -> None:
    split = {"accelerator_config": '{"split_batches": true}'}
    job.start(2, **split)
    job.save(2)
    with pytest.raises(ValueError, match=r"accelerator_config\.split_batches deals rows out by ranks"):
        job.go_on(4, gradient_accumulation_steps=2, **split)


def test_other_data_under_the_same_name(job: Job) -> None:
    job.start()
    text = job.rows.read_text(encoding="utf-8")
    job.rows.write_text(text + "{}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"begun on different data: .*rows\.jsonl had 315 bytes, now 318"):
        job.go_on()
    job.rows.write_text(text.replace("a", "c", 1), encoding="utf-8")
    with pytest.raises(ValueError, match="has other contents of the same length"):
        job.go_on()
    job.rows.write_text(text, encoding="utf-8")
    job.go_on()


def test_large_files_are_compared_by_pieces(tmp_path: Path) -> None:
    path = tmp_path / "large"
    size = sources.PIECE * sources.NUM_PIECES + 5
    path.write_bytes(bytes(size))
    found = sources.file_identity(path)
    assert found["bytes"] == size
    for place in (0, size - 1, (size - sources.PIECE) * 7 // 15):
        data = bytearray(size)
        data[place] = 1
        path.write_bytes(data)
        assert sources.file_identity(path) != found


def test_deepspeeds_settings(job: Job) -> None:
    settings = json.loads((DS_CONFIGS / "zero3.json").read_text(encoding="utf-8"))
    other = job.folder / "other.json"
    job.start()
    settings["zero_optimization"]["offload_param"] = {"device": "cpu"}
    settings["steps_per_print"] = 7
    other.write_text(json.dumps(settings), encoding="utf-8")
    job.go_on(deepspeed=other)
    assert job.config()["deepspeed"] == str(other)
    other.write_text(json.dumps(settings | {"gradient_clipping": 0.5}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"different DeepSpeed settings \(gradient_clipping was 'auto', now 0.5\)"):
        job.go_on(deepspeed=other)


def test_a_start_that_was_cut_short_is_none(job: Job) -> None:
    folder = job.start()
    (folder.path / "config.yaml").unlink()
    job.start(4)  # run.json alone, which is written first, is no run
    (folder.path / "run.json").unlink()
    with pytest.raises(ValueError, match=r"holds a run without run\.json"):
        job.go_on()
