"""What a run computes and writes, against brute-force recomputation from its own samples."""

from __future__ import annotations

import json
import math
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from fractions import Fraction
from html import escape
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Tree, grouped, install_plugin, tiny_run, trace, train, write_config
from reference import Reference

from pgrpo.cli import main
from pgrpo.errors import ConfigError, PluginError
from pgrpo.normalizer import RULES, ClusterNormalizer
from pgrpo.rewards.scorer import Scorer
from pgrpo.rollout.collector import Batch as CollectedBatch
from pgrpo.rollout.collector import Collector, Sampled, overlong_penalties
from pgrpo.rollout.seeds import derive_seed
from pgrpo.runs.config import parse_config
from pgrpo.runs.display import Display
from pgrpo.runs.folder import RunFolder
from pgrpo.train.build import Assembly
from pgrpo.train.evaluation import evaluate, held_out
from pgrpo.train.policy import Policy
from pgrpo.train.trainer import Trainer
from pgrpo.types import ClusterId, Example, Group, Prompt, Rollout

Capture = pytest.CaptureFixture[str]

NUM_PROMPTS, GROUP = 4, 3
# Every rollout is written to samples.jsonl.
ALL: Tree = {"run.samples_per_step": NUM_PROMPTS * GROUP, "generation.group_size": GROUP}


