"""Where this runs: packages that are missing, hardware, driver, versions, and which source was measured."""

from __future__ import annotations

import hashlib
import importlib.util
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.gpu.bench import Bench

ROOT = Path(__file__).resolve().parents[2]
REPORTED = ("torch", "triton", "deepspeed", "transformers", "peft", "pytest", "numpy", "safetensors")


def missing(packages: Iterable[str]) -> list[str]:
    """Those of these distributions that are not installed."""
    return [name for name in dict.fromkeys(packages) if not _is_there(name)]


def incomplete(packages: Iterable[str]) -> dict[str, list[str]]:
    """What these require and this machine lacks: they may work without it, or fail when they are imported."""
    lacking = {package: missing(_required(package)) for package in dict.fromkeys(packages)}
    return {package: names for package, names in lacking.items() if names}


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in REPORTED}}


def source() -> dict[str, str]:
    """The commit, where git knows it, and a digest of lota/ and benchmarks/ as they are."""
    digest = hashlib.sha256()
    files = [path for folder in ("lota", "benchmarks") for path in (ROOT / folder).rglob("*") if path.is_file()]
    for path in sorted(files):
        if path.suffix in (".py", ".c"):
            digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return {"commit": _git("rev-parse", "HEAD") or "unknown", "source_sha256": digest.hexdigest()[:16]}


def probe(bench: Bench) -> None:
    """The stage that asks the device who it is."""
    import torch

    found: dict[str, Any] = {"hardware": platform.processor() or platform.machine()}
    if bench.device.kind == "cuda":
        properties = torch.cuda.get_device_properties(bench.device.torch)
        found = {
            "hardware": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "driver": _driver(),
            "cuda": torch.version.cuda or torch.version.hip or "",
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
            "gpus": torch.cuda.device_count(),
        }
    torch.ones(8, device=bench.device.torch).sum().item()  # a device that cannot compute is found out here
    bench.machine(found | {"memory_gib": round(bench.device.memory_bytes() / 2**30, 1)})


def _is_there(package: str) -> bool:
    return bool(version(package)) or importlib.util.find_spec(package.replace("-", "_")) is not None


def _required(package: str) -> list[str]:
    """Names of what a distribution requires, extras and other platforms left out."""
    try:
        lines = metadata.requires(package) or []
    except metadata.PackageNotFoundError:
        return []
    names = [re.match(r"[A-Za-z0-9._-]+", line) for line in lines if ";" not in line]
    return [name[0] for name in names if name]


def _git(*arguments: str) -> str:
    return _output(["git", "-C", str(ROOT), *arguments])


def _driver() -> str:
    return _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]).split("\n")[0]


def _output(command: list[str]) -> str:
    if shutil.which(command[0]) is None:
        return ""
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except subprocess.TimeoutExpired:
        return ""
    return run.stdout.strip() if run.returncode == 0 else ""
