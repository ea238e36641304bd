"""Attention over groups of rollouts that computes each prompt once.

All tokens of a batch are packed into one row without padding, prompts first, then completions:

    p0 p0 p0 | p1 p1 | c00 c00 | c01 | c10 c10 c10 | c11        T tokens

so that every linear layer and norm runs on exactly the T tokens there are. Only attention knows
about groups: prompt tokens attend causally within their prompt; completion tokens attend to their
group's prompt and causally within their own completion. Autograd carries the completions' gradients
through the prompt's keys and values, so the result equals G independent sequences up to rounding.

The function plugs into any transformers model that takes its attention from `AttentionInterface`;
it is chosen by `attn_implementation=ATTENTION` and finds its groups in the keyword `groups`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - its name everywhere
from transformers import AttentionInterface

from pgrpo.errors import ModelError

ATTENTION = "pgrpo_shared_prefix"

# Below this many scores per layer the plain formula beats the fused CPU kernel (which wins by memory
# traffic, and has no bf16 matrix units behind it); measured on SmolLM2 shapes, benches/attention.py.
_PLAIN_LIMIT = {torch.float32: 2**22, torch.bfloat16: 2**24}


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """What a model asks of its attention besides queries, keys and values."""

    scaling: float
    window: int | None
    softcap: float | None


class Groups(Protocol):
    """What the attention function needs to know of the batch."""

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
    ) -> Tensor:
        """Packed queries [T, H, D], keys and values [T, Hk, D] -> attended values [T, H, D]."""
        ...


class SharedPrefix:
    """Groups of one forward pass: B prompts, each with up to G completions of up to C tokens.

    Attributes:
        input_ids: [1, T] packed tokens.
        position_ids: [1, T] each token's position in its own sequence.
        prompt_rows: [B] packed index of every prompt's last token.
        completion_rows: packed index of the first token of every completion, in the given order;
            a completion of L tokens occupies L consecutive rows.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[Sequence[int]]],
        device: torch.device,
    ) -> None:
        """Lay out `completions[b]` (any number of any length, also empty) behind `prompts[b]`."""
        num_groups = len(prompts)
        size = max((len(group) for group in completions), default=0)
        longest = max((len(c) for group in completions for c in group), default=0)
        prompt_lengths = np.array([len(p) for p in prompts])
        tokens: list[int] = []
        positions: list[int] = []
        # slots: where each cell of the padded rectangle finds its packed token (0 where there is
        # none: the cell's result is never read); cells: the way back.
        prompt_slots = np.zeros((num_groups, prompt_lengths.max()), dtype=np.int64)
        completion_slots = np.zeros((num_groups, size, longest), dtype=np.int64)
        for b, prompt in enumerate(prompts):
            prompt_slots[b, : len(prompt)] = np.arange(len(tokens), len(tokens) + len(prompt))
            tokens += prompt
            positions += range(len(prompt))
        cells: list[int] = []
        starts: list[int] = []
        for b, group in enumerate(completions):
            for g, completion in enumerate(group):
                start, length = len(tokens), len(completion)
                starts.append(start)
                completion_slots[b, g, :length] = np.arange(start, start + length)
                first = (b * size + g) * longest
                cells += range(first, first + length)
                tokens += completion
                positions += range(len(prompts[b]), len(prompts[b]) + length)
        in_prompt = np.arange(prompt_slots.shape[1]) < prompt_lengths[:, None]

        def put(values: Any) -> Tensor:
            return torch.as_tensor(values, dtype=torch.long).to(device)

        self.input_ids = put(tokens)[None]
        self.position_ids = put(positions)[None]
        self.prompt_rows = put(np.cumsum(prompt_lengths) - 1)
        self.completion_rows = starts
        self._lengths = put(prompt_lengths)
        self._prompt_slots = put(prompt_slots)
        self._prompt_cells = put(np.flatnonzero(in_prompt))
        self._completion_slots = put(completion_slots)
        self._completion_cells = put(cells)
        self._masks: dict[tuple[int | None, bool], Tensor] = {}

    def pad_prompts(self, packed: Tensor) -> Tensor:
        """[T, H, D] -> [B, H, P, D], prompts padded on the right."""
        return packed[self._prompt_slots].transpose(1, 2)

    def prompt_mask(self, window: int | None) -> Tensor:
        """[1, 1, P, P] which prompt tokens a prompt token sees. Padding is to the right, so
        causality alone keeps it out of sight."""
        key = (window, False)
        if key not in self._masks:
            at = torch.arange(self._prompt_slots.shape[1], device=self._lengths.device)
            self._masks[key] = _visible(at[:, None], at[None, :], window)[None, None]
        return self._masks[key]

    def completion_mask(self, window: int | None) -> Tensor:
        """[B, 1, 1, C, P + C] which tokens a completion token sees: prompt, then completion."""
        key = (window, True)
        if key not in self._masks:
            longest, device = self._completion_slots.shape[2], self._lengths.device
            lengths = self._lengths[:, None, None]
            prompt_at = torch.arange(self._prompt_slots.shape[1], device=device)[None, None, :]
            own_at = lengths + torch.arange(longest, device=device)[None, None, :]
            at = own_at.transpose(1, 2)
            seen = _visible(at, prompt_at, window) & (prompt_at < lengths)
            mask = torch.cat([seen, _visible(at, own_at, window)], dim=2)
            self._masks[key] = mask[:, None, None]
        return self._masks[key]

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
    ) -> Tensor:
        """See `Groups.attend`."""
        prompt_key, prompt_value = self.pad_prompts(key), self.pad_prompts(value)
        out = _attend(
            self.pad_prompts(query),
            prompt_key,
            prompt_value,
            self.prompt_mask(options.window),
            options,
            causal=options.window is None,
        )
        packed = out.transpose(1, 2).flatten(0, 1)[self._prompt_cells]
        if self._completion_cells.numel() == 0:
            return packed
        b, g, _ = self._completion_slots.shape

        def own(x: Tensor) -> Tensor:
            return x[self._completion_slots].transpose(2, 3)  # [B, G, H, C, D]

        def with_prompt(prompt: Tensor, x: Tensor) -> Tensor:
            shared = prompt[:, None].expand(-1, g, -1, -1, -1)
            return torch.cat([shared, own(x)], dim=3).flatten(0, 1)

        mask = self.completion_mask(options.window).expand(b, g, -1, -1, -1).flatten(0, 1)
        out = _attend(
            own(query).flatten(0, 1),
            with_prompt(prompt_key, key),
            with_prompt(prompt_value, value),
            mask,
            options,
        )
        completions = out.transpose(1, 2).flatten(0, 1)[self._completion_cells]
        return torch.cat([packed, completions])


