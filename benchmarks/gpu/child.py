"""The process of one stage: `python -m benchmarks.gpu.child SPEC`, started by runner.py. SPEC is JSON.

Ends by itself at its limit, after every thread's stack went to the log: that says where a stage hung.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any


def main() -> int:
    """Several specs, in one process, are for the tests."""
    return max([_run(spec) for spec in json.loads(sys.argv[1])])


def _run(spec: dict[str, Any]) -> int:
    faulthandler.enable()
    faulthandler.dump_traceback_later(max(0.1, spec["until"] - time.monotonic()), exit=True)
    from benchmarks.gpu.bench import Bench  # imports torch, which may hang too
    from benchmarks.gpu.device import device_of
    from benchmarks.gpu.sizes import SIZES

    device, sizes = device_of(spec["device"]), SIZES[spec["sizes"]]
    bench = Bench(spec["name"], device, sizes, spec["options"], Path(spec["rows"]), spec["until"])
    module, function = spec["function"].split(":")
    try:
        getattr(importlib.import_module(module), function)(bench)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - the row says so, and the exit status
        bench.failed("the stage", error)
        return 1
    finally:
        faulthandler.cancel_dump_traceback_later()
    return 0


if __name__ == "__main__":
    sys.exit(main())
