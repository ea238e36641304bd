"""The policy: log-probabilities of rollouts, and the update that moves them.

Both work on packed groups (`packing`), so each prompt is computed once for all its completions. A
chunk's loss is differentiated down to the hidden states at once, and one backward pass through the
decoder follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from pgrpo.config.sections import LossConfig, OptimizerConfig
from pgrpo.errors import ModelError
from pgrpo.model.attention import SharedPrefix
from pgrpo.model.language_model import LanguageModel
from pgrpo.model.operators import token_logprobs
from pgrpo.train.loss import (
    Mismatch,
    entropies,
    importance_level,
    importance_weights,
    mismatch,
    preferences,
    rollout_weights,
    sum_over_completions,
    token_loss,
)
from pgrpo.train.packing import Chunk, Pass, TrainedRollout, num_trained_tokens, portions
from pgrpo.train.parallel import SINGLE, Ranks
from pgrpo.types import FloatArray, Group, Rollout


@dataclass(frozen=True, slots=True)
class UpdateStats:
    """What an update did, averaged over its trained tokens."""

    loss: float
    grad_norm: float
    kl: float
    clipped: float
    entropy: float
    mismatch: Mismatch
    """Of the tokens of the first epoch. Where old_logprobs are those of the rollout, it compares with
    the policy at that moment, which earlier minibatches may have moved."""
    num_updates: int


def _rollout_logprobs(rollout: Rollout) -> FloatArray:
    """What the engine reported of the trained tokens."""
    return np.array(rollout.rollout_logprobs[: num_trained_tokens(rollout)])


class Policy:
    """A language model under AdamW.

    Args:
        model: what is trained; parameters that require no gradient stay as they are.
        loss: the `[loss]` section, its importance decided (not `auto`).
        optimizer: the `[optimizer]` section.
        num_steps: length of the run, for the learning-rate schedule.
        temperature: softmax temperature the rollouts are sampled at.
        max_new_tokens: the constant length of `dr_grpo` aggregation.
        reference: what a KL penalty or DPO compares with; needed for them when the model has no
            adapters to switch off.
        ranks: the processes that share the work, each with its part of the model's weights.

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
        ranks: Ranks = SINGLE,
    ) -> None:
        self.model = model
        self._ranks = ranks
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
        self, groups: Sequence[Group], model: LanguageModel | None = None
    ) -> list[list[FloatArray]]:
        """Log-probabilities in nats of every trained token, under the sampling temperature.

        Returns, for each group, one [T] array for each of its rollouts.
        """
        model = model or self.model
        wanted = [[TrainedRollout(rollout) for rollout in group.rollouts] for group in groups]
        own = self._own(wanted)

        def read() -> list[FloatArray]:
            found: list[FloatArray] = []
            for portion in portions(own, self._config.token_budget):
                packed = Pass(portion, model)
                with model.autocast():
                    hidden = model.hidden(packed.layout)
                found += self._read(model, hidden, packed)
            return found

        with model.whole():
            values = iter(self._ranks.gather(read))
        return [[next(values) for _ in group] for group in wanted]

    def update(self, groups: Sequence[Group], learning_rate: float) -> UpdateStats:
        """Move the policy along the gradient of the loss of these rollouts.

        One optimizer step for each of `minibatches` parts of the groups, `epochs` times over; each
        accumulates its gradient over passes of at most `token_budget` tokens, with weights of the
        whole minibatch, so the split changes nothing. A rollout whose advantage is exactly 0 has no
        gradient without a KL penalty or an entropy bonus, and is left out of the passes (not of the
        averages). Under `sft` those without a positive reward, and under `dpo` groups of equal rewards
        are as if they were not there.

        Args:
            groups: with finite rewards and advantages.
            learning_rate: of this step.

        Raises:
            ModelError: the loss or the gradient is not finite; the weights are then untouched by
                the optimizer step that would have followed.
        """
        c = self._config
        if self._loss.mask_truncated:
            groups = _without_truncated(groups)
        if not self._loss.takes_estimator:
            groups = _with_signal(groups, self._loss.objective)
        # Groups without a reward may have left fewer than there are minibatches; none at all leave the
        # step to the momentum.
        num_parts = max(min(c.minibatches, len(groups)), 1)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = learning_rate
        moves = c.epochs * num_parts
        old: Sequence[Sequence[FloatArray | None]]
        if self._loss.old_logprobs == "rollout":
            old = [[_rollout_logprobs(rollout) for rollout in g.rollouts] for g in groups]
        elif moves > 1 and self._loss.takes_estimator:
            old = self.logprobs(groups)
        else:
            # The current policy is the old one, so its log-probabilities come out of the update's
            # own pass.
            old = [[None] * len(group.rollouts) for group in groups]
        ref = self._ref_logprobs(groups)
        totals = np.zeros(5)
        norms: list[float] = []
        differences: list[FloatArray] = []
        for epoch in range(c.epochs):
            for part in range(num_parts):
                members = range(part, len(groups), num_parts)
                lengths = [num_trained_tokens(r) for g in members for r in groups[g].rollouts]
                advantages = [groups[g].advantages for g in members]
                weights = iter(
                    rollout_weights(lengths, self._loss.aggregation, self._max_new_tokens)
                )
                loss: float | None = None
                if self._loss.objective == "dpo":
                    loss, advantages = self._preferences(
                        [groups[g] for g in members], [ref[g] for g in members]
                    )
                    weights = iter([1.0] * len(lengths))
                trained = [
                    [
                        TrainedRollout(rollout, float(advantage), before, reference, next(weights))
                        for rollout, advantage, before, reference in zip(
                            groups[g].rollouts, of_group, old[g], ref[g], strict=True
                        )
                    ]
                    for g, of_group in zip(members, advantages, strict=True)
                ]
                sums, norm, seen = self._optimizer_step(trained)
                totals += sums if loss is None else [loss, *sums[1:]]
                norms.append(norm)
                if epoch == 0:
                    differences += seen
        tokens = max(totals[4], 1.0)
        return UpdateStats(
            loss=float(totals[0]) / moves,
            grad_norm=float(np.mean(norms)),
            kl=float(totals[1] / tokens),
            clipped=float(totals[2] / tokens),
            entropy=float(totals[3] / tokens),
            mismatch=mismatch(differences, self._loss),
            num_updates=moves,
        )

    def _preferences(
        self, groups: Sequence[Group], ref: Sequence[Sequence[FloatArray | None]]
    ) -> tuple[float, list[FloatArray]]:
        """`preferences` of these groups by the policy as it is now."""
        log_ratios = [
            np.array([n.sum() - r.sum() for n, r in zip(*pair, strict=True) if r is not None])
            for pair in zip(self.logprobs(groups), ref, strict=True)
        ]
        return preferences([group.shaped for group in groups], log_ratios, self._loss.beta)

    def _optimizer_step(
        self, groups: Sequence[Sequence[TrainedRollout]]
    ) -> tuple[FloatArray, float, list[FloatArray]]:
        """Accumulate the gradient of one minibatch and step: sums of (loss, kl, clipped, entropy,
        tokens), gradient norm, and what `_backward` returns of each rollout."""
        self.optimizer.zero_grad()
        with_gradient = [[t for t in group if self._has_gradient(t)] for group in groups]
        own = self._own([group for group in with_gradient if group])
        todo = list(portions(own, self._config.token_budget))
        # Weights are brought together layer by layer, so all processes make as many passes.
        most = max(self._ranks.gather(lambda: [len(todo)]))
        added = [self._backward(Pass(portion, self.model)) for portion in todo]
        for _ in range(most - len(todo)):
            self._backward_of_nothing()
        # Sums of passes are added in one order on every process.
        told = self._ranks.gather(lambda: added)
        sums = np.sum([np.zeros(5), *(part for part, _ in told)], axis=0)
        differences = [values for _, seen in told for values in seen]
        for parameter in self.parameters.values():
            if parameter.grad is None:
                # Momentum must also move weights that got no gradient this time.
                parameter.grad = torch.zeros_like(parameter)
        gradients = [cast(Tensor, parameter.grad) for parameter in self.parameters.values()]
        norm = global_norm(gradients)
        if not (np.isfinite(norm) and np.isfinite(sums[0])):
            raise ModelError(
                f"the loss is {sums[0]:g} and its gradient's norm {norm:g}; expected finite values"
            )
        if norm > self._config.max_grad_norm:
            for gradient in gradients:
                _local(gradient).mul_(self._config.max_grad_norm / norm)
        self.optimizer.step()
        return sums, norm, differences

    def _backward(self, packed: Pass) -> tuple[FloatArray, list[FloatArray]]:
        """Add the gradient of a pass; return its sums of (loss, kl, clipped, entropy, tokens), and by
        how much the trainer's log-probabilities exceed the engine's, [T] of each rollout."""
        model, device = self.model, self.model.device
        trained, lengths = packed.rollouts, packed.lengths

        def spread(values: Sequence[float]) -> Tensor:
            return torch.tensor(np.repeat(values, lengths), dtype=torch.float32, device=device)

        def flat(arrays: Sequence[FloatArray]) -> Tensor:
            return torch.tensor(np.concatenate(arrays), dtype=torch.float32, device=device)

        weights = spread([t.weight for t in trained])
        advantages = spread([t.advantage for t in trained])
        sampled = flat([_rollout_logprobs(t.rollout) for t in trained])
        old = [t.old_logprobs for t in trained if t.old_logprobs is not None]
        ref = [t.ref_logprobs for t in trained if t.ref_logprobs is not None]
        old_flat, ref_flat = flat(old) if old else None, flat(ref) if ref else None
        sums = torch.zeros(4)
        differences = torch.zeros(packed.num_tokens, dtype=torch.float64)
        with model.autocast():
            hidden = model.hidden(packed.layout)
        # What depends on all of a completion, which no chunk need hold, is read beforehand.
        moved: Tensor | None = None
        if self._loss.ratio == "sequence" and old_flat is not None:
            now = flat(self._read(model, hidden, packed))
            moved = sum_over_completions(now - old_flat, lengths) / spread(lengths)
        log_ratios: Tensor | None = None
        if self._importance == "sequence":
            if old_flat is None:
                old_flat = flat(self._read(model, hidden, packed))
            log_ratios = sum_over_completions(old_flat - sampled, lengths)
        with model.autocast():
            gradient = torch.zeros_like(hidden)
            for chunk in packed.chunks:
                leaf = hidden.detach()[chunk.rows].requires_grad_()
                where = torch.tensor([i for _, _, i in chunk.targets], device=device)
                logprobs, entropy = self._chunk_logprobs(
                    model, leaf, chunk, with_entropy=self._loss.entropy_coef > 0
                )
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
                    completion_log_ratios=None if moved is None else moved[where],
                    ref_logprobs=None if ref_flat is None else ref_flat[where],
                    entropy=entropy,
                )
                loss = (terms.loss * weights[where]).sum()
                loss.backward()  # type: ignore[no-untyped-call]
                assert leaf.grad is not None
                gradient[chunk.rows] = leaf.grad
                counted = [terms.kl.sum(), terms.clipped.sum(), terms.entropy.sum()]
                sums += torch.stack([loss.detach(), *counted]).cpu()
        hidden.backward(gradient)  # type: ignore[no-untyped-call]
        totals = np.array([*sums.tolist(), packed.num_tokens])
        return totals, packed.by_rollout(differences.numpy())

    def _own(
        self, groups: Sequence[Sequence[TrainedRollout]]
    ) -> Sequence[Sequence[TrainedRollout]]:
        """The groups that this process computes: together about as long as any other's."""
        costs = [
            len(group[0].rollout.prompt.token_ids)
            + sum(num_trained_tokens(trained.rollout) for trained in group)
            for group in groups
        ]
        mine = self._ranks.share(costs)
        return groups[mine.start : mine.stop]

    def _backward_of_nothing(self) -> None:
        """A pass of one token that adds 0 to every gradient, beside the passes of other processes."""
        model = self.model
        with model.autocast():
            hidden = model.hidden(SharedPrefix([[0]], [[()]], model.device))
            nothing = (0.0 * model.logits(hidden)).sum()
        nothing.backward()  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _read(self, model: LanguageModel, hidden: Tensor, packed: Pass) -> list[FloatArray]:
        """Log-probabilities [T] of each rollout of a pass, from the decoder's output.

        Not to be called under autocast: older versions of torch (pytorch/pytorch#158232) would use
        the weights that were converted here again in the loss, without a way back for gradients.
        """
        flat = torch.zeros(packed.num_tokens, dtype=torch.float64)
        with model.autocast():
            for chunk in packed.chunks:
                where = [flat_index for _, _, flat_index in chunk.targets]
                values, _ = self._chunk_logprobs(model, hidden[chunk.rows], chunk)
                flat[where] = values.double().cpu()
        return packed.by_rollout(flat.numpy())

    def _chunk_logprobs(
        self, model: LanguageModel, hidden: Tensor, chunk: Chunk, *, with_entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probability of every target of a chunk, and the entropy of the distribution it was
        chosen from if that is asked for: hidden [R, hidden] -> [targets] each."""
        device = hidden.device
        rows = torch.tensor([row for row, _, _ in chunk.targets], device=device)
        ids = torch.tensor([token for _, token, _ in chunk.targets], device=device)
        if chunk.permitted:
            logits, column = model.permitted_logits(hidden, chunk.permitted)
            ids = torch.tensor([column[token] for _, token, _ in chunk.targets], device=device)
        else:
            logits = model.logits(hidden)
        entropy = entropies(logits / self._temperature)[rows] if with_entropy else None
        return token_logprobs(logits, rows, ids, self._temperature), entropy

    def _has_gradient(self, trained: TrainedRollout) -> bool:
        """Whether it moves the policy: a choice of one has no probability to change."""
        moves = trained.advantage != 0.0 or self._loss.kl_coef > 0 or self._loss.entropy_coef > 0
        return moves and num_trained_tokens(trained.rollout) > 0

    def _ref_logprobs(self, groups: Sequence[Group]) -> Sequence[Sequence[FloatArray | None]]:
        if not self._loss.has_reference:
            return [[None] * len(group.rollouts) for group in groups]
        if self._reference is not None:
            return self.logprobs(groups, self._reference)
        with self.model.adapters_disabled():
            return self.logprobs(groups)


def global_norm(gradients: Sequence[Tensor]) -> float:
    """L2 norm of all gradients together, which may be split over processes: all ask for it then.

    The squares of a row are summed as wide as the gradient is, those of rows in float64. In float32
    alone the sum of SmolLM2's 28 million embedding gradients is off by 1e-5, and by another 1e-5 on
    another number of processes.
    """
    first: Any = gradients[0]
    squares = torch.zeros((), dtype=torch.float64, device=first.device)
    for gradient in gradients:
        local = _local(gradient)
        # A process may have no row of a small one.
        if local.numel():
            width = torch.promote_types(local.dtype, torch.float32)
            rows = torch.linalg.vector_norm(local, dim=-1, dtype=width)
            squares += rows.double().square().sum()
    if hasattr(first, "full_tensor"):
        from torch.distributed.tensor import DTensor, Partial

        split = [Partial() if each.is_shard() else each for each in first.placements]
        squares = DTensor.from_local(squares, first.device_mesh, split).full_tensor()
    return float(squares.sqrt())


def _local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor that may be split."""
    split: Any = tensor
    return split.to_local() if hasattr(split, "to_local") else split


def _with_signal(groups: Sequence[Group], objective: str) -> list[Group]:
    """Those that an objective without estimator learns from: groups with a pair of unequal rewards, or
    of each group the rollouts with an advantage, where there are any."""
    if objective == "dpo":
        return [group for group in groups if group.shaped.min() < group.shaped.max()]
    kept = [group.only(np.flatnonzero(group.advantages).tolist()) for group in groups]
    return [group for group in kept if group.rollouts]


def _without_truncated(groups: Sequence[Group]) -> list[Group]:
    """The groups without rollouts that were cut off, where anything is left of them."""
    kept = [
        group.only([place for place, r in enumerate(group.rollouts) if not r.truncated])
        for group in groups
    ]
    return [group for group in kept if group.rollouts]
