"""Reproductions: grids that go on where they were, figures recounted, and claims judged by rule."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import test_panel as panel
import tomli_w
from conftest import Tree, contents, processes, write_config
from test_ability import rows
from test_cli import refused

from pgrpo.cli import main
from pgrpo.config.toml import read_toml
from pgrpo.errors import ConfigError, RunFolderError
from pgrpo.experiments import measure as measuring
from pgrpo.experiments import reproduce as reproducing
from pgrpo.experiments.design import Claim, Reproduction, Setting
from pgrpo.experiments.reproduce import estimate, load_base, plans, reproduce, restricted
from pgrpo.experiments.reproductions import REPRODUCTIONS
from pgrpo.runs.display import console
from pgrpo.runs.folder import RunFolder
from pgrpo.runs.records import AbilityRecord
from pgrpo.train.ability import measure_ability
from pgrpo.train.build import Assembly
from pgrpo.train.checkpoint import chosen_checkpoint
from pgrpo.train.evaluation import held_out_groups

ROOT = Path(__file__).parents[1]
Capture = pytest.CaptureFixture[str]
CHANGES = {"run.num_steps": 2, "run.eval_every": 1}
SMALL = Reproduction(
    name="small",
    about="two settings, and one that comes to the same as the first",
    axis="completions per prompt",
    settings=(
        Setting("G-2", ("grpo", "pgrpo"), ("generation.group_size=2",)),
        Setting("G-3", ("grpo", "pgrpo"), ("generation.group_size=3",)),
        Setting("again", ("pgrpo",), ("generation.group_size=2",), no_signal=("rloo",)),
    ),
    claims=(
        Claim(("G-2", "pgrpo"), ("G-2", "grpo"), "a history", primary=True),
        Claim(("G-2", "pgrpo"), ("G-3", "grpo"), "fewer completions", margin=5.0),
        Claim(("G-2", "pgrpo"), ("again", "pgrpo"), "nothing"),
    ),
)
SEEDS = [0, 1]
FOLDERS = [
    f"{s}/{arm}/seed-{k}" for k in SEEDS for s in ("G-2", "G-3") for arm in ("grpo", "pgrpo")
]


def read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def figures(out: Path) -> dict[str, Tree]:
    path = out / "figures.jsonl"
    lines = map(json.loads, path.read_text("utf-8").splitlines() if path.exists() else [])
    return {line["run"]: line for line in lines}


def without_times(out: Path) -> tuple[list[Tree], list[Tree], dict[str, Tree]]:
    """Table, claims and figures, but for seconds."""
    lines = figures(out)
    for line in lines.values():
        for record in line["ability"]:
            record["seconds"] = None
    table = [{k: v for k, v in row.items() if k != "minutes"} for row in read(out / "table.json")]
    lines = {
        name: {k: v for k, v in line.items() if k not in ("seconds", "measuring_s")}
        for name, line in lines.items()
    }
    return table, read(out / "claims.json"), lines


def run(base: Path, out: Path) -> None:
    reproduce(SMALL, load_base(base), SEEDS, out, shown_on=console(quiet=True))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("base"), CHANGES)


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reproduce") / "out"
    run(base, out)
    return out


def test_every_cell_was_trained_and_measured_once(whole: Path) -> None:
    assert list(figures(whole)) == FOLDERS, "seeds outermost, and what comes to the same once"
    found = sorted(path.parent.relative_to(whole / "runs") for path in whole.rglob("config.toml"))
    assert found == sorted(map(Path, FOLDERS))
    for name, line in figures(whole).items():
        folder = RunFolder(whole / "runs" / name)
        assert folder.is_finished
        assert not folder.checkpoints.exists(), "they are deleted once the policy was measured"
        info = folder.info()
        assert len(line["rewards"]) == len(line["users"]) == info.num_held_out_examples
        assert line["steps"] == 2
        assert line["rollouts"] == 2 * 4 * int(name[2])
        assert line["seconds"] == info.seconds > 0
        assert line["expected"] == [], "completions are free"
        assert 0 < line["commonest"] <= 1
        assert {int(k): v for k, v in line["curve"].items()} == {
            record.step: record.reward for record in folder.evaluations
        }
    for setting in ("G-2", "G-3", "again"):
        assert (whole / "runs" / setting / "report.html").stat().st_size > 10_000


def test_the_table_is_that_of_the_figures(whole: Path) -> None:
    lines, table = figures(whole), read(whole / "table.json")
    expected: list[tuple[str, str, int, float | None]] = []
    for seed in SEEDS:
        for setting, arm in (
            ("G-2", "grpo"),
            ("G-2", "pgrpo"),
            ("G-3", "grpo"),
            ("G-3", "pgrpo"),
            ("again", "pgrpo"),
        ):
            line = lines[f"{'G-2' if setting == 'again' else setting}/{arm}/seed-{seed}"]
            expected.append((setting, arm, seed, float(np.mean(line["rewards"]))))
    expected += [("again", "rloo", seed, None) for seed in SEEDS]
    rows = {(row["setting"], row["arm"], row["seed"]): row for row in table}
    assert len(rows) == len(table) == len(expected)
    for setting, arm, seed, figure in expected:
        row = rows[setting, arm, seed]
        assert row["figure"] == (None if figure is None else pytest.approx(figure))
        assert (row["minutes"] is None) == (figure is None)
    assert len({row["figure"] for row in table}) > 4, "the cells differ"


def test_a_figure_is_the_evaluation_of_the_last_step_where_that_had_all_prompts(
    tmp_path: Path,
) -> None:
    base = write_config(tmp_path, {**CHANGES, "run.num_steps": 3, "run.eval_prompts": 10_000})
    chosen = restricted(SMALL, ["G-2"], ["pgrpo"])
    reproduce(chosen, load_base(base), [3], tmp_path / "out", shown_on=console(quiet=True))
    (line,) = figures(tmp_path / "out").values()
    assert np.mean(line["rewards"]) == pytest.approx(line["curve"]["3"])
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert "G-2: along the runs" in page
    assert "No primary question is asked here." in page


def test_the_table_divides_people_by_the_clusters_of_the_base(whole: Path, base: Path) -> None:
    with Assembly(load_base(base)) as parts:
        cluster_of = parts.members.division.cluster_of
    lines = figures(whole)
    for row in read(whole / "table.json"):
        if row["figure"] is None:
            assert row["clusters"] == {}
            continue
        setting = "G-2" if row["setting"] == "again" else row["setting"]
        line = lines[f"{setting}/{row['arm']}/seed-{row['seed']}"]
        of_cluster: dict[str, list[float]] = {}
        for user, reward in zip(line["users"], line["rewards"], strict=True):
            of_cluster.setdefault(str(cluster_of[user]), []).append(reward)
        assert len(of_cluster) > 1
        assert row["clusters"] == pytest.approx({k: np.mean(v) for k, v in of_cluster.items()})


def test_a_claim_may_be_about_the_people_of_one_cluster(
    whole: Path, base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    with Assembly(load_base(base)) as parts:
        cluster_of = parts.members.division.cluster_of
    name = str(next(iter(cluster_of.values())))
    asked = replace(
        SMALL,
        claims=(
            Claim(("G-2", "pgrpo"), ("G-2", "grpo"), "theirs", cluster=name),
            Claim(("G-2", "pgrpo"), ("G-2", "grpo"), "nobody's", cluster="no such"),
        ),
    )
    reproduce(asked, load_base(base), SEEDS, out, shown_on=console(quiet=True))
    theirs, nobodys = read(out / "claims.json")
    lines = figures(out)
    for seed, found in zip(SEEDS, theirs["each"], strict=True):
        after, before = (lines[f"G-2/{arm}/seed-{seed}"] for arm in ("pgrpo", "grpo"))
        change = [
            a - b
            for user, a, b in zip(after["users"], after["rewards"], before["rewards"], strict=True)
            if str(cluster_of[user]) == name
        ]
        assert 0 < len(change) < len(after["users"])
        assert found == pytest.approx(np.mean(change))
    assert theirs["cluster"] == name
    assert nobodys["verdict"] == "not known"


def test_choices_have_the_rewards_that_the_engine_would_get_and_exact_means(tmp_path: Path) -> None:
    """By the engine's greedy completions, and by drawing 4,000 completions of some prompts."""
    data = {**panel.LONG, "path": str(panel.write(tmp_path / "data", panel.made_up(0)))}
    changes = {**CHANGES, "data": data, "rewards": [{"name": "choice"}]}
    base = load_base(write_config(tmp_path, changes))
    chosen = restricted(SMALL, ["G-2"], ["pgrpo"])
    with patch.object(reproducing, "_discard_checkpoints"):
        reproduce(chosen, base, [0], tmp_path / "out", shown_on=console(quiet=True))
    (line,) = figures(tmp_path / "out").values()
    folder = RunFolder(tmp_path / "out" / "runs" / "G-2" / "pgrpo" / "seed-0")
    with Assembly(folder.config(), chosen_checkpoint(folder, best=False)) as parts:
        parts.engine.sync(2)
        prompts = [parts.builder.build(example) for example in parts.dataset.evaluation]
        assert {len(prompt.choices or ()) for prompt in prompts} == {2, 3, 4}
        greedy = held_out_groups(parts.engine, prompts, parts.held_out_scorer, folder.config())
        drawn = parts.held_out_scorer.score(parts.engine.generate(prompts[:8], 4000, seed=1))
    assert line["rewards"] == [group.rewards[0] for group in greedy]
    said = [group.rollouts[0].completion for group in greedy]
    assert line["commonest"] == max(map(said.count, said)) / len(said)
    assert len(line["expected"]) == len(prompts)
    for exact, group in zip(line["expected"], drawn, strict=False):
        error = group.rewards.std() / np.sqrt(4000)
        assert exact == pytest.approx(group.rewards.mean(), abs=5 * error + 1e-5)
    row = read(tmp_path / "out" / "table.json")[0]
    assert row["expected"] == pytest.approx(np.mean(line["expected"]))


