"""What a worker does for one run: make the base, train, calibrate, merge; then measure, and write result.json."""

from __future__ import annotations

import csv
import gc
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from lota.data.dataset import read_jsonl
from lota.data.tokenizer import encode, load_tokenizer
from lota.evaluate.answer_loss import collate
from lota.files import write_text
from lota.retention import FILE_NAME, Importance

RESUMING = ("base", "sequence")
"""Kinds of runs that resume by themselves; of the others a run that was stopped begins again."""


@dataclass(frozen=True)
class Job:
    """A run with paths in place of names. folder: of the run, whose `run/` takes what it makes."""

    name: str
    kind: str
    options: dict[str, Any]
    measure: dict[str, Any] | None
    folder: Path
    data: Path
    starts: Path
    keeps: bool
    threads: int = 1


def work(job: Job) -> dict[str, Any]:
    """Do it, from the start; the result, which is also in result.json, the last file to be written."""
    torch.set_num_threads(job.threads)
    if job.kind not in RESUMING:
        shutil.rmtree(job.folder / "run", ignore_errors=True)
    job.folder.mkdir(parents=True, exist_ok=True)
    started, cpu = time.monotonic(), time.process_time()
    facts = _KINDS[job.kind](job)
    made = time.monotonic() - started
    result: dict[str, Any] = {"name": job.name, "kind": job.kind, "facts": facts, "seconds": {"run": round(made, 1)}}
    if job.measure is not None:
        result |= _measured(job)
        result["seconds"]["measure"] = round(time.monotonic() - started - made, 1)
    result["seconds"]["cpu"] = round(time.process_time() - cpu, 1)
    _tidy(job)
    write_text(job.folder / "result.json", json.dumps(result, indent=1) + "\n")
    return result


def _base(job: Job) -> dict[str, Any]:
    from lota.study.pretrain import BaseConfig, pretrain

    (job.folder / "run").mkdir(exist_ok=True)
    texts = [row["text"] for row in read_jsonl(job.options["texts"])]
    tokenizer = AutoTokenizer.from_pretrained(job.options["tokenizer"])
    loss = pretrain(BaseConfig(**job.options["config"]), tokenizer, texts, job.folder / "run", _say)
    return {"loss": loss}


def _train(job: Job) -> dict[str, Any]:
    from lota.train.job import main

    return _lota(job, main, job.options)


def _calibrate(job: Job) -> dict[str, Any]:
    """cuts: densities for which masks are cut from the ranking."""
    from lota.selection import cut
    from lota.train.job import main_mask

    options = dict(job.options)
    cuts = options.pop("cuts")
    facts = _lota(job, main_mask, options | {"density": max(cuts), "keep_ranking": True})
    for density in cuts:
        cut(job.folder / "run" / "ranking", density).save(
            job.folder / "run" / f"mask-{density:g}", {"made by": "study"}
        )
    return facts


def _importance(job: Job) -> dict[str, Any]:
    options = job.options
    model, tokenizer = AutoModelForCausalLM.from_pretrained(options["model"]), load_tokenizer(options["model"])
    model.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
    size = options["micro_rows"]
    rows = read_jsonl(options["texts"])[: options["micro_batches"] * size]
    encoded = [encode(tokenizer, {"prompt": "", "completion": row["text"]}) for row in rows]
    encoded = [(ids[: model.config.max_position_embeddings], num_prompt) for ids, num_prompt in encoded]
    parts = (collate(encoded[first : first + size], tokenizer.pad_token_id) for first in range(0, len(encoded), size))
    batches = ({"input_ids": ids.to(model.device), "labels": labels.to(model.device)} for ids, labels in parts)
    (job.folder / "run").mkdir()
    return {"bytes": Importance.collect(model, batches).save(job.folder / "run" / FILE_NAME)}


def _merge(job: Job) -> dict[str, Any]:
    """of: runs' folders, whose models become tickets where they are none. base: what all were trained from."""
    from lota.algebra import Merge, ModelTensors, extract, merge
    from lota.ticket import Ticket

    options = dict(job.options)
    (job.folder / "run").mkdir()
    paths = []
    base = ModelTensors(options.pop("base"))
    for number, folder in enumerate(map(Path, options.pop("of"))):
        path = folder / "ticket"
        if not path.is_dir():
            path = job.folder / "run" / f"ticket-{number}"
            extract(base, ModelTensors(folder / "merged"), path, dtype=torch.float32)
        paths.append(path)
    return dict(merge([Ticket.load(path) for path in paths], job.folder / "run" / "ticket", Merge(**options)))


def _sequence(job: Job) -> dict[str, Any]:
    """`lota sequence`; a row of its matrix for every stage and task."""
    from lota.sequence.run import main

    path = _config(job, job.options)
    try:
        main([str(path)])
    finally:
        _forget()
    with open(job.folder / "run" / "matrix.csv", encoding="utf-8", newline="") as file:
        return {"matrix": list(csv.DictReader(file))}


_KINDS: dict[str, Callable[[Job], dict[str, Any]]] = {
    "base": _base,
    "train": _train,
    "calibrate": _calibrate,
    "importance": _importance,
    "merge": _merge,
    "sequence": _sequence,
}


def _lota(job: Job, main: Callable[[list[str]], None], options: dict[str, Any]) -> dict[str, Any]:
    """`lota train --config FILE`, in this process; what its summary says."""
    words = ["--config", str(_config(job, options))]
    before, sys.argv = sys.argv, ["lota train", *words]
    try:
        main(words)
    finally:
        sys.argv = before
        _forget()
    summary = json.loads((job.folder / "run" / "summary.json").read_text(encoding="utf-8"))
    mask = summary.get("mask", {})
    return {
        "num_trained": mask.get("num_active"),
        "density": mask.get("density"),
        "last_step_loss": summary.get("training", {}).get("last_step_loss"),
        "seconds": summary["seconds"],
        "versions": summary["versions"],
    }


def _config(job: Job, options: dict[str, Any]) -> Path:
    """The file of a run's options."""
    path = job.folder / "config.yaml"
    content = options | {"output_dir": str(job.folder / "run")}
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def _forget() -> None:
    """Let go of the engine and of the process-wide state that the next run makes again. While transformers knows of a
    ZeRO-3 file, every model that it loads is partitioned."""
    from accelerate.state import AcceleratorState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    gc.collect()
    AcceleratorState._reset_state(True)
    unset_hf_deepspeed_config()


def _measured(job: Job) -> dict[str, Any]:
    from lota.study.measure import measure

    asked = job.measure
    assert asked is not None
    importance = asked.get("importance")
    found = measure(
        start=Path(asked["start"]),
        outcome=job.folder / "run",
        tasks=[Path(task) for task in asked["tasks"]],
        general=job.data / "general_test.jsonl",
        alphas=asked["alphas"],
        starts=job.starts,
        generate=[Path(task) for task in asked["generate"]],
        importance=None if importance is None else Importance.load(importance),
    )
    return {"points": found.points, "movement": found.movement}


def _tidy(job: Job) -> None:
    """Remove the weights that no other run asks for."""
    run = job.folder / "run"
    if job.keeps or job.kind == "base":
        (job.folder / "kept").touch()
        return
    for pattern in (
        "[0-9]*",
        "ticket*",
        "merged",
        "retained",
        "adapter",
        "mask*",
        "ranking",
        "checkpoint-*",
        "calibration",
    ):
        for path in run.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def _say(text: str) -> None:
    print(f"[study] {text}", flush=True)
