"""Two hosts on one machine, for tests: names, addresses, process ids and shared memory of their own, joined by a cable
(a veth pair), an sshd on each. They share the disk, as hosts of a cluster do.

Each host is a process in namespaces of its own. Nothing outside them is touched, and when that process ends, everything
that runs on the host ends with it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

SSH_PORT = 2222
ROOT = Path(__file__).resolve().parents[2]
_NAMESPACES = ("--mount", "--net", "--uts", "--ipc", "--pid")
# /etc and /dev/shm are covered in the host's own mount namespace only; sshd wants an empty folder of root's.
_BOOT = """
set -e
hostname "$NAME"
mount --bind "$FOLDER/$NAME.hosts" /etc/hosts
mount --bind "$FOLDER/ssh_config" /etc/ssh/ssh_config
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir -m 755 /run/sshd
ip link set lo up
echo ready
exec "$SSHD" -D -e -f "$FOLDER/sshd_config"
"""


@dataclass(frozen=True)
class Host:
    """One of them, running. init: the first process of its namespaces."""

    name: str
    address: str
    init: psutil.Process

    def command(self, words: Sequence[str]) -> list[str]:
        """The command that runs `words` on this host, in the checkout."""
        return ["nsenter", "--target", str(self.init.pid), *_NAMESPACES, f"--wd={ROOT}", *words]

    def run(self, *words: str) -> str:
        """What a short command writes."""
        command, environment = self.command(words), _environment()
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, (words, done.stderr)
        return done.stdout

    def bytes_sent(self) -> int:
        """Bytes that left this host over the cable."""
        (link,) = json.loads(self.run("ip", "-json", "-stats", "link", "show", "eth0"))
        return int(link["stats64"]["tx"]["bytes"])

    def processes(self, script: str) -> list[psutil.Process]:
        """The ranks on this host: the processes that run `script` themselves."""
        found = []
        for process in self.init.children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if process.cmdline()[2:3] == [script]:
                    found.append(process)
        return found


def missing() -> str:
    """Why this machine cannot have hosts; empty where it can."""
    if os.geteuid() != 0:
        return "namespaces and an sshd in them need root"
    tools = {
        "ip": "iproute2",
        "pdsh": "pdsh",
        "ssh": "openssh-client",
        "sshd": "openssh-server",
        "unshare": "util-linux",
    }
    absent = [package for tool, package in tools.items() if shutil.which(tool, path=_path()) is None]
    if absent:
        return f"not installed: {', '.join(absent)}"
    attempt = "mount -t tmpfs tmpfs /run && ip link add name cable type veth"
    command = ["unshare", *_NAMESPACES, "--fork", "--mount-proc", "sh", "-c", attempt]
    tried = subprocess.run(command, env=_environment(), capture_output=True, text=True, check=False)
    return f"namespaces are not permitted here: {tried.stderr.strip()}" if tried.returncode else ""


@contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """node-a and node-b, each reachable from the other by ssh without a password; keys and logs in `folder`."""
    names = {"node-a": "10.77.0.1", "node-b": "10.77.0.2"}
    _write_settings(folder, names)
    boot = ["unshare", *_NAMESPACES, "--fork", "--kill-child", "--mount-proc", "sh", "-c", _BOOT]
    hosts, holders = [], []
    try:
        for name, address in names.items():
            with open(folder / f"{name}.log", "w") as log:
                environment = _environment(NAME=name, FOLDER=str(folder), SSHD=str(shutil.which("sshd", path=_path())))
                holder = subprocess.Popen(boot, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
            holders.append(holder)
            assert holder.stdout is not None
            assert holder.stdout.readline() == "ready\n", (folder / f"{name}.log").read_text()
            hosts.append(Host(name, address, psutil.Process(holder.pid).children()[0]))
        a, b = hosts
        cable = ("netns", str(a.init.pid), "type", "veth", "peer", "name", "eth0", "netns", str(b.init.pid))
        subprocess.run(["ip", "link", "add", "eth0", *cable], env=_environment(), check=True)
        for host in hosts:
            host.run("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
            host.run("ip", "link", "set", "eth0", "up")
        for host in hosts:
            _wait_for_ssh(a, host)
        yield a, b
    finally:
        for holder in holders:
            for process in psutil.Process(holder.pid).children():
                process.kill()  # the first process of a host takes all others with it
            holder.kill()
            holder.wait()


def _write_settings(folder: Path, names: dict[str, str]) -> None:
    for key in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
    shutil.copy(folder / "user_key.pub", folder / "authorized_keys")
    host_key = (folder / "host_key.pub").read_text()
    (folder / "known_hosts").write_text("".join(f"[{name}]:{SSH_PORT} {host_key}" for name in names))
    for own in names:  # Debian gives a host's own name such an address, which no other host can reach
        seen = names | {"localhost": "127.0.0.1", own: "127.0.1.1"}
        (folder / f"{own}.hosts").write_text("".join(f"{address} {name}\n" for name, address in seen.items()))
    (folder / "ssh_config").write_text(
        f"IdentityFile {folder}/user_key\nUserKnownHostsFile {folder}/known_hosts\nBatchMode yes\n"
        "ConnectTimeout 5\nServerAliveInterval 10\nServerAliveCountMax 3\n"
    )
    (folder / "sshd_config").write_text(
        f"Port {SSH_PORT}\nHostKey {folder}/host_key\nAuthorizedKeysFile {folder}/authorized_keys\nPidFile none\n"
        "PermitRootLogin prohibit-password\nPasswordAuthentication no\nUsePAM no\nStrictModes no\nUseDNS no\n"
    )


def _wait_for_ssh(a: Host, host: Host) -> None:
    deadline = time.monotonic() + 30
    command = a.command(["ssh", "-p", str(SSH_PORT), host.name, "hostname"])
    while (done := subprocess.run(command, capture_output=True, text=True, check=False)).stdout != f"{host.name}\n":
        assert time.monotonic() < deadline, done.stderr
        time.sleep(0.2)


def _environment(**more: str) -> dict[str, str]:
    return os.environ | {"PATH": _path()} | more


def _path() -> str:
    """sshd and ip are where a user's PATH may not look."""
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
