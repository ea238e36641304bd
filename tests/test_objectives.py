"""DPO and cross-entropy on a step's rollouts, against their losses written out, and what they learn."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import grouped, tiny_model, tiny_run, train, write_config
from test_policy import (
    MAX_NEW_TOKENS,
    TEMPERATURE,
    descend,
    flat,
    gradients,
    make_rollouts,
    naive_logprobs,
)

from pgrpo.cli import main
from pgrpo.config.sections import LossConfig, OptimizerConfig
from pgrpo.config.toml import resolved_toml, resolved_tree
from pgrpo.errors import ConfigError
from pgrpo.experiments.compare import arm_config, arm_folder, compare
from pgrpo.model.language_model import LanguageModel
from pgrpo.report.runs import read_runs
from pgrpo.report.study import Study
from pgrpo.rollout.collector import without_estimator
from pgrpo.runs.config import load_config, parse_config
from pgrpo.runs.display import Display
from pgrpo.runs.folder import RunFolder
from pgrpo.train.build import Assembly
from pgrpo.train.loss import preferences
from pgrpo.train.policy import Policy
from pgrpo.train.trainer import Trainer
from pgrpo.types import Example, Prompt, Rollout

BETA = 0.3

# The formulas.


def written_out(
    rewards: Sequence[np.ndarray], log_ratios: Sequence[torch.Tensor], beta: float
) -> torch.Tensor:
    """DPO's loss pair by pair: [G] rewards, and log pi - log ref with gradients."""
    losses = [
        -torch.nn.functional.logsigmoid(beta * (h[won] - h[lost]))
        for r, h in zip(rewards, log_ratios, strict=True)
        for won in range(len(r))
        for lost in range(len(r))
        if r[won] > r[lost]
    ]
    return torch.stack(losses).mean()


@pytest.mark.parametrize("scale", [0.1, 30.0])
def test_coefficients_are_minus_the_derivative_of_the_loss(scale: float) -> None:
    random = np.random.default_rng(0)
    sizes = (4, 1, 7, 3)
    rewards = [random.integers(0, 3, size=n).astype(float) for n in sizes]
    rewards[3][:] = 0.5
    h = [scale * random.normal(size=n) for n in sizes]
    leaves = [torch.tensor(each, requires_grad=True) for each in h]
    expected = written_out(rewards, leaves, BETA)
    expected.backward()
    loss, found = preferences(rewards, h, BETA)
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    for mine, leaf in zip(found, leaves, strict=True):
        theirs = np.zeros(len(mine)) if leaf.grad is None else -leaf.grad.numpy()
        np.testing.assert_allclose(mine, theirs, rtol=1e-12, atol=1e-15)


def test_the_first_update_is_along_dr_grpo_s_advantages() -> None:
    rewards = [np.array([1.0, 0, 0, 1, 0]), np.array([0.0, 0, 0, 0, 1])]
    loss, found = preferences(rewards, [np.zeros(5)] * 2, BETA)
    assert loss == pytest.approx(np.log(2))
    for r, c in zip(rewards, found, strict=True):
        np.testing.assert_allclose(c, 5 * BETA / (2 * (6 + 4)) * (r - r.mean()))
        pairs = without_estimator(r, "dpo")
        np.testing.assert_allclose(c, BETA / (2 * (6 + 4)) * pairs)


def test_without_any_pair_there_is_no_loss() -> None:
    loss, found = preferences([np.ones(3)], [np.array([5.0, -2, 0])], BETA)
    assert loss == 0
    assert (found[0] == 0).all()


def test_what_stands_for_advantages() -> None:
    rewards = np.array([0.5, np.nan, -1, 2, 0.5, 0])
    assert without_estimator(rewards, "dpo").tolist() == [1, 0, -4, 4, 1, -2]
    assert without_estimator(rewards, "sft").tolist() == [0.5, 0, 0, 2, 0.5, 0]


# Through the trainer's passes.


def make_policy(model: LanguageModel, reference: LanguageModel | None, **settings: Any) -> Policy:
    loss = {k: v for k, v in settings.items() if k in LossConfig.model_fields}
    rest = {k: v for k, v in settings.items() if k not in loss}
    policy = Policy(
        model,
        LossConfig.model_validate(loss),
        OptimizerConfig.model_validate({"learning_rate": 0.05, "max_grad_norm": 1e9, **rest}),
        num_steps=10,
        temperature=TEMPERATURE,
        max_new_tokens=MAX_NEW_TOKENS,
        reference=reference,
    )
    # Plain descent keeps rounding errors small; AdamW turns those of tiny gradients into full steps.
    descent: Any = torch.optim.SGD(policy.parameters.values())
    policy.optimizer = descent
    return policy


