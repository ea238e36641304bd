"""Running a reproduction: train its grid, measure each policy once, and judge its claims by rule.

A policy's figure is its mean reward on all held-out prompts at the last step. It is kept in
`figures.jsonl` under a key of the run's config, and may be taken over from there by another name that
has the same run in its grid. Then the run's checkpoints, by far the most of it, are
deleted: such a run can be looked at, but neither continued nor chatted with.
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from pgrpo.config.checks import suggest
from pgrpo.config.toml import apply_override, resolved_tree
from pgrpo.errors import ConfigError, RunFolderError
from pgrpo.experiments.compare import arm_config, run_all
from pgrpo.experiments.design import Reproduction, Setting
from pgrpo.experiments.grid import Grid, Plan
from pgrpo.experiments.measure import measure, rules
from pgrpo.report import Verdict, write_report
from pgrpo.rewards.pairwise import digest
from pgrpo.runs.config import Config, load_config, parse_config
from pgrpo.runs.disk import disk_errors, flush, locked
from pgrpo.runs.display import console
from pgrpo.runs.folder import RunFolder
from pgrpo.runs.judgement import Store
from pgrpo.runs.records import AbilityRecord, RunInfo
from pgrpo.runs.reproduction import (
    FigureRecord,
)
from pgrpo.runs.terminal import printable
from pgrpo.train.build import Assembly
from pgrpo.train.evaluation import data_with_candidates

RUNS = "runs"
"""Folder of the runs within that of the reproduction."""


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
    for setting in reproduction.settings:
        if setting.measured_with.candidates is not None:
            data_with_candidates(configs[setting.name].data, setting.measured_with.candidates)
    return [
        Plan(setting.name, arm, arm_config(configs[setting.name], arm, seed), setting.measured_with)
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
    for setting in kept:
        for other in reproduction.settings:
            same_runs = setting.overrides == other.overrides
            measured = setting.measured_with, other.measured_with
            if settings and other.name not in settings and same_runs and len(set(measured)) > 1:
                # The checkpoints that the other one needs would be deleted.
                raise ConfigError(
                    f"--settings names {setting.name!r} and not {other.name!r}, which measures the "
                    "same runs; expected both"
                )
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
    runs = _runs(planned, out)
    figures = _lines(out / "figures.jsonl", known)
    took: dict[str, list[float]] = {}
    left: list[Plan] = []
    for same in runs.values():
        plan = same[0]
        measured = {each.key: line for each in same if (line := each.figure(figures.get))}
        if any(each.key not in measured for each in same):
            left.append(plan)
        else:
            lines = list(measured.values())
            seconds = lines[0].seconds + sum(line.measuring_s for line in lines)
            took.setdefault(plan.setting, []).append(seconds / _num_prompts(plan.config))
    everywhere = [seconds for each in took.values() for seconds in each]
    minutes = None
    if everywhere or not left:
        expected = [
            statistics.median(took.get(plan.setting, everywhere)) * _num_prompts(plan.config)
            for plan in left
        ]
        minutes = sum(expected) / 60
    return Cost(len(runs), len(runs) - len(left), minutes)


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
    of each setting's; `out/figures.jsonl` has what each policy gets on held-out prompts,
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
        elsewhere = _lines(known)
        for plan in planned:
            if not plan.figure(figures.get) and (line := plan.figure(elsewhere.get)):
                figures.append(line)
        with Assembly(base) as parts:
            cluster_of = {u: str(c) for u, c in parts.members.division.cluster_of.items()}
        grid = Grid(reproduction, base, planned, figures, cluster_of, _rules(planned, base), out)
        runs = {same[0].folder: same for same in _runs(planned, out).values()}

        def missing(name: str) -> set[str]:
            return {plan.key for plan in runs[name] if not plan.figure(figures.get)}

        shown = shown_on or console()

        def note(text: str) -> None:
            shown.print(printable(f"[{reproduction.name}] {text}"))

        def ended(name: str, folder: RunFolder) -> None:
            if not folder.checkpoints.exists():
                raise RunFolderError(
                    f"the run in {folder.path} is finished, and {out / 'figures.jsonl'} does not have "
                    "what its last policy gets, whose checkpoint is gone; remove the folder, and the "
                    "same command runs it again"
                )
            plans_of_run = runs[name]
            before = _ability_before(plans_of_run[0].settings, folder.info(), figures)
            for line in measure(folder, plans_of_run, missing(name), before, note):
                figures.append(line)
            # Before what it was measured of is gone.
            flush(out / "figures.jsonl")
            _discard_checkpoints(folder)
            grid.publish()

        # A process that was killed between measuring and deleting, or publishing, left that undone.
        for name, same in runs.items():
            folder = RunFolder(out / RUNS / name)
            done = not missing(name) and folder.is_finished
            if done and folder.config() == same[0].config:
                _discard_checkpoints(folder)
        if any(plan.figure(figures.get) for plan in planned):
            grid.publish()
        wanted = {name: same[0].config for name, same in runs.items() if missing(name)}
        run_all(wanted, out / RUNS, ended=ended, shown_on=shown_on)
        _write_pages(planned, runs, out)
        return grid.publish()


def _runs(planned: Sequence[Plan], out: Path) -> dict[str, list[Plan]]:
    """Key of a run -> the plans that come to it, first the one whose folder is the run's: that which it
    was begun in, if there is one."""
    found: dict[str, list[Plan]] = {}
    for plan in planned:
        found.setdefault(plan.run_key, []).append(plan)
    return {
        key: sorted(same, key=lambda plan: not RunFolder(out / RUNS / plan.folder).holds_run)
        for key, same in found.items()
    }


def _rules(planned: Sequence[Plan], base: Config) -> dict[str, dict[str, float]]:
    """Setting -> mean reward of simple rules on its held-out prompts; none where choices have no known
    rewards. Rules of a cluster have those of the base, unless a setting has other data."""

    def asked(config: Config) -> str:
        scored_by = config.evaluation or config.rewards
        return digest([section.model_dump_json() for section in (config.data, *scored_by)])

    settings = {plan.setting: plan for plan in planned}
    by_data = {asked(plan.config): plan.config for plan in settings.values()}
    by_data |= {asked(base): base}
    found: dict[str, dict[str, float]] = {}
    for data, config in by_data.items():
        same = {s: p.measured_with for s, p in settings.items() if asked(p.config) == data}
        if same:
            of_held = rules(config, set(same.values()))
            found |= {s: of_held[held] for s, held in same.items() if held in of_held}
    return found


def _ability_before(
    settings: Mapping[str, str], info: RunInfo, figures: Store[FigureRecord]
) -> AbilityRecord | None:
    """General ability of the model that a run with these settings begins with, where another run that
    began with it has told, in the same precision and of the same versions. Weights of the tiny model
    hang on the seed."""

    def model(found: Mapping[str, str]) -> dict[str, str]:
        own = {name: value for name, value in found.items() if name.startswith("model.")}
        return own | ({"run.seed": found["run.seed"]} if found["model.name"] == "tiny" else {})

    for line in figures.values():
        alike = (line.precision, line.versions) == (info.precision, info.versions)
        if line.ability and alike and model(line.settings) == model(settings):
            return line.ability[0]
    return None


def _lines(*paths: Path | None) -> dict[str, FigureRecord]:
    """Of all these files of figures, by their keys.

    Raises:
        ConfigError: there is no such file as the last one.
        RunFolderError: a line is damaged.
    """
    if paths[-1] is not None and not paths[-1].is_file():
        raise ConfigError(
            f"--figures names {paths[-1]}, which is no file; expected a figures.jsonl"
        )
    lines = [line for path in paths if path for line in Store(path, FigureRecord).values()]
    return {line.key: line for line in lines}


def _write_pages(planned: Sequence[Plan], runs: Mapping[str, Sequence[Plan]], out: Path) -> None:
    """The page of each setting's runs, of those whose folders are there."""
    name_of = {plan.run_key: name for name, same in runs.items() for plan in same}
    folders: dict[str, list[Path]] = {}
    for plan in planned:
        folder = RunFolder(out / RUNS / name_of[plan.run_key])
        if folder.is_finished:
            folders.setdefault(plan.setting, []).append(folder.path)
    for setting, found in folders.items():
        write_report(found, out / RUNS / setting / "report.html")


def _discard_checkpoints(folder: RunFolder) -> None:
    if folder.checkpoints.exists():
        with disk_errors(f"{folder.checkpoints} cannot be deleted"):
            shutil.rmtree(folder.checkpoints)


def _num_prompts(config: Config) -> int:
    return config.run.num_steps * config.run.prompts_per_step
