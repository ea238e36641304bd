"""SkyRL without a GPU: what stands where its workers and its inference engines do.

Its settings, data sets, loop, postprocessing, batches, padding, estimators and checkpoints are its own.
As a script, it is `python -m pgrpo.integrations.skyrl` with them, or SkyRL's `main_base` if it is told to
go on there.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from skyrl.train.dataset import PromptDataset
from skyrl.train.entrypoints import main_base
from skyrl.train.generators.base import GeneratorInterface

from pgrpo.integrations import skyrl as integration

TOKENS = 3
"""Of a response."""


class Dispatch:
    """Where SkyRL's groups of workers are: no weights, and nothing computed."""

    def __init__(self, data_parallel: int = 1) -> None:
        self.data_parallel = data_parallel

    def get_lcm_dp_size(self) -> int:
        return self.data_parallel

    def get_node_ids(self) -> list[str]:
        return []

    def get_timing_metrics(self) -> dict[str, float]:
        return {}

    def init_weight_sync_state(self, client: Any) -> None: ...

    async def save_weights_for_sampler(self) -> None: ...

    def empty_cache(self, model: str | None = None) -> None: ...

    def stage_data(self, model: str, data: Any, boundaries: list[tuple[int, int]]) -> list[Any]:
        assert data["advantages"].isfinite().all()
        return boundaries

    def forward_backward_from_staged(self, model: str, staged: Any) -> Any:
        return SimpleNamespace(metrics={"policy_loss": 0.0})

    def optim_step(self, model: str) -> None: ...

    def finalize_pending_saves(self, model: str) -> None: ...

    def save_checkpoint(self, model: str, path: str, tokenizer: Any) -> None:
        Path(path).mkdir(parents=True)

    def load_checkpoint(self, model: str, path: str, **_: Any) -> None:
        assert Path(path).is_dir()


class Generator(GeneratorInterface):
    """Answers with fixed tokens; its rewards are the row's `scale` times a draw, NaN without a scale."""

    async def generate(self, input_batch: Any) -> Any:
        draws = {extra["row"]: random.Random(extra["row"]) for extra in input_batch["env_extras"]}
        return output(
            [
                float("nan")
                if extra["scale"] is None
                else round(extra["scale"] * draws[extra["row"]].random(), 3)
                for extra in input_batch["env_extras"]
            ],
            input_batch["trajectory_ids"],
        )


def output(rewards: list[float], trajectory_ids: list[Any]) -> Any:
    """Of responses of one turn and different lengths, as SkyRL's generators return it."""
    lengths = [1 + place % TOKENS for place in range(len(rewards))]
    return {
        "prompt_token_ids": [[2, 3]] * len(rewards),
        "response_ids": [[4] * length for length in lengths],
        "rewards": rewards,
        "loss_masks": [[1] * length for length in lengths],
        "stop_reasons": ["stop"] * len(rewards),
        "rollout_metrics": None,
        "rollout_logprobs": [[-0.5] * length for length in lengths],
        "trajectory_ids": trajectory_ids,
    }


class CpuExp(integration.ClusterExp):
    """The experiment of the integration, but for what needs GPUs."""

    def get_train_dataset(self) -> Any:
        # With one process in the place of eight, for a few rows.
        return PromptDataset(self.cfg.data.train_data, self.tokenizer, 64, num_workers=1)

    def get_eval_dataset(self) -> Any:
        return PromptDataset(self.cfg.data.val_data, self.tokenizer, 64, num_workers=1)

    def get_inference_client(self) -> Any:
        return None

    def get_generator(self, *_: Any, **__: Any) -> Any:
        return Generator()

    def get_trainer(self, *args: Any, **kwargs: Any) -> Any:
        made = super().get_trainer(*args, **kwargs)
        made.build_models = lambda *_: setattr(made, "dispatch", Dispatch())
        return made


if __name__ == "__main__":
    from with_skyrl.cpu_skyrl import CpuExp as Known  # by its name, for Ray's processes

    integration.ClusterExp = Known  # type: ignore[misc]
    by_skyrl = any(argument.startswith("trainer.override_entrypoint=") for argument in sys.argv)
    main_base.main() if by_skyrl else integration.main()
