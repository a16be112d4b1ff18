"""The base's tokenizer: the ids its makers' own tool gives, a padding token that needs no new row, no unknown rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import cached_file

from lota.architecture import read_config
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


def load_tokenizer(model: str, revision: str = "main", trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of the base. ValueError where its tokens and the rows of the model's embedding do not fit.

    It adds no end-of-text token by itself: training ends every text with one, and two would be learnt; a prompt is not
    ended at all. One without a padding token, or with one that the embedding has no row for, pads with its end-of-text
    token, whose place in the padding counts nowhere.
    """
    tokenizer = _load(model, revision, trust_remote_code)
    leave_end_to_the_rows(tokenizer, model)
    config = read_config(model, revision=revision, trust_remote_code=trust_remote_code).get_text_config()
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


def encode(tokenizer: Any, row: Mapping[str, Any]) -> tuple[list[int], int]:
    """Ids of prompt and completion, and how many belong to the prompt: the very ones that TRL trains on.

    row: prompt and completion, texts or lists of messages, and with these tools (JSON). Texts are ended with the end
    token unless they bring it; messages with what the chat template puts there. The completion begins where the ids of
    the whole leave those of the prompt alone, which is earlier than the prompt's end where tokens merge over it.
    """
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str):
        end = tokenizer.eos_token or ""
        text = completion if end and completion.endswith(end) else completion + end
        whole = list(tokenizer(prompt + text)["input_ids"])
    else:
        text = tokenizer.apply_chat_template([*prompt, *completion], tokenize=False, tools=_tools(row))
        whole = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return whole, _common_length(encode_prompt(tokenizer, row), whole)


def encode_prompt(tokenizer: Any, row: Mapping[str, Any]) -> list[int]:
    """Ids after which the model is to write the answer."""
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True, tools=_tools(row))
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _tools(row: Mapping[str, Any]) -> list[Any] | None:
    tools = row.get("tools")
    return None if tools is None else list(json.loads(tools))


def _common_length(one: Sequence[int], other: Sequence[int]) -> int:
    return next((place for place, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def leave_end_to_the_rows(tokenizer: Any, name: str) -> None:
    """Have a tokenizer add no end-of-text token after every text, in place. ValueError where that cannot be had."""
    if not _adds_end(tokenizer):
        return
    for change in (_switch_off, _change_processor):
        change(tokenizer)
        if not _adds_end(tokenizer):
            return
    raise ValueError(
        f"the tokenizer of {name} ends every text with {tokenizer.eos_token!r} by itself, also a prompt that is to be "
        "continued: save one that does not (add_eos_token: false in its tokenizer_config.json)"
    )


def _adds_end(tokenizer: Any) -> bool:
    end = tokenizer.eos_token_id
    return end is not None and tokenizer("a")["input_ids"][-1:] == [end]


def _switch_off(tokenizer: Any) -> None:
    if hasattr(tokenizer, "add_eos_token"):
        tokenizer.add_eos_token = False
        if hasattr(tokenizer, "update_post_processor"):
            tokenizer.update_post_processor()


def _change_processor(tokenizer: Any) -> None:
    """Take the end token out of the template of a fast tokenizer's post-processor."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return
    state = json.loads(backend.to_str())
    processor = state.get("post_processor") or {}
    for part in [processor, *processor.get("processors", ())]:
        if part.get("type") == "TemplateProcessing":
            for kind in ("single", "pair"):
                part[kind] = [
                    item for item in part[kind] if item.get("SpecialToken", {}).get("id") != tokenizer.eos_token
                ]
    tokenizer._tokenizer = type(backend).from_str(json.dumps(state))


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
            f'train on that folder, and let the new rows learn: dense: ["model.embed_tokens.weight[{num_rows}:]", '
            f'"lm_head.weight[{num_rows}:]"]'
        )


def _load(name: str, revision: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
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
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
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
