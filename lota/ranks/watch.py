"""Every rank of a job learns at once when another has ended, and why, whatever it is doing and whoever started it.

Collectives tell it late, or never: gloo raises in the next one, NCCL waits for minutes, and a rank that was killed
leaves no word. Here each rank holds a TCP connection to rank 0, which its kernel closes when the process ends, however
that happens. A thread waits for that, says what happened and ends the process, if nothing else does, after `GRACE`
seconds. A host that vanishes from the network closes nothing: keepalive notices it within a minute.
"""

from __future__ import annotations

import faulthandler
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

GRACE = 15.0
"""Seconds that the ranks which are left have to end by themselves, by the error of a collective or their caller's."""

_CONNECT_TIMEOUT = 30.0
_OWN_ERROR_FIRST = 2.0  # if all ranks fail the same way, let rank 0 report first
_KEEPALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 5}  # silence of 15 + 5 * 5 s is an end


@dataclass
class Ended:
    """A rank that ended too early. reason: its last words, empty where it left none."""

    rank: int
    where: str
    reason: str

    def __str__(self) -> str:
        who = f"rank {self.rank} ({self.where})"
        if self.reason:
            return f"{who} failed: {self.reason}"
        return f"{who} ended without an error message (killed, out of memory, or its host is gone)"


@dataclass
class _Peer:
    rank: int
    where: str
    line: bytes = b""
    words: dict[str, Any] = field(default_factory=dict)


