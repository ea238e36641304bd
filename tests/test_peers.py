"""Other libraries' own code for the same rules: the same advantages."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import pgrpo

NUM_GROUPS, SIZE = 16, 4


def some_rewards(num_rewards: int = 1) -> torch.Tensor:
    """[N, R]; some groups have equal rewards, and all of a rollout's may be missing."""
    rewards = torch.randn(
        NUM_GROUPS * SIZE,
        num_rewards,
        generator=torch.Generator().manual_seed(3),
        dtype=torch.float64,
    )
    rewards[:SIZE] = 0.5
    rewards[5:7] = torch.nan
    return rewards


GROUPS = np.arange(NUM_GROUPS * SIZE) // SIZE


@pytest.fixture(scope="module")
def rules() -> Iterator[Any]:
    """The module of the benches that cuts the rules of others out of their files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "benches"))
        yield import_module("rules")


@pytest.mark.parametrize(
    ("estimator", "settings"),
    [
        ("grpo", {}),
        ("dr_grpo", {"scale_rewards": "none"}),
        ("lite", {"scale_rewards": "batch"}),
        ("gdpo_multi", {"multi_objective_aggregation": "normalize_then_sum"}),
    ],
)
def test_trl_agrees(rules: Any, estimator: str, settings: dict[str, Any]) -> None:
    rewards = some_rewards()
    expected = rules.trl_rule(rules.folder_of("trl"))(rewards, SIZE, **settings)
    assert expected.abs().max() > 0.5
    normalizer = pgrpo.ClusterNormalizer(estimator, ddof=1, nan_policy="zero")
    found = normalizer(rewards[:, 0], np.zeros(len(GROUPS), int), GROUPS)
    # Its nanstd takes the ratio of two counts in float32.
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def verl_algos(rules: Any) -> Any:
    return rules.verl_rules(rules.folder_of("verl"))


@pytest.mark.parametrize(
    ("estimator", "function", "settings"),
    [
        ("grpo", "compute_grpo_outcome_advantage", {}),
        ("grpo", "compute_grpo_vectorized_outcome_advantage", {}),
        ("dr_grpo", "compute_grpo_outcome_advantage", {"norm_adv_by_std_in_grpo": False}),
        ("rloo", "compute_rloo_outcome_advantage", {}),
        ("rloo", "compute_rloo_vectorized_outcome_advantage", {}),
        ("opo", "compute_opo_outcome_advantage", {}),
        ("gdpo_multi", "compute_gdpo_outcome_advantage", {}),
    ],
)
def test_verl_agrees(verl_algos: Any, estimator: str, function: str, settings: Any) -> None:
    rewards = torch.nan_to_num(some_rewards()[:, 0]).float()
    lengths = torch.arange(len(GROUPS)) * 7 % 11 + 1
    if estimator == "gdpo_multi":
        # It standardises over tokens, and so over rollouts only where they have as many.
        lengths = torch.full_like(lengths, 5)
    mask = (torch.arange(11) < lengths[:, None]).float()
    scores = torch.zeros_like(mask)
    scores[torch.arange(len(GROUPS)), lengths - 1] = rewards
    advantages, _ = getattr(verl_algos, function)(scores, mask, index=GROUPS, **settings)
    normalizer = pgrpo.ClusterNormalizer(estimator, ddof=1, eps=1e-6)
    found = normalizer(rewards, np.zeros(len(GROUPS), int), GROUPS, lengths=lengths)
    # Standard deviations over tokens count each rollout often, so nothing is lost to ddof; 1e-8 is
    # under its root, where eps is not.
    tolerance = 1e-2 if estimator == "gdpo_multi" else 1e-5
    torch.testing.assert_close(found, advantages[:, 0], rtol=tolerance, atol=1e-5)
    assert found.abs().max() > 0.5


def test_verl_agrees_over_the_batch(verl_algos: Any) -> None:
    rewards = torch.nan_to_num(some_rewards()[:, 0]).float()
    scores = rewards[:, None]
    config = SimpleNamespace(gamma=1.0)
    function = verl_algos.compute_reinforce_plus_plus_outcome_advantage
    advantages, _ = function(scores, torch.ones_like(scores), config=config)
    found = pgrpo.ClusterNormalizer("batch", ddof=1, eps=1e-8)(rewards, np.zeros(len(GROUPS), int))
    torch.testing.assert_close(found, advantages[:, 0], rtol=1e-5, atol=1e-5)
