"""The policy: log-probabilities of rollouts, and the update that moves them.

Both work on packed groups (`attention`), so each prompt is computed once for all its completions,
and a completion that is a single choice costs nothing beyond its prompt. Logits exist for a bounded
number of rows at a time: a chunk's loss is differentiated down to the hidden states at once, and one
backward pass through the decoder follows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from pgrpo.config.sections import LossConfig, OptimizerConfig
from pgrpo.errors import ModelError
from pgrpo.model.attention import SharedPrefix
from pgrpo.model.choices import branches
from pgrpo.model.language_model import LanguageModel
from pgrpo.train.loss import (
    Mismatch,
    importance_level,
    importance_weights,
    mismatch,
    rollout_weights,
    sum_over_completions,
    token_loss,
)
from pgrpo.types import FloatArray, Rollout

# Logits held at a time: 64 MiB in fp32, enough rows for the head's matrix product to run at full
# speed with a vocabulary of 150,000.
_CHUNK_LOGITS = 2**24


@dataclass(frozen=True, slots=True)
class Scored:
    """Rollouts with what the loss needs of each, flattened over trained tokens where it is [T]."""

    rollout: Rollout
    advantage: float
    old_logprobs: FloatArray | None
    ref_logprobs: FloatArray | None
    weight: float


@dataclass(frozen=True, slots=True)
class UpdateStats:
    """What an update did, averaged over its trained tokens."""

    loss: float
    grad_norm: float
    kl: float
    clipped: float
    mismatch: Mismatch
    """Of the tokens of the first epoch. Where old_logprobs are those of the rollout, it compares with
    the policy at that moment, which earlier minibatches may have moved."""
    num_updates: int


@dataclass(slots=True)
class _Chunk:
    """Rows of the decoder's output whose logits are computed together, and the tokens read there."""

    rows: list[int] = field(default_factory=list[int])
    targets: list[tuple[int, int, int]] = field(default_factory=list[tuple[int, int, int]])
    """(row within the chunk, token id, index into the batch's flat tokens)."""
    permitted: list[tuple[int, ...]] = field(default_factory=list[tuple[int, ...]])
    """Per row the token ids that may be chosen; empty when all may."""


