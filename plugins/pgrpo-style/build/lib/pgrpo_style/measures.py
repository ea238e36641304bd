"""What can be counted in a text, as plain functions of it.

A word is a run of letters and digits, with apostrophes and hyphens inside it; `3.5` is one. A sentence
ends at one of `. ! ? …` before white space or the end of the text, closing quotes and brackets aside,
and so at an abbreviation too. What follows the last of them is a sentence as well. The contractions are
those of English; the rest holds for any language that writes its words apart.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

Measure: TypeAlias = Literal[
    "words_per_sentence",
    "words_per_line",
    "letters_per_word",
    "grade",
    "type_token_ratio",
    "contractions",
    "punctuation",
    "exclamations",
    "markers",
    "foreign_markers",
]

_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+|(?<=\d)[.,]\d+)*")
_END = re.compile(r"([.!?…]+)[\"'”’)\]]*(?=\s|$)")
_MARK = re.compile(r"[.,;:!?…—–()\"“”]")
_CONTRACTION = re.compile(
    r"\w+n't|\w+'(?:m|re|ve|ll|d)"
    r"|(?:it|he|she|that|this|there|here|what|who|where|when|why|how|let)'s"
    r"|gonna|wanna|gotta|gimme|lemme|kinda|sorta|dunno"
)
"""Of words in `'s` only those in which it stands for a verb and not for an owner."""


@dataclass(frozen=True, slots=True)
class Text:
    """A text taken apart once, for all that is measured in it."""

    raw: str
    words: tuple[str, ...]
    """[W] in lower case, with straight apostrophes."""
    ends: tuple[str, ...]
    """[S] the marks at the end of each sentence, never none; empty where a text just stops."""

    @classmethod
    def of(cls, raw: str) -> Text | None:
        """Take a text apart; None where it has no word."""
        words = split_words(raw)
        if not words:
            return None
        ends: list[str] = []
        start = 0
        for end in _END.finditer(raw):
            if _WORD.search(raw, start, end.start()):
                ends.append(end[1])
                start = end.end()
        if _WORD.search(raw, start):
            ends.append("")
        return cls(raw, words, tuple(ends))


def split_words(raw: str) -> tuple[str, ...]:
    """The words of a text, in lower case and with straight apostrophes."""
    return tuple(word.casefold().replace("’", "'") for word in _WORD.findall(raw))


def lexicon(words: Iterable[str]) -> frozenset[str]:
    """Words as `entry` looks them up."""
    return frozenset(word.casefold().replace("’", "'") for word in words)


def entry(word: str, words: frozenset[str]) -> str | None:
    """The entry of a lexicon that a word of a text is, itself or as its plain plural or owner."""
    forms = (word, word.removesuffix("'s"), word.removesuffix("s"), word.removesuffix("es"))
    return next((form for form in forms if form in words), None)


def share(text: Text, words: frozenset[str]) -> float:
    """Share of a text's words that stand in a lexicon, in [0, 1]."""
    return sum(entry(word, words) is not None for word in text.words) / len(text.words)


def words_per_sentence(text: Text) -> float:
    """Mean length of a sentence, W / S."""
    return len(text.words) / len(text.ends)


def words_per_line(text: Text) -> float:
    """Mean length of a line that has words, as short in verse as it is long in prose."""
    return len(text.words) / sum(bool(_WORD.search(line)) for line in text.raw.splitlines())


def letters_per_word(text: Text) -> float:
    """Mean number of letters and digits of a word, L / W."""
    return sum(letter.isalnum() for word in text.words for letter in word) / len(text.words)


def grade(text: Text) -> float:
    """School grade that a text is written for: 4.71 L/W + 0.5 W/S - 21.43.

    The Automated Readability Index (Senter and Smith 1967, AMRL-TR-66-220), taken because it needs no
    syllables, which only a dictionary counts right. Below 0 for very short words and sentences.
    """
    return 4.71 * letters_per_word(text) + 0.5 * words_per_sentence(text) - 21.43


def type_token_ratio(text: Text) -> float:
    """Share of the words that are different, in (0, 1]. It falls with length; compare like lengths."""
    return len(set(text.words)) / len(text.words)


def contractions(text: Text) -> float:
    """Share of the words that are contractions such as `don't`, `it's` and `gonna`, in [0, 1]."""
    return sum(_CONTRACTION.fullmatch(word) is not None for word in text.words) / len(text.words)


def punctuation(text: Text) -> float:
    """Punctuation marks outside of words, for each word."""
    return len(_MARK.findall(_WORD.sub("", text.raw))) / len(text.words)


def exclamations(text: Text) -> float:
    """Share of the sentences that end with an exclamation mark among their marks, in [0, 1]."""
    return sum("!" in end for end in text.ends) / len(text.ends)


MEASURES: Mapping[str, Callable[[Text], float]] = {
    "words_per_sentence": words_per_sentence,
    "words_per_line": words_per_line,
    "letters_per_word": letters_per_word,
    "grade": grade,
    "type_token_ratio": type_token_ratio,
    "contractions": contractions,
    "punctuation": punctuation,
    "exclamations": exclamations,
}
"""What needs no lexicon. `markers` and `foreign_markers` are the `share` of a style's own words and of
words that only other styles have."""


def ramp(value: float, ends: Sequence[float]) -> float:
    """0 at the first of two ends and beyond it, 1 at the second and beyond, linear between; either may
    be the larger one."""
    zero, one = ends
    return min(1.0, max(0.0, (value - zero) / (one - zero)))
