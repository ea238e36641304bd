"""Running a reproduction: train its grid, measure each policy once, and judge its claims by rule.

A policy's figure is its mean reward on all held-out prompts at the last step. It is kept in
`figures.jsonl` under a key of the run's config. Then the run's checkpoints, by far the most of it, are
deleted: such a run can be looked at, but neither continued nor chatted with.
"""

from __future__ import annotations

import json
import math
import shlex
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

import numpy as np
from rich.console import Console

from pgrpo.config.checks import suggest
from pgrpo.config.toml import apply_override, resolved_toml, resolved_tree
from pgrpo.errors import ConfigError, RunFolderError
from pgrpo.experiments.compare import arm_config, arm_folder, run_all
from pgrpo.experiments.reproductions import Cell, Claim, Reproduction, Setting
from pgrpo.report import Verdict, write_report
from pgrpo.report.reproduction import Page, render, verdict
from pgrpo.report.statistics import paired_difference
from pgrpo.rewards.pairwise import digest
from pgrpo.runs.config import Config, load_config, parse_config
from pgrpo.runs.disk import disk_errors, flush, locked, replace_file
from pgrpo.runs.display import console
from pgrpo.runs.folder import RunFolder
from pgrpo.runs.judgement import Store
from pgrpo.runs.reproduction import ClaimRecord, FigureRecord, RowRecord
from pgrpo.runs.terminal import printable
from pgrpo.train.build import Assembly
from pgrpo.train.checkpoint import chosen_checkpoint
from pgrpo.train.evaluation import held_out, held_out_groups
from pgrpo.types import FloatArray

RUNS = "runs"
"""Folder of the runs within that of the reproduction."""


@dataclass(frozen=True)
class Plan:
    """One cell of the grid with one seed."""

    setting: str
    arm: str
    config: Config

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

    @property
    def key(self) -> str:
        """Of the config."""
        return digest(resolved_tree(self.config))


@dataclass(frozen=True)
class Cost:
    """What is still to be run."""

    num_runs: int
    """Of the whole grid; what comes to the same counts once."""
    num_measured: int
    minutes: float | None
    """That the others are expected to take; None while nothing tells."""


def load_base(path: Path) -> Config:
    """A config that settings change: the file's, with `pgrpo` as its estimator, for what a setting says
    may have no effect under the file's own.

    Raises:
        ConfigError: it is no config.
    """
    return arm_config(load_config(path), "pgrpo", 0)


def plans(reproduction: Reproduction, base: Config, seeds: Sequence[int]) -> list[Plan]:
    """All runs, seeds outermost, so that every stop leaves whole pairs.

    Raises:
        ConfigError: a setting or an arm does not go with the base.
    """

    def config(setting: Setting) -> Config:
        tree = resolved_tree(base)
        for override in setting.overrides:
            apply_override(tree, override)
        return parse_config(tree, source=f"setting {setting.name!r}")

    configs = {setting.name: config(setting) for setting in reproduction.settings}
    return [
        Plan(setting.name, arm, arm_config(configs[setting.name], arm, seed))
        for seed in dict.fromkeys(seeds)
        for setting in reproduction.settings
        for arm in setting.arms
    ]


def restricted(
    reproduction: Reproduction, settings: Sequence[str], arms: Sequence[str]
) -> Reproduction:
    """Only some settings and arms, and the claims about these; none named stands for all.

    Raises:
        ConfigError: there is no such setting or arm, or nothing is left.
    """
    for option, given, known in (
        ("--settings", settings, [s.name for s in reproduction.settings]),
        ("--arms", arms, [arm for s in reproduction.settings for arm in s.arms]),
    ):
        for name in given:
            if name not in known:
                raise ConfigError(
                    f"{option} names {name!r}, which {reproduction.name} does not have"
                    f"{suggest(name, list(dict.fromkeys(known)))}"
                )
    kept = [
        replace(
            setting,
            arms=tuple(arm for arm in setting.arms if not arms or arm in arms),
            no_signal=tuple(arm for arm in setting.no_signal if not arms or arm in arms),
        )
        for setting in reproduction.settings
        if not settings or setting.name in settings
    ]
    kept = [setting for setting in kept if setting.arms]
    if not kept:
        raise ConfigError(
            f"none of the settings that --settings names has an arm that --arms names; "
            f"{reproduction.name} has "
            + "; ".join(f"{each.name}: {', '.join(each.arms)}" for each in reproduction.settings)
        )
    cells = {(setting.name, arm) for setting in kept for arm in setting.arms}
    claims = [claim for claim in reproduction.claims if {claim.after, claim.before} <= cells]
    return replace(reproduction, settings=tuple(kept), claims=tuple(claims))


