"""The grids of comparators and rates: what their arms are, and that rates are chosen apart."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import write_config

from pgrpo.experiments.comparators import COMPARATORS, RATE_GRID, RATES, TRIED
from pgrpo.experiments.design import NO_CURVE, Reproduction
from pgrpo.experiments.grid import Plan
from pgrpo.experiments.reproduce import load_base, plans, reproduce, restricted
from pgrpo.runs.display import console
from pgrpo.train.build import Assembly

ELECTRICITY = Path(__file__).parents[1] / "examples" / "electricity.toml"


def planned(found: Reproduction) -> list[Plan]:
    """With one seed."""
    return plans(found, load_base(ELECTRICITY), [0])


def rule(plan: Plan) -> str:
    """The arm without its learning rate."""
    return plan.arm.partition("@")[0]


def test_every_arm_is_tried_at_every_rate_and_nothing_else_differs() -> None:
    tried = planned(RATE_GRID)
    assert len({plan.key for plan in tried}) == len(tried)
    for plan in planned(COMPARATORS):
        of_rates = [
            found
            for found in tried
            if found.setting.startswith(f"{plan.setting}-") and found.arm == rule(plan)
        ]
        assert [found.config.optimizer.learning_rate for found in of_rates] == list(TRIED)
        for found in of_rates:
            changed = {"data.unused_choices": "3"}
            changed["optimizer.learning_rate"] = found.settings["optimizer.learning_rate"]
            assert found.settings == plan.settings | changed


def test_comparators_take_the_rates_that_were_found() -> None:
    cells = {(plan.setting, rule(plan)): plan for plan in planned(COMPARATORS)}
    assert RATES.keys() <= cells.keys()
    usual = load_base(ELECTRICITY).optimizer.learning_rate
    assert usual in TRIED
    for cell, plan in cells.items():
        assert plan.config.optimizer.learning_rate == RATES.get(cell, usual)
        assert plan.config.optimizer.learning_rate in TRIED


def test_arms_are_what_their_families_say() -> None:
    for plan in planned(COMPARATORS):
        config = plan.config
        assert ("{cluster}" in (config.model.prompt_template or "")) == (plan.setting == "named")
        alone = plan.setting == "single-stream"
        assert (config.estimator.order == "normalize_then_update") == alone
        assert (config.estimator.history == "user") == alone
        assert (config.loss.objective == "policy_gradient") == (rule(plan) not in ("dpo", "sft"))
    shared = {plan.key for plan in planned(RATE_GRID)} & {p.key for p in planned(COMPARATORS)}
    assert not shared


@pytest.mark.assets
def test_rates_are_judged_by_choices_that_comparators_do_not_ask_for() -> None:
    with (
        Assembly(planned(RATE_GRID)[0].config) as tried,
        Assembly(planned(COMPARATORS)[0].config) as asked,
    ):
        assert len(tried.dataset.evaluation) > 1000
        last = {(e.user, e.text) for e in asked.dataset.evaluation}
        assert not last & {(e.user, e.text) for e in tried.dataset.evaluation}
        assert not last & {(e.user, e.text) for e in tried.dataset.train}


def test_the_arms_learn_and_are_compared(tmp_path: Path) -> None:
    """On personas and a tiny model, whose tokens do not tell clusters apart: tests/test_objectives.py has
    the arms that are told the cluster."""
    grid = restricted(COMPARATORS, ["base", "single-stream"], [])
    settings = tuple(
        replace(setting, overrides=tuple(x for x in setting.overrides if x not in NO_CURVE))
        for setting in grid.settings
    )
    out = tmp_path / "out"
    base = load_base(write_config(tmp_path, {"run.num_steps": 2, "run.eval_every": 2}))
    reproduce(replace(grid, settings=settings), base, [0, 1], out, shown_on=console(quiet=True))
    rows = json.loads((out / "table.json").read_text("utf-8"))
    assert len(rows) == 16
    assert all(row["figure"] is not None for row in rows)
    claims = json.loads((out / "claims.json").read_text("utf-8"))
    assert len(claims) == 10
    assert {claim["verdict"] for claim in claims} <= {"better", "worse", "level"}


def test_claims_of_rates_are_about_one_arm_each() -> None:
    family_of = {
        f"{setting.name}-{rate:.0e}": setting.name
        for setting in COMPARATORS.settings
        for rate in TRIED
    }
    for claim in RATE_GRID.claims:
        (after, arm), (before, other) = claim.after, claim.before
        assert (family_of[after], arm) == (family_of[before], other)
        assert after != before
