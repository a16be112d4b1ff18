"""Stage `recipe`: what users start: first by `deepspeed recipes/...`, then in this process, which saves its start.

Two tasks in sequence, the second one pulled to what the first one needs, and their merged model proved by `lota
verify`; then DPO with the reference that costs no model.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.gpu import engines
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.environment import ROOT
from lota.cli import main as cli
from tests.zero.trainers import make_base

PULL = 20.0


def run(bench: Bench) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = make_base(folder / "base")
        bench.attempt("two tasks", lambda: _two_tasks(bench, base, folder), seconds=25)
        bench.attempt("preferences", lambda: _preferences(bench, base, folder), seconds=12)


def _two_tasks(bench: Bench, base: Path, folder: Path) -> None:
    rows = (base / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    for name, part in {"a": rows[:32], "b": rows[32:]}.items():
        (folder / f"{name}.jsonl").write_text("\n".join(part), encoding="utf-8")
    one, two = folder / "one", folder / "two"
    gradient = ("--score", "gradient", "--keep_importance", "true", "--importance_batches", "16")
    _launch(bench, "train_lota", _options(base, folder / "a.jsonl", one, *gradient))
    ticket = str(one / "ticket")
    kept = ["--tickets", ticket, "--retain", ticket, "--pull", str(PULL), "--merged", "true"]
    summary = _train(bench, "train_lota", _options(base, folder / "b.jsonl", two, "--score", "task_vector", *kept))
    report = summary["training"]["report"]
    expected = "triton" if bench.device.kind == "cuda" else report["kernels"]
    bench.check("the run's kernels", report["kernels"] == expected, f"{report['kernels']}, expected {expected}")
    (reached,) = report["pull"]["reached"]
    bench.check("the pull", abs(reached - PULL) < 1e-3 * PULL, f"{reached:.5g}, expected {PULL:g}")
    tickets = [ticket, str(two / "ticket")]
    status = cli(["verify", *tickets, "--base", str(base), "--tuned", str(two / "merged")])
    bench.check("lota verify", status == 0, f"exit status {status}; the log has its output")


def _preferences(bench: Bench, base: Path, folder: Path) -> None:
    rows = [json.loads(row) for row in (base / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    pairs = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": row["other"]} for row in rows]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)), encoding="utf-8")
    _train(bench, "train_dpo", _options(base, folder / "pairs.jsonl", folder / "dpo", "--score", "gradient"))


def _options(base: Path, rows: Path, out: Path, *options: str) -> list[str]:
    argv = ["--model_name_or_path", str(base), "--train_file", str(rows), "--output_dir", str(out), "--bf16", "true"]
    argv += ["--density", "0.1", "--calibration_steps", "3", "--max_steps", "6", "--learning_rate", "0.01"]
    return [*argv, "--per_device_train_batch_size", "4", "--save_strategy", "no", "--report_to", "none", *options]


def _launch(bench: Bench, recipe: str, argv: list[str]) -> None:
    """A job of DeepSpeed's launcher on this device. RuntimeError, after the row, for an exit status that is not 0."""
    port = str(engines.free_port())
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "1", "--master_port", port]
    done = subprocess.run([*command, f"recipes/{recipe}.py", *argv], cwd=ROOT, capture_output=True, text=True)
    print(done.stdout, done.stderr, flush=True)
    last = [text for text in (done.stdout + done.stderr).splitlines() if text.strip()][-1:]
    detail = f"exit status {done.returncode}; last line: {' '.join(last)[:200]}"
    if not bench.check(f"deepspeed recipes/{recipe}.py", done.returncode == 0, detail):
        raise RuntimeError(f"{recipe} ended with status {done.returncode}; the log has its output")


def _train(bench: Bench, recipe: str, argv: list[str]) -> dict[str, Any]:
    """The same job in this process; what it wrote into summary.json."""
    engines.join_world_of_one(bench.device)
    with patch.object(sys, "argv", [f"{recipe}.py", *argv]):
        importlib.import_module(f"recipes.{recipe}").main()
    out = Path(argv[argv.index("--output_dir") + 1])
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    bench.check(recipe, (out / "ticket").is_dir(), f"expected a ticket in {out.name}")
    return summary
