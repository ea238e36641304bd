"""What simple rules achieve on the held-out prompts: what a sceptic would ask a trained model to beat.

Every rule picks one of an example's options, and a run is compared with its reward. `chance` picks any,
`most popular` what people take most often, and three logits score an option by its attributes: one
for everybody, one for each cluster, and one for each person. What lies between the first logit and
the last is personal; a model that stays below the first has learned nothing of the people.

The logits are fitted by scikit-learn to the choices of the training period alone. An option's score is
the sum of the weights of its attributes' words, and the weights are those under which options that
were taken, or liked more, beat the others of their situation, pair by pair (Bradley and Terry 1952).
Clusters and people have weights of their own that deviate from everybody's; how far they may is set by
the last known choice of every person, which is held back for that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix, hstack
from sklearn.linear_model import LogisticRegression

from pgrpo.config.sections import RewardConfig
from pgrpo.types import ClusterId, Dataset, Example, FloatArray, evenly

MAX_CHOICES = 10_000
"""Most choices that the rules are fitted to, spread evenly over all there are: for so many a quarter of
a minute is enough."""

SPREADS = (0.1, 0.3, 1.0, 3.0)
"""Prior standard deviations that are tried for how far weights of clusters and people lie from
everybody's, whose own is 1 (in log odds per word)."""


@dataclass(frozen=True, slots=True)
class _Choice:
    """One situation: A options, of which somebody took or liked some more than others."""

    user: str
    words: tuple[tuple[str, ...], ...]
    popularity: FloatArray
    rewards: FloatArray
    """[A] 1 for what was taken and 0 for the others, or what each is worth by column `values`."""


def baselines(
    dataset: Dataset, held_out: Sequence[Example], cluster_of: Mapping[str, ClusterId]
) -> dict[str, FloatArray]:
    """Reward that each rule gets for each held-out example, [H], by the rule's name.

    Where options tie for a rule's best, the reward is the mean of theirs. The rules are fitted to at
    most MAX_CHOICES choices. Empty where examples do not say what there was to choose from (columns
    `attributes`, `popularity` and `position`).

    Args:
        dataset: whose choices of the training period the rules are fitted to.
        held_out: examples that they are judged by.
        cluster_of: every user's cluster.
    """
    return Rules(dataset, cluster_of).rewards(held_out)


class Rules:
    """The rules, fitted once.

    Args:
        dataset: whose choices of the training period they are fitted to.
        cluster_of: every user's cluster.
    """

    def __init__(self, dataset: Dataset, cluster_of: Mapping[str, ClusterId]) -> None:
        seen = _choices(evenly(dataset.observed or dataset.train, MAX_CHOICES))
        self._logits: dict[str, _Logit] = {}
        if seen:
            everybody = dict.fromkeys(cluster_of, 0)
            person = {user: user for user in cluster_of}
            self._logits = {
                "one rule for all": _Logit.fitted(seen, everybody),
                "one rule per cluster": _Logit.chosen(seen, cluster_of),
                "one rule per person": _Logit.chosen(seen, person),
            }

    def rewards(self, held_out: Sequence[Example]) -> dict[str, FloatArray]:
        """As of `baselines`; examples may have more options than those that were fitted to."""
        asked = _choices(held_out)
        if asked is None or not self._logits:
            return {}
        return {
            "chance": np.array([choice.rewards.mean() for choice in asked]),
            "most popular": _rewards(asked, [choice.popularity for choice in asked]),
            **{name: logit.rewards(asked) for name, logit in self._logits.items()},
        }


def rewards_of_one_rule(dataset: Dataset) -> tuple[list[str], FloatArray] | None:
    """What `one rule for all` gets for held-out choices, at most MAX_CHOICES of them, spread evenly.

    That is what a policy is rewarded with that treats everybody alike, told by data alone: where its
    rewards differ between clusters, so do tastes.

    Returns:
        Whose each choice is, and its reward [H]; None where nothing is held out, or examples do not say
        what there was to choose from.
    """
    seen = _choices(evenly(dataset.observed or dataset.train, MAX_CHOICES))
    asked = _choices(evenly(dataset.evaluation, MAX_CHOICES))
    if not seen or not asked:
        return None
    everybody = dict.fromkeys(dataset.users, 0)
    return [choice.user for choice in asked], _Logit.fitted(seen, everybody).rewards(asked)


def are_known(scored_by: Sequence[RewardConfig]) -> bool:
    """Whether the held-out reward is known of every option, as that of `choice` and `rated` is; of
    other rewards there are no baselines."""
    return [section.name for section in scored_by] in (["choice"], ["rated"])


def _choices(examples: Sequence[Example]) -> list[_Choice] | None:
    """What was chosen from what; None where one example does not say."""
    found = [_choice(example) for example in examples]
    return None if None in found else cast(list[_Choice], found)


