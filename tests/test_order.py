"""The order of training prompts: by epochs, and by shares of clusters, from the seed and the step alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Tree, members, tiny_run, train
from scipy import stats
from test_trainer import lines

from pgrpo.config.sections import RunConfig
from pgrpo.errors import ConfigError
from pgrpo.rollout.order import PromptOrder
from pgrpo.rollout.seeds import derive_seed
from pgrpo.runs.config import parse_config
from pgrpo.train.build import Assembly
from pgrpo.types import ClusterId, Dataset, Example

CLUSTER_OF: dict[str, ClusterId] = {
    "ann": 0,
    "bob": 0,
    "cyd": 0,
    "dan": "jazz",
    "eve": "jazz",
    "fay": 2,
    "gus": 3,
}
NUM_OF = {"ann": 30, "bob": 20, "cyd": 10, "dan": 20, "eve": 10, "fay": 10, "gus": 0}
"""Training examples of each user."""
SIZES = {"0": 60, "jazz": 30, "2": 10}


def order(
    shares: Mapping[str, float] | None,
    seed: int = 0,
    size: int = 32,
    num_of: Mapping[str, int] = NUM_OF,
) -> PromptOrder:
    examples = [Example(f"{user} {n}", user) for user, num in num_of.items() for n in range(num)]
    np.random.default_rng(1).shuffle(examples)  # type: ignore[arg-type]
    dataset = Dataset(examples, [], {user: np.empty(0) for user in CLUSTER_OF}, ())
    run = RunConfig(seed=seed, prompts_per_step=size)
    return PromptOrder(run, dataset, members(CLUSTER_OF), shares)


def clusters(examples: list[Example]) -> list[str]:
    return [str(CLUSTER_OF[example.user]) for example in examples]


def p_value(drawn: Counter[str], shares: Mapping[str, float]) -> float:
    """Of Pearson's chi-square test that they were drawn by these shares."""
    total = drawn.total()
    expected = [total * share for share in shares.values()]
    return float(stats.chisquare([drawn[name] for name in shares], expected).pvalue)


@pytest.mark.parametrize("size", [7, 100, 130])
def test_without_shares_steps_cut_up_a_shuffle_of_each_epoch(size: int) -> None:
    found = order(None, seed=3, size=size)
    told = [example.text for step in range(1, 8) for example in found.examples(step)]
    train_texts = [example.text for example in found._train]
    epochs = [
        np.random.default_rng(derive_seed(3, "shuffle", epoch)).permutation(100).tolist()
        for epoch in range(10)
    ]
    places = [place for epoch in epochs for place in epoch]
    assert told == [train_texts[place] for place in places[: 7 * size]]


@pytest.mark.parametrize(
    ("named", "shares"),
    [
        ({"2": 0.02}, {"0": 0.98 * 60 / 90, "jazz": 0.98 * 30 / 90, "2": 0.02}),
        ({"2": 0.2}, {"0": 0.8 * 60 / 90, "jazz": 0.8 * 30 / 90, "2": 0.2}),
        ({"jazz": 0.5, "2": 0.08}, {"0": 0.42, "jazz": 0.5, "2": 0.08}),
        ({"0": 0.1, "jazz": 0.2, "2": 0.7}, {"0": 0.1, "jazz": 0.2, "2": 0.7}),
        ({"0": 0.1, "jazz": 0.2, "2": 0.7, "3": 0.0}, {"0": 0.1, "jazz": 0.2, "2": 0.7}),
    ],
)
def test_clusters_are_drawn_by_their_shares(
    named: dict[str, float], shares: dict[str, float]
) -> None:
    found = order(named)
    steps = [clusters(found.examples(step)) for step in range(1, 401)]
    drawn = Counter(cluster for step in steps for cluster in step)
    assert drawn.keys() == shares.keys()
    assert p_value(drawn, shares) > 0.01
    assert p_value(drawn, {name: size / 100 for name, size in SIZES.items()}) < 1e-6
    # A step is as good as any: the number of a cluster's prompts varies as binomial numbers do.
    for name, share in shares.items():
        counts = np.array([step.count(name) for step in steps])
        spread = counts.var(ddof=1) / (32 * share * (1 - share))
        assert stats.chi2.ppf(0.001, 399) < 399 * spread < stats.chi2.ppf(0.999, 399)
    # And so are those that take the places of others.
    others = Counter(c for step in range(1, 41) for c in clusters(found.others(step, 100)))
    assert others.keys() == shares.keys()
    assert p_value(others, shares) > 0.01


def test_a_share_of_one_or_none_is_kept_exactly() -> None:
    found = order({"jazz": 1.0})
    assert {c for step in range(1, 9) for c in clusters(found.examples(step))} == {"jazz"}
    found = order({"jazz": 0.0})
    seen = [c for step in range(1, 99) for c in clusters(found.examples(step) + found.others(1, 9))]
    assert set(seen) == {"0", "2"}


def test_examples_of_a_cluster_take_turns_in_another_order_every_time() -> None:
    found = order({"2": 0.2})
    told = [example for step in range(1, 201) for example in found.examples(step)]
    for cluster, size in SIZES.items():
        own = [e.text for e in told if str(CLUSTER_OF[e.user]) == cluster]
        assert len(own) > 3 * size
        rounds = [own[start : start + size] for start in range(0, len(own) - size + 1, size)]
        assert {tuple(sorted(texts)) for texts in rounds} == {tuple(sorted(rounds[0]))}
        assert len(set(rounds[0])) == size
        assert len({tuple(texts) for texts in rounds}) == len(rounds)
    # Those of one cluster say nothing of the other's.
    assert max(Counter(e.text for e in told if e.user == "fay").values()) > 100