@pytest.fixture
def updated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of rollouts of each update that a test makes."""
    sizes: list[int] = []
    update = Policy.update

    def count(self: Policy, groups: list[Group], *arguments: Any) -> Any:
        sizes.append(sum(len(group.rollouts) for group in groups))
        return update(self, groups, *arguments)

    monkeypatch.setattr(Policy, "update", count)
    return sizes


def lines(run: Path, name: str) -> list[Tree]:
    return [json.loads(line) for line in (run / name).read_text("utf-8").splitlines()]


def by_step(run: Path) -> list[list[Tree]]:
    samples = lines(run, "samples.jsonl")
    return [[s for s in samples if s["step"] == step] for step in range(1, samples[-1]["step"] + 1)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("run"), {**ALL, "run.checkpoint_every": 2})


def test_the_same_seed_repeats_bit_by_bit_and_another_does_not(run: Path, tmp_path: Path) -> None:
    changes = {**ALL, "run.checkpoint_every": 4}
    assert trace(train(tmp_path / "same", changes)) == trace(run)
    other = trace(train(tmp_path / "other", {**changes, "run.seed": 1}))
    assert other["metrics"] != trace(run)["metrics"]
    assert other["weights"] != trace(run)["weights"]


def test_the_contract_other_tools_rely_on(run: Path) -> None:
    assert {path.name for path in run.iterdir()} - {
        ".lock",
        "evaluations.jsonl",
        "held_out.jsonl",
    } == {
        "config.toml",
        "run.json",
        "metrics.jsonl",
        "samples.jsonl",
        "checkpoints",
        "report.html",
    }
    records = lines(run, "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    for record in records:
        for key in ("reward", "loss", "grad_norm"):
            assert math.isfinite(record[key])
        assert record["grad_norm"] > 0
        assert record["timing_s"].keys() == {
            "generate", "reward", "wait", "sync", "update", "total",
        }  # fmt: skip
        assert record["timing_s"]["wait"] is None
        parts = [record["timing_s"][key] for key in ("generate", "reward", "sync", "update")]
        assert 0 < sum(parts) <= record["timing_s"]["total"]
        for cluster in record["clusters"].values():
            assert cluster.keys() >= {"reward", "num_rollouts", "count", "mean", "std"}
    for sample in lines(run, "samples.jsonl"):
        assert sample.keys() == {
            "step",
            "prompt",
            "completion",
            "reward",
            "advantage",
            "scores",
            "cluster_id",
            "user",
            "assignment_version",
        }
    info = json.loads((run / "run.json").read_text("utf-8"))
    assert info["status"] == "finished"
    assert sum(cluster["num_users"] for cluster in info["clusters"].values()) > 1
    assert info["seconds"] > sum(record["timing_s"]["total"] for record in records)


def test_seconds_of_all_starts_add_up(tmp_path: Path) -> None:
    run = train(tmp_path, {"run.num_steps": 2})
    first, began = RunFolder(run).info().seconds, time.perf_counter()
    assert main(["train", "--resume", str(run), "--set", "run.num_steps=3"]) == 0
    step = lines(run, "metrics.jsonl")[-1]["timing_s"]["total"]
    second = RunFolder(run).info().seconds - first
    assert 0 < step < second < time.perf_counter() - began


def test_config_toml_reruns_the_run(run: Path, tmp_path: Path) -> None:
    assert main(["train", str(run / "config.toml"), "--out", str(tmp_path / "again")]) == 0
    assert trace(tmp_path / "again") == trace(run)


def check_metrics(run: Path) -> None:
    """Rewards and histories of metrics.jsonl from the raw rewards of all steps so far."""
    seen: dict[str, list[float]] = {}
    for record, samples in zip(lines(run, "metrics.jsonl"), by_step(run), strict=True):
        rewards = [s["reward"] for s in samples if s["reward"] is not None]
        assert record["reward"] == pytest.approx(np.mean(rewards))
        now: dict[str, list[float]] = {}
        for sample in samples:
            if sample["reward"] is not None:
                now.setdefault(str(sample["cluster_id"]), []).append(sample["reward"])
        for cluster, values in now.items():
            seen.setdefault(cluster, []).extend(values)
        assert record["clusters"].keys() == seen.keys()
        for cluster, history in seen.items():
            found = record["clusters"][cluster]
            assert found["count"] == len(history)
            assert found["mean"] == pytest.approx(np.mean(history))
            assert found["std"] == pytest.approx(np.std(history), abs=1e-12)
            assert found["num_rollouts"] == len(now.get(cluster, []))
            expected = np.mean(now[cluster]) if cluster in now else None
            assert found["reward"] == (None if expected is None else pytest.approx(expected))
        means = [float(np.mean(values)) for values in now.values()]
        assert record["fairness"]["worst"] == pytest.approx(min(means))
        assert record["fairness"]["gap"] == pytest.approx(max(means) - min(means))


EPS = 1e-4
Batch = tuple[Collector, list[Rollout], np.ndarray, np.ndarray]


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    """What each step of a run normalises: trainer, rollouts, rewards and advantages."""
    seen: list[Batch] = []
    normalize = Collector._normalize

    def spy(self: Collector, kept: list[Group], replaced: list[Group]) -> list[Group]:
        found = normalize(self, kept, replaced)
        numbers = {group.group_id for group in kept}
        groups = [group for group in found if group.group_id in numbers]
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        rewards = np.concatenate([group.rewards for group in groups])
        advantages = np.concatenate([group.advantages for group in groups])
        seen.append((self, rollouts, rewards, advantages))
        return found

    monkeypatch.setattr(Collector, "_normalize", spy)
    return seen


def expected_advantages(
    estimator: Tree, batches: list[Batch], score_norms: bool = True
) -> list[list[float]]:
    """Of a slow oracle that keeps every reward of the run."""
    options = dict(estimator)
    history = options.pop("history", "cluster")
    oracle = Reference(options.pop("name"), **options)
    result: list[list[float]] = []
    for _, rollouts, rewards, _ in batches:
        clusters = [r.prompt.cluster_id for r in rollouts]
        users = [r.prompt.example.user for r in rollouts]
        keys = {"cluster": clusters, "user": users, "one": [0] * len(users)}[history]
        groups = [r.group_id for r in rollouts]
        norms = [sum((1 - math.exp(x)) ** 2 for x in r.rollout_logprobs) for r in rollouts]
        lengths = [len(r.completion_ids) for r in rollouts]
        columns: Tree = {"score_norms": norms if score_norms else None, "lengths": lengths}
        columns["parents"] = clusters if history == "user" else None
        advantages = oracle(rewards, keys, groups, **columns)
        result.append(advantages.tolist())
    return result


OPTIONS: Tree = {
    "ddof": 1,
    "eps": 0.01,
    "forgetting": 0.7,
    "prior_count": 3.0,
    "sigma_floor": 0.3,
    "min_count": 6.0,
    "clip": 1.5,
    "frequency_weight": 0.5,
}


@pytest.mark.parametrize(
    "estimator",
    [
        *({"name": name} for name in RULES),
        *({"name": name, "history": "one"} for name in ("pgrpo", "two_way", "shrinkage", "auto")),
        *({"name": name, **OPTIONS} for name in ("pgrpo", "two_way", "shrinkage", "auto")),
        *(
            {"name": name, "history": "user", "prior_count": 3.0}
            for name in ("pgrpo", "two_way", "shrinkage", "auto")
        ),
        {"name": "pgrpo", "history": "user"},
        {"name": "pgrpo", "history": "user", **OPTIONS},
        {"name": "pgrpo", "order": "normalize_then_update"},
        {"name": "auto", "order": "normalize_then_update"},
        {"name": "rae", "order": "normalize_then_update"},
        {"name": "grpo", "clip": 0.5, "frequency_weight": 1.0},
        {
            "name": "rloo",
            "order": "normalize_then_update",
            "forgetting": 0.7,
            "frequency_weight": -1.0,
        },
    ],
    ids=lambda estimator: "-".join(map(str, estimator.values())),
)
def test_advantages_are_those_of_the_formulas(
    tmp_path: Path, batches: list[Batch], estimator: Tree
) -> None:
    run = train(tmp_path, {**ALL, "estimator": estimator, "run.eval_every": 0})
    if "forgetting" not in estimator:
        check_metrics(run)
    steps = by_step(run)
    expected = expected_advantages(estimator, batches)
    for samples, values in zip(steps, expected, strict=True):
        found = [sample["advantage"] for sample in samples]
        np.testing.assert_allclose(found, values, rtol=1e-9, atol=1e-9)


def test_auto_is_told_the_norms_of_the_scores(tmp_path: Path, batches: list[Batch]) -> None:
    estimator = {"name": "auto"}
    train(tmp_path, {**ALL, "estimator": estimator})
    found = np.array([advantages for *_, advantages in batches])
    np.testing.assert_allclose(found, expected_advantages(estimator, batches), rtol=1e-9, atol=1e-9)
    without = expected_advantages(estimator, batches, score_norms=False)
    # An untrained policy is nearly uniform, and its scores nearly as long as each other.
    assert np.abs(found - without).max() > 1e-5


@pytest.mark.parametrize("name", RULES)
def test_columns_are_worked_out_for_those_who_read_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    given: list[dict[str, bool]] = []
    call = ClusterNormalizer.__call__

    def spy(self: ClusterNormalizer, *batch: Any, **columns: Any) -> Any:
        given.append({name: column is not None for name, column in columns.items()})
        return call(self, *batch, **columns)

    monkeypatch.setattr(ClusterNormalizer, "__call__", spy)
    train(tmp_path, {"estimator": {"name": name}, "run.num_steps": 1, "run.eval_every": 0})
    rule = RULES[name]
    columns = {"score_norms": rule.reads_score_norms, "lengths": rule.needs_lengths}
    assert given == [columns | {"parents": False}]


@pytest.mark.parametrize("order", ["update_then_normalize", "normalize_then_update"])
@pytest.mark.parametrize("history", ["cluster", "user", "shuffled"])
def test_corollary_3_1_is_of_the_history_that_was_read(
    tmp_path: Path, order: str, history: str
) -> None:
    estimator = {"name": "pgrpo", "order": order, "history": history}
    run = train(tmp_path, {**ALL, "estimator": estimator})
    before: Tree = {}
    for record, samples in zip(lines(run, "metrics.jsonl"), by_step(run), strict=True):
        after = record["clusters"]
        read = before if order == "normalize_then_update" else after
        for cluster, found in after.items():
            groups = np.reshape(
                [s["reward"] for s in samples if str(s["cluster_id"]) == cluster], (-1, GROUP)
            )
            if not len(groups) or cluster not in read:
                assert (found["scale_ratio"], found["bias"]) == (None, None)
                continue
            scale = read[cluster]["std"] + EPS
            assert found["scale_ratio"] == pytest.approx(((groups.std(1) + EPS) / scale).mean())
            bias = (groups.mean() - read[cluster]["mean"]) / scale
            assert found["bias"] == pytest.approx(bias, abs=1e-9)
        before = after


FLAT = """
from pgrpo.plugins import hookimpl

