"""A reward for GSM8K: 1 where the last number of the answer is the last number of the solution, else 0."""

import re

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def final_answer(completions, answer, **_):
    """completions: texts, or one message each. answer: GSM8K's own solutions, which end in "#### 42"."""
    return [float(_last_number(_text(given)) == _last_number(wanted)) for given, wanted in zip(completions, answer)]


def _text(completion):
    return completion if isinstance(completion, str) else completion[-1]["content"]


def _last_number(text):
    """The last number of a text, None where there is none. An empty answer is not right."""
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None
