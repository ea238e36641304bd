"""AReaL's own actor, recovery, trainer class and workflow, with pgrpo in them."""

from __future__ import annotations

import asyncio
import json
import math
import socket
import subprocess
import sys
from collections.abc import Mapping
from logging import getLogger
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import numpy as np
import pytest
import torch
from areal.api import FinetuneSpec, ModelResponse, StepInfo
from areal.api.alloc_mode import ModelAllocation
from areal.api.cli_args import (
    EvaluatorConfig,
    GenerationHyperparameters,
    NormConfig,
    RecoverConfig,
    SaverConfig,
)
from areal.engine import FSDPPPOActor
from areal.infra.remote_inf_engine import GroupedRolloutWorkflow
from areal.trainer.rl_trainer import PPOTrainer
from areal.utils import stats_tracker
from areal.utils.evaluator import Evaluator
from areal.utils.recover import RecoverHandler
from areal.utils.saver import Saver
from real_areal import Actor, Options, actor, advantages, config, group, groups, length, meta
from tokenizers import Tokenizer, models
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import PreTrainedTokenizerFast
from two_ranks import BATCHES

from pgrpo import ClusterNormalizer, ConfigError, DataError
from pgrpo.errors import CheckpointError
from pgrpo.integrations.areal import ClusterWorkflow, personalize

REWARDS = [0.5, 1.0, 0.0, 2.5, 7.0, 8.0, 7.0, 6.0, 3.0, 3.0, 3.0, 3.0]
CLUSTERS = [*"aaaabbbbcccc"]


def test_grpo_through_pgrpo_is_areals(tmp_path: Path) -> None:
    level: dict[str, Any] = {"mean_level": "group", "std_level": "group", "group_size": 4}
    plain = actor(tmp_path, kind=FSDPPPOActor, reward_norm=NormConfig(**level))
    ours = actor(tmp_path, ClusterNormalizer("grpo", ddof=1, eps=1e-5))
    expected = torch.cat(
        [
            rows["advantages"]
            for rows in plain.compute_advantages([group(REWARDS[i : i + 4]) for i in (0, 4, 8)])
        ]
    )
    found = torch.cat(
        [rows["advantages"] for rows in ours.compute_advantages(groups(REWARDS, CLUSTERS, 4))]
    )
    assert expected.abs().max() > 1
    torch.testing.assert_close(found, expected)


def test_a_whole_step_trains_and_logs_the_histories(tmp_path: Path) -> None:
    made = actor(tmp_path)
    batch = groups(REWARDS, CLUSTERS, 4)
    stats_tracker.export_all()
    for rows, logprobs in zip(batch, made.compute_logp(batch), strict=True):
        rows["prox_logp"] = logprobs
    made.ppo_update(made.compute_advantages(batch))
    logged = stats_tracker.export_all()
    assert logged["clusters/b/history_count"] == 4
    assert logged["clusters/b/history_mean"] == 7.0
    assert logged["ppo_actor/update/grad_norm"] > 0
    # Its own are of rewards as they were given.
    assert logged["ppo_actor/task_reward/avg"] == pytest.approx(np.mean(REWARDS))


def handler(folder: Path, made: Any) -> Any:
    """AReaL's recovery, as its trainer sets it up and calls it."""
    names: dict[str, Any] = {
        "experiment_name": "test",
        "trial_name": "test",
        "fileroot": str(folder),
    }
    spec = FinetuneSpec(1, 8, 8)
    recover = RecoverHandler(RecoverConfig(**names, mode="on", freq_steps=1), spec)
    rest: tuple[Any, ...] = (
        Saver(SaverConfig(**names), spec),
        Evaluator(EvaluatorConfig(**names), spec),
        SimpleNamespace(state_dict=dict, load_state_dict=lambda state: None),
        StatefulDataLoader(cast(Any, list(range(8)))),
    )

    def dump(step: int) -> None:
        recover.dump(made, StepInfo(0, step, step, 8), *rest)

    return SimpleNamespace(dump=dump, load=lambda: recover.load(made, *rest))


def test_a_recovered_run_counts_no_step_twice(tmp_path: Path) -> None:
    first = actor(tmp_path)
    recovery = handler(tmp_path, first)
    advantages(first, groups(REWARDS, CLUSTERS, 4))
    recovery.dump(0)
    kept = first.histories.normalizer.state_dict()
    again = actor(tmp_path)
    info = handler(tmp_path, again).load()
    assert info.last_step_info.next().global_step == 1
    assert again.histories.normalizer.state_dict() == kept

    # As a job leaves it that is killed when its weights are saved, and not yet which step they are of.
    advantages(first, groups(REWARDS, CLUSTERS, 4))
    first.save(meta(Path(Saver.get_recover_checkpoint_path("test", "test", str(tmp_path)))))
    assert handler(tmp_path, again).load().last_step_info.next().global_step == 1
    again.set_version(1)
    for count in (8, 12):
        advantages(again, groups(REWARDS, CLUSTERS, 4))
        assert again.histories.normalizer.snapshot()["a"].count == count


def test_a_run_is_not_recovered_without_its_histories(tmp_path: Path) -> None:
    plain = actor(tmp_path, kind=FSDPPPOActor)
    handler(tmp_path, plain).dump(0)
    with pytest.raises(CheckpointError, match="saved without pgrpo"):
        handler(tmp_path, actor(tmp_path)).load()


