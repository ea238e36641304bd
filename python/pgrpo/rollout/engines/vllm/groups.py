"""How one group of rollouts is asked for: which requests, and what is made of their samples.

A free group is one request for all its samples. A choice from a list is sampled branch by branch: one
request tells the probabilities of the tokens that may come next, and all completions that stand at
that branch draw from them, by the random numbers the transformers engine would use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from pgrpo.model.choices import forced_tail, permitted
from pgrpo.rollout.engines.sampling import truncated
from pgrpo.rollout.engines.vllm.backend import Completion, Request
from pgrpo.types import FloatArray, Prompt

if TYPE_CHECKING:
    from pgrpo.rollout.settings import GenerationConfig


@dataclass(slots=True)
class FreeGroup:
    """G samples of one prompt, which may say anything."""

    prompt: Prompt
    size: int
    """G."""
    config: GenerationConfig
    """How they are sampled."""
    end_ids: frozenset[int]
    """Tokens that end a completion."""
    seed: int | None
    """Of the first sample; vLLM takes the numbers after it for the others. None takes the likeliest
    token instead of sampling."""
    tokens: list[list[int]] = field(default_factory=list[list[int]])
    """[G][T] once accepted."""
    logprobs: list[list[float]] = field(default_factory=list[list[float]])
    """[G][T] in nats, once accepted."""
    truncated: list[bool] = field(default_factory=list[bool])
    """[G] once accepted."""

    def start(self) -> list[Request]:
        """The one request."""
        config = self.config
        sampling: dict[str, Any] = {
            # The likeliest completion is the same for all.
            "n": 1 if self.seed is None else self.size,
            "temperature": 0.0 if self.seed is None else config.temperature,
            "max_tokens": config.max_new_tokens,
            # The policy's own end tokens; vLLM would add those of the model's generation config.
            "ignore_eos": True,
            "stop_token_ids": sorted(self.end_ids),
            "logprobs": 0,
            "detokenize": bool(config.stop),
        }
        if config.stop:
            sampling |= {"stop": config.stop, "include_stop_str_in_output": True}
        if self.seed is not None:
            sampling |= {
                "seed": self.seed,
                "top_k": config.top_k,
                "top_p": config.top_p,
                "min_p": config.min_p,
            }
        return [Request(self.prompt.token_ids, sampling)]

    def accept(self, _number: int, completions: Sequence[Completion]) -> list[Request]:
        """Take the samples; nothing more is asked."""
        samples = list(completions) * (self.size // len(completions))
        self.tokens = [list(c.token_ids) for c in samples]
        self.logprobs = [
            [options[token] for token, options in zip(c.token_ids, c.logprobs, strict=True)]
            for c in samples
        ]
        self.truncated = [c.finish_reason == "length" for c in samples]
        return []


class ChoiceGroup:
    """G choices from the list of one prompt.

    Args:
        prompt: with its choices.
        size: G.
        config: of the distribution that is drawn from.
        levels: [position, G] random numbers in [0, 1) that choose the token at each position; None
            takes the likeliest.
    """

    def __init__(
        self, prompt: Prompt, size: int, config: GenerationConfig, levels: FloatArray | None
    ) -> None:
        self.prompt = prompt
        self.tokens: list[list[int]] = [[] for _ in range(size)]
        self.logprobs: list[list[float]] = [[] for _ in range(size)]
        self.truncated = [False] * size
        self._config = config
        self._levels = levels
        self._branches: list[tuple[int, ...]] = []
        self._missing = 0

    def start(self) -> list[Request]:
        """A request for every branch that completions stand at; none when all are complete."""
        choices = self.prompt.choices or ()
        for tokens, logprobs in zip(self.tokens, self.logprobs, strict=True):
            tail = forced_tail(choices, tokens)
            tokens.extend(tail)
            logprobs.extend([0.0] * len(tail))
        open_ = {tuple(t) for t in self.tokens if permitted(choices, t)}
        self._branches = sorted(open_)
        self._missing = len(self._branches)
        requests: list[Request] = []
        for branch in self._branches:
            allowed = list(permitted(choices, branch))
            sampling = {
                "n": 1,
                "temperature": self._config.temperature,
                "max_tokens": 1,
                "ignore_eos": True,
                "seed": 0,
                "allowed_token_ids": allowed,
                "logprobs": len(allowed),
                "detokenize": False,
            }
            requests.append(Request(self.prompt.token_ids + branch, sampling))
        return requests

    def accept(self, number: int, completions: Sequence[Completion]) -> list[Request] | None:
        """Draw at a branch.

        Args:
            number: position of its request among those of the last `start`.
            completions: one, read for its log-probabilities alone.

        Returns:
            The next requests once all branches are done, none when the group is; before, None.
        """
        branch = self._branches[number]
        allowed = permitted(self.prompt.choices or (), branch)
        known = completions[0].logprobs[0]
        logs = np.array([known[token] for token in allowed])
        logs -= np.log(np.exp(logs).sum())
        if self._levels is not None:
            logs = truncated(torch.from_numpy(logs)[None], self._config)[0].numpy()
        cumulated = np.exp(logs).cumsum()
        for g, tokens in enumerate(self.tokens):
            if tuple(tokens) != branch:
                continue
            if self._levels is None:
                drawn = int(logs.argmax())
            else:
                level = self._levels[len(branch), g] * cumulated[-1]
                drawn = min(int(np.searchsorted(cumulated, level, side="right")), len(logs) - 1)
            tokens.append(allowed[drawn])
            self.logprobs[g].append(float(logs[drawn]))
        self._missing -= 1
        return None if self._missing else self.start()


RequestedGroup: TypeAlias = FreeGroup | ChoiceGroup
