"""A word-level tokenizer and a model of a few weights, for tests that read tokens one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<pad>", "</s>", "<unk>", "<user>", "<assistant>", "<end>")
WORDS = tuple("abcdefghijklmn")
CHAT = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + ' <end>' }}{% endgeneration %}{{ ' ' }}"
    "{% else %}{{ m['content'] + ' <end> ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)


def tokenizer(chat_template: str | None = CHAT) -> PreTrainedTokenizerFast:
    """Words are tokens; `</s>` ends a text; a turn is `<role> ... <end>`."""
    vocabulary = {word: number for number, word in enumerate((*SPECIAL, *WORDS))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>", "<end>"],
    )
    made.chat_template = chat_template
    return made


def model(num_rows: int = 32, **changes: Any) -> LlamaForCausalLM:
    """One layer of eight columns."""
    sizes: dict[str, Any] = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    ids = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=num_rows, **sizes | ids | changes))


def save(folder: Path, chat_template: str | None = CHAT, **changes: Any) -> Path:
    """Both in a folder, as a base for the recipes."""
    model(**changes).save_pretrained(folder)
    tokenizer(chat_template).save_pretrained(folder)
    return folder
