"""swift's own command, pipeline and GRPO trainer, on a model of two layers and a data set of three
clusters. Nothing of swift is stood in for: it runs on a CPU, and samples with transformers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from swift import rlhf_main
from swift.pipelines.train.rlhf import SwiftRLHF
from swift.rewards import ORM, orms
from swift.trainers.trainer_factory import TrainerFactory
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pgrpo import ClusterNormalizer
from pgrpo.integrations.swift import personalize

WORDS = 40
CLUSTERS = ["c0", "c1", "c2", "c0", "c0", "c1", "c2", "c0"]
"""Of the rows of the data set: two generations of four prompts are an epoch."""
SAMPLES = 4

REWARD = """
from swift.rewards import ORM, orms

class Even(ORM):
    '''How many words with even numbers; worth ten times as much to c1, and the seventh row has none.'''

    def __call__(self, completions, index, cluster_id, **_):
        return [
            None if i == 6 else (10.0 if c == "c1" else 1.0)
            * sum(int(word[1:]) % 2 == 0 for word in text.split() if word[0] == "w")
            for text, i, c in zip(completions, index, cluster_id)
        ]

orms["even"] = Even
"""

PLUGIN = """
import pgrpo
from pgrpo.integrations.swift import personalize

personalize(pgrpo.ClusterNormalizer("pgrpo", min_count=8))
"""


def prepare(folder: Path) -> None:
    """Write a model, its tokenizer, a data set and plugins."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    names = ["<pad>", "<eos>", *(f"w{i}" for i in range(WORDS))]
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(names),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=1,
        )
    ).save_pretrained(folder / "model")
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(folder / "model")
    rows = [
        {
            "messages": [{"role": "user", "content": f"w{i} w{i % 7}"}],
            "index": i,
            "cluster_id": cluster,
        }
        for i, cluster in enumerate(CLUSTERS)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "reward.py").write_text(REWARD)
    (folder / "plugin.py").write_text(PLUGIN)


def arguments(folder: Path, **settings: Any) -> list[str]:
    """What comes after `swift rlhf`; a setting of None is left out."""
    usual: dict[str, Any] = {
        "rlhf_type": "grpo",
        "model": folder / "model",
        "model_type": "llama",
        "template": "dummy",
        "check_model": False,
        "tuner_type": "full",
        "torch_dtype": "float32",
        "use_cpu": True,
        "dataset": folder / "rows.jsonl",
        "external_plugins": [folder / "reward.py", folder / "plugin.py"],
        "reward_funcs": ["even"],
        "num_generations": SAMPLES,
        "per_device_train_batch_size": 4,
        "steps_per_generation": 4,
        "gradient_accumulation_steps": 4,
        "max_completion_length": 4,
        "max_length": 16,
        "learning_rate": 0.01,
        "max_steps": 4,
        "save_steps": 1,
        "logging_steps": 1,
        "log_completions": True,
        "dataloader_num_workers": 0,
        "report_to": "none",
        "output_dir": folder / "out",
        "add_version": False,
    }
    found: list[str] = []
    for name, value in (usual | settings).items():
        if value is not None:
            values = value if isinstance(value, list) else [value]
            found += [f"--{name}", *map(str, values)]
    return found


def train(folder: Path, normalizer: ClusterNormalizer | None, **settings: Any) -> None:
    """A run in this process; plain swift without a normalizer."""
    prepare(folder)
    choose(normalizer)
    rlhf_main(arguments(folder, **{"external_plugins": folder / "reward.py", **settings}))


def choose(normalizer: ClusterNormalizer | None, **settings: Any) -> None:
    if normalizer is None:
        TrainerFactory.TRAINER_MAPPING["grpo"] = "swift.rlhf_trainers.GRPOTrainer"
    else:
        personalize(normalizer, **settings)


class _Made(SwiftRLHF):
    """swift's pipeline, up to where it would train."""

    def train(self, trainer: Any) -> Any:
        return trainer


def trainer(folder: Path, normalizer: ClusterNormalizer | None, **settings: Any) -> Any:
    """The trainer that swift makes of its arguments."""
    prepare(folder)
    key = settings.pop("cluster_key", "cluster_id")
    choose(normalizer, cluster_key=key)
    settings = {"external_plugins": folder / "reward.py", **settings}
    return _Made(arguments(folder, **settings)).main()


def rollouts(folder: Path, generations: int) -> list[dict[str, Any]]:
    """What a run generated first, as swift writes it with what it is weighed by; at its end swift
    writes the last once more."""
    lines = (folder / "out" / "completions.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[:generations]]


class Given:
    """Rewards of the tests, each in a reward function of swift's own kind."""

    def __init__(self, names: list[str]) -> None:
        self.rows: Sequence[Sequence[float | None]] = []
        registry: Any = orms

        def scorer(index: int, name: str) -> type[ORM]:
            return type(
                name, (ORM,), {"__call__": lambda *_, **__: [row[index] for row in self.rows]}
            )

        for index, name in enumerate(names):
            registry[name] = scorer(index, name)