def flat(rollouts):
    return [0.5] * len(rollouts)

@hookimpl
def pgrpo_register_rewards(register):
    register("flat", flat)
"""


def test_warnings_are_shown_once_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    install_plugin(tmp_path / "site", FLAT)
    run = train(tmp_path, {"rewards": [{"name": "flat"}]})
    warnings = json.loads((run / "run.json").read_text("utf-8"))["warnings"]
    (flat,) = (warning for warning in warnings if "the standard deviation is 0" in warning)
    # Four checkpoints, and the set of clusters it is true of grows.
    assert capsys.readouterr().out.count("the standard deviation is 0") == 1
    page = (run / "report.html").read_text("utf-8")
    assert escape(flat[1:]) in page
    assert f"{len(warnings)} warning" in page


def read_by(collector: Collector) -> dict[str, ClusterId]:
    """User -> the one history that its advantages are read from."""
    return {user: key for user, own in collector._histories_of.items() for key in own}


def test_the_shuffled_arm_reads_the_histories_of_others(run: Path, tmp_path: Path) -> None:
    estimator = {"name": "pgrpo", "history": "shuffled"}
    config = parse_config(tiny_run({**ALL, "estimator": estimator}))
    folder = RunFolder(tmp_path / "shuffled")
    with folder, Assembly(config) as parts:
        trainer = Trainer(parts, folder, Display("x", 4))
        own, read = parts.members.histories("cluster", 0), read_by(trainer.collector)
        assert own.keys() == read.keys()
        assert Counter(own.values()) == Counter(read.values()), "clusters of the same sizes"
        assert own != read
        trainer.run()
    # Raw rewards are shown by the real clusters all the same.
    check_metrics(folder.path)
    assert trace(folder.path)["weights"] != trace(run)["weights"]


@pytest.mark.parametrize("estimator", ["pgrpo", "batch", "shrinkage", "auto"])
def test_groups_of_one(tmp_path: Path, estimator: str) -> None:
    changes = {**ALL, "generation.group_size": 1, "run.samples_per_step": NUM_PROMPTS}
    run = train(tmp_path, {**changes, "estimator.name": estimator})
    assert all(record["grad_norm"] > 0 for record in lines(run, "metrics.jsonl"))
    check_metrics(run)


THREE = """
from pgrpo.plugins import hookimpl

def length(rollouts):
    return [100.0 * len(set(r.completion.split())) for r in rollouts]

def picky(rollouts):
    return [None if (r.group_id + i) % 3 == 0 else float(len(r.completion) % 5)
            for i, r in enumerate(rollouts)]

@hookimpl
def pgrpo_register_rewards(register):
    register("length", length)
    register("picky", picky)
