"""Sections that tell how it was learned: histories, their part in advantages, optimisation, time."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from markupsafe import Markup

from pgrpo.normalizer import RULES, Options
from pgrpo.report import figures
from pgrpo.report.blocks import Grid, Key, Panel, Section, legend, section
from pgrpo.report.context import Context
from pgrpo.report.figures import Line
from pgrpo.report.study import Arm, Curve
from pgrpo.report.verdict import number

COROLLARY = Markup(
    "Corollary 3.1: advantage under the cluster's history = scale ratio × advantage under the group + "
    "bias term, with scale ratio (σ<sub>G</sub> + ε) / (σ<sub>p</sub> + ε) and bias term "
    "(mean<sub>G</sub> − mean<sub>p</sub>) / (σ<sub>p</sub> + ε), averaged over a cluster's groups in "
    "a step. A scale ratio below 1 means weaker steps than GRPO's; a bias term that stays away from 0 "
    "means that the history lags behind the rewards."
)

SHOWN = "the history shown"


def corollary(page: Context) -> Section | None:
    """The two terms of Corollary 3.1 per cluster, one panel per arm and term."""
    rows: list[list[Panel]] = []
    for term, label, neutral in (("scale_ratio", "Scale ratio", 1.0), ("bias", "Bias term", 0.0)):
        drawn: dict[str, list[Line]] = {}
        for arm in page.study.arms:
            for name in page.study.shown:
                curve = page.study.curve(arm, f"clusters/{name}/{term}")
                if curve:
                    # Bands and points of many clusters hide what they should show.
                    line = Line(name, page.cluster_colors[name], _bare(curve))
                    drawn.setdefault(arm.name, []).append(line)
        shared = figures.common_range([[line.curve for line in lines] for lines in drawn.values()])
        panels = [
            Panel(
                Key(label),
                page.place(figures.lines(lines, 230, neutral, shared), f"{label} of {name}"),
                aside=Key(name, page.arm_colors[name]),
            )
            for name, lines in drawn.items()
        ]
        rows += [panels] if panels else []
    if not rows:
        return None
    arms = max(len(panels) for panels in rows)
    if arms == 1:
        # One arm: its two terms side by side.
        rows = [[panel for panels in rows for panel in panels]]
    return section(
        "Where P-GRPO departs from GRPO",
        [legend(page.cluster_colors), *(Grid(row, min(3, max(2, arms))) for row in rows)],
        COROLLARY,
        "The terms are those of each cluster's own history as it stands after a step (before it "
        "with order normalize_then_update), whatever an arm's advantages come from.",
        _reading(page),
        "Dashed: no departure. Smoothed and averaged over seeds as above.",
        page.selection(),
    )


def histories(page: Context) -> Section | None:
    """Mean and standard deviation of each cluster's reward history; of several rewards that have
    histories of their own also of these."""
    grids = [Grid(panels)] if (panels := _history_panels(page, "")) else []
    runs = [run for arm in page.study.arms for run in arm.runs]
    rewards = list(dict.fromkeys(name for run in runs for name in run.steps.rewards))
    for reward in rewards:
        panels = _history_panels(page, f"rewards/{reward}/")
        grids.append(Grid([replace(panel, about=reward, full="") for panel in panels]))
    if not grids:
        return None
    return section(
        "Reward histories",
        [legend(page.arm_colors), *grids],
        "Each cluster's own: the running mean of its rewards (solid) ± their running standard "
        "deviation (dotted), after each step, averaged over seeds. Kept under every estimator.",
        f"First of the weighted sum of the rewards, then of each alone: {', '.join(rewards)}."
        if rewards
        else "",
        _reading(page),
        page.selection(),
    )


def _history_panels(page: Context, of: str) -> list[Panel]:
    """A chart of each cluster's history, or of its history of a reward: `of` is `rewards/NAME/`."""
    panels: list[Panel] = []
    for name in page.study.shown:
        drawn: list[tuple[Line, Curve]] = []
        for arm in page.study.arms:
            mean = page.study.curve(arm, f"clusters/{name}/{of}mean")
            std = page.study.curve(arm, f"clusters/{name}/{of}std")
            if mean and std:
                # Histories are running sums already; smoothing them would only add a lag.
                line = Line(arm.name, page.arm_colors[arm.name], replace(mean, mean=mean.raw))
                drawn.append((line, std))
        if drawn:
            panels.append(page.panel(name, figures.spreads(drawn), "History"))
    return panels


def _reading(page: Context) -> str:
    """What each arm's advantages are read from, which need not be the history that is shown."""
    found = [(arm.name, reads(arm)) for arm in page.study.arms]
    if all(what == SHOWN for _, what in found):
        return f"Advantages are read from {SHOWN}."
    return f"Advantages are read from: {'; '.join(f'{what} ({name})' for name, what in found)}."


