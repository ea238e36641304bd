"""slime's hook, called as slime calls it. slime itself is not on PyPI and wants a GPU: its samples are
stood in for by a class with the fields that are read, as slime names them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pgrpo import ClusterNormalizer, ConfigError, DataError
from pgrpo.errors import CheckpointError
from pgrpo.integrations import slime
from pgrpo.integrations.saved import read_histories

REWARDS = [0.0, 1.0, 10.0, 30.0]
CLUSTERS = ["a", "a", 7, 7]


@dataclass
class Sample:
    reward: float | None
    group_index: int
    metadata: dict[str, Any] = field(default_factory=dict)
    response_length: int = 3

    def get_reward_value(self, args: Any) -> float | None:
        return self.reward


def samples(rewards: list[Any] = REWARDS) -> list[Sample]:
    return [Sample(r, i // 2, {"cluster_id": CLUSTERS[i]}) for i, r in enumerate(rewards)]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Another process, as a resumed run has."""
    slime._running.clear()
    yield
    slime._running.clear()


def arguments(folder: Path, start: int = 0, **options: Any) -> Any:
    return SimpleNamespace(
        save=str(folder), load=str(folder), save_interval=5, start_rollout_id=start, pgrpo=options
    )


def test_rewards_stay_and_advantages_are_the_normalizers(tmp_path: Path) -> None:
    alone = ClusterNormalizer("auto")
    args = arguments(tmp_path, estimator="auto")
    for _ in range(2):
        raw, found = slime.post_process(args, samples())
        assert raw == REWARDS
        assert found == pytest.approx(alone(REWARDS, CLUSTERS, [0, 0, 1, 1]))


def test_a_resumed_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    for _ in range(8):
        slime.post_process(args, samples())
    # The checkpoint is of rollout 4; the run was three ahead.
    kept = sorted(int(p.name.split("_")[1]) for p in (tmp_path / "pgrpo").iterdir())
    assert kept == [4, 5, 6, 7]
    slime._running.clear()
    slime.post_process(arguments(tmp_path, start=5), samples())
    assert read_histories(tmp_path / "pgrpo").snapshot()["a"].count == 16
    assert read_histories(tmp_path / "pgrpo" / "step_5").snapshot()["a"].count == 12


def test_a_sample_without_a_reward_counts_nothing(tmp_path: Path) -> None:
    raw, found = slime.post_process(arguments(tmp_path), samples([None, 1.0, 10.0, 30.0]))
    assert raw[0] == found[0] == 0.0
    assert read_histories(tmp_path / "pgrpo").snapshot()["a"].count == 1


def test_mistakes_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pgrpo.min_counts is no option; expected cluster_key"):
        slime.post_process(arguments(tmp_path, min_counts=3), samples())
    with pytest.raises(DataError, match=r"sample 0 has no metadata 'segment'.*it has cluster_id"):
        slime.post_process(arguments(tmp_path, cluster_key="segment"), samples())
    slime._running.clear()
    with pytest.raises(CheckpointError, match="saved without pgrpo"):
        slime.post_process(arguments(tmp_path, start=3), samples())