REWARDS = np.array([0.0, 0.5, 1.0, 0.5, 0.0, 1.0, 0.0, 1.0, 1.0, 0.5])
"""Of `make_rollouts`: groups of 3, 1, 2 and 4, of which the second has no pair."""


def by_group(rollouts: Sequence[Rollout], values: Sequence[Any]) -> list[list[Any]]:
    places = dict[int, list[Any]]()
    for rollout, value in zip(rollouts, values, strict=True):
        places.setdefault(rollout.group_id, []).append(value)
    return list(places.values())


@pytest.mark.parametrize("token_budget", [10**6, 20, 1])
@pytest.mark.parametrize("updates", [(1, 1), (2, 2)], ids=["one update", "four updates"])
@pytest.mark.parametrize("choices", [False, True])
def test_dpo_s_updates_equal_the_naive_ones(
    choices: bool, updates: tuple[int, int], token_budget: int
) -> None:
    epochs, minibatches = updates
    model, naive, start, reference = (tiny_model("smollm2", seed) for seed in (0, 0, 0, 7))
    for each in (model, naive, start, reference):
        each.model.double()
    rollouts = make_rollouts(choices)
    rewards = REWARDS
    with torch.no_grad():
        ref = [naive_logprobs(reference, r).sum() for r in rollouts]
    # Groups without a pair are dealt to no minibatch.
    parts = list(
        zip(*(by_group(rollouts, v) for v in (rollouts, rewards.tolist(), ref)), strict=True)
    )
    parts = [part for part in parts if len(set(part[1])) > 1]
    losses: list[float] = []
    for _ in range(epochs):
        for number in range(minibatches):
            mine = parts[number::minibatches]
            ratios = [
                torch.stack(
                    [naive_logprobs(naive, r).sum() - b for r, b in zip(rs, bs, strict=True)]
                )
                for rs, _, bs in mine
            ]
            loss = written_out([np.array(r) for _, r, _ in mine], ratios, BETA)
            losses.append(descend(naive, loss))

    policy = make_policy(
        model,
        reference,
        objective="dpo",
        beta=BETA,
        epochs=epochs,
        minibatches=minibatches,
        token_budget=token_budget,
    )
    stats = policy.update(grouped(rollouts, np.ones(len(rollouts)), rewards), 0.05)
    assert stats.num_updates == epochs * minibatches
    assert stats.loss == pytest.approx(np.mean(losses), rel=1e-7)
    before, after = start.model.state_dict(), model.model.state_dict()
    for name, expected in naive.model.state_dict().items():
        error = (after[name] - expected).norm() / (expected - before[name]).norm()
        assert error < 2e-6, f"{name}: {error}"


def test_four_choices_have_the_gradient_of_their_enumeration() -> None:
    """A group that holds each of four choices once, one of which is right, whatever its tokens are."""
    choices = ((5,), (6, 7, 8), (6, 7, 9), (11, 12))
    prompt = Prompt(Example("", "u"), 0, (20, 31, 8), choices)
    rollouts = [Rollout(prompt, 0, ids, "", (0.0,) * len(ids), False) for ids in choices]
    model, reference = (tiny_model("qwen3", seed) for seed in (0, 7))
    h = torch.stack([naive_logprobs(model, r).sum() for r in rollouts]).double()
    assert h.exp().sum().item() == pytest.approx(1, abs=1e-5)
    h = h - torch.stack([naive_logprobs(reference, r).sum() for r in rollouts]).detach().double()
    right = 2
    others = [h[right] - h[n] for n in range(4) if n != right]
    (-torch.nn.functional.logsigmoid(BETA * torch.stack(others)).mean()).backward()
    expected = gradients(model)
    model.model.zero_grad()
    policy = make_policy(model, reference, objective="dpo", beta=BETA)
    policy.update(grouped(rollouts, np.zeros(4), [0.0, 0, 1, 0]), 0.0)
    for name, gradient in gradients(model).items():
        assert (gradient - expected[name]).norm() < 1e-5 * expected[name].norm(), name


