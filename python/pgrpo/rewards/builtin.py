"""The built-in rewards, registered as anybody's are; judge and reward model have files of their own."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, cast

from pydantic import field_validator

from pgrpo.config import Section
from pgrpo.data.personas import persona_reward, persona_utility
from pgrpo.errors import DataError
from pgrpo.plugins.hookspecs import hookimpl
from pgrpo.rewards.judge import Judge
from pgrpo.rewards.reward_model import RewardModel
from pgrpo.types import Json, Rollout

_WORD = re.compile(r"\w+")


@hookimpl
def pgrpo_register_rewards(register: Callable[[str, Any], None]) -> None:
    """Offer what is built in."""
    register("choice", choice)
    register("rated", rated)
    register("likeness", likeness)
    register("exact_match", ExactMatch)
    register("regex", Regex)
    register("persona", persona)
    register("persona_utility", utility)
    register("judge", Judge)
    register("reward_model", RewardModel)


def _column(rollout: Rollout, name: str) -> Json:
    columns = rollout.prompt.example.columns
    if columns.get(name) is None:
        raise DataError(f"the example has no column {name!r}; it has {', '.join(sorted(columns))}")
    return columns[name]


def choice(rollouts: Sequence[Rollout]) -> list[float]:
    """1.0 if the completion names the option in column `answer`, else 0.0.

    A completion names an option by being its label or text, or by mentioning its label ("The answer
    is B.") or its text in a sentence. `labels` and `options` are columns of equal length. A
    completion that names two labels, or a label and another option's text, names none.
    """
    return [float(_is_right_choice(rollout)) for rollout in rollouts]


def _is_right_choice(rollout: Rollout) -> bool:
    said, answer = rollout.completion.strip(), str(_column(rollout, "answer")).strip()
    if said == answer:
        return True
    columns = rollout.prompt.example.columns
    labels = [str(label).strip() for label in _listed(columns.get("labels"))]
    options = [str(option).strip() for option in _listed(columns.get("options"))]
    right = {i for names in (labels, options) for i, name in enumerate(names) if name == answer}
    named = _options_named(said, labels, options)
    return named is not None and named in right


def rated(rollouts: Sequence[Rollout]) -> list[float]:
    """What the option that the completion names is worth by column `values`; 0.0 if it names none.

    A completion names an option as for `choice`; `values`, `labels` and `options` are columns of equal
    length.
    """
    return [_value(rollout) for rollout in rollouts]


def _value(rollout: Rollout) -> float:
    columns = rollout.prompt.example.columns
    values = _listed(_column(rollout, "values"))
    labels = [str(label).strip() for label in _listed(columns.get("labels"))]
    options = [str(option).strip() for option in _listed(columns.get("options"))]
    named = _options_named(rollout.completion.strip(), labels, options)
    value = 0.0 if named is None else values[named]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"column values holds {value!r}; expected numbers")
    return float(value)


def _listed(column: Json) -> Sequence[Json]:
    return [] if column is None or isinstance(column, str) else cast(Sequence[Json], column)


def _options_named(said: str, labels: list[str], options: list[str]) -> int | None:
    """Index of the one option a text names, or None."""
    bare = said.strip(" \t\n.,:;!?()[]*\"'").casefold()
    for index, label in enumerate(labels):
        if bare == label.casefold():
            return index

    # The longest text goes first and is taken out, so that "Drama" is not found in "popular Drama"
    # and the "B" of the film "Plan B" is no label.
    by_text: set[int] = set()
    rest = said
    for text in sorted({option.casefold() for option in options if option}, key=len, reverse=True):
        pattern = re.compile(rf"(?<!\w){re.escape(text)}(?!\w)", re.IGNORECASE)
        if pattern.search(rest):
            rest = pattern.sub(";", rest)
            by_text |= {i for i, option in enumerate(options) if option.casefold() == text}
    by_label = {i for i, label in enumerate(labels) if _mentions(rest, label, labels)}

    named = by_label & by_text if by_label and by_text else by_label | by_text
    return named.pop() if len(named) == 1 and len(by_label) <= 1 else None


def _mentions(text: str, label: str, labels: Sequence[str]) -> bool:
    if not label:
        return False
    pattern = rf"(?<![\w'\u2019]){re.escape(label)}(?![\w'\u2019])"
    if label in ("A", "I"):
        # These are words too: "A film" and "I think" mean no label, "A is best" and "A or B" do.
        verbs = "|".join(["is", "or", "and", *map(re.escape, labels)])
        pattern += rf"(?!\s+(?!(?:{verbs})\b)\w)"
    return re.search(pattern, text) is not None


def likeness(rollouts: Sequence[Rollout]) -> list[float]:
    """How much more the completion is like what the person liked here than like what it disliked.

    The F1 of words with the nearest text of column `liked`, minus that with the nearest one of column
    `disliked`; from -1 to 1. As for answers to questions (Rajpurkar et al. 2016, arXiv 1606.05250),
    F1 = 2 s / (n + m) for texts of n and m words that share s, each as often as both have it.
    """
    return [_nearest(rollout, "liked") - _nearest(rollout, "disliked") for rollout in rollouts]


def _nearest(rollout: Rollout, column: str) -> float:
    said = Counter(_WORD.findall(rollout.completion.casefold()))
    return max((_f1(said, str(text)) for text in _listed(_column(rollout, column))), default=0.0)


def _f1(said: Counter[str], text: str) -> float:
    words = Counter(_WORD.findall(text.casefold()))
    return 2 * (said & words).total() / max(1, said.total() + words.total())


class ExactMatch:
    """1.0 if the completion equals a column of the example, else 0.0."""

    class Config(Section):
        """Which column, and how strictly."""

        column: str = "answer"
        """Column that holds the expected completion."""
        strip: bool = True
        """Ignore white space around both."""
        casefold: bool = False
        """Ignore upper and lower case."""

    def __init__(self, config: Config) -> None:
        self._config = config

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float]:
        column, normal = self._config.column, self._normal
        return [float(normal(r.completion) == normal(str(_column(r, column)))) for r in rollouts]

    def _normal(self, text: str) -> str:
        text = text.strip() if self._config.strip else text
        return text.casefold() if self._config.casefold else text


class Regex:
    """`reward` where the completion contains a match of `pattern`, else 0.0."""

    class Config(Section):
        """What to look for, and what it is worth."""

        pattern: str
        """Regular expression, as Python's `re` reads it; `^` and `$` tie it to the ends. It is not
        interrupted by timeout_s, so keep nested repetition out of it."""
        reward: float = 1.0
        """Reward of a match."""

        @field_validator("pattern")
        @classmethod
        def _compiles(cls, pattern: str) -> str:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
            return pattern

    def __init__(self, config: Config) -> None:
        self._pattern, self._reward = re.compile(config.pattern), config.reward

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float]:
        return [self._reward if self._pattern.search(r.completion) else 0.0 for r in rollouts]


def persona(rollouts: Sequence[Rollout]) -> list[float]:
    """How well the completion suits the persona of the example (data set `personas`)."""
    return [persona_reward(r.prompt.example.columns, r.completion) for r in rollouts]


def utility(rollouts: Sequence[Rollout]) -> list[float]:
    """The same on one scale from 0 to 1 for every persona, for evaluation (data set `personas`)."""
    return [persona_utility(r.prompt.example.columns, r.completion) for r in rollouts]
