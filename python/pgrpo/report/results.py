"""Sections that tell what came out: summary, differences, warnings, rewards, fairness."""

from __future__ import annotations

import math

import numpy as np

from pgrpo.report import figures
from pgrpo.report.ability import notes as ability_notes
from pgrpo.report.blocks import (
    Block,
    Cell,
    Grid,
    Key,
    Panel,
    Section,
    Table,
    estimate,
    legend,
    section,
)
from pgrpo.report.context import Context
from pgrpo.report.figures import Dots
from pgrpo.report.study import EVALUATIONS, FLOWS, Arm
from pgrpo.report.verdict import (
    WITHIN_NOISE,
    enumerate_words,
    interval,
    number,
    percent,
)

COMPARED = ("chance", "one rule for all", "one rule per person")
"""Baselines that stand beside each cluster's rewards: what nobody's taste, everybody's and one's own
taste foretell."""


def summary(page: Context) -> Section:
    """One row per arm."""
    study, steps = page.study, page.study.window
    first, last = (f"first {steps}", f"last {steps}") if steps > 1 else ("first step", "last step")
    header = ["Arm", "Seeds", f"Reward, {first}", last]
    if study.evaluated:
        header += [f"Held-out, step {study.evaluated[0]}", f"step {study.evaluated[1]}"]
    header += ["Worst cluster", "Gap", "Gini", "s per step"]
    rows: list[list[Cell | str]] = []
    for arm in study.arms:
        seeds = [run.settings.get("run.seed", "–") for run in arm.runs]
        row: list[Cell | str] = [
            Cell(arm.name, page.arm_colors[arm.name]),
            Cell(str(len(seeds)), small=[", ".join(seeds)]),
            estimate(study.first(arm, "reward")),
            estimate(study.last(arm, "reward")),
        ]
        if study.evaluated:
            row += [estimate(study.held_out(arm, step)) for step in study.evaluated]
        spread = study.spread(arm)
        if spread is None:
            row += ["–"] * 3
        else:
            row.append(estimate(spread.reward, figures.shorten(spread.worst, 18)))
            row += [estimate(spread.gap), number(spread.gini)]
        rows.append([*row, number(study.throughout(arm, "timing_s/total"))])
    source = (
        f"the held-out evaluation at step {study.evaluated[1]}"
        if study.evaluated and study.cluster_evaluations
        else f"training, {last}"
    )
    when = (
        f"“First {steps}” and “last {steps}” are means over steps, up to step {study.last_step}."
        if steps > 1
        else f"The last step is step {study.last_step}."
    )
    error = (
        "; of held-out rewards that over the prompts of one evaluation where larger."
        if study.evaluated
        else ", absent for one seed."
    )
    tukey = "The intervals above are Tukey-Kramer intervals over seeds."
    return section(
        "Summary",
        [Table(header, rows, dict.fromkeys(range(2, len(header)), "n"))],
        when,
        f"± is the standard error over seeds{error}",
        f"Worst cluster, gap (best minus worst) and Gini compare clusters in {source}, averaged over "
        "seeds first.",
        page.scales(held_out=study.cluster_evaluations),
        tukey if len(study.ranked) == 2 else "",
    )


def differences(page: Context) -> Section | None:
    """The best arm against each other one, where the verdict has no room for that."""
    study = page.study
    if len(study.ranked) < 3:
        return None
    best, *others = study.ranked
    columns: dict[str, str | None] = {"Reward": None}
    if study.minority is not None and study.same_clusters:
        columns[f"Smallest cluster, {figures.shorten(study.minority, 28)}"] = study.minority
    header = [f"{best.name} minus"]
    for name in columns:
        header += [name, "95 % interval"]
    rows: list[list[Cell | str]] = []
    for arm in others:
        row: list[Cell | str] = [Cell(arm.name, page.arm_colors[arm.name])]
        for cluster in columns.values():
            lead = study.difference(best, arm, cluster)
            if lead is None:
                row += ["–", "–"]
            else:
                noise = [] if lead.clear else [WITHIN_NOISE]
                row += [number(lead.mean, sign=True), Cell(interval(lead), small=noise)]
        rows.append(row)
    return section(
        "Differences",
        [Table(header, rows, dict.fromkeys(range(1, len(header)), "n"))],
        "Tukey-Kramer intervals over seeds: they hold for all pairs of arms at once, and take the "
        "variance between seeds to be the same in every arm.",
    )


