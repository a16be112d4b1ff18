"""A run that stopped goes on with any number of ranks, shard group and reduction: the same number of ranks gives the
same bits, others see the same rows step by step and end within the bounds of the first comparison with dense training.
"""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lota.ticket import Ticket
from tests.recipes import jobs, tiny

ROWS, BATCH, STEPS, STOP = 21, 8, 20, 10
BOUND = 1e-5  # of each tensor's largest trained weight, as in tests/zero/test_run_is_right.py


def words() -> list[str]:
    """Texts of a few words, no two alike."""
    return [" ".join(chosen) for chosen in itertools.islice(itertools.permutations(tiny.WORDS, 3), 5, None, 83)]


def write_rows(path: Path, texts: list[str]) -> Path:
    rows = [{"prompt": text, "completion": " ".join(reversed(text.split()))} for text in texts]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(5)
    tiny.save(folder, hidden_size=32, intermediate_size=64, initializer_range=0.2)
    write_rows(folder / "rows.jsonl", words()[:ROWS])
    return folder


def options(base: Path, output: Path, **changes: Any) -> list[str]:
    chosen: dict[str, Any] = {
        "model_name_or_path": base,
        "train_file": base / "rows.jsonl",
        "output_dir": output,
        "max_steps": STEPS,
        "save_steps": STOP,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
        "score": "gradient",
        "calibration_steps": 3,
        "density": 0.3,
        "bf16": "false",
        "ticket_dtype": "float32",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
    } | changes
    return [word for key, value in chosen.items() if value is not None for word in (f"--{key}", str(value))]


def recorded(name: str, argv: list[str]) -> list[tuple[int, list[str]]]:
    """Run a recipe; the rows of this rank's training micro steps, with the step that they belong to."""
    from recipes import phases

    seen: list[tuple[int, list[str]]] = []
    trainers = (phases._SupervisedTrainer, phases._PreferenceTrainer)

    def recording(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        ids = inputs["input_ids"].view(-1, inputs["input_ids"].shape[-1])
        rows = [" ".join(map(str, row[row != 0].tolist())) for row in ids]
        if self.args.output_dir.endswith("calibration"):
            rows = [f"calibration {row}" for row in rows]
        seen.append((self.state.global_step, rows))
        return super(type(self), self).training_step(model, inputs, *args, **kwargs)

    for trainer in trainers:
        trainer.training_step = recording
    try:
        jobs.run_recipe(name, argv)
    finally:
        for trainer in trainers:
            del trainer.training_step
    return seen


def order(ranks_seen: list[list[tuple[int, list[str]]]]) -> dict[tuple[str, int], list[str]]:
    """Rows of every step in the order of the epoch: micro step by micro step, rank by rank."""
    steps: dict[tuple[str, int], list[str]] = {}
    for micro_step in zip(*ranks_seen, strict=True):
        for step, rows in micro_step:
            phase = "calibrate" if rows[0].startswith("calibration") else "train"
            steps.setdefault((phase, step), []).extend(rows)
    return steps


def stopped_at(straight: Path, output: Path, step: int = STOP) -> Path:
    """What a run leaves that was stopped just after checkpoint-`step`."""
    output.mkdir()
    for name in ("config.yaml", "run.json", "metrics.jsonl", "calibration.json", "examples.txt"):
        shutil.copy(straight / name, output / name)
    for name in ("mask", f"checkpoint-{step}"):
        shutil.copytree(straight / name, output / name)
    return output


def assert_close(output: Path, straight: Path) -> None:
    one, other = Ticket.load(output / "ticket"), Ticket.load(straight / "ticket")
    assert one.mask == other.mask
    for name in other.names:
        expected, found = other.values(name), one.values(name)
        assert (found - expected).abs().max() <= BOUND * expected.abs().max(), name
    assert jobs.losses(output) == pytest.approx(jobs.losses(straight), rel=1e-5)
    assert len(jobs.losses(output)) == STEPS


@pytest.fixture(scope="module")
def straight(ranks, base: Path) -> tuple[Path, dict[tuple[str, int], list[str]]]:
    """A run on two ranks that never stopped, and the rows of its steps."""
    output = base / "straight"
    return output, order(ranks(2).run(recorded, "train_lota", options(base, output)))


def test_every_step_has_all_its_rows_and_every_epoch_every_row(straight) -> None:
    steps = [rows for (phase, _), rows in sorted(straight[1].items()) if phase == "train"]
    assert len(steps) == STEPS and {len(rows) for rows in steps} == {BATCH}
    everything = {row for rows in steps for row in rows}
    assert len(everything) == ROWS
    for epoch in range(STEPS // 3):
        rows = list(itertools.chain(*steps[3 * epoch : 3 * epoch + 3]))
        assert set(rows[:ROWS]) == everything and len(set(rows[ROWS:])) == 3 * BATCH - ROWS


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        (2, {}),
        (1, {"gradient_accumulation_steps": 4}),
        (4, {"gradient_accumulation_steps": 1, "shard_group_size": 2, "gradient_reduction": "dense"}),
        (1, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": None, "global_batch_size": BATCH}),
    ],
)
def test_trained_ten_steps_and_gone_on(ranks, base, straight, tmp_path, size, changes) -> None:
    output = stopped_at(straight[0], tmp_path / "run")
    argv = options(base, output, resume_from_checkpoint="true", **changes)
    seen = order(ranks(size).run(recorded, "train_lota", argv))
    assert seen == {key: rows for key, rows in straight[1].items() if key[0] == "train" and key[1] >= STOP}
    facts = jobs.summary(output)["training"]
    assert (facts["resumed_from_step"], facts["steps"]) == (STOP, STEPS)
    if size == 2:
        for name in ("ticket.safetensors", "ticket.json"):
            assert (output / "ticket" / name).read_bytes() == (straight[0] / "ticket" / name).read_bytes(), name
        assert jobs.losses(output) == jobs.losses(straight[0])
    else:
        assert_close(output, straight[0])
