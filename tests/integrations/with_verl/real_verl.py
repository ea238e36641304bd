"""verl's synchronous trainer on a local Ray: its config, TransferQueue and advantage step.

Its workers (actor, rollout) want GPUs, so responses are put into the queue as its agent loops put them,
and the trainer's own `_compute_advantage` takes them out.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import ray
import torch
import transfer_queue as tq
from hydra import compose, initialize_config_module
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.padding_utils import upsample_batch_to_divisible_size
from verl.trainer.ppo.v1 import get_trainer_cls
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from pgrpo import ClusterNormalizer

MOST_TOKENS = 5


def config(folder: Path, *overrides: str) -> Any:
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose(
            "ppo_trainer",
            overrides=[
                "algorithm.adv_estimator=pgrpo",
                "trainer.v1.trainer_mode=pgrpo_sync",
                f"trainer.default_local_dir={folder}",
                *overrides,
            ],
        )


@cache
def start() -> None:
    """Ray and the queue, once for all tests."""
    if ray.is_initialized():
        # By this module under its other name, for the suite imports it as one of a package.
        return
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=200 * 2**20)
    settings = config(Path())
    settings.transfer_queue.enable = True
    settings.transfer_queue.backend.SimpleStorage.num_data_storage_units = 1
    tq.init(settings.transfer_queue)


class Worker:
    """Stands where verl's groups of workers do in its checkpoints; they have no weights here."""

    def save_checkpoint(self, path: str, *_: Any, **__: Any) -> None:
        Path(path).mkdir(parents=True)

    def load_checkpoint(self, **_: Any) -> None:
        return


class Loader:
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state == {}


def trainer(folder: Path, options: ClusterNormalizer | None = None, *overrides: str) -> Any:
    start()
    settings = config(folder, *overrides)
    made: Any = get_trainer_cls(settings.trainer.v1.trainer_mode)(settings)
    if options is not None:
        made.histories.normalizer = options
    made.actor_rollout_wg, made.train_dataloader = Worker(), Loader()
    made._shutdown_dump_executor = lambda: None
    made.global_steps = 0
    return made


def put(
    rewards: Sequence[float | None],
    clusters: Sequence[int | str] | None,
    size: int,
    turns: int = 1,
    multiple: int = 1,
) -> KVBatchMeta:
    """Responses in the queue: every `size` of them are sessions of one prompt. verl fills them up to a
    multiple of `multiple`."""
    keys: list[str] = []
    tags: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    uid = ""
    for place, reward in enumerate(rewards):
        if place % size == 0:
            uid = str(uuid.uuid4())
        for turn in range(turns):
            tokens = 1 + (place + turn) % MOST_TOKENS
            scores = torch.zeros(tokens)
            scores[-1] = math.nan if reward is None else reward
            row: dict[str, Any] = {
                "uid": uid,
                "rm_scores": scores,
                "response_mask": torch.ones(tokens).long(),
                "position_ids": torch.arange(tokens),
                "extra_info": {"index": place},
            }
            if clusters is not None:
                row["cluster_id"] = clusters[place]
                row["extra_info"]["user"] = clusters[place]
            keys.append(f"{uid}_{place % size}_{turn}")
            tags.append({"seq_len": tokens})
            rows.append(row)
    fields: TensorDict = list_of_dict_to_tensordict(rows)
    tq.kv_batch_put(keys=keys, partition_id="train", fields=fields, tags=tags)
    return upsample_batch_to_divisible_size(
        KVBatchMeta(keys=keys, tags=tags, partition_id="train"), multiple, eos_token_id=1
    )


def taken(batch: KVBatchMeta, clear: bool = True) -> list[list[float]]:
    """The advantages of each response's tokens that verl's actor would get."""
    data = tq.kv_batch_get(keys=batch.keys, partition_id="train", select_fields=["advantages"])
    found = [row.tolist() for row in data["advantages"].unbind()]
    with suppress(RuntimeError):
        if clear:
            tq.kv_clear(keys=batch.keys, partition_id="train")
    return found
