"""Processes that stay alive and do one run after another, which spares the imports of each; what they print is logged.

A worker ends with its parent, however that ends, and is replaced after `LIVES` runs, so that nothing that a run leaves
behind in a process adds up.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

from lota.study.jobs import Job

LIVES = 25


class Workers:
    """`count` workers. `start` gives a free one a job; `finished` waits for jobs to end."""

    def __init__(self, count: int) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._count = count
        self._idle: list[_Worker] = []
        self._busy: dict[Connection, _Worker] = {}

    @property
    def num_free(self) -> int:
        return self._count - len(self._busy)

    def start(self, job: Job) -> None:
        worker = self._idle.pop() if self._idle else _Worker(self._context)
        worker.job = job
        worker.pipe.send(job)
        self._busy[worker.pipe] = worker

    def finished(self, seconds: float | None = None) -> Iterator[tuple[Job, dict[str, Any]]]:
        """Waits until a job ends, or so many seconds; those that did, with their results. RuntimeError where one
        failed."""
        for pipe in wait(list(self._busy), seconds):
            assert isinstance(pipe, Connection)
            worker = self._busy.pop(pipe)
            assert worker.job is not None
            log = worker.job.folder / "log.txt"
            try:
                is_good, content = worker.pipe.recv()
            except EOFError:
                raise RuntimeError(f"{worker.job.name}: its process ended; what it printed is in {log}") from None
            if not is_good:
                raise RuntimeError(f"{worker.job.name} failed: {content}; what it printed is in {log}")
            worker.num_done += 1
            if worker.num_done < LIVES:
                self._idle.append(worker)
            else:
                worker.close()
            yield worker.job, content

    def close(self) -> None:
        """End all of them; jobs that are not done are lost."""
        for worker in [*self._idle, *self._busy.values()]:
            worker.close()
        self._idle, self._busy = [], {}


class _Worker:
    def __init__(self, context: Any) -> None:
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        self.job: Job | None = None
        self.num_done = 0

    def close(self) -> None:
        self.pipe.close()
        self._process.kill()
        self._process.join()


def _serve(pipe: Connection) -> None:
    """Runs in the worker: one job after another, what each prints in its own file."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.update(TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", TQDM_DISABLE="1")
    warnings.simplefilter("ignore")
    from lota.ranks.quiet import quiet_libraries
    from lota.study import jobs

    quiet_libraries()
    num_frozen = 0
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        job.folder.mkdir(parents=True, exist_ok=True)
        with open(job.folder / "log.txt", "w", encoding="utf-8") as log:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        answer: tuple[bool, Any]
        try:
            answer = True, jobs.work(job)
        except (Exception, SystemExit) as error:  # noqa: BLE001 (told to the parent, which ends the study)
            traceback.print_exc()
            answer = False, f"{type(error).__name__}: {error}"
        sys.stdout.flush()
        if len(sys.modules) > num_frozen + 20:  # collecting garbage over all that imports made takes long
            num_frozen = len(sys.modules)
            gc.collect()
            gc.freeze()
        pipe.send(answer)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
