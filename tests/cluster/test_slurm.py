"""The shipped SLURM templates on a real cluster of two nodes: requeued in the middle, and stopped before its time
limit, a run ends in the ticket of one that was left alone; a fault is not tried again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from lota.run.checkpoints import newest, step_of
from lota.ticket import Ticket
from tests.cluster.slurm import CannotStart, Cluster
from tests.train.test_end_to_end import ROOT, world

__all__ = ["world"]  # a fixture of this module, too

MULTI_NODE = "recipes/slurm/multi_node.sbatch"
# The sizes of this cluster. Everything else is as shipped.
SIZES = ("--nodes=2", "--gpus-per-node=0", "--ntasks-per-node=1", "--cpus-per-task=1")
TICKET = ("ticket/ticket.safetensors", "ticket/ticket.json")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    try:
        made = Cluster()
    except CannotStart as reason:
        pytest.skip(str(reason)[:2000])
    yield made
    made.close()


def submit(cluster: Cluster, *command: str, sizes: tuple[str, ...] = SIZES, **environment: str) -> str:
    """A job; its number."""
    where = f"--output={cluster.folder}/%x-%j.log"
    return cluster.call("sbatch", "--parsable", where, *sizes, MULTI_NODE, *command, **environment)


def main_job(world: Path, output: Path) -> list[str]:
    return [
        *("recipes/train_lota.py", "--config", "recipes/configs/demo.yaml", "--output_dir", str(output)),
        *("--model_name_or_path", str(world / "model"), "--train_file", str(world / "train.jsonl")),
        *("--per_device_train_batch_size", "4", "--max_steps", "24", "--calibration_steps", "12", "--merged", "false"),
        *("--save_strategy", "steps", "--save_steps", "4", "--save_total_limit", "2", "--logging_steps", "4"),
        *("--shard_group_size", "node"),
    ]


@pytest.fixture(scope="module")
def straight(cluster: Cluster, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of the main job that nobody stopped."""
    output = tmp_path_factory.mktemp("straight") / "run"
    number = submit(cluster, *main_job(world, output))
    job = cluster.finish(number)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "0"), cluster.log(number)
    assert "2 nodes: 127.0.0.[1-2]" in cluster.log(number)
    return output


def test_the_template_runs_the_main_job_on_two_nodes(cluster: Cluster, straight: Path) -> None:
    summary = json.loads((straight / "summary.json").read_text(encoding="utf-8"))
    assert summary["world_size"] == 2 and summary["training"]["steps"] == 24
    ticket = Ticket.load(straight / "ticket")
    assert ticket.num_active == round(0.1 * ticket.mask.eligible) and ticket.num_changed > 0


def halt(cluster: Cluster, number: str, start: int, appears: Path) -> None:
    """Halt the ranks of a job's start as soon as `appears` is there, so that what comes next meets them in the middle:
    SLURM continues halted processes just before it signals them."""
    cluster.wait(lambda: len(cluster.ranks(number, start)) == 2, f"ranks of start {start}")
    ranks = cluster.ranks(number, start)
    cluster.wait(appears.exists, f"{appears}", interval=0.01)
    for rank in ranks:
        rank.suspend()


def test_requeued_and_warned_of_the_time_limit(cluster: Cluster, world: Path, straight: Path, tmp_path: Path) -> None:
    """One job: `scontrol requeue` during calibration, and during training the signal before the time limit."""
    output = tmp_path / "run"
    number = submit(cluster, *main_job(world, output))

    halt(cluster, number, 0, output / "calibration" / "checkpoint-4")
    cluster.call("scontrol", "requeue", number)
    cluster.wait(lambda: cluster.job(number)["Restarts"] == "1", "the second start")
    found = newest(output / "calibration")
    assert found is not None and 4 <= step_of(found) < 12

    halt(cluster, number, 1, output / "checkpoint-4")
    hours, minutes, _ = cluster.job(number)["RunTime"].split(":")
    limit = 60 * int(hours) + int(minutes) + 2  # between one minute from now and two: within the 120 s of the template
    cluster.call("scontrol", "update", f"JobId={number}", f"TimeLimit={limit}")
    cluster.wait(lambda: cluster.job(number)["Restarts"] == "2", "the third start")
    found = newest(output)
    assert found is not None and 4 <= step_of(found) < 24
    cluster.call("scontrol", "update", f"JobId={number}", "TimeLimit=60")

    job = cluster.finish(number)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "2"), cluster.log(number)
    for name in TICKET:
        assert (output / name).read_bytes() == (straight / name).read_bytes(), name
    log = cluster.log(number)
    assert log.count("stopped by SIGTERM") == 1 and log.count("stopped by SIGUSR1") == 1
    assert log.count("queued again") == 1  # SLURM itself did it the first time