"""
NAMES = ["persona", "length", "picky", "picky 2"]
WEIGHTS = [1.0, -0.5, 2.0, 0.25]


@pytest.mark.parametrize(
    "estimator",
    [
        {"name": "pgrpo"},
        {"name": "pgrpo", "order": "normalize_then_update", "min_count": 2.0, "sigma_floor": 0.1},
        {"name": "pgrpo", "history": "shuffled"},
        {"name": "grpo"},
        {"name": "auto"},
        {"name": "rae"},
        {"name": "gdpo_multi"},
    ],
    ids=lambda estimator: "-".join(map(str, estimator.values())),
)
def test_each_of_several_rewards_is_normalised_by_itself(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    updated: list[int],
    batches: list[Batch],
    estimator: Tree,
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    install_plugin(tmp_path / "site", THREE)
    rewards: list[Tree] = [
        {"name": name.split()[0], "weight": weight}
        for name, weight in zip(NAMES, WEIGHTS, strict=True)
    ]
    # Cluster 1 is scored by one reward that is missing at times, and by no other.
    for section in (*rewards[:2], rewards[3]):
        section["clusters"] = [0, 2]
    run = train(
        tmp_path,
        {
            **ALL,
            "rewards": rewards,
            "evaluation": [{"name": "persona"}],
            "estimator": {**estimator, "combine": "normalize_then_sum"},
        },
    )
    options = {key: value for key, value in estimator.items() if key != "history"}
    name = options.pop("name")
    whitens = name == "gdpo_multi"
    oracles = [Reference("grpo" if whitens else name, **options) for _ in NAMES]
    seen: dict[tuple[str, str], list[float]] = {}
    check_metrics(run)
    steps = list(zip(lines(run, "metrics.jsonl"), by_step(run), batches, strict=True))
    for place, (record, samples, (collector, rollouts, _, _)) in enumerate(steps):
        assert all(list(sample["scores"]) == NAMES for sample in samples)
        scores = np.array([list(sample["scores"].values()) for sample in samples], dtype=float)
        known = ~np.isnan(scores)
        clusters = np.array([sample["cluster_id"] for sample in samples])
        assert not known[clusters == 1][:, [0, 1, 3]].any(), "rewards that are not for it"
        assert (~known).any() and known[clusters != 1][:, :2].all()
        has_any: Any = known.any(axis=1)
        total = np.nansum(scores * WEIGHTS, axis=1)
        found = [sample["reward"] for sample in samples]
        assert found == [
            pytest.approx(value) if has else None
            for value, has in zip(total.tolist(), has_any.tolist(), strict=True)
        ]
        assert updated[place] == has_any.sum()
        assert record["num_unrewarded"] == (~has_any).sum()
        groups = np.repeat(np.arange(NUM_PROMPTS), GROUP)
        keys = [read_by(collector)[rollout.prompt.example.user] for rollout in rollouts]
        norms = [sum((1 - math.exp(x)) ** 2 for x in r.rollout_logprobs) for r in rollouts]
        expected = np.zeros(len(samples))
        for at, (name, oracle) in enumerate(zip(NAMES, oracles, strict=True)):
            there = np.flatnonzero(known[:, at])
            expected[there] += WEIGHTS[at] * oracle(
                scores[there, at],
                [keys[i] for i in there],
                groups[there].tolist(),
                score_norms=[norms[i] for i in there],
            )
            mean = pytest.approx(scores[there, at].mean()) if len(there) else None
            assert record["rewards"][name] == {"reward": mean, "num_rollouts": len(there)}
            for i in there:
                seen.setdefault((str(clusters[i]), name), []).append(scores[i, at])
        if whitens:
            part = expected[has_any]
            expected[has_any] = (part - part.mean()) / (part.std() + 1e-4)
        advantages = [sample["advantage"] for sample in samples]
        np.testing.assert_allclose(advantages, expected, rtol=1e-9, atol=1e-9)
        equal = [
            all(len({*scores[groups == g, at][known[groups == g, at]]}) <= 1 for at in range(4))
            for g in range(NUM_PROMPTS)
        ]
        assert record["equal_groups"] == pytest.approx(np.mean(equal))
        for cluster, found in record["clusters"].items():
            own = {name: values for (c, name), values in seen.items() if c == cluster}
            assert found["rewards"].keys() == (own.keys() if "history" not in estimator else set())
            for name, history in found["rewards"].items():
                assert history["count"] == len(own[name])
                assert history["mean"] == pytest.approx(np.mean(own[name]))
                assert history["std"] == pytest.approx(np.std(own[name]), abs=1e-9)
    assert {name for cluster, name in seen if cluster == "1"} == {"picky"}
    page = (run / "report.html").read_text("utf-8")
    if estimator["name"] in ("pgrpo", "auto"):
        assert ("for each reward" if "history" in estimator else "history of each reward") in page
    assert ("then of each alone" in page) == ("history" not in estimator)


def test_a_batch_that_was_not_learned_from_is_kept_with_its_scores(tmp_path: Path) -> None:
    rewards = [{"name": "persona"}, {"name": "persona_utility", "clusters": [0, 2]}]
    config = parse_config(
        tiny_run({**ALL, "rewards": rewards, "estimator.combine": "normalize_then_sum"})
    )
    with Assembly(config) as parts, Assembly(config) as others:
        for assembly in (parts, others):
            assembly.engine.sync(0)
        batch = parts.collector.collect(1)
        kept = json.loads(json.dumps(parts.collector.state_dict(batch)))
        found = others.collector.load_state_dict(kept, 0)
        assert found is not None
        for made in ((batch, found), (parts.collector.collect(2), others.collector.collect(2))):
            assert made[0].of_rewards == made[1].of_rewards and len(made[0].of_rewards) == 2
            assert made[0].after == made[1].after
            for one, other in zip(made[0].groups, made[1].groups, strict=True):
                assert one.rollouts == other.rollouts
                assert list(one.scores) == list(other.scores) == ["persona", "persona_utility"]
                for name, scores in one.scores.items():
                    np.testing.assert_array_equal(scores, other.scores[name])
                np.testing.assert_array_equal(one.rewards, other.rewards)
                np.testing.assert_array_equal(one.advantages, other.advantages)


def test_of_one_history_for_all_rewards_nothing_is_told_of_each(run: Path) -> None:
    for record in lines(run, "metrics.jsonl"):
        assert record["rewards"] == {}
        assert all(cluster["rewards"] == {} for cluster in record["clusters"].values())
    assert all(sample["scores"] == {} for sample in lines(run, "samples.jsonl"))


PICKY = """
from pgrpo.plugins import hookimpl

def picky(rollouts):
    '''Nothing for the first rollout of a group, and for all of the first group.'''
    first = {r.group_id: id(r) for r in reversed(rollouts)}
    return [
        None if r.group_id == rollouts[0].group_id or first[r.group_id] == id(r)
        else float(len(set(r.completion.split())) + r.group_id)
        for r in rollouts
    ]

@hookimpl
def pgrpo_register_rewards(register):
    register("picky", picky)
"""


@pytest.mark.parametrize("estimator", ["pgrpo", "grpo", "auto"])
def test_rollouts_without_a_reward_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, updated: list[int], estimator: str
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    install_plugin(tmp_path / "site", PICKY)
    run = train(
        tmp_path,
        {
            **ALL,
            "rewards": [{"name": "picky", "weight": 2.0, "batch": "step"}],
            "evaluation": [{"name": "persona"}],
            "estimator.name": estimator,
        },
    )
    unrewarded = GROUP + NUM_PROMPTS - 1
    assert updated == [NUM_PROMPTS * GROUP - unrewarded] * 4
    check_metrics(run)
    for record, samples in zip(lines(run, "metrics.jsonl"), by_step(run), strict=True):
        assert record["num_rollouts"] == NUM_PROMPTS * GROUP
        assert record["num_unrewarded"] == unrewarded
        without = [s for s in samples if s["reward"] is None]
        assert len(without) == unrewarded
        assert all(s["advantage"] == 0 for s in without)


def test_the_penalty_of_every_length() -> None:
    """DAPO's equation 13, case by case, in exact numbers."""
    listed = Prompt(Example("", "u"), 0, (5,), ((6,), (7,)))
    free = Prompt(Example("", "u"), 0, (5,))
    for longest, buffer, factor in product(
        (1, 2, 7, 64), (1, 2, 5, 64), (Fraction(1), Fraction(1, 4))
    ):
        settings = {
            "max_new_tokens": longest,
            "overlong_buffer": buffer,
            "overlong_penalty": float(factor),
        }
        if buffer > longest:
            with pytest.raises(ConfigError, match=f"overlong_buffer is {buffer}; expected at most"):
                parse_config(tiny_run({"generation": settings}))
            continue
        generation = parse_config(tiny_run({"generation": settings})).generation
        lengths = range(1, longest + 1)
        expected = [
            Fraction(0)
            if length <= longest - buffer
            else factor * Fraction(length - (longest - buffer), buffer)
            for length in lengths
        ]
        assert expected[-1] == factor
        rollouts = [Rollout(free, 0, (6,) * n, "", (0.0,) * n, n == longest) for n in lengths]
        found = overlong_penalties(rollouts, generation)
        np.testing.assert_allclose(found, [float(value) for value in expected], rtol=1e-15)
        # Choices may be longer than that, and lose nothing.
        chosen = [replace(rollout, prompt=listed) for rollout in rollouts]
        assert not overlong_penalties(chosen, generation).any()


