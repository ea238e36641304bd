"""What a run computes and writes, against brute-force recomputation from its own samples."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import Tree, install_plugin, tiny_run, trace, train, write_config

from pgrpo.cli import main
from pgrpo.config import parse_config
from pgrpo.display import Display
from pgrpo.policy import Policy
from pgrpo.run_folder import RunFolder
from pgrpo.trainer import Trainer

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
    assert {path.name for path in run.iterdir()} - {".lock", "evaluations.jsonl"} == {
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
        assert record["timing_s"].keys() == {"generate", "reward", "update", "total"}
        parts = [record["timing_s"][key] for key in ("generate", "reward", "update")]
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


def expected_advantages(estimator: Tree, steps: list[list[Tree]]) -> list[list[float]]:
    """Straight from the formulas of the estimators, group by group and step by step."""
    seen: dict[object, list[float]] = {}
    result: list[list[float]] = []
    for samples in steps:
        rewards = np.array([s["reward"] for s in samples])
        groups = rewards.reshape(NUM_PROMPTS, -1)
        mean, std = groups.mean(1, keepdims=True), groups.std(1, keepdims=True)
        match estimator["name"]:
            case "grpo":
                values = (groups - mean) / (std + EPS)
            case "dr_grpo":
                values = groups - mean
            case "rloo":
                others = groups.sum(1, keepdims=True) - groups
                values = groups - others / (groups.shape[1] - 1)
            case "batch":
                values = (rewards - rewards.mean()) / (rewards.std() + EPS)
            case _:
                one = estimator.get("history") == "one"
                keys = [0 if one else s["cluster_id"] for s in samples]
                for key, reward in zip(keys, rewards, strict=True):
                    seen.setdefault(key, []).append(float(reward))
                values = np.array(
                    [
                        (reward - np.mean(seen[key])) / (np.std(seen[key]) + EPS)
                        for key, reward in zip(keys, rewards, strict=True)
                    ]
                )
        result.append(np.ravel(values).tolist())
    return result


@pytest.mark.parametrize(
    "estimator",
    [
        {"name": "pgrpo"},
        {"name": "pgrpo", "history": "one"},
        {"name": "grpo"},
        {"name": "dr_grpo"},
        {"name": "rloo"},
        {"name": "batch"},
    ],
    ids=lambda estimator: "-".join(estimator.values()),
)
def test_advantages_are_those_of_the_formulas(tmp_path: Path, estimator: Tree) -> None:
    run = train(tmp_path, {**ALL, "estimator": estimator})
    check_metrics(run)
    steps = by_step(run)
    expected = expected_advantages(estimator, steps)
    for samples, values in zip(steps, expected, strict=True):
        found = [sample["advantage"] for sample in samples]
        np.testing.assert_allclose(found, values, rtol=1e-9, atol=1e-9)


def test_the_shuffled_arm_reads_the_histories_of_others(run: Path, tmp_path: Path) -> None:
    estimator = {"name": "pgrpo", "history": "shuffled"}
    config = parse_config(tiny_run({**ALL, "estimator": estimator}))
    folder = RunFolder(tmp_path / "shuffled")
    with folder:
        trainer = Trainer(config, folder, Display("x", 4))
        own, read = trainer.clusters, trainer.history_of
        assert own.keys() == read.keys()
        assert Counter(own.values()) == Counter(read.values()), "clusters of the same sizes"
        assert own != read
        trainer.run()
    # Raw rewards are shown by the real clusters all the same.
    check_metrics(folder.path)
    assert trace(folder.path)["weights"] != trace(run)["weights"]


@pytest.mark.parametrize("estimator", ["pgrpo", "batch"])
def test_groups_of_one(tmp_path: Path, estimator: str) -> None:
    changes = {**ALL, "generation.group_size": 1, "run.samples_per_step": NUM_PROMPTS}
    run = train(tmp_path, {**changes, "estimator.name": estimator})
    assert all(record["grad_norm"] > 0 for record in lines(run, "metrics.jsonl"))
    check_metrics(run)


PICKY = """
from pgrpo.hookspecs import hookimpl

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


@pytest.mark.parametrize("estimator", ["pgrpo", "grpo"])
def test_rollouts_without_a_reward_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, estimator: str
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    install_plugin(tmp_path / "site", PICKY)
    updated: list[int] = []
    update = Policy.update

    def count(self: Policy, rollouts: list, *arguments: object):
        updated.append(len(rollouts))
        return update(self, rollouts, *arguments)

    monkeypatch.setattr(Policy, "update", count)
    run = train(
        tmp_path,
        {
            **ALL,
            "rewards": [{"name": "picky", "weight": 2.0}],
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


def test_every_example_comes_once_per_epoch_in_another_order(tmp_path: Path) -> None:
    config = parse_config(tiny_run({"data": {"name": "personas", "num_examples": 64, "words": 2}}))
    with RunFolder(tmp_path / "run") as folder:
        trainer = Trainer(config, folder, Display("x", 4))
        examples = [id(e) for step in range(1, 33) for e in trainer._examples(step)]
    everything = {id(example) for example in trainer.dataset.train}
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
        "run": {"num_steps": 60, "prompts_per_step": 16, "num_threads": 1, "tensorboard": False},
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
