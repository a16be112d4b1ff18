"""A SLURM cluster of two nodes on this machine, from the distribution's packages: its daemons, its files, its end.

Nothing outside a temporary folder is written, and no daemon of the system is used: munge has its own key and socket.
The nodes are named by addresses of the loopback device, which every machine can resolve.
"""

from __future__ import annotations

import getpass
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
NODES = ("127.0.0.1", "127.0.0.2")
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "squeue", "scancel")
# Debian keeps daemons where only root's PATH looks.
PATH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))

# A requeued job waits for cred_expire before it starts again; 5 s is the least that SLURM takes, 120 its default.
_CONFIGURATION = """\
ClusterName=lota
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SlurmctldDebug=debug
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0
MpiDefault=none
ReturnToService=2
MailProg=/bin/true
NodeName={nodes[0]} Port={ports[1]} CPUs=2
NodeName={nodes[1]} Port={ports[2]} CPUs=2
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class CannotStart(Exception):
    """Why there is no cluster here."""


class Cluster:
    """Two nodes that take jobs until `close()`. CannotStart where packages are missing or a daemon does not come up."""

    def __init__(self) -> None:
        missing = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
        if missing:
            raise CannotStart(f"{', '.join(missing)} not found: install slurm-wlm and munge")
        self.folder = Path(tempfile.mkdtemp(prefix="lota-slurm-"))
        self._daemons: list[subprocess.Popen[bytes]] = []
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(256))
        (self.folder / "slurm.conf").write_text(
            _CONFIGURATION.format(folder=self.folder, user=getpass.getuser(), nodes=NODES, ports=_free_ports(3)),
            encoding="utf-8",
        )
        names = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munge.pid"}
        names |= {"log-file": "munge.log", "seed-file": "munge.seed"}
        self._daemon("munged", "--foreground", "--force", *(f"--{k}={self.folder / v}" for k, v in names.items()))
        self._until("munged is up", lambda: (self.folder / "munge.socket").exists())
        self._daemon("slurmctld", "-D")
        for node in NODES:
            (self.folder / node).mkdir()
            self._daemon("slurmd", "-D", "-N", node)
        idle = "\n".join(NODES)
        self._until("both nodes are idle", lambda: self._ask("sinfo", "-N", "-h", "-o", "%N", "-t", "idle") == idle)

    def _daemon(self, *command: str) -> None:
        with open(self.folder / f"{command[0]}.out", "ab") as out:
            started = subprocess.Popen(
                command,
                env=self.environment(),
                stdout=out,
                stderr=out,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._daemons.append(started)

    def _until(self, what: str, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not holds():
            ended = [daemon.args for daemon in self._daemons if daemon.poll() is not None]
            if ended or time.monotonic() > deadline:
                logs = {path.name: path.read_text(errors="replace")[-1500:] for path in self.folder.glob("*.out")}
                raise CannotStart(f"not so that {what}; ended: {ended}; {logs}")
            time.sleep(0.1)

    def environment(self) -> dict[str, str]:
        """What the cluster's commands need."""
        return os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": PATH}

    def _ask(self, *command: str) -> str:
        done = subprocess.run(command, env=self.environment(), capture_output=True, text=True, timeout=60, check=False)
        return done.stdout.strip()

    def call(self, *command: str, **environment: str) -> str:
        """A command in the repository, with the recipes' interpreter first in PATH; its output. It has to succeed."""
        known = self.environment()
        known["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), known["PATH"]))
        known |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment
        done = subprocess.run(command, cwd=ROOT, env=known, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says: JobState, ExitCode, Restarts ..."""
        words = self.call("scontrol", "show", "job", "--oneliner", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def finish(self, number: str, timeout: float = 400) -> dict[str, str]:
        """The job when it will not run again."""
        self.wait(lambda: self.job(number)["JobState"] not in _UNFINISHED, f"job {number} to end", timeout)
        return self.job(number)

    def wait(self, holds: Callable[[], object], what: str, timeout: float = 300, interval: float = 0.5) -> None:
        """Until `holds()`, asked every `interval` seconds; AssertionError with all logs where it never does."""
        deadline = time.monotonic() + timeout
        while not holds():
            assert time.monotonic() < deadline, f"waited {timeout} s for {what}: {self.logs()}"
            time.sleep(interval)

    def ranks(self, number: str, start: int) -> list[psutil.Process]:
        """The processes of a job that are ranks; start: how often the job had been queued again."""
        wanted = {"SLURM_JOB_ID": number, "SLURM_CONF": self.conf}
        return [
            process
            for process, known in _environments()
            if "RANK" in known and known.items() >= wanted.items() and int(known.get("SLURM_RESTART_COUNT", 0)) == start
        ]

    @property
    def conf(self) -> str:
        return str(self.folder / "slurm.conf")

    def log(self, number: str) -> str:
        """What a job printed."""
        return "".join(path.read_text(errors="replace") for path in self.folder.glob(f"*-{number}.log"))

    def logs(self) -> str:
        return "\n".join(
            f"{path.name}: {path.read_text(errors='replace')[-4000:]}" for path in self.folder.glob("*.log")
        )

    def close(self) -> None:
        """End jobs and daemons, remove the folder."""
        if len(self._daemons) > 1:
            self._ask("scancel", "--full", "--signal=KILL", "--me")
        for daemon in reversed(self._daemons):
            daemon.terminate()
        left = [process for process, known in _environments() if known.get("SLURM_CONF") == self.conf]
        _, alive = psutil.wait_procs(left, 5)
        for process in alive:
            process.kill()
        for daemon in self._daemons:
            daemon.wait(10)
        shutil.rmtree(self.folder, ignore_errors=True)


_UNFINISHED = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "SUSPENDED")


def _environments() -> Iterator[tuple[psutil.Process, dict[str, str]]]:
    """Every process, with its environment where that can be read."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            yield process, process.environ()


def _free_ports(number: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports
