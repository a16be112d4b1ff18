"""Made-up tasks: translations into languages that conflict in a chosen share of their words, and unlike tasks.

A sentence has an article before every noun phrase; a language says the same in words of its own, without articles. The
base learns to translate into the *known* languages, and meets the *new* ones in plain text only: to translate into one
of them is a task. Any two new languages share the words that none of both replaced. `reverse` and `answer` are tasks of
another kind.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

KNOWN = ("selan", "vokar", "tirun", "melas")
NEW = ("ordic", "peshan", "quell", "ruvian", "saltic")
UNLIKE = ("reverse", "answer")

Row = dict[str, str]


@dataclass(frozen=True)
class WorldConfig:
    """What determines the world. conflict: the chance of a word to differ from the common one, in each new language but
    the first."""

    seed: int = 11
    conflict: float = 0.5
    num_nouns: int = 60
    num_adjectives: int = 30
    num_verbs: int = 30
    num_places: int = 6


class World:
    """The words, dictionaries and rows of one configuration; equal configurations give equal texts, on any machine."""

    def __init__(self, config: WorldConfig) -> None:
        self.config = config
        rng = random.Random(config.seed)
        taken = {"the", "say", "in", "reverse", "who", *KNOWN, *NEW}
        count = (config.num_nouns, config.num_adjectives, config.num_verbs, config.num_places)
        self.nouns, self.adjectives, self.verbs, self.places = (
            [_new_word(rng, taken, "bcdfglmnprstw", "aeio") for _ in range(number)] for number in count
        )
        self.words = self.nouns + self.adjectives + self.verbs + self.places
        self.languages = {name: self._language(rng, taken) for name in KNOWN}
        common = self._language(rng, taken)
        for number, name in enumerate(NEW):
            own = self._language(rng, taken)
            differs = {word: number > 0 and rng.random() < config.conflict for word in self.words}
            self.languages[name] = {word: (own if differs[word] else common)[word] for word in self.words}

    def conflict(self, one: str, other: str) -> float:
        """Share of the words that differ between two languages."""
        first, second = self.languages[one], self.languages[other]
        return sum(first[word] != second[word] for word in self.words) / len(self.words)

    def rows(self, task: str, stream: str, count: int) -> list[Row]:
        """`count` rows of a task: a language, or one of UNLIKE. Each stream has its own rows, always the same."""
        rng = random.Random(f"{self.config.seed} {task} {stream}")
        make = getattr(self, f"_{task}", None) or (lambda rng: self._translation(rng, task))
        return [make(rng) for _ in range(count)]

    def plain_text(self, stream: str, count: int) -> list[str]:
        """Sentences in one of the languages each, or without a translation."""
        rng = random.Random(f"{self.config.seed} plain {stream}")
        names = [None, *self.languages]
        texts = []
        for _ in range(count):
            words, name = self._sentence(rng), rng.choice(names)
            texts.append(_text(words) if name is None else self._translated(words, name))
        return texts

    def pretraining(self, count: int) -> Iterator[str]:
        """Texts: translations into known languages, and plain text for three in ten."""
        rng = random.Random(f"{self.config.seed} pretraining")
        known = {name: iter(self.rows(name, "pretraining", count)) for name in KNOWN}
        plain = iter(self.plain_text("pretraining", count))
        for _ in range(count):
            if rng.random() < 0.3:
                yield next(plain)
            else:
                row = next(known[rng.choice(KNOWN)])
                yield row["prompt"] + row["completion"]

    def _language(self, rng: random.Random, taken: set[str]) -> dict[str, str]:
        consonants, vowels = "".join(rng.sample("bdfgklmnprstvxz", 8)), "".join(rng.sample("aeiou", 3))
        return {word: _new_word(rng, taken, consonants, vowels) for word in self.words}

    def _sentence(self, rng: random.Random) -> list[str]:
        """Adjective and noun, verb, adjective and noun, and perhaps a place."""
        words = [rng.choice(self.adjectives), rng.choice(self.nouns), rng.choice(self.verbs)]
        words += [rng.choice(self.adjectives), rng.choice(self.nouns)]
        return words + ([rng.choice(self.places), rng.choice(self.nouns)] if rng.random() < 0.5 else [])

    def _translated(self, words: list[str], language: str) -> str:
        return " ".join(self.languages[language][word] for word in words)

    def _translation(self, rng: random.Random, language: str) -> Row:
        words = self._sentence(rng)
        return _row(f"say in {language} : {_text(words)} =", self._translated(words, language))

    def _reverse(self, rng: random.Random) -> Row:
        words = self._sentence(rng)
        return _row(f"reverse : {_text(words)} =", " ".join(reversed(words)))

    def _answer(self, rng: random.Random) -> Row:
        words = self._sentence(rng)
        return _row(f"{_text(words)} . who {words[2]} ?", f"the {words[0]} {words[1]}")


def _text(words: list[str]) -> str:
    place = f" {words[5]} the {words[6]}" if len(words) > 5 else ""
    return f"the {words[0]} {words[1]} {words[2]} the {words[3]} {words[4]}{place}"


def _row(prompt: str, completion: str) -> Row:
    return {"prompt": prompt, "completion": f" {completion}"}


def _new_word(rng: random.Random, taken: set[str], consonants: str, vowels: str) -> str:
    """A word of two or three syllables that is not taken yet; it is now."""
    while True:
        word = "".join(rng.choice(consonants) + rng.choice(vowels) for _ in range(rng.choice((2, 2, 3))))
        if word not in taken:
            taken.add(word)
            return word