def warnings(page: Context) -> Section | None:
    """What the runs' histories tell that may go wrong."""
    rows = [
        [
            Cell(arm.name, page.arm_colors[arm.name]),
            run.settings.get("run.seed", "–"),
            warning[:1].upper() + warning[1:] + ".",
        ]
        for arm in page.study.arms
        for run in arm.runs
        for warning in run.info.warnings
    ]
    if not rows:
        return None
    return section(
        "Warnings",
        [Table(["Arm", "Seed", ""], rows, {1: "n", 2: "text"})],
        "From the running sums of each run's histories, as of its end (or of its last start, where it "
        "has not finished). They tell what to look at, not that a run failed.",
    )


def ability(page: Context) -> Section | None:
    """What the models could do besides, before and after."""
    measured = [(arm, run) for arm in page.study.arms for run in arm.runs if run.ability]
    if not measured:
        return None
    names = list(dict.fromkeys(change.name for _, run in measured for change in run.ability))
    rows: list[list[Cell | str]] = []
    for arm, run in measured:
        cells = {
            change.name: Cell(f"{change.before} → {change.after}", small=[change.verdict])
            for change in run.ability
        }
        rows.append(
            [
                Cell(arm.name, page.arm_colors[arm.name]),
                run.settings.get("run.seed", "–"),
                *(cells.get(name, "–") for name in names),
            ]
        )
    return section(
        "General ability",
        [Table(["Arm", "Seed", *names], rows, dict.fromkeys(range(1, 2 + len(names)), "n"))],
        "From the first measurement to the last.",
        *ability_notes(),
    )


def reward(page: Context) -> Section | None:
    """Mean raw reward of the rollouts."""
    drawn = page.arm_lines("reward")
    if not drawn:
        return None
    chance = page.study.chance
    figure = figures.lines(drawn, reference=chance, raw=page.raw)
    return section(
        "Reward in training",
        [legend(page.arm_colors, chance), page.place(figure, "Reward over the steps")],
        f"Mean raw reward ({page.reward_name}) of a step's sampled rollouts.",
        page.drawing(),
    )


def gains(page: Context) -> Section | None:
    """What having a history gives, and what it gives that it is the cluster's."""
    found = page.study.gains
    if not found:
        return None
    figure = figures.differences([gain.what for gain in found], [gain.paired for gain in found])
    rows: list[list[Cell | str]] = []
    for gain in found:
        difference = gain.paired.difference
        each = ", ".join(number(x, sign=True) for x in gain.paired.each) or "–"
        row: list[Cell | str] = [
            gain.what,
            Cell(gain.after.name, page.arm_colors[gain.after.name]),
            Cell(gain.before.name, page.arm_colors[gain.before.name]),
            each,
        ]
        if difference is None:
            row += ["–", "–"]
        else:
            noise = [] if difference.clear else [WITHIN_NOISE]
            row += [number(difference.mean, sign=True), Cell(interval(difference), small=noise)]
        rows.append(row)
    header = ["What differs", "Arm", "minus", "Seed by seed", "Mean", "95 % interval"]
    return section(
        "Where the gain comes from",
        [
            page.place(figure, "Differences between arms that differ in one respect"),
            Table(header, rows, dict.fromkeys(range(3, 6), "n")),
        ],
        f"Differences of {page.outcome_name} between arms that differ in one respect, seed by seed "
        "(faint), with Student's interval over the seeds. A history gives a signal where a group's "
        "rewards are all equal; that it is the cluster's own matters where clusters are rewarded on "
        "different scales.",
    )


def held_out(page: Context) -> Section | None:
    """Evaluations over the steps, the rollouts and the time they took."""
    study = page.study
    drawn: dict[str, list[Dots]] = {"steps": [], "rollouts": [], "minutes": []}
    for arm in study.arms:
        steps = study.evaluations(arm)
        if not steps:
            continue
        estimates = [study.held_out(arm, step) for step in steps]
        rollouts = study.until(arm, "num_rollouts", steps)
        minutes = [seconds / 60 for seconds in study.until(arm, "timing_s/total", steps)]
        for kind, places in zip(drawn, (steps, rollouts, minutes), strict=True):
            if np.isfinite(places).all():
                drawn[kind].append(Dots(arm.name, page.arm_colors[arm.name], places, estimates))
    if not drawn["steps"]:
        return None
    prompts = sorted({int(n) for run in study.runs for n in run.evaluations["num_prompts"]})
    count = enumerate_words([f"{n:,}" for n in prompts])
    samples = sorted({int(n) for run in study.runs for n in run.evaluations["num_samples"]})
    decodings = [f"mean of {n} samples each" if n else "greedy decoding" for n in samples]
    how = enumerate_words(decodings)
    own = ", scored by rewards of their own" if study.own_evaluation else ""
    levels = page.levels()
    blocks: list[Block] = [
        legend(page.arm_colors),
        page.place(figures.evaluations(drawn["steps"], levels), "Held-out reward over the steps"),
    ]
    if len(study.arms) > 1:
        panels = [
            Panel(
                Key(f"Over the {kind}"),
                page.place(
                    figures.evaluations(dots, {}, kind, 210), f"Held-out reward over the {kind}"
                ),
                about=about,
            )
            for kind, about in (
                ("rollouts", "completions that were generated and scored"),
                ("minutes", "of all steps, without evaluations and checkpoints"),
            )
            if (dots := drawn[kind])
        ]
        blocks.append(Grid(panels))
    return section(
        "Held-out prompts",
        blocks,
        f"{how[0].upper()}{how[1:]} on {count} held-out prompts{own}. Error bars: one standard error, "
        "as in the summary.",
        _equal_cost(drawn),
        page.about_levels(),
        f"At most {EVALUATIONS} evaluations of an arm are drawn, evenly spaced."
        if max(len(run.evaluations.steps) for run in study.runs) > EVALUATIONS
        else "",
    )


