"""OpenRLHF's own arguments, experiences, experience maker and checkpoints, with pgrpo in them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker
from with_openrlhf.real_openrlhf import (
    arguments,
    policy,
    samples,
    save,
    settings,
    trainer,
)

from pgrpo import ClusterNormalizer, ConfigError, DataError
from pgrpo.errors import CheckpointError

SIZE = 4
REWARDS = [0.5, 1.0, 0.0, 2.5, 7.0, 8.0, 7.0, 6.0]
LABELS = [{"cluster_id": "a"}] * 4 + [{"cluster_id": "b"}] * 4


def experiences(made: Any, rewards: Any = REWARDS, labels: Any = LABELS) -> list[Any]:
    return made.experience_maker.make_experience_batch(samples(made, rewards, labels, SIZE))


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--reward.overlong_buffer_len=4", "--rollout.max_new_tokens=6"],
        ["--reward.clip_range", "-0.5", "0.5", "--rollout.micro_batch_size=3"],
        ["--train.dynamic_batch_enable", "--rollout.max_tokens_per_gpu=12"],
    ],
)
@pytest.mark.parametrize("penalty", [0.0, 0.25])
def test_grpo_through_pgrpo_is_openrlhfs(tmp_path: Path, more: list[str], penalty: float) -> None:
    rule = ["--pgrpo.estimator=grpo", "--pgrpo.ddof=1", "--pgrpo.eps=1e-9"]
    ours = trainer(tmp_path, None, *rule, *more)
    plain = RemoteExperienceMaker(
        policy(), None, None, None, ours.kl_ctl, ours.strategy, ours.tokenizer
    )
    ours.kl_ctl.value = penalty
    found: list[list[Any]] = []
    for maker in (ours.experience_maker, plain):
        batches = maker.split_rollout_samples(samples(ours, REWARDS, LABELS, SIZE))
        made = maker.make_experience(batches)
        for experience in made:
            # As a reference model would have it.
            experience.kl = experience.action_mask * torch.linspace(0, 1, experience.kl.shape[1])
        found.append(maker.compute_advantages_and_returns(made))
    for one, other in zip(*found, strict=True):
        assert other.advantages.abs().max() > 0.2
        for name in ("advantages", "returns", "rewards"):
            torch.testing.assert_close(
                getattr(one, name), getattr(other, name), rtol=1e-5, atol=1e-6
            )
        assert one.info.keys() == other.info.keys() and one.kl is None
        for name, values in one.info.items():
            torch.testing.assert_close(values, other.info[name], rtol=1e-5, atol=1e-6)


def test_a_step_logs_clusters_and_warns_once(tmp_path: Path, caplog: Any) -> None:
    made = trainer(tmp_path)
    with caplog.at_level(logging.WARNING, "pgrpo.integrations.openrlhf"):
        for step in range(12):
            logged, after = made.train_step(samples(made, [1.0] * 8, LABELS, SIZE), step)
            assert after == step + 1
    assert logged["clusters/a/history_count"] == 48 and logged["clusters/b/reward"] == 1.0
    assert logged["clusters/a/advantage"] == 0 and logged["rollout/num_samples"] == 8
    told = [record for record in caplog.records if record.name == "pgrpo.integrations.openrlhf"]
    assert len({record.getMessage().rpartition(": ")[2] for record in told}) == len(told) > 0


def test_options_are_read_beside_openrlhfs_own(tmp_path: Path) -> None:
    made = trainer(
        tmp_path, None, "--pgrpo.estimator", "auto", "--pgrpo.min_count", "8", "--pgrpo.clip=null"
    )
    options = made.histories.normalizer.options
    assert (options.estimator, options.min_count, options.clip) == ("auto", 8, None)
    for more, message in (
        (["--pgrpo.min_counts=8"], r"--pgrpo.min_counts is no option; expected cluster_key, est"),
        (["--pgrpo.eps=-1"], "eps is -1"),
        (["--pgrpo.reward_weights=[1]"], "reward_weights is no option"),
        (["--pgrpo.eps"], "--pgrpo.eps has no value"),
        (["--algo.advantage.estimator=rloo"], "estimator is rloo; expected group_norm"),
        (["--data.label_key="], "--data.label_key is not set"),
    ):
        with pytest.raises(ConfigError, match=message):
            trainer(tmp_path, None, *more)
    with pytest.raises(SystemExit):
        settings(arguments(tmp_path, "--pgrpos.eps=1"))  # OpenRLHF's parser does not know it


def test_a_cluster_is_an_entry_of_the_label_or_the_label(tmp_path: Path) -> None:
    made = trainer(tmp_path, None, "--pgrpo.cluster_key=user")
    with pytest.raises(DataError, match=r"label is \{'cluster_id': 'a'\} and has no 'user'"):
        experiences(made)
    assert not made.histories.normalizer.snapshot()
    experiences(made, labels=[{"user": 3}] * 4 + [{"user": "3"}] * 4)
    assert set(made.histories.normalizer.snapshot()) == {3, "3"}
    made = trainer(tmp_path, None, "--pgrpo.cluster_key", "")
    experiences(made, labels=["a"] * 4 + ["b"] * 4)
    assert set(made.histories.normalizer.snapshot()) == {"a", "b"}
    with pytest.raises(DataError, match="label is 'a' and has no 'cluster_id'"):
        experiences(trainer(tmp_path), labels=["a"] * 8)


def test_histories_are_in_deepspeeds_checkpoint_and_only_there(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    for step in (1, 2):
        experiences(made)
        save(made, step)
    kept = made.histories.normalizer.state_dict()
    file = tmp_path / "ckpt/_actor/global_step2/mp_rank_00_model_states.pt"
    again = ClusterNormalizer("pgrpo")
    again.load_state_dict(torch.load(file, weights_only=False)["pgrpo"])
    assert again.state_dict() == kept and again.snapshot()["a"].count == 8

    resumed = trainer(tmp_path, None, "--ckpt.load_enable")
    assert resumed.init_checkpoint_states()["global_step"] == 2
    assert resumed.histories.normalizer.state_dict() == kept
    experiences(resumed)
    assert resumed.histories.normalizer.snapshot()["a"].count == 12
    fresh = trainer(tmp_path)
    assert not fresh.histories.normalizer.snapshot()


def test_the_best_checkpoint_has_its_own_histories(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    experiences(made)
    states = {"episode": 0, "global_step": 1, "total_consumed_prompts": 0}
    made.save_best_checkpoint({"eval_x_pass1": 0.5}, 1, states)
    assert states["best_eval_metric_value"] == 0.5
    kept = made.histories.normalizer.state_dict()
    resumed = trainer(tmp_path, None, "--ckpt.load_enable")
    assert resumed.best_eval_metric_value == 0.5
    assert resumed.histories.normalizer.state_dict() == kept


def test_a_checkpoint_without_histories_or_with_damaged_ones_is_refused(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    experiences(made)
    before = made.histories.normalizer.state_dict()
    states: dict[str, Any] = {"global_step": 3}
    with pytest.raises(CheckpointError, match="checkpoint of step 3 holds no histories"):
        made.restore_best_checkpoint_state(states)
    with pytest.raises(CheckpointError, match="normalizer state"):
        made.restore_best_checkpoint_state(states | {"pgrpo": before | {"m2": [-1.0, 0.0]}})
    assert made.histories.normalizer.state_dict() == before
