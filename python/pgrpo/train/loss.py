"""The losses: the clipped policy gradient, token by token, and two without advantages.

Source: PPO's clipped surrogate (Schulman et al. 2017, arXiv 1707.06347) as GRPO uses it (Shao et al.
2024, arXiv 2402.03300); asymmetric clipping and token-level aggregation from DAPO (Yu et al. 2025,
arXiv 2503.14476); constant-length aggregation from Dr. GRPO (Liu et al. 2025, arXiv 2503.20783);
ratios of whole completions from GSPO (Zheng et al. 2025, arXiv 2507.18071); clipped weights in place
of a clipped surrogate from CISPO (MiniMax 2025, arXiv 2506.13585). DPO is that of Rafailov et al.
(2023, arXiv 2305.18290).

Engine and trainer never agree exactly: precision and kernels differ, and weights may be older. The
correction keeps the policy that sampled apart from the one that the ratio is clipped against, as in
decoupled PPO (Hilton et al. 2021, arXiv 2110.00641), with truncated importance weights (Ionides 2008,
J. Comput. Graph. Stat. 17(2)), which TRL and verl use to the same end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pgrpo.config.sections import LossConfig
from pgrpo.types import FloatArray

# A larger ratio counts as e^20, about 5e8, which no sensible cap or clip lets through. Without this
# bound the exponential of what a broken or outdated engine reports would become inf, and NaN times
# an advantage of 0.
_MAX_LOG_RATIO = 20.0


@dataclass(frozen=True, slots=True)
class TokenLoss:
    """Per-token terms, all [T]; only `loss` carries gradients."""

    loss: Tensor
    kl: Tensor
    clipped: Tensor
    entropy: Tensor


@dataclass(frozen=True, slots=True)
class Mismatch:
    """How far trainer and engine were apart, over the tokens d = old_logprobs - rollout_logprobs."""

    kl: float
    """Mean of exp(d) - d - 1 in nats (k3): unbiased for KL(rollout || old) per token, as the tokens
    were drawn from the engine's distribution."""
    mean: float
    """Mean of |d|, in nats."""
    max: float
    """Largest |d|, in nats."""
    weight: float
    """Mean importance weight; 1 without a correction."""
    masked: float
    """Share of the tokens whose weight is 0."""
    truncated: float
    """Share of the tokens whose importance ratio is above importance_cap."""


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


def importance_level(config: LossConfig) -> Literal["off", "token", "sequence"]:
    """What the importance ratio is taken over; `off` where old_logprobs are those of the rollout, and
    under objectives that do not mind who sampled.

    Raises:
        ValueError: it is still `auto`, which depends on the engine.
    """
    if config.old_logprobs == "rollout" or not config.takes_estimator:
        return "off"
    if config.importance == "auto":
        raise ValueError("loss.importance is 'auto'; expected 'off', 'token' or 'sequence'")
    return config.importance


def preferences(
    rewards: Sequence[FloatArray], log_ratios: Sequence[FloatArray], beta: float
) -> tuple[float, list[FloatArray]]:
    """DPO's loss over all pairs of a group's completions of which one has the larger reward, and minus
    its derivative by each completion's log-probability.

        z(w, l) = beta (h_w - h_l)           h = log pi(y | x) - log ref(y | x)
        loss    = mean over the P pairs (w, l) of all groups of -log sigmoid(z)
        c_n     = beta / P (sum over (n, l) of sigmoid(-z) - sum over (w, n) of sigmoid(-z))

    The sum of -c_n log pi(y_n | x_n), c_n held fixed, has the gradient of the loss, and is a sum over
    completions, which may be computed apart. Where the policy is the reference, h = 0 and c_n is
    beta / 2P times the pairs won less those lost; for rewards of 0 and 1 that is G beta / 2P times
    the reward less its group's mean, the advantage of Dr. GRPO.

    Args:
        rewards: [G] of each group, finite.
        log_ratios: [G] of each group, h in nats, sums over the tokens of a completion.
        beta: positive.

    Returns:
        The loss, and c [G] of each group; 0 where there is no pair.
    """
    wins = [values[:, None] > values for values in rewards]
    num_pairs = max(sum(int(each.sum()) for each in wins), 1)
    loss, found = 0.0, list[FloatArray]()
    for won, h in zip(wins, log_ratios, strict=True):
        # log sigmoid(z) is -log(1 + e^-z), and sigmoid(-z) is e^-(z + log(1 + e^-z)).
        z = beta * (h[:, None] - h)
        losses = np.logaddexp(0.0, -z)
        loss += float(losses[won].sum()) / num_pairs
        pull = np.where(won, np.exp(-z - losses), 0.0) * beta / num_pairs
        found.append(pull.sum(1) - pull.sum(0))
    return loss, found


def sum_over_completions(values: Tensor, lengths: Sequence[int]) -> Tensor:
    """Each token's value replaced by the sum over its completion: [T] -> [T], T = sum(lengths)."""
    sums = torch.stack([part.sum() for part in values.split(list(lengths))])
    return sums.repeat_interleave(torch.tensor(lengths, device=values.device))


