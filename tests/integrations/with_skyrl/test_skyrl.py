"""SkyRL's own settings, data set, batches, estimator and checkpoints, with pgrpo in them."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from skyrl.train.trainer import RayPPOTrainer
from with_skyrl.real_skyrl import advantages, arguments, computed, give, prepare, trainer

from pgrpo import ConfigError, DataError
from pgrpo.errors import CheckpointError
from pgrpo.integrations.saved import read_histories
from pgrpo.integrations.skyrl import read_settings

REWARDS = [0.5, 1.0, 0.0, 2.5, 7.0, 8.0, 7.0, 6.0, 3.0, 3.0, 3.0, 3.0]
CLUSTERS = ["a", "b", "a"]
ROWS = range(3)


@pytest.mark.parametrize("turns", [1, 3])
@pytest.mark.parametrize("data_parallel", [1, 5])
def test_grpo_through_pgrpo_is_skyrls(tmp_path: Path, turns: int, data_parallel: int) -> None:
    rule = ["pgrpo.estimator=grpo", "pgrpo.ddof=1", "pgrpo.eps=1e-6"]
    steps = [f"generator.step_wise_trajectories={str(turns > 1).lower()}"]
    found: list[Any] = []
    logged: list[dict[str, Any]] = []
    for kind in ({}, {"kind": RayPPOTrainer}):
        made = trainer(tmp_path, *rule, *steps, data_parallel=data_parallel, **kind)
        give(made, CLUSTERS)
        found.append(computed(made, REWARDS, ROWS, turns))
        logged.append(made.all_metrics)
    ours, skyrls = found
    assert ours.metadata["pad_size"] == skyrls.metadata["pad_size"] == -12 * turns % data_parallel
    rows = 12 * turns
    assert skyrls["advantages"][:rows].abs().max() > 1
    for name in ("advantages", "returns"):
        torch.testing.assert_close(ours[name][:rows], skyrls[name][:rows], rtol=1e-5, atol=1e-5)
        assert not ours[name][rows:].any()
    for name, value in logged[1].items():
        assert logged[0][name] == pytest.approx(value, abs=1e-5), name
    for name, value in skyrls.metadata["metrics"].items():
        assert ours.metadata["metrics"][name] == pytest.approx(value, abs=1e-5), name


def test_a_trajectory_counts_once_and_padding_not_at_all(tmp_path: Path) -> None:
    made = trainer(tmp_path, "generator.step_wise_trajectories=true", data_parallel=5)
    give(made, CLUSTERS)
    batch = computed(made, REWARDS, ROWS, turns=3)
    found = made.histories.normalizer.snapshot()
    assert {name: h.count for name, h in found.items()} == {"a": 8, "b": 4}
    assert found["b"].mean == 7.0
    per_turn = advantages(batch)
    assert len(per_turn) == 36 and per_turn[0] == per_turn[1] == per_turn[2] != per_turn[3]


def test_a_step_logs_clusters_and_warns_once(tmp_path: Path, caplog: Any, monkeypatch: Any) -> None:
    made = trainer(tmp_path)
    give(made, CLUSTERS)
    # SkyRL has what Python logs go through a logger of its own, past pytest's.
    monkeypatch.setattr(logging.getLogger("pgrpo.integrations.skyrl"), "handlers", [caplog.handler])
    for _step in range(12):
        batch = computed(made, [1.0] * 12, ROWS)
    assert made.all_metrics["clusters/a/history_count"] == 96
    assert made.all_metrics["clusters/b/reward"] == 1.0
    assert made.all_metrics["loss/avg_raw_advantages"] == 0.0
    assert not batch["advantages"].any()
    told = [record for record in caplog.records if record.name == "pgrpo.integrations.skyrl"]
    assert len({record.getMessage().rpartition(": ")[2] for record in told}) == len(told) > 0


def test_options_stand_among_skyrls_settings(tmp_path: Path) -> None:
    made = trainer(tmp_path, "pgrpo.estimator=auto", "pgrpo.min_count=8", "pgrpo.clip=null")
    options = made.histories.normalizer.options
    assert (options.estimator, options.min_count, options.clip) == ("auto", 8, None)
    # As SkyRL's own entry point hands them on.
    read_settings(arguments(tmp_path, "trainer.override_entrypoint=pgrpo.integrations.skyrl"))
    for more, message in (
        ("pgrpo.min_counts=8", "pgrpo.min_counts is no option; expected cluster_key, estimator"),
        ("pgrpo.eps=-1", "eps is -1"),
        ("pgrpo.reward_weights=[1]", "reward_weights is no option"),
        ("trainer.algorithm.advantage_estimator=rloo", "estimator is rloo; expected grpo"),
    ):
        with pytest.raises(ConfigError, match=message):
            trainer(tmp_path, more)
    with pytest.raises(ValueError, match="Invalid fields"):
        read_settings(arguments(tmp_path, "pgrpos.eps=1"))


def test_a_cluster_is_a_column_or_an_entry_of_one(tmp_path: Path) -> None:
    prepare(tmp_path, [("a", 1.0), ("b", 1.0)])
    made = trainer(tmp_path, "pgrpo.cluster_key=extra_info.user")
    computed(made, REWARDS[:8], [1, 0])
    found = made.histories.normalizer.snapshot()
    assert (found["b"].mean, found["a"].mean) == (1.0, 7.0)
    for key, message in (
        (
            "extra_info.person",
            r"row 0 of the data set has no 'person' there: it is \{'user': 'a'\}",
        ),
        ("cluster_id.user", "has no 'user' there: it is 'a'"),
        ("segment", "has no 'segment' there"),
    ):
        made = trainer(tmp_path, f"pgrpo.cluster_key={key}")
        with pytest.raises(DataError, match=message):
            computed(made, REWARDS[:8], [0, 1])
        assert not made.histories.normalizer.snapshot()


def test_a_resumed_trainer_finds_the_histories_of_its_step(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    give(made, CLUSTERS)
    for step in (1, 2):
        made.global_step = step
        computed(made, REWARDS, ROWS)
        made.save_checkpoints()
    kept = made.histories.normalizer.state_dict()
    folder = tmp_path / "ckpt/global_step_2"
    assert read_histories(folder / "pgrpo").state_dict() == kept
    for mode in (
        ["trainer.resume_mode=latest"],
        ["trainer.resume_mode=from_path", f"trainer.resume_path={folder}"],
    ):
        again = trainer(tmp_path, *mode)
        assert again.load_checkpoints()[0] == 2
        assert again.histories.normalizer.state_dict() == kept
    fresh = trainer(tmp_path, "trainer.resume_mode=none")
    assert fresh.load_checkpoints() == (0, None)
    assert not fresh.histories.normalizer.snapshot()
    shutil.rmtree(folder / "pgrpo")
    with pytest.raises(CheckpointError, match="global_step_2 holds no pgrpo: it was saved without"):
        again.load_checkpoints()
    assert again.histories.normalizer.state_dict() == kept
