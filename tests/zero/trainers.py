"""The same two blocks around a hand-written loop, transformers' Trainer, and TRL's SFT and DPO trainers."""

from __future__ import annotations

import copy
import gc
import json
from pathlib import Path
from typing import Any

import torch

import lota

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "bird",
    "sees",
    "likes",
    "eats",
    "small",
    "red",
    "blue",
    "fish",
    "tree",
    "house",
    "and",
    "or",
    "not",
    "yes",
    "no",
    "one",
    "two",
    "three",
]


def make_base(folder: Path) -> Path:
    """A random small Llama with a word tokenizer, saved as a user's base would be."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    generator = torch.Generator().manual_seed(1)

    def sentence(length: int) -> str:
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=generator).tolist())

    rows = [{"prompt": sentence(4), "completion": " " + sentence(3), "other": " " + sentence(3)} for _ in range(64)]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


def _deepspeed_config() -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": 20000, "stage3_param_persistence_threshold": 0},
    }


def _settings(folder: Path, steps: int) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "out"),
        "deepspeed": _deepspeed_config(),
        "bf16": True,
        "use_cpu": True,
        "max_steps": steps,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "seed": 0,
    }


def _trainer(kind: str, folder: Path, steps: int, checkpointing: str | None, **changes: Any) -> Any:
    """A trainer with a freshly loaded model, as a script would build it. changes: of its arguments."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    settings = _settings(folder, steps) | changes
    settings["gradient_checkpointing"] = checkpointing is not None
    if checkpointing:
        settings["gradient_checkpointing_kwargs"] = {"use_reentrant": checkpointing == "reentrant"}
    if kind == "trainer":
        arguments = TrainingArguments(**settings)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        ids = [tokenizer(row["prompt"] + row["completion"])["input_ids"] for row in rows]
        examples = [{"input_ids": i, "labels": i} for i in ids]
        return Trainer(model, arguments, train_dataset=examples, eval_dataset=examples[:8])
    if kind == "sft":
        from trl import SFTConfig, SFTTrainer

        arguments = SFTConfig(**settings, max_length=32)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        data = Dataset.from_list([{"prompt": row["prompt"], "completion": row["completion"]} for row in rows])
        return SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer)
    from trl import DPOConfig, DPOTrainer

    arguments = DPOConfig(**settings, max_length=32)
    model, reference = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16) for _ in range(2))
    data = Dataset.from_list([{"prompt": r["prompt"], "chosen": r["completion"], "rejected": r["other"]} for r in rows])
    return DPOTrainer(model, reference, arguments, train_dataset=data, processing_class=tokenizer)


def _forget(trainer: Any) -> None:
    """Let go of an engine so that another can be built in this process."""
    trainer.model_wrapped.destroy()
    del trainer
    gc.collect()
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()


def stop_and_go_on(folder: str, mask: lota.Mask) -> dict[str, Any]:
    """transformers' Trainer in a block: four steps with checkpoints, then the last two again from the second; and the
    weights of the best checkpoint, by a metric that makes it the second."""
    from tests.zero.cases import gathered

    base = Path(folder)
    config = _deepspeed_config()
    config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    weights, names = {}, set()
    best = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "greater_is_better": True}
    for run_name, resume, extra in (("straight", None, {}), ("resumed", "checkpoint-2", {}), ("best", None, best)):
        output = base / ("best" if extra else "checkpoints")
        saving = {"save_strategy": "steps", "save_steps": 2, "output_dir": str(output), "deepspeed": config}
        trainer = _trainer("trainer", base, 4, None, **saving, **extra)
        with lota.sparse_zero3(mask) as run:
            trainer.train(str(output / resume) if resume else None)
            weights[run_name] = gathered(run.engine.module)
            learning_rate = trainer.optimizer.param_groups[0]["lr"]
            history = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
            chosen = trainer.state.best_model_checkpoint
        run.release()
        _forget(trainer)
        if run_name == "straight":
            names = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
    trainer = _trainer("trainer", base, 4, None, output_dir=str(base / "best"))
    with lota.sparse_zero3(mask) as run:
        trainer.train()
        run.engine.load_checkpoint(str(base / "best" / "checkpoint-2"))
        weights["at step 2 of best"] = gathered(run.engine.module)
    run.release()
    _forget(trainer)
    return {"weights": weights, "names": names, "learning_rate": learning_rate, "eval": history, "best": chosen}


def calibrate_and_train(
    kind: str,
    folder: str,
    score: str,
    checkpointing: str | None = None,
    shard_group_size: int | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Both blocks with a trainer; returns weights before and after, and what was saved."""
    from safetensors.torch import load_file

    from tests.zero.cases import gathered

    base = Path(folder)
    trainer = _trainer(kind, base, 3, checkpointing, **copy.deepcopy(changes))
    with lota.calibration_zero3(score=score, density=0.1) as calibration:
        trainer.train()
    mask = calibration.mask()
    _forget(trainer)

    trainer = _trainer(kind, base, 3, checkpointing, **copy.deepcopy(changes))
    with lota.sparse_zero3(mask, shard_group_size=shard_group_size) as run:
        trainer.train()
    saved = run.save_ticket(base / f"ticket-{kind}-{score}-{shard_group_size}", {"score": score})
    after = gathered(run.engine.module)
    flags = [param.requires_grad for param in trainer.model.parameters()]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    report = run.report()
    run.engine = None
    _forget(trainer)
    before = load_file(base / "model.safetensors")
    return {
        "mask": mask,
        "before": before,
        "after": after,
        "saved": saved,
        "report": report,
        "flags": flags,
        "losses": losses,
    }