def _choice(example: Example) -> _Choice | None:
    columns: Mapping[str, Any] = example.columns
    if not {"attributes", "popularity", "position"} <= columns.keys():
        return None
    taken = (float(place == columns["position"]) for place in range(len(columns["attributes"])))
    rewards = columns.get("values", list(taken))
    return _Choice(
        example.user,
        tuple(tuple(map(str, words)) for words in columns["attributes"]),
        np.array(columns["popularity"], dtype=np.float64),
        np.array(rewards, dtype=np.float64),
    )


def _rewards(choices: Sequence[_Choice], scores: Sequence[FloatArray]) -> FloatArray:
    """[H] reward of the option that scores best, the mean of theirs where several do."""
    rewards: list[float] = []
    for choice, score in zip(choices, scores, strict=True):
        # Sums of the same weights in another order differ by rounding.
        best = score >= score.max() - 1e-9
        rewards.append(float(choice.rewards[best].mean()))
    return np.array(rewards)


class _Logit:
    """Weights of words: everybody's, and what each circle of people adds to them.

    Args:
        circle_of: user -> the circle whose weights it shares.
        words: the words that have weights.
        spread: prior standard deviation of what circles add; 0 for nothing.
    """

    def __init__(
        self, circle_of: Mapping[str, ClusterId], words: Sequence[str], spread: float
    ) -> None:
        self._circle_of = circle_of
        self._place = {word: index for index, word in enumerate(words)}
        circles = dict.fromkeys(circle_of.values())
        self._circle_place = {circle: index for index, circle in enumerate(circles)}
        self._spread = spread
        self._weights: FloatArray = np.zeros(0)

    @classmethod
    def fitted(
        cls, choices: Sequence[_Choice], circle_of: Mapping[str, ClusterId], spread: float = 0.0
    ) -> _Logit:
        """The logit under which the options that were taken beat the others most clearly."""
        words = sorted({word for c in choices for option in c.words for word in option})
        logit = cls(circle_of, words, spread)
        rows, firsts = logit._design(choices), np.cumsum([0, *(len(c.words) for c in choices)])
        found = [
            (first + a, first + b)
            for first, c in zip(firsts.tolist(), choices, strict=False)
            for a, b in np.argwhere(c.rewards[:, None] > c.rewards).tolist()
        ]
        if not found:
            # Nobody liked anything more than something else.
            logit._weights = np.zeros(rows.shape[1])
            return logit
        better, worse = (list(side) for side in zip(*found, strict=True))
        pairs = rows[better] - rows[worse]
        # Every second pair the other way round, for a classifier wants two classes.
        sign = np.where(np.arange(pairs.shape[0]) % 2, 1.0, -1.0)
        model = LogisticRegression(fit_intercept=False, C=1.0, max_iter=1000, solver="liblinear")
        model.fit(pairs.multiply(sign[:, None]).tocsr(), sign)
        logit._weights = np.asarray(model.coef_[0], dtype=np.float64)
        return logit

    @classmethod
    def chosen(cls, choices: Sequence[_Choice], circle_of: Mapping[str, ClusterId]) -> _Logit:
        """The logit of the spread that foretells each person's last choice best from the others."""
        last = {choice.user: index for index, choice in enumerate(choices)}
        held_back = [choices[index] for index in last.values()]
        others = [choice for index, choice in enumerate(choices) if index != last[choice.user]]
        if not others:
            return cls.fitted(choices, circle_of, SPREADS[0])
        best = max(
            SPREADS,
            key=lambda spread: cls.fitted(others, circle_of, spread).rewards(held_back).mean(),
        )
        return cls.fitted(choices, circle_of, best)

    def rewards(self, choices: Sequence[_Choice]) -> FloatArray:
        """[H] of the options that score best."""
        scores: FloatArray = self._design(choices) @ self._weights
        ends = np.cumsum([len(choice.words) for choice in choices])
        return _rewards(choices, np.split(scores, ends[:-1]))

    def _design(self, choices: Sequence[_Choice]) -> Any:
        """[options, weights] sparse: which weights an option's score is the sum of."""
        width = len(self._place)
        row: list[int] = []
        column: list[int] = []
        circle: list[int] = []
        number = 0
        for choice in choices:
            where = self._circle_place[self._circle_of[choice.user]]
            for option in choice.words:
                # A word that nobody was offered before says nothing.
                known = [self._place[word] for word in option if word in self._place]
                row += [number] * len(known)
                column += known
                circle += [where] * len(known)
                number += 1
        shared = csr_matrix((np.ones(len(row)), (row, column)), shape=(number, width))
        if not self._spread:
            return shared
        own: NDArray[np.int64] = np.array(circle, dtype=np.int64) * width + np.array(column)
        shape = (number, width * len(self._circle_place))
        return hstack(
            [shared, csr_matrix((np.full(len(row), self._spread), (row, own)), shape=shape)]
        ).tocsr()
