"""In a rank of the command: a block, opened at the first call that only ranks make and finished at their end.

`lota.wrap.site` calls `arm` and `arm_accelerate` when a process of the command has imported these libraries. Importing
them is not yet training: launchers do it too. What opens the block is a call.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import Any

from lota.choices import STATIC_SCORES
from lota.wrap import reports
from lota.wrap.order import CALIBRATION, RESULT, Order

_MARK = "LOTA_RUN_RANK"
"""The process id of the rank: processes that it starts inherit this, and are no ranks."""
_LONGEST_REASON = 500


def arm(deepspeed: Any) -> None:
    """The block opens before ranks meet by DeepSpeed, before weights are sharded and before an engine is built."""
    for owner, name in ((deepspeed, "init_distributed"), (deepspeed.comm, "init_distributed")):
        _before(owner, name, _RANK.enter)
    _before(deepspeed.zero.Init, "__init__", _RANK.enter)
    initialize = deepspeed.initialize

    @wraps(initialize)
    def initialize_inside(*args: Any, **kwargs: Any) -> Any:
        _RANK.enter()
        made = initialize(*args, **kwargs)
        _RANK.built(made[0], _trainer_on_stack())
        return made

    deepspeed.initialize = initialize_inside


def arm_accelerate(state: Any) -> None:
    """The block opens before a rank of accelerate meets the others, where that is the first call. On CPUs accelerate
    would otherwise start torch.distributed without DeepSpeed, and ZeRO-3 take the world for one rank."""
    make = state.PartialState.__init__

    @wraps(make)
    def make_inside(self: Any, *args: Any, **kwargs: Any) -> None:
        is_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"
        if not self._shared_state and (is_deepspeed or "RANK" in os.environ):
            _RANK.enter()
        make(self, *args, **kwargs)

    state.PartialState.__init__ = make_inside


def _before(owner: Any, name: str, act: Callable[[], None]) -> None:
    inner = getattr(owner, name)

    @wraps(inner)
    def after_act(*args: Any, **kwargs: Any) -> Any:
        act()
        return inner(*args, **kwargs)

    setattr(owner, name, after_act)


class _Rank:
    """The block of this process, if it becomes a rank of the command."""

    def __init__(self) -> None:
        self._pid: int | None = None
        self._block: Any = None
        self._run: Any = None
        self._engine: Any = None
        self._trainer: Any = None
        self._output_dir = ""

    def enter(self) -> None:
        """Open the block, at the first call; nothing in a process that a rank has started."""
        own = str(os.getpid())
        if self._pid is not None or os.environ.get(_MARK, own) != own:
            return
        self._pid, os.environ[_MARK] = os.getpid(), own
        self._order = Order.from_environment()
        try:
            self._open()
        except Exception as error:
            self._report(reports.FAILED, _shown(error))
            raise

    def _open(self) -> None:
        import torch.distributed as dist

        from lota import blocks

        open_block = blocks.calibration_zero3 if self._order.phase == CALIBRATION else blocks.sparse_zero3
        block = open_block(**self._order.options)
        self._run = block.__enter__()
        self._block = block
        self._destroy, dist.destroy_process_group = dist.destroy_process_group, self._destroy_group
        # Before the pools of concurrent.futures close, which atexit comes after; selection and writers use them.
        getattr(threading, "_register_atexit")(self._end)  # noqa: B009 (mypy does not know it)

    def built(self, engine: Any, trainer: Any) -> None:
        """An engine of the program is there. One without an optimizer only evaluates, and is left alone."""
        if self._block is None or self._engine is not None or not getattr(engine, "is_lota", False):
            return
        self._engine, self._trainer = engine, trainer
        output_dir = getattr(getattr(trainer, "args", None), "output_dir", None)
        self._output_dir = os.path.abspath(output_dir) if output_dir else ""
        _before(engine, "destroy", self.finish)
        if _rank() == 0 and not os.path.isdir(self._order.folder):
            raise ValueError(
                f"rank 0 runs on {socket.gethostname()}, which does not see {os.path.dirname(self._order.folder)}: "
                f"give the {self._order.outcome} a place on a file system that this host and the host of `lota run` "
                "share"
            )
        self._report(reports.BUILT)

    def finish(self) -> None:
        """Write the mask or the ticket and close the block, unless the program has not come to its end. Collective.

        ValueError or RuntimeError where that cannot be written.
        """
        block, self._block = self._block, None
        if block is None or os.getpid() != self._pid:
            return
        reason = self._not_finished()
        if reason is not None:
            self._report(reports.FAILED, reason)
        if reason is not None or self._engine is None:
            return
        try:
            said = self._deliver()
            block.__exit__(None, None, None)
        except Exception as error:
            self._report(reports.FAILED, _shown(error))
            raise
        self._report(reports.FINISHED)
        if _rank() == 0:
            print(f"[lota] {said}", flush=True)

    def _not_finished(self) -> str | None:
        """Why the program has not trained to its end, as far as a process knows that of itself."""
        error = sys.exc_info()[1] or getattr(sys, "last_value", None)
        if error is not None and not (isinstance(error, SystemExit) and error.code in (None, 0)):
            return _shown(error)
        if self._engine is None:
            return None
        steps, wanted = self._engine.global_steps, self._order.num_steps
        if getattr(self._trainer, "is_in_train", False):
            return (
                f"the program ended in the middle of its Trainer's train(), after {steps} of "
                f"{self._trainer.state.max_steps} steps"
            )
        if wanted is not None and steps != wanted:
            return f"the program ended after {steps} steps, and --num_steps asks for {wanted}"
        if steps == 0 and self._order.options.get("score") not in STATIC_SCORES:
            return "the program ended before the first step of its optimizer"
        return None

    def _deliver(self) -> str:
        order, steps = self._order, self._engine.global_steps
        path = os.path.join(order.folder, RESULT)
        provenance = {"made by": "lota run", "command": list(order.command), "steps": steps}
        if order.phase == CALIBRATION:
            mask = self._run.mask()
            if _rank() == 0:
                mask.save(path, {"score": order.options["score"], **provenance}, overwrite=True)
            return f"{steps} steps; a mask of {mask.num_active:,} of {mask.eligible:,} entries"
        saved = self._run.save_ticket(path, provenance, overwrite=True, **_with_dtype(order.save))
        return (
            f"{steps} steps; a ticket of {saved['num_active']:,} entries, {saved['num_changed']:,} of which changed, "
            f"{saved['bytes']:,} bytes"
        )

    def _destroy_group(self, group: Any = None) -> None:
        import torch.distributed as dist

        if group is None or group is dist.group.WORLD:
            dist.destroy_process_group = self._destroy
            self.finish()
        self._destroy(group)

    def _end(self) -> None:
        """At the end of the interpreter, where errors have nobody to go to and the status is decided."""
        try:
            self.finish()
        except Exception:  # noqa: BLE001 (the process ends by it)
            traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)

    def _report(self, state: str, reason: str = "") -> None:
        steps = 0 if self._engine is None else self._engine.global_steps
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        report = reports.Report(
            _rank(), world_size, socket.gethostname(), os.getpid(), state, reason, steps, self._output_dir
        )
        with suppress(OSError):  # the launcher then misses it, and says so
            reports.write(self._order.folder, report)


_RANK = _Rank()


def _rank() -> int:
    import torch.distributed as dist

    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def _trainer_on_stack() -> Any:
    """The Trainer of transformers whose `train()` is among the callers, or None. Nothing that reaches an engine says so
    otherwise."""
    frame = sys._getframe(1)
    while frame is not None:
        held = frame.f_locals.get("self")
        if "is_in_train" in getattr(held, "__dict__", ()):
            return held
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _shown(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:_LONGEST_REASON]


def _with_dtype(save: Any) -> dict[str, Any]:
    import torch

    return {**save, "dtype": getattr(torch, save["dtype"])} if save.get("dtype") else dict(save)