class PrefixCache:
    """Keys and values while generating: one copy per prompt, and each completion's own.

    The first forward pass (`prefill`) packs the prompts; every later one adds one token to each of
    the B x G completions. Nothing is ever copied per completion but its own tokens.
    """

    def __init__(
        self, prompts: Sequence[Sequence[int]], group_size: int, capacity: int, device: torch.device
    ) -> None:
        """Room for `capacity` tokens in each of `group_size` completions per prompt."""
        self.prefill = SharedPrefix(prompts, [[] for _ in prompts], device)
        self.length = 0
        self._capacity = capacity
        self._group_size = group_size
        self._lengths = torch.tensor([len(p) for p in prompts], device=device)
        self._prompt: dict[int, tuple[Tensor, Tensor]] = {}
        self._own: dict[int, tuple[Tensor, Tensor]] = {}

    def position_ids(self) -> Tensor:
        """[1, B * G] position of the token that is added next."""
        return (self._lengths + self.length).repeat_interleave(self._group_size)[None]

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
    ) -> Tensor:
        """See `Groups.attend`; the caller raises `length` after each pass over the layers."""
        if layer not in self._prompt:
            self._prompt[layer] = self.prefill.pad_prompts(key), self.prefill.pad_prompts(value)
            return self.prefill.attend(layer, query, key, value, options)
        prompt_key, prompt_value = self._prompt[layer]
        b, heads, length, d = prompt_key.shape
        g = self._group_size
        if layer not in self._own:
            shape = (b * g, heads, self._capacity, d)
            self._own[layer] = key.new_empty(shape), value.new_empty(shape)
        own_key, own_value = self._own[layer]
        t = self.length
        own_key[:, :, t], own_value[:, :, t] = key, value
        own_key, own_value = own_key[:, :, : t + 1], own_value[:, :, : t + 1]

        r = query.shape[1] // heads
        q = query.view(b * g, heads, r, d) * options.scaling
        # [B, Hk, G*r, D] @ [B, Hk, D, P]: the whole group reads the prompt's keys once.
        q_group = q.view(b, g, heads, r, d).transpose(1, 2).reshape(b, heads, g * r, d)
        to_prompt = (q_group @ prompt_key.mT).view(b, heads, g, r, length)
        to_own = (q @ own_key.mT).view(b, g, heads, r, t + 1).transpose(1, 2)
        at = (self._lengths + t)[:, None]
        positions = torch.arange(length, device=at.device)[None]
        seen = _visible(at, positions, options.window) & (positions < self._lengths[:, None])
        own_seen = _visible(
            at, self._lengths[:, None] + torch.arange(t + 1, device=at.device), options.window
        )
        mask = torch.cat([seen, own_seen], dim=1)[:, None, None, None]
        scores = _cap(torch.cat([to_prompt, to_own], dim=-1), options.softcap)
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1).to(value.dtype)
        from_prompt = weights[..., :length].reshape(b, heads, g * r, length) @ prompt_value
        from_own = weights[..., length:].transpose(1, 2).reshape(b * g, heads, r, t + 1) @ own_value
        out = from_prompt.view(b, heads, g, r, d).transpose(1, 2).reshape(b * g, heads, r, d)
        return (out + from_own).reshape(b * g, heads * r, d)


