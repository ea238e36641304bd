"""How well a completion is in a wanted style or speaks of a wanted genre, as scores in [0, 1]."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated

from pydantic import Field, field_validator, model_validator

from pgrpo.config import Section
from pgrpo.config.checks import suggest
from pgrpo.errors import DataError
from pgrpo.types import Rollout

from .lexicons import GENRE_WORDS, STYLE_WORDS, WANTS
from .measures import MEASURES, Measure, Text, entry, lexicon, ramp, share


class StyleWish(Section):
    """A style: what is measured, and what is best."""

    wants: dict[Measure, Annotated[list[float], Field(min_length=2, max_length=2)]] = Field(
        min_length=1
    )
    """Measure -> the value that is worth 0 and the value that is worth 1; beyond them it stays so."""
    words: list[str] = Field([])
    """The style's own words, for the measures `markers` and `foreign_markers`."""

    @model_validator(mode="after")
    def _check_wants(self) -> StyleWish:
        for measure, (zero, one) in self.wants.items():
            if zero == one:
                raise ValueError(f"wants.{measure} is [{zero:g}, {one:g}]; expected two values")
        if "markers" in self.wants and not self.words:
            raise ValueError(
                "wants.markers is given, but words is empty; expected the style's words"
            )
        return self


class Style:
    """How well a completion is in a style: the mean of what its measures are worth, in [0, 1].

    score = mean over the style's measures m of clip((m(text) - zero_m) / (one_m - zero_m), 0, 1); a
    completion without a word has no score.
    """

    class Config(Section):
        """Which style: one for all, or the one that a column of the example names."""

        style: str | None = None
        """The wanted style: formal, slang, poetic, dry or one of `styles`."""
        column: str | None = None
        """Column of the example that names the wanted style, alone or as one of its words: `formal`, or
        `formal-jazz`."""
        styles: dict[str, StyleWish] = Field({})
        """Further styles, or others in the place of known ones."""

        @model_validator(mode="after")
        def _check_wish(self) -> Style.Config:
            _check_wish("style", self.style, self.column, [*WANTS, *self.styles])
            return self

    def __init__(self, config: Config) -> None:
        known = {
            name: StyleWish(
                wants={measure: list(ends) for measure, ends in wants.items()},
                words=STYLE_WORDS[name].split(),
            )
            for name, wants in WANTS.items()
        }
        styles = known | config.styles
        words = {name: lexicon(style.words) for name, style in styles.items()}
        self._wants = {name: style.wants for name, style in styles.items()}
        self._own = words
        self._foreign = {name: _others(words, name) for name in words}
        self._wish = _Wish("style", config.style, config.column, styles)

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        return [self.score(rollout.completion, self._wish.of(rollout)) for rollout in rollouts]

    def score(self, completion: str, style: str) -> float | None:
        """How well a text is in a style; None where it has no word."""
        text = Text.of(completion)
        if text is None:
            return None
        wants = self._wants[style]
        return sum(
            ramp(self._measure(text, style, measure), ends) for measure, ends in wants.items()
        ) / len(wants)

    def _measure(self, text: Text, style: str, measure: Measure) -> float:
        if measure == "markers":
            return share(text, self._own[style])
        if measure == "foreign_markers":
            return share(text, self._foreign[style])
        return MEASURES[measure](text)


