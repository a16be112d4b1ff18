"""What data, tokenizer and loss options must be together, checked on every rank before a model is loaded."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset
from trl.chat_template_utils import (
    get_training_chat_template,
    has_generation_markers,
    is_chat_template_stop_token_trained,
)

from lota.architecture import read_config
from lota.data.dataset import Sets
from lota.data.packing import check_packing
from lota.data.tokenizer import chat_template, load_tokenizer


def check(
    sets: Sets,
    model: str,
    revision: str,
    config: Any,
    trust_remote_code: bool = False,
    place_of: Callable[[tuple[str, ...]], str] | None = None,
) -> list[str]:
    """Refuse what TRL would train wrongly, or end on later; notes for the user.

    config: TRL's SFTConfig; of a DPOConfig only what it has in common counts. place_of: finds the file and line of the
    first row with a sequence of roles, for a message.
    """
    if sets.evaluation is None:
        _refuse_evaluation(config)
    tokenizer = load_tokenizer(model, revision, trust_remote_code)
    is_chat = _is_chat(sets.train)
    template_path = chat_template(getattr(config, "chat_template_path", None))
    if template_path is not None:
        _use_template(tokenizer, template_path, is_chat)
    if is_chat and tokenizer.chat_template is None:
        raise ValueError(
            f"the rows are conversations, and the tokenizer of {model} has no chat template: give "
            "chat_template_path: FILE.jinja, or plain_chat, a template that comes with lota and needs no new token"
        )
    if is_chat:
        _check_roles(tokenizer, sets, place_of)
    notes = _check_loss(sets.train, config, is_chat)
    if getattr(config, "assistant_only_loss", False):
        notes += _check_assistant_masks(tokenizer, sets)
    if getattr(config, "dataset_text_field", "text") != "text":
        raise ValueError("dataset_text_field is called text_field here: rename it")
    if hasattr(config, "packing"):
        base = read_config(model, revision=revision, trust_remote_code=trust_remote_code)
        kind = base.get_text_config().model_type
        notes += check_packing(config, kind)
    return notes


def _refuse_evaluation(config: Any) -> None:
    """Options that nothing would come of where there are no rows to evaluate on."""
    asked = {
        "eval_strategy": config.eval_strategy != "no",
        "save_strategy: best": config.save_strategy == "best",
        "load_best_model_at_end": config.load_best_model_at_end,
    }
    idle = [name for name, is_asked in asked.items() if is_asked]
    if idle:
        raise ValueError(
            f"there are no evaluation rows, so {', '.join(idle)} would be ignored: give eval_file, eval_split, "
            f"eval_rows or eval_fraction, or remove {'it' if len(idle) == 1 else 'them'}"
        )


def _is_chat(rows: Dataset) -> bool:
    return any(not hasattr(feature, "dtype") or feature.dtype != "string" for feature in rows.features.values())


def _use_template(tokenizer: Any, path: str, is_chat: bool) -> None:
    if not path.endswith((".jinja", ".j2")):
        raise ValueError(
            f"chat_template_path must be a .jinja file, got {path!r}: TRL would add the other tokenizer's tokens and "
            "resize the model under the ticket. Save that tokenizer's chat_template into a file"
        )
    if not Path(path).is_file():
        raise ValueError(f"chat_template_path: no such file: {path}")
    if not is_chat:
        raise ValueError("chat_template_path would be ignored: the rows are no conversations (as_chat makes them such)")
    tokenizer.chat_template = Path(path).read_text(encoding="utf-8")


def _check_roles(tokenizer: Any, sets: Sets, place_of: Callable[[tuple[str, ...]], str] | None) -> None:
    """Render one conversation of every sequence of roles: templates refuse some (a system prompt, two users' turns)."""
    seen: set[tuple[str, ...]] = set()
    for rows in sets:
        if rows is None:
            continue
        columns = [name for name in ("prompt", "completion", "messages", "chosen") if name in rows.column_names]
        for batch in rows.select_columns(columns).iter(1000):
            for parts in zip(*(batch[name] for name in columns)):
                messages = [message for part in parts if isinstance(part, list) for message in part]
                roles = tuple(str(message["role"]) for message in messages)
                if not roles or roles in seen:
                    continue
                seen.add(roles)
                try:
                    tokenizer.apply_chat_template(messages, tokenize=False)
                except Exception as error:  # noqa: BLE001 (templates raise what they like)
                    where = place_of(roles) if place_of is not None else "a row"
                    raise ValueError(
                        f"{where}: the chat template refuses a conversation of {', '.join(roles)}: {error}. Change the "
                        "row, or give a template that takes it (chat_template_path)"
                    ) from None


def _check_loss(rows: Dataset, config: Any, is_chat: bool) -> list[str]:
    """Options of the loss against the columns that there are."""
    has_completion = "completion" in rows.column_names
    if getattr(config, "completion_only_loss", None) and not has_completion:
        raise ValueError(
            f"completion_only_loss needs prompt and completion, and the rows are {', '.join(rows.column_names)}: "
            "remove it; for conversations there is assistant_only_loss"
        )
    if getattr(config, "assistant_only_loss", False):
        if not is_chat:
            raise ValueError(
                "assistant_only_loss needs conversations: remove it (of prompt and completion the completion alone is "
                "trained), or set as_chat: true, which makes conversations of them"
            )
    elif "messages" in rows.column_names:
        return ["the loss counts whole conversations, users' turns too; assistant_only_loss: true trains the answers"]
    return []


def _check_assistant_masks(tokenizer: Any, sets: Sets) -> list[str]:
    """The template must say which tokens are the assistant's, and every row must have some."""
    if not tokenizer.is_fast:
        raise ValueError(
            "assistant_only_loss needs a tokenizer that knows the places of its tokens in the text, and this "
            "tokenizer.model cannot be turned into one: use prompt and completion with as_chat: true instead"
        )
    training_template = None
    if not has_generation_markers(tokenizer.chat_template):
        try:
            training_template = get_training_chat_template(tokenizer)
        except ValueError as error:
            raise ValueError(
                "assistant_only_loss needs a chat template that marks the assistant's turns with {% generation %} and "
                "{% endgeneration %}; this tokenizer's has no such marks, and TRL has no training version of it. Give "
                "chat_template_path: a copy of it with the marks, or plain_chat; or use prompt and "
                "completion with as_chat: true, which needs no marks"
            ) from error
    if _num_answers(tokenizer, training_template) != 2:
        raise ValueError(
            "assistant_only_loss: with this chat template and tokenizer the marks do not come out right: of a "
            "conversation with two answers, {% generation %} marks something else. A marked part must begin and end "
            "with characters that belong to a token: leave blanks at its ends out of it"
        )
    for rows in sets:
        if rows is not None:
            _check_turns(rows)
    if is_chat_template_stop_token_trained(tokenizer, chat_template=training_template):
        return []
    return ["the chat template leaves the end of the assistant's turn out of the loss: the model may not learn to stop"]


def _num_answers(tokenizer: Any, chat_template: str | None) -> int:
    """How many separate runs of tokens the template marks in a conversation with two answers."""
    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, "abcd")]
    found = tokenizer.apply_chat_template(
        turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, chat_template=chat_template
    )
    return sum(is_answer for is_answer, _ in groupby(found["assistant_masks"]))


def _check_turns(rows: Dataset) -> None:
    column = "messages" if "messages" in rows.column_names else "completion"
    done = 0
    for batch in rows.with_format("arrow").iter(1000):
        messages = batch.column(column).combine_chunks()
        is_answer = pc.equal(pc.struct_field(messages.flatten(), "role"), "assistant").to_numpy(zero_copy_only=False)
        lengths = messages.value_lengths().to_numpy()
        answers = np.add.reduceat(is_answer.astype(np.int64), np.cumsum(lengths) - lengths)
        if not answers.all():
            number = done + int(answers.argmin()) + 1
            raise ValueError(f"assistant_only_loss: row {number} has no turn of the assistant: remove it from the data")
        done += len(lengths)
