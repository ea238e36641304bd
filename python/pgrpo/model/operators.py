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
        scaled = logits if temperature == 1 else logits / temperature
        return scaled[rows, ids] - scaled.logsumexp(-1)[rows]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        logits, rows, ids = ctx.saved_tensors
        wanted: Tensor = gradients[0] / ctx.temperature
        of_row = wanted.new_zeros(len(logits)).index_add_(0, rows, wanted)
        scaled = logits if ctx.temperature == 1 else logits / ctx.temperature
        gradient = scaled.softmax(-1).mul_(-of_row[:, None])
        gradient.index_put_((rows, ids), wanted, accumulate=True)
        return gradient, None, None, None


class _RMSNorm(torch.autograd.Function):
    """x / sqrt(mean x^2 + eps) times the weight, computed in fp32; with an `offset` the weight is
    1 + w and multiplies in fp32, else w multiplies in the precision of x (as transformers has it for
    Gemma, and for Llama)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: bool) -> Tensor:
        wide = x.float()
        inverse = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        ctx.offset = offset
        normed = wide * inverse if wide is x else wide.mul_(inverse)
        if offset:
            return normed.mul_(1.0 + weight.float()).to(x.dtype)
        return weight * normed.to(x.dtype)

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
            found = cast(Tensor, _RMSNorm.apply(read, w, eps, offset))
            return found.dtype == expected.dtype and torch.equal(found, expected)

        with torch.no_grad():
            if all(agrees(*each) for each in ((wide, wide), (wide, narrow), (narrow, narrow))):
                return lambda module, x: cast(
                    Tensor, _RMSNorm.apply(x, module.weight, getattr(module, names[0]), offset)
                )
    return None
