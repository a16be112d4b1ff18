"""A run that stopped resumes with any number of ranks, shard group and reduction: the same number of ranks gives the
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

from lota.run import checkpoint_manifest
from lota.ticket import Mask, Ticket
from lota.train.trainer import new_seed
from tests.data import tiny
from tests.train import jobs

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
    from lota.train import trainer

    seen: list[tuple[int, list[str]]] = []
    trainers = (trainer._SupervisedTrainer, trainer._PreferenceTrainer)

    def recording(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        ids = inputs["input_ids"].view(-1, inputs["input_ids"].shape[-1])
        rows = [" ".join(map(str, row[row != 0].tolist())) for row in ids]
        if self.args.output_dir.endswith("calibration"):
            rows = [f"calibration {row}" for row in rows]
        seen.append((self.state.global_step, rows))
        return super(type(self), self).training_step(model, inputs, *args, **kwargs)

    for kind in trainers:
        kind.training_step = recording
    try:
        jobs.run_recipe(name, argv)
    finally:
        for kind in trainers:
            del kind.training_step
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


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_another_batch_is_refused_on_every_rank_with_the_cure(ranks, base, straight, tmp_path) -> None:
    output = stopped_at(straight[0], tmp_path / "run")
    before = files_of(output)
    for outcome in ranks(4).outcomes(
        jobs.run_recipe, "train_lota", options(base, output, resume_from_checkpoint="true")
    ):
        assert "holds a run of 8 rows a step (2 a micro batch x 2 micro steps x 2 ranks)" in outcome.error
        assert "this would be 16 rows a step (2 a micro batch x 2 micro steps x 4 ranks)" in outcome.error
        assert "on 4 ranks give --gradient_accumulation_steps 1 or --per_device_train_batch_size 1" in outcome.error
    assert files_of(output) == before


def refused_when_cut(argv: list[str], folder: str, shares: tuple[float, ...]) -> dict[str, str]:
    """The recipe's error for every file of a checkpoint gone, or cut to shares of it; it is put back each time."""
    is_first = torch.distributed.get_rank() == 0
    errors = {}
    for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
        data = path.read_bytes()
        for cut in (None, *(int(share * len(data)) for share in shares), len(data) - 1):
            torch.distributed.barrier()
            if is_first:
                path.unlink()
                if cut is not None:
                    path.write_bytes(data[:cut])
            torch.distributed.barrier()
            try:
                jobs.run_recipe("train_lota", argv)
            except ValueError as error:
                errors[f"{path.relative_to(folder)} {cut}"] = str(error)
            torch.distributed.barrier()
            if is_first:
                path.write_bytes(data)
    return errors


@pytest.mark.parametrize("shares", [(), pytest.param((0.0, 0.1, 0.5, 0.9), marks=pytest.mark.slow)])
def test_a_checkpoint_that_is_cut_anywhere_is_refused_on_every_rank(ranks, base, straight, tmp_path, shares) -> None:
    output = stopped_at(straight[0], tmp_path / "run")
    shutil.copytree(straight[0] / f"checkpoint-{STEPS}", output / f"checkpoint-{STEPS}")
    last, good = output / f"checkpoint-{STEPS}", output / f"checkpoint-{STOP}"
    before = files_of(output)
    argv = options(base, output, resume_from_checkpoint=last)
    num_files = sum(path.is_file() for path in last.rglob("*"))
    assert num_files >= 9  # contents, three of the Trainer's, two random states, and the engine's
    for errors in ranks(2).run(refused_when_cut, argv, str(last), shares):
        assert len(errors) == (2 + len(shares)) * num_files
        for what, error in errors.items():
            assert f"checkpoint {last}" in error or f"{last} is not a complete checkpoint" in error, what
            assert what.startswith("contents.json") or what.split()[0] in error, what
            assert f"the newest complete one is {good}: give --resume_from_checkpoint {good}" in error, what
    assert files_of(output) == before


def test_damage_that_only_the_engine_sees(ranks, base, straight, tmp_path) -> None:
    """Large files are not read before the engine reads them."""
    output = stopped_at(straight[0], tmp_path / "run")
    folder = output / f"checkpoint-{STOP}"
    (state, *_) = sorted(folder.glob("global_step*/*.safetensors"))
    data = bytearray(state.read_bytes())
    data[-5] ^= 4
    state.write_bytes(data)
    checkpoint_manifest.write(folder, checkpoint_manifest.read(folder)[0], [checkpoint_manifest.list_files(folder)])
    before = files_of(output)
    argv = options(base, output, resume_from_checkpoint="true")
    for outcome in ranks(2).outcomes(jobs.run_recipe, "train_lota", argv):
        assert f"checkpoint {folder / f'global_step{STOP}'} is damaged" in outcome.error
    after = files_of(output)
    assert after.keys() == before.keys()
    # What the run resumes with: the folder's new place, and metrics up to the checkpoint.
    assert {name for name in after if after[name] != before[name]} == {"config.yaml", "metrics.jsonl"}


def stop_before_the_mask(name: str, argv: list[str]) -> str:
    """Run a recipe that fails when calibration is done, and leaves the checkpoints of it."""
    from lota.run.folder import RunFolder

    def fail(*_: Any) -> None:
        raise InterruptedError("stopped")

    kept, RunFolder.save_mask = RunFolder.save_mask, fail
    try:
        jobs.run_recipe(name, argv)
    except InterruptedError as error:
        return str(error)
    finally:
        RunFolder.save_mask = kept
    return ""


def assert_same_mask(output: Path, expected: Path, is_exact: bool) -> None:
    one, other = (Mask.load(folder / "mask") for folder in (output, expected))
    if is_exact:
        assert one == other
    for name in other.names:  # scores that differ in their last bits may change places at the threshold
        assert (one.dense(name) != other.dense(name)).sum() <= 2, name


