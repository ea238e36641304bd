"""SkyRL's trainer in this process, made from its own settings, around workers without weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from skyrl.train.dataset import PromptDataset
from skyrl.train.generators.utils import prepare_generator_input
from skyrl.train.trainer import RayPPOTrainer
from skyrl.utils.tok import get_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast
from with_skyrl.cpu_skyrl import Dispatch, output

from pgrpo.integrations.skyrl import personalize, read_settings

WORDS = 40
SIZE = 4


def prepare(folder: Path, rows: Sequence[tuple[Any, float | None]]) -> None:
    """A tokenizer and a data set: a cluster in each row, and what the generator scales rewards by."""
    names = ["<pad>", "<eos>", *(f"w{i}" for i in range(WORDS))]
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(folder / "model")
    LlamaConfig(vocab_size=len(names)).save_pretrained(folder / "model")
    Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"w{i % WORDS}"}],
                "env_class": "none",
                "cluster_id": cluster,
                "extra_info": {"user": cluster},
                "scale": scale,
                "row": i,
            }
            for i, (cluster, scale) in enumerate(rows)
        ]
    ).to_parquet(folder / "rows.parquet")


def arguments(folder: Path, *more: str) -> list[str]:
    """Of SkyRL and of pgrpo, as the documentation has them."""
    return [
        "trainer.algorithm.advantage_estimator=grpo",
        "trainer.algorithm.policy_loss_type=rollout_is",  # needs no log-probabilities of the policy
        f"trainer.policy.model.path={folder}/model",
        f"trainer.ckpt_path={folder}/ckpt",
        f"trainer.export_path={folder}/export",
        f"trainer.log_path={folder}/log",
        f"data.train_data=['{folder}/rows.parquet']",
        f"data.val_data=['{folder}/rows.parquet']",
        "data.dataloader.num_workers=0",
        "data.dataloader.persistent_workers=false",
        f"generator.n_samples_per_prompt={SIZE}",
        f"generator.eval_n_samples_per_prompt={SIZE}",
        "trainer.train_batch_size=2",
        "trainer.policy_mini_batch_size=2",
        "trainer.eval_batch_size=2",
        "trainer.epochs=1",
        "trainer.logger=console",
        "generator.inference_engine.enable_ray_prometheus_stats=false",  # there is no vLLM
        "trainer.placement.colocate_all=false",
        "trainer.placement.policy_num_gpus_per_node=1",
        "trainer.placement.ref_num_gpus_per_node=1",
        *more,
    ]


def trainer(
    folder: Path,
    *more: str,
    kind: type = personalize(RayPPOTrainer),  # noqa: B008  # one class for all
    data_parallel: int = 1,
) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "rows.parquet").exists():
        prepare(folder, [("a", 1.0), ("b", 10.0)])
    settings: Any = read_settings(arguments(folder, *more))
    tokenizer = get_tokenizer(settings.trainer.policy.model.path, padding_side="left")
    rows = PromptDataset(settings.data.train_data, tokenizer, max_prompt_length=64, num_workers=1)
    make: Any = kind
    made = make(settings, None, tokenizer, rows, None, None)
    made.dispatch = Dispatch(data_parallel)
    return made


class Table(list[dict[str, Any]]):
    """Rows as SkyRL's data set reads them, of types that no file has in one column."""

    def __getitem__(self, place: Any) -> Any:
        return dict(super().__getitem__(place))


def give(made: Any, clusters: Sequence[Any]) -> None:
    """A data set of as many rows as there are clusters."""
    made.train_dataset.dataframe = Table(
        {"prompt": [{"role": "user", "content": "w1"}], "cluster_id": cluster}
        for cluster in clusters
    )


def computed(
    made: Any, rewards: Sequence[float | None], rows: Sequence[int], turns: int = 1
) -> Any:
    """A batch with advantages, on SkyRL's way from rows of its data set and their rollouts' rewards."""
    made.cfg.trainer.train_batch_size = made.cfg.trainer.policy_mini_batch_size = len(rows)
    prompts = made.train_dataset.collate_fn([made.train_dataset[row] for row in rows])
    given, uids = prepare_generator_input(prompts, SIZE, {}, "none", "train", 1)
    values = [math.nan if reward is None else reward for reward in rewards]
    # Of earlier turns than the last SkyRL reads no reward.
    steps = [value if turn == turns - 1 else 9.0 for value in values for turn in range(turns)]
    found = output(steps, [each for each in given["trajectory_ids"] for _ in range(turns)])
    if made.cfg.generator.step_wise_trajectories:
        found["is_last_step"] = ([False] * (turns - 1) + [True]) * len(values)
    uids = [uid for uid in uids for _ in range(turns)]
    batch = made.convert_to_training_input(*made.postprocess_generator_output(found, uids))
    batch["values"] = None
    return made.compute_advantages_and_returns(batch)


def advantages(batch: Any) -> list[float]:
    """Of each response, the same at each of its tokens."""
    found: list[float] = []
    number = len(batch["advantages"]) - batch.metadata.get("pad_size", 0)
    for row, mask in zip(batch["advantages"][:number], batch["response_mask"], strict=False):
        values = set(row[mask.bool()].tolist())
        assert len(values) == 1
        found += values
    return found
