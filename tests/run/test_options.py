"""Options are read from file and command line, and whatever cannot work is refused by name before anything runs."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import torch

from lota.data.options import plan_data
from lota.packaged import DS_CONFIGS
from lota.run.folder import RunFolder
from lota.run.options import PolicyConfig, PreferenceConfig, RecipeConfig, parse
from lota.run.resolve import RunOptions, resolve
from lota.ticket import Mask

BASE = ["--model_name_or_path", "base"]


def checked(*argv: str, mask_only: bool = False) -> tuple[RunOptions, RecipeConfig, list[str]]:
    words = [*BASE, *argv]
    args, config = parse(words)
    options = resolve(args, config, mask_only=mask_only, argv=words)
    return options, config, list(options.notes)


def opened(*argv: str) -> RunFolder:
    """The run's folder, as a job opens it."""
    options, config, _ = checked(*argv)
    return RunFolder(options, config, plan_data(parse([*BASE, *argv])[0]))


def data_file(folder: Path, text: str = '{"prompt": "a", "completion": "b"}\n') -> tuple[str, str]:
    """--train_file and a file of one row."""
    path = folder / "rows.jsonl"
    path.write_text(text, encoding="utf-8")
    return "--train_file", str(path)


def test_defaults() -> None:
    options, config, notes = checked("--learning_rate", "1e-2")
    found = options.calibration
    assert found is not None
    assert (found.density, found.budget, found.score, found.steps) == (0.1, "global", "task_vector", 200)
    assert found.learning_rate == pytest.approx(1e-3)  # a tenth of the sparse phase's
    with pytest.raises(FrozenInstanceError):
        options.method = "full"  # type: ignore[misc]
    assert (config.weight_decay, str(config.save_strategy.value), config.use_cpu) == (
        0.0,
        "steps",
        not torch.accelerator.is_available(),
    )
    assert config.deepspeed == "zero3" and notes == []