@pytest.mark.parametrize(
    ("recipe", "score", "sizes"),
    [
        ("train_lota", "task_vector", (4,)),
        pytest.param("train_dpo", "gradient", (1,), marks=pytest.mark.slow),
        pytest.param("train_lota", "task_vector", (2, 1), marks=pytest.mark.slow),
        pytest.param("train_lota", "fisher", (2, 1, 4), marks=pytest.mark.slow),
        pytest.param("train_dpo", "task_vector", (2, 4), marks=pytest.mark.slow),
    ],
)
def test_calibration_and_training_go_on_with_other_ranks(ranks, base, tmp_path, recipe, score, sizes) -> None:
    changes: dict[str, Any] = {"score": score, "calibration_steps": 6, "save_steps": 4, "max_steps": 6}
    if recipe == "train_dpo":
        rows = [{"prompt": text, "chosen": text[::-1], "rejected": text} for text in words()[:ROWS]]
        (base / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        changes |= {"train_file": base / "pairs.jsonl", "precompute_ref_log_probs": "true"}
    whole = order(ranks(2).run(recorded, recipe, options(base, tmp_path / "straight", **changes)))
    argv = options(base, tmp_path / "stopped", **changes)
    assert ranks(2).run(stop_before_the_mask, recipe, argv) == ["stopped", "stopped"]
    assert (tmp_path / "stopped" / "calibration" / "checkpoint-4").is_dir()
    for size in sizes:
        output = tmp_path / f"on-{size}"
        shutil.copytree(tmp_path / "stopped", output)
        argv = options(
            *(base, output),
            **changes | {"gradient_accumulation_steps": 4 // size, "resume_from_checkpoint": "true"},
        )
        seen = order(ranks(size).run(recorded, recipe, argv))
        assert seen == {key: rows for key, rows in whole.items() if key[0] == "train" or key[1] >= 4}
        assert jobs.summary(output)["calibration"]["resumed_from_step"] == 4
        assert_same_mask(output, tmp_path / "straight", size == 2)
        if size == 2:
            assert files_of(output / "ticket") == files_of(tmp_path / "straight" / "ticket")

    # And from the middle of training.
    output = stopped_at(tmp_path / "straight", tmp_path / "later", 4)
    size = sizes[-1]
    argv = options(
        base, output, **changes | {"gradient_accumulation_steps": 4 // size, "resume_from_checkpoint": "true"}
    )
    seen = order(ranks(size).run(recorded, recipe, argv))
    assert seen == {key: rows for key, rows in whole.items() if key[0] == "train" and key[1] >= 4}
    assert jobs.losses(output) == pytest.approx(jobs.losses(tmp_path / "straight"), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["true", "false"])
def test_mixtures_and_packing(ranks, base, tmp_path, packing) -> None:
    texts = words()
    parts = [(write_rows(tmp_path / "a.jsonl", texts[:17]), 2), (write_rows(tmp_path / "b.jsonl", texts[17:24]), 1)]
    mixture = [{"train_file": str(path), "weight": weight} for path, weight in parts]
    changes: dict[str, Any] = {"train_file": None, "mixture": json.dumps(mixture), "packing": packing, "max_length": 14}
    straight = tmp_path / "straight"
    whole = order(ranks(2).run(recorded, "train_lota", options(base, straight, **changes)))
    for size in (1, 4):
        output = stopped_at(straight, tmp_path / f"on-{size}")
        argv = options(
            base,
            output,
            **changes | {"gradient_accumulation_steps": 4 // size, "resume_from_checkpoint": "true"},
        )
        seen = order(ranks(size).run(recorded, "train_lota", argv))
        assert seen == {key: rows for key, rows in whole.items() if key[0] == "train" and key[1] >= STOP}
        assert_close(output, straight)


def seeds(name: str, argv: list[str]) -> int:
    """Run a recipe; what this rank's random states began with, as seen in its first training step."""
    from lota.train import trainer

    found: list[int] = []

    def looking(self: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(torch.initial_seed())
        return super(type(self), self).training_step(*args, **kwargs)

    trainer._SupervisedTrainer.training_step = looking
    try:
        jobs.run_recipe(name, argv)
    finally:
        del trainer._SupervisedTrainer.training_step
    return found[0]


def test_random_states(ranks, base, tmp_path) -> None:
    """Dropout resumes as it would have on the same ranks; on others with seeds of their own, the same every time."""
    torch.manual_seed(5)
    tiny.save(tmp_path / "base", hidden_size=32, intermediate_size=64, attention_dropout=0.5, initializer_range=0.2)
    changes: dict[str, Any] = {
        "model_name_or_path": tmp_path / "base", "score": "magnitude", "calibration_steps": None,
        "max_steps": 4, "save_steps": 2, "warmup_steps": 1,
    }  # fmt: skip
    straight = tmp_path / "straight"
    ranks(2).run(jobs.run_recipe, "train_lota", options(base, straight, **changes))
    changes["resume_from_checkpoint"] = "true"
    same = stopped_at(straight, tmp_path / "same", 2)
    ranks(2).run(jobs.run_recipe, "train_lota", options(base, same, **changes))
    assert files_of(same / "ticket") == files_of(straight / "ticket")
    other = stopped_at(straight, tmp_path / "other", 2)
    found = ranks(4).run(seeds, "train_lota", options(base, other, **changes | {"gradient_accumulation_steps": 1}))
    assert found == [new_seed(42, 2, rank) for rank in range(4)]
    assert jobs.losses(other)[:2] == jobs.losses(straight)[:2] != jobs.losses(other)[2:]
