"""Operators whose gradients are written out here: each passes over memory fewer times than autograd's
own, which on a CPU is what they cost. What they compute is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn


def token_logprobs(logits: Tensor, rows: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """Logarithms of softmax(logits / temperature) at some places: logits [R, V], rows and ids [N] to
    [N]."""
    return cast(Tensor, _TokenLogprobs.apply(logits, rows, ids, temperature))


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, rows: Tensor, ids: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(logits, rows, ids)
        ctx.temperature = temperature
        sums = torch.empty_like(logits[:, 0])
        for part in _blocks(logits):
            scaled = logits[part] if temperature == 1 else logits[part] / temperature
            sums[part] = scaled.logsumexp(-1)
        return logits[rows, ids] / temperature - sums[rows]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        logits, rows, ids = ctx.saved_tensors
        wanted: Tensor = gradients[0] / ctx.temperature
        of_row = wanted.new_zeros(len(logits)).index_add_(0, rows, wanted)
        gradient = torch.empty_like(logits)
        for part in _blocks(logits):
            scaled = logits[part] if ctx.temperature == 1 else logits[part] / ctx.temperature
            torch.softmax(scaled, -1, out=gradient[part]).mul_(-of_row[part, None])
        gradient.index_put_((rows, ids), wanted, accumulate=True)
        return gradient, None, None, None


def _blocks(logits: Tensor) -> list[slice]:
    """All rows of logits, on a CPU as many at a time as its caches hold beside what is made of them."""
    rows = 16 if logits.device.type == "cpu" else max(1, len(logits))
    return [slice(start, start + rows) for start in range(0, len(logits), rows)]


class _RMSNorm(torch.autograd.Function):
    """x / sqrt(mean x^2 + eps) times the weight, computed in fp32; with an `offset` the weight is
    1 + w and multiplies in fp32, else w multiplies in the precision of x (as transformers has it for
    Gemma, and for Llama)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: bool) -> Tensor:
        normed, inverse = _rms_normed(x, weight, eps, offset)
        ctx.save_for_backward(x, weight, inverse)
        ctx.offset = offset
        return normed

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, weight, inverse = ctx.saved_tensors
        gradient: Tensor = gradients[0]
        normed = x.float() * inverse
        of_weight = None
        if ctx.offset:
            gradient = gradient.float()
        if ctx.needs_input_grad[1]:
            of_weight = (gradient * normed.to(gradient.dtype)).flatten(0, -2).sum(0)
            of_weight = of_weight.to(weight.dtype)
        scale = 1.0 + weight.float() if ctx.offset else weight
        wanted = (gradient * scale).float()
        along = (wanted * normed).mean(-1, keepdim=True)
        of_x = wanted.addcmul_(normed, along, value=-1).mul_(inverse).to(x.dtype)
        return of_x, of_weight, None, None


def _rms_normed(x: Tensor, weight: Tensor, eps: float, offset: bool) -> tuple[Tensor, Tensor]:
    """What `_RMSNorm` makes of x, and 1 / sqrt(mean x^2 + eps)."""
    wide = x.float()
    inverse = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    normed = wide * inverse if wide is x else wide.mul_(inverse)
    if offset:
        return normed.mul_(1.0 + weight.float()).to(x.dtype), inverse
    return weight * normed.to(x.dtype), inverse


def _rms_norm(x: Tensor, weight: Tensor, eps: float, offset: bool) -> Tensor:
    # While completions grow nothing is differentiated, and autograd's share of a short norm is large.
    if not torch.is_grad_enabled():
        return _rms_normed(x, weight, eps, offset)[0]
    return cast(Tensor, _RMSNorm.apply(x, weight, eps, offset))


def replace_norms(model: nn.Module) -> int:
    """Let the RMS norms of a model compute their gradients as here; returns how many do.

    A norm is known by its name and by what it computes: only where a trial gives the very numbers of
    the module's own `forward` is that replaced.
    """
    forwards: dict[type[nn.Module], Callable[[Any, Tensor], Tensor] | None] = {}
    replaced = 0
    for module in model.modules():
        kind = type(module)
        if not kind.__name__.endswith("RMSNorm"):
            continue
        if kind not in forwards:
            forwards[kind] = _same_forward(module)
        if (forward := forwards[kind]) is not None:
            module.forward = partial(forward, module)
            replaced += 1
    return replaced


def _same_forward(norm: Any) -> Callable[[Any, Tensor], Tensor] | None:
    """Which of the two forms a norm has, found out by trial; None where neither."""
    weight: Any = getattr(norm, "weight", None)
    names = [n for n in ("variance_epsilon", "eps") if isinstance(getattr(norm, n, None), float)]
    if not isinstance(weight, Tensor) or len(names) != 1:
        return None
    # On a CPU, for the weights may be anywhere, or nowhere yet; and in all precisions that it may meet,
    # whatever its own is by now, so that all processes decide alike.
    eps: float = getattr(norm, names[0])
    numbers = torch.Generator().manual_seed(0)
    trial = torch.rand(weight.shape, generator=numbers)
    x = torch.randn(3, *weight.shape, generator=numbers)
    wide, narrow = torch.float32, torch.bfloat16
    for offset in (False, True):

        def agrees(of_weight: torch.dtype, of_x: torch.dtype, *, offset: bool = offset) -> bool:
            w, read = trial.to(of_weight), x.to(of_x)
            expected: Tensor = torch.func.functional_call(norm, {"weight": w}, read)
            found = _rms_norm(read, w, eps, offset)
            return found.dtype == expected.dtype and torch.equal(found, expected)

        with torch.no_grad():
            if all(agrees(*each) for each in ((wide, wide), (wide, narrow), (narrow, narrow))):
                return lambda module, x: _rms_norm(
                    x, module.weight, getattr(module, names[0]), offset
                )
    return None