def test_rounding_seed() -> None:
    for optim in ("adamw_torch", "adamw_torch_fused", "rmsprop"):
        options, _, _ = checked("--rounding_seed", "3", "--bf16", "true", "--optim", optim)
        assert options.rounding_seed == 3


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--density", "0"], r"density must be in \(0, 1\]"),
        (["--density", "90"], r"got 90.*Did you mean 0\.9\?"),
        (["--density", "nan"], "density must be"),
        (["--score", "fischer"], "score must be one of .* Did you mean 'fisher'"),
        (["--budget", "local"], "budget must be"),
        (["--method", "ful"], "Did you mean 'full'"),
        (["--densty", "0.1"], r"unknown option 'densty'\. Did you mean 'density'"),
        (["--method", "full", "--density", "0.1"], "density would be ignored: remove it"),
        (["--score", "gradient", "--calibration_learning_rate", "1e-3"], "calibration_learning_rate would be ignored"),
        (["--score", "magnitude", "--calibration_steps", "9"], "calibration_steps would be ignored"),
        (["--calibration_steps", "0"], "calibration_steps must be at least 1"),
        (["--calibration_learning_rate", "-1"], "must be above 0"),
        (["--save_strategy", "no", "--save_steps", "5"], "save_steps would be ignored: add --save_strategy steps"),
        (["--enable_jit_checkpoint", "true"], "SIGTERM and SIGUSR1 save a checkpoint always"),
        (["--save_on_each_node", "true"], "every node write the same checkpoint"),
        (["--auto_find_batch_size", "true"], "give per_device_train_batch_size"),
        (["--push_to_hub", "true"], "would upload the Trainer's folders and not the ticket"),
        (["--save_only_model", "true"], "save_only_model would leave checkpoints"),
        (["--ticket_dtype", "int8"], "ticket_dtype must be"),
        (["--ticket_form", "pack"], "ticket_form must be one of plain, values, packed"),
        (["--ticket_form", "packed", "--ticket_dtype", "float32"], "leave one of them out"),
        (["--kernels", "tritn"], "kernels must be one of auto, torch, triton, got 'tritn'"),
        (["--gradient_reduction", "compct"], "Did you mean 'compact'"),
        (["--method", "full", "--kernels", "torch"], "kernels would be ignored"),
        (["--rounding_seed", "-1", "--bf16", "true"], r"rounding_seed must be an integer in \[0, 2\*\*63\)"),
        (["--rounding_seed", "3", "--bf16", "false"], "rounding_seed: 3 .*does not train in bf16: add --bf16 true"),
        (["--rounding_seed", "3", "--bf16", "true", "--optim", "sgd"], "rounding_seed: 3 .* the optimizer is sgd"),
        (["--method", "full", "--rounding_seed", "3"], "rounding_seed would be ignored"),
        (["--mask", "nowhere"], "nowhere"),
        (["--protect", "nowhere"], "nowhere"),
        (["--deepspeed", "nowhere.json"], r"nowhere\.json cannot be read \(No such file"),
    ],
)
def test_refusals(argv: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checked(*argv)


def test_a_model_is_needed() -> None:
    args, config = parse([])
    with pytest.raises(ValueError, match="model_name_or_path is missing"):
        resolve(args, config, argv=[])


def test_other_stages_are_refused_with_the_way_out(tmp_path: Path) -> None:
    content = json.loads((DS_CONFIGS / "zero3.json").read_text(encoding="utf-8"))
    content["zero_optimization"]["stage"] = 2
    path = tmp_path / "zero2.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=r"stage must be 3, got 2.*shard_group_size: 1"):
        checked("--deepspeed", str(path))


def test_one_file_serves_every_method_and_the_command_line_wins(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("density: 0.2\nscore: fisher\ncalibration_steps: 3\nlearning_rate: 1.0e-2\n", encoding="utf-8")
    options, config, notes = checked("--config", str(path), "--density", "0.3")
    found = options.calibration
    assert found is not None
    assert (found.density, found.score, config.learning_rate, notes) == (0.3, "fisher", 0.01, [])
    options, _, notes = checked("--config", str(path), "--method", "full")
    assert options.calibration is None and not options.given.keys() & {"density", "score", "calibration_steps"}
    assert notes == [
        "method: full trains every weight; not used from the config file: density, score, calibration_steps"
    ]
    path.write_text("densty: 0.2\n", encoding="utf-8")
    with pytest.raises(ValueError, match="Did you mean 'density'"):
        checked("--config", str(path))


def test_the_global_batch_given_wins_over_the_files_accumulation(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("gradient_accumulation_steps: 4\nper_device_train_batch_size: 2\n", encoding="utf-8")
    _, config, notes = checked("--config", str(path), "--global_batch_size", "32")
    assert config.gradient_accumulation_steps == 16
    assert notes == ["global_batch_size is given; not used from the config file: gradient_accumulation_steps"]
    with pytest.raises(ValueError, match="not both"):
        checked("--global_batch_size", "32", "--gradient_accumulation_steps", "4")


def test_mask_skips_calibration_and_has_none_to_calibrate(tmp_path: Path) -> None:
    Mask.from_dense({"w": torch.tensor([[True, False]])}).save(tmp_path / "mask")
    options, _, _ = checked("--mask", str(tmp_path / "mask"))
    assert options.calibration is None
    with pytest.raises(ValueError, match="density would be ignored"):
        checked("--mask", str(tmp_path / "mask"), "--density", "0.1")
    with pytest.raises(ValueError, match="nothing to calibrate"):
        checked("--mask", str(tmp_path / "mask"), mask_only=True)
    with pytest.raises(ValueError, match="no mask to calibrate"):
        checked("--method", "full", mask_only=True)
    with pytest.raises(ValueError, match="ends with the mask, so kernels, merged would be ignored: remove them"):
        checked("--kernels", "torch", "--merged", "true", mask_only=True)


def test_a_folder_that_holds_a_run_is_refused(tmp_path: Path) -> None:
    argv = ["--learning_rate", "1e-2", "--output_dir", str(tmp_path / "run"), *data_file(tmp_path)]
    opened(*argv)
    with pytest.raises(ValueError, match=r"already holds a run \(config.yaml\).*--resume_from_checkpoint true"):
        opened(*argv)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ((), ""),
        (("--save_steps", "9", "--merged", "true"), ""),
        (("--learning_rate", "2e-2"), "learning_rate was 0.01, now 0.02"),
        (("--density", "0.2", "--seed", "5"), "density was 0.1, now 0.2; seed was 42, now 5"),
        (("--resume_from_checkpoint", "elsewhere/checkpoint-4"), "does not lie in output_dir"),
        (("--resume_from_checkpoint", "HERE/checkpoint-4"), "is not a complete checkpoint; there is none"),
    ],
)
def test_a_run_goes_on_with_its_own_options(tmp_path: Path, changed: tuple[str, ...], message: str) -> None:
    argv = ["--learning_rate", "1e-2", "--output_dir", str(tmp_path), *data_file(tmp_path)]
    opened(*argv)
    changed = tuple(word.replace("HERE", str(tmp_path)) for word in changed)
    argv += ["--resume_from_checkpoint", "true", *changed]
    if not message:
        opened(*argv)
        return
    with pytest.raises(ValueError, match=message):
        opened(*argv)


def test_the_resolved_config_reads_back_as_the_same_run(tmp_path: Path) -> None:
    argv = ["--learning_rate", "1e-2", "--density", "0.05", "--max_steps", "7", "--include", "mlp", "--seed", "3"]
    argv += ["--report_to", "tensorboard", "--pad_to_multiple_of", "8", *data_file(tmp_path)]
    argv += ["--output_dir", str(tmp_path / "run")]
    opened(*argv)
    options, config, _ = checked(*argv)
    words = ["--config", str(tmp_path / "run" / "config.yaml")]
    again, config_again = parse(words)
    assert resolve(again, config_again, argv=words) == options
    for name in (
        "learning_rate",
        "max_steps",
        "seed",
        "output_dir",
        "weight_decay",
        "max_grad_norm",
        "bf16",
        "report_to",
        "pad_to_multiple_of",
    ):
        assert getattr(config_again, name) == getattr(config, name), name


def test_metrics_go_on_after_a_line_that_was_cut(tmp_path: Path) -> None:
    folder = opened("--output_dir", str(tmp_path), *data_file(tmp_path))
    for step in (1, 2, 3):
        folder.add_metrics({"phase": "train", "step": step})
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text(encoding="utf-8")[:-9], encoding="utf-8")
    assert [row["step"] for row in folder.keep_metrics("train", 2)] == [1, 2]
    folder.add_metrics({"phase": "train", "step": 3})
    assert [json.loads(line)["step"] for line in path.read_text(encoding="utf-8").splitlines()] == [1, 2, 3]


SHIPPED = sorted((Path(__file__).parents[2] / "recipes" / "configs").glob("*.yaml"))


# Those of sequences are read by lota.sequence.config: tests/sequence/test_config.py.
@pytest.mark.parametrize("path", [p for p in SHIPPED if not p.stem.startswith("sequence_")], ids=lambda p: p.stem)
def test_shipped_configs_are_accepted(path: Path) -> None:
    words = ["--config", str(path), "--output_dir", "runs/x"]
    kinds = {"dpo": PreferenceConfig, "grpo": PolicyConfig}
    args, config = parse(words, kinds.get(path.stem.split("_")[0], RecipeConfig))
    args.model_name_or_path = args.model_name_or_path or "base"
    assert resolve(args, config, argv=words).notes == ()
