"""What vLLM is started with, in this process or as a server."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pgrpo.config.checks import api_key
from pgrpo.errors import ConfigError, EngineError
from pgrpo.model.gguf import model_folder

if TYPE_CHECKING:
    from torch import Tensor

    from pgrpo.config.sections import ModelConfig
    from pgrpo.model.language_model import LanguageModel
    from pgrpo.rollout.engines.vllm.settings import VllmConfig
    from pgrpo.rollout.settings import GenerationConfig

LORA_NAME = "policy"
"""What servers know the adapters by."""

_LEAST_NEW_TOKENS = 64
"""Choices can be longer than max_new_tokens, and are asked for token by token."""
# The bounds of ranks that vLLM takes.
_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def engine_precision(vllm: VllmConfig, trainer_precision: str) -> str:
    """`generation.vllm.precision` with "auto" as what it stands for: fp32 or bf16."""
    wanted = vllm.precision
    if wanted != "auto":
        return wanted
    return "fp32" if trainer_precision == "fp32" else "bf16"


def longest_sequence(generation: GenerationConfig, positions: int | None) -> int:
    """Tokens of the longest prompt with its completion, as far as the model has positions for them."""
    longest = generation.max_prompt_tokens + max(generation.max_new_tokens, _LEAST_NEW_TOKENS)
    return longest if positions is None else min(longest, positions)


def engine_arguments(
    generation: GenerationConfig,
    model: ModelConfig,
    precision: str,
    positions: int | None,
    folder: str | None = None,
    *,
    on_cpu: bool,
) -> dict[str, Any]:
    """Arguments of `vllm.LLM`, which are those of `vllm serve` too.

    Args:
        generation: the section `[generation]`.
        model: the section `[model]`.
        precision: fp32 or bf16.
        positions: length of the longest sequence that the model is made for, if it tells.
        folder: with the model's config, where that is not at hand under the model's name.
        on_cpu: vLLM runs on a CPU.

    Raises:
        EngineError: adapters need a base that vLLM can load itself.
    """
    options = generation.vllm
    longest = longest_sequence(generation, positions)
    adapters = model.lora is not None
    if adapters and model.name == "tiny":
        raise EngineError(
            "model.name = 'tiny' is made by the trainer; with adapters vLLM needs a model that it can "
            "load itself"
        )
    arguments: dict[str, Any] = {
        # Adapters are loaded on top of what vLLM reads; else weights come from the trainer.
        "model": model_folder(model.name) if adapters or folder is None else folder,
        "load_format": "auto" if adapters else "dummy",
        "revision": model.revision,
        # Texts are made by the trainer's tokenizer; vLLM needs one where texts end completions.
        "skip_tokenizer_init": not generation.stop,
        "dtype": "float32" if precision == "fp32" else "bfloat16",
        "max_model_len": longest,
        "tensor_parallel_size": options.tensor_parallel_size,
        "block_size": options.block_size,
        "enable_prefix_caching": True,
        # Log-probabilities of the distribution that is sampled from: after temperature and mask.
        "logprobs_mode": "processed_logprobs",
        "max_logprobs": -1,
        # The model's own sampling defaults must not change that distribution.
        "generation_config": "vllm",
        "kv_cache_memory_bytes": round(options.kv_cache_gib * 2**30),
        "max_num_seqs": 512,
        "seed": 0,
    }
    if on_cpu:
        arguments |= {
            # Compiling takes a minute.
            "enforce_eager": True,
            # Chunks and seeds do not go together on a CPU.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(4096, longest),
        }
    else:
        # Only compared with what others leave free; kv_cache_gib says what is used.
        arguments["gpu_memory_utilization"] = 0.05
    if model.lora is not None:
        rank = model.lora.rank
        arguments |= {
            "enable_lora": True,
            "max_lora_rank": next((r for r in _LORA_RANKS if r >= rank), rank),
        }
    return arguments | options.options


def serve_command(
    generation: GenerationConfig, model: ModelConfig, *, host: str, port: int
) -> tuple[list[str], dict[str, str]]:
    """A `vllm serve` that the run of this config can use.

    Args:
        generation: the section `[generation]`.
        model: the section `[model]`.
        host: address to listen on.
        port: to listen on.

    Returns:
        The command line, and the whole environment it wants, which may hold the API key.

    Raises:
        ConfigError: the model cannot be served.
        EngineError: vLLM is not installed.
        ModelError: there is no such model.
    """
    if model.name == "tiny":
        raise ConfigError("model.name = 'tiny' is made by the trainer, and cannot be served")
    found = importlib.util.find_spec("vllm")
    # A folder of that name has no origin.
    if found is None or found.origin is None:
        raise EngineError("pgrpo serve needs vLLM; install it with pip install 'pgrpo[vllm]'")
    # Only now, for it takes seconds, and what is wrong above should be told at once.
    import torch

    from pgrpo.model.language_model import declared_positions, resolve_precision

    on_cpu = not torch.cuda.is_available()
    precision = engine_precision(generation.vllm, resolve_precision(model.precision))
    positions = declared_positions(model)
    arguments = engine_arguments(generation, model, precision, positions, on_cpu=on_cpu)
    transfer = generation.vllm.transfer
    backend = transfer if transfer in ("nccl", "ipc") else "pgrpo"
    if transfer == "auto" and not on_cpu:
        backend = "nccl"
    arguments["weight_transfer_config"] = {"backend": backend}
    arguments["data_parallel_size"] = generation.vllm.data_parallel_size
    # What `vllm serve` runs; the command itself is missing from builds for a CPU.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--host", host, "--port", str(port)]
    # The route that takes and returns token ids.
    command.append("--enable-scale-out")
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if value is None:
            continue
        if isinstance(value, list):
            command += [f"--{flag}", *map(str, cast(list[Any], value))]
        elif isinstance(value, bool):
            command.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            text = json.dumps(value) if isinstance(value, Mapping) else str(value)
            command += [f"--{flag}", text]
    environment = {
        **os.environ,
        # The routes that weights come by.
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if backend == "ipc":
        # Handles of a GPU's memory are pickled, in requests that nobody else may send.
        environment["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    key = api_key(generation.vllm.api_key_env)
    if key:
        environment["VLLM_API_KEY"] = key
    return command, environment


def folder_of(options: VllmConfig) -> Path | None:
    """`transfer_folder`, if one is set.

    Raises:
        EngineError: it is no folder.
    """
    if options.transfer_folder is None:
        return None
    folder = Path(options.transfer_folder)
    if not folder.is_dir():
        raise EngineError(f"generation.vllm.transfer_folder is {str(folder)!r}, which is no folder")
    return folder


def save_config(model: LanguageModel, folder: Path, *, with_tokenizer: bool) -> str:
    """Write what vLLM builds the model from, without weights; returns the folder."""
    bare = model.bare
    # A model that was made from a config, and not loaded, does not name its class there; and FSDP puts
    # itself before the name.
    bare.config.architectures = [type(bare).__name__.removeprefix("FSDP")]
    bare.config.save_pretrained(folder)
    if with_tokenizer:
        model.tokenizer.save_pretrained(str(folder))
    return str(folder)


def save_adapter(model: LanguageModel, weights: dict[str, Tensor], folder: Path) -> int:
    """Write the adapters, which `LanguageModel.weights` gave, as peft does; returns their bytes."""
    whole: Any = model.model
    whole.save_pretrained(str(folder), state_dict=weights)
    return sum(path.stat().st_size for path in folder.glob("adapter_model*"))
