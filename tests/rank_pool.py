"""Real ranks for tests: processes that share a gloo process group and run functions sent to them, one after the other.

Starting a rank costs seconds of imports, so a pool lives for the whole session and is rebuilt only after a failure that
may have left its ranks out of step.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

START_TIMEOUT = 240
TASK_TIMEOUT = 240


@dataclass
class Outcome:
    """What one rank made of a task: its value, or the error it raised."""

    value: Any = None
    error: str = ""
    error_type: str = ""


class RankPool:
    """`size` ranks; `run` gives every rank the same function and arguments."""

    def __init__(self, size: int) -> None:
        self.size = size
        context = multiprocessing.get_context("spawn")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._pipes, self._processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, port, theirs), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)
        self._receive(START_TIMEOUT)

    def outcomes(self, function: Callable[..., Any], *args: Any, timeout: float = TASK_TIMEOUT) -> list[Outcome]:
        """What every rank made of `function(*args)`, in rank order."""
        for pipe in self._pipes:
            pipe.send((function, args))
        return self._receive(timeout)

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = TASK_TIMEOUT) -> list[Any]:
        """The values of every rank; AssertionError with the tracebacks where a rank failed."""
        results = self.outcomes(function, *args, timeout=timeout)
        failed = [f"rank {rank}:\n{outcome.error}" for rank, outcome in enumerate(results) if outcome.error]
        if failed:
            raise AssertionError("\n".join(failed))
        return [outcome.value for outcome in results]

    def _receive(self, timeout: float) -> list[Outcome]:
        results = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(timeout):
                self.close()
                raise TimeoutError(f"rank {rank} of {self.size} gave no answer in {timeout} s")
            results.append(pipe.recv())
        return results

    def is_alive(self) -> bool:
        return all(process.is_alive() for process in self._processes)

    def close(self) -> None:
        """End the ranks: those that listen are asked to, the others are killed."""
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            if process.is_alive():
                pipe.send(None)
        for process in self._processes:
            process.join(5)
            process.kill()
            process.join()


def _record_groups() -> list[Any]:
    """The process groups that blocks make from now on, as they make them."""
    from lota.zero.compact import groups

    made: list[Any] = []
    own_group = groups._own_group

    def recorded(rank_lists: list[list[int]]) -> Any:
        made.append(own_group(rank_lists))
        return made[-1]

    groups._own_group = recorded
    return made


def _serve(rank: int, size: int, port: int, pipe: Any) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
        TOKENIZERS_PARALLELISM="false",
        HF_HUB_OFFLINE="1",
    )
    import logging

    import deepspeed
    import torch

    from lota.ranks.world import leave_out_shared_memory

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    leave_out_shared_memory()
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    made = _record_groups()
    num_frozen = 0
    pipe.send(Outcome())
    while True:
        # Engines are cycles, so blocks and DeepSpeed collect garbage often: over all that imports made, without this,
        # which took two thirds of the time of many tests.
        if len(sys.modules) > num_frozen + 20:
            num_frozen = len(sys.modules)
            gc.collect()
            gc.freeze()
        task = pipe.recv()
        if task is None:
            break
        # Every rank has answered, so nobody uses the last task's groups: each has threads that poll as long as it is.
        while made:
            with suppress(ValueError, RuntimeError):  # a run that was released has destroyed its own
                torch.distributed.destroy_process_group(made.pop())
        function, args = task
        try:
            pipe.send(Outcome(value=function(*args)))
        except Exception as error:  # noqa: BLE001 - reported to the test, which decides
            pipe.send(Outcome(error=traceback.format_exc(), error_type=type(error).__name__))
    torch.distributed.destroy_process_group()
