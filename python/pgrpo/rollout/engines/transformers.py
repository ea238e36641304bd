"""Generation with the policy's own weights, in this process.

Prompts are prefilled once per group; all G completions then grow together, reading one copy of the
prompt's keys and values (`attention.PrefixCache`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pgrpo.model.attention import PrefixCache
from pgrpo.model.choices import forced_tail, permitted
from pgrpo.model.language_model import LanguageModel
from pgrpo.rollout.engines.sampling import StopSearch, levels, truncated
from pgrpo.types import Group, Prompt, Rollout

if TYPE_CHECKING:
    from pgrpo.rollout.settings import GenerationConfig


class TransformersEngine:
    """The engine protocol over a `LanguageModel` that is shared with the policy.

    Args:
        config: the section `[generation]`.
        model: the policy's model; there is one copy of the weights, so `sync` has nothing to move.
    """

    def __init__(self, config: GenerationConfig, model: LanguageModel) -> None:
        self._config = config
        self._model = model
        self._policy_version = 0

    def sync(self, policy_version: int) -> None:
        """See `Engine.sync`."""
        self._policy_version = policy_version

    def interrupt(self) -> None:
        """See `Engine.interrupt`. Nothing generates here beside the thread that would call it."""

    def sleep(self) -> None:
        """See `Engine.sleep`."""

    def close(self) -> None:
        """See `Engine.close`."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        group_size: int,
        *,
        seed: int,
        first: int = 0,
        greedy: bool = False,
    ) -> Iterator[Group]:
        """See `Engine.generate`. All completions grow together, so all groups come at the end."""
        with self._model.whole():
            rollouts = self._generate(prompts, group_size, seed, first, greedy) if prompts else []
        for start in range(0, len(rollouts), group_size):
            yield Group.sampled(rollouts[start : start + group_size])

    @torch.no_grad()
    def _generate(
        self, prompts: Sequence[Prompt], group_size: int, seed: int, first: int, greedy: bool
    ) -> list[Rollout]:
        numbers = range(first * group_size, (first + len(prompts)) * group_size)
        rows = [prompt for prompt in prompts for _ in range(group_size)]
        tokens: list[list[int]] = [[] for _ in rows]
        logprobs: list[list[float]] = [[] for _ in rows]
        done = [False] * len(rows)
        longest = max(
            self._config.max_new_tokens if p.choices is None else max(map(len, p.choices))
            for p in prompts
        )
        stops = [self._stop_search(prompt) for prompt in rows]
        ended = [False] * len(rows)
        cache = PrefixCache([p.token_ids for p in prompts], group_size, longest, self._model.device)
        with self._model.autocast():
            # A choice that is no choice costs nothing; it may even end the completion here.
            for n in range(len(rows)):
                done[n] = self._skip_forced(rows[n], tokens[n], logprobs[n])
            hidden = self._model.prefill(cache).repeat_interleave(group_size, 0)
            position = 0
            while True:
                due = [n for n in range(len(rows)) if not done[n] and len(tokens[n]) == position]
                drawn = None if greedy else levels(seed, position, numbers)
                self._sample(hidden, due, rows, tokens, logprobs, drawn)
                for n in due:
                    if rows[n].choices is None:
                        search, last = stops[n], tokens[n][-1]
                        found = search is not None and search.is_over(last)
                        ended[n] = found or last in self._model.end_ids
                        done[n] = ended[n] or len(tokens[n]) >= self._config.max_new_tokens
                    else:
                        done[n] = self._skip_forced(rows[n], tokens[n], logprobs[n])
                if all(done):
                    break
                step = [t[position] if position < len(t) else 0 for t in tokens]
                hidden = self._model.extend(cache, torch.tensor(step, device=self._model.device))
                position += 1
        texts = self._model.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [
            Rollout(
                prompt=prompt,
                group_id=first + n // group_size,
                completion_ids=tuple(tokens[n]),
                completion=texts[n],
                rollout_logprobs=tuple(logprobs[n]),
                truncated=prompt.choices is None and not ended[n],
                policy_version=self._policy_version,
            )
            for n, prompt in enumerate(rows)
        ]

    def _stop_search(self, prompt: Prompt) -> StopSearch | None:
        if prompt.choices is not None or not self._config.stop:
            return None
        return StopSearch(self._model.tokenizer, prompt.token_ids, self._config.stop)

    @staticmethod
    def _skip_forced(prompt: Prompt, tokens: list[int], logprobs: list[float]) -> bool:
        """Append what must follow anyway; True when that completes the completion."""
        if prompt.choices is None:
            return False
        tail = forced_tail(prompt.choices, tokens)
        tokens += tail
        logprobs += [0.0] * len(tail)
        return not permitted(prompt.choices, tokens)

    def _sample(
        self,
        hidden: Tensor,
        due: Sequence[int],
        rows: Sequence[Prompt],
        tokens: list[list[int]],
        logprobs: list[list[float]],
        levels: Tensor | None,
    ) -> None:
        """Append one token, and its log-probability, to each completion that is due for one: the one
        that its level [N] chooses, or without levels the likeliest."""
        for constrained in (False, True):
            members = [n for n in due if (rows[n].choices is not None) == constrained]
            if not members:
                continue
            column: dict[int, int] = {}
            if constrained:
                options = [permitted(rows[n].choices or (), tokens[n]) for n in members]
                logits, column = self._model.permitted_logits(hidden[members], options)
            else:
                logits = self._model.logits(hidden[members])
            union = list(column)
            logs = (logits.cpu() / self._config.temperature).log_softmax(-1)
            if levels is None:
                chosen = logs.argmax(-1)
            else:
                logs = truncated(logs, self._config)
                chosen = _draw(logs, levels[members])
            values = logs.gather(1, chosen[:, None])[:, 0].tolist()
            for n, index, value in zip(members, chosen.tolist(), values, strict=True):
                tokens[n].append(union[index] if constrained else index)
                logprobs[n].append(value)


def _draw(logs: Tensor, levels: Tensor) -> Tensor:
    """One token per row of log-probabilities [N, V] by inverting the distribution function at levels
    [N].

    It takes a single random number per row, where torch.multinomial draws one per token: 0.05 s for
    64 rows of a 49,152 token vocabulary.
    """
    cumulated = logs.double().exp().cumsum(-1)
    level = levels[:, None] * cumulated[:, -1:]
    # The first token whose cumulated probability lies above the level, so never an impossible one.
    return torch.searchsorted(cumulated, level, right=True)[:, 0].clamp(max=logs.shape[1] - 1)
