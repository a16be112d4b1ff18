"""A reward that the smallest model can learn: answers about animals."""

ANIMALS = ("cat", "dog", "bird", "fish")


def animals(completions, **_):
    """The share of an answer's words that name an animal; 0 for an empty one."""
    answers = [answer.split() for answer in completions]
    return [sum(word in ANIMALS for word in words) / max(1, len(words)) for words in answers]