OVERLONG: Tree = {
    "generation.max_new_tokens": 5,
    "generation.overlong_buffer": 3,
    "generation.overlong_penalty": 0.75,
}
LOST = {1: 0.0, 2: 0.0, 3: 0.25, 4: 0.5, 5: 0.75}


@pytest.mark.parametrize("estimator", ["pgrpo", "grpo", "auto"])
def test_penalties_are_in_histories_and_advantages_and_not_in_rewards(
    tmp_path: Path, batches: list[Batch], estimator: str
) -> None:
    changes = {**ALL, **OVERLONG, "estimator.name": estimator}
    run = train(tmp_path, changes)
    shaped = [
        (collector, rollouts, rewards - [LOST[len(r.completion_ids)] for r in rollouts], found)
        for collector, rollouts, rewards, found in batches
    ]
    steps = by_step(run)
    expected = expected_advantages({"name": estimator}, shaped)
    seen: dict[str, list[float]] = {}
    for record, samples, raw, (_, rollouts, values, found), advantages in zip(
        lines(run, "metrics.jsonl"), steps, batches, shaped, expected, strict=True
    ):
        np.testing.assert_allclose(found, advantages, rtol=1e-9, atol=1e-9)
        assert [sample["reward"] for sample in samples] == raw[2].tolist(), (
            "raw as they were scored"
        )
        assert record["reward"] == pytest.approx(raw[2].mean())
        assert record["overlong"] == pytest.approx((raw[2] - values).mean())
        assert record["overlong"] > 0
        parts = values.reshape(-1, GROUP)
        equal = [len(set(part)) == 1 for part in parts.tolist()]
        assert record["equal_groups"] == pytest.approx(np.mean(equal))
        terms: dict[str, list[tuple[float, float]]] = {}
        for part, rollout in zip(parts, rollouts[::GROUP], strict=True):
            cluster = str(rollout.prompt.cluster_id)
            seen.setdefault(cluster, []).extend(part)
            terms.setdefault(cluster, []).append((part.std(), part.mean()))
        for cluster, told in record["clusters"].items():
            assert told["count"] == len(seen[cluster])
            assert told["mean"] == pytest.approx(np.mean(seen[cluster]))
            assert told["std"] == pytest.approx(np.std(seen[cluster]), abs=1e-12)
            if cluster in terms:
                scale = told["std"] + EPS
                ratio = np.mean([(std + EPS) / scale for std, _ in terms[cluster]])
                assert told["scale_ratio"] == pytest.approx(ratio)
                bias = np.mean([(mean - told["mean"]) / scale for _, mean in terms[cluster]])
                assert told["bias"] == pytest.approx(bias, abs=1e-9)
    # Evaluations know of no penalty: with a policy that stands still it changes none of them.
    still = {**changes, "optimizer.learning_rate": 1e-30}
    runs = [train(tmp_path / "with", still)]
    runs += [
        train(
            tmp_path / "without",
            {**still, "generation": {"group_size": GROUP, "max_new_tokens": 5}},
        )
    ]
    one, other = (lines(run, "evaluations.jsonl") for run in runs)
    assert one == other
    assert all(record["overlong"] is None for record in lines(runs[1], "metrics.jsonl"))


# Groups without signal.

WITHIN = [name for name, rule in RULES.items() if rule.zero_alone]
VALUES = (0.0, 1.0, 0.3, -0.5)


def signal(rule: str, rewards: Sequence[float], lengths: Sequence[int]) -> bool:
    """Whether exact arithmetic gives any of a group an advantage."""
    found = Reference(rule)(rewards, [0] * len(rewards), [0] * len(rewards), lengths=lengths)
    return bool(found.any())


@pytest.mark.parametrize("name", WITHIN)
def test_groups_have_a_signal_where_their_rule_says_so(name: str) -> None:
    config = parse_config(tiny_run({"estimator.name": name}))
    with Assembly(config) as parts:
        prompt = parts.builder.build(parts.dataset.train[0])
        lengths = (2, 1, 3)
        rollouts = [Rollout(prompt, 0, (6,) * n, "", (-1.0,) * n, False) for n in lengths]
        for rewards in product(VALUES, repeat=3):
            (group,) = grouped(rollouts, rewards=rewards)
            found = parts.collector._has_signal(group)
            assert found == signal(name, rewards, lengths)
            if name == "max_rl":
                assert found == (len(set(rewards)) > 1 and sum(rewards) > 0)
            else:
                assert found == (len(set(rewards)) > 1)
        for rewards, expected in (
            ((math.nan, 0.3, 0.3), False),
            ((math.nan, math.nan, 0.3), False),
            ((math.nan, math.nan, math.nan), False),
            ((math.nan, 0.3, 1.0), True),
        ):
            (group,) = grouped(rollouts, rewards=rewards)
            assert parts.collector._has_signal(group) == expected
        # What the penalty makes of them is what counts.
        (group,) = grouped(rollouts, rewards=(1.0, 1.0, 1.0))
        assert parts.collector._has_signal(replace(group, penalties=np.array([0.0, 0.0, 0.5])))


