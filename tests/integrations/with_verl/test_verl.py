"""verl's own registry, config, queue and trainer class, with pgrpo in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from real_verl import put, taken, trainer
from verl import DataProto
from verl.trainer.ppo.ray_trainer import compute_advantage

from pgrpo import ClusterNormalizer, ConfigError, DataError
from pgrpo.integrations.saved import read_histories

SIZE = 4
REWARDS = [0.5, 1.0, 0.0, 2.5, 7.0, 8.0, 7.0, 6.0]
CLUSTERS = ["a"] * 4 + ["b"] * 4


@pytest.mark.parametrize("turns", [1, 3])
def test_grpo_through_pgrpo_is_verls_grpo(tmp_path: Path, turns: int) -> None:
    ours = trainer(tmp_path, None, "+algorithm.pgrpo={estimator: grpo, ddof: 1, eps: 1e-6}")
    verls = trainer(tmp_path, None, "algorithm.adv_estimator=grpo", "trainer.v1.trainer_mode=sync")
    batch = put([*REWARDS, 3.0, 3.0, 3.0, 3.0], [*CLUSTERS, *"abcd"], SIZE, turns, multiple=40)
    found: list[torch.Tensor] = []
    for each in (ours, verls):
        each._compute_advantage(batch, {})
        found.append(torch.cat([torch.tensor(row) for row in taken(batch, clear=each is verls)]))
    assert len(found[0]) >= 36 and found[1].abs().max() > 1
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_every_token_of_a_response_gets_its_advantage(tmp_path: Path) -> None:
    ours = trainer(tmp_path)
    batch = put(REWARDS, CLUSTERS, SIZE)
    metrics: dict[str, Any] = {}
    ours._compute_advantage(batch, metrics)
    expected = ClusterNormalizer("pgrpo")(REWARDS, CLUSTERS)
    for row, advantage in zip(taken(batch), expected, strict=True):
        np.testing.assert_allclose(row, advantage, rtol=1e-6)
    assert metrics["clusters/a/history_count"] == 4
    assert metrics["clusters/b/reward"] == 7.0
    assert metrics["clusters/a/advantage"] == pytest.approx(0, abs=1e-6)


def test_a_session_counts_once_and_padding_not_at_all(tmp_path: Path) -> None:
    ours = trainer(tmp_path)
    batch = put(REWARDS, CLUSTERS, SIZE, turns=3, multiple=28)
    assert sum(tag.get("is_padding", False) for tag in batch.tags) == 4
    # As verl does to balance its workers.
    batch.reorder(np.random.default_rng(0).permutation(len(batch.keys)).tolist())
    ours._compute_advantage(batch, {})
    expected = ClusterNormalizer("pgrpo")(REWARDS, CLUSTERS)
    assert ours.histories.normalizer.snapshot()["a"].count == 4
    uids = list(dict.fromkeys(key.split("_")[0] for key in sorted(batch.keys) if key[:3] != "pad"))
    assert len(uids) == 2
    found = sorted(
        {
            round(row[0], 5)
            for key, row in zip(batch.keys, taken(batch), strict=True)
            if key[:3] != "pad"
        }
    )
    assert found == sorted({round(x, 5) for x in expected})


def test_options_stand_in_verls_own_config(tmp_path: Path) -> None:
    def read(*overrides: str) -> Any:
        made = trainer(tmp_path, None, *overrides)
        return made.histories, made._cluster_key

    adapter, key = read("+algorithm.pgrpo={estimator: auto, min_count: 8, cluster_key: segment}")
    assert adapter.normalizer.options.estimator == "auto"
    assert adapter.normalizer.options.min_count == 8
    assert key == "segment"
    with pytest.raises(ConfigError, match=r"algorithm.pgrpo.min_counts is no option; expected"):
        read("+algorithm.pgrpo.min_counts=8")
    with pytest.raises(ConfigError, match="eps is -1"):
        read("+algorithm.pgrpo.eps=-1")
    with pytest.raises(ConfigError, match="reward_weights is no option"):
        read("+algorithm.pgrpo.reward_weights=[1]")
    with pytest.raises(
        ConfigError, match="pgrpo_sync, and algorithm.adv_estimator is grpo; expected"
    ):
        read("algorithm.adv_estimator=grpo")


def test_responses_without_clusters_are_refused(tmp_path: Path) -> None:
    ours = trainer(tmp_path)
    with pytest.raises(DataError, match="no field 'cluster_id'"):
        ours._compute_advantage(put(REWARDS, None, SIZE), {})
    assert not ours.histories.normalizer.snapshot()


def test_a_cluster_may_be_an_entry_of_a_column(tmp_path: Path) -> None:
    ours = trainer(tmp_path, None, "+algorithm.pgrpo.cluster_key=extra_info.user")
    ours._compute_advantage(put(REWARDS, CLUSTERS, SIZE, multiple=12), {})
    assert {name: h.count for name, h in ours.histories.normalizer.snapshot().items()} == {
        "a": 4,
        "b": 4,
    }
    for key, message in (
        ("extra_info.person", r"'extra_info' has no 'person': it is \{'index': 0"),
        ("extra_info.user.name", "'extra_info' has no 'name': it is 'a'"),
        ("extra.user", "no field 'extra'"),
    ):
        other = trainer(tmp_path, None, f"+algorithm.pgrpo.cluster_key={key}")
        with pytest.raises(DataError, match=message):
            other._compute_advantage(put(REWARDS, CLUSTERS, SIZE), {})
        assert not other.histories.normalizer.snapshot()


def test_another_trainer_is_told_what_is_missing() -> None:
    """The step that verl's older trainer and its asynchronous ones take."""
    ones = torch.ones(2, 1)
    batch = DataProto.from_dict(
        {"token_level_rewards": ones, "response_mask": ones}, {"uid": np.array(["a", "a"])}
    )
    with pytest.raises(ConfigError, match="trainer.v1.trainer_mode=pgrpo_sync"):
        compute_advantage(batch, adv_estimator="pgrpo")  # type: ignore[arg-type]


def test_a_resumed_trainer_finds_the_histories_of_its_step(tmp_path: Path) -> None:
    first = trainer(tmp_path)
    for step in (1, 2):
        first.global_steps = step
        first._compute_advantage(put(REWARDS, CLUSTERS, SIZE), {})
        first._save_checkpoint()
    kept = first.histories.normalizer.state_dict()
    assert read_histories(tmp_path).state_dict() == kept
    for mode in (
        ["trainer.resume_mode=auto"],
        [
            "trainer.resume_mode=resume_path",
            f"trainer.resume_from_path={tmp_path}/global_step_2",
        ],
    ):
        again = trainer(tmp_path, None, *mode)
        again._load_checkpoint()
        assert again.global_steps == 2
        assert again.histories.normalizer.state_dict() == kept
        # verl goes on with the next batch: nothing of it has been counted.
        again._compute_advantage(put(REWARDS, CLUSTERS, SIZE), {})
        assert again.histories.normalizer.snapshot()["a"].count == 12
    fresh = trainer(tmp_path, None, "trainer.resume_mode=disable")
    fresh._load_checkpoint()
    assert not fresh.histories.normalizer.snapshot()
