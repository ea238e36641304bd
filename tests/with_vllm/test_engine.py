"""vLLM in this process, against the transformers engine and the policy's own log-probabilities."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from conftest import grouped, naive_truncated
from models import SMOLLM2, config_of, running, small_model

from pgrpo.config.sections import LossConfig, OptimizerConfig, RewardConfig
from pgrpo.errors import EngineError
from pgrpo.model.language_model import LanguageModel
from pgrpo.rewards.scorer import Scorer
from pgrpo.rollout.engines import Engine
from pgrpo.rollout.engines.sampling import StopSearch
from pgrpo.rollout.engines.transformers import TransformersEngine
from pgrpo.rollout.engines.vllm import receiver
from pgrpo.rollout.engines.vllm.backend import Request
from pgrpo.rollout.engines.vllm.engine import VllmEngine
from pgrpo.rollout.settings import GenerationConfig
from pgrpo.train.policy import Policy
from pgrpo.types import Example, Group, Prompt, Rollout

TEXTS = (
    "A film about the sea, seen by someone who loves the mountains more than anything, and twice.",
    "famous Comedy: A\nobscure Drama: B\nminor Action: C\npopular Thriller: D\npopular Drama:",
    "One",
)
LABELS = (" A", " B", " C", " D")
PHRASES = (" red apple", " red pear", " green banana", " blue", " green")


def prompts_of(model: LanguageModel, *choices: tuple[str, ...] | None) -> list[Prompt]:
    """A prompt for each list of choices; None: a free completion."""
    encode: Any = model.tokenizer

    def ids(text: str) -> tuple[int, ...]:
        return tuple(encode(text, add_special_tokens=False).input_ids)

    def lists(texts: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
        # One phrase begins another, so they end with the end token, as PromptBuilder has it.
        end = (model.tokenizer.eos_token_id,) if texts is PHRASES else ()
        return tuple(ids(text) + end for text in texts)

    return [
        Prompt(Example(text, "u"), 0, ids(text), None if c is None else lists(c))
        for text, c in zip(TEXTS * len(choices), choices, strict=False)
    ]


def sample(engine: Engine, *args: Any, **settings: Any) -> list[Rollout]:
    groups = sorted(engine.generate(*args, **settings), key=lambda group: group.group_id)
    return [rollout for group in groups for rollout in group.rollouts]


def policy_of(model: LanguageModel, **settings: Any) -> Policy:
    return Policy(
        model,
        LossConfig(importance="off"),
        OptimizerConfig(**settings),
        num_steps=9,
        temperature=1.0,
        max_new_tokens=8,
    )


def largest_difference(policy: Policy, rollouts: list[Rollout]) -> float:
    """Between the engine's log-probabilities and the trainer's, in nats."""
    return max(
        float(np.abs(np.array(r.rollout_logprobs[: len(own)]) - own).max(initial=0.0))
        for r, own in zip(rollouts, chain(*policy.logprobs(grouped(rollouts))), strict=True)
    )


Pair = tuple[LanguageModel, VllmEngine]


@pytest.fixture(scope="module")
def smollm2() -> Iterator[Pair]:
    with running(config_of(SMOLLM2)) as pair:
        yield pair


@pytest.fixture
def pair(smollm2: Pair) -> Iterator[Pair]:
    """SmolLM2 with its own weights."""
    model, engine = smollm2
    before = {name: p.detach().clone() for name, p in model.model.named_parameters()}
    engine.sync(0)
    yield smollm2
    with torch.no_grad():
        for name, parameter in model.model.named_parameters():
            parameter.copy_(before[name])


def test_logprobs_agree_after_each_of_three_training_steps(pair: Pair) -> None:
    model, engine = pair
    policy = policy_of(model)
    prompts = prompts_of(model, None, LABELS, None, PHRASES)
    # The same prompts each time, so that what is cached of them is of the weights before.
    for version in range(4):
        stats = engine.sync(version)
        assert stats.num_bytes == 4 * sum(p.numel() for p in model.model.parameters())
        assert stats.transfer_s > 0
        rollouts = sample(engine, prompts, 4, seed=version)
        assert {r.policy_version for r in rollouts} == {version}
        assert largest_difference(policy, rollouts) < 1e-4
        advantages = np.linspace(-1.0, 1.0, len(rollouts))
        policy.update(grouped(rollouts, advantages), 1e-4)
        assert largest_difference(policy, rollouts) > 1e-2, "the step moved the policy"


@pytest.mark.parametrize("fault", ["tied head", "stale cache", "no weights"])
def test_the_probe_finds_a_sync_that_did_not_work(
    pair: Pair, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, engine = pair
    monkeypatch.setattr(engine, "_num_syncs", 0)
    backend: Any = engine._backend
    engine.sync(0)  # whose probe leaves its prompt in the cache
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter.mul_(1.02)
    with monkeypatch.context() as broken:
        if fault == "tied head":
            broken.setattr(receiver, "_pack_embeddings", lambda *_: None)
        elif fault == "stale cache":
            broken.setattr(backend._llm, "reset_prefix_cache", lambda: True)
        else:
            broken.setattr(backend._sender, "send", lambda version: 0)
            broken.setattr(engine, "_check", lambda *_: None)
        with pytest.raises(EngineError, match=r"log-probabilities differ .* weights or its cache"):
            engine.sync(1)
    assert engine.sync(2).probe_error < 1e-4


def test_blocks_in_use_are_no_silent_stale_cache(pair: Pair) -> None:
    model, engine = pair
    groups = engine.generate(prompts_of(model, None, None), 2, seed=0)
    engine._backend.submit(10**6, _long_request(model))
    engine._backend._engine.step()
    with pytest.raises(EngineError, match="prefix cache cannot be reset"):
        engine.sync(1)
    engine._backend.abandon()
    groups.close()
    assert engine.sync(1).num_bytes > 0


def test_an_update_that_was_left_unfinished_does_not_hinder_the_next(pair: Pair) -> None:
    model, engine = pair
    engine._backend._llm.start_weight_update()
    assert engine.sync(1).num_bytes > 0
    assert sample(engine, prompts_of(model, None), 1, seed=0)


def _long_request(model: LanguageModel) -> Any:
    return Request(prompts_of(model, None)[0].token_ids, {"max_tokens": 50, "ignore_eos": True})


def test_weights_of_another_version_are_refused(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, engine = pair
    monkeypatch.setattr(engine, "_version", 7)
    with pytest.raises(EngineError, match="generated with weights '0', expected those after 7"):
        sample(engine, prompts_of(model, None), 2, seed=0)


def test_choices_are_those_of_the_transformers_engine(pair: Pair) -> None:
    model, engine = pair
    ours = TransformersEngine(GenerationConfig(max_new_tokens=8), model)
    for choices in (LABELS, PHRASES):
        prompts = prompts_of(model, choices, choices, choices)
        found = sample(engine, prompts, 16, seed=3)
        assert all(r.completion_ids in prompts[0].choices for r in found)
        assert not any(r.truncated for r in found)
        assert largest_difference(policy_of(model), found) < 1e-4
        expected = sample(ours, prompts, 16, seed=3)
        same = [a.completion_ids == b.completion_ids for a, b in zip(found, expected, strict=True)]
        # Where all are at their first branch both engines use the same random numbers.
        assert all(same) or choices is PHRASES
        greedy = [
            [r.completion for r in sample(e, prompts, 1, seed=0, greedy=True)]
            for e in (engine, ours)
        ]
        assert greedy[0] == greedy[1]


def test_phrases_follow_their_distribution(pair: Pair) -> None:
    model, engine = pair
    prompts = prompts_of(model, PHRASES)
    drawn = sample(engine, prompts, 5000, seed=1)
    share = {r.completion_ids: 0.0 for r in drawn}
    logprob = {r.completion_ids: sum(r.rollout_logprobs) for r in drawn}
    for rollout in drawn:
        share[rollout.completion_ids] += 1 / len(drawn)
    for choice, expected in logprob.items():
        p = np.exp(expected)
        assert abs(share[choice] - p) < 5 * np.sqrt(p * (1 - p) / len(drawn))


def test_free_completions_are_greedy_as_the_transformers_engines(pair: Pair) -> None:
    model, engine = pair
    prompts = prompts_of(model, None, None, None)
    ours = TransformersEngine(GenerationConfig(max_new_tokens=8), model)
    found, expected = (sample(e, prompts, 1, seed=0, greedy=True) for e in (engine, ours))
    assert [r.completion_ids for r in found] == [r.completion_ids for r in expected]
    assert [r.truncated for r in found] == [r.truncated for r in expected]
    # The likeliest completion is everybody's.
    twice = sample(engine, prompts[:1], 2, seed=0, greedy=True)
    assert [r.completion_ids for r in twice] == [found[0].completion_ids] * 2


def test_a_seeded_call_repeats_and_samples_differ(pair: Pair) -> None:
    model, engine = pair
    prompt = prompts_of(model, None)[0]
    first = sample(engine, [prompt] * 3, 4, seed=5)
    assert sample(engine, [prompt] * 3, 4, seed=5) == first
    # Also between equal prompts: their seeds are G apart.
    assert len({r.completion_ids for r in first}) == 12
    assert sample(engine, [prompt] * 3, 4, seed=17) != first
    # The samples of the second prompt are those of the first under a seed 4 higher.
    shifted = sample(engine, [prompt], 4, seed=9)
    assert [r.completion_ids for r in shifted] == [r.completion_ids for r in first[4:8]]


def test_completions_end_where_the_policy_says(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    model, engine = pair
    prompts = prompts_of(model, None, None)
    ends = frozenset(sample(engine, prompts, 8, seed=0)[3].completion_ids[4:6])
    monkeypatch.setattr(model, "end_ids", ends)
    rollouts = sample(engine, prompts, 8, seed=0)
    assert {r.truncated for r in rollouts} == {True, False}
    for rollout in rollouts:
        at_end = [token in ends for token in rollout.completion_ids]
        assert not any(at_end[:-1])
        assert rollout.truncated == (not at_end[-1])
        assert rollout.truncated == (len(at_end) == 8 and not at_end[-1])


def distributions(model: LanguageModel, rollout: Rollout, temperature: float) -> np.ndarray:
    """Log-probabilities [T, V] of the whole vocabulary, by transformers' own attention."""
    ids = [*rollout.prompt.token_ids, *rollout.completion_ids]
    model.model.set_attn_implementation("eager")
    with torch.no_grad():
        logits = model.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    model.model.set_attn_implementation("pgrpo_shared_prefix")
    rows = logits[len(rollout.prompt.token_ids) - 1 : -1] / temperature
    return rows.double().log_softmax(-1).numpy()


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.1},
        {"top_k": 30, "top_p": 0.8, "min_p": 0.02},
    ],
    ids=str,
)
def test_truncated_samples_are_those_of_the_written_rule(
    pair: Pair, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, engine = pair
    changed = engine._config.model_copy(update={**settings, "temperature": 1.5})
    monkeypatch.setattr(engine, "_config", changed)
    engine.sync(0)  # the probe is of the whole distribution
    # The rule goes through the vocabulary one by one, so they are few.
    for rollout in sample(engine, prompts_of(model, None), 3, seed=0):
        rows = distributions(model, rollout, 1.5)
        for row, token, found in zip(
            rows, rollout.completion_ids, rollout.rollout_logprobs, strict=True
        ):
            expected = naive_truncated(row, **settings)[token]
            assert found == pytest.approx(expected, abs=1e-3)
    ours = TransformersEngine(changed, model)
    prompts = prompts_of(model, LABELS, LABELS)
    found, expected = (sample(e, prompts, 16, seed=3) for e in (engine, ours))
    assert [r.completion_ids for r in found] == [r.completion_ids for r in expected]
    np.testing.assert_allclose(
        [r.rollout_logprobs for r in found], [r.rollout_logprobs for r in expected], atol=1e-4
    )
    found, expected = (
        sample(e, prompts_of(model, None), 1, seed=0, greedy=True) for e in (engine, ours)
    )
    assert [r.completion_ids for r in found] == [r.completion_ids for r in expected]


def test_a_group_shares_its_prompts_blocks(pair: Pair) -> None:
    model, engine = pair
    backend: Any = engine._backend
    hits: list[int] = []
    step = backend._engine.step

    def watch() -> list[Any]:
        outputs = step()
        hits.extend(o.num_cached_tokens for o in outputs if o.finished)
        return outputs

    prompt = Prompt(Example("", "u"), 0, tuple(range(1000, 1100)))
    backend._engine.step = watch
    try:
        sample(engine, [prompt], 4, seed=0)
        sample(engine, [prompt], 4, seed=0)
    finally:
        backend._engine.step = step
    # Three whole blocks of 32 tokens.
    assert hits[-1] == 96


def test_an_iterator_closed_early_leaves_the_engine_usable(pair: Pair) -> None:
    model, engine = pair
    prompts = prompts_of(model, LABELS, None, None, None)
    expected = sample(engine, prompts, 4, seed=2)
    groups = engine.generate(prompts, 4, seed=2)
    assert next(groups).group_id == 0, "a choice is finished first"
    groups.close()
    assert engine.sync(0).num_bytes > 0, "no request holds blocks any more"
    assert sample(engine, prompts, 4, seed=2) == expected


def test_a_prompt_beyond_the_longest_is_named(pair: Pair) -> None:
    model, engine = pair
    prompt = Prompt(Example("", "u"), 0, tuple([500] * 400))
    with pytest.raises(EngineError, match=r"vLLM refuses a request: .*400"):
        sample(engine, [prompt], 2, seed=0)
    assert sample(engine, prompts_of(model, None), 1, seed=0)


def test_rewards_are_computed_while_others_are_generated(pair: Pair) -> None:
    """Streaming with a slow reward, and one that fails on some."""
    model, engine = pair
    prompts = prompts_of(model, None, LABELS, None, LABELS)
    called: dict[int, float] = {}

    def slow(rollouts: list[Rollout]) -> list[float]:
        called[rollouts[0].group_id] = time.monotonic()
        time.sleep(0.05)
        return [float(len(r.completion_ids)) for r in rollouts]

    async def failing(rollouts: list[Rollout]) -> list[float]:
        if rollouts[0].group_id == 3:
            raise RuntimeError("no verdict")
        return [1.0] * len(rollouts)

    sections = [
        (RewardConfig(name="slow"), slow),
        (RewardConfig(name="failing", on_error="no_reward"), failing),
    ]
    finished: dict[int, float] = {}

    def watched() -> Iterator[Group]:
        for group in engine.generate(prompts, 4, seed=0):
            finished[group.group_id] = time.monotonic()
            yield group

    with Scorer(sections) as scorer:
        scored = scorer.score(watched())
    rollouts = [rollout for group in scored for rollout in group.rollouts]
    rewards = np.concatenate([group.rewards for group in scored])
    assert list(finished)[:2] == [1, 3], "choices are finished before free completions"
    assert called[1] < finished[0], "and scored meanwhile"
    assert [r.group_id for r in rollouts] == [n // 4 for n in range(16)]
    expected = [len(r.completion_ids) + 1.0 if r.group_id != 3 else np.nan for r in rollouts]
    np.testing.assert_array_equal(rewards, expected)
    assert rollouts == sample(engine, prompts, 4, seed=0)


def test_stop_texts_end_completions_as_in_the_transformers_engine() -> None:
    stop = ["e ", " the", "\n\n", "ing,"]
    config = config_of(SMOLLM2, {"generation.stop": stop, "generation.max_new_tokens": 12})
    with running(config) as (model, engine):
        engine.sync(0)
        prompts, decode = prompts_of(model, None, None, None), model.tokenizer.decode
        ends = {True: 0, False: 0}
        for rollout in sample(engine, prompts, 16, seed=0):
            ids = rollout.completion_ids
            assert len(rollout.rollout_logprobs) == len(ids)
            assert not any(text in decode(ids[:-1], skip_special_tokens=True) for text in stop)
            is_stopped = any(text in rollout.completion for text in stop)
            assert rollout.truncated == (not is_stopped and ids[-1] not in model.end_ids)
            search = StopSearch(model.tokenizer, rollout.prompt.token_ids, stop)
            assert [search.is_over(i) for i in ids] == [False] * (len(ids) - 1) + [is_stopped]
            ends[is_stopped] += 1
        assert min(ends.values()) > 5
        ours = TransformersEngine(config.generation, model)
        found, expected = (sample(e, prompts, 1, seed=0, greedy=True) for e in (engine, ours))
        assert [r.completion_ids for r in found] == [r.completion_ids for r in expected]
        assert [r.truncated for r in found] == [r.truncated for r in expected]
        choices = [r.completion for r in sample(engine, prompts_of(model, PHRASES), 16, seed=0)]
        assert any(choice.startswith(" green") for choice in choices)
        assert set(choices) <= {*PHRASES}


def test_without_a_sync_there_are_no_weights() -> None:
    with (
        running(config_of(small_model())) as (model, engine),
        pytest.raises(EngineError, match="no weights yet"),
    ):
        sample(engine, prompts_of(model, None), 2, seed=0)


@pytest.mark.parametrize("model_name", ["untied", "bf16"])
def test_other_weights(model_name: str) -> None:
    """An untied head, and bf16 weights in vLLM below fp32 ones in the trainer."""
    changes = {"generation.vllm.precision": "bf16"} if model_name == "bf16" else {}
    with running(config_of(small_model(), changes)) as (model, engine):
        policy = policy_of(model)
        prompts = [Prompt(Example("", "u"), 0, tuple(range(5, 85)))] * 2
        for version in range(3):
            error = engine.sync(version).probe_error
            rollouts = sample(engine, prompts, 4, seed=version)
            largest = largest_difference(policy, rollouts)
            if model_name == "bf16":
                assert 1e-4 < error < 0.2
                assert 1e-3 < largest < 1.0
            else:
                assert error < 1e-5
                assert largest < 1e-4
            policy.update(grouped(rollouts, np.linspace(-1.0, 1.0, len(rollouts))), 1e-2)


def test_adapters_are_loaded_in_place() -> None:
    changes = {"model.lora": {"rank": 4, "alpha": 64}}
    with running(config_of(small_model(), changes)) as (model, engine):
        policy = policy_of(model)
        prompts = [Prompt(Example("", "u"), 0, tuple(range(5, 85)))] * 2
        for version in range(3):
            stats = engine.sync(version)
            assert stats.probe_error < 1e-5
            assert stats.num_bytes < 200_000, "the adapters alone"
            rollouts = sample(engine, prompts, 4, seed=version)
            assert largest_difference(policy, rollouts) < 1e-4
            policy.update(grouped(rollouts, np.linspace(-1.0, 1.0, len(rollouts))), 1e-2)
            assert largest_difference(policy, rollouts) > 1e-3


def test_what_vllm_does_not_take_is_told() -> None:
    changes = {"generation.vllm.options": {"max_num_seqs": 0}}
    with (
        pytest.raises(EngineError, match="vLLM does not start: .*max_num_seqs"),
        running(config_of(small_model(), changes)),
    ):
        pass
