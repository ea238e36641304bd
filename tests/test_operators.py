"""Operators with gradients of their own, against autograd's of the same formulas."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_model
from torch import Tensor
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from pgrpo.model.operators import replace_norms, token_logprobs


@pytest.mark.parametrize("kind", [LlamaRMSNorm, GemmaRMSNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_have_the_numbers_and_the_gradients_of_transformers(
    kind: type[LlamaRMSNorm | GemmaRMSNorm], dtype: torch.dtype
) -> None:
    numbers = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 16, generator=numbers).to(dtype)
    wanted = torch.randn(2, 5, 16, generator=numbers).to(dtype)
    results: list[tuple[Tensor, ...]] = []
    for ours in (False, True):
        norm = kind(16, eps=1e-5).to(dtype)
        norm.weight.data.copy_(torch.linspace(-1, 2, 16))
        if ours:
            assert replace_norms(norm) == 1
        read = x.clone().requires_grad_()
        out = norm(read)
        out.backward(wanted)
        assert read.grad is not None
        assert norm.weight.grad is not None
        results.append((out.detach(), read.grad, norm.weight.grad))
    (theirs, *expected), (own, *found) = results
    assert torch.equal(own, theirs)
    for ours, gradient in zip(found, expected, strict=True):
        assert ours.dtype == gradient.dtype
        tolerance = 1e-6 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(ours, gradient, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("family", ["smollm2", "qwen3", "gemma", "gemma2"])
def test_every_norm_of_a_model_is_known(family: str) -> None:
    model = tiny_model(family).model
    norms = [m for m in model.modules() if type(m).__name__.endswith("RMSNorm")]
    assert norms
    assert all("forward" in vars(norm) for norm in norms)


def test_a_norm_that_computes_something_else_is_left_alone() -> None:
    class HalvingRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return super().forward(hidden_states) / 2

    norm = HalvingRMSNorm(8)
    assert replace_norms(norm) == 0
    torch.testing.assert_close(norm(torch.ones(1, 8)), torch.full((1, 8), 0.5))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_have_the_gradients_of_log_softmax(temperature: float) -> None:
    numbers = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4, 11, generator=numbers, dtype=torch.float64)
    logits[1, :9] = -torch.inf
    # A row that is read twice at one place, and one that is not read.
    rows, ids = torch.tensor([0, 0, 0, 1, 3]), torch.tensor([2, 2, 5, 10, 0])
    wanted = torch.randn(5, generator=numbers, dtype=torch.float64)
    gradients: list[Tensor] = []
    values: list[Tensor] = []
    for ours in (False, True):
        leaf = logits.clone().requires_grad_()
        if ours:
            found = token_logprobs(leaf, rows, ids, temperature)
        else:
            found = (leaf / temperature).log_softmax(-1)[rows, ids]
        found.backward(wanted)
        assert leaf.grad is not None
        values.append(found.detach())
        gradients.append(leaf.grad)
    torch.testing.assert_close(values[1], values[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=1e-12)


class RoundedLastRMSNorm(LlamaRMSNorm):
    """As of OLMo 2: the weight multiplies before the product is brought to the precision of x."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        wide = hidden_states.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight * normed).to(hidden_states.dtype)


def test_a_norm_that_differs_in_another_precision_alone_is_left_alone() -> None:
    assert replace_norms(RoundedLastRMSNorm(8)) == 0