@pytest.mark.parametrize("name", RULES)
def test_equal_rewards_have_a_signal_under_the_other_rules_alone(name: str) -> None:
    """Of one cluster, in a step with other groups and after another one."""
    normalizer, lengths = ClusterNormalizer(name), [1, 2, 3, 1, 2, 3]
    groups = [0, 0, 0, 1, 1, 1]
    normalizer([0.1, 0.7, 0.2, 0.4, 0.9, 0.5], [0] * 6, groups, lengths=lengths)
    found = normalizer([0.6, 0.6, 0.6, 0.0, 1.0, 0.2], [0] * 6, groups, lengths=lengths)
    assert (np.abs(found[:3]).max() < 1e-9) == RULES[name].zero_alone
    if not RULES[name].zero_alone:
        with pytest.raises(ConfigError, match=f"run.resample has no effect under .* {name!r}"):
            parse_config(tiny_run({"estimator.name": name, "run.resample": 1}))


def test_rewards_that_cancel_out_have_a_signal_where_each_is_normalised() -> None:
    rewards = [{"name": "persona"}, {"name": "persona_utility", "weight": -0.5}]
    for combine in ("sum_then_normalize", "normalize_then_sum"):
        changes = {"rewards": rewards, "estimator": {"name": "grpo", "combine": combine}}
        with Assembly(parse_config(tiny_run({**changes, "run.resample": 1}))) as parts:
            parts.engine.sync(0)
            group = parts.collector.collect(1).groups[0]
            one, same = np.arange(len(group.rollouts), dtype=float), np.zeros(len(group.rollouts))
            for scores, signal in ((one, combine == "normalize_then_sum"), (same, False)):
                scored = replace(
                    group, rewards=same, scores={"persona": scores, "persona_utility": 2 * scores}
                )
                found = parts.collector._has_signal(scored)  # pyright: ignore[reportPrivateUsage]
                assert found == signal


IDLE = """
import zlib
from pgrpo.plugins import hookimpl

def idle(rollouts):
    '''Equal rewards for two prompts of three, and else others for each rollout of a group.'''
    kind = zlib.crc32(rollouts[0].prompt.example.text.encode()) % 3
    return [0.25 + kind if kind else place / 7 + rollouts[0].group_id for place in range(len(rollouts))]

@hookimpl
def pgrpo_register_rewards(register):
    register("idle", idle)
"""


def is_idle(example: Example) -> bool:
    return zlib.crc32(example.text.encode()) % 3 > 0


