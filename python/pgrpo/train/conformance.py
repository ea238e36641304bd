"""Tries an installed plugin as a run uses it, and tells what it should bear and does not.

`pgrpo plugins check NAME` prints what is found here, and a plugin's own tests may ask for it:

    from pgrpo.train import conformance

    def test_it_conforms():
        assert conformance.failed(conformance.check_reward("brevity", {"limit": 4})) == []

Plugins come through their entry points, and are called by what calls them in a run: the scorer, and
what asks a clusterer for everybody's cluster. So a complaint here is one that a run would make.
"""

from __future__ import annotations

import inspect
import itertools
import json
import logging
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar, cast

import numpy as np

from pgrpo.clusters.assignment import cluster_users, user_shares
from pgrpo.config.checks import check
from pgrpo.config.sections import ClusteringConfig, PluginSection, RewardConfig
from pgrpo.data import DataPluginConfig
from pgrpo.data.personas import PersonasConfig, load_personas
from pgrpo.errors import ConfigError, PgrpoError, PluginError
from pgrpo.plugins.hookspecs import Clusterer, Reward, SoftClusterer
from pgrpo.plugins.registry import load_registry
from pgrpo.rewards.scorer import Scorer
from pgrpo.types import (
    ClusterId,
    Dataset,
    Example,
    FloatArray,
    Group,
    Json,
    Prompt,
    Rollout,
    evenly,
    split_by_group,
)

_log = logging.getLogger("pgrpo")

SectionT = TypeVar("SectionT", bound=PluginSection)

Settings = Mapping[str, Any]
"""Keys of the table that names the plugin, but its name."""

_NUM_GROUPS = 8
_GROUP_SIZE = 4
"""Calls of a reward are few and small, for one may ask a language model."""

_BUDGET_S = 0.5
"""How long repetitions go on that may find something, or make a figure steadier."""

_MAX_REPEATS = 50

_MEET_S = 5e-3
"""Many times what it takes to start a thread."""

_MADE_UP = "; the examples are made up: a run's own are taken with --config RUN.toml"

_UNUSUAL = {
    "an empty completion": "",
    "white space": " \n\t ",
    "one of 2,000 words": "word " * 2000,
    "other scripts": "na\u00efve \u6771\u4eac \u05e9\u05dc\u05d5\u05dd \U0001f642",
    "numbers and signs": "-1e400 NaN {}[]()\\%s \x00",
}
"""What a model may say at any time, above all in its first steps."""


@dataclass(frozen=True, slots=True)
class Check:
    """What came of one check."""

    name: str
    """What was looked at."""
    outcome: Literal["ok", "failed", "skipped"]
    reason: str
    """What was found, or why it failed or was skipped; one sentence."""


def failed(checks: Sequence[Check]) -> list[Check]:
    """Those that failed."""
    return [each for each in checks if each.outcome == "failed"]