def estimate(planned: Sequence[Plan], out: Path) -> Cost:
    """How much is left to run in a folder, by what finished runs there took.

    A run is expected to take as long for each prompt of its steps as the median of the finished ones of
    its setting did, or where there is none, of all.
    """
    unique = _unique(planned, out)
    figures = Store(out / "figures.jsonl", FigureRecord)
    took: dict[str, list[float]] = {}
    for key, plan in unique.items():
        if found := figures.get(key):
            took.setdefault(plan.setting, []).append(
                (found.seconds + found.measuring_s) / _num_prompts(plan.config)
            )
    everywhere = [seconds for each in took.values() for seconds in each]
    left = [plan for key, plan in unique.items() if key not in figures]
    minutes = None
    if everywhere or not left:
        seconds = [
            statistics.median(took.get(plan.setting, everywhere)) * _num_prompts(plan.config)
            for plan in left
        ]
        minutes = sum(seconds) / 60
    return Cost(len(unique), len(unique) - len(left), minutes)


def reproduce(
    reproduction: Reproduction,
    base: Config,
    seeds: Sequence[int],
    out: Path,
    *,
    shown_on: Console | None = None,
) -> Verdict:
    """Run what is missing of a reproduction, and write its tables and page after every run.

    `out/runs/SETTING/ARM/seed-K` are the runs and, at the end, `out/runs/SETTING/report.html` the pages
    of each setting's; `out/figures.jsonl` has what each policy gets on all held-out prompts,
    `out/table.json` the figures of the grid, `out/claims.json` and `out/report.html` what follows from
    them. A run that is measured already is not wanted any more: its folder may be gone. The checkpoints
    of measured runs are deleted.

    Args:
        reproduction: what to run.
        base: that its settings change (`load_base`).
        seeds: of every cell.
        out: folder.
        shown_on: where progress goes, by default standard output.

    Raises:
        ConfigError: a setting does not go with the base, or a folder holds a run with other settings.
        RunFolderError: a run is finished, and neither its figure nor its checkpoint is there.
    """
    planned = plans(reproduction, base, seeds)
    with locked(out):
        figures = Store(out / "figures.jsonl", FigureRecord)
        unique = _unique(planned, out)
        by_folder = {plan.folder: plan for plan in unique.values()}
        wanted = {name: plan.config for name, plan in by_folder.items() if plan.key not in figures}

        shown = shown_on or console()

        def note(text: str) -> None:
            shown.print(printable(f"[{reproduction.name}] {text}"))

        def ended(name: str, folder: RunFolder) -> None:
            key = by_folder[name].key
            if not folder.checkpoints.exists():
                raise RunFolderError(
                    f"the run in {folder.path} is finished, and {out / 'figures.jsonl'} does not have "
                    "what its last policy gets, whose checkpoint is gone; remove the folder, and the "
                    "same command runs it again"
                )
            figures.append(_measure(key, name, folder, note))
            # Before what it was measured of is gone.
            flush(out / "figures.jsonl")
            _discard_checkpoints(folder)
            _publish(reproduction, base, planned, figures, out)

        # A process that was killed between measuring and deleting, or publishing, left that undone.
        for name, plan in by_folder.items():
            folder = RunFolder(out / RUNS / name)
            if plan.key in figures and folder.is_finished and folder.config() == plan.config:
                _discard_checkpoints(folder)
        if any(plan.key in figures for plan in planned):
            _publish(reproduction, base, planned, figures, out)
        run_all(wanted, out / RUNS, ended=ended, shown_on=shown_on)
        _write_pages(planned, unique, out)
        return _publish(reproduction, base, planned, figures, out)


def table(
    reproduction: Reproduction, planned: Sequence[Plan], figures: Store[FigureRecord]
) -> list[RowRecord]:
    """The rows of what was measured so far, and of arms without a signal."""
    rows = [
        RowRecord(
            setting=plan.setting,
            arm=plan.arm,
            seed=plan.seed,
            figure=found.figure,
            steps=found.steps,
            rollouts=found.rollouts,
            minutes=found.seconds / 60,
        )
        for plan in planned
        if (found := figures.get(plan.key))
    ]
    seeds = dict.fromkeys(row.seed for row in rows)
    return rows + [
        RowRecord(setting=setting.name, arm=arm, seed=seed)
        for seed in seeds
        for setting in reproduction.settings
        for arm in setting.no_signal
    ]


def judged(claim: Claim, planned: Sequence[Plan], figures: Store[FigureRecord]) -> ClaimRecord:
    """A claim with the difference that was found, over the seeds that both cells have."""
    record = ClaimRecord(
        what=claim.what,
        after=list(claim.after),
        before=list(claim.before),
        primary=claim.primary,
        margin=claim.margin,
    )
    of_cell: dict[Cell, dict[int, FigureRecord]] = {claim.after: {}, claim.before: {}}
    for plan in planned:
        found = figures.get(plan.key)
        if found and plan.cell in of_cell:
            of_cell[plan.cell][plan.seed] = found
    after, before = of_cell[claim.after], of_cell[claim.before]
    both = [seed for seed in after if seed in before]
    if not both:
        return record
    asked, people = after[both[0]].prompts, after[both[0]].users
    if any(cell[seed].prompts != asked for cell in (after, before) for seed in both):
        # As where prompts too long for a setting were left out, or the data changed meanwhile.
        return record
    change = np.array(
        [_values(after[seed].rewards) - _values(before[seed].rewards) for seed in both]
    )
    each = [float(np.nanmean(row)) for row in change if np.isfinite(row).any()]
    if not each:
        return record
    record = record.model_copy(update={"each": each, "mean": statistics.fmean(each)})
    difference = paired_difference(change, people)
    if difference is None:
        return record
    if claim.margin is None:
        said = difference.outcome
    else:
        said = "reached" if difference.reaches(claim.margin) else "not shown"
    return record.model_copy(update={**vars(difference), "verdict": said})