def importance_weights(log_ratios: Tensor, config: LossConfig) -> Tensor:
    """Weights w of `token_loss` for the logarithms of rho: [T] -> [T]."""
    if importance_level(config) == "off":
        return torch.ones_like(log_ratios)
    ratios = _bounded_exp(log_ratios)
    kept = ratios >= config.mask_below
    if config.mask_above is not None:
        kept &= ratios <= config.mask_above
    return ratios.clamp(max=config.importance_cap) * kept


def entropies(logits: Tensor) -> Tensor:
    """Entropy in nats of each row's softmax: [R, V] -> [R]; a logit of -inf is no part of it."""
    logs = logits.log_softmax(-1)
    # 0 log 0 counts as 0, in the gradient too: no float32 exp of less than -1000 is more than 0.
    return -(logs.exp() * logs.clamp(min=-1e3)).sum(-1)


def token_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    config: LossConfig,
    *,
    importance: Tensor,
    completion_log_ratios: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
) -> TokenLoss:
    """Clipped surrogate, importance correction, KL penalty and entropy bonus of each token; under
    `dpo` and `sft` -A logprobs, where A is c of `preferences`, or the reward.

        ratio = exp(logprobs - old_logprobs)                                        ratio "token"
              = exp(mean over the completion's trained tokens of the same)                "sequence"
        range = [1 - clip_low, 1 + clip_high]
        loss  = -w min(ratio A, clip(ratio, range) A)                               clipping "ppo"
              = -w sg(clip(ratio, range)) A logprobs                                      "cispo"
              + kl_coef kl - entropy_coef entropy
        kl    = exp(ref - logprobs) - (ref - logprobs) - 1      (k3: unbiased, never negative)

    sg stops the gradient. The mean of a completion has, at each token, the gradient of that token's
    log-probability alone (GSPO-token, equations 13 to 16 there): where all tokens of a completion have
    one weight, their sum is the gradient of the completion's own ratio, for its mean over T tokens
    stands there T times.

    `logprobs` are the current policy's, `old_logprobs` the trainer's before the update, and
    rollout_logprobs what the engine reported. The weight w, `importance`, carries no gradient and
    does not touch the penalty:

        rho   = exp(old_logprobs - rollout_logprobs)                      importance "token"
              = exp(sum over the completion's trained tokens of the same)            "sequence"
        w     = min(rho, importance_cap); 0 where rho < mask_below or rho > mask_above
              = 1                                                                    "off"

    A token with w = 0 (masked) still counts in the denominators of the aggregation. With
    old_logprobs "rollout" the old ones are what the engine reported: the clipped ratio then holds
    the mismatch, and w = 1. Ratios count as at most e^20 and have no gradient beyond.

    Args:
        logprobs: with gradients; of T tokens, as everything else.
        old_logprobs: not read where `completion_log_ratios` stand in for their differences.
        advantages: of each token's completion.
        config: the section `[loss]`.
        importance: w.
        completion_log_ratios: at each token the mean over its completion, which these T tokens need not
            hold the whole of; needed when the ratio is the sequence's.
        ref_logprobs: the reference's; without them there is no penalty.
        entropy: with gradients; without it there is no bonus.

    Shapes: everything [T] float32, log-probabilities in nats.
    """
    if not config.takes_estimator:
        nothing = torch.zeros_like(logprobs)
        return TokenLoss(-advantages * logprobs, nothing, nothing, nothing)
    log_ratios = logprobs - old_logprobs
    if completion_log_ratios is not None:
        log_ratios = completion_log_ratios + (logprobs - logprobs.detach())
    ratio = _bounded_exp(log_ratios)
    bounded = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    if config.clipping == "ppo":
        loss = -torch.minimum(ratio * advantages, bounded * advantages) * importance
        replaced = ratio * advantages > bounded * advantages
    else:
        loss = -bounded.detach() * advantages * logprobs * importance
        replaced = ratio != bounded
    kl = torch.zeros_like(logprobs)
    if ref_logprobs is not None:
        kl = torch.exp(ref_logprobs - logprobs) - (ref_logprobs - logprobs) - 1
        loss = loss + config.kl_coef * kl
    if entropy is None:
        entropy = torch.zeros_like(logprobs)
    else:
        loss = loss - config.entropy_coef * entropy
    return TokenLoss(loss, kl.detach(), replaced.float(), entropy.detach())


def mismatch(differences: Sequence[FloatArray], config: LossConfig) -> Mismatch:
    """Summary of old_logprobs - rollout_logprobs, one array [T_n] for each completion."""
    lengths = [len(values) for values in differences]
    if not any(lengths):
        return Mismatch(kl=0.0, mean=0.0, max=0.0, weight=1.0, masked=0.0, truncated=0.0)
    difference = torch.from_numpy(np.concatenate(differences))
    level = importance_level(config)
    log_ratios = sum_over_completions(difference, lengths) if level == "sequence" else difference
    weights = importance_weights(log_ratios, config)
    truncated = (_bounded_exp(log_ratios) > config.importance_cap) & (level != "off")
    return Mismatch(
        kl=float((_bounded_exp(difference) - difference - 1).mean()),
        mean=float(difference.abs().mean()),
        max=float(difference.abs().max()),
        weight=float(weights.mean()),
        masked=float((weights == 0).double().mean()),
        truncated=float(truncated.double().mean()),
    )


def _bounded_exp(log_ratios: Tensor) -> Tensor:
    return torch.exp(log_ratios.clamp(max=_MAX_LOG_RATIO))