class _Batch:
    """One forward pass: rollouts in order, packed by group, with every trained token's place."""

    def __init__(self, rollouts: Sequence[Rollout], model: LanguageModel) -> None:
        self.lengths = [num_trained_tokens(rollout) for rollout in rollouts]
        groups = [list(group) for _, group in groupby(rollouts, key=lambda r: r.group_id)]
        inputs = [
            [r.completion_ids[: max(num_trained_tokens(r) - 1, 0)] for r in group]
            for group in groups
        ]
        prompts = [group[0].prompt.token_ids for group in groups]
        self.layout = SharedPrefix(prompts, inputs, model.device)
        # The first token of every completion is read at the prompt's last row, once per group.
        free: dict[int, list[tuple[int, int]]] = {}
        bound: dict[int, list[tuple[int, int]]] = {}
        allowed: dict[int, tuple[int, ...]] = {}
        flat = n = 0
        prompt_row = -1
        for group in groups:
            prompt_row += len(group[0].prompt.token_ids)
            for rollout in group:
                choices = rollout.prompt.choices
                steps = branches(choices, rollout.completion_ids) if choices else None
                start = self.layout.completion_rows[n]
                for t in range(self.lengths[n]):
                    row = prompt_row if t == 0 else start + t - 1
                    (free if steps is None else bound).setdefault(row, []).append(
                        (rollout.completion_ids[t], flat)
                    )
                    if steps is not None:
                        allowed[row] = steps[t]
                    flat += 1
                n += 1
        self.num_tokens = flat
        limit = max(1, _CHUNK_LOGITS // model.vocab_size)
        self.chunks = [*_chunks(free, {}, limit), *_chunks(bound, allowed, limit)]


def _chunks(
    rows: dict[int, list[tuple[int, int]]], allowed: dict[int, tuple[int, ...]], limit: int
) -> Iterator[_Chunk]:
    order = sorted(rows)
    for start in range(0, len(order), limit):
        chunk = _Chunk(rows=order[start : start + limit])
        for i, row in enumerate(chunk.rows):
            chunk.targets += [(i, token, flat) for token, flat in rows[row]]
            if allowed:
                chunk.permitted.append(allowed[row])
        yield chunk


def num_trained_tokens(rollout: Rollout) -> int:
    """Tokens of a completion that were really chosen: all of a free one; of one from a list, those
    up to the last position at which there was a choice."""
    choices = rollout.prompt.choices
    if choices is None:
        return len(rollout.completion_ids)
    return len(branches(choices, rollout.completion_ids))


def _rollout_logprobs(rollout: Rollout) -> FloatArray:
    """What the engine reported of the trained tokens."""
    return np.array(rollout.rollout_logprobs[: num_trained_tokens(rollout)])


def _per_rollout(flat: Tensor, batch: _Batch) -> list[FloatArray]:
    return np.split(flat.numpy(), np.cumsum(batch.lengths)[:-1])


class Policy:
    """A language model under AdamW.

    Args:
        model: what is trained; parameters that require no gradient stay as they are.
        loss: the `[loss]` section, its importance decided (not `auto`).
        optimizer: the `[optimizer]` section.
        num_steps: length of the run, for the learning-rate schedule.
        temperature: softmax temperature the rollouts are sampled at.
        max_new_tokens: the constant length of `dr_grpo` aggregation.
        reference: what the KL penalty compares with; needed when kl_coef > 0 and the model has no
            adapters to switch off.

    Raises:
        ValueError: loss.importance is `auto`.
    """

    def __init__(
        self,
        model: LanguageModel,
        loss: LossConfig,
        optimizer: OptimizerConfig,
        *,
        num_steps: int,
        temperature: float,
        max_new_tokens: int,
        reference: LanguageModel | None = None,
    ) -> None:
        self.model = model
        self._reference = reference
        self._loss = loss
        self._importance = importance_level(loss)
        self._config = optimizer
        self._num_steps = num_steps
        self._temperature = temperature
        self._max_new_tokens = max_new_tokens
        named = [(n, p) for n, p in model.model.named_parameters() if p.requires_grad]
        self.parameters: dict[str, torch.nn.Parameter] = dict(named)
        # Norms and biases are not decayed: pulling them to zero is not regularisation.
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for _, p in named if p.ndim >= 2]},
                {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0},
            ],
            lr=optimizer.learning_rate,
            betas=(optimizer.beta1, optimizer.beta2),
            weight_decay=optimizer.weight_decay,
            fused=True,
        )

    def learning_rate(self, step: int) -> float:
        """Rate of step 1, 2, ..., num_steps: linear warm-up, then the schedule."""
        c = self._config
        if step <= c.warmup_steps:
            return c.learning_rate * step / c.warmup_steps
        done = (step - c.warmup_steps - 1) / max(self._num_steps - c.warmup_steps, 1)
        match c.schedule:
            case "constant":
                return c.learning_rate
            case "linear":
                return c.learning_rate * (1 - done)
            case "cosine":
                return c.learning_rate * (1 + float(np.cos(np.pi * done))) / 2

    @torch.no_grad()
    def logprobs(
        self, rollouts: Sequence[Rollout], model: LanguageModel | None = None
    ) -> list[FloatArray]:
        """Log-probabilities in nats of every trained token, under the sampling temperature.

        Returns one [T_n] array for each rollout, in order.
        """
        model = model or self.model
        results: list[FloatArray] = []
        for part in self._microbatches(rollouts):
            batch = _Batch([rollouts[i] for i in part], model)
            with model.autocast():
                hidden = model.hidden(batch.layout)
            results += self._read(model, hidden, batch)
        return results

    def update(
        self, rollouts: Sequence[Rollout], advantages: FloatArray, learning_rate: float
    ) -> UpdateStats:
        """Move the policy along the clipped gradient of these rollouts.

        Rollouts of a group stand together. One optimizer step for each of `minibatches` parts of the
        groups, `epochs` times over; each accumulates its gradient over passes of at most
        `token_budget` tokens, with weights of the whole minibatch, so the split changes nothing.
        A rollout whose advantage is exactly 0 has no gradient without a KL penalty, and is left out
        of the passes (not of the averages).

        Args:
            rollouts: N rollouts.
            advantages: [N] float64.
            learning_rate: of this step.

        Raises:
            ModelError: the loss or the gradient is not finite; the weights are then untouched by
                the optimizer step that would have followed.
        """
        c = self._config
        starts = [
            i for i, r in enumerate(rollouts) if i == 0 or r.group_id != rollouts[i - 1].group_id
        ]
        # Groups without a reward may have left fewer than there are minibatches.
        num_parts = min(c.minibatches, len(starts))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        moves = c.epochs * num_parts
        old: Sequence[FloatArray | None]
        if self._loss.old_logprobs == "rollout":
            old = [_rollout_logprobs(rollout) for rollout in rollouts]
        elif moves > 1:
            old = self.logprobs(rollouts)
        else:
            # The current policy is the old one, so its log-probabilities come out of the update's
            # own pass.
            old = [None] * len(rollouts)
        ref = self._ref_logprobs(rollouts)
        bounds = [*starts, len(rollouts)]
        totals = np.zeros(4)
        norms: list[float] = []
        differences: list[FloatArray] = []
        for epoch in range(c.epochs):
            for part in range(num_parts):
                members = [
                    i
                    for g in range(part, len(starts), num_parts)
                    for i in range(bounds[g], bounds[g + 1])
                ]
                lengths = [num_trained_tokens(rollouts[i]) for i in members]
                weights = rollout_weights(lengths, self._loss.aggregation, self._max_new_tokens)
                scored = [
                    Scored(rollouts[i], float(advantages[i]), old[i], ref[i], weight)
                    for i, weight, length in zip(members, weights, lengths, strict=True)
                    if length and (advantages[i] != 0.0 or ref[i] is not None)
                ]
                sums, norm, seen = self._optimizer_step(scored)
                totals += sums
                norms.append(norm)
                if epoch == 0:
                    differences += seen
        tokens = max(totals[3], 1.0)
        return UpdateStats(
            loss=float(totals[0]) / moves,
            grad_norm=float(np.mean(norms)),
            kl=float(totals[1] / tokens),
            clipped=float(totals[2] / tokens),
            mismatch=mismatch(differences, self._loss),
            num_updates=moves,
        )

    def _optimizer_step(
        self, scored: Sequence[Scored]
    ) -> tuple[FloatArray, float, list[FloatArray]]:
        """Accumulate the gradient of one minibatch and step: sums of (loss, kl, clipped, tokens),
        gradient norm, and what `_backward` returns of each rollout."""
        # Gradients stay allocated: momentum must also move weights that got no gradient this time.
        self.optimizer.zero_grad(set_to_none=False)
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        sums = np.zeros(4)
        differences: list[FloatArray] = []
        for part in self._microbatches([s.rollout for s in scored]):
            added, seen = self._backward([scored[i] for i in part])
            sums += added
            differences += seen
        norm = float(
            torch.nn.utils.clip_grad_norm_(self.parameters.values(), self._config.max_grad_norm)
        )
        if not (np.isfinite(norm) and np.isfinite(sums[0])):
            raise ModelError(
                f"the loss is {sums[0]:g} and its gradient's norm {norm:g}; expected finite values"
            )
        self.optimizer.step()
        return sums, norm, differences

    def _backward(self, scored: Sequence[Scored]) -> tuple[FloatArray, list[FloatArray]]:
        """One pass: add the gradient of these rollouts, return sums of (loss, kl, clipped, tokens)
        and by how much the trainer's log-probabilities exceed the engine's, [T_n] of each."""
        model, device = self.model, self.model.device
        batch = _Batch([s.rollout for s in scored], model)
        lengths = batch.lengths

        def spread(values: Sequence[float]) -> Tensor:
            return torch.tensor(np.repeat(values, lengths), dtype=torch.float32, device=device)

        def flat(arrays: Sequence[FloatArray]) -> Tensor:
            return torch.tensor(np.concatenate(arrays), dtype=torch.float32, device=device)

        weights = spread([s.weight for s in scored])
        advantages = spread([s.advantage for s in scored])
        sampled = flat([_rollout_logprobs(s.rollout) for s in scored])
        old = [s.old_logprobs for s in scored if s.old_logprobs is not None]
        ref = [s.ref_logprobs for s in scored if s.ref_logprobs is not None]
        old_flat, ref_flat = flat(old) if old else None, flat(ref) if ref else None
        sums = torch.zeros(3)
        differences = torch.zeros(batch.num_tokens, dtype=torch.float64)
        with model.autocast():
            hidden = model.hidden(batch.layout)
        log_ratios: Tensor | None = None
        if self._importance == "sequence":
            # The weight of a token depends on all of its completion, which no chunk need hold.
            if old_flat is None:
                old_flat = flat(self._read(model, hidden, batch))
            log_ratios = sum_over_completions(old_flat - sampled, lengths)
        with model.autocast():
            gradient = torch.zeros_like(hidden)
            for chunk in batch.chunks:
                leaf = hidden.detach()[chunk.rows].requires_grad_()
                where = torch.tensor([i for _, _, i in chunk.targets], device=device)
                logprobs = self._chunk_logprobs(model, leaf, chunk)
                current = logprobs.detach()
                old_logprobs = current if old_flat is None else old_flat[where]
                trainers = current if self._loss.old_logprobs == "rollout" else old_logprobs
                difference = trainers - sampled[where]
                differences[where.cpu()] = difference.double().cpu()
                terms = token_loss(
                    logprobs,
                    old_logprobs,
                    advantages[where],
                    self._loss,
                    importance=importance_weights(
                        difference if log_ratios is None else log_ratios[where], self._loss
                    ),
                    ref_logprobs=None if ref_flat is None else ref_flat[where],
                )
                loss = (terms.loss * weights[where]).sum()
                loss.backward()  # type: ignore[no-untyped-call]
                assert leaf.grad is not None
                gradient[chunk.rows] = leaf.grad
                sums += torch.stack([loss.detach(), terms.kl.sum(), terms.clipped.sum()]).cpu()
        hidden.backward(gradient)  # type: ignore[no-untyped-call]
        totals = np.array([*sums.tolist(), batch.num_tokens])
        return totals, _per_rollout(differences, batch)

    @torch.no_grad()
    def _read(self, model: LanguageModel, hidden: Tensor, batch: _Batch) -> list[FloatArray]:
        """Log-probabilities [T_n] of each rollout, from the decoder's output for its batch.

        Not to be called under autocast: older versions of torch (pytorch/pytorch#158232) would use
        the weights that were converted here again in the loss, without a way back for gradients.
        """
        flat = torch.zeros(batch.num_tokens, dtype=torch.float64)
        with model.autocast():
            for chunk in batch.chunks:
                where = [flat_index for _, _, flat_index in chunk.targets]
                values = self._chunk_logprobs(model, hidden[chunk.rows], chunk)
                flat[where] = values.double().cpu()
        return _per_rollout(flat, batch)

    def _chunk_logprobs(self, model: LanguageModel, hidden: Tensor, chunk: _Chunk) -> Tensor:
        """Log-probability of every target of a chunk: hidden [R, hidden] -> [targets]."""
        device = hidden.device
        rows = torch.tensor([row for row, _, _ in chunk.targets], device=device)
        ids = torch.tensor([token for _, token, _ in chunk.targets], device=device)
        if chunk.permitted:
            union = sorted({token for tokens in chunk.permitted for token in tokens})
            column = {token: i for i, token in enumerate(union)}
            forbidden = torch.ones(len(chunk.rows), len(union), dtype=torch.bool)
            for row, tokens in enumerate(chunk.permitted):
                forbidden[row, [column[token] for token in tokens]] = False
            logits = model.logits(hidden, torch.tensor(union, device=device))
            logits = logits.masked_fill(forbidden.to(device), -torch.inf)
            ids = torch.tensor([column[token] for _, token, _ in chunk.targets], device=device)
        else:
            logits = model.logits(hidden)
        logits = logits / self._temperature
        return logits[rows, ids] - logits.logsumexp(-1)[rows]

    def _ref_logprobs(self, rollouts: Sequence[Rollout]) -> Sequence[FloatArray | None]:
        if self._loss.kl_coef == 0:
            return [None] * len(rollouts)
        if self._reference is not None:
            return self.logprobs(rollouts, self._reference)
        with self.model.adapters_disabled():
            return self.logprobs(rollouts)

    def _microbatches(self, rollouts: Sequence[Rollout]) -> Iterator[list[int]]:
        """Indices of consecutive rollouts whose packed tokens fit the budget.

        A group is only split when it does not fit by itself; its prompt is then computed in each
        part. A single rollout beyond the budget gets a pass of its own.
        """
        budget = self._config.token_budget
        part: list[int] = []
        used = 0
        for _, members in groupby(range(len(rollouts)), key=lambda i: rollouts[i].group_id):
            group = list(members)
            prompt = len(rollouts[group[0]].prompt.token_ids)
            costs = [num_trained_tokens(rollouts[i]) for i in group]
            if part and used + prompt + sum(costs) > budget:
                yield part
                part, used = [], 0
            used += prompt
            for i, cost in zip(group, costs, strict=True):
                if part and used + cost > budget:
                    yield part
                    part, used = [], prompt
                part.append(i)
                used += cost
        if part:
            yield part
