"""The proof that vLLM computes with the policy's weights, and with nothing cached of earlier ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from pgrpo.errors import EngineError
from pgrpo.model.attention import SharedPrefix
from pgrpo.types import Example, FloatArray, Prompt

if TYPE_CHECKING:
    from pgrpo.model.language_model import LanguageModel
    from pgrpo.rollout.settings import GenerationConfig
    from pgrpo.types import Rollout

PROBE_TOKENS = 8
"""Most tokens of a completion that is compared."""
PROBE_SAMPLES = 4
"""Completions that are compared."""
_TEXT = (
    "A reader who has finished a long novel about the sea may want a short one about the mountains, "
    "while another asks for the same author again. The better advice is the one that remembers who is "
    "asking, what they liked before, and what they have had enough of by now. "
)
_PROMPT_TOKENS = 80
"""More than one block of keys and values, so that the probe reads the prefix cache."""


def probe_prompt(model: LanguageModel, config: GenerationConfig) -> Prompt:
    """Always the same prompt, so that what vLLM has cached of it comes from the weights before."""
    ids: list[int] = model.tokenizer(_TEXT, add_special_tokens=False).input_ids
    length = min(_PROMPT_TOKENS, config.max_prompt_tokens)
    return Prompt(Example(_TEXT, ""), 0, tuple((ids * length)[:length]))


def check_probe(
    rollouts: Sequence[Rollout], model: LanguageModel, temperature: float, tolerance: float
) -> float:
    """Mean absolute difference, in nats, of vLLM's log-probabilities from the trainer's.

    Args:
        rollouts: vLLM's samples of the prompt.
        model: the policy's.
        temperature: they were sampled at.
        tolerance: largest mean difference that passes, in nats.

    Raises:
        EngineError: vLLM computes something else.
    """
    found = np.concatenate([rollout.rollout_logprobs for rollout in rollouts])
    differences = np.abs(found - _logprobs(rollouts, model, temperature))
    error = float(differences.mean())
    if not error <= tolerance:
        raise EngineError(
            f"after {rollouts[0].policy_version} updates vLLM's log-probabilities differ from the "
            f"trainer's by {error:.4f} nats on average (at most {float(differences.max()):.4f}) over "
            f"{len(found)} tokens, more than {tolerance:g}: its weights or its cache are not those of "
            "the policy (generation.vllm.probe_tolerance sets the bound)"
        )
    return error


@torch.no_grad()
def _logprobs(rollouts: Sequence[Rollout], model: LanguageModel, temperature: float) -> FloatArray:
    """The trainer's log-probabilities of all completions' tokens, one completion after the other."""
    prompt, completions = rollouts[0].prompt, [rollout.completion_ids for rollout in rollouts]
    layout = SharedPrefix([prompt.token_ids], [[c[:-1] for c in completions]], model.device)
    values: list[FloatArray] = []
    with model.autocast(), model.in_step():
        hidden = model.hidden(layout)
        for completion, start in zip(completions, layout.completion_rows, strict=True):
            rows = [len(prompt.token_ids) - 1, *range(start, start + len(completion) - 1)]
            logits = model.logits(hidden[rows]) / temperature
            logs = logits.log_softmax(-1)[range(len(rows)), list(completion)]
            values.append(logs.double().cpu().numpy())
    return np.concatenate(values)
