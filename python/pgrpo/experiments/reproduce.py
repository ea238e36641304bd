"""Running a reproduction: train its grid, measure each policy once, and judge its claims by rule.

A policy's figure is its mean reward on all held-out prompts at the last step. It is kept in
`figures.jsonl` under a key of the run's config, and may be taken over from there by another name that
has the same run in its grid. Then the run's checkpoints, by far the most of it, are
deleted: such a run can be looked at, but neither continued nor chatted with.
"""

from __future__ import annotations

import json
import math
import shlex
import shutil
import statistics
from collections import Counter
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
from pgrpo.model.language_model import resolve_precision
from pgrpo.report import Verdict, write_report
from pgrpo.report.reproduction import Page, render, verdict
from pgrpo.report.statistics import paired_difference
from pgrpo.rewards.pairwise import digest
from pgrpo.runs.config import Config, load_config, parse_config
from pgrpo.runs.disk import disk_errors, flush, locked, replace_file
from pgrpo.runs.display import console
from pgrpo.runs.folder import RunFolder
from pgrpo.runs.judgement import Store
from pgrpo.runs.reproduction import (
    ClaimRecord,
    DifferenceRecord,
    FigureRecord,
    RowRecord,
    mean_known,
)
from pgrpo.runs.terminal import printable
from pgrpo.train.build import Assembly
from pgrpo.train.checkpoint import chosen_checkpoint
from pgrpo.train.evaluation import (
    choice_probabilities,
    choice_rewards,
    held_out,
    held_out_groups,
)
from pgrpo.types import ClusterId, FloatArray, Prompt

RUNS = "runs"
"""Folder of the runs within that of the reproduction."""
_WATCHING = frozenset(
    {
        *("eval_every", "eval_prompts", "checkpoint_every", "keep_checkpoints", "keep_best"),
        *("samples_per_step", "trackers", "project"),
    }
)
"""Settings of [run] that do not change what is learned."""


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
        """Of the config, but for what only watches the run: its last policy does not depend on it."""
        tree = resolved_tree(self.config)
        run = {name: value for name, value in tree["run"].items() if name not in _WATCHING}
        return digest({**tree, "run": run})


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


def estimate(planned: Sequence[Plan], out: Path, known: Path | None = None) -> Cost:
    """How much is left to run in a folder, by what finished runs there took.

    A run is expected to take as long for each prompt of its steps as the median of the finished ones of
    its setting did, or where there is none, of all. For `known` see `reproduce`.
    """
    unique = _unique(planned, out)
    figures = {line.key: line for line in _lines(out / "figures.jsonl", known)}
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
    known: Path | None = None,
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
        known: a figures.jsonl of runs that were measured elsewhere; those of the grid are taken over,
            and not run again.
        shown_on: where progress goes, by default standard output.

    Raises:
        ConfigError: a setting does not go with the base, a folder holds a run with other settings, or
            there is no such file as `known`.
        RunFolderError: a line of figures is damaged, or a run is finished, and neither its figure nor
            its checkpoint is there.
    """
    planned = plans(reproduction, base, seeds)
    with locked(out):
        figures = Store(out / "figures.jsonl", FigureRecord)
        unique = _unique(planned, out)
        for line in _lines(known):
            if line.key in unique and line.key not in figures:
                figures.append(line)
        with Assembly(base) as parts:
            cluster_of = parts.members.division.cluster_of
        grid = _Grid(reproduction, base, planned, figures, _by_name(cluster_of), out)
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
            grid.publish()

        # A process that was killed between measuring and deleting, or publishing, left that undone.
        for name, plan in by_folder.items():
            folder = RunFolder(out / RUNS / name)
            if plan.key in figures and folder.is_finished and folder.config() == plan.config:
                _discard_checkpoints(folder)
        if any(plan.key in figures for plan in planned):
            grid.publish()
        run_all(wanted, out / RUNS, ended=ended, shown_on=shown_on)
        _write_pages(planned, unique, out)
        return grid.publish()


@dataclass(frozen=True)
class _Grid:
    """What was asked for, and the figures so far."""

    reproduction: Reproduction
    base: Config
    planned: Sequence[Plan]
    figures: Store[FigureRecord]
    cluster_of: Mapping[str, str]
    """User -> the name of their cluster by the base's own division, the same one for all settings."""
    out: Path

    def publish(self) -> Verdict:
        """Write what follows from the figures."""
        reproduction, out = self.reproduction, self.out
        replace_file(out / "base.toml", resolved_toml(self.base).encode())
        rows = self.rows()
        claims = [self.judged(claim) for claim in reproduction.claims]
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
                for plan in self.planned
                if (found := self.figures.get(plan.key))
            },
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
            if (found := self.figures.get(plan.key))
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
            found = self.figures.get(plan.key)
            if found and plan.cell in of_cell:
                of_cell[plan.cell][plan.seed] = found
        after, before = of_cell[claim.after], of_cell[claim.before]
        pairs = [(after[seed], before[seed]) for seed in after if seed in before]
        # They differ where prompts too long for a setting were left out, or the data changed meanwhile.
        if len({found.prompts for pair in pairs for found in pair}) != 1:
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
        return record.model_copy(update={**vars(difference), "verdict": said, "expected": expected})

    def _of_clusters(self, found: FigureRecord) -> dict[str, float]:
        rewards: dict[str, list[float | None]] = {}
        for user, reward in zip(found.users, found.rewards, strict=True):
            if user in self.cluster_of:
                rewards.setdefault(self.cluster_of[user], []).append(reward)
        means = {name: mean_known(values) for name, values in sorted(rewards.items())}
        return {name: mean for name, mean in means.items() if mean is not None}


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