def _equal_cost(drawn: dict[str, list[Dots]]) -> str:
    """Held-out reward of the arms at equal steps, rollouts and minutes, namely what the arm with the
    fewest of them took; between two evaluations it is read from the line through them."""
    said: list[str] = []
    for kind, arms in drawn.items():
        if len(arms) < 2:
            continue
        end = min(max(dots.positions) for dots in arms)
        rewards = [
            float(np.interp(end, dots.positions, [estimate.mean for estimate in dots.estimates]))
            for dots in arms
        ]
        values = [f"{dots.name} {number(x)}" for dots, x in zip(arms, rewards, strict=True)]
        amount = f"{end:.1f}" if kind == "minutes" else f"{end:,.0f}"
        said.append(f"at {amount} {kind}, {enumerate_words(values)}")
    return f"At equal cost: {'; '.join(said)}." if said else ""


def held_out_by_cluster(page: Context) -> Section | None:
    """Evaluations per cluster, before and after, beside what simple rules get there."""
    study = page.study
    if not (study.evaluated and study.cluster_evaluations):
        return None
    first, last = study.evaluated

    def dots(arm: Arm, step: int) -> Dots:
        estimates = [study.held_out(arm, step, name) for name in study.shown]
        return Dots(arm.name, page.arm_colors[arm.name], range(len(study.shown)), estimates)

    known = [study.baselines_of(name) for name in study.shown]
    levels = {
        rule: [rules.get(rule, math.nan) for rules in known]
        for rule in COMPARED
        if any(rule in rules for rules in known)
    }
    if not levels and study.chance is not None and not study.own_evaluation:
        levels = {"chance": [study.chance] * len(study.shown)}
    figure = figures.before_and_after(
        study.shown,
        [dots(arm, first) for arm in study.arms],
        [dots(arm, last) for arm in study.arms],
        levels,
    )
    marks = [f"{glyph} {rule}" for glyph, rule in zip(figures.LEVEL_MARKS, levels, strict=False)]
    return section(
        "Who is served how well",
        [
            legend(page.arm_colors),
            page.place(figure, "Held-out reward of each cluster"),
            _served(page),
        ],
        "Held-out reward of each cluster, the largest share of users first. "
        f"Open: step {first}; filled: step {last}, with one standard error.",
        f"Grey: {enumerate_words(marks)}." if marks else "",
        page.scales(held_out=True),
        page.selection(),
    )


def _served(page: Context) -> Block:
    """Clusters, also those that are not drawn, in a table that sorts."""
    study = page.study
    assert study.evaluated is not None
    rules = list(study.baselines)
    header = ["Cluster", "Users", "Share", "Prompts", *rules]
    header += [f"{arm.name}, step {step}" for arm in study.arms for step in study.evaluated]
    rows: list[list[Cell | str]] = []
    for name in study.listed:
        info, baselines = study.clusters[name], study.baselines_of(name)
        prompts = study.runs[0].evaluations.at(study.evaluated[1], f"clusters/{name}/num_prompts")
        row: list[Cell | str] = [
            Cell(
                figures.shorten(name, 30),
                page.cluster_colors.get(name, ""),
                small=[figures.shorten(info.about, 90)] if info.about else [],
            ),
            str(info.num_users or "–"),
            percent(info.share),
            number(prompts) if not math.isfinite(prompts) else str(int(prompts)),
            *(number(baselines.get(rule, math.nan)) for rule in rules),
        ]
        row += [
            estimate(study.held_out(arm, step, name))
            for arm in study.arms
            for step in study.evaluated
        ]
        rows.append(row)
    return Table(header, rows, dict.fromkeys(range(1, len(header)), "n"), sorts=True)