class RankWatch:
    """Watches all ranks of the world. Collective to make; one per process.

    advice: what to do then, said after what happened.
    """

    def __init__(self, advice: str = "") -> None:
        self.ended: Ended | None = None
        self._advice, self._rank = advice, dist.get_rank()
        self._has_ended, self._lock = threading.Event(), threading.Lock()
        self._said: set[str] = set()
        self._sockets: dict[socket.socket, _Peer] = {}
        self._is_over = False
        if dist.get_world_size() == 1:
            return
        if self._rank == 0:
            self._meet_all()
        else:
            self._meet_first()
        os.register_at_fork(after_in_child=self._close)
        threading.Thread(target=self._watch, name="lota-rank-watch", daemon=True).start()

    def leave(self) -> None:
        """This rank is done, and may end before the others."""
        self._tell({"done": True})

    def fail(self, reason: str, text: str) -> None:
        """This rank ends by an error: rank 0 prints `text`, the others get to hear the reason, of which rank 0 tells.
        The process ends after `GRACE` seconds, if its own way out takes longer."""
        if self._rank == 0:
            self._say_once(reason, text)
        self._tell({"failed": reason})
        if self._sockets:
            _end_after_grace()

    def wait_for_end(self, seconds: float) -> Ended | None:
        """The rank that ended first, if one does within this time, after rank 0 has said so. A broken collective is
        noticed before its cause is known."""
        if self._sockets:
            self._has_ended.wait(seconds)
        if self.ended is not None:
            self._say_end()
        return self.ended

    def _say_end(self) -> None:
        ended = self.ended
        assert ended is not None
        if self._rank == 0 or (self._rank == 1 and ended.rank == 0 and not ended.reason):
            self._say_once(ended.reason or "ended", f"{ended}. This job ends.{self._advice}")

    def _say_once(self, reason: str, text: str) -> None:
        """If all ranks fail the same way, rank 0 reports it once."""
        with self._lock:
            is_new = reason not in self._said
            self._said.add(reason)
        if is_new:
            print(f"[lota] {text}", file=sys.stderr, flush=True)

    def _tell(self, words: dict[str, Any]) -> None:
        self._is_over = True
        for connection in list(self._sockets):
            _send(connection, words)

    def _close(self) -> None:
        """In a forked child, which would keep the connection open when its parent is gone."""
        for connection in self._sockets:
            connection.close()

    def _meet_all(self) -> None:
        """Rank 0: accept a connection of every other rank. Others that come by do not know the token and are left."""
        listener = socket.create_server(("", 0), backlog=dist.get_world_size())
        token = secrets.token_hex(16)
        dist.broadcast_object_list([(_address(), listener.getsockname()[1], token, _where())], src=0)
        waiting = set(range(1, dist.get_world_size()))
        deadline = time.monotonic() + _CONNECT_TIMEOUT
        while waiting and (left := deadline - time.monotonic()) > 0:
            listener.settimeout(left)
            try:
                connection, _ = listener.accept()
                connection.settimeout(5.0)
                hello = json.loads(_read_line(connection))
            except (OSError, ValueError):
                continue
            if not isinstance(hello, dict) or hello.get("token") != token or hello.get("rank") not in waiting:
                connection.close()
                continue
            waiting.discard(hello["rank"])
            _prepare(connection)
            self._sockets[connection] = _Peer(hello["rank"], hello["where"])
            _send(connection, {"welcome": True})
        listener.close()
        if waiting:
            ranks = ", ".join(map(str, sorted(waiting)[:8]))
            print(f"[lota] ranks {ranks} cannot be reached: only collectives will notice when they end", flush=True)

    def _meet_first(self) -> None:
        box: list[Any] = [None]
        dist.broadcast_object_list(box, src=0)
        address, port, token, where_first = box[0]
        try:
            connection = socket.create_connection((address, port), timeout=_CONNECT_TIMEOUT)
        except OSError as error:
            print(f"[lota] rank {self._rank} cannot reach rank 0 at {address}:{port} ({error})", flush=True)
            return
        _prepare(connection)
        _send(connection, {"token": token, "rank": self._rank, "where": _where()})
        self._sockets[connection] = _Peer(0, where_first)

    def _watch(self) -> None:
        selector = selectors.DefaultSelector()
        for known in self._sockets:
            selector.register(known, selectors.EVENT_READ)
        while selector.get_map():
            for key, _ in selector.select():
                connection: Any = key.fileobj
                peer = self._sockets[connection]
                try:
                    data = connection.recv(65536)
                except OSError:
                    data = b""
                peer.line += data
                while b"\n" in peer.line:
                    line, peer.line = peer.line.split(b"\n", 1)
                    peer.words |= json.loads(line)
                    if "about" in peer.words or "failed" in peer.words:
                        self._hear(peer)
                if not data:
                    selector.unregister(connection)
                    if self._rank > 0 and "welcome" not in peer.words:
                        print(f"[lota] rank {self._rank} cannot reach rank 0, which did not answer", flush=True)
                        continue
                    if not peer.words.get("done"):
                        self._hear(peer)

    def _hear(self, peer: _Peer) -> None:
        """A rank has ended too early. The first end counts; what follows is its consequence."""
        if self.ended is not None or self._is_over:
            return
        about = peer.words.get("about", {"rank": peer.rank, "where": peer.where})
        self.ended = Ended(about["rank"], about["where"], str(peer.words.get("failed", "")))
        if self._rank == 0:
            for connection in list(self._sockets):
                _send(connection, {"about": about, "failed": self.ended.reason})
        self._has_ended.set()
        _end_after_grace()
        if self.ended.reason:
            time.sleep(_OWN_ERROR_FIRST)
        self._say_end()


def _end_after_grace() -> None:
    """End this process with status 1 in a while; by a thread of C, because a collective may hold Python's lock."""
    try:
        silence = open(os.devnull, "w")  # noqa: SIM115 (open until the end)
        faulthandler.dump_traceback_later(GRACE, exit=True, file=silence)
    except (OSError, RuntimeError):
        os._exit(1)


def _address() -> str:
    """Where other ranks find this one: rank 0's address is what they all met at."""
    return os.environ.get("MASTER_ADDR") or socket.gethostname()


def _where() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _prepare(connection: socket.socket) -> None:
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _read_line(connection: socket.socket) -> bytes:
    """One line and not a byte more, of a peer that sends it within 5 s."""
    line, deadline = b"", time.monotonic() + 5.0
    while not line.endswith(b"\n") and len(line) < 4096 and time.monotonic() < deadline:
        byte = connection.recv(1)
        if not byte:
            break
        line += byte
    return line


def _send(connection: socket.socket, words: dict[str, Any]) -> None:
    with suppress(OSError):  # whoever is gone is noticed by the thread
        connection.sendall(json.dumps(words).encode() + b"\n")