def _lines(*paths: Path | None) -> list[FigureRecord]:
    """Of all these files of figures.

    Raises:
        ConfigError: there is no such file as the last one.
        RunFolderError: a line is damaged.
    """
    if paths[-1] is not None and not paths[-1].is_file():
        raise ConfigError(
            f"--figures names {paths[-1]}, which is no file; expected a figures.jsonl"
        )
    return [line for path in paths if path for line in Store(path, FigureRecord).values()]


def _by_name(cluster_of: Mapping[str, ClusterId]) -> dict[str, str]:
    return {user: str(cluster) for user, cluster in cluster_of.items()}


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
        examples = held_out(parts.dataset, len(parts.dataset.evaluation))
        note(f"measuring {name} on all {len(examples):,} held-out prompts")
        prompts = [parts.builder.build(example) for example in examples]
        expected: list[FloatArray] = []
        if all(map(_is_labelled, prompts)) and not config.run.eval_samples:
            budget = config.optimizer.token_budget
            shares = choice_probabilities(parts.model, prompts, budget)
            of_choices = choice_rewards(parts.tokenizer, prompts, parts.held_out_scorer)
            likeliest = [int(each.argmax()) for each in shares]
            said = [p.choices[k] for p, k in zip(prompts, likeliest, strict=True) if p.choices]
            rewards = [r[[k]] for r, k in zip(of_choices, likeliest, strict=True)]
            expected = [p @ r for p, r in zip(shares, of_choices, strict=True)]
        else:
            parts.engine.sync(int(checkpoint.state()["policy_version"]))
            groups = held_out_groups(parts.engine, prompts, parts.held_out_scorer, config)
            said = [group.rollouts[0].completion_ids for group in groups]
            rewards = [group.rewards for group in groups]
    return FigureRecord(
        key=key,
        run=name,
        users=[example.user for example in examples],
        prompts=digest([[example.user, example.text] for example in examples]),
        rewards=[_mean(each) for each in rewards],
        # To five digits, for files of many runs are kept.
        expected=[None if mean is None else round(mean, 5) for mean in map(_mean, expected)],
        commonest=max(Counter(said).values()) / len(said),
        steps=checkpoint.step,
        rollouts=sum(record.num_rollouts or 0 for record in folder.metrics),
        seconds=info.seconds,
        measuring_s=perf_counter() - began,
        curve={
            record.step: record.reward for record in folder.evaluations if record.reward is not None
        },
        versions=info.versions,
        precision=resolve_precision(config.model.precision),
    )


def _is_labelled(prompt: Prompt) -> bool:
    """Whether its completion is one of some single tokens."""
    return prompt.choices is not None and all(len(choice) == 1 for choice in prompt.choices)


def _mean(values: FloatArray) -> float | None:
    """Of the finite ones; None where there is none."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else None


def _discard_checkpoints(folder: RunFolder) -> None:
    if folder.checkpoints.exists():
        with disk_errors(f"{folder.checkpoints} cannot be deleted"):
            shutil.rmtree(folder.checkpoints)


def _num_prompts(config: Config) -> int:
    return config.run.num_steps * config.run.prompts_per_step


def _values(rewards: Sequence[float | None]) -> FloatArray:
    return np.array([math.nan if reward is None else reward for reward in rewards])
