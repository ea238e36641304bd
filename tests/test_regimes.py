"""The grids of imbalance and regimes: configs that can be run, and questions about cells that they have."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import write_config

from pgrpo.experiments.design import Claim, Reproduction, Setting
from pgrpo.experiments.grid import Plan
from pgrpo.experiments.regimes import IMBALANCE, MINORITY, REGIMES
from pgrpo.experiments.reproduce import load_base, plans, reproduce
from pgrpo.runs.display import console
from pgrpo.train.build import Assembly

ROOT = Path(__file__).parents[1]
BOTH = {found.name: found for found in (IMBALANCE, REGIMES)}


def planned(found: Reproduction) -> dict[tuple[str, str], Plan]:
    """By cell, with one seed."""
    base = load_base(ROOT / "examples" / "electricity.toml")
    return {plan.cell: plan for plan in plans(found, base, [0])}


@pytest.mark.parametrize("name", BOTH)
def test_every_cell_is_another_run_and_every_question_is_of_two_of_them(name: str) -> None:
    found = BOTH[name]
    cells = planned(found)
    assert len(cells) == {"imbalance": 12, "regimes": 21}[name]
    assert len({plan.key for plan in cells.values()}) == len(cells)
    for claim in found.claims:
        assert {claim.after, claim.before} <= cells.keys()
        assert claim.after != claim.before
    asked = [(claim.after, claim.before, claim.cluster) for claim in found.claims]
    assert len(set(asked)) == len(asked)
    assert len({claim.what for claim in found.claims}) == len(asked)
    assert 1 <= sum(claim.primary for claim in found.claims) <= 3
    assert len({setting.name for setting in found.settings}) == len(found.settings)


def test_settings_of_imbalance_differ_by_what_their_names_say() -> None:
    for (setting, arm), plan in planned(IMBALANCE).items():
        share = float(setting.split("-")[1]) / 100
        assert plan.config.clustering.prompt_shares == {MINORITY: share}
        assert plan.config.estimator.frequency_weight == 0.5 * setting.endswith("weighted")
        assert plan.config.estimator.name == arm
    primary = [claim for claim in IMBALANCE.claims if claim.primary]
    assert {claim.cluster for claim in primary} == {MINORITY}


def test_settings_of_regimes_differ_by_what_their_names_say() -> None:
    for (setting, _), plan in planned(REGIMES).items():
        config = plan.config
        shifts = [reward.shift for reward in config.rewards if reward.shift]
        assert bool(shifts) == setting.startswith("shift")
        for shift in shifts:
            offset = "offset" in setting
            assert (shift.after, shift.scale, shift.offset) == (
                (20, 1.0, -2.0) if offset else (20, 10.0, 0.0)
            )
            # Fifteen steps of warm-up, then down to 0.
            rates = [min(step / 15, (50 - step) / 35) for step in range(51)]
            assert 0.4 < sum(rates[21:]) / sum(rates) < 0.6
        forgetting = setting.rpartition("forgetting-")[2] if "forgetting" in setting else "1"
        if config.estimator.name in ("pgrpo", "auto"):
            assert config.estimator.forgetting == float(forgetting)
        assert [reward.weight for reward in config.rewards] == (
            [10.0, 1.0, 0.1] if setting == "scales" else [1.0]
        )
        assert [reward.name for reward in config.evaluation] == (
            ["choice"] if setting == "scales" else []
        )


@pytest.mark.assets
def test_the_panel_has_the_clusters_that_are_named() -> None:
    with Assembly(load_base(ROOT / "examples" / "electricity.toml")) as parts:
        sizes = {name: cluster["num_users"] for name, cluster in parts.members.about.items()}
        clusters = [str(parts.members.cluster(e.user)) for e in parts.dataset.train]
        assert len(parts.dataset.evaluation) > 1000
    assert list(sizes) == ["0", "1", "2", "3", "4"]
    assert min(sizes, key=lambda name: sizes[name]) == MINORITY
    assert np.mean([cluster == MINORITY for cluster in clusters]) == pytest.approx(0.144, abs=0.001)


def test_whoever_is_held_out_is_judged_alike_in_all_settings(tmp_path: Path) -> None:
    """Tiny policies that do not move get the same, whoever they are trained with, and by which judge."""
    grid = Reproduction(
        name="tiny",
        about=IMBALANCE.about,
        axis=IMBALANCE.axis,
        settings=(
            Setting("base", ("pgrpo",)),
            Setting("share-90", ("pgrpo",), ('clustering.prompt_shares={"2"=0.9}',)),
            Setting(
                "share-2-weighted",
                ("grpo", "pgrpo"),
                ('clustering.prompt_shares={"2"=0.02}', "estimator.frequency_weight=0.5"),
            ),
            Setting("shift", ("pgrpo",), ("rewards.0.shift={after=1,offset=-2.0}",)),
        ),
        claims=(Claim(("share-90", "pgrpo"), ("share-2-weighted", "pgrpo"), "x", cluster="2"),),
    )
    changes = {"run.num_steps": 2, "run.eval_every": 2, "optimizer.learning_rate": 1e-30}
    out = tmp_path / "out"
    base = load_base(write_config(tmp_path, changes))
    reproduce(grid, base, [0, 1], out, shown_on=console(quiet=True))
    rows = json.loads((out / "table.json").read_text("utf-8"))
    assert len(rows) == 10
    assert all(row["clusters"].keys() == {"0", "1", "2"} for row in rows)
    for seed in (0, 1):
        own = [row for row in rows if row["seed"] == seed]
        assert {row["figure"] for row in own} == {own[0]["figure"]}
        assert all(row["clusters"] == own[0]["clusters"] for row in own)
    trained = {
        setting: (out / f"runs/{setting}/pgrpo/seed-0/metrics.jsonl")
        .read_text("utf-8")
        .splitlines()[-1]
        for setting in ("base", "share-90", "shift")
    }
    rewards = {setting: json.loads(line)["reward"] for setting, line in trained.items()}
    assert rewards["shift"] == pytest.approx(rewards["base"] - 2)
    assert rewards["share-90"] != rewards["base"]
    (claim,) = json.loads((out / "claims.json").read_text("utf-8"))
    assert (claim["cluster"], claim["each"]) == ("2", [0.0, 0.0])
