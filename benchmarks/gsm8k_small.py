"""GSM8K on a small Llama that was pretrained on other text: LoTA at 10% and at 1% against full fine-tuning.

    python benchmarks/gsm8k_small.py --data ../shared/data --output runs/gsm8k-small

Two CPU ranks, bf16, equal optimizer steps for every method; calibration comes on top. Full fine-tuning and LoTA at
10% get the same number of learning rates. The rate is chosen on held-out training rows, the table is of test rows:
there the answer loss is that of what was delivered, the ticket applied to the base or the tuned checkpoint. What is
done already is not done again. Needs {gsm8k,commonsense,sql}_train.jsonl and gsm8k_test.jsonl in --data.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import random
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks run from the checkout

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

import lota
from lota.data.dataset import read_jsonl
from lota.delivery.live import apply_
from lota.demo.run import changed_entries
from lota.demo.small_model import END, SmallModelConfig, pretrain, save_atomically, train_tokenizer
from lota.evaluate.answer_loss import score_answers

ROOT = Path(__file__).resolve().parents[1]
CONFIG_PATH = ROOT / "recipes" / "configs" / "gsm8k_small.yaml"
NUM_RANKS = 2
BASE = SmallModelConfig(
    vocab_size=2048, hidden_size=192, num_layers=4, max_length=192, steps=450, batch_rows=8, learning_rate=2e-3
)
NUM_ROWS = {"train": 2400, "dev": 128, "test": 320}
DENSITIES = (0.1, 0.01)
# At 1% a global budget goes to the head's rows of tokens that GSM8K does not use: Adam moves them as far as any other.
BUDGETS = {0.1: "global", 0.01: "per_tensor"}


@dataclass(frozen=True)
class Run:
    """One training run. density 1 is full fine-tuning."""

    density: float
    learning_rate: float

    @property
    def name(self) -> str:
        return f"{'full' if self.density == 1 else f'lota-{self.density:g}'}-{self.learning_rate:g}"


SWEEP = (
    *(Run(1, rate) for rate in (1e-3, 2e-3, 4e-3)),
    *(Run(0.1, rate) for rate in (5e-3, 1e-2, 2e-2)),
    Run(0.01, 3e-2),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the .jsonl files, read in place")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "gsm8k-small")
    options = parser.parse_args()
    data, output = options.data.resolve(), options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    disable_progress_bar()
    _same_settings(output)

    base = make_base(data, output)
    rows = choose_rows(data, base, output)
    results = []
    for run in SWEEP:
        mask = None if run.density == 1 else calibrate(run.density, base, output)
        train(run, base, mask, output)
        results.append(result(run, base, rows, output))
        say(json.dumps(results[-1]))
    write_tables(results, output)
    large, small = (lota.Mask.load(output / f"mask-{density:g}" / "mask") for density in DENSITIES)
    say(
        f"entries of the {small.density:.0%} mask that are in the {large.density:.0%} mask too: "
        f"{small.overlap(large)} of {small.num_active}"
    )


def say(text: str) -> None:
    print(f"[gsm8k] {text}", flush=True)


def make_base(data: Path, output: Path) -> Path:
    """A Llama and a tokenizer from commonsense questions and SQL: neither has seen GSM8K. Sequences are packed."""
    folder = output / "base"
    if not folder.exists():
        torch.set_num_threads(1)
        fields = {"commonsense": ("instruction", "output"), "sql": ("context", "question", "answer")}
        texts = [
            "\n".join(str(row[name]) for name in names)
            for source, names in fields.items()
            for row in read_jsonl(data / f"{source}_train.jsonl")
        ]
        random.Random(BASE.seed).shuffle(texts)
        tokenizer = train_tokenizer(texts[:20000], BASE.vocab_size)
        batches = _packed(texts, tokenizer)
        save_atomically(pretrain(BASE, len(tokenizer), batches, say), tokenizer, folder)
    return folder


def choose_rows(data: Path, base: Path, output: Path) -> list[dict[str, str]]:
    """The first rows that fit into BASE.max_length tokens: train.jsonl and dev.jsonl in `output`; returns the test's.

    dev is of the training file, after train, and never trained on.
    """
    tokenizer = AutoTokenizer.from_pretrained(base)

    def fitting(name: str) -> Iterator[dict[str, Any]]:
        for row in read_jsonl(data / f"gsm8k_{name}.jsonl"):
            if len(tokenizer(f"{row['question']} {row['answer']}")["input_ids"]) < BASE.max_length:
                yield row

    train = list(fitting("train"))
    parts = {"train": train[: NUM_ROWS["train"]], "dev": train[NUM_ROWS["train"] :][: NUM_ROWS["dev"]]}
    for name, part in parts.items():
        text = "".join(json.dumps(row) + "\n" for row in part)
        (output / f"{name}.jsonl").write_text(text, encoding="utf-8")
    test = list(fitting("test"))[: NUM_ROWS["test"]]
    counts = ", ".join(f"{len(part)} {name}" for name, part in (parts | {"test": test}).items())
    say(f"rows of at most {BASE.max_length} tokens: {counts}")
    return [{"prompt": row["question"], "completion": f" {row['answer']}"} for row in test]  # as in the config file


def calibrate(density: float, base: Path, output: Path) -> Path:
    """The mask of this density. Both are made by the same calibration, run again: same data, same seed."""
    folder = output / f"mask-{density:g}"
    launch("calibrate_mask.py", base, folder, ["--density", str(density), "--budget", BUDGETS[density]])
    return folder / "mask"


def train(run: Run, base: Path, mask: Path | None, output: Path) -> None:
    """One run of the sweep, from the mask or of all weights."""
    method = ["--method", "full", "--merged", "true"] if mask is None else ["--mask", str(mask)]
    options = ["--learning_rate", str(run.learning_rate), "--eval_file", str(output / "dev.jsonl")]
    launch("train_lota.py", base, output / run.name, [*options, *method])


def launch(recipe: str, base: Path, folder: Path, options: list[str]) -> None:
    """Run a recipe on two ranks into `folder`, unless it is complete; one that was cut off begins again."""
    if (folder / "summary.json").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    say(f"{folder.name} ...")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *(sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(NUM_RANKS), "--master_port", str(port)),
        *(str(ROOT / "recipes" / recipe), "--config", str(CONFIG_PATH), "--model_name_or_path", str(base)),
        *("--train_file", str(folder.parent / "train.jsonl"), "--output_dir", str(folder), *options),
    ]
    search_path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    log_path = folder.with_suffix(folder.suffix + ".log")
    with open(log_path, "w", encoding="utf-8") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": search_path}
        code = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT).returncode
    if code != 0:
        raise SystemExit(f"[gsm8k] {recipe} failed, its output is in {log_path}")


def result(run: Run, base: Path, rows: list[dict[str, str]], output: Path) -> dict[str, Any]:
    """One line of the table: facts of the run's summary, and the loss on test rows of what it delivered."""
    folder = output / run.name
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    training = summary["training"]
    if run.density == 1:
        changed = sum(int(moved.sum()) for moved in changed_entries(base, folder / "merged").values())
        stored, sent, sent_dense = (folder / "merged" / "model.safetensors").stat().st_size, None, None
    else:
        report = training["report"]
        changed, stored = summary["ticket"]["num_changed"], summary["ticket"]["bytes"]
        sent, sent_dense = (report[key] / report["reductions"] for key in ("bytes_sent", "bytes_sent_dense"))
    return {
        "method": "full" if run.density == 1 else "lota",
        "density": run.density,
        "learning_rate": run.learning_rate,
        "steps": training["steps"],
        "dev_loss_before": training["eval_loss_before"],
        "dev_loss": training["eval_loss"],
        "test_loss_before": delivered_loss(base, None, rows, output / "base-test.json"),
        "test_loss": delivered_loss(base, folder, rows, folder / "test.json"),
        "entries_trained": summary["mask"]["num_active"] if run.density < 1 else None,
        "entries_changed": changed,
        "stored_bytes": stored,
        "sent_bytes_per_step": sent,
        "sent_bytes_per_step_dense": sent_dense,
        "training_seconds": training["seconds"],
        **summary["versions"],
    }


