"""Held-out choices among more films than were trained with: the same interactions, counted anew."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from conftest import SHAPE, write_config
from test_cli import refused
from test_data import made_up_ratings, movielens, write
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pgrpo.cli import main
from pgrpo.data import load_dataset
from pgrpo.data.movielens import load_movielens, with_candidates
from pgrpo.errors import ConfigError, DataError
from pgrpo.experiments import reproduce as reproducing
from pgrpo.experiments.candidates import CANDIDATES
from pgrpo.experiments.design import Claim, HeldOut, Reproduction, Setting
from pgrpo.experiments.measure import rules
from pgrpo.experiments.reproduce import estimate, load_base, plans, reproduce
from pgrpo.runs.config import load_config
from pgrpo.runs.display import console
from pgrpo.runs.folder import RunFolder
from pgrpo.train.build import Assembly
from pgrpo.train.checkpoint import chosen_checkpoint
from pgrpo.train.evaluation import groups_with, held_out, held_out_with

ROOT = Path(__file__).parents[1]
Capture = pytest.CaptureFixture[str]
NUMBERS = (4, 7, 12)
NUM_PROMPTS = 25


def model_folder(folder: Path, ratings: Path) -> Path:
    """A model with random weights that reads the words of the prompts, each label as one token."""
    examples = load_dataset(movielens(ratings, candidates=max(NUMBERS))).train
    words = sorted({word for example in examples for word in example.text.split()})
    vocabulary = {word: 3 + place for place, word in enumerate(words)}
    core = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2, **vocabulary}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    shape: dict[str, Any] = {**SHAPE, "vocab_size": 3 + len(words)}
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("films"), "ml-1m", made_up_ratings(0))


@pytest.fixture(scope="module")
def changes(films: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of a tiny run: films are chosen among four, drawn by their popularity."""
    return {
        "data": {
            "name": "movielens",
            "path": str(films),
            "negatives": "popularity",
            "candidates": 4,
        },
        "model.name": str(model_folder(tmp_path_factory.mktemp("model"), films)),
        "rewards": [{"name": "choice"}],
        "run.num_steps": 2,
        "run.eval_prompts": NUM_PROMPTS,
        "optimizer.learning_rate": 3e-2,
    }


