"""Whatever is at an address instead of a server that switches, the command reports it in one line and ends with 2."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from lota.cli import main
from lota.serve import OfflineServer, Refused, Server, ServerBroken, Status, status, switch


class _Page(BaseHTTPRequestHandler):
    """A web server of another kind."""

    def do_GET(self) -> None:
        self.send_error(404)

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def website() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Page) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def hanging_up() -> Iterator[str]:
    """Takes connections and ends them in the middle of the answer."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(1000)
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def last_line(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["serve", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err


def test_nobody_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    for words in ([], ["--base"], ["ticket"]):
        assert "no server there, or it ended" in last_line(capsys, address, *words)


def test_something_else_is_there(website: str, hanging_up: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no vLLM server in development mode" in last_line(capsys, website)
    assert "VLLM_SERVER_DEV_MODE=1" in last_line(capsys, website, "--base")
    assert "no server there, or it ended" in last_line(capsys, hanging_up)


def test_odd_words(capsys: pytest.CaptureFixture[str]) -> None:
    for address in ("127.0.0.1:8000", "ftp://host", "http://", "file:///etc/passwd"):
        assert "expected the address of a server" in last_line(capsys, address)
    assert "expected tickets or --base, got both" in last_line(capsys, "http://127.0.0.1:1", "ticket", "--base")


class _Version(OfflineServer):
    def __init__(self, version: str) -> None:
        self._version = version

    def version(self) -> str:
        return self._version


def test_versions_of_any_origin() -> None:
    assert status(_Version("default")) == Status((), "refuse", "default")
    assert status(_Version('{"tickets": ["a"], "rule": "sum"}')).tickets == ("a",)
    for other in ("step-12", "[1]", "{}", '{"tickets": 3, "rule": 1}', "null", ""):
        assert status(_Version(other)) == Status(None, "refuse", other)


def test_errors_have_a_kind() -> None:
    assert issubclass(Refused, ValueError)
    with pytest.raises(ValueError, match="address"):
        Server("localhost")


class _Calls:
    """Notes the calls that it gets, and refuses some of them, by how often they were made."""

    def __init__(self, *refused: tuple[str, int], error: type[BaseException] = Refused) -> None:
        self.calls: list[str] = []
        self._refused, self._error = refused, error

    def _note(self, call: str) -> None:
        self.calls.append(call)
        if (call, self.calls.count(call)) in self._refused:
            raise self._error(f"{call} failed")

    def start(self) -> None:
        self._note("start")

    def update(self, update_info: dict[str, Any]) -> None:
        self._note(update_info["step"])

    def finish(self, version: str | None) -> None:
        self._note("finish" if version else "end")

    def pause(self) -> None:
        self._note("pause")

    def resume(self) -> None:
        self._note("resume")

    def version(self) -> str:
        return "default"

    def is_paused(self) -> bool:
        return False


DONE = ["start", "prepare", "pause", "switch", "finish", "resume"]
BASE = ["end", "start", "prepare", "switch", "finish", "resume"]


def test_the_order_of_a_switch() -> None:
    server = _Calls()
    found = switch(server, ["a", "b"], rule="sum")
    assert server.calls == DONE and found.tickets == ("a", "b") and found.rule == "sum"
    assert status(_Version(found.version)).tickets == ("a", "b")
    taking = _Calls()
    switch(taking, [], take_over=True)
    assert taking.calls == ["end", *DONE]


@pytest.mark.parametrize("error", [Refused, KeyboardInterrupt])
@pytest.mark.parametrize(("call", "num_done"), [("prepare", 2), ("pause", 3)])
def test_what_fails_before_the_switch_leaves_the_server_running(
    call: str, num_done: int, error: type[BaseException]
) -> None:
    server = _Calls((call, 1), error=error)
    with pytest.raises(error, match=call):
        switch(server, ["a"])
    assert server.calls == [*DONE[:num_done], "end", "resume"]


@pytest.mark.parametrize("error", [Refused, KeyboardInterrupt])
def test_a_switch_that_fails_puts_the_base_back(error: type[BaseException]) -> None:
    """An interrupt too: the server may have switched all the same."""
    server = _Calls(("switch", 1), error=error)
    with pytest.raises(error, match="switch"):
        switch(server, ["a"])
    assert server.calls == [*DONE[:4], *BASE]


def test_a_base_that_does_not_come_back_leaves_the_server_paused() -> None:
    server = _Calls(("switch", 1), ("switch", 2))
    with pytest.raises(ServerBroken, match="stays paused"):
        switch(server, ["a"])
    assert server.calls == [*DONE[:4], *BASE[:4]]


def test_a_broken_server_has_an_exit_status_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lota.serve.Server", lambda *_, **__: _Calls(("switch", 1), ("switch", 2)))
    assert main(["serve", "http://127.0.0.1:1", "--base"]) == 3
    assert "stays paused" in capsys.readouterr().err
