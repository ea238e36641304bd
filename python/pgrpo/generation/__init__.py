"""Engines: what turns prompts into rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from pgrpo.config import GenerationConfig
from pgrpo.models import LanguageModel
from pgrpo.types import Prompt, Rollout


class Engine(Protocol):
    """Samples completions from the current policy."""

    def generate(
        self, prompts: Sequence[Prompt], group_size: int, *, seed: int, greedy: bool = False
    ) -> list[Rollout]:
        """`group_size` rollouts for each prompt, group after group.

        Args:
            prompts: B prompts; the position in this sequence becomes the group_id.
            group_size: G.
            seed: of this call; the same call with the same weights repeats its rollouts.
            greedy: take the likeliest token instead of sampling.
        """
        ...

    def sync(self, policy_version: int) -> None:
        """Take over the policy's weights as they are after this many updates."""
        ...


def make_engine(config: GenerationConfig, model: LanguageModel) -> Engine:
    """The engine that `generation.engine` names."""
    match config.engine:
        case "transformers":
            from pgrpo.generation.transformers import TransformersEngine

            return TransformersEngine(
                model, max_new_tokens=config.max_new_tokens, temperature=config.temperature
            )
