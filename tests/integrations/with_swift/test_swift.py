"""swift's own pipeline and trainer in this process, with pgrpo in them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from real_swift import SAMPLES, Given, rollouts, train, trainer
from safetensors.torch import load_file
from swift.rlhf_trainers import GRPOTrainer

from pgrpo import ClusterNormalizer, ConfigError, DataError
from pgrpo.errors import CheckpointError
from pgrpo.integrations.saved import read_histories

ALL_SCORED = """
from swift.rewards import ORM, orms

class Even(ORM):
    def __call__(self, completions, index, **_):
        return [sum(int(w[1:]) % 2 == 0 for w in text.split() if w[0] == "w") * (i + 1.0)
                for text, i in zip(completions, index)]

orms["scored"] = Even
"""


def as_swifts() -> ClusterNormalizer:
    """swift's own rule."""
    return ClusterNormalizer("grpo", ddof=1, eps=1e-4)


def total(normalizer: ClusterNormalizer) -> float:
    return sum(history.count for history in normalizer.snapshot().values())


def test_grpo_through_pgrpo_is_swifts_grpo(tmp_path: Path) -> None:
    (tmp_path / "scored.py").write_text(ALL_SCORED)
    for name, normalizer in (("plain", None), ("ours", as_swifts())):
        train(
            tmp_path / name,
            normalizer,
            external_plugins=tmp_path / "scored.py",
            reward_funcs=["scored"],
        )
    both = (rollouts(tmp_path / name, 4) for name in ("plain", "ours"))
    for one, other in zip(*both, strict=True):
        assert one["completion"] == other["completion"]
        assert max(map(abs, one["advantages"])) > 1
        torch.testing.assert_close(
            torch.tensor(other["advantages"]), torch.tensor(one["advantages"]), rtol=1e-6, atol=1e-6
        )
    start, plain, ours = (
        load_file(tmp_path / place / "model.safetensors")
        for place in ("plain/model", "plain/out/checkpoint-4", "ours/out/checkpoint-4")
    )
    moved = max((weight - start[name]).abs().max().item() for name, weight in plain.items())
    assert moved > 1e-3
    for name, weight in plain.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-4, atol=1e-3 * moved)


def test_a_generation_is_counted_once_however_often_it_is_trained_on(tmp_path: Path) -> None:
    """And once when a run is resumed in the middle of it, where swift generates it again."""
    settings: dict[str, Any] = {"num_iterations": 2, "max_steps": 4}
    whole = ClusterNormalizer("pgrpo")
    train(tmp_path, whole, **settings)
    scored = 2 * 4 * SAMPLES - SAMPLES
    assert total(whole) == scored
    saved = [total(read_histories(tmp_path / "out" / f"checkpoint-{n}")) for n in (1, 2, 3, 4)]
    assert saved[0] == saved[1] < saved[2] == saved[3]
    for only_model in (False, True):
        normalizer = ClusterNormalizer("pgrpo")
        train(
            tmp_path,
            normalizer,
            **settings,
            output_dir=tmp_path / f"again-{only_model}",
            resume_from_checkpoint=tmp_path / "out" / "checkpoint-3",
            resume_only_model=only_model,
        )
        assert total(normalizer) == scored


def test_what_dynamic_sampling_drops_enters_no_history(tmp_path: Path) -> None:
    (tmp_path / "flat.py").write_text(
        ALL_SCORED.replace("(i + 1.0)", "(i % 2)")  # every other prompt's group is flat
    )
    normalizer = ClusterNormalizer("pgrpo")
    train(
        tmp_path,
        normalizer,
        external_plugins=tmp_path / "flat.py",
        reward_funcs=["scored"],
        dynamic_sample=True,
        max_resample_times=8,
        max_steps=2,
    )
    kept = [row for generation in rollouts(tmp_path, 2) for row in generation["Even"]]
    assert total(normalizer) == 2 * 4 * SAMPLES
    mean = sum(h.count * h.mean for h in normalizer.snapshot().values()) / total(normalizer)
    assert mean == pytest.approx(sum(kept) / len(kept))