def clusters(page: Context) -> Section | None:
    """Reward of each cluster in training, the arms together."""
    panels = {
        name: drawn
        for name in page.study.shown
        if (drawn := page.arm_lines(f"clusters/{name}/reward"))
    }
    if not panels:
        return None
    shared = figures.common_range([[line.curve for line in drawn] for drawn in panels.values()])
    chance = page.study.chance
    marks = page.study.divisions[-FLOWS:]
    charts = [
        page.panel(name, figures.lines(drawn, 210, chance, shared, page.raw, marks=marks), "Reward")
        for name, drawn in panels.items()
    ]
    axes = (
        "All panels share one axis."
        if shared
        else "Each panel has an axis of its own, because a common one would flatten some."
    )
    return section(
        "Reward by cluster",
        [legend(page.arm_colors, chance), Grid(charts)],
        f"Raw reward in training, ordered by the cluster's share. {axes}",
        page.drawing(),
        page.selection(),
        _shares(page),
        "Vertical dashes: users were divided again, and a cluster is of other people from there on."
        if marks
        else "",
    )


def flow(page: Context) -> Section | None:
    """Where people went when they were divided again."""
    charts: list[Panel] = []
    rows: list[list[Cell | str]] = []
    for arm in page.study.arms:
        info = arm.runs[0].info
        found = [*info.flows.items()][-FLOWS:]
        if not found:
            continue
        steps = [each.step for _, each in found]
        figure = figures.flows(steps, [each.users for _, each in found], page.cluster_colors)
        seed = f"seed {arm.runs[0].settings.get('run.seed', '–')}" if len(arm.runs) > 1 else None
        chart = page.place(figure, f"People between the clusters of {arm.name}; the table tells it")
        charts.append(Panel(Key(arm.name, page.arm_colors[arm.name]), chart, about=seed))
        everybody = sum(cluster.num_users for cluster in info.clusters.values())
        for version, each in found:
            ways = [
                (num, f"{figures.shorten(old, 18)} → {figures.shorten(new, 18)}: {num:,}")
                for old, row in each.users.items()
                for new, num in row.items()
                if old != new
            ]
            most = [said for _, said in sorted(ways, key=lambda way: -way[0])[:4]]
            share = f"{each.num_moved:,} of {everybody:,}"
            rows.append(
                [
                    Cell(arm.name, page.arm_colors[arm.name]),
                    version,
                    str(each.step),
                    Cell(share, small=[percent(each.num_moved / everybody)] if everybody else []),
                    ", ".join(most) or "–",
                ]
            )
    if not charts:
        return None
    header = ["Arm", "Assignment", "After step", "Moved", "Where most of them went"]
    drawn = max(len(run.info.flows) for run in page.study.runs)
    return section(
        "People between clusters",
        [Grid(charts, columns=1), Table(header, rows, {1: "n", 2: "n", 3: "n", 4: "text"})],
        "Users were divided again by what the run knew of them. A cluster keeps its name if it keeps "
        "its people, and histories go with their people.",
        "Of each arm the first seed." if len(page.study.runs) > len(page.study.arms) else "",
        f"Of {drawn} divisions the last {FLOWS} are shown." if drawn > FLOWS else "",
        page.selection(),
    )


def fairness(page: Context) -> Section | None:
    """Worst cluster, gap and Gini over the steps."""
    panels = page.small(
        {
            "Worst cluster": ("lowest mean reward of a cluster", "fairness/worst"),
            "Gap": ("best cluster minus worst", "fairness/gap"),
            "Gini": ("0: all clusters equal", "fairness/gini"),
        }
    )
    if not panels:
        return None
    blocks: list[Block] = [legend(page.arm_colors), *panels]
    return section(
        "Fairness over time",
        blocks,
        "Between the clusters that had rollouts in a step. The few rollouts of one step add noise, "
        "which widens gap and Gini and lowers the worst cluster; compare arms with each other and "
        "take levels from the summary.",
        page.scales(),
        page.drawing(),
    )


def _shares(page: Context) -> str:
    """A warning where clusters of one name are not the same in all runs."""
    shares: dict[str, list[float]] = {}
    for run in page.study.runs:
        for name, info in run.info.clusters.items():
            shares.setdefault(name, []).append(info.share)
    if any(max(found) - min(found) > 0.02 for found in shares.values()):
        return (
            "Shares of clusters differ between the runs: a name need not mean the same users in each, "
            "and the shares shown are averages."
        )
    return ""
