"""People who choose alike: the latent-class logit, the standard tool of choice modelling.

Every class of people weighs the attributes x of alternatives by coefficients b_k of its own, and a
person's choices, one for each of its situations t, all come from one class, which has the share s_k:

    P_k(a in t) = exp(b_k x_a) / sum over the alternatives c of t of exp(b_k x_c)
    P(choices of a person) = sum_k s_k prod_t P_k(what was taken in t)

(Kamakura and Russell 1989). Expectation-maximisation raises the likelihood of everybody's choices: by
Bayes' rule a person belongs to each class with some probability, its posterior; then shares become the
mean posteriors, and each class's coefficients those of a logit in which a person's choices count by
its posterior; and so on (Train 2009, Discrete Choice Methods with Simulation, chapter 14).

Axes: U people, S situations (those of a person behind one another), A alternatives, W attributes,
R standardised attributes, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pgrpo.clusters.features import by_size, fitted, state_array
from pgrpo.config import Section
from pgrpo.errors import CheckpointError, DataError
from pgrpo.types import ClusterId, Example, FloatArray, Json

MAX_STEPS = 2000
"""Steps of EM from one start, at most."""

REST = 1e-7
"""The fit is at rest where a step of EM gains less log-likelihood than this for each choice (nats)."""

ROUNDING = 1e-9
"""What is smaller in relation to the largest of its kind is rounding: differences of an attribute that
has none, and directions that other attributes span already."""


class LatentClass:
    """Classes of people who weigh attributes alike, by EM over their choices, with soft membership.

    It reads what people chose in the training period among alternatives that have attributes, and no
    features. A person belongs to each class by its posterior, and is assigned to the most probable one;
    somebody without choices, or who was not there, belongs to them by their shares. Class 0 has the
    most people assigned, then by falling number.
    """

    reads_answers = True

    log_likelihood: float
    """Of all choices that were read, in nats."""
    bic: float
    """-2 log_likelihood + P ln U for P free parameters and U people with choices. Of several numbers of
    classes, the one of the lowest is supported best by the choices."""

    class Config(Section):
        """How many classes, and how hard to search for them."""

        num_clusters: int = Field(ge=1)
        """Classes to make (K)."""
        n_init: int = Field(10, ge=1)
        """Random starts, of which the best is kept."""
        penalty: float = Field(0.1, ge=0)
        """Half of it times the sum of squared coefficients, of attributes standardised and made
        uncorrelated, is taken off the log-likelihood: it keeps the coefficients of a class finite that
        follows a rule without exception. 0: none, plain maximum likelihood."""
        seed: int = Field(0, ge=0)
        """Seeds the starts; the same under every seed of the run."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._shares: FloatArray | None = None
        self._row_of: dict[str, int] = {}
        self._posteriors: FloatArray = np.empty((0, 0))
        self._attributes: list[str] = []
        self._coefficients: FloatArray = np.empty((0, 0))
        self.log_likelihood = self.bic = math.nan

    def fit(self, users: Sequence[str], features: FloatArray, examples: Sequence[Example]) -> None:
        """Find shares [K], coefficients [K, W] and the posteriors of people.

        `examples` are choices: column `attributes` lists the attributes of each alternative, words or
        numbers, and `position` says which one was taken. A word counts 1 for an alternative that has
        it; a number is an attribute by its place in the list.

        Raises:
            DataError: an example is no such choice, alternatives do not differ in any attribute, or
                fewer than K people chose.
        """
        # Imported here, for it takes a second that the other clusterers save.
        from threadpoolctl import threadpool_limits  # pyright: ignore[reportMissingTypeStubs]

        config = self._config
        # Sums of several threads differ by rounding from run to run.
        with threadpool_limits(limits=1):
            choices = _Choices.read(examples)
            if len(choices.people) < config.num_clusters:
                raise DataError(
                    f"num_clusters is {config.num_clusters}, but only {len(choices.people)} people "
                    "have choices in the training period"
                )
            fit = _best(choices, config)
        row_of = {person: row for row, person in enumerate(choices.people)}
        likely = [
            int(np.argmax(fit.posteriors[row_of[user]] if user in row_of else fit.shares))
            for user in users
        ]
        order = by_size(likely, config.num_clusters)
        self._shares, self._posteriors = fit.shares[order], fit.posteriors[:, order]
        self._row_of, self._attributes = row_of, choices.attributes
        self._coefficients = (fit.coefficients @ choices.basis.T)[order]
        self.log_likelihood = fit.log_likelihood
        num_parameters = fit.coefficients.size + config.num_clusters - 1
        self.bic = num_parameters * math.log(len(choices.people)) - 2 * fit.log_likelihood

    def assign(self, users: Sequence[str], features: FloatArray) -> list[ClusterId]:
        """[U] the most probable class; the first of equally probable ones."""
        return [int(np.argmax(self._weights(user))) for user in users]

    def memberships(
        self, users: Sequence[str], features: FloatArray
    ) -> list[Mapping[ClusterId, float]]:
        """[U] posterior probability of each class."""
        return [dict(enumerate(self._weights(user).tolist())) for user in users]

    def _weights(self, user: str) -> FloatArray:
        """[K] posterior of a user, or the shares for one without choices."""
        shares = fitted(self._shares, "latent_class")
        return self._posteriors[self._row_of[user]] if user in self._row_of else shares

    def state_dict(self) -> dict[str, Json]:
        """Shares [K], people with their posteriors [U, K], and what else there is to report: the
        attributes' names [W], the coefficients [K, W] in units of the attributes, the log-likelihood
        and the BIC."""
        return {
            "shares": fitted(self._shares, "latent_class").tolist(),
            "users": list(self._row_of),
            "posteriors": self._posteriors.tolist(),
            "attributes": list(self._attributes),
            "coefficients": self._coefficients.tolist(),
            "log_likelihood": self.log_likelihood,
            "bic": self.bic,
        }

    def load_state_dict(self, state: Mapping[str, Json]) -> None:
        """Take over what was fitted; raises CheckpointError where its parts do not fit together."""
        users, attributes = _strings(state, "users"), _strings(state, "attributes")
        num_classes = self._config.num_clusters
        arrays: dict[str, FloatArray] = {}
        for key, shape in (
            ("shares", (num_classes,)),
            ("posteriors", (len(users), num_classes)),
            ("coefficients", (num_classes, len(attributes))),
            ("log_likelihood", ()),
            ("bic", ()),
        ):
            arrays[key] = state_array(state, key, len(shape))
            if arrays[key].shape != shape:
                raise CheckpointError(
                    f"{key!r} of the state has shape {list(arrays[key].shape)}, expected "
                    f"{list(shape)}"
                )
        self._shares, self._posteriors = arrays["shares"], arrays["posteriors"]
        self._row_of = {user: row for row, user in enumerate(users)}
        self._attributes, self._coefficients = attributes, arrays["coefficients"]
        self.log_likelihood, self.bic = float(arrays["log_likelihood"]), float(arrays["bic"])