class Genre:
    """How much a completion speaks of a genre of music: different words of it, in [0, 1].

    Of d different words of the genre, o that only other genres have, and a share s of the genre's words
    among all, score = min(1, d / enough) * d / (d + o) * min(1, max_share / s), and 0 where d is 0. The
    second factor wants one genre; the third is there because a list of the right words is no text. A
    completion without a word has no score.
    """

    class Config(Section):
        """Which genre: one for all, or the one that a column of the example names."""

        genre: str | None = None
        """The wanted genre: jazz, metal, folk, techno, classical, hiphop or one of `genres`."""
        column: str | None = None
        """Column of the example that names the wanted genre, alone or as one of its words: `jazz`, or
        `formal-jazz`."""
        enough: int = Field(3, ge=1)
        """Different words of the genre that are worth 1."""
        max_share: float = Field(0.5, gt=0, le=1)
        """Largest share of the genre's words among all that costs nothing; 1 allows a bare list."""
        genres: dict[str, list[str]] = Field({})
        """Words of further genres, or others in the place of known ones."""

        @field_validator("genres")
        @classmethod
        def _check_words(cls, genres: dict[str, list[str]]) -> dict[str, list[str]]:
            for name, words in genres.items():
                if not words:
                    raise ValueError(f"genres.{name} is empty; expected words of the genre")
            return genres

        @model_validator(mode="after")
        def _check_wish(self) -> Genre.Config:
            _check_wish("genre", self.genre, self.column, [*GENRE_WORDS, *self.genres])
            return self

    def __init__(self, config: Config) -> None:
        known = {name: words.split() for name, words in GENRE_WORDS.items()}
        words = {name: lexicon(listed) for name, listed in (known | config.genres).items()}
        self._config = config
        self._own = words
        self._foreign = {name: _others(words, name) for name in words}
        self._wish = _Wish("genre", config.genre, config.column, words)

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        return [self.score(rollout.completion, self._wish.of(rollout)) for rollout in rollouts]

    def score(self, completion: str, genre: str) -> float | None:
        """How much a text speaks of a genre; None where it has no word."""
        text = Text.of(completion)
        if text is None:
            return None
        num_own = _num_different(text, self._own[genre])
        num_foreign = _num_different(text, self._foreign[genre])
        if not num_own:
            return 0.0
        reached = min(1.0, num_own / self._config.enough)
        alone = num_own / (num_own + num_foreign)
        return reached * alone * min(1.0, self._config.max_share / share(text, self._own[genre]))


def _num_different(text: Text, words: frozenset[str]) -> int:
    return len({entry(word, words) for word in text.words} - {None})


def _others(words: Mapping[str, frozenset[str]], name: str) -> frozenset[str]:
    """The words that others have and `name` has not."""
    return frozenset[str]().union(*words.values()) - words[name]


def _check_wish(kind: str, fixed: str | None, column: str | None, known: Sequence[str]) -> None:
    if (fixed is None) == (column is None):
        given = "neither" if fixed is None else "both"
        raise ValueError(f"{given} of {kind} and column is given; expected one of them")
    if fixed is not None and fixed not in known:
        raise ValueError(f"{kind} is {fixed!r}{suggest(fixed, known)}")


class _Wish:
    """What is wanted of a completion: the same for all, or what a column of its example says."""

    def __init__(
        self, kind: str, fixed: str | None, column: str | None, known: Iterable[str]
    ) -> None:
        self._kind, self._fixed, self._column = kind, fixed, column
        self._names = {name.casefold(): name for name in known}

    def of(self, rollout: Rollout) -> str:
        """Name of what is wanted; raises DataError where the column names nothing known, or two."""
        if self._fixed is not None:
            return self._fixed
        columns = rollout.prompt.example.columns
        said = columns.get(str(self._column))
        if not isinstance(said, str):
            raise DataError(
                f"column {self._column!r} is {said!r}, expected the name of a {self._kind}; the "
                f"example has {', '.join(sorted(columns)) or 'no columns'}"
            )
        whole = said.casefold()
        parts = [whole] if whole in self._names else re.findall(r"[^\W_]+", whole)
        named = {self._names[part] for part in parts if part in self._names}
        if len(named) != 1:
            met = " and ".join(sorted(named)) or f"no {self._kind}"
            raise DataError(
                f"column {self._column!r} is {said!r}, which names {met}; expected one of "
                f"{', '.join(self._names.values())}"
            )
        return named.pop()
