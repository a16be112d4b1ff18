"""Training on a reward leaves what fine-tuning leaves, its reference costs no second model, and a reward that cannot be
used is refused before a model is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from lota.run.folder import resolved
from lota.run.options import PolicyConfig, parse
from lota.run.resolve import resolve
from lota.ticket import Ticket
from tests.train import jobs
from tests.zero.trainers import make_base

REWARDS = """
def animals(prompts, completions, animal, **others):
    assert len(prompts) == len(completions) == len(animal)
    return [sum(word == wanted for word in text.split()) / 8 for text, wanted in zip(completions, animal)]

def short(completions, **others):
    return [-len(text.split()) / 8 for text in completions]

def too_few(completions, **others):
    return [0.0]

def infinite(completions, **others):
    return [float("nan")] * len(completions)

def raises(completions, **others):
    return [text.split()[0] for text in completions]

async def later(completions, **others):
    return [0.0] * len(completions)
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_base(tmp_path_factory.mktemp("base"))
    rows = map(json.loads, (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines())
    # Not every row has every field, nor of one type.
    rows = [{"prompt": r["prompt"], "animal": "cat", **({"odd": n} if n % 3 else {})} for n, r in enumerate(rows)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (folder / "few.jsonl").write_text("\n".join(map(json.dumps, rows[:8])), encoding="utf-8")
    (folder / "rewards.py").write_text(REWARDS, encoding="utf-8")
    return folder


def run(ranks, base: Path, name: str, *options: str, world: int = 2) -> Path:
    settings = {
        "model_name_or_path": base,
        "train_file": base / "prompts.jsonl",
        "output_dir": base / name,
        "reward": f"{base / 'rewards.py'}:animals",
        "max_steps": 4,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 8,
        "logging_steps": 1,
    }
    if "--method" not in options:
        settings["calibration_steps"] = 2
    argv = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    ranks(world).run(jobs.run_recipe, "train_grpo", [*argv, *options])
    return base / name


def logged(output: Path, name: str) -> list[float]:
    rows = map(json.loads, (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [row[name] for row in rows if name in row and row["phase"] == "train"]


KL = ("--beta", "0.1", "--max_steps", "5", "--eval_rows", "4", "--per_device_eval_batch_size", "8")


@pytest.fixture(scope="module")
def itself(ranks, base: Path) -> Path:
    return run(ranks, base, "itself", *KL)


def test_a_run_ends_with_a_ticket_and_the_rewards_before_and_after(itself: Path) -> None:
    summary, ticket = jobs.summary(itself), Ticket.load(itself / "ticket")
    assert summary["mask"]["density_asked"] == 0.1 and 0 < ticket.num_changed <= ticket.num_active
    facts = summary["training"]
    assert len(logged(itself, "reward")) == 5 and facts["steps"] == 5
    assert {"reward_at_start", "reward_at_end", "eval_reward_before", "eval_reward"} <= facts.keys()
    assert ticket.provenance["reward"][0].endswith("rewards.py:animals")
    assert "reward after" in (itself / "ticket" / "README.md").read_text(encoding="utf-8")


def check_equal(itself: Path, second: Path, steps: int) -> None:
    assert logged(itself, "loss") == logged(second, "loss") and len(set(logged(itself, "loss"))) == steps
    assert logged(itself, "kl") == logged(second, "kl") and logged(itself, "kl")[0] == 0 < logged(itself, "kl")[-1]
    one, two = Ticket.load(itself / "ticket"), Ticket.load(second / "ticket")
    assert one.mask == two.mask
    assert all(torch.equal(one.values(name), two.values(name)) for name in one.names)


def test_the_model_itself_is_a_reference_like_a_second_one(ranks, base: Path, itself: Path) -> None:
    check_equal(itself, run(ranks, base, "second", *KL, "--reference", "model"), 5)


@pytest.mark.slow
def test_so_it_is_with_checkpointing_and_a_copy_on_every_rank(ranks, base: Path) -> None:
    options = ("--gradient_checkpointing", "true", "--shard_group_size", "1", "--beta", "0.1")
    one = run(ranks, base, "itself_whole", *options)
    check_equal(one, run(ranks, base, "second_whole", *options, "--reference", "model"), 4)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_rivals_train_on_a_reward_too(ranks, base: Path, method: str) -> None:
    two = (f"{base / 'rewards.py'}:animals", f"{base / 'rewards.py'}:short", "--reward_weights", "1", "0.5")
    options = ("--method", method, "--beta", "0.1", "--max_steps", "3", "--reward", *two)
    output = run(ranks, base, method, *options, world=1)
    assert len(logged(output, "reward")) == 3 and logged(output, "kl")[0] == pytest.approx(0, abs=1e-6)
    parts = [logged(output, f"rewards/{name}/mean") for name in ("animals", "short")]
    assert logged(output, "reward") == pytest.approx([a + b / 2 for a, b in zip(*parts)], abs=1e-6)
    assert jobs.summary(output)["training"]["reward_at_end"] == logged(output, "reward")[-1]
    assert method == "full" or (output / "adapter" / "adapter_model.safetensors").exists()


def test_a_run_that_stopped_after_a_checkpoint_gives_the_same_ticket(ranks, base: Path) -> None:
    """In the second epoch, and between two steps on the same answers."""
    options = ("--save_steps", "3", "--max_steps", "7", "--train_file", str(base / "few.jsonl"), "--beta", "0.1",
               "--num_generations", "8", "--steps_per_generation", "1")  # fmt: skip
    straight = run(ranks, base, "straight", *options, world=1)
    stopped = base / "stopped"
    stopped.mkdir()
    for name in ("config.yaml", "run.json", "metrics.jsonl", "calibration.json"):
        shutil.copy(straight / name, stopped / name)
    for name in ("mask", "checkpoint-6"):
        shutil.copytree(straight / name, stopped / name)
    run(ranks, base, "stopped", *options, "--resume_from_checkpoint", "true", world=1)
    assert jobs.summary(stopped)["training"]["resumed_from_step"] == 6
    assert logged(stopped, "reward") == logged(straight, "reward")
    one, two = Ticket.load(straight / "ticket"), Ticket.load(stopped / "ticket")
    assert all(torch.equal(one.values(name), two.values(name)) for name in one.names)


def test_config_yaml_holds_the_options_and_nothing_that_follows_from_them(itself: Path) -> None:
    path = itself / "config.yaml"
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert "generation_batch_size" not in written and "steps_per_generation" not in written
    argv = ["--config", str(path)]
    args, config = parse(argv, PolicyConfig)
    assert resolved(resolve(args, config, argv=argv), config) == written


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--reward", "rewards.py"), "FILE.py:function"),
        (("--reward", "nowhere.py:animals"), "no such file"),
        (("--reward", "{base}/rewards.py:animal"), "has no animal. Did you mean"),
        (("--reward", "{base}/rewards.py:later"), "must be a plain function"),
        (("--reward", "{base}/rewards.py:too_few"), "must return a list of 4 numbers, got 1"),
        (("--reward", "{base}/rewards.py:infinite"), "must return finite numbers, got nan"),
        (("--reward", "{base}/rewards.py:raises"), "failed on an empty answer to a first row: IndexError"),
        (("--reward_weights", "1", "2"), "reward_weights has 2 numbers"),
        (("--reference", "ticket"), "beta is 0, so there is no reference"),
        (("--beta", "0.1", "--reference", "precompute"), "reference must be one of ticket, model"),
        (("--use_vllm", "true"), "give server: URL"),
        (("--vllm_mode", "server"), "vllm_mode is not for lota grpo"),
        (("--global_batch_size", "16"), "global_batch_size is not for lota grpo"),
        (("--keep_importance", "true"), "keep_importance measures losses of given answers"),
        (("--server_tolerance", "0.1"), "no server is given"),
        (("--server", "http://127.0.0.1:9", "--method", "full"), "method: full has none"),
        (("--server", "http://127.0.0.1:9", "--score", "task_vector"), "use score: gradient"),
        (("--server", "http://127.0.0.1:9"), "no server there"),
        (("--max_completion_length", "80"), "it needs 84 positions, of which the model has 64"),
        (("--completion_field", "animal"), "training on a reward takes prompt"),
    ],
)
def test_what_cannot_be_is_refused_by_name(ranks, base: Path, options: tuple[str, ...], message: str) -> None:
    with pytest.raises(Exception, match=message):
        run(ranks, base, "refused", *(word.format(base=base) for word in options), world=1)
    assert not (base / "refused" / "ticket").exists()
    shutil.rmtree(base / "refused", ignore_errors=True)


def test_other_jobs_have_no_reward(ranks, base: Path) -> None:
    files = {"model_name_or_path": base, "train_file": base / "rows.jsonl", "output_dir": base / "none"}
    argv = [word for key, value in files.items() for word in (f"--{key}", str(value))]
    with pytest.raises(Exception, match="only lota grpo trains on a reward, so reward would be ignored"):
        ranks(1).run(jobs.run_recipe, "train_lota", [*argv, "--reward", "rewards.py:animals"])