def _strings(state: Mapping[str, Json], key: str) -> list[str]:
    values = state.get(key)
    if not isinstance(values, list):
        raise CheckpointError(f"the clusterer's state has no list {key!r}")
    return [str(value) for value in cast(list[object], values)]


@dataclass(frozen=True, slots=True)
class _Choices:
    """What people chose, as arrays. The taken alternative of a situation comes first."""

    people: list[str]
    first: NDArray[np.intp]
    """[U] each person's first situation."""
    num_choices: NDArray[np.intp]
    """[U] how many each person has."""
    attributes: list[str]
    """[W] their names."""
    basis: FloatArray
    """[W, R] turns coefficients of standardised attributes into those of the attributes."""
    x: FloatArray
    """[A, S, R] standardised attributes; 0 where a situation has fewer alternatives."""
    absent: FloatArray
    """[A, S] minus infinity where a situation has fewer alternatives, else 0."""

    @classmethod
    def read(cls, examples: Sequence[Example]) -> _Choices:
        """The choices of examples; raises DataError as `LatentClass.fit`.

        Only differences between the alternatives of a situation tell anything, so attributes are taken
        less their mean over these and divided by the standard deviation of what is left. Words of which
        an alternative has just one say the same as all of them but one: what remains is turned to its
        principal components of variance 1, without those that have none. Of all coefficients under
        which the choices are equally probable the smallest are thereby meant.
        """
        of_person: dict[str, list[list[dict[int | str, float]]]] = {}
        for example in examples:
            of_person.setdefault(example.user, []).append(_alternatives(example))
        situations = [situation for found in of_person.values() for situation in found]
        if not situations:
            raise DataError("there are no choices in the training period to learn classes from")
        keys = dict.fromkeys(key for found in situations for words in found for key in words)
        place = {key: index for index, key in enumerate(keys)}
        shape = max(map(len, situations)), len(situations)
        x, there = np.zeros((*shape, len(keys))), np.zeros(shape, dtype=bool)
        for s, situation in enumerate(situations):
            there[: len(situation), s] = True
            for a, words in enumerate(situation):
                for key, value in words.items():
                    x[a, s, place[key]] = value
        largest = np.abs(x).max(axis=(0, 1), initial=0.0)
        x -= x.sum(axis=0) / there.sum(axis=0)[:, None]
        rows = x[there]
        std = np.sqrt(np.square(rows).mean(axis=0))
        std[std <= ROUNDING * largest] = np.inf
        rows /= std
        values, vectors = np.linalg.eigh(rows.T @ rows / len(rows))
        kept = values > ROUNDING * values.max(initial=0.0)
        if not kept.any():
            raise DataError(
                f"the alternatives of the {len(situations)} choices of the training period do not "
                "differ in any attribute; expected some that do"
            )
        basis = vectors[:, kept] / np.sqrt(values[kept])
        standardised = np.zeros((*shape, basis.shape[1]))
        standardised[there] = rows @ basis
        num_choices = np.array([len(found) for found in of_person.values()])
        return cls(
            people=list(of_person),
            first=np.cumsum(num_choices) - num_choices,
            num_choices=num_choices,
            attributes=[key if isinstance(key, str) else f"attribute {key + 1}" for key in keys],
            basis=basis / std[:, None],
            x=standardised,
            absent=np.where(there, 0.0, -np.inf),
        )

    def logit(self, coefficients: FloatArray) -> tuple[FloatArray, FloatArray]:
        """[S, K] log-probability of what was taken, and [A, S, K] probability of each alternative,
        under coefficients [K, R]."""
        num_alternatives, num_situations, width = self.x.shape
        utility = self.x.reshape(-1, width) @ coefficients.T
        utility = utility.reshape(num_alternatives, num_situations, -1) + self.absent[:, :, None]
        utility -= utility.max(axis=0)
        odds = np.exp(utility)
        total = odds.sum(axis=0)
        return utility[0] - np.log(total), odds / total