def scored(made: Any, requests: list[str], prompts: list[str]) -> tuple[list[Any], torch.Tensor]:
    """Samples as an agent's scheduler leaves them that splits trajectories."""
    samples = [
        made.sample_cls(
            messages=[{"role": "user", "content": prompt}, {"role": "assistant", "content": "w1"}],
            request_id=request,
            prompt_id=prompt,
            extra={"cluster_id": prompt},
        )
        for request, prompt in zip(requests, prompts, strict=True)
    ]
    of_request = {request: float(index * index) for index, request in enumerate("abcdefgh")}
    return samples, torch.tensor([[of_request[request]] for request in requests])


def test_a_trajectory_that_is_split_counts_once(tmp_path: Path) -> None:
    normalizer = as_swifts()
    made = trainer(tmp_path, normalizer)
    made.dynamic_num_samples = True
    samples, rewards = scored(made, list("abcadefghbfc"), list("ppqpqqqqppqq"))
    found = made._compute_advantages(samples, rewards, [])
    expected = GRPOTrainer._compute_advantages(made, samples, rewards, [])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert expected.abs().max() > 1
    assert {name: h.count for name, h in normalizer.snapshot().items()} == {"p": 3, "q": 5}


def test_the_length_of_a_completion_is_that_of_its_turns(tmp_path: Path) -> None:
    normalizer, alone = ClusterNormalizer("opo"), ClusterNormalizer("opo")
    made = trainer(tmp_path, normalizer)
    samples, rewards = scored(made, list("abcd"), list("pppp"))
    for sample, tokens in zip(samples, ([1, 2, 3], [[1], [2, 3]], [4], [[5]]), strict=True):
        sample.response_token_ids = copy.deepcopy(tokens)
    found = made._compute_advantages(samples, rewards, [])
    expected = alone(rewards[:, 0].tolist(), list("pppp"), [0] * 4, lengths=[3, 3, 1, 1])
    torch.testing.assert_close(found.double(), torch.tensor(expected).double(), rtol=1e-6, atol=0)


def test_mistakes_are_told(tmp_path: Path) -> None:
    def made(normalizer: Any = None, **settings: Any) -> Any:
        return trainer(tmp_path, normalizer or ClusterNormalizer("pgrpo"), **settings)

    with pytest.raises(ConfigError, match=r"cluster_key is 'user'.*it has .*cluster_id"):
        made(cluster_key="user")
    with pytest.raises(ConfigError, match="expected a pgrpo.ClusterNormalizer"):
        made("pgrpo")
    with pytest.raises(ConfigError, match="kl_in_reward is true"):
        made(advantage_estimator="rloo")
    made(advantage_estimator="rloo", beta=0.0)
    given = Given(["right", "short"])
    two = {"reward_funcs": ["right", "short"], "reward_weights": [1.0, 0.5]}
    with pytest.raises(ConfigError, match=r"scale_rewards is 'gdpo'.*reward_weights=\[1.0, 0.5\]"):
        made(scale_rewards="gdpo", **two)
    of_each = ClusterNormalizer(
        reward_weights=[1.0, 0.5], reward_names=["right", "short"], combine="normalize_then_sum"
    )
    with pytest.raises(ConfigError, match="scale_rewards is 'group'.*does otherwise"):
        made(of_each, **two)
    with pytest.raises(ConfigError, match="has other rewards than the trainer"):
        made(of_each)
    given.rows = [[0.0]] * 4 * SAMPLES
    with pytest.raises(DataError, match="no column 'cluster_id'.*it has index"):
        made(reward_funcs=["right"])._generate_and_score_completions(
            [{"messages": [{"role": "user", "content": "w1"}], "index": 1}] * 4 * SAMPLES
        )


def test_a_checkpoint_without_histories_is_refused(tmp_path: Path) -> None:
    train(tmp_path, None, max_steps=1)
    with pytest.raises(CheckpointError, match="saved without pgrpo"):
        train(
            tmp_path,
            ClusterNormalizer("pgrpo"),
            output_dir=tmp_path / "again",
            resume_from_checkpoint=tmp_path / "out" / "checkpoint-1",
        )
