"""Comparing estimators: one run folder per arm and seed, one report over all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from pgrpo.config.checks import suggest
from pgrpo.config.sections import EstimatorConfig
from pgrpo.config.toml import flat, resolved_tree
from pgrpo.errors import ConfigError
from pgrpo.normalizer import RULES
from pgrpo.report import Verdict, write_report
from pgrpo.runs.config import Config, parse_config
from pgrpo.runs.disk import locked
from pgrpo.runs.display import Display
from pgrpo.runs.folder import RunFolder
from pgrpo.train.trainer import train


def compare(
    config: Config,
    arms: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    *,
    shown_on: Console | None = None,
) -> Verdict:
    """Run every arm with every seed, then write `out/report.html`.

    An arm is an estimator's name, `NAME:user` with a history for each user, or `NAME:one` and
    `NAME:shuffled` for the control arms that read another history; its runs are
    `out/NAME[-one]/seed-K`. All arms of a seed see the same prompts in the same order. Finished runs
    are kept and unfinished ones continued, so that an interrupted comparison goes on where it was.
    Progress is shown on `shown_on`, by default on standard output.

    Raises:
        ConfigError: an arm is unknown, or a folder holds a run with other settings.
    """
    arms, seeds = list(dict.fromkeys(arms)), list(dict.fromkeys(seeds))
    plans = {
        arm_folder(arm) + f"/seed-{seed}": arm_config(config, arm, seed)
        for arm in arms
        for seed in seeds
    }
    for name, planned in plans.items():
        folder = RunFolder(out / name)
        if folder.holds_run:
            _check_same(folder.config(), planned, folder.path)
    with locked(out):
        for seed in seeds:
            peers: dict[str, dict[int, float]] = {}
            for arm in arms:
                name = arm_folder(arm)
                folder = RunFolder(out / name / f"seed-{seed}")
                title = name if len(seeds) == 1 else f"{name} seed {seed}"
                place = seeds.index(seed) * len(arms) + arms.index(arm)
                display = Display(
                    title,
                    config.run.num_steps,
                    peers=peers,
                    runs_after=len(plans) - place - 1,
                    shown_on=shown_on,
                )
                if folder.is_finished:
                    display.note(f"finished earlier: {folder.path}")
                else:
                    with folder, display:
                        train(plans[f"{name}/seed-{seed}"], folder, display)
                peers[name] = {
                    record.step: record.reward
                    for record in folder.metrics
                    if record.reward is not None
                }
    return write_report([out / name for name in plans], out / "report.html")


def arm_folder(arm: str) -> str:
    """`pgrpo:one` -> `pgrpo-one`."""
    return arm.replace(":", "-")


def arm_config(config: Config, arm: str, seed: int) -> Config:
    """The config with this arm's estimator and seed, without settings that have no effect then."""
    name, colon, history = arm.partition(":")
    tree = resolved_tree(config)
    tree["run"]["seed"] = seed
    if name not in RULES:
        raise ConfigError(f"there is no estimator {name!r}{suggest(name, list(RULES))}")
    # Not the base's own history: what an arm reads is in its name.
    base = {key: value for key, value in tree["estimator"].items() if key != "history"}
    chosen: dict[str, Any] = {"name": name, **({"history": history} if colon else {})}
    idle = EstimatorConfig.model_construct(**base | chosen).inactive()
    tree["estimator"] = {key: value for key, value in base.items() if key not in idle} | chosen
    if not RULES[name].zero_alone:
        tree["run"]["resample"] = 0
    return parse_config(tree, source=f"arm {arm!r}")


def _check_same(found: Config, planned: Config, folder: Path) -> None:
    """Refuse to mix runs of different settings in one comparison."""
    old, new = dict(flat(resolved_tree(found))), dict(flat(resolved_tree(planned)))
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            raise ConfigError(
                f"{folder} holds a run with {key} = {old.get(key, 'none')}, not "
                f"{new.get(key, 'none')}; choose another --out"
            )
