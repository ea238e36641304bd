"""A loop of one's own: shapes, ranks that differ, and mistakes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_distributed import run

from pgrpo import ClusterNormalizer, ConfigError, DataError
from pgrpo.integrations.torch import advantages

REWARDS = torch.tensor([[0.0, 1.0, 1.0], [10.0, 30.0, 20.0]])


def test_rows_are_groups_and_come_back_as_they_were() -> None:
    found = advantages(ClusterNormalizer("grpo"), REWARDS.half(), ["a", "b"])
    expected = ClusterNormalizer("grpo")(REWARDS.numpy(), ["a", "b"])
    assert found.shape == REWARDS.shape and found.dtype == torch.float16
    np.testing.assert_allclose(found.float(), expected, rtol=1e-3)


@pytest.mark.parametrize(
    "clusters", [["a", "b"], [["a"] * 3, ["b"] * 3], ["a"] * 3 + ["b"] * 3, torch.tensor([1, 2])]
)
def test_clusters_are_of_rows_or_of_rollouts(clusters: Any) -> None:
    normalizer = ClusterNormalizer("pgrpo")
    advantages(normalizer, REWARDS, clusters)
    assert [stats.count for stats in normalizer.snapshot().values()] == [3, 3]


def test_flat_rewards_need_no_groups_unless_the_estimator_does() -> None:
    flat = REWARDS.flatten()
    found = advantages(ClusterNormalizer("pgrpo"), flat, [1] * 3 + [2] * 3)
    assert found.shape == (6,)
    with pytest.raises(DataError, match="groups"):
        advantages(ClusterNormalizer("grpo"), flat, [1] * 6)
    advantages(ClusterNormalizer("grpo"), flat, [1] * 6, ["x"] * 3 + ["y"] * 3)


def test_no_gradient_flows_and_lengths_are_heard() -> None:
    rewards = REWARDS.clone().requires_grad_()
    lengths = torch.tensor([[1, 2, 3], [9, 1, 1]])
    found = advantages(ClusterNormalizer("opo"), rewards, ["a", "b"], lengths=lengths)
    assert not found.requires_grad
    expected = ClusterNormalizer("opo")(REWARDS.numpy(), ["a", "b"], lengths=lengths.numpy())
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (([1.0], ["a"]), "rewards is list; expected a torch tensor"),
        (
            (torch.ones(2, 3, 4), ["a"]),
            r"rewards has shape \[2, 3, 4\]; expected \[N\] or \[P, G\]",
        ),
        ((REWARDS, ["a"]), r"clusters has 1 entries; expected those of rewards \[2, 3\]"),
        ((REWARDS, [["a"], ["b"]]), r"clusters has 2 rows; expected those of rewards \[2, 3\]"),
        ((REWARDS, ["a", 0.5]), "0.5"),
    ],
)
def test_what_does_not_go_together_is_named(arguments: Any, complaint: str) -> None:
    normalizer = ClusterNormalizer("pgrpo")
    with pytest.raises(DataError, match=complaint):
        advantages(normalizer, *arguments)
    assert not normalizer.snapshot()


def test_a_shared_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is shared"):
        advantages(ClusterNormalizer.shared(tmp_path / "table"), REWARDS, ["a", "b"])


def share(rank: int, step: int) -> tuple[torch.Tensor, list[str]]:
    """Rank 1 has none in the second step, and more rows than rank 0 in the others."""
    rows = [2, 3 * (step != 1)][rank]
    generator = torch.Generator().manual_seed(10 * step + rank)
    rewards = 1e3 + torch.randn(rows, 3, generator=generator, dtype=torch.float64)
    if rows:
        rewards[0, 1] = math.nan
    return rewards, [f"c{(rank + row) % 3}" for row in range(rows)]


def ragged(rank: int, size: int) -> Any:
    normalizer = ClusterNormalizer("shrinkage")
    found = [advantages(normalizer, *share(rank, step)) for step in range(3)]
    return normalizer.state_dict(), [one.tolist() for one in found]


def test_ranks_that_differ_have_the_histories_of_one_stream(tmp_path: Path) -> None:
    ranks = run(ragged, 2, tmp_path)
    alone = ClusterNormalizer("shrinkage")
    for step in range(3):
        parts = [share(rank, step) for rank in range(2)]
        whole = advantages(
            alone, torch.cat([part[0] for part in parts]), [c for part in parts for c in part[1]]
        ).tolist()
        assert ranks[0][1][step] + ranks[1][1][step] == whole
    assert ranks[0][0] == ranks[1][0] == alone.state_dict()


def split_group(rank: int, size: int) -> Any:
    normalizer = ClusterNormalizer("grpo")
    rewards = torch.tensor([0.0, 1.0]) if rank == 0 else torch.tensor([2.0, 5.0])
    return advantages(normalizer, rewards, ["a", "a"], groups=["one", "one"]).tolist()


def test_a_group_may_lie_on_several_ranks(tmp_path: Path) -> None:
    found = run(split_group, 2, tmp_path)
    expected = ClusterNormalizer("grpo")([0.0, 1.0, 2.0, 5.0], ["a"] * 4, ["one"] * 4)
    assert found[0] + found[1] == pytest.approx(expected, rel=1e-6)


def mistaken(rank: int, size: int) -> Any:
    normalizer = ClusterNormalizer("pgrpo")
    clusters = ["a", "b"] if rank == 0 else ["a"]
    try:
        advantages(normalizer, REWARDS, clusters)
    except DataError as error:
        return str(error), normalizer.state_dict()["clusters"]
    return "", []


def test_a_mistake_of_one_rank_is_told_on_all(tmp_path: Path) -> None:
    for complaint, clusters in run(mistaken, 2, tmp_path):
        assert complaint.startswith("rank 1: clusters has 1 entries")
        assert clusters == []
