"""What several tests share: small real models of families people train, and tiny runs."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
from chat_server import Answer, Server

# Before transformers is imported, which reads it then.
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from pgrpo.cli import main
from pgrpo.clusters.division import divide
from pgrpo.clusters.given import Column
from pgrpo.clusters.membership import Membership
from pgrpo.model.attention import ATTENTION
from pgrpo.model.language_model import LanguageModel
from pgrpo.types import ClusterId, Dataset, Example, Group, Rollout

# Tiny tensors gain nothing from threads, and lose much when the machine is shared.
torch.set_num_threads(1)

VOCAB = 97
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    # SmolLM2 is a Llama with tied embeddings.
    "smollm2": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
    "gemma": (GemmaConfig, GemmaForCausalLM, {}),
    # Sliding windows in every other layer, capped scores and capped logits.
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, {"sliding_window": 4}),
}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, VOCAB)}}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def tiny_model(family: str, seed: int = 0, precision: str = "fp32") -> LanguageModel:
    config_class, model_class, extra = FAMILIES[family]
    torch.manual_seed(seed)
    config = config_class(**SHAPE, **extra)
    model: PreTrainedModel = model_class._from_config(config, attn_implementation=ATTENTION)
    # The usual initialisation is so small that all logits are nearly equal; errors would hide.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4)
    return LanguageModel(model.eval(), tiny_tokenizer(), precision)


@pytest.fixture(params=list(FAMILIES))
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return tiny_model(request.param)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Server]]:
    """Starts chat endpoints."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    servers: list[Server] = []

    def start(answer: Callable[[str, int], Answer], refuses: str | None = None) -> Server:
        servers.append(Server(answer, refuses))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def naive_truncated(
    logs: np.ndarray, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> np.ndarray:
    """Log-probabilities [V] after vLLM's steps, one token at a time in float64; -inf of what is cut."""
    p = np.exp(np.asarray(logs, np.float64))
    kept = {i: float(p[i]) for i in range(len(p)) if p[i] >= min_p * p.max()}
    if top_k:
        least = sorted(kept.values(), reverse=True)[:top_k][-1]
        kept = {i: value for i, value in kept.items() if value >= least}
    total, reached, least = sum(kept.values()), 0.0, 0.0
    for value in sorted(kept.values(), reverse=True):
        if reached < top_p * total:
            reached, least = reached + value, value
    kept = {i: value for i, value in kept.items() if value >= least}
    result = np.full(len(p), -np.inf)
    for i, value in kept.items():
        result[i] = np.log(value / sum(kept.values()))
    return result


def grouped(
    rollouts: Sequence[Rollout],
    advantages: Sequence[float] | np.ndarray | None = None,
    rewards: Sequence[float] | np.ndarray | None = None,
) -> list[Group]:
    """Rollouts of which those of a group stand together, as groups."""
    unknown = np.full(len(rollouts), np.nan)
    given, wanted = (np.asarray(unknown if a is None else a, float) for a in (rewards, advantages))
    places: dict[int, list[int]] = {}
    for place, rollout in enumerate(rollouts):
        places.setdefault(rollout.group_id, []).append(place)
    return [
        Group(tuple(rollouts[i] for i in members), given[members], wanted[members])
        for members in places.values()
    ]


def members(cluster_of: Mapping[str, ClusterId]) -> Membership:
    """Users who belong to these clusters."""
    rows = [Example("", user, {"cluster": cluster}) for user, cluster in cluster_of.items()]
    users = {user: np.empty(0) for user in cluster_of}
    return Membership(divide(Column(Column.Config(column="cluster")), Dataset(rows, [], users, ())))


# Runs of a second or two, through the command line.

Tree = dict[str, Any]

TINY_RUN: Tree = {
    "run": {
        "num_steps": 4,
        "prompts_per_step": 4,
        "num_threads": 1,
        "trackers": [],
        "checkpoint_every": 1,
        "eval_every": 2,
        "eval_prompts": 8,
    },
    "model": {"name": "tiny", "precision": "fp32"},
    "data": {"name": "personas", "num_examples": 64, "words": 2},
    "clustering": {"name": "kmeans", "num_clusters": 3},
    "rewards": [{"name": "persona"}],
    "generation": {"group_size": 2, "max_new_tokens": 3},
    "optimizer": {"learning_rate": 5e-3},
}


def tiny_run(changes: Mapping[str, Any] | None = None) -> Tree:
    """Settings of a tiny run; `{"run.num_steps": 3, "data": {...}}` replaces some of them."""
    return changed(copy.deepcopy(TINY_RUN), changes or {})


def changed(tree: Tree, changes: Mapping[str, Any]) -> Tree:
    """The tree itself, with some settings replaced."""
    for key, value in changes.items():
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def write_config(folder: Path, changes: Mapping[str, Any] | None = None) -> Path:
    """The settings of `tiny_run` as a TOML file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.toml"
    path.write_text(tomli_w.dumps(tiny_run(changes)), encoding="utf-8")
    return path


def train(folder: Path, changes: Mapping[str, Any] | None = None) -> Path:
    """A whole tiny run in this process; returns its folder."""
    assert main(["train", str(write_config(folder, changes)), "--out", str(folder / "run")]) == 0
    return folder / "run"


def install_plugin(site: Path, source: str) -> None:
    """Install a distribution `my-plugin` into a folder that is on sys.path."""
    sys.modules.pop("my_plugin", None)
    info = site / "my_plugin-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "my_plugin.py").write_text(source, encoding="utf-8")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[pgrpo]\nentry = my_plugin\n")


PEAK = """
from pgrpo.plugins import hookimpl

REWARDS = [0.9, 0.2, 0.1, 0.1, 0.2, 0.7, 0.7]

def peak(rollouts):
    '''By the updates that the policy has seen: the best is that of step 5, and step 1 was it before.'''
    return [REWARDS[rollout.policy_version] for rollout in rollouts]

@hookimpl
def pgrpo_register_rewards(register):
    register("peak", peak)
"""

WITH_PEAK: Tree = {
    "evaluation": [{"name": "peak"}],
    "run.keep_best": True,
    "run.num_steps": 6,
    "run.checkpoint_every": 3,
    "run.eval_every": 1,
}
"""A run whose best step is not its last, with the plugin `PEAK`."""


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def trace(folder: Path) -> Tree:
    """All that a run computed: logs without timings and memory, weights, optimizer, histories."""

    def records(name: str) -> list[Tree]:
        lines = (folder / name).read_text("utf-8").splitlines()
        return [json.loads(line) for line in lines]

    metrics = records("metrics.jsonl")
    for record in metrics:
        del record["timing_s"], record["peak_memory_bytes"]
    *_, last = sorted((folder / "checkpoints").glob("step-*"))
    # Their order in a file is anybody's.
    weights = {
        (path.relative_to(last).as_posix(), name): (
            tensor.shape,
            tensor.reshape(-1).view(torch.uint8).numpy().tobytes(),
        )
        for path in sorted(last.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }
    return {
        "metrics": metrics,
        "samples": records("samples.jsonl"),
        "evaluations": records("evaluations.jsonl") if metrics else [],
        "checkpoint": last.name,
        "state": json.loads((last / "state.json").read_text("utf-8")),
        "weights": weights,
    }


def _command_in_child(arguments: Sequence[str], kill_at: int | None, folder: str) -> None:
    if kill_at is not None:
        seen = 0

        def kill(event: str, details: tuple[Any, ...]) -> None:
            # Python reports what it is about to do; libraries' own writes fall in between.
            nonlocal seen
            if event.startswith(("open", "os.", "shutil.")):
                met = any(isinstance(d, str | Path) and str(d).startswith(folder) for d in details)
                seen += met
                if met and seen == kill_at:
                    os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))

        sys.addaudithook(kill)
    sys.exit(main(arguments))


# A shell has what it starts in the background ignore Ctrl-C, which some tests send.
signal.signal(signal.SIGINT, signal.default_int_handler)

processes = multiprocessing.get_context(None if sys.platform == "win32" else "forkserver")
# Children are forked from a process that has imported everything, so that they start at once.
processes.set_forkserver_preload(
    [
        "pgrpo.experiments.compare",
        "peft",
        "pytest",
        "sklearn.cluster",
        *(model_class.__module__ for _, model_class, _ in FAMILIES.values()),
    ]
)


def start(*arguments: object, kill_at: int | None = None, folder: Path | None = None) -> Any:
    """`pgrpo ARGUMENTS` in a process of its own; it kills itself before its `kill_at`th operation on
    a path that starts with `folder`."""
    command = [str(argument) for argument in arguments]
    process = processes.Process(target=_command_in_child, args=(command, kill_at, str(folder)))
    process.start()
    return process