def _alternatives(example: Example) -> list[dict[int | str, float]]:
    """Attribute -> its value, of the alternatives of a choice, the taken one first."""
    columns: Mapping[str, Any] = example.columns
    missing = [name for name in ("attributes", "position") if columns.get(name) is None]
    if missing:
        raise DataError(
            f"an example of user {example.user!r} has no column {missing[0]!r}; expected choices among "
            "alternatives whose attributes are listed, as the data sets panel, movielens and feedback "
            "(tasks rate and choose) have them"
        )
    offered, position = columns["attributes"], columns["position"]
    if not (
        isinstance(offered, list)
        and isinstance(position, int)
        and 0 <= position < len(cast(list[Any], offered))
    ):
        raise DataError(
            f"an example of user {example.user!r} has position {position!r} and attributes "
            f"{offered!r}; expected a list of attributes for each alternative, and the place of the "
            "one that was taken"
        )
    read = [_values(example.user, listed) for listed in cast(list[object], offered)]
    return [read[position], *read[:position], *read[position + 1 :]]


def _values(user: str, listed: object) -> dict[int | str, float]:
    """Attribute -> its value, of one alternative."""
    values: dict[int | str, float] = {}
    entries = cast(list[object], listed) if isinstance(listed, list) else [None]
    for place, value in enumerate(entries):
        if isinstance(value, str):
            values[value] = 1.0
        elif isinstance(value, int | float) and math.isfinite(value):
            values[place] = float(value)
        else:
            raise DataError(
                f"an example of user {user!r} has an alternative of attributes {listed!r}; expected a "
                "list of words and finite numbers"
            )
    return values


