"""The section `[generation]`: how rollouts are sampled, and by which engine."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

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
    """Longest prompt; none is ever cut."""
    long_prompts: Literal["fail", "drop"] = "fail"
    """Whether a longer prompt stops the run when its turn comes, or all of them are left out at the
    start and counted, which takes the time to count the tokens of every prompt."""

    def inactive(self) -> set[str]:
        return set() if self.engine == "vllm" else {"vllm"}
