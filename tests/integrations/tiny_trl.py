"""TRL's trainer on a model of two layers and a data set of three clusters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from pgrpo import ClusterNormalizer
from pgrpo.integrations.trl import personalize

WORDS = 40


def model() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=WORDS + 2,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            pad_token_id=0,
            eos_token_id=1,
        )
    )


def tokenizer() -> Any:
    names = ["<pad>", "<eos>", *(f"w{i}" for i in range(WORDS))]
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def rows(number: int = 24) -> Any:
    return Dataset.from_list(
        [{"prompt": f"w{i % WORDS} w{i % 7}", "cluster_id": f"c{i % 3}"} for i in range(number)]
    )


def even_words(completions: list[str], cluster_id: list[str], **_: Any) -> list[float]:
    """How many words with even numbers: worth ten times as much to one cluster, and a shift more."""
    scale = {"c0": 1.0, "c1": 10.0, "c2": 1.0}
    return [
        scale[c] * sum(int(w[1:]) % 2 == 0 for w in text.split()) + 5 * (c == "c2")
        for text, c in zip(completions, cluster_id, strict=True)
    ]


def arguments(folder: Path, **settings: Any) -> GRPOConfig:
    usual: dict[str, Any] = {
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "max_steps": 6,
        "save_strategy": "no",
        "seed": 0,
    }
    return GRPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        **{**usual, **settings},
    )


def trainer(
    folder: Path,
    normalizer: ClusterNormalizer | None,
    rewards: Any = even_words,
    data: Any = None,
    base: type[Any] = GRPOTrainer,
    evaluation: Any = None,
    cluster_column: str = "cluster_id",
    **settings: Any,
) -> Any:
    """A trainer with pgrpo; plain TRL without a normalizer."""
    ours: dict[str, Any] = {}
    if normalizer is not None:
        base = personalize(base)
        ours = {"normalizer": normalizer, "cluster_column": cluster_column}
    return base(
        model=model(),
        processing_class=tokenizer(),
        reward_funcs=rewards,
        train_dataset=rows() if data is None else data,
        eval_dataset=evaluation,
        args=arguments(folder, **settings),
        **ours,
    )
