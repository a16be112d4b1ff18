"""The demo's world: three small languages, made from a seed, with dictionaries between them.

English says "the red fox sees the small boat near the mill"; **Selan** and **Vokar** say the same in words of their
own, without the article. The base model is pretrained on sentences of all three, on glossaries of both languages ("fox
in vokar : zugo"), and on the *earlier task*, English to Selan. It never sees the *new task*, English to Vokar.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
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
    num_glossary: int = 4000
    num_earlier: int = 8000
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

    def english(self, sentence: Sentence) -> str:
        """With an article before every noun phrase."""
        place = f" {sentence.place[0]} the {sentence.place[1]}" if sentence.place else ""
        return f"the {' '.join(sentence.subject)} {sentence.verb} the {' '.join(sentence.object)}{place}"

    def to_selan(self, sentence: Sentence) -> str:
        return " ".join(self.selan[word] for word in sentence.words())

    def to_vokar(self, sentence: Sentence) -> str:
        return " ".join(self.vokar[word] for word in sentence.words())

    def sentences(self, stream: str) -> Iterator[Sentence]:
        """An endless stream of meanings; each name of a stream gives its own, always the same."""
        rng = random.Random(f"{self.config.seed} {stream}")
        while True:
            place = (rng.choice(PLACES), rng.choice(NOUNS)) if rng.random() < 0.5 else None
            subject, object_ = ((rng.choice(ADJECTIVES), rng.choice(NOUNS)) for _ in range(2))
            yield Sentence(subject, rng.choice(VERBS), object_, place)

    def plain_text(self) -> list[str]:
        """Sentences in one of the languages each; nothing says which translates which."""
        rng = random.Random(f"{self.config.seed} languages")
        speak: list[Callable[[Sentence], str]] = [self.english, self.to_selan, self.to_vokar]
        return [rng.choice(speak)(s) for _, s in zip(range(self.config.num_sentences), self.sentences("plain"))]

    def glossary(self) -> list[dict[str, str]]:
        """Single words in Selan and Vokar, as prompt and completion."""
        rng = random.Random(f"{self.config.seed} glossary")
        languages = {"selan": self.selan, "vokar": self.vokar}
        picks = [(word, rng.choice(list(languages))) for word in rng.choices(WORDS, k=self.config.num_glossary)]
        return [{"prompt": f"say in {name} : {w} =", "completion": f" {languages[name][w]}"} for w, name in picks]

    def earlier_rows(self, stream: str, count: int) -> list[dict[str, str]]:
        """Rows of the earlier task: fields english and selan."""
        meanings = (s for _, s in zip(range(count), self.sentences(f"earlier {stream}")))
        return [{"english": self.english(s), "selan": self.to_selan(s)} for s in meanings]

    def new_rows(self, stream: str, count: int) -> list[dict[str, str]]:
        """Rows of the new task: fields english and vokar."""
        meanings = (s for _, s in zip(range(count), self.sentences(f"new {stream}")))
        return [{"english": self.english(s), "vokar": self.to_vokar(s)} for s in meanings]


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