def test_figures_tell_general_ability_before_and_after(tmp_path: Path) -> None:
    """Of a model that reads bytes, so that it can be asked; before is measured once."""
    base = load_base(write_config(tmp_path, {**CHANGES, **rows(tmp_path)}))
    calls: list[int] = []

    def counted(parts: Assembly) -> AbilityRecord:
        found = measure_ability(parts)
        calls.append(found.step)
        return found

    with patch.object(measuring, "measure_ability", counted):
        chosen = restricted(SMALL, ["G-2"], [])
        reproduce(chosen, base, [0], tmp_path / "out", shown_on=console(quiet=True))
    assert calls == [0, 2, 2]
    before, after = (
        [line["ability"][k] for line in figures(tmp_path / "out").values()] for k in (0, 1)
    )
    assert before[0] == before[1]
    assert after[0]["text"]["values"] != after[1]["text"]["values"] != before[0]["text"]["values"]
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert "General ability, before and after" in page


def test_win_rates_of_primary_questions_are_counted_by_cluster(
    whole: Path, base: Path, tmp_path: Path
) -> None:
    """And one seed against another, with made-up rewards that are known."""
    rng = np.random.default_rng(3)
    out = tmp_path / "out"
    out.mkdir()
    lines = list(figures(whole).values())
    for line in lines:
        line["rewards"] = rng.integers(0, 2, len(line["users"])).astype(float).tolist()
    (out / "figures.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), "utf-8")
    asked = replace(
        SMALL,
        claims=(
            Claim(("G-2", "pgrpo"), ("G-3", "grpo"), "a history", primary=True),
            Claim(("G-2", "pgrpo"), ("G-2", "pgrpo"), "a control", primary=True),
            Claim(("G-2", "pgrpo"), ("G-2", "grpo"), "a look"),
        ),
    )
    reproduce(asked, load_base(base), SEEDS, out, shown_on=console(quiet=True))
    with Assembly(load_base(base)) as parts:
        cluster_of = parts.members.division.cluster_of
    history, control, look = read(out / "claims.json")
    assert look["wins"] is None
    assert control["wins"] is None, "of two seeds there is one pair, which tells nothing"
    of = {line["run"]: line for line in lines}
    counted: dict[str, list[int]] = {}
    for seed in SEEDS:
        a, b = of[f"G-2/pgrpo/seed-{seed}"], of[f"G-3/grpo/seed-{seed}"]
        for user, x, y in zip(a["users"], a["rewards"], b["rewards"], strict=True):
            for name in ("all", str(cluster_of[user])):
                counts = counted.setdefault(name, [0, 0, 0])
                counts[0 if x > y else 1 if x == y else 2] += 1
    found = {"all": history["wins"], **history["wins_of_clusters"]}
    assert {k: [v["wins"], v["ties"], v["losses"]] for k, v in found.items()} == counted
    assert "Win rates" in (out / "report.html").read_text("utf-8")


def test_an_arm_against_itself_compares_disjoint_pairs_of_seeds(
    whole: Path, base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    line = figures(whole)["G-2/pgrpo/seed-0"]
    levels = [0.1, 0.3, 0.9, 0.2, 5.0]
    text = ""
    for plan in plans(restricted(SMALL, ["G-2"], ["pgrpo"]), load_base(base), range(5)):
        same = {**line, "key": plan.key, "settings": plan.settings, "run": plan.folder}
        text += json.dumps({**same, "rewards": [levels[plan.seed]] * len(line["users"])}) + "\n"
    (out / "figures.jsonl").write_text(text, "utf-8")
    control = Claim(("G-2", "pgrpo"), ("G-2", "pgrpo"), "a control", primary=True)
    asked = replace(restricted(SMALL, ["G-2"], ["pgrpo"]), claims=(control,))
    reproduce(asked, load_base(base), list(range(5)), out, shown_on=console(quiet=True))
    (claim,) = read(out / "claims.json")
    assert claim["each"] == pytest.approx([0.1 - 0.3, 0.9 - 0.2])
    assert claim["verdict"] == "level"
    assert (claim["wins"]["wins"], claim["wins"]["losses"]) == (len(line["users"]),) * 2


def test_what_another_folder_has_measured_is_taken_over(
    whole: Path, base: Path, tmp_path: Path
) -> None:
    """Also by runs that are watched otherwise, of another name; the other folder is only read."""
    changed = replace(
        SMALL,
        name="other",
        settings=(
            Setting("seldom", ("pgrpo",), ("generation.group_size=2", "run.eval_every=2")),
            Setting("G-3", ("pgrpo",), ("generation.group_size=3", "run.eval_prompts=3")),
        ),
        claims=(Claim(("G-3", "pgrpo"), ("seldom", "pgrpo"), "more", primary=True),),
    )
    known, before = whole / "figures.jsonl", contents(whole)
    assert estimate(plans(changed, load_base(base), SEEDS), tmp_path / "out", known).minutes == 0
    reproduce(
        changed,
        load_base(base),
        SEEDS,
        tmp_path / "out",
        known=known,
        shown_on=console(quiet=True),
    )
    assert contents(whole) == before
    assert not list(tmp_path.rglob("config.toml")), "nothing was run"
    lines = figures(whole)
    for row in read(tmp_path / "out" / "table.json"):
        name = "G-2" if row["setting"] == "seldom" else "G-3"
        line = lines[f"{name}/pgrpo/seed-{row['seed']}"]
        assert row["figure"] == pytest.approx(np.mean(line["rewards"]))
    with pytest.raises(ConfigError, match=r"--figures names .*no\.jsonl, which is no file"):
        reproduce(changed, load_base(base), SEEDS, tmp_path / "out", known=tmp_path / "no.jsonl")


def test_figures_stay_known_where_settings_were_added_and_not_where_one_has_changed(
    whole: Path, base: Path, tmp_path: Path
) -> None:
    """Figures of an earlier version lack what it did not have, and have its own defaults."""
    for change, num_known in (("without", 8), ("other", 0)):
        out = tmp_path / change
        out.mkdir()
        lines = list(figures(whole).values())
        for line in lines:
            assert line["settings"]["optimizer.beta2"] == "0.999"
            if change == "without":
                del line["settings"]["optimizer.beta2"]
            else:
                line["settings"]["optimizer.beta2"] = "0.95"
        text = "".join(f"{json.dumps(line)}\n" for line in lines)
        (out / "figures.jsonl").write_text(text, "utf-8")
        assert estimate(plans(SMALL, load_base(base), SEEDS), out).num_measured == num_known


def test_how_a_run_is_watched_does_not_change_its_last_policy(whole: Path, tmp_path: Path) -> None:
    """What a key leaves out: the same weights come of it."""
    watched = {"run.eval_every": 2, "run.eval_prompts": 3, "run.checkpoint_every": 1}
    watched |= {"run.samples_per_step": 0, "run.keep_checkpoints": 2, "run.keep_best": True}
    base = load_base(write_config(tmp_path, {**CHANGES, **watched}))
    chosen = restricted(SMALL, ["G-2"], [])
    reproduce(chosen, base, [0], tmp_path / "out", shown_on=console(quiet=True))
    for name, line in figures(tmp_path / "out").items():
        same = figures(whole)[name]
        assert line["key"] == same["key"]
        assert (line["rewards"], line["expected"]) == (same["rewards"], same["expected"])


def test_claims_are_differences_by_seed_and_prompt(whole: Path) -> None:
    lines, claims = figures(whole), read(whole / "claims.json")

    def change(after: str, before: str) -> list[float]:
        return [
            float(np.mean(lines[f"{after}/seed-{k}"]["rewards"]))
            - float(np.mean(lines[f"{before}/seed-{k}"]["rewards"]))
            for k in SEEDS
        ]

    history, fewer, nothing = claims
    assert history["primary"]
    assert history["each"] == pytest.approx(change("G-2/pgrpo", "G-2/grpo"))
    assert history["mean"] == pytest.approx(np.mean(history["each"]))
    expected = "better" if history["low"] > 0 else "worse" if history["high"] < 0 else "level"
    assert history["verdict"] == expected
    assert fewer["each"] == pytest.approx(change("G-2/pgrpo", "G-3/grpo"))
    assert fewer["verdict"] == ("reached" if fewer["low"] > -5 else "not shown")
    assert nothing["each"] == [0.0, 0.0]
    assert nothing["verdict"] == "level"


def test_verdicts_are_those_of_intervals_made_otherwise(
    whole: Path, base: Path, tmp_path: Path
) -> None:
    """Known rewards of three seeds: an interval of each claim by drawing seeds and people one by one."""
    rng = np.random.default_rng(0)
    lines = list(figures(whole).values())
    people = np.array(lines[0]["users"])
    gains = {"G-2/grpo": 0.0, "G-2/pgrpo": 0.3, "G-3/grpo": 1.2, "G-3/pgrpo": 0.0}
    out = tmp_path / "out"
    out.mkdir()
    made: dict[str, list[Any]] = {}
    for line in lines:
        cell = line["run"].rpartition("/")[0]
        rewards = gains[cell] + rng.normal(0, 0.02, len(people)) + rng.normal(0, 0.002)
        line["rewards"] = rewards.tolist()
        made.setdefault(cell, []).append(rewards)
    (out / "figures.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), "utf-8")
    asked = replace(
        SMALL,
        claims=(
            Claim(("G-2", "pgrpo"), ("G-2", "grpo"), "more"),
            Claim(("G-2", "grpo"), ("G-2", "pgrpo"), "less"),
            Claim(("G-2", "pgrpo"), ("G-2", "grpo"), "reached", margin=0.1),
            Claim(("G-2", "pgrpo"), ("G-3", "grpo"), "not reached", margin=0.1),
        ),
    )
    reproduce(asked, load_base(base), SEEDS, out, shown_on=console(quiet=True))
    claims = read(out / "claims.json")
    assert [claim["verdict"] for claim in claims] == ["better", "worse", "reached", "not shown"]
    for claim in claims:
        after, before = (np.array(made["/".join(claim[side])]) for side in ("after", "before"))
        change = after - before
        assert claim["mean"] == pytest.approx(change.mean())
        names = np.unique(people)
        means: list[float] = []
        for _ in range(4000):
            seeds = rng.integers(0, len(SEEDS), len(SEEDS))
            who = rng.choice(names, len(names))
            places = np.concatenate([np.flatnonzero(people == name) for name in who])
            means.append(float(change[seeds][:, places].mean()))
        each = change.mean(1)
        reach = (
            12.706 * each.std(ddof=1) / np.sqrt(2)
        )  # Student's quantile of one degree of freedom
        low = min(np.quantile(means, 0.025), each.mean() - reach)
        high = max(np.quantile(means, 0.975), each.mean() + reach)
        assert [claim["low"], claim["high"]] == pytest.approx([low, high], abs=0.02)


@pytest.mark.parametrize("lost", ["figure", "line"])
def test_a_run_without_its_figure_and_checkpoint_is_told(
    whole: Path, base: Path, tmp_path: Path, lost: str
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    lines = (out / "figures.jsonl").read_text("utf-8")
    # Cut in the middle of the last line, as by a full disk, or without it.
    kept = lines[:-40] if lost == "line" else lines[: lines[:-1].rfind("\n") + 1]
    (out / "figures.jsonl").write_text(kept, "utf-8")
    assert estimate(plans(SMALL, load_base(base), SEEDS), out).num_measured == 7
    assert (out / "figures.jsonl").read_text("utf-8") == kept, "whoever only reads changes nothing"
    last = out / "runs" / FOLDERS[-1]
    with pytest.raises(
        RunFolderError, match="remove the folder, and the same command runs it again"
    ):
        run(base, out)
    shutil.rmtree(last)
    run(base, out)
    assert without_times(out) == without_times(whole)


def test_what_comes_to_the_same_goes_on_where_it_was_begun(
    whole: Path, base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    quiet = console(quiet=True)
    reproduce(restricted(SMALL, ["again"], []), load_base(base), SEEDS, out, shown_on=quiet)
    run(base, out)
    assert {name for name in figures(out) if "grpo/" in name} >= {"again/pgrpo/seed-0"}
    assert "G-2/pgrpo/seed-0" not in figures(out)
    assert read(out / "table.json") != []
    rows = {(r["setting"], r["arm"], r["seed"]): r["figure"] for r in read(out / "table.json")}
    expected = {
        (r["setting"], r["arm"], r["seed"]): r["figure"] for r in read(whole / "table.json")
    }
    assert rows == expected
    assert not list(out.rglob("checkpoints"))


def test_a_base_whose_estimator_would_refuse_the_settings(tmp_path: Path) -> None:
    changes = {**CHANGES, "estimator": {"name": "grpo"}, "run.resample": 2}
    base = load_base(write_config(tmp_path, changes))
    alone = restricted(REPRODUCTIONS["rollouts"], ["steps-1", "rollouts-8"], ["pgrpo", "grpo"])
    assert {plan.config.run.resample for plan in plans(alone, base, [0])} == {0}


def test_the_page_has_every_cell_claim_and_command(whole: Path) -> None:
    page = (whole / "report.html").read_text("utf-8")
    for text in ("G-2", "G-3", "again", "fewer completions", "Two settings, and one", "rloo"):
        assert text in page
    for claim in read(whole / "claims.json"):
        assert claim["verdict"] in page
    assert "along the runs" not in page, "three points are no curve"
    commands = re.findall(r"pgrpo compare [^<]*", page)
    assert len(commands) == 3
    assert "--estimators grpo,pgrpo --seeds 0,1 --set generation.group_size=2" in commands[0]


def test_the_commands_train_the_same_runs(whole: Path, base: Path) -> None:
    """The base that was written beside them, under their overrides, gives the configs of the grid."""
    assert [plan.key for plan in plans(SMALL, load_base(whole / "base.toml"), SEEDS)] == [
        plan.key for plan in plans(SMALL, load_base(base), SEEDS)
    ]


def test_what_is_there_is_not_run_again(whole: Path, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    before = contents(out / "runs")
    lines = (out / "figures.jsonl").read_bytes()
    run(base, out)
    pages = {f"{name}/report.html" for name in ("G-2", "G-3", "again")}
    after = contents(out / "runs")
    assert {k: v for k, v in after.items() if k not in pages} == {
        k: v for k, v in before.items() if k not in pages
    }
    # Figures do without the folders that they were measured in.
    shutil.rmtree(out / "runs")
    run(base, out)
    assert (out / "figures.jsonl").read_bytes() == lines
    assert without_times(out) == without_times(whole)
    assert not list(out.rglob("config.toml"))


def _killed(base: Path, out: Path, at: str) -> None:
    """Ends itself when the sixth run is to be measured, or its checkpoints are to be deleted."""

    def kill() -> None:
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))

    def measured(*arguments: Any) -> Any:
        if at == "before measuring" and len(figures(out)) == 5:
            kill()
        return held_out_groups(*arguments)

    delete = shutil.rmtree

    def deleted(path: Path, **options: Any) -> None:
        if at == "before deleting" and Path(path) == out / "runs" / FOLDERS[5] / "checkpoints":
            kill()
        delete(path, **options)

    with (
        patch.object(measuring, "held_out_groups", measured),
        patch.object(shutil, "rmtree", deleted),
    ):
        run(base, out)


@pytest.mark.parametrize("at", ["before measuring", "before deleting"])
def test_a_killed_reproduction_goes_on_where_it_was(
    whole: Path, base: Path, tmp_path: Path, at: str
) -> None:
    out = tmp_path / "out"
    process = processes.Process(target=_killed, args=(base, out, at))
    process.start()
    process.join()
    assert process.exitcode == -9
    done = FOLDERS[: 5 if at == "before measuring" else 6]
    assert list(figures(out)) == done
    first = read(out / "table.json")
    assert len(first) == len(done) + 3 - (at == "before deleting"), "tables are of every run"
    assert (out / "report.html").exists()
    assert RunFolder(out / "runs" / FOLDERS[5]).is_finished
    assert RunFolder(out / "runs" / FOLDERS[5]).checkpoints.exists()
    before = {name: contents(out / "runs" / name) for name in FOLDERS[:5]}
    run(base, out)
    assert {name: contents(out / "runs" / name) for name in FOLDERS[:5]} == before
    assert without_times(out) == without_times(whole)
    assert not list(out.rglob("checkpoints"))


def test_runs_of_other_settings_are_refused(whole: Path, tmp_path: Path) -> None:
    base = write_config(tmp_path, {**CHANGES, "optimizer.learning_rate": 1e-3})
    before = contents(whole)
    with pytest.raises(
        ConfigError, match=r"learning_rate = 0.005, not 0.001; choose another --out"
    ):
        run(base, whole)
    assert {k: v for k, v in contents(whole).items() if k != ".lock"} == {
        k: v for k, v in before.items() if k != ".lock"
    }


def test_what_is_left_is_estimated_by_what_was_measured(whole: Path, base: Path) -> None:
    cost = estimate(plans(SMALL, load_base(base), SEEDS), whole)
    assert (cost.num_runs, cost.num_measured, cost.minutes) == (8, 8, 0)
    lines = figures(whole)
    cost = estimate(plans(SMALL, load_base(base), [0, 1, 2, 3]), whole)
    assert (cost.num_runs, cost.num_measured) == (16, 8)

    def median(setting: str) -> float:
        took = [v["seconds"] + v["measuring_s"] for k, v in lines.items() if k.startswith(setting)]
        return float(np.median(took))

    assert cost.minutes == pytest.approx(4 * (median("G-2") + median("G-3")) / 60)


def test_estimating_makes_nothing(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    assert main(["reproduce", "random", "--out", str(out), "--estimate"]) == 0
    assert capsys.readouterr().out == (
        f"random: 0 of 20 runs are measured in {out}\n"
        "how long one takes is not known: the first one will tell\n"
    )
    assert not out.exists()


def test_what_does_not_go_with_a_config_is_listed_with_the_reason(
    base: Path, capsys: Capture
) -> None:
    """Of two steps, none comes after step 20; and a config need not have a section `[run]`."""
    tree = read_toml(base)
    del tree["run"]
    base.with_name("bare.toml").write_text(tomli_w.dumps(tree), "utf-8")
    for config in (base, base.with_name("bare.toml")):
        assert main(["reproduce", "--on", str(config)]) == 0
        said = capsys.readouterr().out
        assert len(said.splitlines()) == len(REPRODUCTIONS)
        assert "curves (40 runs)" in said
        assert "candidates (not with this config: data set 'personas' has no candidates" in said


def test_they_are_listed_with_their_numbers_of_runs(capsys: Capture) -> None:
    assert main(["reproduce"]) == 0
    lines = capsys.readouterr().out.splitlines()
    counts = {line.split(" (")[0]: int(line.split(" (")[1].split()[0]) for line in lines}
    assert counts == {
        "curves": 40,
        "candidates": 20,
        "granularity": 35,
        "random": 20,
        "judge": 15,
        "rollouts": 180,
        "imbalance": 60,
        "regimes": 105,
        "comparators": 50,
        "rates": 150,
    }


@pytest.mark.parametrize("name", REPRODUCTIONS)
def test_a_reproduction_can_be_planned_and_asks_for_cells_that_it_has(name: str) -> None:
    found = REPRODUCTIONS[name]
    planned = plans(found, load_base(ROOT / "examples" / found.base), [0])
    cells = {plan.cell for plan in planned}
    assert len(cells) == len(planned)
    for claim in found.claims:
        assert {claim.after, claim.before} <= cells
    # Rates are tried so that comparators have them, and tell nothing by themselves.
    assert any(claim.primary for claim in found.claims) == (name != "rates")
    settings = [setting.name for setting in found.settings]
    assert len(set(settings)) == len(settings)
    # Equal rollouts are equal.
    if name == "rollouts":
        sizes = {
            plan.config.run.prompts_per_step * plan.config.generation.group_size
            for plan in planned
            if plan.setting.startswith("rollouts")
        }
        assert sizes == {64}


@pytest.mark.parametrize("name", sorted({found.base for found in REPRODUCTIONS.values()}))
def test_the_packaged_bases_are_the_examples(name: str) -> None:
    packaged = ROOT / "python" / "pgrpo" / "experiments" / name
    assert packaged.read_bytes() == (ROOT / "examples" / name).read_bytes()


def test_the_command_runs_some_arms_of_some_settings_on_another_base(
    tmp_path: Path, capsys: Capture
) -> None:
    base, out = write_config(tmp_path, CHANGES), tmp_path / "out"
    command = ["reproduce", "rollouts", "--on", str(base), "--out", str(out), "--seeds", "0"]
    command += ["--settings", "steps-1,steps-2", "--arms", "pgrpo,grpo", "--json"]
    assert main(command) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["report"] == str(out / "report.html")
    rows = [(r["setting"], r["arm"], r["figure"] is None) for r in read(out / "table.json")]
    assert rows == [
        ("steps-1", "pgrpo", False),
        ("steps-2", "grpo", False),
        ("steps-2", "pgrpo", False),
        ("steps-1", "grpo", True),
    ]
    (claim,) = read(out / "claims.json")
    assert (claim["after"], claim["before"]) == (["steps-2", "pgrpo"], ["steps-2", "grpo"])
    assert claim["verdict"] == "not known", "one seed tells nothing"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["curvs"], "there is no reproduction 'curvs'; did you mean 'curves'?"),
        (["curves"], "--out is missing; expected a folder"),
        (["--arms", "grpo"], "--arms has no effect without the name of what to reproduce"),
        (["curves", "--out", "out", "--arms", "grop"], "--arms names 'grop', which curves does"),
        (["curves", "--out", "out", "--settings", "lnog"], "--settings names 'lnog', which curves"),
        (
            ["candidates", "--out", "out", "--settings", "films-4,films-8"],
            "--settings names 'films-4' and not 'films-12', which measures the same runs",
        ),
        (
            ["candidates", "--out", "out", "--on", str(ROOT / "examples" / "electricity.toml")],
            "data set 'panel' has no candidates to vary",
        ),
        (
            ["curves", "--out", "out", "--settings", "long", "--arms", "auto"],
            "none of the settings that --settings names has an arm that --arms names; curves has base:",
        ),
        (["curves", "--out", "out", "--seeds", "x"], "--seeds is 'x'; expected whole numbers"),
        (["curves", "--out", "out", "--on", "no.toml"], "config file no.toml does not exist"),
    ],
)
def test_what_cannot_be_reproduced(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert words in refused(capsys, "reproduce", *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["prompts", "precision"])
def test_cells_that_were_asked_or_computed_otherwise_are_not_compared(
    whole: Path, base: Path, tmp_path: Path, what: str
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    lines = list(figures(whole).values())
    lines[0][what] = "another"
    (out / "figures.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), "utf-8")
    run(base, out)
    verdicts = [claim["verdict"] for claim in read(out / "claims.json")]
    assert verdicts[0] == "not known"
    assert "not known" not in verdicts[1:]
