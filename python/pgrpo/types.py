"""What flows through a step: example -> prompt -> rollouts of a group.

Axes are named as everywhere in the package: N rollouts, G rollouts of a group, T tokens,
K clusters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeAlias, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")

ClusterId: TypeAlias = int | str
"""Name of a preference cluster; ints and strings never collide."""

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"
"""What a data set's column may hold."""

FloatArray: TypeAlias = NDArray[np.float64]
"""Float64 throughout: rewards, advantages and log-probabilities outside the model."""


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise TypeError(
        "columns of an example cannot be written to, for other rewards and later epochs read them; "
        "change a copy.deepcopy of them"
    )


class _ReadOnlyDict(dict[str, Any]):
    """A dict that cannot be written to; a deep copy can."""

    __slots__ = ()
    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


class _ReadOnlyList(list[Any]):
    """A list that cannot be written to; a deep copy can."""

    __slots__ = ()
    __setitem__ = __delitem__ = __iadd__ = __imul__ = _refuse
    append = clear = extend = insert = pop = remove = reverse = sort = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (list(self),)


def _read_only(value: Any) -> Any:
    """The same in what cannot be written to, all the way down."""
    kind = type(value)
    if kind is str or kind is float or kind is _ReadOnlyList or kind is _ReadOnlyDict:
        return value
    if isinstance(value, dict):
        entries = cast(dict[str, Any], value).items()
        return _ReadOnlyDict({key: _read_only(entry) for key, entry in entries})
    if isinstance(value, list):
        return _ReadOnlyList(map(_read_only, cast(list[Any], value)))
    return tuple(map(_read_only, value)) if kind is tuple else value


@dataclass(frozen=True, slots=True)
class Example:
    """One row of a data set: what is asked of the model on behalf of one user."""

    text: str
    """The prompt's text, as the user turn of a chat or as it stands (`model.chat`)."""
    user: str
    """Whose preferences the reward expresses; clusters are made of users."""
    columns: Mapping[str, Json] = field(default_factory=dict[str, Json])
    """Whatever the reward plugin needs, for example `answer`. It cannot be written to: of dicts and
    lists, copies are kept that refuse it with a TypeError."""
    choices: tuple[str, ...] | None = None
    """The texts a completion may take, or None where it is free."""
    turns: tuple[tuple[str, str], ...] = ()
    """Role and content of each turn, where the prompt is a chat; `text` then says the same in words."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", _read_only(self.columns))


@dataclass(frozen=True, slots=True)
class Dataset:
    """Everything a run reads: examples to train on, later ones to evaluate on, and the users."""

    train: Sequence[Example]
    evaluation: Sequence[Example]
    users: Mapping[str, NDArray[np.float64]]
    """User -> features [F], computed from the training period alone."""
    feature_names: tuple[str, ...]
    """Names of the F features."""
    vocabulary: tuple[str, ...] = ()
    """Words of a generated language, from which `model.name = "tiny"` makes its tokenizer."""
    observed: Sequence[Example] = ()
    """All that the training period knows of the users' choices, where that is more than `train`: a
    rule that is fitted may learn from choices that are too early to be asked for."""
    notes: tuple[str, ...] = ()
    """What a user should be told of how the data was read, such as who was left out."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """An example made ready for the model."""

    example: Example
    cluster_id: ClusterId
    token_ids: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...] | None = None
    """Token ids of each permitted completion, or None where it is free."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """One prompt with one completion."""

    prompt: Prompt
    group_id: int
    """Rollouts with the same number within a step share their prompt."""
    completion_ids: tuple[int, ...]
    """[T], never empty; includes the end-of-sequence token when the model produced one."""
    completion: str
    rollout_logprobs: tuple[float, ...]
    """[T] log-probabilities in nats, under the distribution that was sampled from."""
    truncated: bool
    """True when max_new_tokens ended the completion."""
    policy_version: int = 0
    """Number of weight updates the sampling policy had seen."""


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """The rollouts of one prompt, with what becomes known of them on the way through a step.

    An engine samples it, the scorer adds rewards, the collector advantages, and the policy learns
    from it; each of them makes a new one with `dataclasses.replace`.
    """

    rollouts: tuple[Rollout, ...]
    """[G], never empty."""
    rewards: FloatArray
    """[G] raw; NaN where there is none, or not yet."""
    advantages: FloatArray
    """[G]; NaN before they are computed."""
    scores: Mapping[str, FloatArray] = field(default_factory=dict[str, FloatArray])
    """Reward -> [G] what it gave, raw and without its weight; NaN where that is nothing. Empty before
    they are scored."""
    penalties: FloatArray | None = None
    """[G] what is taken off the rewards before they are folded and normalised; None for nothing."""

    @classmethod
    def sampled(cls, rollouts: Sequence[Rollout]) -> Group:
        """Rollouts of which nothing further is known."""
        unknown = np.full(len(rollouts), np.nan)
        return cls(tuple(rollouts), unknown, unknown.copy())

    @property
    def shaped(self) -> FloatArray:
        """[G] rewards less penalties: what histories and advantages are made of."""
        return self.rewards if self.penalties is None else self.rewards - self.penalties

    def only(self, kept: Sequence[int]) -> Group:
        """Some of its rollouts, by their places, with what is known of them; empty if none is named."""
        return Group(
            tuple(self.rollouts[place] for place in kept),
            self.rewards[kept],
            self.advantages[kept],
            {name: scores[kept] for name, scores in self.scores.items()},
            None if self.penalties is None else self.penalties[kept],
        )

    @property
    def prompt(self) -> Prompt:
        """What all rollouts answer."""
        return self.rollouts[0].prompt

    @property
    def group_id(self) -> int:
        """The place of the group within its step."""
        return self.rollouts[0].group_id


def split_by_group(values: FloatArray, groups: Sequence[Group]) -> list[FloatArray]:
    """One array [G] for each group, out of the values [N] of all their rollouts."""
    ends = np.cumsum([len(group.rollouts) for group in groups])
    return np.split(values, ends[:-1])


def evenly(things: Sequence[T], number: int) -> list[T]:
    """So many of the things, spread evenly over all, the first and the last among them; or all."""
    places = np.linspace(0, len(things) - 1, min(number, len(things))).round().astype(int)
    return [things[place] for place in places.tolist()]