def test_ranks_have_one_history(tmp_path: Path) -> None:
    config(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script = Path(__file__).parent / "two_ranks.py"
    command = [sys.executable, str(script)]
    ranks = [
        subprocess.Popen([*command, str(rank), port, str(tmp_path)], stdout=subprocess.DEVNULL)
        for rank in range(2)
    ]
    assert [rank.wait(timeout=240) for rank in ranks] == [0, 0]
    results = [json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in range(2)]
    alone = ClusterNormalizer("pgrpo")
    rewards = [reward for batch, _ in BATCHES for reward in batch]
    clusters = [cluster for _, ids in BATCHES for cluster in ids]
    kept = [place for place, reward in enumerate(rewards) if reward is not None]
    for step in range(2):
        expected = np.zeros(len(rewards))
        expected[kept] = alone([rewards[i] for i in kept], [clusters[i] for i in kept])
        found = [advantage for result in results for advantage in result[0][step]]
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    for _, state, refusal in results:
        assert state == json.loads(json.dumps(alone.state_dict()))
        assert refusal.startswith("rank 1: a group has no 'cluster_id'")
    assert (tmp_path / "saved" / "pgrpo_histories.bin").exists()


@pytest.mark.parametrize("spmd", ["0", "1"])
def test_the_trainer_makes_this_actor_and_others_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spmd: str
) -> None:
    monkeypatch.setenv("AREAL_SPMD_MODE", spmd)
    actor(tmp_path)
    kind = personalize(PPOTrainer, Actor)
    # Its constructor starts servers that generate.
    trainer = object.__new__(kind)
    trainer.config = SimpleNamespace(actor=config(tmp_path))
    trainer.scheduler = None
    alloc = ModelAllocation.from_str("fsdp:d1", name="actor")
    made = trainer._create_train_engine(trainer.config.actor, alloc)
    other = trainer._create_train_engine(config(tmp_path), alloc)
    if spmd == "1":
        assert isinstance(made, Actor) and not isinstance(other, Actor)
    else:
        assert made.train_engine is Actor and other.train_engine is FSDPPPOActor


def test_the_workflow_hands_on_the_cluster_of_its_row() -> None:
    words = {f"w{i}": i for i in range(20)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")),
        eos_token="w2",
        pad_token="w2",
    )

    class Engine:
        """Stands for a server that generates."""

        async def agenerate(self, request: Any) -> ModelResponse:
            return ModelResponse(list(request.input_ids), [5, 6, 2], [-1.0] * 3, [0] * 3)

    workflow = ClusterWorkflow(
        length,
        GenerationHyperparameters(max_new_tokens=3),
        tokenizer,
        get_input_ids_fn=lambda data, *_: [3, 4],
    )
    grouped = GroupedRolloutWorkflow(workflow, 2, getLogger("workflow"))
    engine: Any = Engine()
    found: Any = asyncio.run(grouped.arun_episode(engine, {"messages": [], "cluster_id": "ä"}))
    assert found["cluster_id"] == "ä"
    assert found["rewards"].tolist() == [3.0, 3.0]
    with pytest.raises(DataError, match="no column 'cluster_id'.*it has messages"):
        asyncio.run(workflow.arun_episode(engine, {"messages": []}))


def test_clusters_may_be_of_samples_and_options_of_the_class(tmp_path: Path) -> None:
    made = actor(tmp_path, kind=Options)
    options = made.histories.normalizer.options
    assert options.estimator == "auto" and options.min_count == 8
    made.compute_advantages([group([1.0, 2.0], user=torch.tensor([3, 4]))])
    assert set(made.histories.normalizer.snapshot()) == {3, 4}


def test_mistakes_are_told(tmp_path: Path) -> None:
    made = actor(tmp_path)
    with pytest.raises(DataError, match="no 'cluster_id'.*the workflow returned input_ids"):
        made.compute_advantages([group([1.0, 2.0])])
    with pytest.raises(DataError, match="a group of 2 samples has 1 cluster ids"):
        made.compute_advantages([group([1.0, 2.0], cluster_id=["a"])])
    assert not made.histories.normalizer.snapshot()
    with pytest.raises(ConfigError, match=r"actor.reward_norm is NormConfig.*expected null"):
        actor(tmp_path, reward_norm=NormConfig())
    with pytest.raises(ConfigError, match=r"expected class FSDPPPOActor\(Personalized, ...\)"):
        personalize(PPOTrainer, FSDPPPOActor)

    class Wrong(Actor):
        pgrpo: ClassVar[Mapping[str, Any]] = {"min_counts": 8}

    with pytest.raises(ConfigError, match=r"Wrong.pgrpo.min_counts is no option; expected"):
        actor(tmp_path, kind=Wrong)


def test_areal_itself_clips_and_scales_before(tmp_path: Path) -> None:
    made = actor(tmp_path, reward_clip=2.0, reward_scaling=0.5)
    advantages(made, groups([math.nan, 1.0, 3.0, 100.0], ["a"] * 4, 4))
    found = made.histories.normalizer.snapshot()["a"]
    assert found.count == 3
    assert found.mean == pytest.approx(np.mean([0.5, 1.5, 2.0]))
