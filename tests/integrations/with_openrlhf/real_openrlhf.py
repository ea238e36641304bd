"""OpenRLHF's trainer in this process, made from its own arguments, around a policy without weights."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import openrlhf.utils
import ray
from datasets import Dataset
from openrlhf.trainer import ppo_trainer, ppo_trainer_async
from openrlhf.trainer.ray.launcher import RayActorGroup
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast
from with_openrlhf.cpu_openrlhf import Policy, response, start_ray

from pgrpo import ClusterNormalizer
from pgrpo.integrations import openrlhf as integration

WORDS = 40


def prepare(folder: Path, rows: Sequence[tuple[str, float | None]]) -> None:
    """A tokenizer and a data set, whose labels have a cluster and what the engine scales rewards by."""
    names = ["<pad>", "<eos>", *(f"w{i}" for i in range(WORDS))]
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>"
    ).save_pretrained(folder / "model")
    LlamaConfig(vocab_size=len(names)).save_pretrained(folder / "model")
    Dataset.from_list(
        [
            {"input": f"w{i} w{i % 7}", "label": {"cluster_id": cluster, "scale": scale}}
            for i, (cluster, scale) in enumerate(rows)
        ]
    ).to_json(folder / "rows.jsonl")


def arguments(folder: Path, *more: str) -> list[str]:
    """Of OpenRLHF and of pgrpo, as the documentation has them."""
    return [
        "--algo.advantage.estimator=group_norm",
        "--data.label_key=label",
        f"--data.prompt_dataset={folder}/rows.jsonl",
        f"--actor.model_name_or_path={folder}/model",
        f"--ckpt.path={folder}/ckpt",
        "--reward.remote_url=unused",
        "--rollout.n_samples_per_prompt=4",
        "--rollout.batch_size=2",
        "--rollout.micro_batch_size=4",
        "--train.batch_size=8",
        "--algo.kl.init_coef=0",
        "--vllm.num_engines=1",
        "--actor.num_gpus_per_node=1",
        *more,
    ]


class Parsed(Exception):
    """Thrown where OpenRLHF has read its arguments, with what has come of them."""


def settings(given: Sequence[str]) -> tuple[Any, Any]:
    """OpenRLHF's settings by its own parser, and the class that it would make its trainer of."""

    def stop(args: Any) -> Any:
        raise Parsed(args, ppo_trainer.PPOTrainer.__ray_metadata__.modified_class)

    kept = ppo_trainer.PPOTrainer, ppo_trainer_async.TrainingActor
    try:
        with (
            patch.object(sys, "argv", ["train", *given]),
            patch.object(openrlhf.utils, "get_strategy", stop),
        ):
            integration.main()
    except Parsed as parsed:
        args, actor = parsed.args
        return args, actor
    finally:
        ppo_trainer.PPOTrainer, ppo_trainer_async.TrainingActor = kept
    raise AssertionError("OpenRLHF came to an end without a strategy")


@cache
def policy() -> Any:
    """One for all tests, for its process takes long to start."""
    if not ray.is_initialized():
        start_ray()
    return RayActorGroup(1, 1, Policy)


def trainer(folder: Path, normalizer: ClusterNormalizer | None = None, *more: str) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "rows.jsonl").exists():
        prepare(folder, [("a", 1.0), ("b", 10.0)])
    group = policy()
    args, actor = settings(arguments(folder, *more))
    strategy = openrlhf.utils.get_strategy(args)
    made: Any = actor(args.actor.model_name_or_path, strategy, group, None, None, None, [])
    if normalizer is not None:
        made.histories.normalizer = normalizer
    begin(made)
    return made


def begin(made: Any) -> None:
    """As OpenRLHF does when it begins."""
    ray.get(policy().async_init_model_from_pretrained(made.strategy))
    made.restore_best_checkpoint_state(made.init_checkpoint_states())


def save(made: Any, step: int) -> None:
    """As OpenRLHF does after a step."""
    states = {"episode": 0, "global_step": step, "total_consumed_prompts": 0}
    made.args.ckpt.save_steps = 1
    made.save_logs_and_checkpoints(step, {}, states | {"data_loader_state_dict": {}})


def samples(
    made: Any, rewards: Sequence[float | None], labels: Sequence[Any], size: int
) -> list[Any]:
    """Responses of different lengths, `size` of each prompt, as its generator hands them on."""
    return [
        made.samples_generator._process_response_into_experience(
            response(
                f"w{place // size}",
                label,
                float("nan") if reward is None else reward,
                1 + place % 3,
            )
        )
        for place, (reward, label) in enumerate(zip(rewards, labels, strict=True))
    ]


def advantages(experiences: Sequence[Any]) -> list[float]:
    """Of each response, the same at each of its tokens."""
    found: list[float] = []
    for experience in experiences:
        for row, mask in zip(experience.advantages, experience.action_mask.bool(), strict=True):
            values = set(row[mask].tolist())
            assert len(values) == 1
            found += values
    return found
