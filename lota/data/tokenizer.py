"""The base's tokenizer: the ids its makers' own tool gives, a padding token that needs no new row, no unknown rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import cached_file

from lota.data.sentencepiece_tokenizer import wrap_sentencepiece
from lota.packaged import CONFIGS, find

# What of a tokenizer_config.json still holds where the class that it names is not used.
KEPT = (
    *("unk_token", "bos_token", "eos_token", "pad_token", "add_bos_token", "add_eos_token"),
    *("chat_template", "model_max_length", "padding_side", "clean_up_tokenization_spaces"),
)


def chat_template(given: str | None) -> str | None:
    """The path that `chat_template_path` means: a packaged template's for its name (plain_chat), else itself."""
    return given if given is None else str(find(CONFIGS, given, ".jinja") or given)


def load_tokenizer(model: str, revision: str = "main") -> PreTrainedTokenizerBase:
    """The tokenizer of the base. ValueError where its tokens and the rows of the model's embedding do not fit.

    One without a padding token, or with one that the embedding has no row for, pads with its end-of-text token, whose
    place in the padding counts nowhere.
    """
    tokenizer = _load(model, revision)
    config = AutoConfig.from_pretrained(model, revision=revision).get_text_config()
    num_rows = config.vocab_size
    has_row = tokenizer.pad_token is not None and tokenizer.convert_tokens_to_ids(tokenizer.pad_token) < num_rows
    without_row = None if has_row else tokenizer.pad_token
    if not has_row:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"the tokenizer of {model} has neither a padding nor an end-of-text token: name them "
                "in its tokenizer_config.json (pad_token, eos_token)"
            )
        tokenizer.pad_token = tokenizer.eos_token
    check_vocabulary(tokenizer, num_rows, model, without_row)
    return tokenizer


def check_vocabulary(tokenizer: Any, num_rows: int, name: str, exempt: str | None = None) -> None:
    """Refuse tokens that the embedding has no row for; `exempt`, a padding token that is not used, may lack one."""
    missing = sorted(
        (number, token) for token, number in tokenizer.get_vocab().items() if number >= num_rows and token != exempt
    )
    if missing:
        raise ValueError(
            f"the tokenizer of {name} has {len(missing)} tokens for which the model has no embedding row ("
            f"{', '.join(repr(token) for _, token in missing[:3])}; the model has {num_rows} rows). If "
            "the tokens are not needed, take them out of the tokenizer; else make a base that has the rows, "
            "model.resize_token_embeddings(len(tokenizer)) and save_pretrained of model and tokenizer into one folder, "
            f"train on that folder, and let the new rows learn: dense: [\"model.embed_tokens.weight[{num_rows}:]\", "
            f"\"lm_head.weight[{num_rows}:]\"]"
        )


def _load(name: str, revision: str) -> PreTrainedTokenizerBase:
    found = {
        file: cached_file(
            name,
            file,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        for file in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja")
    }
    if found["tokenizer.json"] is not None or found["tokenizer.model"] is None:
        return AutoTokenizer.from_pretrained(name, revision=revision)
    options: dict[str, Any] = {}
    added: dict[str, Any] = {}
    if found["tokenizer_config.json"] is not None:
        content = json.loads(Path(found["tokenizer_config.json"]).read_text(encoding="utf-8"))
        options = {key: _plain(content[key]) for key in KEPT if key in content}
        added = content.get("added_tokens_decoder", {})
    if found["chat_template.jinja"] is not None:
        options["chat_template"] = Path(found["chat_template.jinja"]).read_text(encoding="utf-8")
    tokenizer = wrap_sentencepiece(Path(found["tokenizer.model"]).read_bytes(), **options)
    for number in sorted(map(int, added)):
        token = added[str(number)]
        tokenizer.add_tokens([token["content"]], special_tokens=bool(token.get("special")))
        if tokenizer.convert_tokens_to_ids(token["content"]) != number:
            raise ValueError(
                f"{name}: tokenizer_config.json gives {token['content']!r} the id {number}, which does not follow on "
                "the pieces of tokenizer.model: save the tokenizer as a tokenizer.json where it was made"
            )
    return tokenizer


def _plain(value: Any) -> Any:
    """The text of a token that a tokenizer_config.json spells out as a dict."""
    return value["content"] if isinstance(value, dict) and "content" in value else value
