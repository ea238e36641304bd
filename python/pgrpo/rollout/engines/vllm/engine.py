"""Generation by vLLM, in this process (`local`) or in processes of its own (`servers`).

What is the same for both is here: prompts become requests, group by group; what comes back is checked
and becomes rollouts; and weights are handed over and proved to have arrived. The samples of group b
take the seeds seed + b G, ..., seed + b G + G - 1, so no two of a step share one.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pgrpo.errors import EngineError
from pgrpo.rollout.engines import Peers, SyncStats
from pgrpo.rollout.engines.sampling import levels
from pgrpo.rollout.engines.vllm.backend import Backend, Completion, Request
from pgrpo.rollout.engines.vllm.groups import ChoiceGroup, FreeGroup, RequestedGroup
from pgrpo.rollout.engines.vllm.launch import engine_precision
from pgrpo.rollout.engines.vllm.probe import (
    PROBE_SAMPLES,
    PROBE_TOKENS,
    check_probe,
    probe_prompt,
)
from pgrpo.types import Group, Prompt, Rollout

if TYPE_CHECKING:
    from pgrpo.config.sections import ModelConfig
    from pgrpo.model.language_model import LanguageModel
    from pgrpo.rollout.settings import GenerationConfig

_FIRST_PROBES = 3
"""Syncs that are always probed, however large `probe_every` is."""


class VllmEngine:
    """The engine protocol over vLLM.

    Args:
        config: the section `[generation]`.
        model: the policy's model, whose weights `sync` hands over.
        source: the section `[model]`, where it came from.
        peers: the processes of the run, each of which has such an engine.
        may_sleep: nobody generates while the policy is updated.
    """

    def __init__(
        self,
        config: GenerationConfig,
        model: LanguageModel,
        source: ModelConfig,
        peers: Peers,
        *,
        may_sleep: bool = False,
    ) -> None:
        self._config = config
        self._model = model
        self._peers = peers
        self._version = -1
        self._num_syncs = 0
        self._last_probe = 0
        options = config.vllm
        if options.servers:
            from pgrpo.rollout.engines.vllm.servers import Servers

            self._backend: Backend = Servers(config, model, source, peers)
        else:
            from pgrpo.rollout.engines.vllm.local import Local

            self._backend = Local(config, model, source, peers, may_sleep=may_sleep)
        exact = model.precision == engine_precision(options, model.precision) == "fp32"
        self._tolerance = options.probe_tolerance or (1e-3 if exact else 0.2)

    def generate(
        self,
        prompts: Sequence[Prompt],
        group_size: int,
        *,
        seed: int,
        first: int = 0,
        greedy: bool = False,
    ) -> Iterator[Group]:
        """See `Engine.generate`."""
        return self._generate(prompts, group_size, seed, first, greedy, self._config)

    def sync(self, policy_version: int) -> SyncStats:
        """See `Engine.sync`."""
        start = time.perf_counter()
        num_bytes = self._backend.send_weights(policy_version)
        transfer_s = time.perf_counter() - start
        self._version = policy_version
        self._num_syncs += 1
        probe_error = None
        if (
            self._num_syncs <= _FIRST_PROBES
            or policy_version - self._last_probe >= self._config.vllm.probe_every
        ):
            probe_error = self._probe()
            self._last_probe = policy_version
        return SyncStats(num_bytes, transfer_s, probe_error)

    def interrupt(self) -> None:
        """See `Engine.interrupt`."""
        self._backend.interrupt()

    def sleep(self) -> None:
        """See `Engine.sleep`."""
        self._backend.sleep()

    def close(self) -> None:
        """See `Engine.close`."""
        self._backend.close()

    def _generate(
        self,
        prompts: Sequence[Prompt],
        group_size: int,
        seed: int,
        first: int,
        greedy: bool,
        config: GenerationConfig,
    ) -> Iterator[Group]:
        if self._version < 0:
            raise EngineError("the engine has no weights yet; sync comes before generate")
        longest = max((len(c) for p in prompts for c in p.choices or ()), default=0)
        rows = range(first * group_size, (first + len(prompts)) * group_size)
        drawn = np.stack([levels(seed, t, rows).numpy() for t in range(max(longest, 1))])
        groups: list[RequestedGroup] = []
        for b, prompt in enumerate(prompts):
            if prompt.choices is None:
                groups.append(
                    FreeGroup(
                        prompt,
                        group_size,
                        config,
                        self._model.end_ids,
                        None if greedy else seed + (first + b) * group_size,
                    )
                )
            else:
                mine = drawn[:, b * group_size : (b + 1) * group_size]
                groups.append(ChoiceGroup(prompt, group_size, config, None if greedy else mine))
        waiting: dict[int, tuple[int, int, int]] = {}
        """Key of a request -> its group, its number among the group's, and its samples."""
        num_keys = 0
        finished: deque[int] = deque()

        def submit(b: int, requests: Sequence[Request]) -> None:
            nonlocal num_keys
            for number, request in enumerate(requests):
                self._backend.submit(num_keys, request)
                waiting[num_keys] = (b, number, request.sampling["n"])
                num_keys += 1
            if not requests:
                finished.append(b)

        started = num_open = 0
        try:
            while started < len(groups) or num_open:
                while started < len(groups) and num_open < self._backend.capacity:
                    submit(started, groups[started].start())
                    started += 1
                    num_open += 1
                while finished:
                    b = finished.popleft()
                    num_open -= 1
                    yield self._sampled(first + b, groups[b])
                if waiting:
                    key, completions = self._backend.next()
                    b, number, n = waiting.pop(key)
                    self._check(groups[b].prompt, completions, n)
                    requests = groups[b].accept(number, completions)
                    if requests is not None:
                        submit(b, requests)
        finally:
            if waiting:
                self._backend.abandon()

    def _check(self, prompt: Prompt, completions: Sequence[Completion], n: int) -> None:
        if len(completions) != n or any(len(c.logprobs) != len(c.token_ids) for c in completions):
            raise EngineError(
                f"vLLM returned {len(completions)} samples of {n}, or not all log-probabilities, for "
                f"the prompt {prompt.example.text[:80]!r}"
            )
        for completion in completions:
            if not completion.token_ids or completion.finish_reason not in ("stop", "length"):
                raise EngineError(
                    f"vLLM returned a completion of {len(completion.token_ids)} tokens that ended "
                    f"with {completion.finish_reason!r}, for the prompt {prompt.example.text[:80]!r}"
                )
            if completion.version not in (None, str(self._version)):
                raise EngineError(
                    f"vLLM generated with weights {completion.version!r}, expected those after "
                    f"{self._version} updates"
                )

    def _sampled(self, b: int, group: RequestedGroup) -> Group:
        # Servers send -9999 for what is no number.
        if not all(-9999 < value < math.inf for logs in group.logprobs for value in logs):
            raise EngineError(
                "vLLM returned log-probabilities that are not finite, for the prompt "
                f"{group.prompt.example.text[:80]!r}"
            )
        texts = self._model.tokenizer.batch_decode(group.tokens, skip_special_tokens=True)
        return Group.sampled(
            [
                Rollout(
                    prompt=group.prompt,
                    group_id=b,
                    completion_ids=tuple(tokens),
                    completion=text,
                    rollout_logprobs=tuple(logprobs),
                    truncated=truncated,
                    policy_version=self._version,
                )
                for tokens, logprobs, truncated, text in zip(
                    group.tokens, group.logprobs, group.truncated, texts, strict=True
                )
            ]
        )

    def _probe(self) -> float:
        """Sample anew and compare; see `check_probe`."""
        prompt = probe_prompt(self._model, self._config)
        # Of the whole distribution, which is what the trainer computes.
        whole = self._config.model_copy(
            update={
                "max_new_tokens": min(PROBE_TOKENS, self._config.max_new_tokens),
                "top_k": 0,
                "top_p": 1.0,
                "min_p": 0.0,
                "stop": [],
            }
        )
        mine: list[Rollout] = []

        def sample() -> list[Rollout]:
            (group,) = self._generate([prompt], PROBE_SAMPLES, 0, 0, False, whole)
            mine.extend(group.rollouts)
            return []

        # An error of one process is told before the trainer's pass, which all make together.
        self._peers.gather(sample)
        return check_probe(mine, self._model, self._config.temperature, self._tolerance)
