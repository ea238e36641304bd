"""Rollouts packed for the model: which tokens a pass computes, and where each trained one is read.

Groups stay together, so that each prompt is computed once for all its completions, and a completion
that is a single choice costs nothing beyond its prompt. Logits exist for a bounded number of rows at
a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from pgrpo.model.attention import SharedPrefix
from pgrpo.model.choices import branches
from pgrpo.model.language_model import LanguageModel
from pgrpo.types import FloatArray, Rollout

# Logits held at a time: 64 MiB in fp32, enough rows for the head's matrix product to run at full
# speed with a vocabulary of 150,000.
_CHUNK_LOGITS = 2**24


@dataclass(frozen=True, slots=True)
class TrainedRollout:
    """A rollout with what the loss needs of it; arrays are [T] over its trained tokens."""

    rollout: Rollout
    advantage: float = 0.0
    old_logprobs: FloatArray | None = None
    ref_logprobs: FloatArray | None = None
    weight: float = 0.0
    """Of each of its tokens in the loss."""


def num_trained_tokens(rollout: Rollout) -> int:
    """Tokens of a completion that were really chosen: all of a free one; of one from a list, those
    up to the last position at which there was a choice."""
    choices = rollout.prompt.choices
    if choices is None:
        return len(rollout.completion_ids)
    return len(branches(choices, rollout.completion_ids))


@dataclass(slots=True)
class Chunk:
    """Rows of the decoder's output whose logits are computed together, and the tokens read there."""

    rows: list[int] = field(default_factory=list[int])
    targets: list[tuple[int, int, int]] = field(default_factory=list[tuple[int, int, int]])
    """(row within the chunk, token id, place among the pass's trained tokens)."""
    permitted: list[tuple[int, ...]] = field(default_factory=list[tuple[int, ...]])
    """Per row the token ids that may be chosen; empty when all may."""


class Pass:
    """What one forward pass computes.

    Args:
        groups: of rollouts; those of one group share their prompt.
        model: what will compute it.

    Attributes:
        rollouts: all of them, in order.
        lengths: trained tokens of each.
        num_tokens: trained tokens of all.
        layout: the packed tokens.
        chunks: where trained tokens are read.
    """

    def __init__(self, groups: Sequence[Sequence[TrainedRollout]], model: LanguageModel) -> None:
        self.rollouts = [trained for group in groups for trained in group]
        self.lengths = [num_trained_tokens(trained.rollout) for trained in self.rollouts]
        self.num_tokens = sum(self.lengths)
        lengths = iter(self.lengths)
        inputs = [
            [t.rollout.completion_ids[: max(next(lengths) - 1, 0)] for t in group]
            for group in groups
        ]
        prompts = [group[0].rollout.prompt.token_ids for group in groups]
        self.layout = SharedPrefix(prompts, inputs, model.device)
        # The first token of every completion is read at the prompt's last row, once per group.
        free: dict[int, list[tuple[int, int]]] = {}
        bound: dict[int, list[tuple[int, int]]] = {}
        allowed: dict[int, tuple[int, ...]] = {}
        flat = n = 0
        prompt_row = -1
        for group in groups:
            prompt_row += len(group[0].rollout.prompt.token_ids)
            for trained in group:
                rollout = trained.rollout
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
        limit = max(1, _CHUNK_LOGITS // model.vocab_size)
        self.chunks = [*_chunks(free, {}, limit), *_chunks(bound, allowed, limit)]

    def by_rollout(self, values: FloatArray) -> list[FloatArray]:
        """One array [T] for each rollout, out of the values of all trained tokens."""
        return np.split(values, np.cumsum(self.lengths)[:-1])


def _chunks(
    rows: dict[int, list[tuple[int, int]]], allowed: dict[int, tuple[int, ...]], limit: int
) -> Iterator[Chunk]:
    order = sorted(rows)
    for start in range(0, len(order), limit):
        chunk = Chunk(rows=order[start : start + limit])
        for i, row in enumerate(chunk.rows):
            chunk.targets += [(i, token, flat) for token, flat in rows[row]]
            if allowed:
                chunk.permitted.append(allowed[row])
        yield chunk


def portions(
    groups: Sequence[Sequence[TrainedRollout]], token_budget: int
) -> Iterator[list[list[TrainedRollout]]]:
    """Consecutive rollouts, by groups, in as few passes as the budget of tokens allows.

    A group is only split when it does not fit by itself; its prompt is then computed in each part.
    A single rollout beyond the budget gets a pass of its own.
    """
    done: list[list[TrainedRollout]] = []
    used = 0
    for group in groups:
        prompt = len(group[0].rollout.prompt.token_ids)
        costs = [num_trained_tokens(trained.rollout) for trained in group]
        if done and used + prompt + sum(costs) > token_budget:
            yield done
            done, used = [], 0
        used += prompt
        part: list[TrainedRollout] = []
        for trained, cost in zip(group, costs, strict=True):
            if (done or part) and used + cost > token_budget:
                yield [*done, part] if part else done
                done, part, used = [], [], prompt
            part.append(trained)
            used += cost
        done.append(part)
    if done:
        yield done
