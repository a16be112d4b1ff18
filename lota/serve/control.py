"""The client of a server: a switch by vLLM's own calls, in the order that keeps every answer whole.

    prepare     the server reads and verifies the tickets
    pause       running requests end, new ones wait, the prefix cache is emptied
    switch      every rank writes
    finish      the server notes what is on it
    resume      the requests that waited are answered by the new model

So a request is answered by the model before the switch or by the one after it, never by both. A refusal comes before
the pause and leaves the server as it was. Only the standard library is needed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lota.serve.http import Refused

DEFAULT_VERSION = "default"
"""What vLLM calls the weights that it was started with."""


class ServerBroken(RuntimeError):
    """A switch ended half done, and so did putting the base back. The server stays paused and answers nothing."""


@dataclass(frozen=True)
class Status:
    """What is on a server. tickets: as the server knows them, none: the base; None: weights of another origin, which
    `version` names. seconds: of preparing and of the pause, where a switch was made."""

    tickets: tuple[str, ...] | None
    rule: str
    version: str
    is_paused: bool = False
    prepare_seconds: float | None = None
    pause_seconds: float | None = None


class Control(Protocol):
    """vLLM's calls. Refused, with the server's own words, where it does not do one."""

    def start(self) -> None: ...
    def update(self, update_info: dict[str, Any]) -> None: ...
    def finish(self, version: str | None) -> None: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def version(self) -> str: ...
    def is_paused(self) -> bool: ...


def switch(server: Control, tickets: Sequence[str], *, rule: str = "refuse", take_over: bool = False) -> Status:
    """Have exactly these tickets on the server; none: the base. Returns what is on it then.

    tickets: paths on the server's machine, or names on the hub. rule: for entries that several change, as in
    `lota.TicketSwitcher`. take_over: end an update that another client began and left open. Refused (a ValueError)
    where the server does not take them, and is as it was; or where writing failed, and it has its base again.
    ServerBroken where that failed too.
    """
    if take_over:
        _end(server)
    began = time.perf_counter()
    server.start()
    try:
        server.update({"step": "prepare", "tickets": list(tickets), "rule": rule})
        prepared = time.perf_counter()
        server.pause()
    except BaseException:
        _end(server)
        server.resume()
        raise
    try:
        server.update({"step": "switch"})
        version = _version(tickets, rule)
        server.finish(version)
    except BaseException as error:  # an interrupt too: the server may have done it all the same
        _put_base_back(server, error)
        raise
    server.resume()
    return Status(tuple(tickets), rule, version, False, prepared - began, time.perf_counter() - prepared)


def status(server: Control) -> Status:
    """What is on the server."""
    version, is_paused = server.version(), server.is_paused()
    if version == DEFAULT_VERSION:
        return Status((), "refuse", version, is_paused)
    try:
        known = json.loads(version)
        return Status(tuple(map(str, known["tickets"])), str(known["rule"]), version, is_paused)
    except (ValueError, KeyError, TypeError):
        return Status(None, "refuse", version, is_paused)


def as_server_knows(ticket: str) -> str:
    """The path of a ticket for the server: absolute where there is one on this machine, else as it is."""
    return str(Path(ticket).resolve()) if Path(ticket).exists() else ticket


def _version(tickets: Sequence[str], rule: str) -> str:
    return json.dumps({"tickets": list(tickets), "rule": rule})


def _end(server: Control) -> None:
    """End an update on every rank that has one open; what it had prepared is forgotten."""
    with suppress(Refused):
        server.finish(None)


def _put_base_back(server: Control, reason: BaseException) -> None:
    """After a switch that failed on some rank: the base on all, whatever each of them holds."""
    try:
        _end(server)
        server.start()
        server.update({"step": "prepare", "tickets": []})
        server.update({"step": "switch"})
        server.finish(_version([], "refuse"))
        server.resume()
    except Refused as error:
        raise ServerBroken(
            f"the switch failed ({reason}), and so did putting the base back ({error}): the server stays paused. "
            "Start it again"
        ) from reason


class OfflineServer:
    """The same calls for a `vllm.LLM` in this process, which answers nothing while they are made."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm

    def start(self) -> None:
        self._llm.start_weight_update()

    def update(self, update_info: dict[str, Any]) -> None:
        self._call(self._llm.update_weights, {"update_info": update_info})

    def finish(self, version: str | None) -> None:
        self._call(self._llm.finish_weight_update, version)

    def pause(self) -> None:
        if not self._llm.reset_prefix_cache():
            raise Refused("vLLM did not empty its prefix cache: requests are running")

    def resume(self) -> None:
        pass

    def version(self) -> str:
        return str(self._llm.get_weight_version())

    def is_paused(self) -> bool:
        return False

    @staticmethod
    def _call(method: Any, *words: Any) -> None:
        try:
            method(*words)
        except Exception as error:  # the engine's process sends whatever went wrong there
            raise Refused(str(error)) from error
