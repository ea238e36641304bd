"""ART's own backend, groups, tokenization and packing, with pgrpo in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from art.local import LocalBackend
from art.megatron import MegatronBackend
from real_art import Loop, groups

from pgrpo import ClusterNormalizer, ConfigError, DataError
from pgrpo.errors import CheckpointError
from pgrpo.integrations.adapter import HISTORIES
from pgrpo.integrations.art import personalize
from pgrpo.integrations.saved import read_histories

REWARDS = [0.5, 1.0, 0.0, 2.5, 7.0, 8.0, 7.0, 6.0, 3.0, 3.0, 3.0, 3.0]
CLUSTERS = [*"aaaabbbbcccc"]


def made(folder: Path, normalizer: ClusterNormalizer | None = None, **settings: Any) -> Loop:
    normalizer = normalizer or ClusterNormalizer("pgrpo")
    return Loop(folder, personalize(LocalBackend), normalizer=normalizer, **settings)


@pytest.mark.parametrize("scale", [True, False])
def test_grpo_through_pgrpo_is_arts(tmp_path: Path, scale: bool) -> None:
    plain = Loop(tmp_path / "art")
    same = ClusterNormalizer("grpo" if scale else "dr_grpo", ddof=0, eps=1e-6)
    ours = made(tmp_path / "ours", same)
    expected = plain.advantages(groups(REWARDS, CLUSTERS, 4), scale_rewards=scale)
    found = ours.advantages(groups(REWARDS, CLUSTERS, 4), scale_rewards=scale)
    # ART does not train on what is at its group's mean.
    assert found.keys() == expected.keys() == {0, 2, 3, 5, 7}
    assert found == pytest.approx(expected, rel=1e-6)
    assert ours.packed() == pytest.approx(plain.packed(), rel=1e-6)


def test_a_group_of_equal_rewards_is_trained_on_where_a_history_tells_it_apart(
    tmp_path: Path,
) -> None:
    ours, alone = made(tmp_path), ClusterNormalizer("pgrpo")
    ours.train(groups([0.0, 1.0], ["a", "a"], 2))
    alone([0.0, 1.0], ["a", "a"])
    found = ours.advantages(groups([1.0, 1.0], ["a", "a"], 2))
    assert found == pytest.approx(dict(enumerate(alone([1.0, 1.0], ["a", "a"]))))
    assert found[0] > 0.5


def test_metrics_of_clusters_are_among_arts(tmp_path: Path) -> None:
    result = made(tmp_path).train(groups(REWARDS, CLUSTERS, 4))
    assert result.metrics["clusters/b/reward"] == 7.0
    assert result.metrics["clusters/b/history_count"] == 4
    assert result.metrics["loss/train"] == 1.0
    assert result.checkpoint_path.endswith("0001")


def test_a_resumed_run_goes_on_from_its_last_checkpoint(tmp_path: Path) -> None:
    first = made(tmp_path)
    for _ in range(2):
        first.train(groups(REWARDS, CLUSTERS, 4))
    kept = first.backend.histories.normalizer.state_dict()
    assert read_histories(first.folder).state_dict() == kept
    half = read_histories(first.folder / "checkpoints" / "0001")
    assert half.snapshot()["a"].count == 4
    again = made(tmp_path)
    assert again.backend.histories.normalizer.state_dict() == kept
    again.train(groups(REWARDS, CLUSTERS, 4))
    assert again.backend.histories.normalizer.snapshot()["a"].count == 12


def test_a_model_that_was_trained_without_goes_on_only_if_told_to(tmp_path: Path) -> None:
    Loop(tmp_path).train(groups(REWARDS, CLUSTERS, 4))
    with pytest.raises(CheckpointError, match=f"holds no {HISTORIES}"):
        made(tmp_path)
    ours = made(tmp_path, begin_empty=True)
    ours.train(groups(REWARDS, CLUSTERS, 4))
    again = made(tmp_path, begin_empty=True)
    assert again.backend.histories.normalizer.snapshot()["a"].count == 4


def test_other_backends_are_as_before(tmp_path: Path) -> None:
    made(tmp_path / "ours")
    plain = Loop(tmp_path / "art")
    # Which has no clusters, nor needs any.
    assert plain.advantages(groups(REWARDS, None, 4)).keys() == {0, 2, 3, 5, 7}


def test_mistakes_are_told(tmp_path: Path) -> None:
    ours = made(tmp_path)
    with pytest.raises(DataError, match="has metadata 'cluster_id'.*they have day"):
        ours.train(groups(REWARDS, None, 4))
    assert not ours.backend.histories.normalizer.snapshot()
    with pytest.raises(ConfigError, match=r"MegatronBackend packs batches where"):
        personalize(MegatronBackend)
    with pytest.raises(ConfigError, match="expected a pgrpo.ClusterNormalizer"):
        Loop(tmp_path / "none", personalize(LocalBackend), normalizer=None)
    ours.model.run_name = "other"
    with pytest.raises(ConfigError, match="expected a backend of its own"):
        ours.register()