@pytest.mark.parametrize(
    ("estimator", "resample"),
    [
        *(({"name": name}, 2) for name in WITHIN),
        ({"name": "two_way", "order": "normalize_then_update"}, 1),
        ({"name": "two_way", "history": "one"}, 1),
        ({"name": "grpo", "frequency_weight": 0.5}, 1),
        ({"name": "grpo"}, 40),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else str(value),
)
def test_groups_without_signal_give_their_places_to_others(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    batches: list[Batch],
    estimator: Tree,
    resample: int,
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    install_plugin(tmp_path / "site", IDLE)
    collected: list[CollectedBatch] = []
    learned: list[list[int]] = []
    fold_all, update = Collector.fold, Policy.update

    def watched(self: Collector, sampled: Sampled) -> CollectedBatch:
        collected.append(fold_all(self, sampled))
        return collected[-1]

    def counted(self: Policy, groups: list[Group], *arguments: Any) -> Any:
        learned.append([group.group_id for group in groups])
        return update(self, groups, *arguments)

    monkeypatch.setattr(Collector, "fold", watched)
    monkeypatch.setattr(Policy, "update", counted)
    changes = {
        "run.samples_per_step": 10_000,
        "run.resample": resample,
        "run.eval_every": 0,
        "rewards": [{"name": "idle"}],
        "estimator": estimator,
        "generation.group_size": GROUP,
    }
    run = train(tmp_path, changes)
    # Rewards, histories and all means are of all rollouts, each once.
    check_metrics(run)

    with Assembly(parse_config(tiny_run({"run.num_steps": 4}))) as parts:
        own = {step: parts.order.examples(step) for step in range(1, 5)}
        train_examples = list(parts.dataset.train)
    assert len(collected) == 4
    for batch, told, record in zip(collected, learned, lines(run, "metrics.jsonl"), strict=True):
        # The whole process once more, from the seeds and the prompts.
        step = batch.step
        shuffled = np.random.default_rng(derive_seed(0, "resample", step)).permutation(64).tolist()
        examples, kept, replaced = list(own[step]), set(range(NUM_PROMPTS)), set[int]()
        others = (train_examples[n] for n in shuffled if train_examples[n] not in own[step])
        for _ in range(resample):
            idle = {number for number in kept if is_idle(examples[number])}
            if not idle:
                break
            replaced |= idle
            kept -= idle
            for _ in idle:
                kept.add(len(examples))
                examples.append(next(others))
        assert [group.group_id for group in batch.groups] == list(range(len(examples)))
        assert [group.prompt.example for group in batch.groups] == examples
        assert set(batch.replaced) == replaced
        assert told == sorted(kept), "a step keeps its size"
        assert len(kept) == NUM_PROMPTS
        if resample > 10:
            assert not any(is_idle(examples[number]) for number in kept)
        assert record["num_replaced"] == len(replaced)
        assert record["num_rollouts"] == GROUP * len(examples)
        assert record["equal_groups"] == pytest.approx(np.mean([is_idle(e) for e in examples]))
        for group in batch.groups:
            assert {rollout.group_id for rollout in group.rollouts} == {group.group_id}
            if group.group_id in replaced:
                assert not group.advantages.any()
    assert sum(record["num_replaced"] for record in lines(run, "metrics.jsonl")) > 4

    # Advantages are those of the groups that are left; histories know the others, too.
    options = dict(estimator)
    history = options.pop("history", "cluster")
    oracle = Reference(options.pop("name"), **options)

    def fold(groups: list[Group]) -> None:
        for group in groups:
            key = 0 if history == "one" else group.prompt.cluster_id
            oracle.update(group.rewards, [key] * GROUP, [group.group_id] * GROUP)

    for batch, (_, rollouts, rewards, found) in zip(collected, batches, strict=True):
        others = [group for group in batch.groups if group.group_id in batch.replaced]
        before = estimator.get("order") == "normalize_then_update"
        if not before:
            fold(others)
        keys = [0 if history == "one" else r.prompt.cluster_id for r in rollouts]
        lengths = [len(r.completion_ids) for r in rollouts]
        expected = oracle(rewards, keys, [r.group_id for r in rollouts], lengths=lengths)
        if before:
            fold(others)
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


def test_the_prompts_that_replace_others() -> None:
    for size in (4, 63, 64, 100):
        changes = {"run.prompts_per_step": size, "estimator.name": "grpo"}
        with Assembly(parse_config(tiny_run(changes))) as parts:
            own = {example.text for example in parts.order.examples(3)}
            others = [example.text for example in parts.order.others(3, 150)]
            assert others[:50] == [example.text for example in parts.order.others(3, 50)]
            assert others != [example.text for example in parts.order.others(4, 150)]
            everything = {example.text for example in parts.dataset.train}
        # Some that the step does not have, if there are any, each as often as the others.
        expected = everything - own or everything
        assert set(others) == expected
        counts = Counter(others).values()
        assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("resample", [0, 2])
def test_a_batch_that_waits_survives_a_checkpoint(resample: int) -> None:
    changes = {**ALL, **OVERLONG, "run.resample": resample, "estimator.name": "grpo"}
    config = parse_config(tiny_run(changes))
    with Assembly(config) as parts:
        parts.engine.sync(0)
        first = parts.collector.collect(1)
        state = json.loads(json.dumps(parts.collector.state_dict(first)))
        second = parts.collector.collect(2)
    assert bool(first.replaced) == bool(resample)
    with Assembly(config) as parts:
        parts.engine.sync(0)
        restored = parts.collector.load_state_dict(state, 0)
        assert restored is not None and parts.collector.num_folded == 1
        again = parts.collector.collect(2)
    for one, other in ((first, restored), (second, again)):
        assert (one.step, one.before, one.after) == (other.step, other.before, other.after)
        assert one.replaced == other.replaced
        for groups in ((one.groups, other.groups), (one.rewarded(), other.rewarded())):
            for a, b in zip(*groups, strict=True):
                assert a.rollouts == b.rollouts
                for found, expected in zip(
                    (a.rewards, a.advantages, a.shaped),
                    (b.rewards, b.advantages, b.shaped),
                    strict=True,
                ):
                    np.testing.assert_array_equal(found, expected)


NOTHING = """
from pgrpo.plugins import hookimpl

seen = []

def nothing(rollouts):
    seen.append(rollouts[0].group_id)
    return [None] * len(rollouts)

@hookimpl
def pgrpo_register_rewards(register):
    register("nothing", nothing)
"""


def test_a_step_without_any_reward_asks_as_often_as_it_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    install_plugin(tmp_path / "site", NOTHING)
    changes = {"rewards": [{"name": "nothing"}], "estimator.name": "grpo", "run.resample": 3}
    with Assembly(parse_config(tiny_run(changes))) as parts:
        parts.engine.sync(0)
        with pytest.raises(PluginError, match="no rollout of step 1 got a reward"):
            parts.collector.collect(1)
        assert not parts.collector.histories.snapshot()
        assert parts.collector.num_folded == 0
    # Rewards, too, see each number once.
    import my_plugin  # pyright: ignore[reportMissingImports]

    assert sorted(my_plugin.seen) == list(range(4 * NUM_PROMPTS))


GAPS = """
from pgrpo.plugins import hookimpl

def gaps(rollouts):
    '''Nothing for the first group, and for the first of several rollouts of another.'''
    groups = {}
    for rollout in rollouts:
        groups.setdefault(rollout.group_id, []).append(rollout)
    return [
        None if r.group_id == 0 or r is groups[r.group_id][0] and len(groups[r.group_id]) > 1
        else sum(map(ord, r.completion)) % 7
        for r in rollouts
    ]

@hookimpl
def pgrpo_register_rewards(register):
    register("gaps", gaps)
"""


class Recording:
    """A run's own scorer, with what it scored."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self.scored: list[Group] = []

    def score(self, groups: Iterable[Group]) -> list[Group]:
        self.scored += (scored := self._scorer.score(groups))
        return scored


@pytest.mark.parametrize("samples", [0, 1, 3])
def test_an_evaluation_is_of_means_over_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, samples: int
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    install_plugin(tmp_path / "site", GAPS)
    reward = {"name": "gaps", "batch": "step"}
    # Several calls of the engine, in each of which the first prompt gets no reward.
    changes = {
        "evaluation": [reward],
        "run.eval_samples": samples,
        "optimizer.token_budget": 40 * max(1, samples),
    }
    config = parse_config(tiny_run(changes))
    with Assembly(config) as parts:
        parts.engine.sync(0)
        prompts = [parts.builder.build(example) for example in held_out(parts.dataset, 30)]
        scorer: Any = Recording(parts.held_out_scorer)
        record, shown = evaluate(7, parts.engine, prompts, scorer, config)
        again, _ = evaluate(7, parts.engine, prompts, parts.held_out_scorer, config)
    assert again == record
    assert [group.prompt for group in scorer.scored] == prompts
    values: dict[str, list[list[float]]] = {}
    for group in scorer.scored:
        assert len(group.rollouts) == max(1, samples)
        rewards = [r for r in group.rewards.tolist() if not math.isnan(r)]
        if rewards:
            values.setdefault(str(group.prompt.cluster_id), []).append(rewards)
    if samples > 1:
        completions = [{r.completion for r in group.rollouts} for group in scorer.scored]
        assert max(map(len, completions)) == samples, "they are sampled"
        assert min(len(r) for own in values.values() for r in own) == samples - 1
    assert record.step == 7
    assert record.num_samples == samples
    for found, expected in [
        (record, [rewards for own in values.values() for rewards in own]),
        *((found, values.get(name, [])) for name, found in record.clusters.items()),
    ]:
        assert found.num_prompts == len(expected)
        if not expected:
            assert (found.reward, found.std, found.best) == (None, None, None)
            continue
        means = [sum(rewards) / len(rewards) for rewards in expected]
        mean = sum(means) / len(means)
        assert found.reward == pytest.approx(mean)
        assert found.std == pytest.approx(
            math.sqrt(sum((m - mean) ** 2 for m in means) / len(means)), abs=1e-12
        )
        best = sum(map(max, expected)) / len(expected) if samples else None
        assert found.best == (None if best is None else pytest.approx(best))
    texts = {group.rollouts[0].prompt.example.text: group for group in scorer.scored}
    for sample in shown:
        assert sample.completion == texts[sample.prompt].rollouts[0].completion


def test_every_evaluation_samples_from_the_same_seeds(tmp_path: Path, capsys: Capture) -> None:
    """A policy that does not move gets the same completions every time."""
    changes = {"run.eval_samples": 5, "optimizer.learning_rate": 1e-30}
    run = train(tmp_path, changes)
    first, *others = lines(run, "evaluations.jsonl")
    assert others
    assert all({**record, "step": 0} == first for record in others)
    assert first["best"] > first["reward"]
    said = [{**sample, "step": 0} for sample in lines(run, "held_out.jsonl")]
    assert said == said[:8] * (1 + len(others))
    capsys.readouterr()
    assert main(["evaluate", str(run), "--prompts", "8", "--json"]) == 0
    [result] = json.loads(capsys.readouterr().out)
    assert {**first, "step": 4} == {key: result[key] for key in first}
    assert result["standard_error"] == pytest.approx(first["std"] / 8**0.5)
    assert main(["evaluate", str(run), "--prompts", "8"]) == 0
    said = f"8 prompts, 5 samples each: best of them {first['best']:.3f}\n"
    assert said in capsys.readouterr().out
    assert "Mean of 5 samples each on 8 held-out prompts" in (run / "report.html").read_text()
    other = lines(train(tmp_path / "other", {**changes, "run.seed": 1}), "evaluations.jsonl")
    assert other[0]["reward"] != first["reward"]


def test_every_example_comes_once_per_epoch_in_another_order() -> None:
    config = parse_config(tiny_run({"data": {"name": "personas", "num_examples": 64, "words": 2}}))
    with Assembly(config) as parts:
        examples = [id(e) for step in range(1, 33) for e in parts.order.examples(step)]
        everything = {id(example) for example in parts.dataset.train}
    first, second = examples[:64], examples[64:]
    assert set(first) == set(second) == everything
    assert first != second


def test_accumulation_changes_the_passes_and_not_the_gradient(run: Path, tmp_path: Path) -> None:
    split = train(tmp_path, {**ALL, "optimizer.token_budget": 12})
    for a, b in zip(lines(run, "metrics.jsonl"), lines(split, "metrics.jsonl"), strict=True):
        assert a["reward"] == pytest.approx(b["reward"], abs=1e-6)
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


@pytest.mark.parametrize(
    "loss",
    [
        {"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4, "aggregation": "grpo"},
        {"clipping": "cispo", "clip_low": 1.0, "entropy_coef": 0.01},
        {"mask_truncated": True, "kl_coef": 0.1},
    ],
    ids=["gspo", "cispo", "masked"],
)
def test_runs_with_other_losses(tmp_path: Path, loss: Tree) -> None:
    changes = {**ALL, "loss": loss, "generation.max_new_tokens": 60, "optimizer.minibatches": 2}
    runs = [
        train(tmp_path / str(budget), {**changes, "optimizer.token_budget": budget})
        for budget in (10**6, 12)
    ]
    for a, b in zip(*(lines(run, "metrics.jsonl") for run in runs), strict=True):
        for name in ("loss", "grad_norm", "clipped"):
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5)
        assert 0 < a["truncated"] < 1
        if "entropy_coef" in loss:
            assert a["exact_entropy"] == pytest.approx(b["exact_entropy"], rel=1e-4)
            # Single tokens estimate the same.
            assert a["exact_entropy"] == pytest.approx(a["entropy"], rel=0.3)
        else:
            assert a["exact_entropy"] is None


def test_a_judge_that_shifts_is_learned_from_and_not_evaluated_by(tmp_path: Path) -> None:
    """A policy that does not move shows what became of its rewards, and nothing else."""
    still = {"optimizer.learning_rate": 1e-30, "estimator": {"name": "pgrpo", "forgetting": 0.5}}
    steady = train(tmp_path / "steady", still)
    shift = {"after": 2, "scale": 10.0, "offset": -2.0}
    run = train(tmp_path / "shifts", {**still, "rewards": [{"name": "persona", "shift": shift}]})
    for a, b in zip(lines(run, "metrics.jsonl"), lines(steady, "metrics.jsonl"), strict=True):
        expected = 10 * b["reward"] - 2 if b["step"] > 2 else b["reward"]
        assert a["reward"] == pytest.approx(expected, rel=1e-12)
    assert lines(run, "evaluations.jsonl") == lines(steady, "evaluations.jsonl")
    assert lines(run, "held_out.jsonl") == lines(steady, "held_out.jsonl")


def test_learning_happens(tmp_path: Path) -> None:
    """One persona's reward rises, well beyond noise, within a few seconds."""
    changes = {
        "run": {"num_steps": 60, "prompts_per_step": 16, "num_threads": 1, "trackers": []},
        "rewards": [{"name": "persona_utility"}],
        "generation.group_size": 4,
        "optimizer.learning_rate": 1e-2,
    }
    rewards = [r["reward"] for r in lines(train(tmp_path, changes), "metrics.jsonl")]
    assert np.mean(rewards[-10:]) > np.mean(rewards[:10]) + 0.15


def test_the_run_is_written_only_once_everything_is_loaded(tmp_path: Path) -> None:
    config = write_config(tmp_path, {"clustering.num_clusters": 500})
    assert main(["train", str(config), "--out", str(tmp_path / "run")]) == 2
    assert not (tmp_path / "run").exists()
    # A folder that was there before stays.
    (tmp_path / "run").mkdir()
    assert main(["train", str(config), "--out", str(tmp_path / "run")]) == 2
    assert (tmp_path / "run").exists()