@pytest.mark.parametrize("aggregation", ["dapo", "dr_grpo", "grpo"])
@pytest.mark.parametrize("token_budget", [10**6, 1])
def test_sft_is_the_cross_entropy_of_what_was_rewarded(aggregation: str, token_budget: int) -> None:
    model, rollouts = tiny_model("smollm2"), make_rollouts()
    rewards = REWARDS - 0.25
    chosen = [place for place, reward in enumerate(rewards) if reward > 0]
    assert 0 < len(chosen) < len(rollouts)
    logs = [naive_logprobs(model, rollouts[place]) * rewards[place] for place in chosen]
    match aggregation:
        case "dapo":
            loss = -torch.cat(logs).mean()
        case "grpo":
            loss = -torch.stack([each.mean() for each in logs]).mean()
        case _:
            loss = -torch.cat(logs).sum() / (len(chosen) * MAX_NEW_TOKENS)
    loss.backward()
    expected = gradients(model)
    model.model.zero_grad()
    policy = make_policy(
        model, None, objective="sft", aggregation=aggregation, token_budget=token_budget
    )
    advantages = without_estimator(rewards, "sft")
    stats = policy.update(grouped(rollouts, advantages, rewards), 0.0)
    assert stats.loss == pytest.approx(loss.item(), rel=1e-5)
    for name, gradient in gradients(model).items():
        assert (gradient - expected[name]).norm() < 1e-5 * expected[name].norm(), name


@pytest.mark.parametrize("objective", ["dpo", "sft"])
def test_a_step_without_signal_is_no_step(objective: str) -> None:
    model, rollouts = tiny_model("smollm2"), make_rollouts()
    policy = make_policy(model, tiny_model("smollm2", 7), objective=objective, minibatches=2)
    before = flat(policy.logprobs(grouped(rollouts)))
    nothing = np.zeros(len(rollouts))
    stats = policy.update(grouped(rollouts, nothing, nothing), 0.05)
    assert (stats.loss, stats.grad_norm) == (0, 0)
    for one, other in zip(before, flat(policy.logprobs(grouped(rollouts))), strict=True):
        np.testing.assert_array_equal(one, other)


def test_adapters_that_are_off_are_the_reference(tmp_path: Path) -> None:
    """At the first step the policy is the reference: all pairs lose log 2."""
    changes = {"model.lora": {"rank": 2}, "loss.objective": "dpo", "generation.group_size": 6}
    for name, more in (("adapters", changes), ("weights", {**changes, "model.lora": None})):
        more = {key: value for key, value in more.items() if value is not None}
        run = train(tmp_path / name, {**more, "run.num_steps": 2, "run.eval_every": 0})
        losses = [record["loss"] for record in records(run, "metrics.jsonl")]
        assert losses[0] == pytest.approx(np.log(2), rel=1e-6)
        assert losses[1] != pytest.approx(np.log(2), rel=1e-6)


# Runs.


def records(run: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text("utf-8").splitlines()]


NAMED = "[{cluster}] {prompt}"


def tastes(folder: Path) -> Path:
    """A run of one question whose right answer is a for six people, and c for two."""
    folder.mkdir(parents=True, exist_ok=True)
    people = [*((f"m{n}", "many", "a") for n in range(6)), *((f"f{n}", "few", "c") for n in (0, 1))]
    rows = [
        {"prompt": "?", "user": u, "cluster": c, "answer": a, "choices": ["a", "b", "c", "d"]}
        for u, c, a in people
    ]
    for name in ("rows.jsonl", "held-out.jsonl"):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return write_config(
        folder,
        {
            "run": {
                "num_steps": 60,
                "prompts_per_step": 8,
                "num_threads": 1,
                "trackers": [],
                "eval_every": 60,
                "eval_prompts": 8,
                "samples_per_step": 64,
            },
            "data": {
                "name": "jsonl",
                "path": "rows.jsonl",
                "evaluation_path": "held-out.jsonl",
                "choices_column": "choices",
            },
            "clustering": {"name": "column", "column": "cluster"},
            "rewards": [{"name": "choice"}],
            "generation": {"group_size": 4},
            "optimizer": {"learning_rate": 5e-3},
        },
    )


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tastes")
    arms = ["pgrpo", "dpo", "sft", *(f"{rule}@model.prompt_template={NAMED}" for rule in ARMS)]
    command = ["compare", str(tastes(folder)), "--estimators", ",".join(arms)]
    assert main([*command, "--out", str(folder / "out"), "--quiet"]) == 0
    return folder / "out"


ARMS = ("pgrpo", "dpo", "sft")
PROMPTED = "-model.prompt_template=-cluster-prompt-"


def right(run: Path) -> dict[str, float]:
    """Held-out accuracy by cluster at the end."""
    last = records(run, "evaluations.jsonl")[-1]
    return {cluster: told["reward"] for cluster, told in last["clusters"].items()}


@pytest.mark.parametrize("arm", ARMS)
def test_who_is_told_the_cluster_serves_both_and_who_is_not_serves_one(
    compared: Path, arm: str
) -> None:
    served = right(compared / arm / "seed-0")
    assert served == {"many": 1.0, "few": 0.0}
    assert right(compared / f"{arm}{PROMPTED}" / "seed-0") == {"many": 1.0, "few": 1.0}


