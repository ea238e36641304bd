"""What `[generation]` says of sampling, beyond the temperature: which tokens, and until when."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import PreTrainedTokenizerFast

if TYPE_CHECKING:
    from pgrpo.rollout.settings import GenerationConfig

_HEAD = 1024
"""So many of the likeliest tokens are sorted first: few distributions need more for their top_p, and
sorting a vocabulary of 150,000 takes twenty times as long."""


def levels(seed: int, position: int, rows: range) -> Tensor:
    """Random numbers in [0, 1) that choose the tokens at a position of completions, [rows] float64.

    Each depends on the seed, the position and its completion's row alone, so that whoever generates
    some of a step's completions draws the same for them as whoever generates all.

    Args:
        seed: of the step.
        position: of the token in the completion.
        rows: of the completions among all of the step.
    """
    random = torch.Generator().manual_seed(seed + position)
    return torch.rand(rows.stop, generator=random, dtype=torch.float64)[rows.start :]


def truncated(logs: Tensor, config: GenerationConfig) -> Tensor:
    """The distribution that is drawn from: [N, V] log-probabilities -> [N, V], -inf of what is cut.

    In vLLM's order, each step on what the one before has left, renormalised:

        min_p   a token stays if its probability is at least min_p times the likeliest one's
        top_k   ... if fewer than top_k tokens are likelier
        top_p   ... if those that are likelier have less than top_p together

    So tokens that are as likely as the last one that stays do so too (of these vLLM's top_p keeps as
    many as it needs), and the likeliest always does.
    """
    if not config.truncates:
        return logs
    if config.min_p:
        logs = _cut(logs, logs.amax(-1, keepdim=True) + math.log(config.min_p))
    if 0 < config.top_k < logs.shape[-1]:
        logs = _cut(logs, logs.topk(config.top_k).values[:, -1:])
    if config.top_p < 1:
        logs = logs.log_softmax(-1)
        size = min(_HEAD, logs.shape[-1])
        head = logs.topk(size).values.double()
        while size < logs.shape[-1] and bool((head.exp().sum(-1) < config.top_p).any()):
            size = min(8 * size, logs.shape[-1])
            head = logs.topk(size).values.double()
        likelier = head.exp().cumsum(-1) - head.exp()
        num_kept = (likelier < config.top_p).sum(-1, keepdim=True)
        logs = _cut(logs, head.gather(-1, num_kept - 1).to(logs.dtype))
    return logs.log_softmax(-1)


def _cut(logs: Tensor, floor: Tensor) -> Tensor:
    return logs.masked_fill(logs < floor, -torch.inf)


class StopSearch:
    """Finds the end of one completion by its text, token by token as it grows.

    It decodes as vLLM does, so both engines end at the same token.

    Args:
        tokenizer: of the model.
        prompt: token ids that the completion follows.
        stop: the texts that end it, none of them empty.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, prompt: Sequence[int], stop: Sequence[str]
    ) -> None:
        self._tokenizer: Any = tokenizer.backend_tokenizer
        self._stop = stop
        self._stream = DecodeStream(ids=list(prompt), skip_special_tokens=True)
        self._longest = max(map(len, stop))
        self._text = ""

    def is_over(self, token: int) -> bool:
        """Whether this next token completes one of the texts; special tokens have none."""
        try:
            # A character may need several tokens; until its last one there is no text.
            new = self._stream.step(self._tokenizer, token)
        except Exception:
            # Some tokens that are no text take back text of others, which ends the stream.
            self._stream = DecodeStream(skip_special_tokens=True)
            new = self._stream.step(self._tokenizer, token)
        text = self._text + (new or "")
        self._text = text[max(0, len(text) - self._longest + 1) :]
        return any(end in text for end in self._stop)
