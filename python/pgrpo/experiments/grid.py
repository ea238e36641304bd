"""What follows from the figures of a reproduction: rows, claims judged by rule, and the page."""

from __future__ import annotations

import json
import math
import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from pgrpo.config.toml import Tree, flat, resolved_toml, resolved_tree
from pgrpo.experiments.compare import arm_folder
from pgrpo.experiments.design import Cell, Claim, HeldOut, Reproduction
from pgrpo.report import Verdict
from pgrpo.report.pairs import rates_over_seeds
from pgrpo.report.reproduction import Page, render, verdict
from pgrpo.report.statistics import paired_difference
from pgrpo.rewards.pairwise import digest
from pgrpo.runs.config import Config
from pgrpo.runs.disk import replace_file
from pgrpo.runs.judgement import PairRecord, Store, Winner
from pgrpo.runs.reproduction import (
    ClaimRecord,
    DifferenceRecord,
    FigureRecord,
    RowRecord,
    mean_known,
)
from pgrpo.types import FloatArray

_WATCHING = frozenset(
    {
        *("eval_every", "eval_prompts", "checkpoint_every", "keep_checkpoints", "keep_best"),
        *("samples_per_step", "trackers", "project", "ability"),
    }
)
"""Settings of [run] that do not change what is learned."""


@dataclass(frozen=True)
class Plan:
    """One cell of the grid with one seed."""

    setting: str
    arm: str
    config: Config
    measured_with: HeldOut

    @property
    def cell(self) -> Cell:
        """Setting and arm."""
        return self.setting, self.arm

    @property
    def seed(self) -> int:
        """Of the run."""
        return self.config.run.seed

    @property
    def folder(self) -> str:
        """`SETTING/ARM/seed-K`."""
        return f"{self.setting}/{arm_folder(self.arm)}/seed-{self.seed}"

    @cached_property
    def run_key(self) -> str:
        """Of what the config sets, but for what only watches the run: no last policy depends on
        it. Settings at their defaults are no part of it, so that a run stays known when a later version
        has settings that it had not."""
        return digest(_without_watching(resolved_tree(self.config, defaults=False)))

    @cached_property
    def settings(self) -> dict[str, str]:
        """Of the run, those at their defaults among them, by their dotted names."""
        return dict(flat(_without_watching(resolved_tree(self.config))))

    @cached_property
    def key(self) -> str:
        """Of the figure: a run's, unless the run is measured otherwise than it was trained."""
        if self.measured_with == HeldOut():
            return self.run_key
        stated = {name: x for name, x in asdict(self.measured_with).items() if x is not None}
        return digest({"run": self.run_key, **stated})

    def figure(self, find: Callable[[str], FigureRecord | None]) -> FigureRecord | None:
        """What was measured of it, of those that are found by key; None where nothing was, or a default
        has changed since."""
        found = find(self.key)
        if found is None:
            return None
        settings = self.settings
        both = found.settings.keys() & settings.keys()
        return found if all(found.settings[name] == settings[name] for name in both) else None


def _without_watching(tree: Tree) -> Tree:
    run = {name: value for name, value in tree.get("run", {}).items() if name not in _WATCHING}
    return {**tree, "run": run}


