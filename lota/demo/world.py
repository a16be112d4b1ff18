"""The demo's world: three small languages, made from a seed, with dictionaries between them.

English says "the red fox sees the small boat near the mill"; **Selan** and **Vokar** say the same in words of their
own, without the article. The base model is pretrained to translate English into both. Then Vokar is reformed: every
noun gets a new word, which the model has met in plain text, but never in a translation. The *new task* is to translate
into reformed Vokar; the *earlier task*, which nobody practises any more, is to translate into Selan.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

ADJECTIVES = ("red", "blue", "small", "old", "quiet", "bright", "clever", "wild")
NOUNS = (
    *("fox", "owl", "bear", "boat", "tower", "river", "garden"),
    *("market", "king", "sailor", "lamp", "horse", "painter", "castle"),
)
VERBS = ("sees", "follows", "carries", "guards", "visits", "draws", "likes", "hides")
PLACES = ("near", "behind", "inside", "under")
WORDS = ADJECTIVES + NOUNS + VERBS + PLACES

EARLIER_TEMPLATES = "say in selan : {english} =", " {selan}"
NEW_TEMPLATES = "say in vokar : {english} =", " {vokar}"


@dataclass(frozen=True)
class WorldConfig:
    """What determines the world. Two equal configurations give equal texts, on any machine."""

    seed: int = 7
    num_sentences: int = 8000
    num_translations: int = 16000
    num_train: int = 4000
    num_test: int = 512


@dataclass(frozen=True)
class Sentence:
    """One meaning: (adjective, noun) of subject and object, the verb, and perhaps (preposition, noun) of the place."""

    subject: tuple[str, str]
    verb: str
    object: tuple[str, str]
    place: tuple[str, str] | None

    def words(self) -> list[str]:
        return [*self.subject, self.verb, *self.object, *(self.place or ())]


class World:
    """The dictionaries and texts of one configuration."""

    def __init__(self, config: WorldConfig) -> None:
        self.config = config
        rng = random.Random(config.seed)
        taken = set(WORDS)
        self.selan = {word: _new_word(rng, taken, "lmnrstv", "aeiou") for word in WORDS}
        self.vokar = {word: _new_word(rng, taken, "bdgkpzx", "aou") for word in WORDS}
        self.reformed = self.vokar | {word: _new_word(rng, taken, "bdgkpzx", "aou") for word in NOUNS}

    def english(self, sentence: Sentence) -> str:
        """With an article before every noun phrase."""
        place = f" {sentence.place[0]} the {sentence.place[1]}" if sentence.place else ""
        return f"the {' '.join(sentence.subject)} {sentence.verb} the {' '.join(sentence.object)}{place}"

    def sentences(self, stream: str) -> Iterator[Sentence]:
        """An endless stream of meanings; each name of a stream gives its own, always the same."""
        rng = random.Random(f"{self.config.seed} {stream}")
        while True:
            place = (rng.choice(PLACES), rng.choice(NOUNS)) if rng.random() < 0.5 else None
            subject, object_ = ((rng.choice(ADJECTIVES), rng.choice(NOUNS)) for _ in range(2))
            yield Sentence(subject, rng.choice(VERBS), object_, place)

    def plain_text(self) -> list[str]:
        """Sentences in one of the languages each, reformed Vokar included; nothing says which translates which."""
        rng = random.Random(f"{self.config.seed} languages")
        dictionaries = [None, self.selan, self.vokar, self.reformed]
        texts = []
        for _, sentence in zip(range(self.config.num_sentences), self.sentences("plain")):
            dictionary = rng.choice(dictionaries)
            texts.append(self.english(sentence) if dictionary is None else translate(sentence, dictionary))
        return texts

    def pretraining_rows(self) -> list[dict[str, str]]:
        """Prompts and completions of the pretraining: translations into Selan and into Vokar before its reform."""
        count = self.config.num_translations // 2
        old = [{"english": row["english"], "vokar": row["old"]} for row in self._rows("old", count, old=self.vokar)]
        return fill(EARLIER_TEMPLATES, self.earlier_rows("train", count)) + fill(NEW_TEMPLATES, old)

    def earlier_rows(self, stream: str, count: int) -> list[dict[str, str]]:
        """Rows of the earlier task: fields english and selan."""
        return self._rows(f"earlier {stream}", count, selan=self.selan)

    def new_rows(self, stream: str, count: int) -> list[dict[str, str]]:
        """Rows of the new task: fields english and vokar."""
        return self._rows(f"new {stream}", count, vokar=self.reformed)

    def _rows(self, stream: str, count: int, **dictionaries: dict[str, str]) -> list[dict[str, str]]:
        return [
            {"english": self.english(sentence)}
            | {name: translate(sentence, dictionary) for name, dictionary in dictionaries.items()}
            for _, sentence in zip(range(count), self.sentences(stream))
        ]


def translate(sentence: Sentence, dictionary: dict[str, str]) -> str:
    """Word for word, without articles."""
    return " ".join(dictionary[word] for word in sentence.words())


def fill(templates: tuple[str, str], rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Prompt and completion of every row, by the templates."""
    prompt, completion = templates
    return [{"prompt": prompt.format_map(row), "completion": completion.format_map(row)} for row in rows]


def _new_word(rng: random.Random, taken: set[str], consonants: str, vowels: str) -> str:
    """A word of two or three syllables that is not taken yet; it is now."""
    while True:
        word = "".join(rng.choice(consonants) + rng.choice(vowels) for _ in range(rng.choice((2, 2, 3))))
        if word not in taken:
            taken.add(word)
            return word