def test_any_step_can_be_asked_for_first_and_again() -> None:
    shares = {"2": 0.1}
    through = order(shares)
    told = {step: through.examples(step) for step in range(1, 60)}
    for step in (59, 30, 31, 1, 59):
        fresh = order(shares).examples(step)
        assert [e.text for e in fresh] == [e.text for e in told[step]]
        assert [e.text for e in through.examples(step)] == [e.text for e in told[step]]
    other = order(shares, seed=1).examples(30)
    assert [e.text for e in other] != [e.text for e in told[30]]


def test_fewer_of_the_last_cluster_are_among_the_more() -> None:
    """The same numbers draw them: runs of different shares differ by no more than they must."""
    steps = range(1, 101)
    few, many = (
        [clusters(o.examples(s)) for s in steps] for o in map(order, ({"2": 0.02}, {"2": 0.2}))
    )
    of = [
        (a == "2", b == "2")
        for x, y in zip(few, many, strict=True)
        for a, b in zip(x, y, strict=True)
    ]
    assert sum(a for a, _ in of) > 30
    assert all(b for a, b in of if a)


@pytest.mark.parametrize("size", [8, 64])
def test_others_are_not_the_step_s_own_while_there_are_any(size: int) -> None:
    found = order({"2": 0.5}, size=size)
    own = {e.text for e in found.examples(5)}
    others = found.others(5, 300)
    assert [e.text for e in others[:40]] == [e.text for e in found.others(5, 40)]
    assert [e.text for e in others] != [e.text for e in found.others(6, 300)]
    for cluster, number in SIZES.items():
        told = Counter(e.text for e in others if str(CLUSTER_OF[e.user]) == cluster)
        taken = {text for text in own if str(CLUSTER_OF[text.split()[0]]) == cluster}
        if len(taken) == number:
            # All of them are the step's: there is nothing else to take.
            assert told.keys() == taken
        else:
            assert not told.keys() & taken
            assert len(told) <= number - len(taken)
        assert max(told.values()) - min(told.values()) <= 1
    assert order({"2": 0.5}).others(5, 0) == []


@pytest.mark.parametrize(
    ("shares", "words"),
    [
        (
            {"4": 0.1},
            "clustering.prompt_shares names cluster '4', which there is not; expected some of 0, jazz, ",
        ),
        (
            {"3": 0.1},
            "prompt_shares.3 is 0.1, and cluster '3' has no prompt to train on; expected 0",
        ),
        (
            {"0": 0.5, "jazz": 0.2, "2": 0.1},
            "prompt_shares come to 0.8 together, and no cluster with prompts is left for the rest",
        ),
    ],
)
def test_shares_of_what_there_is_not(shares: dict[str, float], words: str) -> None:
    with pytest.raises(ConfigError, match="^clustering.prompt_shares") as told:
        order(shares)
    assert words in str(told.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"0": 0.7, "1": 0.4},
            "clustering: prompt_shares come to 1.1 together; expected at most 1",
        ),
        ({"0": 1.5}, "clustering.prompt_shares.0 is 1.5: input should be less than or equal to 1"),
        (
            {"0": -0.1},
            "clustering.prompt_shares.0 is -0.1: input should be greater than or equal to 0",
        ),
        ({}, "clustering.prompt_shares is {}; expected at least one entry"),
        ({"0": "much"}, "clustering.prompt_shares.0 is 'much': input should be a valid number"),
    ],
)
def test_shares_that_cannot_be_are_refused_when_a_config_is_loaded(
    changes: Tree, words: str
) -> None:
    with pytest.raises(ConfigError) as told:
        parse_config(tiny_run({"clustering.prompt_shares": changes}))
    assert words in str(told.value)


def test_people_who_are_divided_again_have_no_shares() -> None:
    changes = {"clustering.prompt_shares": {"0": 0.5}, "clustering.recluster_every": 2}
    with pytest.raises(ConfigError, match="people change with recluster_every = 2; expected 0"):
        parse_config(tiny_run(changes))


@pytest.mark.parametrize(
    "clustering",
    [
        {"name": "kmeans", "num_clusters": 3},
        {"name": "gaussian_mixture", "num_clusters": 3, "soft": True},
        {"name": "random", "num_clusters": 4},
        {"name": "column", "column": "persona"},
    ],
    ids=lambda section: section["name"],
)
def test_any_clusters_of_a_run_can_be_drawn(clustering: dict[str, Any]) -> None:
    with Assembly(parse_config(tiny_run({"clustering": clustering}))) as parts:
        last = list(parts.members.about)[-1]
        natural = [str(parts.members.cluster(e.user)) for e in parts.dataset.train].count(last) / 64
    changes = {
        "clustering": {**clustering, "prompt_shares": {last: 0.6}},
        "run.prompts_per_step": 50,
    }
    with Assembly(parse_config(tiny_run(changes))) as parts:
        told = [e for step in range(1, 41) for e in parts.order.examples(step)]
        drawn = [str(parts.members.cluster(e.user)) for e in told].count(last)
    assert natural < 0.5
    assert stats.binomtest(drawn, 2000, 0.6).pvalue > 0.01


def test_a_run_trains_by_shares_and_is_evaluated_as_ever(tmp_path: Path, capsys: Any) -> None:
    plain = train(tmp_path / "plain")
    run = train(tmp_path / "shares", {"clustering.prompt_shares": {"2": 1.0}})
    assert [list(record["clusters"]) for record in lines(run, "metrics.jsonl")] == [["2"]] * 4
    first, expected = (lines(each, "evaluations.jsonl")[0] for each in (run, plain))
    assert first == expected
    assert len(first["clusters"]) == 3
