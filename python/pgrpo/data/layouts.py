"""How feedback is written down: by thumbs, by preferences, and in the layouts of published data sets.

A layout reads a row as what somebody said of one or several answers to a prompt. Columns are those of
the sets' own documentation, read in November 2026.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from pgrpo.data.columns import (
    Turns,
    number_in,
    prompt_in,
    time_in,
    turns_of,
    user_in,
    value_in,
)
from pgrpo.errors import DataError


@dataclass(frozen=True, slots=True)
class Source:
    """Who said something, and when."""

    user: str
    time: float
    """0 where no column tells."""
    about: Mapping[str, Any]
    """Columns of the row that no layout reads."""


@dataclass(frozen=True, slots=True)
class Said:
    """What a person said of answers to one prompt."""

    source: Source
    prompt: str
    answers: tuple[str, ...]
    values: tuple[float, ...]
    """What each answer is worth to the person, on its own scale; the more the better."""
    thread: str
    """What belongs to one conversation has one name here; otherwise the prompt."""
    turn: int = 0
    """The prompt's place in the conversation."""
    turns: Turns = ()
    """The prompt as turns, where the row holds a chat."""
    makers: tuple[str, ...] = ()
    """Who wrote each answer, such as the names of models, where that is told."""


Columns: TypeAlias = Mapping[str, str | None]
"""The settings of `[data]` that name columns: `user` and `time`, None for those of the layout."""


@dataclass(frozen=True, slots=True)
class Layout:
    """One way of writing feedback down."""

    name: str
    marks: frozenset[str]
    """Columns by which it is known."""
    read: Callable[[str, Mapping[str, Any], Columns], Iterator[Said]]
    """Reads a row that stands at a place; the settings name its columns."""
    task: Literal["rate", "choose"]
    """What is asked by default."""


UP = frozenset({"true", "1", "yes", "up", "like", "liked", "good", "\N{THUMBS UP SIGN}"})
DOWN = frozenset(
    {"false", "0", "-1", "no", "down", "dislike", "disliked", "bad", "\N{THUMBS DOWN SIGN}"}
)


def _thumbs(place: str, row: Mapping[str, Any], columns: Columns) -> Iterator[Said]:
    """TRL's unpaired form with a user: prompt, completion, label."""
    label = value_in(place, "label", row)
    whole = isinstance(label, float) and label.is_integer()
    word = str(int(label) if whole else label).strip().lower()
    if word not in UP | DOWN:
        raise DataError(
            f"{place}: column label is {label!r}; expected true or false, 1 or 0, up or down"
        )
    prompt, turns = prompt_in(place, "prompt", row)
    source = _source(place, row, columns, "user", used=("prompt", "completion", "label"))
    answers = (_answer(place, "completion", row),)
    yield Said(source, prompt, answers, (float(word in UP),), prompt, turns=turns)


def _preferences(place: str, row: Mapping[str, Any], columns: Columns) -> Iterator[Said]:
    """The paired form with a user: prompt, chosen, rejected."""
    prompt, turns = prompt_in(place, "prompt", row)
    source = _source(place, row, columns, "user", used=("prompt", "chosen", "rejected"))
    answers = (_answer(place, "chosen", row), _answer(place, "rejected", row))
    yield Said(source, prompt, answers, (1.0, 0.0), prompt, turns=turns)


def _helpsteer(place: str, row: Mapping[str, Any], columns: Columns) -> Iterator[Said]:
    """HelpSteer (Wang et al. 2023, arXiv 2311.09528): it names no annotators, so that its five
    attributes stand for people who care for one thing each."""
    prompt, answer = _text(place, "prompt", row), _text(place, "response", row)
    for attribute in ("helpfulness", "correctness", "coherence", "complexity", "verbosity"):
        value = number_in(place, attribute, row)
        yield Said(Source(attribute, 0.0, {}), prompt, (answer,), (value,), prompt)


def _prism(place: str, row: Mapping[str, Any], columns: Columns) -> Iterator[Said]:
    """PRISM (Kirk et al. 2024, arXiv 2404.16019), the file of utterances: a person's scores from 1 to
    100 of several models' answers, turn by turn."""
    used = ("utterance_id", "interaction_id", "conversation_id", "turn", "within_turn_id")
    used += ("user_prompt", "model_response", "model_name", "model_provider", "score", "if_chosen")
    yield Said(
        _source(place, row, columns, "user_id", used=used),
        _text(place, "user_prompt", row),
        (_text(place, "model_response", row),),
        (number_in(place, "score", row),),
        thread=_text(place, "conversation_id", row),
        turn=int(number_in(place, "turn", row)),
        makers=(_text(place, "model_name", row),),
    )