def check_reward(
    name: str, settings: Settings | None = None, dataset: Dataset | None = None
) -> list[Check]:
    """Try an installed reward.

    Args:
        name: by which it is registered.
        settings: keys of its `[[rewards]]` table; the settings it has and, such as `num_workers` and
            `batch`, those that every reward has.
        dataset: whose examples its rollouts are of; without one, made-up examples with the columns
            `answer`, `liked`, `disliked` and those of personas.

    Raises:
        PluginError: there is no such reward.
        ConfigError: the settings are not its own, or lack one.
    """
    suite, registry = _Suite(), load_registry()
    section = check(RewardConfig, {"name": name, **(settings or {})}, f"reward {name!r}")
    registry.check("reward", section)
    hint = _MADE_UP if dataset is None else ""
    groups = _groups(dataset or _made_up())
    scorers = ExitStack()
    done: list[tuple[Callable[[Sequence[Group]], FloatArray], FloatArray]] = []

    def build(
        num_workers: int = 1, wrap: Callable[[Reward], Reward] = lambda reward: reward
    ) -> Callable[[Sequence[Group]], FloatArray]:
        # An object has one event loop for life, as in a run, so it has one scorer.
        reward = wrap(registry.reward(section))
        plain = {"weight": 1.0, "clusters": [], "on_error": "fail", "max_unreadable": 1.0}
        here = {"workers": "threads", "num_workers": num_workers}
        own = section.model_copy(update={**plain, **here})
        scorer = scorers.enter_context(Scorer([(own, reward)]))
        return lambda groups: np.concatenate([group.rewards for group in scorer.score(groups)])

    def settings_are_checked() -> str:
        registry.reward(section)
        return _refusal(section, registry.reward)

    def shape() -> str:
        try:
            with _seeded():
                score = build()
                rewards = score(groups)
        except PgrpoError as error:
            raise PluginError(f"{error}{hint}") from error
        done.append((score, rewards))
        given = rewards[np.isfinite(rewards)]
        if not given.size:
            raise _SkippedError(f"it gave none of {len(rewards)} rollouts a reward{hint}")
        none = f", none for {len(rewards) - len(given)}" if len(given) < len(rewards) else ""
        return f"{len(given)} rewards from {given.min():g} to {given.max():g}{none}"

    def unusual() -> str:
        prompt = groups[0].prompt
        if prompt.example.choices:
            raise _SkippedError("completions of these examples are chosen from a list")
        build()([_group(prompt, place, [text]) for place, text in enumerate(_UNUSUAL.values())])
        return f"{', '.join(_UNUSUAL)}; each a group of one"

    def determinism() -> str:
        score, rewards = done[0]
        with _seeded():
            anew = build()(groups)
        _compare(rewards, anew, "an object made anew gave {1} where the first one gave {0}")
        if section.batch == "step":
            return "an object made anew gives the same"
        _compare(
            rewards,
            score(groups),
            "the same rollouts got {0} and then {1}: a seeded run would not repeat. A reward that "
            "draws, or remembers what it saw, wants batch = 'step'",
        )
        return "the same rollouts get the same, also from an object made anew"

    def threads() -> str:
        num_workers = section.num_workers
        if section.batch == "step":
            raise _SkippedError("batch = 'step' makes one call at a time")
        if num_workers == 1:
            raise _SkippedError("num_workers = 1 makes one call at a time")
        _, expected = done[0]
        by_group = split_by_group(expected, groups)
        beside = build(num_workers, lambda reward: _insistent(reward, by_group))
        with _frequent_switches():
            for _ in _repeats():
                try:
                    rewards = beside(groups)
                except PgrpoError as error:
                    raise PluginError(f"called while other calls are under way: {error}") from error
                _compare(
                    expected,
                    rewards,
                    "called while other calls are under way it gave {1}, and else {0}; expected the "
                    "same, or num_workers = 1",
                )
        return f"{num_workers} calls under way at once give what they give one by one"

    def speed() -> str:
        (score, _), num_calls, start = done[0], 0, time.perf_counter()
        calls_each = 1 if section.batch == "step" else len(groups)
        for _ in _repeats():
            score(groups)
            num_calls += calls_each
        rate = num_calls / (time.perf_counter() - start)
        size = sum(len(group.rollouts) for group in groups) // calls_each
        return f"{_figure(rate)} calls a second, one after the other, of {size} rollouts each"

    with scorers:
        suite.run("settings", settings_are_checked)
        suite.run("shape", shape, "settings")
        suite.run("unusual completions", unusual, "shape")
        suite.run("determinism", determinism, "shape")
        suite.run("threads", threads, "determinism")
        suite.run("speed", speed, "shape")
    return suite.checks


