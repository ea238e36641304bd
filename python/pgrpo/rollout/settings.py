"""The section `[generation]`: how rollouts are sampled, and by which engine."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pgrpo.config import Section
from pgrpo.rollout.engines.vllm.settings import VllmConfig


class GenerationConfig(Section):
    """How rollouts are sampled."""

    engine: Literal["transformers", "vllm"] = "transformers"
    """What generates: the trainer's own model, or vLLM."""
    vllm: VllmConfig = VllmConfig()
    group_size: int = Field(default=8, ge=1)
    """Rollouts per prompt (G)."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Longest completion; completions chosen from a list may be longer."""
    temperature: float = Field(default=1.0, gt=0)
    """Softmax temperature of the sampling distribution, which is also the one that is trained."""
    max_prompt_tokens: int = Field(default=2048, ge=1)
    """A longer prompt stops the run when its turn comes; it is never cut silently."""
    overlong_buffer: int = Field(default=0, ge=0)
    """Tokens before `max_new_tokens` over which a penalty of free completions rises linearly from 0,
    DAPO's soft overlong punishment ([how_it_works.md](how_it_works.md#overlong-completions)). At 0
    there is none."""
    overlong_penalty: float = Field(default=1.0, gt=0)
    """What is taken off the reward of a completion of `max_new_tokens`, in units of the reward."""

    @model_validator(mode="after")
    def _check_buffer(self) -> GenerationConfig:
        if self.overlong_buffer > self.max_new_tokens:
            raise ValueError(
                f"overlong_buffer is {self.overlong_buffer}; expected at most max_new_tokens, which is "
                f"{self.max_new_tokens}"
            )
        return self

    def inactive(self) -> set[str]:
        idle = set[str]() if self.engine == "vllm" else {"vllm"}
        return idle if self.overlong_buffer else idle | {"overlong_penalty"}
