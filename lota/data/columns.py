"""From a row of any data set to the columns that TRL knows: prompt and completion, messages, text, preferences."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from datasets import Features, List, Value

from lota.data.options import FORMS, TASKS, Source, asked_columns
from lota.data.templates import Template, is_missing
from lota.messages import did_you_mean

TEXT = Value("string")
CONVERSATION = List({"role": TEXT, "content": TEXT})
ROLES = ("system", "developer", "user", "assistant", "tool")
# The names that ShareGPT's from/value pairs use.
SPEAKERS = {"human": "user", "gpt": "assistant"}
BESIDE = {
    "images": "pictures are not trained",
    "image": "pictures are not trained",
    "videos": "videos are not trained",
    "audio": "sound is not trained",
    "audios": "sound is not trained",
    "chat_template_kwargs": "write what it does into the messages, or into a template of your own (chat_template_path)",
    "documents": "write them into the messages",
}
"""Fields beside a conversation that mean something to others, and are refused rather than dropped."""
REST = "fields"
"""Of a question, whose answer a reward judges: the column of all other fields of the row, one JSON object."""
_TAKES = {
    "examples": "preference training takes recipes/train_dpo.py",
    "preferences": "preference training takes prompt, chosen and rejected",
    "prompts": "training on a reward takes prompt, and all other fields go to the reward as they are",
}


@dataclass(frozen=True)
class Form:
    """How the rows of one source become columns.

    kind: a key of FORMS. templates: what every column is made of.
    is_chat: prompt and answers are lists of messages. wraps: they are made so from text. target: "prompt" or
    "messages" where the rows have to be of another form than their own, to stand beside others in a mixture.
    skip_empty: rows with nothing in a column are left out. has_tools: a column of the tools (JSON) that the chat
    template is to show is made from the field of that name.
    """

    kind: str
    templates: dict[str, Template]
    is_chat: bool = False
    wraps: bool = False
    target: str | None = None
    skip_empty: bool = False
    has_tools: bool = False

    @property
    def fields(self) -> set[str]:
        """The fields of a row that are read."""
        beside = {"system", "tools"} if self.is_chat else set()
        return {name for template in self.templates.values() for name in template.names} | beside

    @property
    def keeps_rest(self) -> bool:
        """Whether the other fields of a row are kept too, in the column REST."""
        return self.kind == "question"

    def is_empty(self, row: Mapping[str, Any]) -> bool:
        """Whether a column would be made of nothing."""
        return any(template.is_missing(row) for template in self.templates.values())

    @property
    def features(self) -> Features:
        """The columns that `columns` gives."""
        kind = self.target or self.kind
        names = ["messages"] if kind == "messages" else list(FORMS[kind]) if self.target else list(self.templates)
        beside = {"tools": TEXT} if self.has_tools else {REST: TEXT} if self.keeps_rest else {}
        return Features(dict.fromkeys(names, CONVERSATION if self.is_chat else TEXT) | beside)


def choose_form(source: Source, row: Mapping[str, Any], place: str, task: str) -> Form:
    """The form of a source's rows: what its options say, else what the names of its fields say. task: of `TASKS`."""
    asked = asked_columns(source)
    kinds = TASKS[task]
    foreign = set(asked).difference(*(FORMS[kind] for kind in kinds))
    if foreign:
        raise ValueError(f"options for {', '.join(sorted(foreign))} do not belong here: {_TAKES[task]}")
    if asked:
        kind = next(kind for kind in kinds if set(asked) <= set(FORMS[kind]))
    else:
        kind = _guess(kinds, row, place)
    templates = {column: _template(source, column) for column in FORMS[kind]}
    answers = {column: template for column, template in templates.items() if column != "prompt"} or templates
    _check_fields(answers, row, place)
    values = {column: _value(template, row, place) for column, template in answers.items()}
    is_chat = kind == "messages" or any(isinstance(value, list) for value in values.values())
    if is_chat and source.as_chat:
        raise ValueError(f"{place}: its rows are conversations already, and as_chat makes one of text: remove as_chat")
    if kind == "preference" and is_chat and _conversation(values["chosen"], place)[0]["role"] != "assistant":
        del templates["prompt"]  # both answers are whole conversations, out of which TRL takes the prompt
    form = Form(kind, templates, is_chat or source.as_chat, source.as_chat, skip_empty=source.skip_empty)
    has_tools = form.is_chat and not source.as_chat and "tools" in row
    if has_tools and form.keeps_rest:
        raise ValueError(f"{place}: the model would not be shown 'tools': rename the field if it is for the reward")
    return replace(form, has_tools=has_tools)