def check_clusterer(
    name: str, settings: Settings | None = None, dataset: Dataset | None = None
) -> list[Check]:
    """Try an installed clusterer.

    Args:
        name: by which it is registered.
        settings: keys of its `[clustering]` table.
        dataset: whose users it divides; without one, made-up users with eight features.

    Raises:
        PluginError: there is no such clusterer.
        ConfigError: the settings are not its own, or lack one.
    """
    suite, registry = _Suite(), load_registry()
    section = check(ClusteringConfig, {"name": name, **(settings or {})}, f"clusterer {name!r}")
    registry.check("clusterer", section)
    hint = _MADE_UP if dataset is None else ""
    data = dataset or _made_up()
    users = list(data.users)
    features = np.array([data.users[user] for user in users]).reshape(len(users), -1)
    done: list[tuple[Clusterer, dict[str, ClusterId]]] = []

    def build() -> Clusterer:
        return registry.clusterer(section)

    def settings_are_checked() -> str:
        build()
        return _refusal(section, registry.clusterer)

    def shape() -> str:
        clusterer = build()
        try:
            clusters = cluster_users(clusterer, data)
        except PgrpoError as error:
            raise PluginError(f"{error}{hint}") from error
        done.append((clusterer, clusters))
        sizes = Counter(clusters.values()).values()
        return f"{len(users)} users in {len(sizes)} clusters of {min(sizes)} to {max(sizes)}"

    def determinism() -> str:
        _, clusters = done[0]
        _same_clusters(clusters, cluster_users(build(), data), "fitted anew")
        return "a clusterer made anew finds the same"

    def assignment() -> str:
        clusterer, clusters = done[0]
        backwards = clusterer.assign(users[::-1], np.ascontiguousarray(features[::-1]))
        _same_clusters(clusters, dict(zip(users[::-1], backwards, strict=True)), "in another order")
        alone = {
            user: cluster
            for row, user in enumerate(users[:50])
            for cluster in clusterer.assign([user], features[row : row + 1])
        }
        _same_clusters(clusters, alone, "asked for alone")
        return "a user's does not depend on who else is asked for"

    def state() -> str:
        clusterer, clusters = done[0]
        text = json.dumps(clusterer.state_dict(), allow_nan=False)
        saved = cast(dict[str, Json], json.loads(text))
        restored = build()
        _same_clusters(clusters, cluster_users(restored, data, saved), "restored from its state")
        again = json.loads(json.dumps(restored.state_dict(), allow_nan=False))
        if again != saved:
            raise PluginError(
                "the state of a restored clusterer is not the one it was restored from"
            )
        return f"{len(text):,} characters of JSON restore it"

    def memberships() -> str:
        clusterer, clusters = done[0]
        if not isinstance(clusterer, SoftClusterer):
            raise _SkippedError("without a method memberships each user belongs to one cluster")
        shares = user_shares(clusterer, data, clusters)
        restored = build()
        cluster_users(restored, data, json.loads(json.dumps(clusterer.state_dict())))
        again = user_shares(restored, data, clusters)
        for user, weights in shares.items():
            if again[user] != weights:
                raise PluginError(
                    f"user {user!r} has the weights {dict(weights)} and, restored from the state, "
                    f"{dict(again[user])}"
                )
        mean = sum(map(len, shares.values())) / len(shares)
        return f"a user belongs to {_figure(mean)} on average, with weights of sum 1"

    def unseen() -> str:
        clusterer, clusters = done[0]
        strangers = [f"unseen {user}" for user in users]
        try:
            assigned = list(clusterer.assign(strangers, features))
        except PgrpoError as error:
            raise _SkippedError(f"it refuses them: {error}") from error
        if len(assigned) != len(strangers):
            raise PluginError(f"{len(assigned)} clusters for {len(strangers)} users")
        known = dict(zip(users, clusterer.assign(users, features), strict=True))
        _same_clusters(clusters, known, "after unseen users had been asked for")
        new = {str(cluster) for cluster in assigned} - {str(c) for c in clusters.values()}
        if new:
            return f"some are in clusters without fitted users, such as {min(new)!r}"
        return "they get clusters of fitted users"

    def speed() -> str:
        clusterer, num_users, start = build(), 0, time.perf_counter()
        cluster_users(clusterer, data)
        fit_s, start = time.perf_counter() - start, time.perf_counter()
        for _ in _repeats():
            clusterer.assign(users, features)
            num_users += len(users)
        rate = num_users / (time.perf_counter() - start)
        fit_ms = _figure(1000 * fit_s)
        return f"{fit_ms} ms to fit {len(users)} users; {_figure(rate)} assigned a second"

    suite.run("settings", settings_are_checked)
    suite.run("shape", shape, "settings")
    suite.run("determinism", determinism, "shape")
    suite.run("assignment", assignment, "shape")
    suite.run("state", state, "shape")
    suite.run("memberships", memberships, "state")
    suite.run("unseen users", unseen, "shape")
    suite.run("speed", speed, "shape")
    return suite.checks


