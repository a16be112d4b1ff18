"""A reward for the demo's world: how much of an answer is in the language that was asked for."""


def selan_words(completions, dictionary, **_):
    """The share of an answer's words that are in the dictionary; 0 for an empty one."""
    answers = [answer.split() for answer in completions]
    return [
        sum(word in known.split() for word in words) / max(1, len(words)) for words, known in zip(answers, dictionary)
    ]