def _community(place: str, row: Mapping[str, Any], columns: Columns) -> Iterator[Said]:
    """Community Alignment (Zhang et al. 2025, arXiv 2507.09650): up to four turns, in each of which a
    person prefers one of four answers."""
    used = ("conversation_id", *(column for column in row if "_turn_" in column))
    source = _source(place, row, columns, "annotator_id", used=used)
    for number, ordinal in enumerate(("first", "second", "third", "fourth")):
        preferred = str(row.get(f"{ordinal}_turn_preferred_response") or "").strip()
        if not preferred:
            continue
        texts = {
            f"response_{letter}": str(row[column])
            for letter in "abcd"
            if row.get(column := f"{ordinal}_turn_response_{letter}")
        }
        if preferred not in texts:
            raise DataError(
                f"{place}: column {ordinal}_turn_preferred_response is {preferred!r}; expected one of "
                f"{', '.join(texts) or 'response_a to response_d, which hold no texts'}"
            )
        yield Said(
            source,
            _text(place, f"{ordinal}_turn_prompt", row),
            tuple(texts.values()),
            tuple(float(name == preferred) for name in texts),
            thread=_text(place, "conversation_id", row),
            turn=number,
        )


def _amazon(place: str, row: Mapping[str, Any], columns: Columns) -> Iterator[Said]:
    """Amazon reviews 2023 (Hou et al. 2024, arXiv 2403.03952): how many stars does the writer of a
    review give?"""
    used = ("rating", "title", "text", "images", "asin")
    source = _source(place, row, columns, "user_id", "timestamp", used=used)
    item = f"{_text(place, 'parent_asin', row)} {source.time}"
    text, rating = _text(place, "text", row), number_in(place, "rating", row)
    yield Said(source, _text(place, "title", row), (text,), (rating,), item)


def _goodreads(place: str, row: Mapping[str, Any], columns: Columns) -> Iterator[Said]:
    """Goodreads reviews (Wan and McAuley 2018, RecSys), as `_amazon`; a rating of 0 is none."""
    rating = number_in(place, "rating", row)
    if not rating:
        raise DataError(f"{place}: column rating is 0, which is none; expected 1 to 5")
    used = ("rating", "review_text", "review_id", "date_updated", "read_at", "started_at")
    source = _source(place, row, columns, "user_id", "date_added", used=used)
    book = f"Book {_text(place, 'book_id', row)}"
    yield Said(source, book, (_text(place, "review_text", row),), (rating,), book)


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("thumbs", frozenset({"prompt", "completion", "label"}), _thumbs, "rate"),
        Layout("preferences", frozenset({"prompt", "chosen", "rejected"}), _preferences, "choose"),
        Layout("helpsteer", frozenset({"prompt", "response", "helpfulness"}), _helpsteer, "rate"),
        Layout(
            "prism", frozenset({"user_prompt", "model_response", "score", "turn"}), _prism, "choose"
        ),
        Layout(
            "community_alignment",
            frozenset({"first_turn_prompt", "first_turn_preferred_response"}),
            _community,
            "choose",
        ),
        Layout("amazon", frozenset({"title", "text", "rating", "parent_asin"}), _amazon, "rate"),
        Layout("goodreads", frozenset({"book_id", "review_text", "rating"}), _goodreads, "rate"),
    )
}
"""Name -> layout."""


def layout_of(place: str, row: Mapping[str, Any]) -> Layout:
    """The layout that a row's columns show.

    Raises:
        DataError: none, or several.
    """
    found = [layout for layout in LAYOUTS.values() if layout.marks <= row.keys()]
    if len(found) != 1:
        fitting = ", ".join(layout.name for layout in found) or "none"
        known = "; ".join(f"{x.name}: {', '.join(sorted(x.marks))}" for x in LAYOUTS.values())
        raise DataError(
            f"{place} has columns {', '.join(row)}, by which its layout is {fitting} of those known "
            f"({known}); data.layout can say which"
        )
    return found[0]


def _source(
    place: str,
    row: Mapping[str, Any],
    columns: Columns,
    user_column: str,
    time_column: str | None = None,
    *,
    used: Collection[str],
) -> Source:
    """What is common to all layouts: who, when, and what the row says besides."""
    who, when = columns["user"] or user_column, columns["time"] or time_column
    return Source(
        user_in(place, who, row),
        0.0 if when is None else time_in(place, when, row),
        {column: value for column, value in row.items() if column not in (*used, who)},
    )


def _text(place: str, column: str, row: Mapping[str, Any]) -> str:
    """A text, or a number as one; raises DataError where there is none."""
    value = value_in(place, column, row)
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value == "":
        raise DataError(f"{place}: column {column} is {value!r:.100}; expected a text")
    return str(value)


def _answer(place: str, column: str, row: Mapping[str, Any]) -> str:
    """An answer: a text, or the last turn of a chat, which must be the assistant's."""
    value = value_in(place, column, row)
    turns = turns_of(value)
    text = turns[-1][1] if turns and turns[-1][0] == "assistant" else value
    if not isinstance(text, str) or not text.strip():
        raise DataError(
            f"{place}: column {column} is {value!r:.100}; expected a text, or turns of a chat of which "
            "the last is the assistant's"
        )
    return text
