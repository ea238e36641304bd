"""OpenRLHF without a GPU: what stands where its policy and its vLLM engines do.

Its trainers, loops, data sets, generator of samples, experience maker, groups of actors and DeepSpeed's
checkpoints are its own. As a script, it is `python -m pgrpo.integrations.openrlhf` with them.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import ray
import torch
from openrlhf.trainer.ray.launcher import BaseModelActor

HERE = Path(__file__).parent.parent

TOKENS = 3
"""Of a response."""


def start_ray() -> None:
    """Room for OpenRLHF's actors, which ask for GPUs and never use one here."""
    ray.init(
        num_cpus=16,
        num_gpus=4,
        include_dashboard=False,
        object_store_memory=200 * 2**20,
        runtime_env={"env_vars": {"PYTHONPATH": str(HERE)}},
    )


@ray.remote
class Policy(BaseModelActor):
    """A policy of one weight, whose checkpoints OpenRLHF has DeepSpeed write and read."""

    def init_model_from_pretrained(self, strategy: Any, *_: Any) -> None:
        import deepspeed

        torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]
        self.strategy = strategy
        self.folder = Path(strategy.args.ckpt.path) / "_actor"
        if not torch.distributed.is_initialized():
            deepspeed.init_distributed(dist_backend="gloo")
        weight = torch.nn.Linear(1, 1)
        self.engine, *_rest = deepspeed.initialize(
            model=weight,
            optimizer=torch.optim.SGD(weight.parameters(), lr=0.1),
            config={"train_batch_size": 1},
        )
        self.states: dict[str, Any] = {}
        self.appended: list[Any] = []
        if strategy.args.ckpt.load_enable and self.folder.exists():
            _, self.states = strategy.load_ckpt(self.engine, str(self.folder))

    def forward(self, action_mask: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.zeros(action_mask.shape)

    def empty_cache(self) -> None: ...

    def append(self, experience: Any) -> None:
        self.appended.append(experience)

    def fit(self, kl_ctl: float) -> dict[str, float]:
        self.appended.clear()
        return {"policy_loss": 0.0}

    def broadcast_to_vllm(self) -> None: ...

    def save_checkpoint(
        self, tag: str, client_states: Any = None, metric_value: Any = None, metric_key: Any = None
    ) -> None:
        self.strategy.save_ckpt(
            self.engine,
            str(self.folder),
            tag,
            client_state=client_states,
            metric_value=metric_value,
            metric_key=metric_key,
        )

    def get_checkpoint_states(self) -> dict[str, Any]:
        return self.states

    def save_model(self) -> None: ...


@ray.remote
class Engine:
    """Answers prompts with chance words, and each with its reward: the label's `scale` times a draw.

    A label whose scale is None gives rewards that are NaN.
    """

    def get_num_unfinished_requests(self) -> int:
        return 0

    def generate_responses(
        self, prompt: str, label: Any, num_samples: int, **_: Any
    ) -> list[dict[str, Any]]:
        draws = random.Random(prompt)
        scale = label["scale"]
        return [
            response(
                prompt, label, float("nan") if scale is None else round(scale * draws.random(), 3)
            )
            for _sample in range(num_samples)
        ]


def response(prompt: str, label: Any, reward: float, tokens: int = TOKENS) -> dict[str, Any]:
    """As OpenRLHF's agents return it."""
    return {
        "prompt": prompt,
        "label": label,
        "observation_tokens": [2, 3, *range(2, 2 + tokens)],
        "action_ranges": [(2, 2 + tokens)],
        "rollout_log_probs": None,
        "truncated": False,
        "reward": reward,
        "scores": reward,
        "extra_logs": {},
    }


def main() -> None:
    """OpenRLHF as a user starts it, without a GPU."""
    import openrlhf.trainer.ray
    import openrlhf.trainer.ray.ppo_actor

    from pgrpo.integrations.openrlhf import main as start

    start_ray()
    openrlhf.trainer.ray.create_vllm_engines = lambda number, *_, **__: [
        Engine.remote() for _engine in range(number)
    ]
    openrlhf.trainer.ray.ppo_actor.PolicyModelActor = Policy
    start()


if __name__ == "__main__":
    from with_openrlhf import (
        cpu_openrlhf,
    )  # by its name, for of what is in __main__ Ray's processes know nothing

    cpu_openrlhf.main()
