"""Generation by vLLM, in this process (`local`) or served by others (`servers`).

What is the same for both is here: which requests make a group, how a completion is chosen from a
list, and the proof that vLLM computes with the policy's weights. A free group is one request for G
samples, and those of prompt b take the seeds seed + b G, ..., seed + b G + G - 1. A choice is sampled
branch by branch: one request tells the probabilities of the tokens that may come next, and all
completions that stand at that branch draw from them, by the random numbers the transformers engine
would use.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from pgrpo.errors import EngineError
from pgrpo.model.attention import SharedPrefix
from pgrpo.model.choices import forced_tail, permitted
from pgrpo.rollout.engines import SyncStats
from pgrpo.rollout.engines.vllm.launch import engine_precision
from pgrpo.types import Example, FloatArray, Group, Prompt, Rollout

if TYPE_CHECKING:
    from pgrpo.config.sections import ModelConfig
    from pgrpo.model.language_model import LanguageModel
    from pgrpo.rollout.settings import GenerationConfig


@dataclass(frozen=True, slots=True)
class Request:
    """Samples that are wanted of one sequence of tokens."""

    token_ids: tuple[int, ...]
    sampling: dict[str, Any]
    """Arguments of vLLM's SamplingParams, as JSON values."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One sample."""

    token_ids: tuple[int, ...]
    logprobs: tuple[dict[int, float], ...]
    """Per token: log-probabilities in nats, of the sampled token and of those asked for."""
    finish_reason: str | None
    version: str | None
    """Of the weights that made it, several with a + between them; None if vLLM does not tell."""


class Backend(Protocol):
    """A vLLM that takes requests and returns their samples in the order in which they finish.

    Attributes:
        capacity: groups that are given to it at a time.
    """

    capacity: int

    def submit(self, key: int, request: Request) -> None:
        """Queue a request."""
        ...

    def next(self) -> tuple[int, list[Completion]]:
        """Wait for a request to be finished: its key and its samples."""
        ...

    def abandon(self) -> None:
        """Forget all requests."""
        ...

    def interrupt(self) -> None:
        """Make a `next` that another thread is in raise an EngineError."""
        ...

    def send_weights(self, version: int) -> int:
        """Have the model's weights, after `version` updates, in use and nothing cached of earlier ones;
        returns the bytes that moved."""
        ...

    def sleep(self) -> None:
        """See `Engine.sleep`."""
        ...

    def close(self) -> None:
        """See `Engine.close`."""
        ...


_PROBE_TEXT = (
    "A reader who has finished a long novel about the sea may want a short one about the mountains, "
    "while another asks for the same author again. The better advice is the one that remembers who is "
    "asking, what they liked before, and what they have had enough of by now. "
)
_PROBE_PROMPT_TOKENS = 80
"""More than one block of keys and values, so that the probe reads the prefix cache."""
_PROBE_TOKENS = 8
_PROBE_SAMPLES = 4
_FIRST_PROBES = 3


