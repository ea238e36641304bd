"""AReaL's own FSDP actor on a CPU, with a tiny model and what a workflow would have generated."""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from areal.api import FinetuneSpec, SaveLoadMeta
from areal.api.cli_args import OptimizerConfig, PPOActorConfig
from areal.engine import FSDPPPOActor
from transformers import Qwen2Config, Qwen2ForCausalLM

from pgrpo import ClusterNormalizer
from pgrpo.integrations.adapter import Adapter
from pgrpo.integrations.areal import Personalized

TOKENS, PROMPT = 6, 2
"""Of a sample, and of its prompt."""


class Actor(Personalized, FSDPPPOActor):
    """As a user writes it."""


class Options(Personalized, FSDPPPOActor):
    """The same, with options."""

    pgrpo: ClassVar[Mapping[str, Any]] = {
        "estimator": "auto",
        "min_count": 8,
        "cluster_key": "user",
    }


def config(folder: Path, backend: str = "fsdp:d1", **settings: Any) -> PPOActorConfig:
    """AReaL's, with a model in the folder. Rewards are not clipped and there is no KL penalty."""
    model = folder / "model"
    if not model.exists():
        torch.manual_seed(0)
        tiny = Qwen2Config(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
        Qwen2ForCausalLM(tiny).save_pretrained(model)
    chosen: dict[str, Any] = {
        "path": str(model),
        "backend": backend,
        "experiment_name": "test",
        "trial_name": "test",
        "dtype": "float32",
        "attn_impl": "sdpa",
        "gradient_checkpointing": False,
        "optimizer": OptimizerConfig(lr=1e-2),
        "ppo_n_minibatches": 1,
        "kl_ctl": 0.0,
        "reward_clip": math.inf,
    }
    return PPOActorConfig(**(chosen | settings))


def actor(
    folder: Path,
    normalizer: ClusterNormalizer | None = None,
    kind: type[Any] = Actor,
    **settings: Any,
) -> Any:
    """An actor as AReaL's trainer makes it, around a normalizer if one is given."""
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        os.environ |= {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
    folder.mkdir(exist_ok=True)
    made = kind(config(folder, **settings))
    if normalizer is not None:
        made.histories = Adapter(normalizer)
    made.create_process_group()
    made.initialize(None, FinetuneSpec(1, 8, 8))
    return made


def group(rewards: Sequence[float | None], **more: Any) -> dict[str, Any]:
    """Samples of one prompt; None is a reward that is missing."""
    size = len(rewards)
    generated = torch.tensor([[0] * PROMPT + [1] * (TOKENS - PROMPT)] * size)
    return {
        "input_ids": torch.arange(3, 3 + TOKENS).repeat(size, 1),
        "attention_mask": torch.ones(size, TOKENS, dtype=torch.bool),
        "loss_mask": generated,
        "logprobs": torch.full((size, TOKENS), -4.0),
        "versions": torch.zeros(size, TOKENS, dtype=torch.int32),
        "rewards": torch.tensor([math.nan if r is None else r for r in rewards]),
        **more,
    }


def groups(
    rewards: Sequence[float | None], clusters: Sequence[int | str], size: int
) -> list[dict[str, Any]]:
    """What the rollouts of a step come to the actor as."""
    found: list[dict[str, Any]] = []
    for start in range(0, len(rewards), size):
        ids = clusters[start : start + size]
        one = ids[0] if len(set(ids)) == 1 else list(ids)
        found.append(group(rewards[start : start + size], cluster_id=one))
    return found


def advantages(made: Any, batch: Sequence[dict[str, Any]]) -> list[float]:
    """A step's advantages [N], which are the same at all tokens of a sample."""
    found: list[float] = []
    for rows in made.compute_advantages(batch):
        assert "cluster_id" not in rows
        trained = rows["advantages"][rows["loss_mask"].bool()].reshape(-1, TOKENS - PROMPT)
        assert (trained == trained[:, :1]).all()
        found += trained[:, 0].tolist()
    made.set_version(made.get_version() + 1)
    return found


def meta(folder: Path) -> SaveLoadMeta:
    """Of a checkpoint that a run is recovered from."""
    return SaveLoadMeta(str(folder), "dcp", True, None, None, None)


def length(prompt: str, completion: str, prompt_ids: Any, completion_ids: Any, **row: Any) -> float:
    """A reward function, as AReaL calls it."""
    return float(len(completion_ids))
