"""Dense ZeRO-3 AdamW, sparse training at 10% and 1%, and LoRA: the same model and batch on two CPU ranks, one table.

    OMP_NUM_THREADS=1 python -m benchmarks.end_to_end            # part of make bench

Per rank, of the slower one: seconds of a whole step and of `engine.step()` in it (medians of the steps after the first
two), most memory of the process above what it held before the model was made, and bytes handed to the collectives that
reduce gradients, per step. Trained: eligible tensors only, in all four (LoRA: rank 16 on the same tensors).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from benchmarks.timing import machine, median, write_csv

METHODS = ("dense", "sparse 10%", "sparse 1%", "lora")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WIDTH, DEPTH, TOKENS, WARMUP = 512, 8, 64, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/end_to_end.csv"))
    parser.add_argument("--method", choices=METHODS, help="used by this script for its ranks")
    parser.add_argument("--result", type=Path, help="used by this script for its ranks")
    options = parser.parse_args()
    if options.method:
        _rank(options.method, options.steps, options.result)
        return
    import torch

    where = machine(torch.device("cpu"))
    rows = []
    for method in METHODS:
        row = {"method": method, **_run(method, options.steps)}
        rows.append({**row, **where})
    write_csv(options.out, rows)
    _show(rows)
    print(f"written: {options.out}")


def _run(method: str, steps: int) -> dict[str, Any]:
    """Start two ranks of this script and return the slower one's figures."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
        own = ["benchmarks.end_to_end", "--method", method, "--steps", str(steps), "--result", folder]
        env = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        run = subprocess.run([*command, *own], env=env, capture_output=True, text=True)
        if run.returncode:
            raise SystemExit(f"{method} failed:\n{run.stdout[-3000:]}\n{run.stderr[-5000:]}")
        ranks = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(Path(folder).iterdir())]
    return {key: max(rank[key] for rank in ranks) for key in ranks[0]}


def _rank(method: str, steps: int, folder: Path) -> None:
    import deepspeed
    import torch
    import torch.distributed as dist
    from transformers import LlamaConfig, LlamaForCausalLM

    import lota

    sent = _count_reductions(dist)
    deepspeed.init_distributed("gloo", verbose=False)
    rank = dist.get_rank()
    torch.manual_seed(0)
    before = _peak_bytes()
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    model: Any = LlamaForCausalLM(config).bfloat16()
    names = [name for name, _ in model.named_parameters() if any(target in name for target in TARGETS)]
    block: Any = nullcontext()
    if method.startswith("sparse"):
        block = lota.sparse_zero3(_mask(model, names, float(method.split()[1].rstrip("%")) / 100))
    elif method == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS)).bfloat16()
    else:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names)
    model.enable_input_require_grads()
    with block:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=torch.optim.AdamW(trained, lr=1e-4), config=_deepspeed_config()
        )
        whole, phase = [], []
        for step in range(steps + WARMUP):
            ids = torch.randint(0, 1000, (1, TOKENS), generator=torch.Generator().manual_seed(2 * step + rank))
            sent["is_on"], start = step == WARMUP, time.perf_counter()
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            dist.barrier()
            sent["is_on"], middle = False, time.perf_counter()
            engine.step()
            whole.append(time.perf_counter() - start)
            phase.append(time.perf_counter() - middle)
    result = {
        "step_s": median(whole[WARMUP:]),
        "optimizer_s": median(phase[WARMUP:]),
        "peak_mib": (_peak_bytes() - before) / 2**20,
        "sent_mib": sent["bytes"] / 2**20,
        "trained": sum(parameter.ds_numel for parameter in trained),
    }
    if method.startswith("sparse"):
        result["trained"] = round(result["trained"] * float(method.split()[1].rstrip("%")) / 100)
    (folder / f"rank{rank}.json").write_text(json.dumps(result), encoding="utf-8")


def _mask(model: Any, names: list[str], density: float) -> Any:
    import torch

    import lota

    generator = torch.Generator().manual_seed(1)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters() if name in names}
    return lota.Mask.from_dense({n: torch.rand(s, generator=generator) < density for n, s in shapes.items()})


def _deepspeed_config() -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3},
        "zero_allow_untested_optimizer": True,
    }


def _count_reductions(dist: Any) -> dict[str, Any]:
    """Count the bytes given to the collectives that reduce gradients, while `is_on`: all that run in backward but the
    gathering of weights."""
    sent: dict[str, Any] = {"is_on": False, "bytes": 0}
    inputs = {"all_to_all_single": 1, "all_reduce": 0, "reduce_scatter_tensor": 1, "reduce_scatter": 1}

    def counted(function: Any, position: int) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if sent["is_on"]:
                given = args[position] if len(args) > position else kwargs.get("tensor", kwargs.get("input"))
                tensors = given if isinstance(given, list) else [given]
                sent["bytes"] += sum(tensor.nbytes for tensor in tensors)
            return function(*args, **kwargs)

        return call

    for name, position in inputs.items():
        setattr(dist, name, counted(getattr(dist, name), position))
    return sent


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _show(rows: list[dict[str, Any]]) -> None:
    print(f"\n{'':<12}{'trained':>12}{'step s':>9}{'optimizer s':>13}{'peak MiB':>10}{'sent MiB':>10}   per rank")
    for row in rows:
        print(
            f"{row['method']:<12}{row['trained']:>12}{row['step_s']:>9.3f}{row['optimizer_s']:>13.4f}"
            f"{row['peak_mib']:>10.0f}{row['sent_mib']:>10.2f}"
        )


if __name__ == "__main__":
    main()