@pytest.fixture(scope="module")
def run(changes: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    config = write_config(folder, changes)
    assert main(["train", str(config), "--out", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture
def parts(run: Path) -> Iterator[Assembly]:
    folder = RunFolder(run)
    checkpoint = chosen_checkpoint(folder, best=False)
    with Assembly(folder.config(), checkpoint) as made:
        made.engine.sync(int(checkpoint.state()["policy_version"]))
        yield made


def test_another_number_of_films_is_what_loading_with_it_gives(films: Path) -> None:
    four = load_movielens(movielens(films, negatives="popularity"))
    many = with_candidates(four, 12)
    loaded = load_movielens(movielens(films, negatives="popularity", candidates=12))
    assert list(many.train) == list(loaded.train)
    assert list(many.evaluation) == list(loaded.evaluation)
    assert list(four.evaluation) == list(
        load_movielens(movielens(films, negatives="popularity")).evaluation
    )
    few = write(films.parent / "few", "ml-1m", [r for r in made_up_ratings(0) if r[1] <= 30])
    with pytest.raises(DataError, match=r"candidates is 26, but user .* leaves"):
        with_candidates(load_movielens(movielens(few)), 26)


def test_the_same_interactions_are_asked_with_every_number(parts: Assembly) -> None:
    sets = list(held_out_with(parts, NUMBERS, NUM_PROMPTS))
    assert [len(examples) for examples in sets] == [NUM_PROMPTS] * len(NUMBERS)
    assert sets[0] == held_out(parts.dataset, NUM_PROMPTS), "with 4 they are those of the run"
    for number, examples in zip(NUMBERS, sets, strict=True):
        for own, of_four in zip(examples, sets[0], strict=True):
            columns: Any = own.columns
            assert (own.user, columns["film"]) == (of_four.user, of_four.columns["film"])
            assert len(columns["options"]) == number == len(own.choices or ())
            assert own.text.splitlines()[-1] == of_four.text.splitlines()[-1]


def test_rewards_of_each_prompt_are_those_of_the_likeliest_label(parts: Assembly) -> None:
    """Recounted from the logits of the trained model, prompt by prompt."""
    other = LlamaForCausalLM.from_pretrained(parts.config.model.name).eval()
    other.load_state_dict(parts.model.model.state_dict())
    said: set[str] = set()
    for number, groups in zip(NUMBERS, groups_with(parts, NUMBERS, NUM_PROMPTS), strict=True):
        assert len(groups) == NUM_PROMPTS
        rewards: list[float] = []
        for group in groups:
            example = group.prompt.example
            assert len(example.choices or ()) == number
            ids = torch.tensor([group.prompt.token_ids])
            with torch.no_grad():
                logits = other(ids).logits[0, -1]
            labels = [parts.tokenizer(text.strip()).input_ids[0] for text in example.choices or ()]
            best = int(logits[labels].argmax())
            rewards.append(float(best == example.columns["position"]))
            said.add(group.rollouts[0].completion)
        assert [float(group.rewards.item()) for group in groups] == rewards
    assert len(said) > 1, "a policy that always says the same shows little"


def test_an_evaluation_is_the_mean_of_these(run: Path, parts: Assembly, capsys: Capture) -> None:
    numbers = ",".join(map(str, NUMBERS))
    command = ["evaluate", str(run), "--prompts", str(NUM_PROMPTS), "--json"]
    assert main([*command, "--candidates", numbers]) == 0
    results = json.loads(capsys.readouterr().out)
    assert [result["candidates"] for result in results] == list(NUMBERS)
    found = list(groups_with(parts, NUMBERS, NUM_PROMPTS))
    for result, groups in zip(results, found, strict=True):
        rewards = np.array([group.rewards.item() for group in groups])
        assert result["reward"] == pytest.approx(rewards.mean())
        assert result["standard_error"] == pytest.approx(rewards.std() / math.sqrt(NUM_PROMPTS))
        clusters = np.array([str(group.prompt.cluster_id) for group in groups])
        assert {name: part["reward"] for name, part in result["clusters"].items()} == {
            name: pytest.approx(rewards[clusters == name].mean()) for name in set(clusters)
        }
    # Without a number it is what the run's last evaluation has.
    assert main(command) == 0
    (trained,) = json.loads(capsys.readouterr().out)
    assert trained == results[0]
    last = json.loads((run / "evaluations.jsonl").read_text("utf-8").splitlines()[-1])
    assert {key: trained[key] for key in last} == last


def test_who_is_left_out_with_one_number_is_with_all(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    """With titles prompts tell of three to nine earlier films, and are of different lengths."""
    titles = {**changes, "data": {**changes["data"], "template": "titles"}}
    with Assembly(load_config(write_config(tmp_path, titles))) as parts:
        (longest,) = held_out_with(parts, [12], 10_000)
        lengths = [len(parts.tokenizer(example.text).input_ids) for example in longest]
    limit = int(np.quantile(lengths, 0.2))
    expected = [e.columns["film"] for e, n in zip(longest, lengths, strict=True) if n <= limit]
    assert 0 < len(expected) < len(longest)
    short = {"generation.long_prompts": "drop", "generation.max_prompt_tokens": limit}
    with Assembly(load_config(write_config(tmp_path, {**titles, **short}))) as parts:
        assert len(parts.dataset.evaluation) == len(longest), "with four films all are short enough"
        for examples in held_out_with(parts, NUMBERS, 10_000):
            assert [example.columns["film"] for example in examples] == expected
    short["generation.max_prompt_tokens"] = min(lengths) - 1
    with (
        Assembly(load_config(write_config(tmp_path, {**titles, **short}))) as parts,
        pytest.raises(DataError, match="held-out prompts with 12 candidates are longer"),
    ):
        list(held_out_with(parts, NUMBERS, 10_000))


def test_simple_rules_with_each_number(parts: Assembly) -> None:
    measured = [HeldOut(number, NUM_PROMPTS) for number in NUMBERS]
    found = rules(parts.config, measured)
    assert list(found) == measured
    for number, examples in zip(NUMBERS, held_out_with(parts, NUMBERS, NUM_PROMPTS), strict=True):
        of_rules = found[HeldOut(number, NUM_PROMPTS)]
        assert of_rules["chance"] == pytest.approx(1 / number)
        popular: list[float] = []
        for example in examples:
            columns: Any = example.columns
            best = [
                p for p, n in enumerate(columns["popularity"]) if n == max(columns["popularity"])
            ]
            popular.append((columns["position"] in best) / len(best))
        assert of_rules["most popular"] == pytest.approx(np.mean(popular))
        assert set(of_rules) == {
            "chance",
            "most popular",
            "one rule for all",
            "one rule per cluster",
            "one rule per person",
        }
    means = [of_rules["one rule for all"] for of_rules in found.values()]
    assert means[0] > means[-1], "of more films fewer are right"


def test_choices_of_rated_films_have_no_other_numbers(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    data = {"name": "movielens", "path": changes["data"]["path"], "task": "rated"}
    rated = {**changes, "data": data, "rewards": [{"name": "rated"}]}
    with (
        Assembly(load_config(write_config(tmp_path, rated))) as parts,
        pytest.raises(ConfigError, match="data.task is 'rated'"),
    ):
        next(held_out_with(parts, [5], 8))


def test_numbers_that_there_are_not(run: Path, capsys: Capture) -> None:
    said = refused(capsys, "evaluate", run, "--candidates", "4,27")
    assert "--candidates" in said and "27" in said


# --- the grid --------------------------------------------------------------------------------


def test_a_policy_is_trained_once_and_measured_with_every_number(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    asked = Reproduction(
        name="films",
        about="more films",
        axis="films",
        settings=tuple(
            Setting(f"films-{n}", ("grpo", "pgrpo"), measured_with=HeldOut(n, 20)) for n in NUMBERS
        ),
        claims=(Claim(("films-12", "pgrpo"), ("films-12", "grpo"), "a history", primary=True),),
    )
    base = load_base(write_config(tmp_path, changes))
    planned = plans(asked, base, [0, 1])
    assert len({plan.run_key for plan in planned}) == 4
    assert len({plan.key for plan in planned}) == 12
    out = tmp_path / "out"
    quiet = console(quiet=True)
    with patch.object(reproducing, "_discard_checkpoints"):
        reproduce(asked, base, [0, 1], out, shown_on=quiet)
    trained = sorted(path.parent.relative_to(out / "runs") for path in out.rglob("config.toml"))
    assert trained == [Path(f"films-4/{arm}/seed-{k}") for arm in ("grpo", "pgrpo") for k in (0, 1)]
    lines = [json.loads(line) for line in (out / "figures.jsonl").read_text("utf-8").splitlines()]
    assert len(lines) == 12
    folder = RunFolder(out / "runs" / "films-4" / "pgrpo" / "seed-1")
    checkpoint = chosen_checkpoint(folder, best=False)
    with Assembly(folder.config(), checkpoint) as parts:
        parts.engine.sync(2)
        found = list(groups_with(parts, NUMBERS, 20))
    rows = json.loads((out / "table.json").read_text("utf-8"))
    for number, groups in zip(NUMBERS, found, strict=True):
        (row,) = (
            row
            for row in rows
            if (row["setting"], row["arm"], row["seed"]) == (f"films-{number}", "pgrpo", 1)
        )
        assert row["figure"] == pytest.approx(np.mean([group.rewards[0] for group in groups]))
    assert len({row["figure"] for row in rows}) > 4
    (claim,) = json.loads((out / "claims.json").read_text("utf-8"))
    assert len(claim["each"]) == 2
    page = (out / "report.html").read_text("utf-8")
    assert page.count("--estimators grpo,pgrpo") == 1, "one command trains all"
    assert "4 runs took" in page
    assert "What simple rules get" in page and "◇ one rule for all" in page
    of_settings = json.loads((out / "rules.json").read_text("utf-8"))
    expected = rules(base, [HeldOut(n, 20) for n in NUMBERS])
    assert of_settings == {f"films-{n}": expected[HeldOut(n, 20)] for n in NUMBERS}

    # Without two of its figures a run is wanted again, and measured where its checkpoint still is.
    kept = [json.dumps(line) for line in lines[:-2]]
    (out / "figures.jsonl").write_text("".join(f"{line}\n" for line in kept), "utf-8")
    assert estimate(planned, out).num_measured == 3
    reproduce(asked, base, [0, 1], out, shown_on=quiet)
    again = [json.loads(line) for line in (out / "figures.jsonl").read_text("utf-8").splitlines()]
    assert [line["rewards"] for line in again] == [line["rewards"] for line in lines]
    assert not list(out.rglob("checkpoints"))


def test_the_base_draws_films_by_popularity() -> None:
    base = load_base(ROOT / "examples" / CANDIDATES.base)
    data: Any = base.data
    assert (data.negatives, data.answer) == ("popularity", "label")
    planned = plans(CANDIDATES, base, [0])
    assert [plan.measured_with.candidates for plan in planned if plan.arm == "grpo"] == [
        4,
        8,
        12,
        16,
        20,
    ]
    assert len({plan.run_key for plan in planned}) == 4, "each arm is trained once"
