"""From a row of any data set to the columns that TRL knows: prompt and completion, messages, text, preferences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from string import Formatter
from typing import Any

from datasets import Features, List, Value

from lota.data.options import FORMS, Source, asked_columns
from lota.messages import did_you_mean

TEXT = Value("string")
CONVERSATION = List({"role": TEXT, "content": TEXT})
ROLES = ("system", "developer", "user", "assistant", "tool")
# The names that ShareGPT's from/value pairs use.
SPEAKERS = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class Form:
    """How the rows of one source become columns.

    kind: a key of FORMS. templates: the text of every column; a lone `{field}` takes the field as it is.
    is_chat: prompt and answers are lists of messages. wraps: they are made so from text. target: "prompt" or
    "messages" where the rows have to be of another form than their own, to stand beside others in a mixture.
    skip_empty: rows with a null in a field of theirs are left out.
    """

    kind: str
    templates: dict[str, str]
    is_chat: bool = False
    wraps: bool = False
    target: str | None = None
    skip_empty: bool = False

    def is_empty(self, row: Mapping[str, Any]) -> bool:
        """Whether a field that the templates name is there, and null."""
        return any(name in row and row[name] is None for text in self.templates.values() for name in _names(text))

    @property
    def features(self) -> Features:
        """The columns that `columns` gives."""
        kind = self.target or self.kind
        if kind == "messages":
            return Features({"messages": CONVERSATION})
        names = list(FORMS[kind]) if self.target else list(self.templates)
        return Features(dict.fromkeys(names, CONVERSATION if self.is_chat else TEXT))


def choose_form(source: Source, row: Mapping[str, Any], place: str, is_preference: bool) -> Form:
    """The form of a source's rows: what its options say, else what the names of its fields say."""
    asked = asked_columns(source)
    foreign = set(asked) & ({"completion", "messages", "text"} if is_preference else {"chosen", "rejected"})
    if foreign:
        wanted = "prompt, chosen and rejected" if is_preference else "recipes/train_dpo.py"
        raise ValueError(
            f"options for {', '.join(sorted(foreign))} do not belong here: preference training takes {wanted}"
        )
    kinds = ("preference",) if is_preference else ("prompt", "messages", "text")
    if asked:
        kind = next(kind for kind in kinds if set(asked) <= set(FORMS[kind]))
    else:
        kind = _guess(kinds, row, place)
    templates = {column: _template(source, column) for column in FORMS[kind]}
    answers = {column: template for column, template in templates.items() if column != "prompt"}
    _check_fields(answers.values(), row, place)
    values = {column: _value(template, row, place) for column, template in answers.items()}
    is_chat = kind == "messages" or any(isinstance(value, list) for value in values.values())
    if is_chat and source.as_chat:
        raise ValueError(f"{place}: its rows are conversations already, and as_chat makes one of text: remove as_chat")
    if kind == "preference" and is_chat and _conversation(values["chosen"], place)[0]["role"] != "assistant":
        del templates["prompt"]  # both answers are whole conversations, out of which TRL takes the prompt
    return Form(kind, templates, is_chat or source.as_chat, source.as_chat, skip_empty=source.skip_empty)


def one_form(forms: Sequence[Form], places: Sequence[str]) -> list[Form]:
    """The forms of a mixture's sources, made to give the same columns. ValueError where that cannot be."""
    if all(form.features == forms[0].features for form in forms):
        return list(forms)
    kinds = {(form.kind, form.is_chat) for form in forms}
    if kinds == {("prompt", False), ("text", False)}:
        return [replace(form, target="prompt") for form in forms]
    if kinds == {("prompt", True), ("messages", True)}:
        return [replace(form, target="messages") for form in forms]
    named = [f"{place} holds {form.kind}{' as chat' if form.is_chat else ''}" for form, place in zip(forms, places)]
    raise ValueError(
        f"a mixture needs rows of one form, but {', '.join(dict.fromkeys(named))}. as_chat: true turns prompt and "
        "completion into messages; plain text goes together with plain prompt and completion only"
    )


