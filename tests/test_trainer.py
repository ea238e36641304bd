"""What a run computes and writes, against brute-force recomputation from its own samples."""

from __future__ import annotations

import json
import math
from collections import Counter
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Tree, install_plugin, tiny_run, trace, train, write_config
from reference import Reference

from pgrpo.cli import main
from pgrpo.normalizer import RULES, ClusterNormalizer
from pgrpo.rollout.collector import Collector
from pgrpo.runs.config import parse_config
from pgrpo.runs.display import Display
from pgrpo.runs.folder import RunFolder
from pgrpo.train.build import Assembly
from pgrpo.train.policy import Policy
from pgrpo.train.trainer import Trainer
from pgrpo.types import Group, Rollout

NUM_PROMPTS, GROUP = 4, 3
# Every rollout is written to samples.jsonl.
ALL: Tree = {"run.samples_per_step": NUM_PROMPTS * GROUP, "generation.group_size": GROUP}


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
        }
    info = json.loads((run / "run.json").read_text("utf-8"))
    assert info["status"] == "finished"
    assert sum(cluster["num_users"] for cluster in info["clusters"].values()) > 1


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

    def spy(self: Collector, scored: list[Group]) -> list[Group]:
        groups = normalize(self, scored)
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        rewards = np.concatenate([group.rewards for group in groups])
        advantages = np.concatenate([group.advantages for group in groups])
        seen.append((self, rollouts, rewards, advantages))
        return groups

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
        keys = [0 if history == "one" else r.prompt.cluster_id for r in rollouts]
        groups = [r.group_id for r in rollouts]
        norms = [sum((1 - math.exp(x)) ** 2 for x in r.rollout_logprobs) for r in rollouts]
        lengths = [len(r.completion_ids) for r in rollouts]
        columns = {"score_norms": norms if score_norms else None, "lengths": lengths}
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
    assert given == [{"score_norms": rule.reads_score_norms, "lengths": rule.needs_lengths}]


@pytest.mark.parametrize("order", ["update_then_normalize", "normalize_then_update"])
@pytest.mark.parametrize("history", ["cluster", "shuffled"])
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


def test_the_shuffled_arm_reads_the_histories_of_others(run: Path, tmp_path: Path) -> None:
    estimator = {"name": "pgrpo", "history": "shuffled"}
    config = parse_config(tiny_run({**ALL, "estimator": estimator}))
    folder = RunFolder(tmp_path / "shuffled")
    with folder, Assembly(config) as parts:
        trainer = Trainer(parts, folder, Display("x", 4))
        own, read = parts.members.histories("cluster", 0), trainer.collector._history_of
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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batches: list[Batch], estimator: Tree
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    install_plugin(tmp_path / "site", THREE)
    updated: list[int] = []
    update = Policy.update

    def count(self: Policy, groups: list[Group], *arguments: Any):
        updated.append(sum(len(group.rollouts) for group in groups))
        return update(self, groups, *arguments)

    monkeypatch.setattr(Policy, "update", count)
    rewards = [
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
        has_any = known.any(axis=1)
        total = np.nansum(scores * WEIGHTS, axis=1)
        found = [sample["reward"] for sample in samples]
        assert found == [
            pytest.approx(value) if has else None for value, has in zip(total, has_any, strict=True)
        ]
        assert updated[place] == has_any.sum()
        assert record["num_unrewarded"] == (~has_any).sum()
        groups = np.repeat(np.arange(NUM_PROMPTS), GROUP)
        keys = [collector._history_of[rollout.prompt.example.user] for rollout in rollouts]
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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, estimator: str
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    install_plugin(tmp_path / "site", PICKY)
    updated: list[int] = []
    update = Policy.update

    def count(self: Policy, groups: list[Group], *arguments: Any):
        updated.append(sum(len(group.rollouts) for group in groups))
        return update(self, groups, *arguments)

    monkeypatch.setattr(Policy, "update", count)
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


def test_every_example_comes_once_per_epoch_in_another_order() -> None:
    config = parse_config(tiny_run({"data": {"name": "personas", "num_examples": 64, "words": 2}}))
    with Assembly(config) as parts:
        examples = [id(e) for step in range(1, 33) for e in parts.collector._examples(step)]
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
