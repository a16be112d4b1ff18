"""A pytest plugin that writes every test's outcome as it ends, leaves out tests that ran already, and keeps a deadline.

`python -m pytest -p benchmarks.gpu.pytest_rows`, with the settings as JSON in LOTA_PYTEST_ROWS. A line says that a test
began (its outcome is null), or how it ended: what crashes the process is known by the test that has only begun.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

VARIABLE = "LOTA_PYTEST_ROWS"
_LOST = ("illegal memory access", "device-side assert", "unspecified launch failure", "misaligned address")


class Rows:
    """The plugin. settings: `file`, and `seconds` that it may take."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._file = Path(settings["file"])
        self._deadline = time.monotonic() + settings["seconds"]
        self._done = set(read(self._file))
        self._session: Any = None

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self._session = session

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        again = [item for item in items if item.nodeid in self._done]
        items[:] = [item for item in items if item.nodeid not in self._done]
        config.hook.pytest_deselected(items=again)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._write({"test": nodeid, "outcome": None})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            text = "" if report.passed else report.longreprtext
            self._write({"test": report.nodeid, "outcome": report.outcome, "text": text[-1500:]})
            if report.failed and any(words in text for words in _LOST):
                self._session.shouldstop = "the device is lost to this process"
        if time.monotonic() > self._deadline:
            self._session.shouldstop = "no time is left"

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            is_missing = "ModuleNotFoundError" in report.longreprtext  # a package that this machine does without
            outcome = "not collected" if is_missing else "failed"
            self._write({"test": report.nodeid, "outcome": outcome, "text": report.longreprtext[-1500:]})

    def _write(self, line: dict[str, Any]) -> None:
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The last line of every test that began."""
    found: dict[str, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if found.get(row["test"], {}).get("outcome") != "failed":  # a failure stays one, whatever its teardown does
            found[row["test"]] = row
    return found


def pytest_configure(config: pytest.Config) -> None:
    if VARIABLE in os.environ:
        config.pluginmanager.register(Rows(json.loads(os.environ[VARIABLE])))