def delivered_loss(base: Path, folder: Path | None, rows: list[dict[str, str]], cache: Path) -> float:
    """Nats per answer token on `rows`, bf16, of the base, of the ticket in `folder` on it, or of its merged model."""
    if not cache.exists():
        is_merged = folder is not None and (folder / "merged").exists()
        model = AutoModelForCausalLM.from_pretrained(folder / "merged" if is_merged else base, dtype=torch.bfloat16)
        if folder is not None and not is_merged:
            apply_(model, lota.Ticket.load(folder / "ticket"))
        score = score_answers(model, AutoTokenizer.from_pretrained(base), rows, batch_rows=32)
        cache.write_text(json.dumps(asdict(score)) + "\n", encoding="utf-8")
    return float(json.loads(cache.read_text(encoding="utf-8"))["loss"])


def write_tables(results: list[dict[str, Any]], output: Path) -> None:
    """results.csv, results.md and the verdict; a method's best run is the one of the lowest dev loss."""
    if len({entry["steps"] for entry in results}) != 1:
        raise SystemExit(f"[gsm8k] the runs differ in steps: {[entry['steps'] for entry in results]}")
    best = {
        density: min((e for e in results if e["density"] == density), key=lambda e: e["dev_loss"])
        for density in (1, *DENSITIES)
    }
    full_drop = max(_drop(entry) for entry in results if entry["density"] == 1)  # by test rows: strict for LoTA
    for entry in results:
        entry["test_loss_drop"], entry["share_of_full"] = _drop(entry), _drop(entry) / full_drop
    with open(output / "results.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(results[0]))
        writer.writeheader()
        writer.writerows(results)
    lines = [
        "| method | density | learning rate | steps | dev loss | test loss before | after | drop | share of full's best"
        " | entries changed | stored bytes | sent per step | dense |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for entry in results:
        mark = "**" if entry is best[entry["density"]] else ""
        sent = [f"{entry[key]:,.0f}" if entry[key] else "-" for key in _SENT]
        lines.append(
            f"| {entry['method']} | {entry['density']:g} | {mark}{entry['learning_rate']:g}{mark} | {entry['steps']} "
            f"| {entry['dev_loss']:.4f} | {entry['test_loss_before']:.4f} | {entry['test_loss']:.4f} "
            f"| {entry['test_loss_drop']:.4f} | {entry['share_of_full']:.1%} | {entry['entries_changed']:,} "
            f"| {entry['stored_bytes']:,} | {' | '.join(sent)} |"
        )
    versions = ", ".join(f"{name} {results[0][name]}" for name in _VERSIONS)
    shares = ", ".join(f"{density:.0%} keeps {best[density]['share_of_full']:.1%}" for density in DENSITIES)
    lines += [
        "",
        f"Bold: the best learning rate by dev loss. Full's best drop is {full_drop:.4f} nats; LoTA at {shares} of it.",
        f"{_cpu()}, {os.cpu_count()} cores, {NUM_RANKS} ranks, bf16; {versions}.",
    ]
    (output / "results.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


_SENT = ("sent_bytes_per_step", "sent_bytes_per_step_dense")
_VERSIONS = ("python", "torch", "deepspeed", "transformers", "trl", "accelerate")


def _drop(entry: dict[str, Any]) -> float:
    return float(entry["test_loss_before"] - entry["test_loss"])


def _packed(texts: list[str], tokenizer: Any) -> Iterator[list[tuple[list[int], int]]]:
    """Batches of full sequences, each text ended by END, all over again when the texts are used up."""
    ids: list[int] = []
    size = BASE.batch_rows * BASE.max_length
    while True:
        for text in texts:
            ids += [*tokenizer(text)["input_ids"], END]
            if len(ids) >= size:
                yield [(ids[start : start + BASE.max_length], 0) for start in range(0, size, BASE.max_length)]
                ids = ids[size:]


def _same_settings(output: Path) -> None:
    """Results of other settings are never mixed in: refuse a folder that was made with others."""
    settings = {"base": asdict(BASE), "rows": NUM_ROWS, "config": yaml.safe_load(CONFIG_PATH.read_text("utf-8"))}
    path = output / "settings.json"
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != settings:
        raise SystemExit(f"[gsm8k] {output} was made with other settings: choose another --output")
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
