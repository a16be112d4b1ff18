"""Two hosts, started as users start them: `deepspeed --hostfile hosts recipes/train_lota.py`, by pdsh over ssh.

Same ticket, bit for bit, as two ranks of one host; a host's rank that is killed ends the job everywhere.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from lota.run.checkpoints import is_complete
from tests.cluster.hosts import ROOT, SSH_PORT, Host, missing, two_hosts
from tests.train.test_end_to_end import command_of, succeed, world

__all__ = ["world"]  # a fixture of this module, too

pytestmark = pytest.mark.skipif(bool(missing()), reason=f"no two hosts: {missing()}")
OPTIONS = (
    *("--calibration_steps", "2", "--max_steps", "12", "--save_steps", "3", "--logging_steps", "1"),
    *("--save_strategy", "steps", "--merged", "false"),
)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Host, Host]]:
    with two_hosts(tmp_path_factory.mktemp("hosts")) as pair:
        yield pair


class Job:
    """A launch by hostfile from node-a, while it runs and after."""

    def __init__(
        self, folder: Path, on: Host, command: list[str], hostfile: str = "node-a slots=1\nnode-b slots=1\n"
    ) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "hostfile").write_text(hostfile)
        (folder / "deepspeed_env").write_text("OMP_NUM_THREADS=1\nHF_HUB_OFFLINE=1\nGLOO_SOCKET_IFNAME=eth0\n")
        at = command.index("--num_gpus")
        command[at : at + 2] = ["--hostfile", str(folder / "hostfile"), "--ssh_port", str(SSH_PORT)]
        self.log = folder / "log"
        environment = os.environ | {"DS_ENV_FILE": str(folder / "deepspeed_env")}
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                on.command(command), cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
            )

    def wait(self, seconds: float) -> tuple[int, str]:
        """Exit status and all that was written; TimeoutExpired where it takes longer."""
        status = self.process.wait(seconds)
        return status, self.log.read_text(errors="replace")


def test_the_main_job(hosts: tuple[Host, Host], world: Path, one_host: Path, tmp_path: Path) -> None:
    before = [host.bytes_sent() for host in hosts]
    status, said = Job(tmp_path, hosts[0], command_of("train_lota.py", world, tmp_path / "run", *OPTIONS)).wait(600)
    assert status == 0, said[-6000:]
    assert "node-a: [lota] done" in said and "node-b: [" in said
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    # Each host needs the other's half of the weights in every step, in bf16: at least that went over the cable.
    half = 2 * summary["mask"]["eligible"] // 2
    sent = [host.bytes_sent() - was for host, was in zip(hosts, before)]
    assert min(sent) > 12 * half, (sent, half)
    for name in ("ticket.safetensors", "ticket.json"):
        assert (tmp_path / "run" / "ticket" / name).read_bytes() == (one_host / "ticket" / name).read_bytes(), name


@pytest.fixture(scope="module")
def one_host(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the same job leaves behind on two ranks of this machine."""
    folder = tmp_path_factory.mktemp("one_host") / "run"
    succeed("train_lota.py", world, folder, *OPTIONS)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1], ids=["node-a", "node-b"])
def test_a_rank_that_is_killed(
    hosts: tuple[Host, Host], world: Path, one_host: Path, tmp_path: Path, victim: int
) -> None:
    """The job ends on both hosts, says where it began, and resumes from its checkpoint to the same ticket."""
    command = command_of("train_lota.py", world, tmp_path / "run", *OPTIONS, "--resume_from_checkpoint", "true")
    job = Job(tmp_path, hosts[0], list(command))
    deadline = time.monotonic() + 300
    while not (tmp_path / "run" / "checkpoint-3").exists():
        assert job.process.poll() is None and time.monotonic() < deadline, job.log.read_text()[-6000:]
        time.sleep(0.05)
    (rank,) = hosts[victim].processes("recipes/train_lota.py")
    rank.kill()
    status, said = job.wait(60)
    assert status not in (0, None), said[-6000:]
    name = hosts[victim].name
    assert "exits with return code = -9" in "".join(x for x in said.splitlines() if x.startswith(f"{name}: "))
    assert f"{name}: ssh exited with exit code" in said
    assert re.search(rf"\[lota\] rank {victim} \(process \d+ on {name}\) ended without an error", said), said[-6000:]
    assert not any(host.processes("recipes/train_lota.py") for host in hosts)
    assert not (tmp_path / "run" / "summary.json").exists()

    status, said = Job(tmp_path, hosts[0], list(command)).wait(600)
    assert status == 0, said[-6000:]
    assert "resuming from" in said
    for file in ("ticket.safetensors", "ticket.json"):
        assert (tmp_path / "run" / "ticket" / file).read_bytes() == (one_host / "ticket" / file).read_bytes(), file