def check_dataset(name: str, settings: Settings | None = None) -> list[Check]:
    """Try an installed data set.

    Args:
        name: by which it is registered.
        settings: keys of its `[data]` table.

    Raises:
        PluginError: there is no such data set.
        ConfigError: the settings are not its own, or lack one.
    """
    suite, registry = _Suite(), load_registry()
    section = check(DataPluginConfig, {"name": name, **(settings or {})}, f"data set {name!r}")
    registry.check("data set", section)
    done: list[Dataset] = []

    def settings_are_checked() -> str:
        registry.dataset_loader(section)
        return _refusal(section, registry.dataset_loader)

    def shape() -> str:
        dataset = registry.dataset(section)
        for example in (*dataset.train, *dataset.evaluation):
            _check_example(example, dataset)
        num_features = len(dataset.feature_names)
        for user, features in dataset.users.items():
            if np.shape(features) != (num_features,):
                raise PluginError(
                    f"features of user {user!r} have shape {list(np.shape(features))}, and there are "
                    f"{num_features} feature_names; expected [{num_features}]"
                )
            if not np.isfinite(features).all():
                raise PluginError(f"features of user {user!r} are {features}; expected numbers")
        done.append(dataset)
        return (
            f"{len(dataset.train):,} examples and {len(dataset.evaluation):,} held out, of "
            f"{len(dataset.users):,} users; features of each: {num_features}"
        )

    def determinism() -> str:
        (first,) = done
        second = registry.dataset(section)
        for part in ("train", "evaluation", "observed"):
            ours, theirs = list(getattr(first, part)), list(getattr(second, part))
            if len(ours) != len(theirs):
                raise PluginError(
                    f"{part} has {len(ours)} examples and, loaded anew, {len(theirs)}"
                )
            for place, (one, other) in enumerate(zip(ours, theirs, strict=True)):
                if one != other:
                    raise PluginError(
                        f"example {place} of {part} is another one when it is loaded anew, as for a "
                        f"resumed run: {one.text!r} of {one.user!r}, {other.text!r} of {other.user!r}"
                    )
        if list(first.users) != list(second.users):
            raise PluginError("users are others, or in another order, when it is loaded anew")
        for user, features in first.users.items():
            if not np.array_equal(features, second.users[user]):
                raise PluginError(f"features of user {user!r} are others when it is loaded anew")
        if (first.feature_names, first.vocabulary) != (second.feature_names, second.vocabulary):
            raise PluginError("feature_names or vocabulary are others when it is loaded anew")
        return "loaded anew it is the same"

    def speed() -> str:
        start = time.perf_counter()
        registry.dataset(section)
        return f"loaded in {_figure(1000 * (time.perf_counter() - start))} ms"

    suite.run("settings", settings_are_checked)
    suite.run("shape", shape, "settings")
    suite.run("determinism", determinism, "shape")
    suite.run("speed", speed, "shape")
    return suite.checks


class _SkippedError(Exception):
    """A check that says nothing about this plugin, and why."""


class _Suite:
    """Runs checks one after the other and keeps what came of them."""

    def __init__(self) -> None:
        self.checks: list[Check] = []

    def run(self, name: str, trial: Callable[[], str], needs: str | None = None) -> None:
        """Run a check, which returns what it found or raises what is wrong; skip it where one that it
        needs was not ok."""
        for earlier in self.checks:
            if earlier.name == needs and earlier.outcome != "ok":
                self.checks.append(Check(name, "skipped", f"because of {needs}"))
                return
        outcome: Literal["ok", "failed", "skipped"] = "failed"
        try:
            reason, outcome = trial(), "ok"
        except _SkippedError as why:
            reason, outcome = str(why), "skipped"
        except PgrpoError as error:
            _log.debug("where the error comes from:", exc_info=True)
            reason = str(error)
        except Exception as error:
            _log.debug("where the error comes from:", exc_info=True)
            reason = f"{type(error).__name__}: {error}"
        self.checks.append(Check(name, outcome, " ".join(reason.split())))


def _refusal(section: SectionT, build: Callable[[SectionT], object]) -> str:
    """See that a setting which the plugin does not have is refused by name."""
    word = "no_such_setting"
    wrong = section.model_copy(update={word: 0})
    try:
        build(wrong)
    except ConfigError as error:
        if word in str(error):
            return "one that it does not have is refused by name"
        raise PluginError(
            f"setting {word!r}, which it does not have, is refused without its name: {error}"
        ) from error
    raise PluginError(
        f"setting {word!r}, which it does not have, is taken: a misspelt one would have no effect. "
        "Expected a Config that leaves extra = 'forbid' of pgrpo.config.Section as it is"
    )


def _made_up() -> Dataset:
    """Personas, with columns that rewards often read."""
    dataset = load_personas(PersonasConfig(name="personas", num_examples=480))

    def furnished(example: Example) -> Example:
        hints = example.text.split()
        more = {"answer": hints[0], "liked": hints[:2], "disliked": hints[-1:]}
        return replace(example, columns={**example.columns, **more})

    return replace(
        dataset,
        train=[furnished(example) for example in dataset.train],
        evaluation=[furnished(example) for example in dataset.evaluation],
    )