# Ends with a status when both ranks are there. Like recipes that leave, it ignores what srun sends to the later one.
ENDING = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
met = pathlib.Path(sys.argv[1]) / (os.environ["SLURM_JOB_ID"] + "-" + os.environ.get("SLURM_RESTART_COUNT", "0"))
met.mkdir(exist_ok=True)
(met / os.environ["RANK"]).touch()
while len(list(met.iterdir())) < 2:
    time.sleep(0.01)
sys.exit(int(sys.argv[2]))
"""


def test_only_a_stop_is_queued_again(cluster: Cluster, tmp_path: Path) -> None:
    """What the job's shell does with each end of its ranks; a few lines of Python are the recipe here."""
    ending = ("-c", ENDING, str(tmp_path))
    fault = submit(cluster, *ending, "3")
    job = cluster.finish(fault)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "3:0", "0"), cluster.log(fault)

    dying = "import os, time; os.environ['RANK'] == '1' and os.kill(os.getpid(), 9); time.sleep(600)"
    killed = submit(cluster, "-c", dying)
    job = cluster.finish(killed, timeout=60)
    assert (job["JobState"], job["Restarts"]) == ("FAILED", "0"), cluster.log(killed)
    assert job["ExitCode"] == "143:0"  # the other rank's, by SIGTERM: srun gives the highest

    again = submit(cluster, *ending, "75", MAX_REQUEUES="1")
    job = cluster.finish(again)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "75:0", "1"), cluster.log(again)
    assert "not queued again after 1 times" in cluster.log(again)


@pytest.mark.slow
def test_a_chain(cluster: Cluster, world: Path, straight: Path, tmp_path: Path) -> None:
    """Calibrate, train, evaluate give the ticket of the one job; what is complete is not repeated."""
    config = yaml.safe_load((ROOT / "recipes/configs/demo.yaml").read_text(encoding="utf-8"))
    words = main_job(world, tmp_path)[5:]
    config |= {name.removeprefix("--"): yaml.safe_load(value) for name, value in zip(words[::2], words[1::2])}
    config["eval_file"] = str(world / "test.jsonl")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    out = tmp_path / "chain"

    def chain() -> dict[str, str]:
        where = f"--output={cluster.folder}/%x-%j.log"
        said = cluster.call(
            *("recipes/slurm/chain.sh", str(tmp_path / "config.yaml"), str(out), where, *SIZES),
            JOB=MULTI_NODE,
            EVALUATE_SBATCH=f"--gpus-per-node=0 --cpus-per-task=1 {where}",
            EVALUATE_OPTIONS="--metrics loss",
        )
        return dict(line.split(": ", 1) for line in said.splitlines())

    jobs = {name: text.removeprefix("job ") for name, text in chain().items()}
    for name in ("calibrate", "train", "evaluate"):
        assert cluster.finish(jobs[name])["JobState"] == "COMPLETED", cluster.log(jobs[name])
    assert (out / "train" / TICKET[0]).read_bytes() == (straight / TICKET[0]).read_bytes()
    assert (out / "evaluation.json").is_file()
    repeated = chain()
    assert repeated["calibrate"].startswith("done") and repeated["train"].startswith("done")
    cluster.call("scancel", repeated["evaluate"].removeprefix("job "))
