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
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - its name everywhere
from transformers import AttentionInterface

from pgrpo.errors import ModelError

ATTENTION = "pgrpo_shared_prefix"

# Up to this many scores per layer, matrix products beat torch's fused kernel on a CPU: in bf16 always,
# for that kernel uses no bf16 units. Measured on SmolLM2 shapes, benches/attention.py.
PLAIN_LIMIT = {torch.float32: 2**21, torch.bfloat16: 2**62}

# Scores that exist at a time, few enough for caches; and rows of queries that see the same keys, few
# enough that causality leaves out many of these.
BLOCK_SCORES = 3 * 2**20
BLOCK_ROWS = 128


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


class _Pad(torch.autograd.Function):
    """Rows of [N, ...] by number, so that each is at `places` of the result, and anything elsewhere;
    what is elsewhere has no gradient."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, numbers: Tensor, places: Tensor) -> Tensor:
        ctx.places = places
        return rows.index_select(0, numbers)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0].index_select(0, ctx.places), None, None


class _Unpad(torch.autograd.Function):
    """The way back: the rows at `places` of [M, ...]."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, places: Tensor) -> Tensor:
        ctx.places, ctx.size = places, len(padded)
        return padded.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        gradient: Tensor = gradients[0]
        padded = gradient.new_zeros(ctx.size, *gradient.shape[1:])
        return padded.index_copy_(0, ctx.places, gradient), None


class _Rectangle:
    """Sequences that lie one behind the other, and a rectangle that pads them on the right.

    Args:
        lengths: [B, G] of the sequences, in the order in which they lie.
        device: where tokens are.
    """

    def __init__(self, lengths: NDArray[np.int64], device: torch.device) -> None:
        self._shape = *lengths.shape, int(lengths.max(initial=0))
        inside = np.arange(self._shape[-1]) < lengths[..., None]
        self.is_full = bool(inside.all())
        numbers = np.zeros(inside.shape, dtype=np.int64)
        numbers[inside] = np.arange(inside.sum())
        self._numbers = torch.as_tensor(numbers.ravel()).to(device)
        self._places = torch.as_tensor(np.flatnonzero(inside)).to(device)

    def pad(self, packed: Tensor) -> Tensor:
        """[N, H, D] -> [B, G, C, H, D]."""
        if not self.is_full:
            packed = cast(Tensor, _Pad.apply(packed, self._numbers, self._places))
        return packed.view(*self._shape, *packed.shape[1:])

    def unpad(self, padded: Tensor) -> Tensor:
        """[B, G, C, H, D] -> [N, H, D]."""
        rows = padded.flatten(0, 2)
        return rows if self.is_full else cast(Tensor, _Unpad.apply(rows, self._places))


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
        size = max((len(group) for group in completions), default=0)
        prompt_lengths = np.array([len(p) for p in prompts])
        lengths = np.zeros((len(prompts), size), dtype=np.int64)
        tokens: list[int] = []
        positions: list[int] = []
        for prompt in prompts:
            tokens += prompt
            positions += range(len(prompt))
        self._num_prompt_tokens = len(tokens)
        starts: list[int] = []
        for b, group in enumerate(completions):
            for g, completion in enumerate(group):
                starts.append(len(tokens))
                lengths[b, g] = len(completion)
                tokens += completion
                positions += range(len(prompts[b]), len(prompts[b]) + len(completion))

        def put(values: Any) -> Tensor:
            return torch.as_tensor(values, dtype=torch.long).to(device)

        self.input_ids = put(tokens)[None]
        self.position_ids = put(positions)[None]
        self.prompt_rows = put(np.cumsum(prompt_lengths) - 1)
        self.completion_rows = starts
        self._prompts = _Rectangle(prompt_lengths[:, None], device)
        self._completions = _Rectangle(lengths, device) if lengths.any() else None
        self._lengths = put(prompt_lengths)

    def pad_prompts(self, packed: Tensor) -> Tensor:
        """[T, H, D] -> [B, H, P, D], prompts padded on the right."""
        return _heads_first(self._prompts.pad(packed[: self._num_prompt_tokens]))[:, :, 0]

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
    ) -> Tensor:
        """See `Groups.attend`."""
        first, rest = self._num_prompt_tokens, len(query) - self._num_prompt_tokens
        parts = [x.split([first, rest]) for x in (query, key, value)]
        q, k, v = (self._prompts.pad(prompts) for prompts, _ in parts)
        k, v = _heads_first(k), _heads_first(v)
        out = self._prompts.unpad(_attend(q, k, v, None, options))
        if self._completions is None:
            return out
        prefix = _Prefix(k[:, :, 0], v[:, :, 0], self._lengths, self._prompts.is_full)
        q, k, v = (self._completions.pad(completions) for _, completions in parts)
        attended = _attend(q, _heads_first(k), _heads_first(v), prefix, options)
        return torch.cat([out, self._completions.unpad(attended)])