class VllmEngine:
    """The engine protocol over vLLM.

    Args:
        config: the section `[generation]`.
        model: the policy's model, whose weights `sync` hands over.
        source: the section `[model]`, where it came from.
        may_sleep: nobody generates while the policy is updated.
    """

    def __init__(
        self,
        config: GenerationConfig,
        model: LanguageModel,
        source: ModelConfig,
        *,
        may_sleep: bool = False,
    ) -> None:
        self._config = config
        self._model = model
        self._version = -1
        self._num_syncs = 0
        self._last_probe = 0
        options = config.vllm
        if options.servers:
            from pgrpo.rollout.engines.vllm.servers import Servers

            self._backend: Backend = Servers(config, model, source)
        else:
            from pgrpo.rollout.engines.vllm.local import Local

            self._backend = Local(config, model, source, may_sleep=may_sleep)
        exact = model.precision == engine_precision(options, model.precision) == "fp32"
        self._tolerance = options.probe_tolerance or (1e-3 if exact else 0.2)

    def generate(
        self, prompts: Sequence[Prompt], group_size: int, *, seed: int, greedy: bool = False
    ) -> Iterator[Group]:
        """See `Engine.generate`."""
        return self._generate(prompts, group_size, seed, greedy, self._config.max_new_tokens)

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
        greedy: bool,
        max_new_tokens: int,
    ) -> Iterator[Group]:
        if self._version < 0:
            raise EngineError("the engine has no weights yet; sync comes before generate")
        longest = max((len(c) for p in prompts for c in p.choices or ()), default=0)
        # [position, completion]; the first row is what the transformers engine draws first.
        levels = torch.rand(
            max(longest, 1),
            len(prompts) * group_size,
            generator=torch.Generator().manual_seed(seed),
            dtype=torch.float64,
        ).numpy()
        groups: list[_FreeGroup | _ChoiceGroup] = []
        for b, prompt in enumerate(prompts):
            if prompt.choices is None:
                groups.append(
                    _FreeGroup(
                        prompt,
                        group_size,
                        max_new_tokens,
                        self._model.end_ids,
                        0.0 if greedy else self._config.temperature,
                        seed + b * group_size,
                    )
                )
            else:
                mine = levels[:, b * group_size : (b + 1) * group_size]
                groups.append(
                    _ChoiceGroup(
                        prompt, group_size, self._config.temperature, None if greedy else mine
                    )
                )
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
                    yield self._sampled(b, groups[b])
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

    def _sampled(self, b: int, group: _FreeGroup | _ChoiceGroup) -> Group:
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
                    truncated=group.prompt.choices is None
                    and tokens[-1] not in self._model.end_ids,
                    policy_version=self._version,
                )
                for tokens, logprobs, text in zip(group.tokens, group.logprobs, texts, strict=True)
            ]
        )

    def _probe(self) -> float:
        """Mean absolute difference of the log-probabilities of a few sampled tokens, in nats.

        The prompt is always the same, so what vLLM caches of it comes from the weights before.
        """
        ids: list[int] = self._model.tokenizer(_PROBE_TEXT, add_special_tokens=False).input_ids
        ids = (ids * _PROBE_PROMPT_TOKENS)[
            : min(_PROBE_PROMPT_TOKENS, self._config.max_prompt_tokens)
        ]
        prompt = Prompt(Example(_PROBE_TEXT, ""), 0, tuple(ids))
        tokens = min(_PROBE_TOKENS, self._config.max_new_tokens)
        (group,) = self._generate([prompt], _PROBE_SAMPLES, 0, False, tokens)
        found = np.concatenate([rollout.rollout_logprobs for rollout in group.rollouts])
        expected = self._reference(prompt, [rollout.completion_ids for rollout in group.rollouts])
        differences = np.abs(found - expected)
        error = float(differences.mean())
        if not error <= self._tolerance:
            raise EngineError(
                f"after {self._version} updates vLLM's log-probabilities differ from the trainer's by "
                f"{error:.4f} nats on average (at most {float(differences.max()):.4f}) over "
                f"{len(found)} tokens, more than {self._tolerance:g}: its weights or its cache are not "
                "those of the policy (generation.vllm.probe_tolerance sets the bound)"
            )
        return error

    @torch.no_grad()
    def _reference(self, prompt: Prompt, completions: Sequence[tuple[int, ...]]) -> FloatArray:
        """The trainer's log-probabilities of completions: flat."""
        model = self._model
        layout = SharedPrefix([prompt.token_ids], [[c[:-1] for c in completions]], model.device)
        values: list[FloatArray] = []
        with model.autocast():
            hidden = model.hidden(layout)
            for completion, start in zip(completions, layout.completion_rows, strict=True):
                rows = [len(prompt.token_ids) - 1, *range(start, start + len(completion) - 1)]
                logits = model.logits(hidden[rows]) / self._config.temperature
                logs = logits.log_softmax(-1)[range(len(rows)), list(completion)]
                values.append(logs.double().cpu().numpy())
        return np.concatenate(values)


@dataclass(slots=True)
class _FreeGroup:
    """G samples of one prompt."""

    prompt: Prompt
    size: int
    max_new_tokens: int
    end_ids: frozenset[int]
    temperature: float
    seed: int
    tokens: list[list[int]] = field(default_factory=list[list[int]])
    logprobs: list[list[float]] = field(default_factory=list[list[float]])

    def start(self) -> list[Request]:
        greedy = self.temperature == 0.0
        sampling: dict[str, Any] = {
            # The likeliest completion is the same for all.
            "n": 1 if greedy else self.size,
            "temperature": self.temperature,
            "max_tokens": self.max_new_tokens,
            # The policy's own end tokens; vLLM would add those of the model's generation config.
            "ignore_eos": True,
            "stop_token_ids": sorted(self.end_ids),
            "logprobs": 0,
        }
        if not greedy:
            sampling["seed"] = self.seed
        return [Request(self.prompt.token_ids, sampling)]

    def accept(self, _number: int, completions: Sequence[Completion]) -> list[Request]:
        samples = list(completions) * (self.size // len(completions))
        self.tokens = [list(c.token_ids) for c in samples]
        self.logprobs = [
            [options[token] for token, options in zip(c.token_ids, c.logprobs, strict=True)]
            for c in samples
        ]
        return []


class _ChoiceGroup:
    """G choices from one list. Several completions may stand at one branch."""

    def __init__(
        self, prompt: Prompt, size: int, temperature: float, levels: FloatArray | None
    ) -> None:
        self.prompt = prompt
        self.tokens: list[list[int]] = [[] for _ in range(size)]
        self.logprobs: list[list[float]] = [[] for _ in range(size)]
        self._temperature = temperature
        self._levels = levels
        self._branches: list[tuple[int, ...]] = []
        self._missing = 0

    def start(self) -> list[Request]:
        """A request for every branch that completions stand at."""
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
                "temperature": self._temperature,
                "max_tokens": 1,
                "ignore_eos": True,
                "seed": 0,
                "allowed_token_ids": allowed,
                "logprobs": len(allowed),
            }
            requests.append(Request(self.prompt.token_ids + branch, sampling))
        return requests

    def accept(self, number: int, completions: Sequence[Completion]) -> list[Request] | None:
        """Draw at a branch; the next requests once all branches are done, None before."""
        branch = self._branches[number]
        allowed = permitted(self.prompt.choices or (), branch)
        known = completions[0].logprobs[0]
        logs = np.array([known[token] for token in allowed])
        logs -= np.log(np.exp(logs).sum())
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