@pytest.mark.slow
def test_the_command_is_asked_to_stop(hosts: tuple[Host, Host], world: Path, tmp_path: Path) -> None:
    """DeepSpeed ends pdsh, and with it all output, before the ranks; they save a checkpoint nevertheless."""
    long = ("--max_steps", "5000", "--save_steps", "1000")
    job = Job(tmp_path, hosts[0], command_of("train_lota.py", world, tmp_path / "run", *OPTIONS, *long))
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not metrics.exists() or '"train"' not in metrics.read_text():
        assert job.process.poll() is None and time.monotonic() < deadline, job.log.read_text()[-6000:]
        time.sleep(0.05)
    (command,) = psutil.Process(job.process.pid).children()
    command.terminate()
    assert job.wait(60)[0] == 1  # DeepSpeed's
    deadline = time.monotonic() + 40
    while any(host.processes("recipes/train_lota.py") for host in hosts):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert is_complete(next((tmp_path / "run").glob("checkpoint-*")))


@pytest.mark.slow
def test_a_cable_that_is_cut(hosts: tuple[Host, Host], world: Path, tmp_path: Path) -> None:
    """No connection is closed then: the ranks of both hosts notice the silence, and so does ssh, as it is set here."""
    job = Job(tmp_path, hosts[0], command_of("train_lota.py", world, tmp_path / "run", *OPTIONS, "--max_steps", "5000"))
    deadline = time.monotonic() + 300
    while not (tmp_path / "run" / "checkpoint-3").exists():
        assert job.process.poll() is None and time.monotonic() < deadline, job.log.read_text()[-6000:]
        time.sleep(0.05)
    hosts[1].run("ip", "link", "set", "eth0", "down")
    try:
        status, said = job.wait(100)
        deadline = time.monotonic() + 30
        while any(host.processes("recipes/train_lota.py") for host in hosts):
            assert time.monotonic() < deadline
            time.sleep(0.5)
    finally:
        hosts[1].run("ip", "link", "set", "eth0", "up")
    assert status != 0
    assert "node-b: ssh exited with exit code 255" in said
    assert re.search(r"\[lota\] rank 1 \(process \d+ on node-b\) ended without an error", said), said[-6000:]


def test_a_disk_that_is_not_shared(hosts: tuple[Host, Host], world: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    hosts[1].run("mount", "-t", "tmpfs", "tmpfs", str(tmp_path / "disk"))  # node-b sees one of its own there
    impatient = tmp_path / "impatient.py"
    lines = ("from lota.ranks import agree", "from lota.train import job", "agree.PATIENCE_SECONDS = 1", "job.main()")
    impatient.write_text("\n".join(lines) + "\n")
    command = command_of("train_lota.py", world, tmp_path / "disk" / "run", *OPTIONS)
    command[command.index("recipes/train_lota.py")] = str(impatient)
    status, said = Job(tmp_path, hosts[0], command).wait(600)
    assert status != 0
    refusal = "is not one folder for all ranks: rank 1 (node-b) of 2 ranks saw nothing of what rank 0 (node-a) wrote"
    assert all(refusal in "".join(x for x in said.splitlines() if x.startswith(f"{h.name}: ")) for h in hosts), said
    assert not list((tmp_path / "disk" / "run").iterdir())


def test_a_host_that_cannot_be_reached(hosts: tuple[Host, Host], world: Path, tmp_path: Path) -> None:
    command = command_of("train_lota.py", world, tmp_path / "run", *OPTIONS)
    job = Job(tmp_path, hosts[0], command, hostfile="node-c slots=1\nnode-a slots=1\n")
    status, said = job.wait(60)
    assert status != 0 and "host=node-c was not reachable via ssh" in said, said
