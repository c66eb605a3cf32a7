"""Cases that can only be answered by looking back: something early in a context, and its answer at the end.

A case is a context that goes in as one prompt, a question behind it, and an answer that is scored. The context knows
nothing of the question. All three together, with the tokenizer's first special tokens, have exactly the length asked
for. Tests:

copy_text    a passage of a text, filler of the same text, the passage again: its first `CUE` tokens are the question,
             the others the answer. The text that follows the passage by nature is never the filler before its copy.
copy_words   the same with words of the text in random order, no word twice, which nobody can guess
needle       "The special magic number for CITY is NUMBER." between two sentences of filler; asked for the number
key_value    lines "KEY: NUMBER" to the full length, keys of random syllables; asked for the number of one key

Depths are the middles of equal parts of the context: of 5, at 10, 30, 50, 70 and 90 %. Everything random comes from
the seed, the test, the length, the depth and the number of the sample: more samples add cases, and change none.
"""

from __future__ import annotations

import random
from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .calibration import special_affixes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CUE = 4
"""Tokens of a second copy that say where in the first one it is, and are not scored."""
DIGITS = 7
SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
CITIES = (
    *("Amsterdam", "Athens", "Baghdad", "Bangkok", "Berlin", "Bogota", "Boston", "Brussels", "Budapest", "Cairo"),
    *("Chicago", "Copenhagen", "Dakar", "Delhi", "Dublin", "Geneva", "Hanoi", "Havana", "Helsinki", "Istanbul"),
    *("Jakarta", "Lagos", "Lima", "Lisbon", "London", "Madrid", "Manila", "Nairobi", "Oslo", "Paris"),
    *("Prague", "Quito", "Riga", "Rome", "Santiago", "Seoul", "Sydney", "Tokyo", "Vienna", "Warsaw"),
)


