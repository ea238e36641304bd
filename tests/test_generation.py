"""Generation against the policy's own log-probabilities and a naive greedy loop."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from conftest import VOCAB, grouped, naive_truncated, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pgrpo.config.sections import LossConfig, OptimizerConfig
from pgrpo.model.choices import branches, forced_tail, permitted
from pgrpo.model.language_model import LanguageModel
from pgrpo.rollout.engines import Engine, sampling
from pgrpo.rollout.engines.sampling import StopSearch, truncated
from pgrpo.rollout.engines.transformers import TransformersEngine
from pgrpo.rollout.settings import GenerationConfig
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


def make_engine(model: LanguageModel, **settings: Any) -> TransformersEngine:
    tree = {"max_new_tokens": 6, "temperature": 0.8, **settings}
    return TransformersEngine(GenerationConfig.model_validate(tree), model)


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


TRUNCATIONS: list[dict[str, Any]] = [
    {"top_k": 5},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"top_k": 20, "top_p": 0.8, "min_p": 0.02},
    {"top_k": 1},
    {"top_k": 10**6, "top_p": 1.0, "min_p": 1e-9},
]


@pytest.mark.parametrize("settings", TRUNCATIONS, ids=str)
@pytest.mark.parametrize("head", [1024, 2])
def test_truncated_distributions_are_those_of_the_written_rule(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], head: int
) -> None:
    monkeypatch.setattr(sampling, "_HEAD", head)
    logits = torch.randn(8, 50, generator=torch.Generator().manual_seed(0)) * 3
    logits[0, 1:] = -torch.inf  # a choice of one
    logits[1, ::2] = -torch.inf
    logits[2] = 0.0  # all tied
    logs = logits.log_softmax(-1)
    found = truncated(logs, GenerationConfig(**settings)).numpy()
    sizes = np.isfinite(found).sum(-1)
    for row, values in enumerate(logs.numpy()):
        expected = naive_truncated(values, **settings)
        assert (np.isfinite(expected) == np.isfinite(found[row])).all(), row
        kept = np.isfinite(expected)
        np.testing.assert_allclose(found[row][kept], expected[kept], atol=2e-6)
        assert np.exp(found[row]).sum() == pytest.approx(1, abs=1e-5)
    assert sizes.min() == 1
    assert sizes[2] == 50, "what is tied stays together"
    # By hand: 0.5, 0.3, 0.15, 0.05.
    logs = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    for config, kept in (
        ({"top_k": 2}, 2),
        ({"top_p": 0.49}, 1),
        ({"top_p": 0.51}, 2),
        ({"top_p": 0.81}, 3),
        ({"top_k": 2, "top_p": 0.62}, 1),  # of 0.625 and 0.375
        ({"min_p": 0.29}, 3),
        ({"min_p": 0.29, "top_p": 0.83}, 2),  # of 0.526, 0.316 and 0.158
    ):
        found = truncated(logs, GenerationConfig.model_validate(config))
        assert found.isfinite().sum() == kept, config


@pytest.mark.parametrize("settings", TRUNCATIONS[:4], ids=str)
@pytest.mark.parametrize("choices", [False, True])
def test_log_probabilities_are_those_of_the_truncated_distribution(
    model: LanguageModel, settings: dict[str, Any], choices: bool
) -> None:
    rollouts = sample(make_engine(model, **settings), make_prompts(choices), 6, seed=2)
    model.model.set_attn_implementation("eager")
    for rollout in rollouts:
        ids = [*rollout.prompt.token_ids, *rollout.completion_ids]
        logits = model.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0] / 0.8
        rows = logits[len(rollout.prompt.token_ids) - 1 : -1].detach().double().numpy()
        for t, (token, found) in enumerate(
            zip(rollout.completion_ids, rollout.rollout_logprobs, strict=True)
        ):
            allowed = list(range(VOCAB))
            if choices:
                allowed = list(permitted(CHOICES, rollout.completion_ids[:t]))
            values = rows[t][allowed] - np.log(np.exp(rows[t][allowed]).sum())
            expected = naive_truncated(values, **settings)[allowed.index(token)]
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
    model.model.set_attn_implementation("pgrpo_shared_prefix")


def test_samples_follow_the_truncated_distribution_and_their_ratio_is_its_mass() -> None:
    model, prompt = tiny_model("smollm2"), make_prompts()[0]
    settings: dict[str, Any] = {"top_k": 12, "top_p": 0.6, "max_new_tokens": 1, "temperature": 2.0}
    drawn = sample(make_engine(model, **settings), [prompt], 20_000, seed=0)
    counts = Counter(r.completion_ids[0] for r in drawn)
    model.model.set_attn_implementation("eager")
    ids = torch.tensor([prompt.token_ids])
    with torch.no_grad():
        logs = (model.model(input_ids=ids, use_cache=False).logits[0, -1] / 2).log_softmax(-1)
    model.model.set_attn_implementation("pgrpo_shared_prefix")
    expected = np.exp(naive_truncated(logs.numpy(), top_k=12, top_p=0.6))
    kept: list[int] = np.flatnonzero(expected).tolist()
    assert 3 < len(kept) < 12
    assert set(counts) == set(kept)
    chi2 = sum((counts[i] - 20_000 * expected[i]) ** 2 / (20_000 * expected[i]) for i in kept)
    assert chi2 < 2.5 * len(kept) + 20  # far beyond the 99.9 % quantile of so few degrees
    # p_old / p_rollout: how much of the trainer's distribution was drawn from.
    policy = Policy(
        model,
        LossConfig(importance="token"),
        OptimizerConfig(),
        num_steps=1,
        temperature=2.0,
        max_new_tokens=1,
    )
    mismatch = policy.update(grouped(drawn[:50], np.ones(50)), 0.0).mismatch
    mass = float(np.exp(logs.double().numpy())[kept].sum())
    assert mismatch.weight == pytest.approx(mass, rel=1e-4)
    assert mismatch.weight < 0.7


def test_greedy_decoding_is_never_truncated() -> None:
    model, prompts = tiny_model("qwen3"), make_prompts()
    expected = sample(make_engine(model), prompts, 1, seed=0, greedy=True)
    engine = make_engine(model, top_k=2, top_p=0.5, min_p=0.5)
    assert sample(engine, prompts, 1, seed=0, greedy=True) == expected


@pytest.mark.parametrize("stop", [["w17"], ["7"], ["5 w"], ["nowhere"], ["3 w4", "8"]], ids=str)
@pytest.mark.parametrize("greedy", [False, True])
def test_a_completion_ends_with_the_token_that_completes_a_stop_text(
    stop: list[str], greedy: bool
) -> None:
    model = tiny_model("smollm2")
    prompts = make_prompts()
    engine = make_engine(model, stop=stop, max_new_tokens=12, temperature=4.0)
    rollouts = sample(engine, prompts, 1 if greedy else 30, seed=1, greedy=greedy)
    ends = Counter[str]()
    for rollout in rollouts:
        decode, ids = model.tokenizer.decode, list(rollout.completion_ids)
        assert rollout.completion == decode(ids, skip_special_tokens=True)
        assert not any(end in decode(ids[:-1], skip_special_tokens=True) for end in stop)
        if any(end in rollout.completion for end in stop):
            kind = "text"
        elif ids[-1] in model.end_ids:
            kind = "token"
        else:
            kind = "length"
            assert len(ids) == 12
        assert rollout.truncated == (kind == "length")
        assert len(rollout.rollout_logprobs) == len(ids)
        ends[kind] += 1
    if not greedy:
        assert (ends["text"] > 0) == (stop != ["nowhere"])
        assert ends["length"] > 0


def test_stop_texts_do_not_end_choices() -> None:
    model, prompts = tiny_model("smollm2"), make_prompts(choices=True)
    expected = sample(make_engine(model), prompts, 8, seed=0)
    assert sample(make_engine(model, stop=["w6", "w1", "w7 w8"]), prompts, 8, seed=0) == expected


def test_stop_texts_are_found_across_tokens_and_bytes() -> None:
    # A token for each byte: of a smile's four, the last one completes it.
    letters = pre_tokenizers.ByteLevel.alphabet()
    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate(sorted(letters))}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)

    def end(text: str, *stop: str) -> int | None:
        """Place of the byte that ends the text."""
        search = StopSearch(tokenizer, tokenizer("one: ").input_ids, stop)
        over = [search.is_over(token) for token in tokenizer(text).input_ids]
        return over.index(True) if any(over) else None

    assert end("ab\n\ncd", "\n\n") == 3
    assert end("a\nb\n\n", "\n\n", "z") == 4
    assert end("é 🙂!", "🙂") == 6
    assert end("é!", "é") == 1
    assert end("aab", "ab", "aaa") == 2
    assert end("e: x", "ne:") is None, "what the prompt says does not count"
    assert end("one", "ones") is None
    # A lone half of a character, which no text holds, and what follows it.
    search = StopSearch(tokenizer, (), ("ab",))
    lone = tokenizer("é").input_ids[:1]
    assert [search.is_over(t) for t in [*lone, *tokenizer("ab").input_ids]][-1]


def test_every_end_token_that_the_model_or_its_tokenizer_names_ends_a_completion() -> None:
    base: Any = tiny_model("smollm2").model
    tokenizer: Any = tiny_model("smollm2").tokenizer

    def ends(generation: Any, config: Any, token: str) -> frozenset[int]:
        base.generation_config.eos_token_id = generation
        base.config.eos_token_id = config
        tokenizer.eos_token = token
        return LanguageModel(base, tokenizer, "fp32").end_ids

    assert ends(1, 1, "<eos>") == {1}
    assert ends([1, 7], 1, "w9") == {1, 7, 9}
    assert ends(None, [4, 5], "w9") == {4, 5, 9}
    assert ends(None, None, "<eos>") == {1}
    assert ends(VOCAB, 1, "<eos>") == {1}, "the model cannot say what it has no row for"


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
