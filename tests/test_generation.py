"""Generation against the policy's own log-probabilities and a naive greedy loop."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from conftest import VOCAB, grouped, tiny_model

from pgrpo.config.sections import LossConfig, OptimizerConfig
from pgrpo.model.choices import branches, forced_tail, permitted
from pgrpo.model.language_model import LanguageModel
from pgrpo.rollout.engines import Engine
from pgrpo.rollout.engines.transformers import TransformersEngine
from pgrpo.train.policy import Policy
from pgrpo.types import Example, Prompt, Rollout

CHOICES = ((5,), (6, 7, 8, 9), (6, 7, 10), (11, 12, 13))


def make_prompts(choices: bool = False) -> list[Prompt]:
    rng = np.random.default_rng(0)
    return [
        Prompt(
            Example("", "u"),
            0,
            tuple(rng.integers(3, VOCAB, n).tolist()),
            CHOICES if choices else None,
        )
        for n in (4, 11, 1)
    ]


def make_engine(model: LanguageModel, **settings: float) -> TransformersEngine:
    return TransformersEngine(
        model,
        max_new_tokens=int(settings.get("max_new_tokens", 6)),
        temperature=settings.get("temperature", 0.8),
    )


def sample(engine: Engine, *args: Any, **settings: Any) -> list[Rollout]:
    groups = engine.generate(*args, **settings)
    return [rollout for group in groups for rollout in group.rollouts]


@pytest.mark.parametrize("choices", [False, True])
def test_rollout_logprobs_are_the_policys(model: LanguageModel, choices: bool) -> None:
    rollouts = sample(make_engine(model), make_prompts(choices), 5, seed=3)
    policy = Policy(
        model,
        LossConfig(importance="off"),
        OptimizerConfig(),
        num_steps=1,
        temperature=0.8,
        max_new_tokens=6,
    )
    assert [r.group_id for r in rollouts] == [n // 5 for n in range(15)]
    for rollout, values in zip(
        rollouts, itertools.chain(*policy.logprobs(grouped(rollouts))), strict=True
    ):
        assert len(rollout.rollout_logprobs) == len(rollout.completion_ids)
        np.testing.assert_allclose(
            rollout.rollout_logprobs[: len(values)], values, rtol=1e-4, atol=1e-5
        )
        assert all(value == 0.0 for value in rollout.rollout_logprobs[len(values) :])


def test_greedy_equals_a_naive_loop(model: LanguageModel) -> None:
    prompts = make_prompts()
    rollouts = sample(make_engine(model), prompts, 1, seed=0, greedy=True)
    model.model.set_attn_implementation("eager")
    for prompt, rollout in zip(prompts, rollouts, strict=True):
        tokens = list(prompt.token_ids)
        for token in rollout.completion_ids:
            logits = model.model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]
            assert int(logits.argmax()) == token
            tokens.append(token)
        ended = rollout.completion_ids[-1] in model.end_ids
        assert rollout.truncated == (not ended)
        assert ended or len(rollout.completion_ids) == 6
    model.model.set_attn_implementation("pgrpo_shared_prefix")


def test_a_completion_ends_at_its_first_end_token() -> None:
    model = tiny_model("smollm2")
    model.end_ids = frozenset(range(3, 40))  # so many that some completion meets one early
    rollouts = sample(make_engine(model, temperature=5.0), make_prompts(), 8, seed=1)
    lengths = {len(r.completion_ids) for r in rollouts}
    assert len(lengths) > 1
    for rollout in rollouts:
        ends = [token in model.end_ids for token in rollout.completion_ids]
        assert not any(ends[:-1])
        assert rollout.truncated == (not ends[-1])


def test_samples_follow_the_distribution_over_choices() -> None:
    model = tiny_model("smollm2")
    prompt = make_prompts(choices=True)[0]
    drawn = sample(make_engine(model, temperature=0.8), [prompt], 20_000, seed=0)
    counts = Counter(r.completion_ids for r in drawn)
    assert set(counts) <= set(CHOICES)
    logprob = {r.completion_ids: sum(r.rollout_logprobs) for r in drawn}
    assert sum(np.exp(list(logprob.values()))) == pytest.approx(1.0, abs=1e-5)
    chi2 = sum(
        (counts[c] - 20_000 * np.exp(p)) ** 2 / (20_000 * np.exp(p)) for c, p in logprob.items()
    )
    assert chi2 < 21.1  # 99.99 % quantile for 3 degrees of freedom


def test_the_same_seed_repeats_and_another_does_not() -> None:
    engine = make_engine(tiny_model("qwen3"), temperature=3.0)
    prompts = make_prompts()
    first = sample(engine, prompts, 4, seed=5)
    assert sample(engine, prompts, 4, seed=5) == first
    assert sample(engine, prompts, 4, seed=6) != first


def test_free_and_chosen_completions_mix() -> None:
    model = tiny_model("smollm2")
    prompts = [make_prompts()[0], make_prompts(choices=True)[1]]
    rollouts = sample(make_engine(model), prompts, 3, seed=0)
    assert all(r.completion_ids in CHOICES for r in rollouts[3:])
    assert not any(r.truncated for r in rollouts[3:])


def test_choices_that_are_forced_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("smollm2")
    calls: list[int] = []
    original = model.extend
    monkeypatch.setattr(model, "extend", lambda *a: calls.append(1) or original(*a))
    prompt = Prompt(Example("", "u"), 0, (4, 5, 6), ((5, 6, 7, 8), (9, 10, 11)))
    rollouts = sample(make_engine(model), [prompt], 4, seed=0)
    assert not calls  # the first token decides
    assert {r.completion_ids for r in rollouts} <= {(5, 6, 7, 8), (9, 10, 11)}


def test_choice_tries() -> None:
    assert permitted(CHOICES, ()) == (5, 6, 11)
    assert permitted(CHOICES, (6, 7)) == (8, 10)
    assert permitted(CHOICES, (6, 7, 10)) == ()
    assert forced_tail(CHOICES, (6,)) == (7,)
    assert forced_tail(CHOICES, (11,)) == (12, 13)
    assert branches(CHOICES, (5,)) == [(5, 6, 11)]
    assert branches(CHOICES, (6, 7, 10)) == [(5, 6, 11), (7,), (8, 10)]
    assert branches(CHOICES, (11, 12, 13)) == [(5, 6, 11)]