@dataclass(frozen=True, kw_only=True)
class RetrievalOptions:
    """What is asked. text: "builtin" or a .txt file. lengths: tokens of a case. tests: of `TESTS`. depths: how many.
    samples: cases of each test, length and depth. passage: tokens that are copied. seed: of everything random.
    query_aware: the question goes in with its context, as one prompt.

    ValueError for what cannot be.
    """

    text: str = "builtin"
    lengths: tuple[int, ...] = (2048,)
    tests: tuple[str, ...] = ("copy_text", "copy_words", "needle", "key_value")
    depths: int = 5
    samples: int = 4
    passage: int = 64
    seed: int = 0
    query_aware: bool = False

    def __post_init__(self) -> None:
        for name, least in (("depths", 1), ("samples", 1), ("passage", CUE + 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"retrieval {name} is {getattr(self, name)}; it must be at least {least}")
        if not self.lengths or min(self.lengths) < 1 or len(set(self.lengths)) < len(self.lengths):
            raise ValueError(
                f"retrieval lengths are {', '.join(map(str, self.lengths)) or 'none'}; give different numbers of tokens"
            )
        unknown = [test for test in self.tests if test not in TESTS]
        if unknown or not self.tests:
            raise ValueError(f"retrieval test {unknown[0] if unknown else ''!r} is unknown; known: {', '.join(TESTS)}")


@dataclass(frozen=True)
class Case:
    """Token ids of one case. evidence: columns of the context that hold what is asked for. written: the answer is what
    the model would write, token by token; else it is text that goes in like any other.
    """

    length: int
    depth: float
    context: tuple[int, ...]
    question: tuple[int, ...]
    answer: tuple[int, ...]
    evidence: tuple[int, int]
    written: bool


class Source:
    """A text as cases are made of it. ValueError for one without enough words."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str, options: RetrievalOptions):
        self.tokenizer, self.options = tokenizer, options
        self.prefix = special_affixes(tokenizer)[0]
        self.ids = self.encode(text)
        self.words = sorted({word for word in text.split() if word.isalpha()})
        last = {token: str(tokenizer.decode([token])).rstrip(" ")[-1:] for token in set(self.ids)}
        self.ends = {token for token, character in last.items() if character in (".", "\n")}

    def encode(self, text: str) -> list[int]:
        """Token ids without special tokens."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # pyright: ignore

    def answer(self, question: str, value: str) -> tuple[list[int], list[int]]:
        """Token ids of a question and of what follows it, encoded as one text."""
        head, whole = self.encode(question), self.encode(f"{question} {value}")
        return whole[: len(head)], whole[len(head) :]

    def filler(self, count: int, length: int, draw: random.Random, *, before: int = 0) -> int:
        """Where in the text `count` tokens begin that have `before` others in front. ValueError if there are none."""
        if count < 1:
            raise ValueError(f"retrieval length {length} is too short: {-count + 1} tokens more are needed at least")
        last = len(self.ids) - count
        if last < before:
            raise ValueError(
                f"retrieval length {length} needs a text of {count + before} tokens, and it has {len(self.ids)}"
            )
        return draw.randint(before, last)

    def sentence_end(self, filler: list[int], place: int) -> int:
        """The end of a sentence that is nearest to a place in filler; the place itself where there is none."""
        ends = [index + 1 for index, token in enumerate(filler) if token in self.ends]
        at = bisect(ends, place)
        return min(ends[max(0, at - 1) : at + 1], key=lambda end: abs(end - place), default=place)


def copy_text(source: Source, length: int, depth: float, draw: random.Random) -> Case:
    """A passage of the text twice."""
    size = source.options.passage
    start = source.filler(length - len(source.prefix) - 2 * size, length, draw, before=size)
    return _copied(source, length, depth, start, source.ids[start - size : start])


def copy_words(source: Source, length: int, depth: float, draw: random.Random) -> Case:
    """Words in random order, twice."""
    size = source.options.passage
    start = source.filler(length - len(source.prefix) - 2 * size, length, draw)
    if len(source.words) < size:
        raise ValueError(f"the text has {len(source.words)} different words, and a passage takes up to {size}")
    # A word is one token at least, with the space before it.
    passage = source.encode("".join(f" {word}" for word in draw.sample(source.words, size)))[:size]
    return _copied(source, length, depth, start, passage)


def _copied(source: Source, length: int, depth: float, start: int, passage: Sequence[int]) -> Case:
    filler = source.ids[start : start + length - len(source.prefix) - 2 * len(passage)]
    place = round(depth * len(filler))
    first = len(source.prefix) + place
    context = (*source.prefix, *filler[:place], *passage, *filler[place:])
    evidence = (first, first + len(passage))
    return Case(length, depth, context, tuple(passage[:CUE]), tuple(passage[CUE:]), evidence, written=False)


def needle(source: Source, length: int, depth: float, draw: random.Random) -> Case:
    """A number in a sentence of its own."""
    city, value = draw.choice(CITIES), _number(draw)
    sentence = source.encode(f" The special magic number for {city} is {value}.")
    asked = f"\n\nWhat is the special magic number for {city}? The special magic number for {city} is"
    question, answer = source.answer(asked, value)
    count = length - len(source.prefix) - len(sentence) - len(question) - len(answer)
    start = source.filler(count, length, draw)
    filler = source.ids[start : start + count]
    place = source.sentence_end(filler, round(depth * count))
    context = (*source.prefix, *filler[:place], *sentence, *filler[place:])
    first = len(source.prefix) + place
    evidence = (first, first + len(sentence))
    return Case(length, depth, context, tuple(question), tuple(answer), evidence, written=True)


def key_value(source: Source, length: int, depth: float, draw: random.Random) -> Case:
    """One of many lines. What is left of the length below one line is filled up with text before them."""
    head = source.encode("\nKeys and their values:\n")
    asked, value = _key(draw), _number(draw)
    question, answer = source.answer(f"\nWhat is the value of {asked}?\n{asked}:", value)
    line = source.encode(f"{asked}: {value}\n")
    room = length - len(source.prefix) - len(head) - len(line) - len(question) - len(answer)
    lines: list[list[int]] = []
    keys = {asked}
    while True:
        key = _key(draw)
        if key in keys:
            continue
        other = source.encode(f"{key}: {_number(draw)}\n")
        if len(other) > room:
            break
        keys.add(key)
        lines.append(other)
        room -= len(other)
    if not lines:
        raise ValueError(f"retrieval length {length} is too short for two lines of keys and values")
    start = source.filler(room, length, draw) if room else 0
    opening = [*source.prefix, *source.ids[start : start + room], *head]
    place = round(depth * len(lines))
    before = [token for item in lines[:place] for token in item]
    after = [token for item in lines[place:] for token in item]
    first = len(opening) + len(before)
    context = (*opening, *before, *line, *after)
    return Case(length, depth, context, tuple(question), tuple(answer), (first, first + len(line)), written=True)


def _key(draw: random.Random) -> str:
    return "".join(draw.choices(SYLLABLES, k=3))


def _number(draw: random.Random) -> str:
    return str(draw.randrange(10 ** (DIGITS - 1), 10**DIGITS))


TESTS: dict[str, Callable[[Source, int, float, random.Random], Case]] = {
    "copy_text": copy_text,
    "copy_words": copy_words,
    "needle": needle,
    "key_value": key_value,
}


def retrieval_cases(tokenizer: PreTrainedTokenizerBase, text: str, options: RetrievalOptions) -> dict[str, list[Case]]:
    """Cases of every test, by length, then depth. ValueError for a text or a length that is too short."""
    source = Source(tokenizer, text, options)
    found: dict[str, list[Case]] = {}
    for test in options.tests:
        found[test] = []
        for length in options.lengths:
            for number in range(options.depths * options.samples):
                depth = (number // options.samples + 0.5) / options.depths
                draw = random.Random(f"{options.seed} {test} {length} {depth} {number % options.samples}")
                found[test].append(TESTS[test](source, length, depth, draw))
    return found
