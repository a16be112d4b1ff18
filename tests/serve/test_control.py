"""Whatever is at an address instead of a server that switches, the command reports it in one line and ends with 2."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lota.cli import main
from lota.serve import OfflineServer, Refused, Server, Status, status


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