@dataclass(frozen=True, slots=True)
class _Fit:
    """Parameters, and what they say of the choices."""

    coefficients: FloatArray
    """[K, R] of standardised attributes."""
    shares: FloatArray
    """[K]"""
    posteriors: FloatArray
    """[U, K]"""
    log_likelihood: float
    objective: float
    """The log-likelihood less the penalty: what EM raises at every step."""


def _best(choices: _Choices, config: LatentClass.Config) -> _Fit:
    """The fit of the best start.

    A start gives each class everybody's coefficients and a standard normal draw: so different that
    people are told apart at once, and no more than they may well be, for attributes have variance 1.
    All starts are followed until they are at rest, for none can be given up early: the order of 24
    starts of five classes on the electricity panel had a rank correlation with their last one of .31
    after 20 steps, and of .92 after 80, when most were at rest.
    """
    num_situations, width = choices.x.shape[1:]
    everybody = _maximised(choices, np.ones(num_situations), np.zeros(width), config.penalty)
    fits: list[_Fit] = []
    for start in range(config.n_init):
        rng = np.random.default_rng((config.seed, start))
        coefficients = everybody + rng.standard_normal((config.num_clusters, width))
        run = _em(choices, coefficients, config.penalty)
        fit = next(run)
        for better in islice(run, MAX_STEPS):
            gain, fit = better.objective - fit.objective, better
            if gain < REST * num_situations:
                break
        fits.append(fit)
    return max(fits, key=lambda fit: fit.objective)


def _em(choices: _Choices, coefficients: FloatArray, penalty: float) -> Iterator[_Fit]:
    """The fit of given coefficients [K, R] and equal shares, and after each further step of EM."""
    shares = np.full(len(coefficients), 1 / len(coefficients))
    while True:
        log_taken, _ = choices.logit(coefficients)
        # A class that lost everybody keeps the share 0.
        with np.errstate(divide="ignore"):
            joint = np.add.reduceat(log_taken, choices.first, axis=0) + np.log(shares)
        total = np.logaddexp.reduce(joint, axis=1)
        posteriors = np.exp(joint - total[:, None])
        log_likelihood = float(total.sum())
        objective = log_likelihood - penalty / 2 * float(np.square(coefficients).sum())
        yield _Fit(coefficients, shares, posteriors, log_likelihood, objective)
        shares = posteriors.mean(axis=0)
        weights = posteriors.repeat(choices.num_choices, axis=0)
        # Each search begins where the last one ended, and so never ends below it.
        coefficients = np.stack(
            [
                _maximised(choices, weights[:, k], coefficients[k], penalty)
                for k in range(len(coefficients))
            ]
        )


def _maximised(
    choices: _Choices, weights: FloatArray, start: FloatArray, penalty: float
) -> FloatArray:
    """[R] coefficients of the logit in which situations count by weights [S], by L-BFGS."""
    from scipy.optimize import minimize

    flat = choices.x.reshape(-1, choices.x.shape[2])

    def loss(coefficients: FloatArray) -> tuple[float, FloatArray]:
        log_taken, probabilities = choices.logit(coefficients[None])
        surprise = -probabilities[:, :, 0]
        surprise[0] += 1
        value = weights @ log_taken[:, 0] - penalty / 2 * coefficients @ coefficients
        gradient = (surprise * weights).ravel() @ flat - penalty * coefficients
        return -float(value) / len(weights), -gradient / len(weights)

    found: Any = minimize(
        loss, start, jac=True, method="L-BFGS-B", options={"ftol": 1e-14, "gtol": 1e-8}
    )
    return found.x