def _visible(at: Tensor, other: Tensor, window: int | None) -> Tensor:
    """Whether a token at position `at` sees one at position `other`."""
    seen = other <= at
    return seen if window is None else seen & (at - other < window)


def _cap(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    options: AttentionOptions,
    causal: bool = False,
) -> Tensor:
    """Softmax attention with shared key heads: [N, H, C, D] over [N, Hk, L, D] under a mask that
    broadcasts to [N, 1, C, L]; `causal` says that the mask is the causal one of a square."""
    n, heads, c, d = query.shape
    kv_heads, length = key.shape[1:3]
    plain = query.device.type == "cpu" and n * heads * c * length <= _PLAIN_LIMIT.get(
        query.dtype, 0
    )
    if options.softcap is None and not plain:
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if causal else mask,
            is_causal=causal,
            scale=options.scaling,
            enable_gqa=heads != kv_heads,
        )
    r = heads // kv_heads
    q = (query * options.scaling).reshape(n, kv_heads, r * c, d)
    scores = _cap((q @ key.mT).view(n, kv_heads, r, c, length), options.softcap)
    weights = scores.masked_fill(~mask[:, :, None], -torch.inf).softmax(-1).to(value.dtype)
    return (weights.view(n, kv_heads, r * c, length) @ value).view(n, heads, c, d)


def _shared_prefix_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    groups: Groups | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The transformers attention interface: [1, H, T, D] in, [1, T, H, D] out.

    Dropout is left out on purpose: the probabilities that are trained must be those that were
    sampled from.
    """
    if groups is None:
        raise ModelError("this model does not pass keyword arguments on to its attention")
    for name in ("s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ModelError(
                f"{type(module).__name__} uses {name}, which shared prompts do not support"
            )
    options = AttentionOptions(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
    )
    # Under autocast the rotary embedding leaves queries and keys in fp32 and values in bf16.
    packed = [x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value)]
    layer: int = module.layer_idx  # type: ignore[assignment]
    return groups.attend(layer, packed[0], packed[1], packed[2], options)[None], None


AttentionInterface.register(ATTENTION, _shared_prefix_attention)