def _heads_first(x: Tensor) -> Tensor:
    """[B, G, C, H, D] -> [B, H, G, C, D], in which order matrix products take them."""
    return x.permute(0, 3, 1, 2, 4).contiguous()


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
        self._hidden: dict[int | None, Tensor | None] = {}
        """Of this token, by the window of a layer."""

    def position_ids(self) -> Tensor:
        """[1, B * G] position of the token that is added next."""
        return (self._lengths + self.length).repeat_interleave(self._group_size)[None]

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
    ) -> Tensor:
        """See `Groups.attend`; the first pass fills the prompts' part."""
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
        scores = _cap(torch.cat([to_prompt, to_own], dim=-1), options.softcap)
        if options.window not in self._hidden:
            self._hidden[options.window] = self._hidden_keys(length, options.window)
        if (hidden := self._hidden[options.window]) is not None:
            scores = scores.masked_fill(hidden, -torch.inf)
        weights = scores.softmax(-1).to(value.dtype)
        from_prompt = weights[..., :length].reshape(b, heads, g * r, length) @ prompt_value
        from_own = weights[..., length:].transpose(1, 2).reshape(b * g, heads, r, t + 1) @ own_value
        out = from_prompt.view(b, heads, g, r, d).transpose(1, 2).reshape(b * g, heads, r, d)
        return (out + from_own).reshape(b * g, heads * r, d)

    def next_token(self) -> None:
        """To be called after each pass over the layers that added a token."""
        self.length += 1
        self._hidden.clear()

    def _hidden_keys(self, num_prompt_keys: int, window: int | None) -> Tensor | None:
        """[B, 1, 1, 1, P + t + 1] what the token that is added does not see; None if it sees all."""
        at = (self._lengths + self.length)[:, None]
        device = at.device
        positions = torch.arange(num_prompt_keys, device=device)[None]
        seen = _visible(at, positions, window) & (positions < self._lengths[:, None])
        own = self._lengths[:, None] + torch.arange(self.length + 1, device=device)
        hidden = ~torch.cat([seen, _visible(at, own, window)], dim=1)
        return hidden[:, None, None, None] if bool(hidden.any()) else None


def _visible(at: Tensor, other: Tensor, window: int | None) -> Tensor:
    """Whether a token at position `at` sees one at position `other`."""
    seen = other <= at
    return seen if window is None else seen & (at - other < window)