def commands(planned: Sequence[Plan], reproduction: Reproduction, out: Path) -> list[str]:
    """What trains the same runs without this module, a command for each setting."""
    seeds = ",".join(dict.fromkeys(str(plan.seed) for plan in planned))
    return [
        shlex.join(
            [
                *("pgrpo", "compare", str(out / "base.toml")),
                *("--estimators", ",".join(setting.arms), "--seeds", seeds),
                *(word for override in setting.overrides for word in ("--set", override)),
                *("--out", str(out / "again" / setting.name)),
            ]
        )
        for setting in reproduction.settings
    ]


def _unique(planned: Sequence[Plan], out: Path) -> dict[str, Plan]:
    """Key -> the plan whose folder is the run's: of those that come to the same the first that a run
    was begun for, else the first."""
    found: dict[str, list[Plan]] = {}
    for plan in planned:
        found.setdefault(plan.key, []).append(plan)
    return {
        key: next((p for p in same if RunFolder(out / RUNS / p.folder).holds_run), same[0])
        for key, same in found.items()
    }


def _publish(
    reproduction: Reproduction,
    base: Config,
    planned: Sequence[Plan],
    figures: Store[FigureRecord],
    out: Path,
) -> Verdict:
    """Write what follows from the figures so far."""
    replace_file(out / "base.toml", resolved_toml(base).encode())
    rows = table(reproduction, planned, figures)
    claims = [judged(claim, planned, figures) for claim in reproduction.claims]
    for name, records in (("table.json", rows), ("claims.json", claims)):
        lines = [record.model_dump() for record in records]
        replace_file(out / name, f"{json.dumps(lines, indent=1)}\n".encode())
    page = Page(
        name=reproduction.name,
        about=reproduction.about,
        axis=reproduction.axis,
        rows=rows,
        claims=claims,
        records={
            (plan.setting, plan.arm, plan.seed): found
            for plan in planned
            if (found := figures.get(plan.key))
        },
        num_planned=len(planned),
        commands=commands(planned, reproduction, out),
    )
    replace_file(out / "report.html", render(page).encode())
    return verdict(page)


def _write_pages(planned: Sequence[Plan], unique: Mapping[str, Plan], out: Path) -> None:
    """The page of each setting's runs, of those whose folders are there."""
    folders: dict[str, list[Path]] = {}
    for plan in planned:
        folder = RunFolder(out / RUNS / unique[plan.key].folder)
        if folder.is_finished:
            folders.setdefault(plan.setting, []).append(folder.path)
    for setting, found in folders.items():
        write_report(found, out / RUNS / setting / "report.html")


def _measure(key: str, name: str, folder: RunFolder, note: Callable[[str], None]) -> FigureRecord:
    """What the last checkpoint of a run gets on all held-out prompts."""
    began = perf_counter()
    config, info = folder.config(), folder.info()
    checkpoint = chosen_checkpoint(folder, best=False)
    with Assembly(config, checkpoint, note) as parts:
        parts.engine.sync(int(checkpoint.state()["policy_version"]))
        examples = held_out(parts.dataset, len(parts.dataset.evaluation))
        note(f"measuring {name} on all {len(examples):,} held-out prompts")
        prompts = [parts.builder.build(example) for example in examples]
        groups = held_out_groups(parts.engine, prompts, parts.held_out_scorer, config)
    known = [group.rewards[np.isfinite(group.rewards)] for group in groups]
    return FigureRecord(
        key=key,
        run=name,
        users=[example.user for example in examples],
        prompts=digest([[example.user, example.text] for example in examples]),
        rewards=[float(rewards.mean()) if len(rewards) else None for rewards in known],
        steps=checkpoint.step,
        rollouts=sum(record.num_rollouts or 0 for record in folder.metrics),
        seconds=info.seconds,
        measuring_s=perf_counter() - began,
        curve={
            record.step: record.reward for record in folder.evaluations if record.reward is not None
        },
        versions=info.versions,
    )


def _discard_checkpoints(folder: RunFolder) -> None:
    if folder.checkpoints.exists():
        with disk_errors(f"{folder.checkpoints} cannot be deleted"):
            shutil.rmtree(folder.checkpoints)


def _num_prompts(config: Config) -> int:
    return config.run.num_steps * config.run.prompts_per_step


def _values(rewards: Sequence[float | None]) -> FloatArray:
    return np.array([math.nan if reward is None else reward for reward in rewards])
