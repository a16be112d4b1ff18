"""vLLM's control plane over HTTP: the routes of its development mode."""

from __future__ import annotations

import http.client
import json
import re
import urllib.error
import urllib.parse
import urllib.request
from contextlib import suppress
from typing import Any

START = (
    'start it with VLLM_SERVER_DEV_MODE=1 and --weight-transfer-config \'{"backend": "lota"}\', in an environment '
    "that has lota (docs/serving.md)"
)


_OF_WORKER = re.compile(r"failed with error '(.*)', please check the stack trace", re.DOTALL)


class Refused(ValueError):
    """The server did not do what it was asked, and its reason."""


class Unreachable(ConnectionError):
    """There is no server, or it ended while it was asked."""


class Server:
    """A running server. url: like http://127.0.0.1:8000. timeout: seconds to wait for each answer, of which a pause
    waits for the requests that are running."""

    def __init__(self, url: str, *, timeout: float = 600.0) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ValueError(f"expected the address of a server, like http://127.0.0.1:8000, got {url!r}")
        self.url, self.timeout = f"{parts.scheme}://{parts.netloc}{parts.path}".rstrip("/"), timeout

    def start(self) -> None:
        self.post("start_weight_update", {})

    def update(self, update_info: dict[str, Any]) -> None:
        self.post("update_weights", {"update_info": update_info})

    def finish(self, version: str | None) -> None:
        self.post("finish_weight_update", {"weight_version": version})

    def pause(self) -> None:
        self.post("pause?mode=wait&clear_cache=true", {})

    def resume(self) -> None:
        self.post("resume", {})

    def version(self) -> str:
        return str(self.get("weight_info")["weight_version"])

    def is_paused(self) -> bool:
        return bool(self.get("is_paused")["is_paused"])

    def get(self, route: str) -> Any:
        """The JSON that a route answers."""
        return self._ask(urllib.request.Request(f"{self.url}/{route}"))

    def post(self, route: str, body: dict[str, Any]) -> Any:
        """The same, for what is sent to it."""
        content = json.dumps(body).encode()
        return self._ask(urllib.request.Request(f"{self.url}/{route}", content, {"Content-Type": "application/json"}))

    def _ask(self, request: urllib.request.Request) -> Any:
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                return json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            raise Refused(self._reason(error)) from None
        except TimeoutError:
            raise Refused(f"{self.url} gave no answer in {self.timeout:g} s: are long requests running?") from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise Unreachable(f"{self.url}: no server there, or it ended ({reason}): {START}") from None

    def _reason(self, error: urllib.error.HTTPError) -> str:
        """What a refusal says, without what vLLM puts around an exception of a worker."""
        if error.code in (404, 405, 501):
            return f"{self.url} is no vLLM server in development mode: {START}"
        text = error.read().decode("utf-8", "replace")
        with suppress(ValueError, KeyError, TypeError):
            text = str(json.loads(text)["error"]["message"])
        found = _OF_WORKER.search(text)
        reason = found[1] if found else text
        if "not configured" in reason or "init_info" in reason:
            return f"{self.url} has no backend that switches tickets ({reason}): {START}"
        if "already active" in reason:
            return f"{self.url}: another program switches it now, or began to and ended: wait, or use --take-over"
        return f"{self.url}: {reason}"