def one_form(forms: Sequence[Form], places: Sequence[str]) -> list[Form]:
    """The forms of a mixture's sources, made to give the same columns. ValueError where that cannot be."""
    if any(form.has_tools for form in forms) and all(form.is_chat for form in forms):
        forms = [replace(form, has_tools=True) for form in forms]
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
    _check_fields(form.templates, row, place)
    made: dict[str, Any] = {}
    for column, template in form.templates.items():
        value = _value(template, row, place)
        if form.wraps:
            made[column] = [{"role": "user" if column == "prompt" else "assistant", "content": _text(value, place)}]
        elif form.is_chat and not (column == "prompt" and isinstance(value, str)):
            made[column] = _conversation(value, f"{place}, {column}")
        elif form.is_chat:
            made[column] = [{"role": "user", "content": _text(value, place)}]
        else:
            made[column] = _text(value, place)
    if form.is_chat:
        _use_beside(row, form, made, place)
    if form.keeps_rest:
        made[REST] = json.dumps({name: value for name, value in row.items() if name != "prompt"}, default=str)
    if form.target == "messages" and form.kind == "prompt":
        return {"messages": made.pop("prompt") + made.pop("completion"), **made}
    if form.target == "prompt" and form.kind == "text":
        # Without a prompt every token is the completion's: the loss of plain text.
        return {"prompt": "", "completion": made["text"]}
    return made


def _guess(kinds: Sequence[str], row: Mapping[str, Any], place: str) -> str:
    fits = [kind for kind in kinds if set(FORMS[kind]) <= set(row)]
    if len(kinds) == 1:
        return kinds[0]
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


def _use_beside(row: Mapping[str, Any], form: Form, made: dict[str, Any], place: str) -> None:
    """Put a system prompt and tools, fields beside the conversation, where they belong; refuse what would be
    dropped."""
    for name, reason in BESIDE.items():
        if name not in form.fields and not is_missing(row.get(name)) and row[name] not in ([], {}):
            raise ValueError(f"{place}: {name!r} stands beside the conversation and would be dropped: {reason}")
    if form.wraps:
        named = [name for name in ("system", "tools") if not is_missing(row.get(name)) and row[name] != []]
        if named and not any(named[0] in template.names for template in form.templates.values()):
            raise ValueError(
                f"{place}: {named[0]!r} would be dropped: put it into prompt_template, or make the row a conversation"
            )
        return
    system = row.get("system")
    if not is_missing(system):
        first = next(column for column in ("prompt", "messages", "chosen") if column in made)
        columns_of_it = ("chosen", "rejected") if first == "chosen" else (first,)
        for column in columns_of_it:
            if made[column][0]["role"] in ("system", "developer"):
                raise ValueError(f"{place}: the field 'system' and the first message both are system prompts: keep one")
            made[column] = [{"role": "system", "content": _text(system, f"{place}, field 'system'")}, *made[column]]
    if form.has_tools:
        made["tools"] = _tools(row.get("tools"), place)


def _tools(value: Any, place: str) -> str | None:
    """The tools as JSON text, which TRL hands to the chat template."""
    if is_missing(value) or value == []:
        return None
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"{place}, field 'tools': not JSON ({error})") from None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise ValueError(f"{place}, field 'tools': expected a list of tools, each an object, got {value!r:.80}")
    return json.dumps([_without_nulls(tool) for tool in value])


def _without_nulls(value: Any) -> Any:
    """Without the nulls that tables put where other rows have a key."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _template(source: Source, column: str) -> Template:
    text = getattr(source, f"{column}_template", None)
    if text is None:
        return Template.field(getattr(source, f"{column}_field") or column)
    try:
        return Template.parse(text)
    except ValueError as error:
        raise ValueError(f"{column}_template {text!r}: {error}") from None


def _check_fields(templates: Mapping[str, Template], row: Mapping[str, Any], place: str) -> None:
    for template in templates.values():
        for name in template.names:
            if name not in row:
                raise ValueError(
                    f"{place} has no field {name!r}; it has {', '.join(map(repr, row))}" + did_you_mean(name, row)
                )
        if template.is_missing(row):
            names = " and ".join(map(repr, template.names))
            many = len(template.names) > 1
            raise ValueError(
                f"{place}: the field{'s' * many} {names} {'are' if many else 'is'} empty (null, NaN or no text); "
                "skip_empty: true leaves such rows out"
            )


def _value(template: Template, row: Mapping[str, Any], place: str) -> Any:
    """A lone field's own value; the text of any other template."""
    if template.is_lone:
        return row[template.names[0]]
    return template.fill(row, lambda value, name: _text(value, f"{place}, field {name!r}"))


def _text(value: Any, place: str) -> str:
    if isinstance(value, str):
        if any("\ud800" <= char <= "\udfff" for char in value):
            raise ValueError(f"{place}: the text holds half of a character (a lone surrogate), got {value!r:.80}")
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
        made.append({"role": given["role"], "content": _text(given["content"], place)})
    return made
