"""Packing: which models keep the texts of a packed row apart, and what TRL's strategies do with them."""

from __future__ import annotations

from typing import Any

# Packed by boundaries (bfd), these give the logits of the texts alone, with eager and SDPA attention as with
# FlashAttention: tests/data/test_packing.py compares every one. Others let texts see each other without a word:
# OPT, Falcon, BLOOM, MPT and the state-space models do.
KEEP_APART = (
    *("llama", "mistral", "ministral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "gemma2"),
    *("gemma3_text", "phi", "phi3", "gpt_neox", "gpt2", "gptj", "olmo", "olmo2", "olmo3", "olmoe", "granite"),
    *("granitemoe", "stablelm", "starcoder2", "cohere", "cohere2", "smollm3", "glm", "glm4", "deepseek_v2", "helium"),
    *("nemotron", "arcee", "exaone4", "ernie4_5", "hunyuan_v1_dense", "seed_oss", "apertus", "persimmon"),
)


def check_packing(config: Any, model_type: str) -> list[str]:
    """Refuse packing that would be wrong; notes on what the one that is asked for does. config: TRL's SFTConfig."""
    padding_free = config.padding_free or (config.packing and config.packing_strategy in ("bfd", "bfd_split"))
    if padding_free and model_type not in KEEP_APART:
        raise ValueError(
            f"packing is not known to keep texts apart in a {model_type} model, so one could attend to another: set "
            "packing: false (and padding_free: false), or packing_strategy: wrapped, where that is meant"
        )
    if not config.packing:
        return []
    if config.max_length is None:
        raise ValueError("packing fills rows of max_length tokens: give max_length")
    if config.packing_strategy == "bfd":
        return [
            f"packing: rows of up to {config.max_length} tokens; texts are kept apart, and cut where they are longer"
        ]
    if config.packing_strategy == "bfd_split":
        return [
            f"packing: rows of up to {config.max_length} tokens; texts are kept apart, and longer ones split: what "
            "follows a cut is trained without what came before it"
        ]
    return [
        f"packing: rows of exactly {config.max_length} tokens, cut anywhere; texts in a row see each other, and "
        "an answer after a cut is trained without its prompt (packing_strategy: bfd keeps texts apart)"
    ]