def test_arms_begin_with_the_same_rollouts_and_differ_in_what_they_make_of_them(
    compared: Path,
) -> None:
    found = {arm: records(compared / arm / "seed-0", "samples.jsonl") for arm in ARMS}
    first = {
        arm: [(s["user"], s["completion"], s["reward"]) for s in samples if s["step"] == 1]
        for arm, samples in found.items()
    }
    assert first["dpo"] == first["sft"] == first["pgrpo"]
    assert len(first["dpo"]) == 32
    # Every group of four is one person's; pairs are counted one by one.
    for arm in ("dpo", "sft"):
        for start in range(0, len(found[arm]), 4):
            group = found[arm][start : start + 4]
            rewards = [sample["reward"] for sample in group]
            for sample in group:
                mine = sample["reward"]
                wins = sum(mine > r for r in rewards) - sum(mine < r for r in rewards)
                assert sample["advantage"] == (wins if arm == "dpo" else mine)


def test_histories_are_kept_for_the_report(compared: Path) -> None:
    for arm in ("dpo", "sft"):
        last = records(compared / arm / "seed-0", "metrics.jsonl")[-1]
        seen: dict[str, list[float]] = {}
        for sample in records(compared / arm / "seed-0", "samples.jsonl"):
            seen.setdefault(sample["cluster_id"], []).append(sample["reward"])
        for cluster, rewards in seen.items():
            told = last["clusters"][cluster]
            assert told["count"] == len(rewards)
            assert told["mean"] == pytest.approx(np.mean(rewards))


def test_a_report_names_arms_by_objective_and_prompt(compared: Path) -> None:
    (run,) = read_runs([compared / "dpo" / "seed-0"])
    assert run.settings["estimator.name"] == "dpo"
    page = (compared / "report.html").read_text("utf-8")
    for name in ("dpo · prompt_template {prompt}", f"dpo · prompt_template {NAMED}"):
        assert name in page
    assert "no history (dpo · prompt_template {prompt})" in page


def test_what_estimators_gain_is_told_of_arms_that_are_not_told_the_cluster(
    compared: Path,
) -> None:
    runs = [compared / f"pgrpo{suffix}" / "seed-0" for suffix in ("", PROMPTED)]
    both, told = Study.of(read_runs(runs)), Study.of(read_runs(runs[1:]))
    for study, template in ((both, "{prompt}"), (told, NAMED)):
        arm = study.arm_of("pgrpo", "cluster")
        assert arm is not None
        assert arm.runs[0].settings["model.prompt_template"] == template
    assert both.arm_of("dpo", "cluster") is None


def test_the_config_of_a_run_reruns_it(compared: Path) -> None:
    for path in (compared / "dpo" / "seed-0", compared / f"sft{PROMPTED}" / "seed-0"):
        config = load_config(path / "config.toml")
        assert "estimator" not in resolved_tree(config)
        assert resolved_toml(config) == (path / "config.toml").read_text("utf-8")


def test_a_judge_tells_a_policy_the_clusters_of_its_own_run(compared: Path, tmp_path: Path) -> None:
    """Beside a run that has divided nobody."""
    config = compared.parent / "run.toml"
    alone = ['clustering={name="single"}', "run.num_steps=1", "run.eval_every=0"]
    sets = [word for setting in alone for word in ("--set", setting)]
    assert main(["train", str(config), *sets, "--out", str(tmp_path / "single")]) == 0
    judge = tmp_path / "judge.toml"
    judge.write_text('num_prompts = 8\n[reward]\nname = "choice"\n', "utf-8")
    told = compared / f"dpo{PROMPTED}" / "seed-0"
    out = tmp_path / "judged"
    command = ["judge", str(tmp_path / "single"), str(told), "--judge", str(judge)]
    assert main([*command, "--out", str(out)]) == 0
    said = [record["completions"] for record in records(out, "completions.jsonl")]
    # Equal prompts are completed once: the second policy's two, and then the only one of the first's.
    assert sorted(said[:2]) == [["a"], ["c"]]
    assert len(said) == 3


