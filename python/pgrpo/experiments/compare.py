"""Comparing estimators and objectives: one run folder per arm and seed, one report over all."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from pgrpo.config.checks import suggest
from pgrpo.config.sections import EstimatorConfig, LossConfig
from pgrpo.config.toml import apply_override, flat, resolved_tree
from pgrpo.errors import ConfigError
from pgrpo.normalizer import RULES
from pgrpo.report import Verdict, write_report
from pgrpo.report.study import shapes_training
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
    `NAME:shuffled` for the control arms that read another history, or `dpo` or `sft`, objectives that
    take no estimator; `ARM@section.key=value` is that arm with another setting, of which there may be
    several. Its runs are `out/NAME[-one]/seed-K`. All arms of a seed see the same prompts in the same
    order. Finished runs are kept and unfinished ones continued, so that an interrupted comparison goes
    on where it was. Progress is shown on `shown_on`, by default on standard output.

    Raises:
        ConfigError: an arm is unknown, or a folder holds a run with other settings, or would hold two
            arms.
    """
    arms, seeds = list(dict.fromkeys(arms)), list(dict.fromkeys(seeds))
    named: dict[str, str] = {}
    for arm in arms:
        if named.setdefault(arm_folder(arm), arm) != arm:
            raise ConfigError(
                f"arms {named[arm_folder(arm)]!r} and {arm!r} would share the folder "
                f"{out / arm_folder(arm)}; expected names that differ in letters or numbers"
            )
    plans = {
        arm_folder(arm) + f"/seed-{seed}": arm_config(config, arm, seed)
        for arm in arms
        for seed in seeds
    }
    _check_distinct(arms, {arm: plans[f"{arm_folder(arm)}/seed-{seeds[0]}"] for arm in arms})
    # All arms of a seed, then those of the next: whoever stops early has whole pairs.
    run_all(
        dict(sorted(plans.items(), key=lambda plan: seeds.index(plan[1].run.seed))),
        out,
        shown_on=shown_on,
    )
    return write_report([out / name for name in plans], out / "report.html")


def run_all(
    plans: Mapping[str, Config],
    out: Path,
    *,
    ended: Callable[[str, RunFolder], None] = lambda _name, _folder: None,
    shown_on: Console | None = None,
) -> None:
    """Train every planned run, in the order given; finished ones are kept, unfinished ones continued.

    Args:
        plans: by the names of their folders in `out`, `ARM/seed-K` or `SETTING/ARM/seed-K`.
        out: this process has it alone meanwhile.
        ended: is told of each run, by its name and folder, once it is finished, and also of those that
            were finished before.
        shown_on: where progress goes, by default standard output.

    Raises:
        ConfigError: a folder holds a run with other settings.
    """
    for name, planned in plans.items():
        folder = RunFolder(out / name)
        if folder.holds_run:
            _check_same(folder.config(), planned, folder.path)
    several = len({planned.run.seed for planned in plans.values()}) > 1
    left = sum(planned.run.num_steps for planned in plans.values())
    peers: dict[tuple[str, int], dict[str, dict[int, float]]] = {}
    with locked(out):
        for name, planned in plans.items():
            folder = RunFolder(out / name)
            title = name.rpartition("/")[0]
            setting, _, arm = title.rpartition("/")
            left -= planned.run.num_steps
            # Arms of a setting see the same prompts in a seed.
            beside = peers.setdefault((setting, planned.run.seed), {})
            display = Display(
                f"{title} seed {planned.run.seed}" if several else title,
                planned.run.num_steps,
                peers=beside,
                steps_after=left,
                shown_on=shown_on,
            )
            if folder.is_finished:
                display.note(f"finished earlier: {folder.path}")
            else:
                with folder, display:
                    train(planned, folder, display)
            beside[arm] = {
                record.step: record.reward for record in folder.metrics if record.reward is not None
            }
            ended(name, folder)


def arm_folder(arm: str) -> str:
    """`pgrpo:one` -> `pgrpo-one`, `dpo@loss.beta=0.5` -> `dpo-loss.beta=0.5`."""
    return re.sub(r"[^\w.=]+", "-", arm)


OBJECTIVES = ("dpo", "sft")
"""Values of `loss.objective` that take no estimator, and are arms by themselves."""


def arm_config(config: Config, arm: str, seed: int) -> Config:
    """The config with this arm's estimator or objective, seed and settings, without settings of its own
    that have no effect then."""
    rule, *overrides = arm.split("@")
    name, colon, history = rule.partition(":")
    # Without defaults: those of a setting that an override gives no effect would be refused.
    tree = resolved_tree(config, defaults=False)
    tree["run"] = tree.get("run", {}) | {"seed": seed}
    takes_estimator = name not in OBJECTIVES
    if takes_estimator and name not in RULES:
        known = [*RULES, *OBJECTIVES]
        raise ConfigError(f"there is no estimator {name!r}{suggest(name, known)}")
    # Not the base's own history: what an arm reads is in its name.
    base = {key: value for key, value in tree.pop("estimator", {}).items() if key != "history"}
    chosen: dict[str, Any] = {"history": history} if colon else {}
    if takes_estimator:
        chosen["name"] = name
        idle = EstimatorConfig.model_construct(**base | chosen).inactive()
        chosen = {key: value for key, value in base.items() if key not in idle} | chosen
        if not RULES[name].zero_alone:
            tree["run"]["resample"] = 0
    if chosen:
        tree["estimator"] = chosen
    loss = tree.get("loss", {}) | {"objective": "policy_gradient" if takes_estimator else name}
    idle = LossConfig.model_construct(**loss).inactive()
    tree["loss"] = {key: value for key, value in loss.items() if key not in idle}
    for override in overrides:
        apply_override(tree, override)
    found = parse_config(tree, source=f"arm {arm!r}")
    if found.run.seed != seed:
        raise ConfigError(f"arm {arm!r} sets run.seed; expected seeds by --seeds alone")
    return found


def _check_distinct(arms: Sequence[str], configs: Mapping[str, Config]) -> None:
    """Refuse arms that a report could not tell apart, before they are trained."""
    shaped: dict[str, str] = {}
    for arm in arms:
        shape = {k: v for k, v in flat(resolved_tree(configs[arm])) if shapes_training(k)}
        same = shaped.setdefault(json.dumps(shape, sort_keys=True), arm)
        if same != arm:
            raise ConfigError(
                f"arms {same!r} and {arm!r} train the same, but for length and bookkeeping; expected "
                "arms that differ"
            )


def _check_same(found: Config, planned: Config, folder: Path) -> None:
    """Refuse to mix runs of different settings in one comparison."""
    old, new = dict(flat(resolved_tree(found))), dict(flat(resolved_tree(planned)))
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            raise ConfigError(
                f"{folder} holds a run with {key} = {old.get(key, 'none')}, not "
                f"{new.get(key, 'none')}; choose another --out"
            )
