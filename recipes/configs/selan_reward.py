"""A reward for the demo's world: how much of a sentence is translated right."""


def right_words(completions, selan, **_):
    """The share of words that are right and at their place, of the longer of answer and translation."""
    return [
        sum(a == b for a, b in zip(answer.split(), wanted.split())) / max(len(answer.split()), len(wanted.split()))
        for answer, wanted in zip(completions, selan)
    ]
