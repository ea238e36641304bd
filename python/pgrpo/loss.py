"""The clipped policy-gradient loss, token by token.

Source: PPO's clipped surrogate (Schulman et al. 2017, arXiv 1707.06347) as GRPO uses it (Shao et al.
2024, arXiv 2402.03300); asymmetric clipping and token-level aggregation from DAPO (Yu et al. 2025,
arXiv 2503.14476); constant-length aggregation from Dr. GRPO (Liu et al. 2025, arXiv 2503.20783).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pgrpo.config import LossConfig


@dataclass(frozen=True, slots=True)
class TokenLoss:
    """Per-token terms, all [T]; only `loss` carries gradients."""

    loss: Tensor
    kl: Tensor
    clipped: Tensor


def rollout_weights(lengths: Sequence[int], aggregation: str, constant_length: int) -> list[float]:
    """Weight of every token of each rollout, such that the loss is the weighted sum over tokens.

    For N rollouts of L_n trained tokens: `dapo` 1 / sum(L), the mean over tokens; `grpo`
    1 / (N L_n), the mean over rollouts of each one's mean; `dr_grpo` 1 / (N constant_length).
    """
    total, num = max(sum(lengths), 1), max(len(lengths), 1)
    match aggregation:
        case "dapo":
            return [1 / total] * len(lengths)
        case "grpo":
            return [1 / (num * max(length, 1)) for length in lengths]
        case "dr_grpo":
            return [1 / (num * constant_length)] * len(lengths)
        case _:
            raise ValueError(f"aggregation is {aggregation!r}; known: dapo, grpo, dr_grpo")


def token_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    config: LossConfig,
    *,
    rollout_logprobs: Tensor,
    ref_logprobs: Tensor | None = None,
) -> TokenLoss:
    """Clipped surrogate, importance correction and KL penalty of each token.

        ratio = exp(logprobs - old_logprobs)
        loss  = -w min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A) + kl_coef kl
        w     = min(importance_cap, exp(old_logprobs - rollout_logprobs)), or 1 without a cap
        kl    = exp(ref - logprobs) - (ref - logprobs) - 1      (k3: unbiased, never negative)

    Shapes: everything [T] float32, log-probabilities in nats.
    """
    ratio = torch.exp(logprobs - old_logprobs)
    bounded = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    loss = -torch.minimum(ratio * advantages, bounded * advantages)
    if config.importance_cap is not None:
        loss = loss * torch.exp(old_logprobs - rollout_logprobs).clamp(max=config.importance_cap)
    kl = torch.zeros_like(logprobs)
    if ref_logprobs is not None:
        kl = torch.exp(ref_logprobs - logprobs) - (ref_logprobs - logprobs) - 1
        loss = loss + config.kl_coef * kl
    with torch.no_grad():
        clipped = (ratio * advantages > bounded * advantages).float()
    return TokenLoss(loss, kl.detach(), clipped)