def reads(arm: Arm) -> str:
    """What an arm's advantages are read from: `SHOWN` where that is the cluster's own history as it
    stands."""
    settings = arm.runs[0].settings

    def of(option: str) -> float:
        return float(settings.get(f"estimator.{option}", getattr(Options, option)))

    if settings.get("loss.objective", "policy_gradient") != "policy_gradient":
        return "no history"
    if settings["estimator.name"] not in RULES:
        return "what this version of pgrpo does not know"

    if not RULES[settings["estimator.name"]].reads_histories:
        return "no history" + (", but for weights" if of("frequency_weight") else "")
    each = settings.get("estimator.combine") == "normalize_then_sum"
    if settings["estimator.name"] == "rae":
        of_whom = {
            "cluster": "each cluster",
            "user": "each person",
            "one": "all clusters",
            "shuffled": "shuffled users",
        }
        what = "each reward" if each else "the rewards"
        return f"an exponential mean of {what} of {of_whom[settings['estimator.history']]}"
    how = {
        "cluster": "the cluster's own history of each reward" if each else SHOWN,
        "user": "the person's own history",
        "one": "one history of all clusters",
        "shuffled": "histories of shuffled users",
    }[settings["estimator.history"]]
    if each and settings["estimator.history"] != "cluster":
        how += ", for each reward"
    if settings["estimator.name"] != "pgrpo":
        how += " and the group"
    if of("prior_count"):
        by = f"{of('prior_count'):g} rewards of all clusters pooled"
        if settings["estimator.history"] == "user":
            by = f"{of('prior_count'):g} of the cluster's history, itself with {by}"
        how += f", with {by} added"
    if of("sigma_floor"):
        how += f", with a σ of {of('sigma_floor'):g} at least"
    if of("min_count") > Options.min_count:
        how += f", once it has {of('min_count'):g} rewards"
    return how


def optimisation(page: Context) -> Section | None:
    """Quantities that tell a healthy run from a broken one."""
    quantities = {
        "Equal groups": ("share of groups whose rewards are all equal", "equal_groups"),
        "Gradient norm": ("before clipping", "grad_norm"),
        "Completion length": ("mean tokens", "completion_tokens"),
        "Entropy": ("of sampled tokens, nats", "entropy"),
        "Truncated": ("share of completions cut off", "truncated"),
        "Clipped": ("share of tokens with a clipped ratio", "clipped"),
        "KL to the reference": ("nats per token", "kl"),
    }
    constant: list[str] = []
    for name, (_, path) in list(quantities.items()):
        values = np.concatenate([run.steps[path] for run in page.study.runs])
        values = np.unique(values[np.isfinite(values)])
        if len(values) == 1 and len(page.study.runs[0].steps.steps) > 1:
            constant.append(f"{name.lower()} {number(float(values[0]))}")
            del quantities[name]
    panels = page.small(quantities, shares=("Equal groups", "Truncated", "Clipped"))
    if not panels and not constant:
        return None
    return section(
        "Optimisation",
        [legend(page.arm_colors), *panels],
        "GRPO learns nothing from a group whose rewards are all equal; P-GRPO does.",
        page.drawing(),
        *([f"Constant throughout: {', '.join(constant)}."] if constant else []),
    )


def time(page: Context) -> Section | None:
    """Seconds of a step by what they were spent on."""
    study = page.study
    parts: dict[str, list[float]] = {part: [] for part in figures.PART_COLORS}
    names: list[str] = []
    for arm in study.arms:
        spent = {
            part: study.throughout(arm, f"timing_s/{part}")
            for part in ("generate", "reward", "wait", "sync", "update")
        }
        spent = {part: s for part, s in spent.items() if math.isfinite(s)}
        if "wait" in spent:
            # Generation and rewards overlapped with the step before.
            spent.pop("generate", None)
            spent.pop("reward", None)
        if not spent:
            continue
        names.append(arm.name)
        for part, column in parts.items():
            column.append(spent.get(part, 0.0))
        total = study.throughout(arm, "timing_s/total")
        if math.isfinite(total):
            parts["other"][-1] = max(0.0, total - sum(spent.values()))
    if not names:
        return None
    parts = {part: column for part, column in parts.items() if max(column) >= 1e-3}
    memory = np.concatenate([run.steps["peak_memory_bytes"] for run in study.runs])
    memory = memory[np.isfinite(memory)]
    peak = [f"Peak memory: {memory.max() / 2**30:.2f} GiB."] if len(memory) else []
    return section(
        "Time",
        [
            legend({part: figures.PART_COLORS[part] for part in parts}),
            page.place(figures.stacked(names, parts), "Seconds of a step by part"),
        ],
        "Seconds of a step, averaged over steps and seeds; “other” is what the total has beyond "
        "these parts.",
        *peak,
    )


def _bare(curve: Curve) -> Curve:
    none = np.full_like(curve.mean, math.nan)
    return replace(curve, low=none, high=none, raw=none)
