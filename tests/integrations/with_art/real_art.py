"""ART's own backend on a CPU, from groups of trajectories to packed tensors and checkpoints.

What trains on a GPU is a service behind the backend. Here an object stands for it that keeps the
tensors it is given, and writes the folder of a checkpoint without an adapter.
"""

from __future__ import annotations

import asyncio
import math
import shutil
from collections.abc import AsyncIterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import art
import numpy as np
from art.local import LocalBackend
from art.preprocessing.pack import packed_tensors_from_dir
from art.utils.get_model_step import get_step_from_dir
from openai.types.chat.chat_completion import Choice
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

backend: Any = import_module("art.local.backend")

PROMPT = 1
"""The token that all prompts are."""

FIRST = 10
"""The token that the first completion of a batch is; the next is the next."""


class Service:
    """Stands for the process that trains and generates."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen: list[Any] = []

    async def train(
        self, disk: Any, config: Any, dev_config: Any, verbose: bool
    ) -> AsyncIterator[dict[str, float]]:
        self.seen.append(packed_tensors_from_dir(**disk))
        step = get_step_from_dir(str(self.folder)) + 1
        (self.folder / "checkpoints" / f"{step:04d}").mkdir(parents=True)
        yield {"loss/train": 1.0}

    async def start_openai_server(self, config: Any) -> tuple[str, int]:
        return "127.0.0.1", 1

    async def register_lora_for_step(self, step: int, checkpoint_dir: str) -> None:
        return

    async def resolve_global_grad_accumulation_sequences(self, config: Any) -> int:
        return 1


def tokenizer(folder: Path) -> Path:
    """A folder with a tokenizer of single words."""
    words = {f"w{i}": i for i in range(200)}
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")),
        eos_token="w2",
        chat_template="{{ messages }}",
    )
    made.save_pretrained(str(folder))
    return folder


class Loop:
    """A model registered with a backend, as ART's examples do."""

    def __init__(self, folder: Path, kind: type[Any] = LocalBackend, **settings: Any) -> None:
        self.backend = kind(path=str(folder / "art"), **settings)
        self.model = art.TrainableModel(
            name="tiny",
            run_name="tiny",
            project="test",
            base_model=str(tokenizer(folder / "tokenizer")),
            _internal_config={"init_args": {"max_seq_length": 64}},
        )
        self.folder = folder / "art" / "test" / "models" / "tiny"
        self.service = Service(self.folder)
        self.backend._services[self.backend._model_storage_key(self.model)] = self.service
        self.register()

    def register(self) -> None:
        asyncio.run(self.model.register(self.backend))

    def train(self, groups: Sequence[Any], **settings: Any) -> Any:
        return asyncio.run(self.backend.train(self.model, groups, **settings))

    def packed(self) -> dict[int, float]:
        """Advantages of the completions of the last batch, by their number."""
        last = self.service.seen[-1]
        kept = (last[name][last["assistant_mask"]].tolist() for name in ("tokens", "advantages"))
        return {token - FIRST: advantage for token, advantage in zip(*kept, strict=True)}

    def advantages(self, batch: Sequence[Any], **settings: Any) -> dict[int, float]:
        """Train on a batch; the advantages that ART packs, before it divides them by their size."""
        given: dict[int, float] = {}
        pack = backend.packed_tensors_from_tokenized_results

        def packing(results: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
            given.update({r.token_ids[-1] - FIRST: r.advantage for r in results})
            return pack(results, *args, **kwargs)

        backend.packed_tensors_from_tokenized_results = packing
        try:
            self.train(batch, **settings)
        finally:
            backend.packed_tensors_from_tokenized_results = pack
        if given:
            size = np.abs(list(given.values())).mean()
            trained = self.packed()
            assert trained.keys() == given.keys()
            found = [trained[number] * size for number in given]
            np.testing.assert_allclose(found, list(given.values()), rtol=1e-5)
        return given

    def save(self, folder: Path) -> None:
        shutil.copytree(self.folder / "checkpoints", folder / "checkpoints")

    def load(self, folder: Path) -> None:
        """What a run finds that begins after that checkpoint."""
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        shutil.copytree(folder / "checkpoints", self.folder / "checkpoints")
        self.register()


def groups(
    rewards: Sequence[float | None], clusters: Sequence[int | str] | None, size: int
) -> list[Any]:
    """Groups of trajectories that vLLM might have given; None is a reward that is missing."""
    found: list[Any] = []
    for start in range(0, len(rewards), size):
        rows = range(start, min(start + size, len(rewards)))
        names = None if clusters is None else [clusters[row] for row in rows]
        trajectories = [
            art.Trajectory(
                messages_and_choices=[{"role": "user", "content": "w1"}, choice(row)],
                reward=math.nan if (given := rewards[row]) is None else given,
                metadata={} if names is None or len(set(names)) == 1 else {"cluster_id": name},
            )
            for row, name in zip(rows, names or [0] * size, strict=True)
        ]
        # The group's own is what trajectories without one are of.
        metadata = {"day": 3} if names is None else {"day": 3, "cluster_id": names[0]}
        found.append(art.TrajectoryGroup(trajectories, metadata=metadata))
    return found


def choice(number: int) -> Choice:
    """A completion of one token, which tells which it is."""
    token = FIRST + number
    logprob = {"token": f"token_id:{token}", "logprob": -1.0, "top_logprobs": []}
    return Choice.model_validate(
        {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": f"w{token}"},
            "logprobs": {"content": [logprob], "refusal": None},
            "prompt_token_ids": [PROMPT],
            "token_ids": [token],
        }
    )
