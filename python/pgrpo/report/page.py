"""The page: sections of HTML around the charts.

Prompts, completions, cluster names and settings are other people's text: everything passes through
`escape` or the JSON of the figures, and the page's own scripts are the only ones its
Content-Security-Policy lets run.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from importlib.resources import files
from string import Template

import numpy as np
from plotly.offline import get_plotlyjs

from pgrpo.report import figures
from pgrpo.report.figures import Dots, Figure, Line
from pgrpo.report.markup import estimate, folded, legend, section, swatch, table
from pgrpo.report.runs import Run, Sample, Step
from pgrpo.report.study import (
    Arm,
    Curve,
    Study,
    differing_settings,
    of_cluster,
    over_seeds,
)
from pgrpo.report.verdict import (
    WITHIN_NOISE,
    enumerate_words,
    interval,
    number,
    percent,
    plural,
    verdict,
)

SAMPLES_PER_STEP = 4
"""Rows of the samples table per arm and step: enough for an impression."""

SAMPLE_ROWS = 24
"""Rows of the samples table, unless there are more arms than half of that."""

Read = Callable[[Step], float | None]


def render(study: Study) -> str:
    """The page as one HTML document that loads nothing from outside itself."""
    page = Page(study)
    sections = "\n".join(filter(None, page.sections()))
    template = Template(_asset("page.html"))
    plotly, script = get_plotlyjs(), _asset("page.js")
    data = json.dumps(page.charts, allow_nan=False)
    for character in "<>&":
        data = data.replace(character, f"\\u{ord(character):04x}")
    said = verdict(study)
    return template.substitute(
        title=escape(page.title()),
        facts=escape(page.facts()),
        verdict=f"<strong>{escape(said.headline)}</strong>"
        f"<p>{escape(' '.join(said.sentences))}</p>",
        sections=sections,
        footer=escape(f"Written by pgrpo {page.version()}."),
        css=_asset("page.css"),
        figures=data,
        plotly=plotly,
        script=script,
        script_hashes=" ".join(map(_hash, (plotly, script))),
    )


class Page:
    """Builds the sections of one study; charts are collected as they are placed."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.charts: dict[str, Figure] = {}
        self.arm_colors = figures.arm_colors([arm.name for arm in study.arms])
        self.cluster_colors = figures.cluster_colors(list(study.clusters), study.minority)
        self.explained = False
        # The points of many arms would hide the lines.
        self.raw = len(study.arms) <= 3
        self.reward_name = study.runs[0].info.reward_name

    def title(self) -> str:
        """Arms and data set."""
        names = " against ".join(arm.name for arm in self.study.arms)
        if len(self.study.arms) > 3:
            names = f"{len(self.study.arms)} arms"
        data = dict.fromkeys(run.settings.get("data.name", "") for run in self.study.runs)
        return f"{names} on {enumerate_words(list(data))}" if all(data) else names

    def facts(self) -> str:
        """The size of the experiment in one line."""
        settings = self.study.runs[0].settings
        facts = [
            plural(len(self.study.runs), "run"),
            plural(self.study.last_step, "step"),
            plural(len(self.study.clusters), "cluster"),
        ]
        shared = differing_settings(self.study.runs)
        for key, label in (
            ("model.name", "model"),
            ("run.prompts_per_step", "prompts per step"),
            ("generation.group_size", "group size"),
        ):
            if key in settings and key not in shared:
                facts.append(f"{label} {settings[key]}")
        return " · ".join([*facts, f"reward: {self.reward_name}"])

    def version(self) -> str:
        """Version of the package that wrote the runs."""
        versions = {run.info.versions.get("pgrpo", "of unknown version") for run in self.study.runs}
        return enumerate_words(sorted(versions))

    def sections(self) -> list[str]:
        """All sections in reading order; an empty string where there is nothing to show."""
        return [
            self.summary(),
            self.warnings(),
            self.reward(),
            self.held_out(),
            self.clusters(),
            self.fairness(),
            self.corollary(),
            self.histories(),
            self.optimisation(),
            self.time(),
            self.samples(),
            self.settings(),
            self.environment(),
        ]

    def summary(self) -> str:
        """One row per arm."""
        study = self.study
        steps = study.window
        first, last = (
            (f"first {steps}", f"last {steps}") if steps > 1 else ("first step", "last step")
        )
        header = ["Arm", "Seeds", f"Reward, {first}", last]
        if study.evaluated:
            header += [f"Held-out, step {study.evaluated[0]}", f"step {study.evaluated[1]}"]
        header += ["Worst cluster", "Gap", "Gini", "s per step"]
        rows: list[list[str]] = []
        for arm in study.arms:
            row = [
                swatch(self.arm_colors[arm.name]) + escape(arm.name),
                _seeds(arm),
                estimate(study.first(arm, lambda step: step.reward)),
                estimate(study.last(arm, lambda step: step.reward)),
            ]
            if study.evaluated:
                row += [estimate(study.held_out(arm, step)) for step in study.evaluated]
            spread = study.spread(arm)
            if spread is None:
                row += ["–"] * 3
            else:
                name = escape(figures.shorten(spread.worst, 18))
                row.append(f"{estimate(spread.reward)}<small>{name}</small>")
                row += [estimate(spread.gap), number(spread.gini)]
            seconds = over_seeds(
                [_mean_over_steps(run, lambda s: s.timing_s.total) for run in arm.runs]
            )
            rows.append([*row, number(seconds.mean)])
        source = (
            f"the held-out evaluation at step {study.evaluated[1]}"
            if study.evaluated and study.cluster_evaluations
            else f"training, {last}"
        )
        notes = [
            f"“First {steps}” and “last {steps}” are means over steps, up to step "
            f"{study.last_step}."
            if steps > 1
            else f"The last step is step {study.last_step}.",
            "± is the standard error over seeds"
            + (
                "; of held-out rewards that over the prompts of one evaluation where larger."
                if study.evaluated
                else ", absent for one seed."
            ),
            (
                f"Worst cluster, gap (best minus worst) and Gini compare clusters in {source}, "
                "averaged over seeds first."
            ),
            self._scales(held_out=study.cluster_evaluations),
        ]
        if len(study.ranked) == 2:
            notes.append("The intervals above are Tukey-Kramer intervals over seeds.")
        arms = table(header, rows, numeric=range(2, len(header)))
        return section("Summary", arms, *notes) + self._differences()

    def _differences(self) -> str:
        """The best arm against each other one, where the verdict has no room for that."""
        study = self.study
        if len(study.ranked) < 3:
            return ""
        best, *others = study.ranked
        columns: dict[str, str | None] = {"Reward": None}
        if study.minority is not None and study.same_clusters:
            columns[f"Smallest cluster, {figures.shorten(study.minority, 28)}"] = study.minority
        header = [f"{escape(best.name)} minus"]
        for name in columns:
            header += [escape(name), "95 % interval"]
        rows: list[list[str]] = []
        for arm in others:
            row = [swatch(self.arm_colors[arm.name]) + escape(arm.name)]
            for cluster in columns.values():
                lead = study.difference(best, arm, cluster)
                if lead is None:
                    row += ["–", "–"]
                else:
                    noise = "" if lead.clear else f"<small>{WITHIN_NOISE}</small>"
                    row += [number(lead.mean, sign=True), interval(lead) + noise]
            rows.append(row)
        return section(
            "Differences",
            table(header, rows, numeric=range(1, len(header))),
            "Tukey-Kramer intervals over seeds: they hold for all pairs of arms at once, and take "
            "the variance between seeds to be the same in every arm.",
        )

    def warnings(self) -> str:
        """What the runs' histories tell that may go wrong."""
        rows = [
            [
                swatch(self.arm_colors[arm.name]) + escape(arm.name),
                escape(run.settings.get("run.seed", "–")),
                escape(warning[:1].upper() + warning[1:] + "."),
            ]
            for arm in self.study.arms
            for run in arm.runs
            for warning in run.info.warnings
        ]
        if not rows:
            return ""
        return section(
            "Warnings",
            table(["Arm", "Seed", ""], rows, numeric=(1,), text=(2,)),
            "From the running sums of each run's histories, as of its end (or of its last start, "
            "where it has not finished). They tell what to look at, not that a run failed.",
        )

    def reward(self) -> str:
        """Mean raw reward of the rollouts."""
        drawn = self._arm_lines(lambda step: step.reward)
        if not drawn:
            return ""
        chance = self.study.chance
        figure = figures.lines(drawn, reference=chance, raw=self.raw)
        return section(
            "Reward in training",
            legend(self.arm_colors, chance=chance) + self._place(figure, "Reward over the steps"),
            f"Mean raw reward ({escape(self.reward_name)}) of a step's sampled rollouts. "
            + self._drawing(),
        )

    def held_out(self) -> str:
        """Evaluations over the steps, and per cluster before and after."""
        study = self.study
        drawn: list[Dots] = []
        for arm in study.arms:
            common = set[int].intersection(*({e.step for e in run.evaluations} for run in arm.runs))
            steps = sorted(common)
            if steps:
                estimates = [study.held_out(arm, step) for step in steps]
                drawn.append(Dots(arm.name, self.arm_colors[arm.name], steps, estimates))
        if not drawn:
            return ""
        prompts = sorted({e.num_prompts for run in study.runs for e in run.evaluations})
        count = enumerate_words([f"{n:,}" for n in prompts])
        chance = None if study.own_evaluation else study.chance
        body = legend(self.arm_colors, chance=chance) + self._place(
            figures.evaluations(drawn, chance), "Held-out reward over the steps"
        )
        caption = (
            f"Greedy decoding on {count} held-out prompts"
            f"{', scored by rewards of their own' if study.own_evaluation else ''}. Error bars: "
            "one standard error, as in the summary."
        )
        overall = section("Held-out prompts", body, caption)
        if not (study.evaluated and study.cluster_evaluations):
            return overall
        first, last = study.evaluated
        names = list(study.clusters)

        def dots(arm: Arm, step: int) -> Dots:
            estimates = [study.held_out(arm, step, name) for name in names]
            return Dots(arm.name, self.arm_colors[arm.name], range(len(names)), estimates)

        figure = figures.before_and_after(
            names,
            [dots(arm, first) for arm in study.arms],
            [dots(arm, last) for arm in study.arms],
            chance,
        )
        return overall + section(
            "Held-out prompts by cluster",
            self._place(figure, "Held-out reward of each cluster before and after"),
            f"Largest share first. Open: step {first}; filled: step {last}, with one standard "
            f"error. {self._scales(held_out=True)}",
        )

    def clusters(self) -> str:
        """Reward of each cluster in training, the arms together."""
        panels = {
            name: drawn
            for name in self.study.clusters
            if (drawn := self._arm_lines(of_cluster(name, "reward")))
        }
        if not panels:
            return ""
        shared = figures.common_range([[line.curve for line in drawn] for drawn in panels.values()])
        chance = self.study.chance
        body = "".join(
            self._panel(name, figures.lines(drawn, 210, chance, shared, self.raw), "Reward")
            for name, drawn in panels.items()
        )
        axes = (
            "All panels share one axis."
            if shared
            else "Each panel has an axis of its own, because a common one would flatten some."
        )
        return section(
            "Reward by cluster",
            legend(self.arm_colors, chance=chance) + f'<div class="grid">{body}</div>',
            f"Raw reward in training, ordered by the cluster's share. {axes} {self._drawing()}"
            + self._shares(),
        )

    def fairness(self) -> str:
        """Worst cluster, gap and Gini over the steps."""
        quantities: dict[str, tuple[str, Read]] = {
            "Worst cluster": ("lowest mean reward of a cluster", lambda s: s.fairness.worst),
            "Gap": ("best cluster minus worst", lambda s: s.fairness.gap),
            "Gini": ("0: all clusters equal", lambda s: s.fairness.gini),
        }
        body = self._small(quantities)
        return body and section(
            "Fairness over time",
            legend(self.arm_colors) + body,
            "Between the clusters that had rollouts in a step. The few rollouts of one step add "
            "noise, which widens gap and Gini and lowers the worst cluster; compare arms with each "
            f"other and take levels from the summary. {self._scales()} {self._drawing()}",
        )

    def corollary(self) -> str:
        """The two terms of Corollary 3.1 per cluster, one panel per arm and term."""
        terms = {"scale_ratio": ("Scale ratio", 1.0), "bias": ("Bias term", 0.0)}
        rows: list[str] = []
        arms = 0
        for term, (label, neutral) in terms.items():
            panels: dict[str, list[Line]] = {}
            for arm in self.study.arms:
                for name, color in self.cluster_colors.items():
                    curve = self.study.curve(arm, of_cluster(name, term))
                    if curve:
                        # Bands and points of many clusters hide what they should show.
                        line = Line(name, color, _bare(curve))
                        panels.setdefault(arm.name, []).append(line)
            shared = figures.common_range([[x.curve for x in drawn] for drawn in panels.values()])
            row = ""
            for name, drawn in panels.items():
                figure = figures.lines(drawn, 230, neutral, shared)
                row += (
                    f'<div class="panel"><h3>{label}<span class="share">'
                    f"{swatch(self.arm_colors[name])}{escape(name)}</span></h3>"
                    f"{self._place(figure, f'{label} of {name}')}</div>"
                )
            rows += [row] if row else []
            arms = max(arms, len(panels))
        if arms == 1:
            # One arm: its two terms side by side.
            rows = ["".join(rows)]
        columns = f"grid-template-columns:repeat({min(3, max(2, arms))},minmax(0,1fr))"
        body = "".join(f'<div class="grid" style="{columns}">{row}</div>' for row in rows)
        return body and section(
            "Where P-GRPO departs from GRPO",
            legend(self.cluster_colors) + body,
            "Corollary 3.1: advantage under the cluster's history = scale ratio × advantage under "
            "the group + bias term, with scale ratio (σ<sub>G</sub> + ε) / (σ<sub>p</sub> + ε) and "
            "bias term (mean<sub>G</sub> − mean<sub>p</sub>) / (σ<sub>p</sub> + ε), averaged over "
            "a cluster's groups in a step. A scale ratio below 1 means weaker steps than GRPO's; a "
            "bias term that stays away from 0 means that the history lags behind the rewards. The "
            "history is the one that advantages are read from: after a step, or before it with "
            "<code>order = normalize_then_update</code>. "
            "Dashed: no departure. Smoothed and averaged over seeds as above.",
        )

    def histories(self) -> str:
        """Mean and standard deviation of each cluster's reward history."""
        body = ""
        for name in self.study.clusters:
            drawn: list[tuple[Line, Curve]] = []
            for arm in self.study.arms:
                mean = self.study.curve(arm, of_cluster(name, "mean"))
                std = self.study.curve(arm, of_cluster(name, "std"))
                if mean and std:
                    # Histories are running sums already; smoothing them would only add a lag.
                    exact = Curve(mean.steps, mean.raw, mean.low, mean.high, mean.raw)
                    drawn.append((Line(arm.name, self.arm_colors[arm.name], exact), std))
            if drawn:
                body += self._panel(name, figures.spreads(drawn), "History")
        return body and section(
            "Reward histories",
            legend(self.arm_colors) + f'<div class="grid">{body}</div>',
            "What P-GRPO normalises by: the running mean of a cluster's rewards (solid) ± their "
            "running standard deviation (dotted), after each step, averaged over seeds.",
        )

    def optimisation(self) -> str:
        """Quantities that tell a healthy run from a broken one."""
        quantities: dict[str, tuple[str, Read]] = {
            "Equal groups": (
                "share of groups whose rewards are all equal",
                lambda s: s.equal_groups,
            ),
            "Gradient norm": ("before clipping", lambda s: s.grad_norm),
            "Completion length": ("mean tokens", lambda s: s.completion_tokens),
            "Entropy": ("of sampled tokens, nats", lambda s: s.entropy),
            "Truncated": ("share of completions cut off", lambda s: s.truncated),
            "Clipped": ("share of tokens with a clipped ratio", lambda s: s.clipped),
            "KL to the reference": ("nats per token", lambda s: s.kl),
        }
        constant: list[str] = []
        for name, (_, read) in list(quantities.items()):
            values = [v for run in self.study.runs for v in map(read, run.steps) if v is not None]
            if len(set(values)) == 1 and len(self.study.runs[0].steps) > 1:
                constant.append(f"{name.lower()} {number(values[0])}")
                del quantities[name]
        body = self._small(quantities, shares={"Equal groups", "Truncated", "Clipped"})
        if not body and not constant:
            return ""
        unvaried = f" Constant throughout: {', '.join(constant)}." if constant else ""
        return section(
            "Optimisation",
            legend(self.arm_colors) + body,
            "GRPO learns nothing from a group whose rewards are all equal; P-GRPO does. "
            + self._drawing()
            + unvaried,
        )

    def time(self) -> str:
        """Seconds of a step by what they were spent on."""
        parts: dict[str, list[float]] = {part: [] for part in figures.PART_COLORS}
        names: list[str] = []
        for arm in self.study.arms:

            def seconds(read: Read, arm: Arm = arm) -> float:
                return over_seeds([_mean_over_steps(run, read) for run in arm.runs]).mean

            total = seconds(lambda s: s.timing_s.total)
            spent = {
                "generate": seconds(lambda s: s.timing_s.generate),
                "reward": seconds(lambda s: s.timing_s.reward),
                "wait": seconds(lambda s: s.timing_s.wait),
                "sync": seconds(lambda s: s.timing_s.sync),
                "update": seconds(lambda s: s.timing_s.update),
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
            if math.isfinite(total):
                parts["other"][-1] = max(0.0, total - sum(spent.values()))
        if not names:
            return ""
        parts = {part: column for part, column in parts.items() if max(column) >= 1e-3}
        colors = {part: figures.PART_COLORS[part] for part in parts}
        figure = figures.stacked(names, parts)
        memory = [s.peak_memory_bytes for run in self.study.runs for s in run.steps]
        known = [m for m in memory if m is not None]
        peak = f" Peak memory: {max(known) / 2**30:.2f} GiB." if known else ""
        return section(
            "Time",
            legend(colors) + self._place(figure, "Seconds of a step by part"),
            "Seconds of a step, averaged over steps and seeds; “other” is what the total has "
            f"beyond these parts.{peak}",
        )

    def samples(self) -> str:
        """A few rollouts of each arm's first seed, from its first and last step with samples."""
        rows: list[list[str]] = []
        per_step = min(SAMPLES_PER_STEP, max(1, SAMPLE_ROWS // (2 * len(self.study.arms))))
        for arm in self.study.arms:
            run = next((run for run in arm.runs if run.samples), None)
            if run is None:
                continue
            steps = [sample.step for sample in run.samples]
            for step in dict.fromkeys((min(steps), max(steps))):
                chosen = [sample for sample in run.samples if sample.step == step]
                rows += [self._sample(arm, sample) for sample in chosen[:per_step]]
        header = ["Arm", "Step", "Cluster, user", "Prompt", "Completion", "Reward", "Advantage"]
        return (
            section(
                "Samples",
                table(header, rows, numeric=(1, 5, 6), text=(3, 4)),
                f"At most {plural(per_step, 'logged rollout')} of the first and of the last step "
                "of one seed of each arm: an impression, not a measurement. Long texts open on a "
                "click.",
            )
            if rows
            else ""
        )

    def settings(self) -> str:
        """What the arms differ in, then all the rest."""
        arms, runs = self.study.arms, self.study.runs
        keys = dict.fromkeys(key for run in runs for key in run.settings)
        differing = set(differing_settings(runs))
        seeds = [
            k for k in keys if k not in differing and len({r.settings.get(k) for r in runs}) > 1
        ]

        def values(key: str, members: Sequence[Run]) -> str:
            found = dict.fromkeys(run.settings.get(key, "–") for run in members)
            return escape(", ".join(found))

        header = ["Setting", *(escape(arm.name) for arm in arms)]
        rows = [
            [escape(key), *(values(key, arm.runs) for arm in arms)]
            for key in (*(k for k in keys if k in differing), *seeds)
        ]
        rest = [
            [escape(key), values(key, runs)] for key in keys if key not in differing | set(seeds)
        ]
        body = table(header, rows, code=(0,)) if rows else ""
        body += (
            f"<details><summary>{plural(len(rest), 'setting')} common to all runs</summary>"
            f"{table(['Setting', 'Value'], rest, code=(0,))}</details>"
            if rest
            else ""
        )
        return (
            section("Settings", body, "What the runs differ in first.")
            if rows
            else section("Settings", body)
        )

    def environment(self) -> str:
        """Where the runs ran, and the runs themselves."""
        infos = [run.info for run in self.study.runs]
        packages = dict.fromkeys(name for info in infos for name in info.versions)
        facts: dict[str, list[str]] = {
            "Processor": [info.processor for info in infos],
            "Threads": [str(info.num_threads or "–") for info in infos],
            "Precision": [info.precision for info in infos],
            "Parameters": [
                f"{info.num_parameters:,}" if info.num_parameters else "–" for info in infos
            ],
            **{name: [info.versions.get(name, "–") for info in infos] for name in packages},
        }
        rows = [
            [escape(name), escape(" / ".join(dict.fromkeys(found)))]
            for name, found in facts.items()
        ]
        runs = [
            [
                escape(run.name),
                escape(arm.name),
                escape(run.settings.get("run.seed", "–")),
                escape(run.info.status),
                str(run.steps[-1].step),
                escape(run.info.started.replace("T", " ")[:19]),
            ]
            for arm in self.study.arms
            for run in arm.runs
        ]
        header = ["Run", "Arm", "Seed", "Status", "Steps", "Started"]
        return section(
            "Environment", table(["", ""], rows) + "<br>" + table(header, runs, numeric=(2, 4))
        )

    def _arm_lines(self, read: Read) -> list[Line]:
        curves = {arm.name: self.study.curve(arm, read) for arm in self.study.arms}
        return [Line(name, self.arm_colors[name], curve) for name, curve in curves.items() if curve]

    def _small(
        self, quantities: Mapping[str, tuple[str, Read]], shares: set[str] | None = None
    ) -> str:
        """A grid of small charts, one per quantity that any run has."""
        panels = ""
        for name, (about, read) in quantities.items():
            drawn = self._arm_lines(read)
            if drawn:
                figure = figures.lines(drawn, 210, raw=self.raw, percent=name in (shares or ()))
                panels += (
                    f'<div class="panel"><h3>{name}</h3><p class="about">{about}</p>'
                    f"{self._place(figure, name)}</div>"
                )
        return panels and f'<div class="grid">{panels}</div>'

    def _panel(self, cluster: str, figure: Figure, label: str) -> str:
        """A chart of one cluster under its name, share and description."""
        info = self.study.clusters[cluster]
        badge = '<span class="badge">smallest</span>' if cluster == self.study.minority else ""
        share = f'<span class="share">{percent(info.share)}</span>' if info.share > 0 else ""
        users = [plural(info.num_users, "user")] if info.num_users else []
        about = " · ".join([*users, *([figures.shorten(info.about, 140)] if info.about else [])])
        return (
            f'<div class="panel"><h3>{swatch(self.cluster_colors[cluster])}'
            f"{escape(figures.shorten(cluster, 30))}{share}{badge}</h3>"
            f'<p class="about" title="{escape(info.about)}">{escape(about)}</p>'
            f"{self._place(figure, f'{label} of cluster {cluster}')}</div>"
        )

    def _place(self, figure: Figure, label: str) -> str:
        """A chart's place in the page."""
        name = f"figure-{len(self.charts)}"
        self.charts[name] = figure
        height = figure["layout"]["height"]
        return (
            f'<div class="figure" id="{name}" role="img" aria-label="{escape(label)}" '
            f'style="height:{height}px"></div>'
        )

    def _drawing(self) -> str:
        """How curves over the steps are drawn, said in full once."""
        if self.explained:
            return "Lines, bands and points as above."
        self.explained = True
        width = self.study.smoothing
        smooth = (
            f"centred moving mean over {plural(width, 'step')}"
            if width > 1
            else "each step's value"
        )
        counts = {len(arm.runs) for arm in self.study.arms}
        bands = [
            *(["the range of two seeds"] if 2 in counts else []),
            *(["mean ± 1.96 standard errors over three seeds or more"] if max(counts) > 2 else []),
        ]
        band = f" Bands: {enumerate_words(bands)}." if bands else ""
        alone = " One seed has no band." if 1 in counts else ""
        points = " Faint points: unsmoothed." if width > 1 and self.raw else ""
        return f"Lines: {smooth}, averaged over seeds.{band}{alone}{points}"

    def _scales(self, held_out: bool = False) -> str:
        """Whether rewards of different clusters may be compared."""
        personas = self.study.runs[0].settings.get("data.name") == "personas"
        if personas and not (held_out and self.study.own_evaluation):
            return (
                "Personas are rewarded on scales of their own: differences between them are mostly "
                "differences of scale."
            )
        return "Comparing clusters presumes that their rewards are on one scale."

    def _shares(self) -> str:
        """A warning where clusters of one name are not the same in all runs."""
        shares: dict[str, list[float]] = {}
        for run in self.study.runs:
            for name, info in run.info.clusters.items():
                shares.setdefault(name, []).append(info.share)
        if any(max(found) - min(found) > 0.02 for found in shares.values()):
            return (
                " Shares of clusters differ between the runs: a name need not mean the same users "
                "in each, and the shares shown are averages."
            )
        return ""

    def _sample(self, arm: Arm, sample: Sample) -> list[str]:
        cluster = "–" if sample.cluster_id is None else str(sample.cluster_id)
        dot = swatch(self.cluster_colors[cluster]) if cluster in self.cluster_colors else ""
        user = "" if sample.user is None else f"<small>{escape(str(sample.user))}</small>"
        return [
            swatch(self.arm_colors[arm.name]) + escape(arm.name),
            str(sample.step),
            f"{dot}{escape(figures.shorten(cluster, 18))}{user}",
            folded(sample.prompt, 160),
            folded(sample.completion, 120),
            _maybe(sample.reward),
            _maybe(sample.advantage),
        ]


def _seeds(arm: Arm) -> str:
    seeds = [run.settings.get("run.seed", "–") for run in arm.runs]
    return f"{len(seeds)}<small>{escape(', '.join(seeds))}</small>"


def _maybe(x: float | None) -> str:
    return "–" if x is None else number(x)


def _mean_over_steps(run: Run, read: Read) -> float:
    values = [v for v in map(read, run.steps) if v is not None and math.isfinite(v)]
    return float(np.mean(values)) if values else math.nan


def _bare(curve: Curve) -> Curve:
    none = np.full_like(curve.mean, math.nan)
    return Curve(curve.steps, curve.mean, none, none, none)


def _asset(name: str) -> str:
    return files("pgrpo.report").joinpath(name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    digest = hashlib.sha256(script.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
