"""The section `[generation]`: how rollouts are sampled, and by which engine."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

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
    top_k: int = Field(default=0, ge=0)
    """Tokens are drawn from the so many likeliest ones; 0: from all. Like the next two it applies to
    samples, not to greedy evaluation, and `loss.importance` corrects for it as far as that goes
    ([how_it_works.md](how_it_works.md#truncated-sampling))."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Tokens are drawn from the fewest likeliest ones that have this probability together."""
    min_p: float = Field(default=0.0, ge=0, lt=1)
    """Tokens are drawn from those with at least this share of the likeliest one's probability."""
    stop: list[str] = Field(default=[])
    """Texts that end a free completion, beside the end tokens of the model and its tokenizer. It ends
    with the token that completes one of them, keeps it, and is not truncated."""
    max_prompt_tokens: int = Field(default=2048, ge=1)
    """Longest prompt; none is ever cut."""
    long_prompts: Literal["fail", "drop"] = "fail"
    """Whether a longer prompt stops the run when its turn comes, or all of them are left out at the
    start and counted, which takes the time to count the tokens of every prompt."""

    overlong_buffer: int = Field(default=0, ge=0)
    """Tokens before `max_new_tokens` over which a penalty of free completions rises linearly from 0,
    DAPO's soft overlong punishment ([how_it_works.md](how_it_works.md#overlong-completions)). At 0
    there is none."""
    overlong_penalty: float = Field(default=1.0, gt=0)
    """What is taken off the reward of a completion of `max_new_tokens`, in units of the reward."""

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, stop: list[str]) -> list[str]:
        if "" in stop:
            raise ValueError(f"stop is {stop}; expected texts that are not empty")
        return stop

    @property
    def truncates(self) -> bool:
        """Whether samples are drawn from other than the whole distribution."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

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