def _cap(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap


@dataclass(frozen=True, slots=True)
class _Prefix:
    """The prompts that completions stand behind."""

    key: Tensor
    """[B, Hk, P, D], padded on the right."""
    value: Tensor
    lengths: Tensor
    """[B]"""
    is_full: bool
    """Whether all are equally long."""

    def hidden(self, rows: range, window: int | None) -> Tensor | None:
        """[B, 1 or C, P] which tokens of its prompt the rows of a completion do not see; None where
        they see all."""
        at = torch.arange(self.key.shape[2], device=self.lengths.device)
        lengths = self.lengths[:, None, None]
        if window is not None:
            own = lengths + torch.arange(rows.start, rows.stop, device=at.device)[:, None]
            return (at >= lengths) | (own - at >= window)
        return None if self.is_full else at >= lengths


def _attend(
    query: Tensor, key: Tensor, value: Tensor, prefix: _Prefix | None, options: AttentionOptions
) -> Tensor:
    """Causal softmax attention within sequences, behind a prefix for each B if there is one: queries
    [B, G, C, H, D] over keys and values [B, Hk, G, C, D], which gives [B, G, C, H, D]."""
    b, g, c, heads, _ = query.shape
    scores = b * g * heads * c * (c + (prefix.key.shape[2] if prefix else 0))
    plain = query.device.type == "cpu" and scores <= PLAIN_LIMIT.get(query.dtype, 0)
    # What is capped, no fused kernel computes.
    attend = _in_blocks if plain or options.softcap is not None else _fused
    return attend(query, key, value, prefix, options)


def _fused(
    query: Tensor, key: Tensor, value: Tensor, prefix: _Prefix | None, options: AttentionOptions
) -> Tensor:
    """`_attend` by torch's kernel, for which each completion has a copy of its prompt's keys."""
    b, g, c, heads, _ = query.shape
    q, k, v = query.transpose(2, 3), key.transpose(1, 2), value.transpose(1, 2)
    hidden = _hidden(range(c), range(c), options.window, query.device)[None, None]
    if prefix is not None:
        k = torch.cat([prefix.key[:, None].expand(-1, g, -1, -1, -1), k], dim=3)
        v = torch.cat([prefix.value[:, None].expand(-1, g, -1, -1, -1), v], dim=3)
        of_prefix = prefix.hidden(range(c), options.window)
        if of_prefix is None:
            of_prefix = hidden.new_zeros(b, 1, prefix.key.shape[2])
        parts = of_prefix.expand(b, c, -1), hidden[0].expand(b, -1, -1)
        hidden = torch.cat(parts, dim=2)[:, None, None].expand(-1, g, -1, -1, -1).flatten(0, 1)
    causal = prefix is None and options.window is None
    out = F.scaled_dot_product_attention(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        attn_mask=None if causal else ~hidden,
        is_causal=causal,
        scale=options.scaling,
        enable_gqa=heads != key.shape[1],
    )
    return out.view(b, g, heads, c, -1).transpose(2, 3)


@dataclass(frozen=True, slots=True)
class _Block:
    """Queries whose scores exist at the same time. Axes: [B, Hk, G, ...]."""

    groups: slice
    """Of B."""
    members: slice
    """Of G."""
    rows: slice
    """Of C, the queries."""
    keys: slice
    """Of C, the keys that some of these see."""
    mask: Tensor
    """[C', L'] -inf for those of the last L' of these keys that a query does not see, else 0."""
    prefix_mask: Tensor | None
    """[B', 1 or C', P] the same of the prefix; None where all of it is seen."""

    def of(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Its part of query [B, Hk, G, C, R, D], key and value [B, Hk, G, C, D], and those of the
        prefix [B, Hk, P, D]."""
        query, *own = tensors[:3]
        groups = (self.groups, slice(None))
        return (
            query[(*groups, self.members, self.rows)],
            *(x[(*groups, self.members, self.keys)] for x in own),
            *(x[self.groups] for x in tensors[3:]),
        )

    def attend(self, tensors: Sequence[Tensor], softcap: float | None) -> Tensor:
        """Softmax attention [B', Hk, G', C', R, D] of its part of the tensors."""
        query, key, value, *prefix = tensors
        b, heads, g, c, r, _ = query.shape
        num_keys, before = key.shape[3], prefix[0].shape[2] if prefix else 0
        # What the softmax is computed in must not depend on who calls.
        with torch.autocast(query.device.type, enabled=False):
            scores = query.flatten(3, 4) @ key.mT
            if prefix:
                # All completions of a group read the prompt's keys at once.
                shared = query.flatten(2, 4) @ prefix[0].mT
                scores = torch.cat([shared.view(b, heads, g, c * r, before), scores], dim=-1)
            scores = _cap(scores.view(b, heads, g, c, r, before + num_keys), softcap)
            # Behind autograd's back, which would only pass over the scores once more.
            unmasked = scores.detach()
            unmasked[..., -self.mask.shape[1] :].add_(self.mask[:, None])
            if self.prefix_mask is not None:
                unmasked[..., :before].add_(self.prefix_mask[:, None, None, :, None])
            weights = scores.softmax(-1).to(value.dtype)
            if not prefix:
                out = weights.flatten(3, 4) @ value
            else:
                shared, weights = weights.split([before, num_keys], -1)
                out = weights.flatten(3, 4) @ value
                out = out + (shared.flatten(2, 4) @ prefix[1]).view(out.shape)
        return out.view(query.shape)


class _Blocks(torch.autograd.Function):
    """Attention block by block; the backward pass computes the scores of each again, for to keep them
    takes memory, and longer than that once they have left the caches."""

    @staticmethod
    def forward(
        ctx: Any, blocks: Sequence[_Block], softcap: float | None, *tensors: Tensor
    ) -> Tensor:
        ctx.blocks, ctx.softcap = blocks, softcap
        ctx.save_for_backward(*tensors)
        out = torch.empty_like(tensors[0])
        for block in blocks:
            block.of([out, *tensors[1:3]])[0].copy_(block.attend(block.of(tensors), softcap))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        tensors: Sequence[Tensor] = ctx.saved_tensors
        # Each query is in one block; keys and values are in several,
        of_query = torch.empty_like(tensors[0])
        # and what these add up to must not be rounded each time.
        sums = [
            torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
            for x in tensors[1:]
        ]
        for block in ctx.blocks:
            parts = [part.detach().requires_grad_() for part in block.of(tensors)]
            with torch.enable_grad():
                out = block.attend(parts, ctx.softcap)
            wanted = block.of([gradients[0], *tensors[1:3]])[0]
            first, *others = torch.autograd.grad(out, parts, wanted)
            query, *totals = block.of([of_query, *sums])
            query.copy_(first)
            for total, gradient in zip(totals, others, strict=True):
                total.add_(gradient)
        return None, None, of_query, *(x.to(tensors[0].dtype) for x in sums)


def _in_blocks(
    query: Tensor, key: Tensor, value: Tensor, prefix: _Prefix | None, options: AttentionOptions
) -> Tensor:
    """`_attend` by matrix products, of as many queries at a time as caches hold the scores of."""
    b, g, c, heads, _ = query.shape
    # The heads that share keys are rows of one product: [B, Hk, G, C, R, D].
    q = query.unflatten(3, (key.shape[1], -1)).permute(0, 3, 1, 2, 4, 5).contiguous()
    tensors = [q * options.scaling, key, value]
    before = 0
    if prefix is not None:
        tensors += [prefix.key, prefix.value]
        before = prefix.key.shape[2]
    # Sequences to a block: of several groups, or if that is too many, some of one.
    members = max(1, BLOCK_SCORES // (heads * min(c, BLOCK_ROWS) * (before + c)))
    step, groups = min(members, g), max(1, members // g)
    blocks: list[_Block] = []
    for start in range(0, c, BLOCK_ROWS):
        rows = range(start, min(start + BLOCK_ROWS, c))
        # Before the rows themselves all keys are seen, where no window slides.
        first = rows.start if options.window is None else max(0, rows.start - options.window + 1)
        mask = _mask(_hidden(rows, range(first, rows.stop), options.window, query.device), query)
        keys = slice(0 if options.window is None else first, rows.stop)
        hidden = prefix.hidden(rows, options.window) if prefix else None
        of_prefix = None if hidden is None else _mask(hidden, query)
        blocks += [
            _Block(
                slice(n, n + groups),
                slice(m, m + step),
                slice(rows.start, rows.stop),
                keys,
                mask,
                None if of_prefix is None else of_prefix[n : n + groups],
            )
            for n in range(0, b, groups)
            for m in range(0, g, step)
        ]
    if len(blocks) == 1:
        out = blocks[0].attend(tensors, options.softcap)
    else:
        out = cast(Tensor, _Blocks.apply(blocks, options.softcap, *tensors))
    return out.permute(0, 2, 3, 1, 4, 5).flatten(3, 4)


def _mask(hidden: Tensor, like: Tensor) -> Tensor:
    """What is added to scores, which is faster than to fill them in."""
    return like.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)


def _hidden(rows: range, keys: range, window: int | None, device: torch.device) -> Tensor:
    """[C, L] which keys of its own sequence a query does not see, by their places there."""
    at = torch.arange(rows.start, rows.stop, device=device)[:, None]
    return ~_visible(at, torch.arange(keys.start, keys.stop, device=device), window)


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
