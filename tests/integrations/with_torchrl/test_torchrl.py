"""torchrl's own transform, replay buffer and tensordicts, with pgrpo in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import LazyStackStorage, ReplayBuffer
from torchrl.objectives.llm import MCAdvantage

from pgrpo import ClusterNormalizer, ConfigError, DataError
from pgrpo.integrations.torchrl import ClusterAdvantage


def trajectory(group: int, rewards: list[float], cluster: int | None = 1) -> Any:
    steps = len(rewards)
    done = [False] * (steps - 1) + [True]
    found: dict[str, Any] = {
        "group": torch.full((steps,), group),
        "next": TensorDict(
            {
                "reward": torch.tensor(rewards).reshape(steps, 1),
                "done": torch.tensor(done).reshape(steps, 1),
            },
            batch_size=[steps],
        ),
    }
    if cluster is not None:
        found["cluster_id"] = torch.full((steps,), cluster)
    return TensorDict(found, batch_size=[steps])


def made(normalizer: ClusterNormalizer, size: int = 2, **settings: Any) -> ClusterAdvantage:
    return ClusterAdvantage(normalizer, size, prompt_key="group", **settings)


def test_grpo_through_pgrpo_is_torchrls() -> None:
    ours = made(ClusterNormalizer("grpo", ddof=1, eps=1e-9), 3)
    plain = MCAdvantage(3, prompt_key="group", trajectory_return="sum")
    for rewards in ([0.0, 1.0], [2.0], [5.0, 1.0, 0.5]):
        found, expected = (t.inv(trajectory(7, rewards)) for t in (ours, plain))
    torch.testing.assert_close(found["advantage"], expected["advantage"])


def test_histories_go_from_group_to_group_in_a_real_buffer() -> None:
    normalizer, alone = ClusterNormalizer("pgrpo"), ClusterNormalizer("pgrpo")
    buffer = ReplayBuffer(storage=LazyStackStorage(100), transform=made(normalizer), batch_size=4)
    expected: list[float] = []
    for group, (first, second) in enumerate([(0.0, 1.0), (3.0, 3.0)]):
        for reward in (first, second):
            buffer.extend(trajectory(group, [reward, 0.0]))
        for advantage in alone([first, second], [1, 1]):
            expected += [advantage] * 2
    found = buffer[:]["advantage"].flatten()
    torch.testing.assert_close(found, torch.tensor(expected))
    assert normalizer.state_dict() == alone.state_dict()


def test_a_group_that_is_dropped_enters_no_history() -> None:
    normalizer = ClusterNormalizer("pgrpo")
    transform = made(normalizer, keep_return_bounds=(0.1, 0.9))
    for _ in range(2):
        assert transform.inv(trajectory(0, [0.0, 0.0])) is None
    assert not normalizer.snapshot()
    transform = made(normalizer, candidate_group_size=4, keep_return_bounds=(0.1, 0.9))
    for reward in (0.0, 0.0, 1.0):
        out = transform.inv(trajectory(1, [reward]))
    # Two of the three were taken.
    assert len(out) == 2 and normalizer.snapshot()[1].count == 2
    assert transform.last_metrics["clusters/1/history_count"] == 2


def test_histories_are_in_the_state_dict() -> None:
    first, second = made(ClusterNormalizer("auto")), made(ClusterNormalizer("auto"))
    for reward in (0.0, 1.0):
        first.inv(trajectory(0, [reward]))
    second.load_state_dict(first.state_dict())
    state = first.histories.normalizer.state_dict()
    assert second.histories.normalizer.state_dict() == state and state["clusters"] == [1]


def test_mistakes_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="trajectory_return is None"):
        made(ClusterNormalizer("pgrpo"), trajectory_return=None)
    transform = made(ClusterNormalizer("pgrpo"))
    with pytest.raises(DataError, match="no 'cluster_id'.*it has group, next"):
        for _ in range(2):
            transform.inv(trajectory(0, [1.0], cluster=None))
    changing = trajectory(1, [1.0, 0.0])
    changing["cluster_id"] = torch.tensor([1, 2])
    with pytest.raises(DataError, match=r"clusters \[1, 2\]; expected one"):
        for _ in range(2):
            transform.inv(changing.clone())
    with pytest.raises(ConfigError, match=r"make it with ClusterNormalizer.shared"):
        transform.share_memory_()
    made(ClusterNormalizer.shared(tmp_path / "table")).share_memory_()