def _groups(dataset: Dataset) -> list[Group]:
    """Groups of completions that nobody sampled, of examples from all over the data set; any two of
    them differ, so that rewards which got into another's call are seen."""
    groups: list[Group] = []
    for number, example in enumerate(evenly(dataset.train, _NUM_GROUPS)):
        if example.choices:
            size = min(_GROUP_SIZE, len(example.choices))
            texts = [example.choices[(number + i) % len(example.choices)] for i in range(size)]
        else:
            answer = example.columns.get("answer")
            words = example.text.split() or ["yes"]
            texts = [
                answer if isinstance(answer, str) else "I do not know.",
                " ".join(words[-5:]),
                f"{words[0]} " * (number + 1),
                f"{number} of {_NUM_GROUPS}, said {example.user}.",
            ]
        prompt = Prompt(example, number % 2, (0,))
        groups.append(_group(prompt, number, texts))
    return groups


def _group(prompt: Prompt, number: int, texts: Sequence[str]) -> Group:
    return Group.sampled([Rollout(prompt, number, (0,), text, (0.0,), False) for text in texts])


def _compare(expected: FloatArray, rewards: FloatArray, complaint: str) -> None:
    """Raise the complaint, with the two values, where rewards [N] differ."""
    pairs: list[tuple[float, float]] = list(zip(expected.tolist(), rewards.tolist(), strict=True))
    for one, other in pairs:
        if one != other and not (math.isnan(one) and math.isnan(other)):
            shown = ["none" if math.isnan(value) else repr(value) for value in (one, other)]
            raise PluginError(complaint.format(*shown))


def _insistent(reward: Reward, expected: Sequence[FloatArray]) -> Reward:
    """A reward that asks another one again and again, so that calls do meet: most are over before the
    thread of the next one has begun. It answers with what is not as expected [group_id][G], if it gets
    that. An async one gives way by itself, and is returned as it is."""
    if any(map(inspect.iscoroutinefunction, (reward, reward.__call__))):
        return reward

    def ask(rollouts: Sequence[Rollout]) -> Any:
        end = time.perf_counter() + _MEET_S
        while True:
            answer: Any = reward(rollouts)
            entries = answer.tolist() if hasattr(answer, "tolist") else answer
            given = [np.nan if e is None or isinstance(e, Exception) else float(e) for e in entries]
            as_expected = np.array_equal(given, expected[rollouts[0].group_id], equal_nan=True)
            if not as_expected or time.perf_counter() > end:
                return answer

    return ask


def _same_clusters(
    expected: Mapping[str, ClusterId], clusters: Mapping[str, ClusterId], when: str
) -> None:
    """Raise where users, maybe not all, have other clusters than they had."""
    for user, cluster in clusters.items():
        if cluster != expected[user]:
            raise PluginError(
                f"user {user!r} is in cluster {expected[user]!r} and, {when}, in {cluster!r}"
            )


def _check_example(example: object, dataset: Dataset) -> None:
    if not isinstance(example, Example):
        raise PluginError(f"an example is a {type(example).__name__}; expected pgrpo.types.Example")
    if example.user not in dataset.users:
        raise PluginError(f"user {example.user!r} of an example is not among the data set's users")
    if example.choices is not None and not all(example.choices or [""]):
        raise PluginError(f"choices of an example are {example.choices!r}; expected texts, or None")
    try:
        json.dumps(example.columns)
    except (TypeError, ValueError) as error:
        raise PluginError(f"columns of an example of {example.user!r}: {error}") from error


def _figure(value: float) -> str:
    """Two digits of it, for a measurement holds no more."""
    return f"{float(f'{value:.2g}'):,.10g}"


def _repeats() -> Iterator[int]:
    """Once and, while there is time, again."""
    start = time.perf_counter()
    for number in itertools.count():
        if number and (number == _MAX_REPEATS or time.perf_counter() - start > _BUDGET_S):
            return
        yield number


@contextmanager
def _seeded() -> Generator[None]:
    """Meanwhile the generators that everybody shares begin where they always do, as in a seeded run."""
    states = random.getstate(), np.random.get_state()
    random.seed(0)
    np.random.seed(0)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextmanager
def _frequent_switches() -> Generator[None]:
    """Meanwhile threads take turns so often that what they do to each other is seen."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