def columns(row: Mapping[str, Any], form: Form, place: str) -> dict[str, Any]:
    """What TRL gets for a row. ValueError names the place of a field that is missing, empty or of another kind."""
    _check_fields(form.templates.values(), row, place)
    made: dict[str, Any] = {}
    for column, template in form.templates.items():
        value = _value(template, row, place)
        if form.wraps:
            made[column] = [{"role": "user" if column == "prompt" else "assistant", "content": _text(value, place)}]
        elif form.is_chat and not (column == "prompt" and isinstance(value, str)):
            made[column] = _conversation(value, f"{place}, {column}")
        elif form.is_chat:
            made[column] = [{"role": "user", "content": value}]
        else:
            made[column] = _text(value, place)
    if form.target == "messages" and form.kind == "prompt":
        return {"messages": made["prompt"] + made["completion"]}
    if form.target == "prompt" and form.kind == "text":
        # Without a prompt every token is the completion's: the loss of plain text.
        return {"prompt": "", "completion": made["text"]}
    return made


def _guess(kinds: Sequence[str], row: Mapping[str, Any], place: str) -> str:
    fits = [kind for kind in kinds if set(FORMS[kind]) <= set(row)]
    if kinds == ("preference",):
        return "preference"
    if len(fits) > 1:
        raise ValueError(
            f"{place} could be read as {' or '.join(fits)}: say which, for example {fits[-1]}_field: {fits[-1]}"
        )
    if not fits:
        raise ValueError(
            f"{place} has the fields {', '.join(map(repr, row))}, and none of prompt and completion, messages, or "
            "text: name yours with prompt_field and completion_field, messages_field or text_field, or with templates"
        )
    return fits[0]


def _template(source: Source, column: str) -> str:
    template = getattr(source, f"{column}_template", None)
    if template is None:
        return "{" + (getattr(source, f"{column}_field") or column) + "}"
    try:
        names = _names(template)
    except ValueError as error:
        raise ValueError(f"{column}_template {template!r}: {error}; write '{{{{' for a brace") from error
    if not names:
        raise ValueError(f"{column}_template names no field: write for example '{{question}}', got {template!r}")
    return template


def _names(template: str) -> list[str]:
    return [part[1] for part in Formatter().parse(template) if part[1] is not None]


def _check_fields(templates: Any, row: Mapping[str, Any], place: str) -> None:
    for template in templates:
        for name in _names(template):
            if name not in row:
                raise ValueError(
                    f"{place} has no field {name!r}; it has {', '.join(map(repr, row))}" + did_you_mean(name, row)
                )
            if row[name] is None:
                raise ValueError(f"{place}: the field {name!r} is empty (null); skip_empty: true leaves such rows out")


def _value(template: str, row: Mapping[str, Any], place: str) -> Any:
    """A lone field's own value; the text of any other template."""
    names = _names(template)
    if template == "{" + names[0] + "}":
        return row[names[0]]
    for name in names:
        _text(row[name], f"{place}, field {name!r}")
    return template.format_map(row)


def _text(value: Any, place: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)):
        return str(value)
    raise ValueError(f"{place}: expected text, got {type(value).__name__} {value!r:.80}")


def _conversation(value: Any, place: str) -> list[dict[str, str]]:
    """Messages of role and content; ShareGPT's from and value are the same thing."""
    if not isinstance(value, list) or not value:
        raise ValueError(
            f"{place}: expected a list of messages such as {{'role': 'user', 'content': '...'}}, got {value!r:.80}. "
            "A .csv holds text only: keep conversations in .jsonl or .parquet"
        )
    made = []
    for message in value:
        given = {key: item for key, item in message.items() if item is not None} if isinstance(message, dict) else {}
        if given.keys() == {"from", "value"}:
            given = {"role": SPEAKERS.get(given["from"], given["from"]), "content": given["value"]}
        if given.keys() != {"role", "content"} or not isinstance(given["content"], str):
            raise ValueError(
                f"{place}: a message must have role and content, both text, got {message!r:.120}. Tool calls and "
                "images are not supported"
            )
        if given["role"] not in ROLES:
            raise ValueError(
                f"{place}: role must be one of {', '.join(ROLES)}, got {given['role']!r}"
                + did_you_mean(given["role"], ROLES)
            )
        made.append({"role": given["role"], "content": given["content"]})
    return made
