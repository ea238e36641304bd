"""NeMo-RL's estimator, called as its trainers call it. NeMo-RL itself is not on PyPI and wants a GPU: its
modules and its checkpointer are stood in for by what is read and called of them, as NeMo-RL names it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from pgrpo import ClusterNormalizer, DataError
from pgrpo.errors import CheckpointError
from pgrpo.integrations.nemo_rl import CREATE, MODULE, USERS, switch_on
from pgrpo.integrations.saved import read_histories

REWARDS = [0.0, 1.0, 10.0, 30.0]
CLUSTERS = ["a", "a", 7, 7]
PROMPTS = torch.tensor([[5, 6], [5, 6], [5, 7], [5, 7]])
MASK = torch.tensor([[0, 1, 1], [0, 1, 0], [0, 1, 1], [0, 0, 0]])


class Checkpointer:
    """Folders that are begun under one name and finished under another."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def init_tmp_checkpoint(self, step: int, training_info: Any, run_config: Any = None) -> Path:
        made = self.folder / f"tmp_step_{step}"
        made.mkdir()
        return made

    def finalize_checkpoint(self, folder: Path) -> None:
        folder.rename(self.folder / folder.name.removeprefix("tmp_"))

    def get_latest_checkpoint_path(self) -> str | None:
        done = sorted(self.folder.glob("step_*"), key=lambda path: int(path.name[5:]))
        return str(done[-1]) if done else None


@pytest.fixture(autouse=True)
def modules(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Those of NeMo-RL that are imported when a run begins."""
    found: dict[str, Any] = {}
    for name in (MODULE, USERS[0]):
        found[name] = ModuleType(name)
        setattr(found[name], CREATE, lambda config: None)
        monkeypatch.setitem(sys.modules, name, found[name])
    return found


def batch(clusters: list[Any] = CLUSTERS) -> dict[str, Any]:
    return {
        "message_log": [[]],
        "extra_env_info": [{"cluster_id": cluster} for cluster in clusters],
    }


def advantages(estimator: Any, rewards: list[float] = REWARDS, **given: Any) -> torch.Tensor:
    return estimator.compute_advantage(
        **{
            "prompt_ids": PROMPTS,
            "rewards": torch.tensor(rewards),
            "mask": MASK,
            "repeated_batch": batch(),
            "logprobs_policy": None,
            "logprobs_reference": None,
        }
        | given
    )


def test_trainers_get_the_normalizers_advantages_at_each_token(
    tmp_path: Path, modules: dict[str, Any]
) -> None:
    made = switch_on(ClusterNormalizer("auto"), Checkpointer(tmp_path))
    alone = ClusterNormalizer("auto")
    for module in modules.values():
        assert getattr(module, CREATE)(None) is made
    for _ in range(2):
        expected = torch.tensor(alone(REWARDS, CLUSTERS, [0, 0, 1, 1]), dtype=torch.float32)
        found = advantages(made)
        assert found.shape == MASK.shape and found.dtype == torch.float32
        torch.testing.assert_close(found, expected.unsqueeze(-1).expand(4, 3))


def test_prompts_make_the_groups(tmp_path: Path) -> None:
    # NeMo-RL's own rule with use_leave_one_out_baseline=false.
    made = switch_on(ClusterNormalizer("grpo", ddof=1, eps=1e-6), Checkpointer(tmp_path))
    mixed = [2, 0, 3, 1]
    found = advantages(
        made,
        [REWARDS[i] for i in mixed],
        prompt_ids=PROMPTS[mixed],
        repeated_batch=batch([CLUSTERS[i] for i in mixed]),
    )
    expected = torch.tensor([-1.0, -1.0, 1.0, 1.0]) / 2**0.5
    torch.testing.assert_close(found[:, 0], expected, rtol=1e-5, atol=0)


def test_a_sample_without_a_reward_counts_nothing(tmp_path: Path) -> None:
    made = switch_on(ClusterNormalizer("pgrpo"), Checkpointer(tmp_path))
    assert (advantages(made, [float("nan"), 1.0, 10.0, 30.0])[0] == 0).all()
    assert made.histories.normalizer.snapshot()["a"].count == 1


def test_a_resumed_run_goes_on_from_its_last_checkpoint(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    made = switch_on(ClusterNormalizer("pgrpo"), checkpointer)
    for step in (1, 2):
        advantages(made)
        checkpointer.finalize_checkpoint(checkpointer.init_tmp_checkpoint(step, {}, None))
    kept = made.histories.normalizer.state_dict()
    assert read_histories(tmp_path).state_dict() == kept
    # Begun, and not finished.
    advantages(made)
    checkpointer.init_tmp_checkpoint(3, {}, None)
    again = switch_on(ClusterNormalizer("pgrpo"), Checkpointer(tmp_path))
    assert again.histories.normalizer.state_dict() == kept
    advantages(again)
    assert again.histories.normalizer.snapshot()["a"].count == 6


def test_mistakes_are_told(tmp_path: Path) -> None:
    made = switch_on(ClusterNormalizer("pgrpo"), Checkpointer(tmp_path), cluster_key="segment")
    with pytest.raises(DataError, match="sample 0 has no extra_env_info 'segment'"):
        advantages(made)
    with pytest.raises(DataError, match=r"no extra_env_info.*as grpo_train.*it has total_reward"):
        advantages(made, repeated_batch={"total_reward": torch.tensor(REWARDS)})
    assert not made.histories.normalizer.snapshot()
    (tmp_path / "step_4").mkdir()
    with pytest.raises(CheckpointError, match="saved without pgrpo"):
        switch_on(ClusterNormalizer("pgrpo"), Checkpointer(tmp_path))
