"""Programs as their users have them, without a word of lota: a plain loop, and TRL's SFT trainer.

    python programs.py loop|sft|trainer FOLDER [DEED]

FOLDER holds the base of tests/zero/trainers.py. DEED: something that a program may do beside training, by name.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

STEPS = 3
CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 1.0,
    "bf16": {"enabled": True},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
    "zero_optimization": {"stage": 3, "reduce_bucket_size": 20000, "stage3_param_persistence_threshold": 0},
    "steps_per_print": 1000000,
}


def loop(folder: Path, deed: str = "") -> None:
    """A hand-written loop around `deepspeed.initialize`, which gives its ranks up at the end."""
    import deepspeed
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(folder)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    given = {} if deed == "only evaluates" else {"model_parameters": model.parameters()}
    settings = {key: value for key, value in CONFIG.items() if given or key != "optimizer"}
    engine, *_ = deepspeed.initialize(model=model, config=settings, **given)
    if deed == "trains a second model":
        deepspeed.initialize(model=torch.nn.Linear(4, 4, dtype=torch.bfloat16), config=CONFIG)
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    for micro_step in range(2 * STEPS):
        if micro_step == STEPS:
            _do(deed)
        ids = torch.randint(4, config.vocab_size, (2, 8), generator=generator)
        loss = engine(input_ids=ids, labels=ids).loss
        if given:
            engine.backward(loss)
            engine.step()
    if __name__ == "__main__":
        torch.distributed.destroy_process_group()
    if deed == "crashes afterwards":
        raise RuntimeError("after the end")


def sft(folder: Path, deed: str = "") -> None:
    """A script on TRL: nothing of DeepSpeed in it but the configuration."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Deed(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            _do(deed)

    output_dir = str(folder / f"out-{os.environ.get('LOTA_PHASE', '')}")
    settings = {"max_steps": STEPS, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "seed": 0}
    settings |= {"learning_rate": 1e-2, "save_strategy": "no", "report_to": [], "disable_tqdm": True, "bf16": True}
    auto = {key: value for key, value in CONFIG.items() if key != "optimizer"}
    arguments = SFTConfig(
        output_dir,
        deepspeed=auto,
        use_cpu=True,
        max_length=32,
        model_init_kwargs={"dtype": "bfloat16"},
        **settings,
    )
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    data = Dataset.from_list([{"prompt": row["prompt"], "completion": row["completion"]} for row in rows])
    trainer = SFTTrainer(str(folder), arguments, train_dataset=data, callbacks=[Deed()])
    trainer.train()
    if __name__ == "__main__":
        trainer.save_model(output_dir)


def _do(deed: str) -> None:
    rank = int(os.environ["RANK"])
    if deed == "exits":
        sys.exit(0)
    if deed == "exits at once":
        os._exit(0)
    if deed == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if deed == "rank 1 crashes" and rank == 1:
        raise RuntimeError("the disk of rank 1 is gone")


if __name__ == "__main__":
    {"loop": loop, "sft": sft}[sys.argv[1]](Path(sys.argv[2]), " ".join(sys.argv[3:]))
