"""What verl lacks to train on a CPU, put into its own registries: a platform and a rollout engine.

`VERL_USE_EXTERNAL_MODULES=cpu_verl` has verl import this in each of its processes. Its FSDP engine,
trainer, agent loops, rewards, queue and checkpoints are verl's own and run as they are.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import ray
import torch
from verl.plugin.platform import platform_manager
from verl.plugin.platform.platform_base import PlatformBase
from verl.workers.rollout import base as rollouts
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry, TokenOutput

DEVICE = "GPU"
"""What Ray calls a device, which it is told that there is one of."""


class CpuModule(ModuleType):
    """`torch.cpu`, with what verl asks of `torch.cuda` besides."""

    def __getattr__(self, name: str) -> Any:
        if name == "get_device_name":
            return lambda *_: "cpu"
        if name.startswith(("memory", "max_memory")):
            return lambda *_: 0
        if name == "mem_get_info":
            return lambda *_: (0, 0)
        if name in {
            "empty_cache",
            "manual_seed",
            "manual_seed_all",
            "set_rng_state",
            "ipc_collect",
        }:
            return lambda *_: None
        if name == "get_rng_state":
            return torch.get_rng_state
        return getattr(torch.cpu, name)


MODULE = CpuModule("torch_cpu")


class Cpu(PlatformBase):
    """One device without memory of its own."""

    @property
    def device_name(self) -> str:
        return "cpu"

    @property
    def vendor_name(self) -> str:
        return "none"

    @property
    def device_module(self) -> ModuleType:
        return MODULE

    def is_available(self) -> bool:
        return True

    def current_device(self) -> Any:
        return torch.device("cpu")

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None: ...

    def synchronize(self, device_index: int | None = None) -> None: ...

    def manual_seed(self, seed: int) -> None: ...

    def manual_seed_all(self, seed: int) -> None: ...

    def set_allocator_settings(self, settings: str) -> None: ...

    def empty_cache(self) -> None: ...

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return None, None

    def communication_backend_name(self) -> str:
        # A worker asks just before it makes its group for "cpu:gloo,<device>:<this>", which names this
        # device twice, and makes none where there is one.
        if "MASTER_ADDR" in os.environ and not torch.distributed.is_initialized():
            torch.distributed.init_process_group("cpu:gloo")
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CPU_VERL_DEVICES"

    def nvtx_range(self, msg: str) -> Any:
        return nullcontext()

    def profiler_start(self) -> None: ...

    def profiler_stop(self) -> None: ...

    def ray_resource_name(self) -> str:
        return DEVICE

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> None: ...


@ray.remote
class Server:
    """Samples token by token from the model that the actor sends."""

    def __init__(self, path: str, most_tokens: int) -> None:
        from transformers import AutoModelForCausalLM

        self.model: Any = AutoModelForCausalLM.from_pretrained(path)
        self.most_tokens = most_tokens
        self.global_steps = 0
        self.random = torch.Generator().manual_seed(0)

    def update(self, weights: dict[str, torch.Tensor], global_steps: int) -> None:
        self.model.load_state_dict(weights)
        self.global_steps = global_steps
        self.random.manual_seed(global_steps)

    @torch.no_grad()
    def generate(
        self, prompt_ids: list[int], sampling_params: dict[str, Any], **_: Any
    ) -> TokenOutput:
        ids, log_probs = list(prompt_ids), []
        for _token in range(self.most_tokens):
            logits = self.model(torch.tensor([ids])).logits[0, -1].float()
            chances = logits.log_softmax(-1)
            ids.append(int(torch.multinomial(chances.exp(), 1, generator=self.random)))
            log_probs.append(float(chances[ids[-1]]))
        return TokenOutput(
            token_ids=ids[len(prompt_ids) :],
            log_probs=log_probs,
            stop_reason="completed",
            extra_fields={"global_steps": self.global_steps},
        )

    def sleep(self) -> None: ...

    def wake_up(self) -> None: ...


class Replica(RolloutReplica):
    async def launch_servers(self) -> None:
        self._server_address = f"cpu_server_{self.replica_rank}"
        server: Any = Server
        self._server_handle = server.options(name=self._server_address, num_cpus=0).remote(
            self.model_config.path, self.config.response_length
        )
        self.servers = [self._server_handle]


class Rollout(BaseRollout):
    """The worker's end, which sends weights to the server."""

    async def resume(self, tags: list[str]) -> None: ...

    async def release(self) -> None: ...

    async def update_weights(
        self, weights: Any, wire_format: str = "named_tensors", **options: Any
    ) -> None:
        named = {name: tensor.detach().cpu() for name, tensor in weights}
        server = ray.get_actor("cpu_server_0")
        await asyncio.wrap_future(server.update.remote(named, options["global_steps"]).future())


platform_manager.set_platform(Cpu())
RolloutReplicaRegistry.register("cpu", lambda: Replica)
rollouts._ROLLOUT_REGISTRY["cpu", "async"] = "cpu_verl.Rollout"
