"""Warnings of other libraries that no user of a job can act on, left out of its output."""

from __future__ import annotations

import logging
import sys
import warnings

# Deprecations among torch, transformers, TRL and DeepSpeed themselves, which they raise in each other's name.
_MODULES = r"(torch|transformers|trl|deepspeed|accelerate|datasets|peft)(\..*)?"
_LOGGERS = ("DeepSpeed", "transformers.modeling_utils", "transformers.distributed.tensor_parallel")


def quiet_libraries() -> None:
    """For the process of a job: its own lines, and errors, are what remains. Python's -W and PYTHONWARNINGS win."""
    if not sys.warnoptions:
        for category in (FutureWarning, DeprecationWarning, UserWarning):
            warnings.filterwarnings("ignore", category=category, module=_MODULES)
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