def test_held_out_prompts_name_the_clusters_of_now(tmp_path: Path) -> None:
    config = load_config(tastes(tmp_path), [f"model.prompt_template={NAMED}"])
    folder = RunFolder(tmp_path / "run")
    with folder, Assembly(config) as parts:
        trainer = Trainer(parts, folder, Display("x", 1))

        def read() -> set[tuple[str, str]]:
            return {
                (str(prompt.cluster_id), str(parts.tokenizer.decode([*prompt.token_ids])))
                for prompt in trainer.held_out_prompts
            }

        assert read() == {("many", "[many] ?"), ("few", "[few] ?")}
        division = parts.members.division
        everybody = dict.fromkeys(division.cluster_of, "few")
        parts.members.division = replace(division, cluster_of=everybody)
        trainer._meet_clusters()
        assert read() == {("few", "[few] ?")}


# Settings.


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loss": {"objective": "dop"}}, "loss.objective is 'dop': input should be"),
        ({"loss": {"objective": "dpo"}, "estimator": {"ddof": 1}}, "estimator has no effect here"),
        ({"loss": {"objective": "sft"}, "estimator": {}}, "estimator has no effect here"),
        ({"loss": {"objective": "dpo", "aggregation": "grpo"}}, "aggregation has no effect here"),
        ({"loss": {"objective": "dpo", "kl_coef": 0.1}}, "kl_coef has no effect here"),
        ({"loss": {"objective": "sft", "beta": 0.1}}, "beta has no effect here"),
        ({"loss": {"beta": 0.1}}, "beta has no effect here"),
        ({"loss": {"objective": "dpo", "beta": 0.0}}, "loss.beta is 0.0: input should be greater"),
        (
            {"loss": {"objective": "dpo"}, "generation.group_size": 1},
            "objective 'dpo' learns nothing from groups of one",
        ),
        ({"model.prompt_template": "{cluster}"}, "is '{cluster}'; expected {prompt} in it, once"),
        (
            {"model.prompt_template": "[{clusters}] {prompt}"},
            "with {clusters}; expected {prompt}, {cluster}",
        ),
        (
            {"model.prompt_template": NAMED, "generation.long_prompts": "drop"},
            "counts tokens before there are clusters",
        ),
    ],
)
def test_what_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        parse_config(tiny_run(changes))
    assert words in str(refusal.value)


def test_what_is_allowed() -> None:
    parse_config(tiny_run({"loss": {"objective": "sft"}, "generation.group_size": 1}))
    for objective in ("dpo", "sft"):
        config = parse_config(tiny_run({"loss": {"objective": objective}, "run.resample": 2}))
        assert config.rule == objective
        assert not config.resolved_loss().takes_estimator


def test_arms_keep_what_has_an_effect() -> None:
    loss = {"aggregation": "grpo", "clip_low": 0.1, "kl_coef": 0.2, "mask_truncated": True}
    base = parse_config(tiny_run({"estimator": {"name": "auto", "ddof": 1}, "loss": loss}))
    dpo = arm_config(base, "dpo@loss.beta=0.5@optimizer.learning_rate=1e-5", 3)
    assert (dpo.loss.objective, dpo.loss.beta, dpo.loss.mask_truncated) == ("dpo", 0.5, True)
    assert (dpo.loss.kl_coef, dpo.optimizer.learning_rate, dpo.run.seed) == (0.0, 1e-5, 3)
    assert arm_config(base, "sft", 3).loss.aggregation == "grpo"
    # And back from a base that has an objective.
    pgrpo = arm_config(dpo, "pgrpo:one", 0)
    assert (pgrpo.loss.objective, pgrpo.estimator.history) == ("policy_gradient", "one")
    rate = arm_config(base, "grpo@optimizer.learning_rate=1e-4", 0)
    assert rate.optimizer.learning_rate == 1e-4
    assert rate.loss == base.loss


@pytest.mark.parametrize(
    ("arm", "words"),
    [
        ("dpo:one", "arm 'dpo:one': estimator has no effect here"),
        ("dpoo", "there is no estimator 'dpoo'; did you mean 'dpo'?"),
        ("dpo@beta", "override 'beta' is not of the form section.key=value"),
        ("sft@loss.beta=0.1", "arm 'sft@loss.beta=0.1': loss: beta has no effect here"),
    ],
)
def test_arms_that_are_none(arm: str, words: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        arm_config(parse_config(tiny_run()), arm, 0)
    assert words in str(refusal.value)


def test_arms_have_folders_of_their_own(tmp_path: Path) -> None:
    assert arm_folder("dpo@loss.beta=0.5") == "dpo-loss.beta=0.5"
    assert arm_folder("pgrpo:one") == "pgrpo-one"
    arms = [f"dpo@model.prompt_template={text}" for text in ("{prompt} !", "{prompt} ?")]
    with pytest.raises(ConfigError, match="would share the folder"):
        compare(parse_config(tiny_run()), arms, [0], tmp_path / "out")
    assert not (tmp_path / "out").exists()