@dataclass(frozen=True)
class Grid:
    """What was asked for, and the figures so far."""

    reproduction: Reproduction
    base: Config
    planned: Sequence[Plan]
    figures: Store[FigureRecord]
    cluster_of: Mapping[str, str]
    """User -> the name of their cluster by the base's own division, the same one for all settings."""
    rules: Mapping[str, Mapping[str, float]]
    """Setting -> what simple rules get on the same prompts, by their names."""
    out: Path

    def publish(self) -> Verdict:
        """Write what follows from the figures."""
        reproduction, out = self.reproduction, self.out
        replace_file(out / "base.toml", resolved_toml(self.base).encode())
        rows = self.rows()
        claims = [self.judged(claim) for claim in reproduction.claims]
        for name, content in (
            ("table.json", [row.model_dump() for row in rows]),
            ("claims.json", [claim.model_dump() for claim in claims]),
            ("rules.json", self.rules),
        ):
            replace_file(out / name, f"{json.dumps(content, indent=1)}\n".encode())
        page = Page(
            name=reproduction.name,
            about=reproduction.about,
            axis=reproduction.axis,
            rows=rows,
            claims=claims,
            records={
                (plan.setting, plan.arm, plan.seed): found
                for plan in self.planned
                if (found := plan.figure(self.figures.get))
            },
            rules=self.rules,
            num_planned=len(self.planned),
            commands=commands(self.planned, reproduction, out),
        )
        replace_file(out / "report.html", render(page).encode())
        return verdict(page)

    def rows(self) -> list[RowRecord]:
        """Of what was measured, and of arms without a signal."""
        rows = [
            RowRecord(
                setting=plan.setting,
                arm=plan.arm,
                seed=plan.seed,
                figure=found.figure,
                expected=mean_known(found.expected),
                clusters=self._of_clusters(found),
                commonest=found.commonest,
                steps=found.steps,
                rollouts=found.rollouts,
                minutes=found.seconds / 60,
            )
            for plan in self.planned
            if (found := plan.figure(self.figures.get))
        ]
        seeds = dict.fromkeys(row.seed for row in rows)
        return rows + [
            RowRecord(setting=setting.name, arm=arm, seed=seed)
            for seed in seeds
            for setting in self.reproduction.settings
            for arm in setting.no_signal
        ]

    def judged(self, claim: Claim) -> ClaimRecord:
        """A claim with the difference that was found, over the seeds that both cells have."""
        record = ClaimRecord(
            what=claim.what,
            after=list(claim.after),
            before=list(claim.before),
            primary=claim.primary,
            cluster=claim.cluster,
            margin=claim.margin,
        )
        of_cell: dict[Cell, dict[int, FigureRecord]] = {claim.after: {}, claim.before: {}}
        for plan in self.planned:
            if plan.cell in of_cell and (found := plan.figure(self.figures.get)):
                of_cell[plan.cell][plan.seed] = found
        after, before = of_cell[claim.after], of_cell[claim.before]
        if claim.after == claim.before:
            # Disjoint pairs: going round all seeds, their differences would sum to zero.
            each_seed = list(after.values())
            pairs = list(zip(each_seed[::2], each_seed[1::2], strict=False))
        else:
            pairs = [(after[seed], before[seed]) for seed in after if seed in before]
        # Prompts differ where some too long for a setting were left out, or the data changed meanwhile;
        # and arithmetic differs between machines, by more than arms do.
        alike = {(found.prompts, found.precision) for pair in pairs for found in pair}
        if len(alike) != 1:
            return record
        asked = [
            place
            for place, user in enumerate(pairs[0][0].users)
            if claim.cluster is None or self.cluster_of.get(user) == claim.cluster
        ]
        people = [pairs[0][0].users[place] for place in asked]
        change = np.array([_values(a.rewards) - _values(b.rewards) for a, b in pairs])[:, asked]
        if not len(asked) or not np.isfinite(change).any(1).all():
            return record
        each = [float(np.nanmean(row)) for row in change]
        record = record.model_copy(update={"each": each, "mean": statistics.fmean(each)})
        difference = paired_difference(change, people)
        if difference is None:
            return record
        if claim.margin is None:
            said = difference.outcome
        else:
            said = "reached" if difference.reaches(claim.margin) else "not shown"
        expected = None
        if all(found.expected for pair in pairs for found in pair):
            change = np.array([_values(a.expected) - _values(b.expected) for a, b in pairs])[
                :, asked
            ]
            exact = paired_difference(change, people)
            expected = exact and DifferenceRecord(**vars(exact))
        record = record.model_copy(
            update={**vars(difference), "verdict": said, "expected": expected}
        )
        is_control = claim.after == claim.before
        if claim.margin is None and (claim.primary or is_control):
            return self._with_wins(record, pairs)
        return record

    def _with_wins(
        self, claim: ClaimRecord, pairs: Sequence[tuple[FigureRecord, FigureRecord]]
    ) -> ClaimRecord:
        """A claim with how often which answer has the higher reward, of all whose prompts it is about,
        and of each cluster."""
        matches = [
            [
                PairRecord(
                    prompt="",
                    user=user,
                    cluster=self.cluster_of.get(user, ""),
                    a="",
                    b="",
                    outcome=_outcome(a, b),
                )
                for user, a, b in zip(after.users, after.rewards, before.rewards, strict=True)
                if claim.cluster is None or self.cluster_of.get(user) == claim.cluster
            ]
            for after, before in pairs
        ]
        of_clusters = {
            name: rates_over_seeds([[p for p in match if p.cluster == name] for match in matches])
            for name in sorted({pair.cluster for pair in matches[0]} - {""})
        }
        update = {"wins": rates_over_seeds(matches), "wins_of_clusters": of_clusters}
        return claim.model_copy(update=update)

    def _of_clusters(self, found: FigureRecord) -> dict[str, float]:
        rewards: dict[str, list[float | None]] = {}
        for user, reward in zip(found.users, found.rewards, strict=True):
            if user in self.cluster_of:
                rewards.setdefault(self.cluster_of[user], []).append(reward)
        means = {name: mean_known(values) for name, values in sorted(rewards.items())}
        return {name: mean for name, mean in means.items() if mean is not None}


def commands(planned: Sequence[Plan], reproduction: Reproduction, out: Path) -> list[str]:
    """What trains the same runs without this module, a command for each setting that trains any."""
    seeds = ",".join(dict.fromkeys(str(plan.seed) for plan in planned))
    trained = {
        (setting.arms, setting.overrides): setting for setting in reversed(reproduction.settings)
    }
    return [
        shlex.join(
            [
                *("pgrpo", "compare", str(out / "base.toml")),
                *("--estimators", ",".join(setting.arms), "--seeds", seeds),
                *(word for override in setting.overrides for word in ("--set", override)),
                *("--out", str(out / "again" / setting.name)),
            ]
        )
        for setting in reversed(trained.values())
    ]


def _outcome(a: float | None, b: float | None) -> Winner | None:
    if a is None or b is None:
        return None
    return "tie" if a == b else "a" if a > b else "b"


def _values(rewards: Sequence[float | None]) -> FloatArray:
    return np.array([math.nan if reward is None else reward for reward in rewards])
