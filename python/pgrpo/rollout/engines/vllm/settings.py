"""The section `[generation.vllm]`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from pgrpo.config import Section

# Arguments of `vllm.LLM` that `options` may not hold: the engine relies on their values, they have a
# setting of their own, or they are secret.
_NO_VLLM_OPTIONS = frozenset(
    {
        *(
            "model",
            "revision",
            "tokenizer",
            "skip_tokenizer_init",
            "load_format",
            "generation_config",
        ),
        *("logprobs_mode", "max_logprobs", "seed", "weight_transfer_config", "enable_lora"),
        *("dtype", "tensor_parallel_size", "data_parallel_size", "block_size"),
        *("kv_cache_memory_bytes", "enable_sleep_mode", "api_key", "hf_token"),
    }
)


class VllmConfig(Section):
    """vLLM, in this process or served by others."""

    servers: list[str] = Field(default=[])
    """Addresses of `vllm serve` processes, such as `http://10.0.0.2:8000`, which `pgrpo serve`
    starts with what they need; without any, vLLM runs in this process."""
    api_key_env: str = Field(default="VLLM_API_KEY", pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """Environment variable with the servers' API key; without it none is sent."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Weights and computation of vLLM; `auto` is fp32 where the trainer computes in fp32, else bf16."""
    transfer: Literal["auto", "file", "nccl", "ipc"] = "auto"
    """How weights get to other processes: through a file that both can see, NCCL between GPUs, or
    shared memory of one GPU. `auto` is nccl where the trainer is on a GPU, else file. Within a
    process they are handed over directly."""
    transfer_folder: str | None = None
    """Absolute path of that file's folder, for servers on other machines one they share; without it a
    temporary folder, in memory where the system has one."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """GPUs that hold one copy of the model together."""
    data_parallel_size: int = Field(default=1, ge=1)
    """Copies of the model behind each server."""
    kv_cache_gib: float = Field(default=2.0, gt=0)
    """Memory for keys and values of one copy of the model."""
    block_size: int = Field(default=32, ge=16, multiple_of=16)
    """Tokens of a block of keys and values. Prompts share whole blocks only."""
    sleep: bool = True
    """On a GPU, in the synchronous pipeline: give the memory of vLLM's weights, keys and values to the
    update."""
    probe_every: int = Field(default=20, ge=1)
    """Every so many weight updates, and after the first three, vLLM's log-probabilities are compared
    with the trainer's; a mismatch stops the run."""
    probe_tolerance: float | None = Field(default=None, gt=0)
    """Mean absolute difference, in nats, that passes; without it 1e-3 where both compute in fp32,
    else 0.2."""
    timeout_s: float = Field(default=600.0, gt=0)
    """Seconds a request to a server may take, or that this process may go without a finished group."""
    retry_s: float = Field(default=120.0, ge=0)
    """Seconds for which servers that do not answer are tried again before the run stops."""
    options: dict[str, Any] = Field(default={})
    """Further arguments of `vllm.LLM`, for example `enforce_eager = false`."""

    @model_validator(mode="after")
    def _check_values(self) -> VllmConfig:
        for url in self.servers:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError(
                    f"{url!r} is no server's address; expected one that begins with http:// or https://"
                )
            if parts.username is not None:
                raise ValueError(
                    "an address in servers holds credentials; they belong into the variable that "
                    "api_key_env names"
                )
        if len(set(self.servers)) < len(self.servers):
            raise ValueError("an address stands in servers twice")
        if self.transfer_folder is not None and not Path(self.transfer_folder).is_absolute():
            raise ValueError(
                f"transfer_folder is {self.transfer_folder!r}; expected an absolute path"
            )
        for name in self.options:
            if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
                raise ValueError(f"options.{name} is no argument's name")
        taken = sorted(_NO_VLLM_OPTIONS & self.options.keys())
        if taken:
            raise ValueError(f"options.{taken[0]} is not free: it is set from other settings")
        return self

    def inactive(self) -> set[str]:
        remote = {"api_key_env", "transfer", "data_parallel_size", "retry_s"}
        if not self.servers:
            # More GPUs of one copy are other processes, too.
            return remote if self.tensor_parallel_size > 1 else {*remote, "transfer_folder"}
        return {"sleep"} | (set() if self.transfer in ("auto", "file") else {"transfer_folder"})
