"""The page of a reproduction: what every arm got in every setting, and which claims stand."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pgrpo.report import figures
from pgrpo.report.ability import PARTS, changes, notes
from pgrpo.report.blocks import Block, Cell, Charts, Section, Table, estimate, legend, section
from pgrpo.report.context import ABOUT_RULES
from pgrpo.report.page import document
from pgrpo.report.statistics import Difference, Estimate, over_seeds
from pgrpo.report.study import Paired
from pgrpo.report.verdict import Verdict, enumerate_words, number, plural
from pgrpo.runs.judgement import ShareRecord
from pgrpo.runs.reproduction import ClaimRecord, FigureRecord, RowRecord

COLORS = {
    "better": "#1f9d6b",
    "reached": "#1f9d6b",
    "worse": "#d64550",
    "level": "#a3a3a3",
    "not shown": "#a3a3a3",
    "not known": "",
}
"""Of verdicts."""


@dataclass(frozen=True)
class Page:
    """All that a page is made of."""

    name: str
    about: str
    axis: str
    """What the settings vary."""
    rows: Sequence[RowRecord]
    claims: Sequence[ClaimRecord]
    records: Mapping[tuple[str, str, int], FigureRecord]
    """By setting, arm and seed."""
    rules: Mapping[str, Mapping[str, float]]
    """Setting -> what simple rules get on the same prompts, by their names."""
    num_planned: int
    """Cells of the grid times seeds."""
    commands: Sequence[str]
    """That train the same runs."""

    @property
    def runs(self) -> list[FigureRecord]:
        """Each that was trained once, however many cells it is in."""
        return list({found.run: found for found in self.records.values()}.values())


def verdict(page: Page) -> Verdict:
    """What the primary claims came to, and how many looks there were."""
    primary = [claim for claim in page.claims if claim.primary]
    told = [_said(claim) for claim in primary]
    looks = [claim for claim in page.claims if not claim.primary]
    counts = [
        f"{sum(claim.verdict == outcome for claim in looks)} {outcome}"
        for outcome in COLORS
        if any(claim.verdict == outcome for claim in looks)
    ]
    sentences = told[1:]
    if looks:
        sentences.append(
            f"{plural(len(looks), 'look')} beside that: {enumerate_words(counts)}. About one in twenty "
            "comes out better or worse where the two are really level, and looks share arms."
        )
    missing = page.num_planned - len(page.records)
    if missing:
        sentences.append(f"{missing} of {page.num_planned} figures are not there yet.")
    measured = {found.key: found.measuring_s for found in page.records.values()}
    hours = (sum(found.seconds for found in page.runs) + sum(measured.values())) / 3600
    sentences.append(f"{plural(len(page.runs), 'run')} took {hours:.2f} hours.")
    return Verdict(told[0] if told else "No primary question is asked here.", tuple(sentences))


def render(page: Page) -> str:
    """The page as one HTML document that loads nothing from outside itself."""
    made = _Sections(page)
    sections = [
        made.grid(),
        made.claims(),
        made.wins(),
        made.people(),
        made.rules(),
        made.ability(),
        *made.curves(),
        made.how(),
    ]
    runs = page.runs
    seeds = {row.seed for row in page.rows}
    facts = [plural(len(runs), "run"), plural(len(seeds), "seed")]
    if runs:
        people = len(set(runs[0].users))
        facts.append(f"{len(runs[0].users):,} held-out prompts of {people:,} people")
        facts.append(enumerate_words(sorted({found.precision for found in runs})))
    versions = {found.versions.get("pgrpo", "of unknown version") for found in runs}
    return document(
        title=f"Reproduction: {page.name}",
        facts=" · ".join(facts),
        verdict=verdict(page),
        sections=[found for found in sections if found is not None],
        charts=made.charts,
        version=enumerate_words(sorted(versions)),
    )


class _Sections(Charts):
    """The sections of one page."""

    def __init__(self, page: Page) -> None:
        super().__init__()
        self.page = page
        self.seeds = list(dict.fromkeys(row.seed for row in page.rows))
        self.settings = list(dict.fromkeys(row.setting for row in page.rows))
        arms = list(dict.fromkeys(row.arm for row in page.rows))
        self.colors = figures.arm_colors(arms)
        self.cells: dict[tuple[str, str], list[RowRecord]] = {}
        for row in page.rows:
            self.cells.setdefault((row.setting, row.arm), []).append(row)

    def grid(self) -> Section | None:
        """Every cell with its seeds."""
        if not self.cells:
            return None
        rows: list[Sequence[Cell | str]] = []
        for setting in self.settings:
            for arm, color in self.colors.items():
                if found := self.cells.get((setting, arm)):
                    rows.append([setting, Cell(arm, color), *self._numbers(found)])
        header = ["Setting", "Arm", "Mean", "Median", *(f"Seed {seed}" for seed in self.seeds)]
        header += ["Steps", "Rollouts", "Minutes"]
        numbers = dict.fromkeys(range(2, len(header)), "n")
        ruled = dict.fromkeys(name for rules in self.page.rules.values() for name in rules)
        marks = [f"{glyph} {name}" for glyph, name in zip(figures.LEVEL_MARKS, ruled, strict=False)]
        return section(
            "Held-out reward",
            [legend(self.colors), *self._drawn(), Table(header, rows, numbers, sorts=True)],
            f"{self.page.about[:1].upper()}{self.page.about[1:]}.",
            "Of the last step, over held-out prompts. Means over the seeds with their standard "
            "errors; a dash where the rule has no signal.",
            f"Grey: {enumerate_words(marks)}." if marks else "",
            "Minutes are of training, the run's own evaluations included: a mean over the seeds.",
        )

    def _numbers(self, rows: Sequence[RowRecord]) -> list[Cell | str]:
        by_seed = {row.seed: row for row in rows}
        each = [_value(by_seed[s].figure) if s in by_seed else math.nan for s in self.seeds]
        known = [figure for figure in each if math.isfinite(figure)]
        minutes = [row.minutes for row in rows if row.minutes is not None]
        first = rows[0]
        return [
            estimate(over_seeds(each)),
            number(statistics.median(known) if known else math.nan),
            *map(number, each),
            "–" if first.steps is None else f"{first.steps:,}",
            "–" if first.rollouts is None else f"{first.rollouts:,}",
            f"{statistics.fmean(minutes):.1f}" if minutes else "–",
        ]

    def _drawn(self) -> list[Block]:
        """Means by setting, in their order, arms beside each other."""
        drawn: list[figures.Dots] = []
        for lane, (arm, color) in enumerate(self.colors.items()):
            aside = 0.7 * ((lane + 0.5) / len(self.colors) - 0.5)
            known = [
                (place + aside, over_seeds([_value(row.figure) for row in rows]))
                for place, setting in enumerate(self.settings)
                if (rows := self.cells.get((setting, arm)))
            ]
            known = [(place, mean) for place, mean in known if math.isfinite(mean.mean)]
            if known:
                drawn.append(figures.Dots(arm, color, *map(list, zip(*known, strict=True))))
        if not drawn:
            return []
        of_rules = [self.page.rules.get(setting, {}) for setting in self.settings]
        levels = {
            name: [rules.get(name, math.nan) for rules in of_rules]
            for name in dict.fromkeys(name for rules in of_rules for name in rules)
        }
        figure = figures.over_settings(drawn, levels, self.settings, self.page.axis)
        return [self.place(figure, f"Held-out reward over {self.page.axis}")]

    def people(self) -> Section | None:
        """What the mean over people does not tell."""
        rows: list[Sequence[Cell | str]] = [
            [
                setting,
                Cell(arm, self.colors[arm]),
                estimate(over_seeds([_value(row.expected) for row in known])),
                estimate(
                    over_seeds([min(row.clusters.values(), default=math.nan) for row in known])
                ),
                estimate(
                    over_seeds([max(row.clusters.values(), default=math.nan) for row in known])
                ),
                estimate(over_seeds([_value(row.commonest) for row in known])),
            ]
            for (setting, arm), found in self.cells.items()
            if (known := [row for row in found if row.figure is not None])
        ]
        if not rows:
            return None
        header = [
            "Setting",
            "Arm",
            "Exact mean",
            "Worst cluster",
            "Best cluster",
            "Commonest answer",
        ]
        return section(
            "Who gets how much, and how sure it is",
            [Table(header, rows, dict.fromkeys(range(2, len(header)), "n"), sorts=True)],
            "The exact mean is what the policy would get on average if it drew its answers at "
            "temperature 1, where answers are single tokens. Worst and best cluster are those of "
            "each run, by the clusters of the base config: the same people in all settings.",
            "Where the commonest answer has nearly all of the share, the policy says one thing to "
            "everybody: such runs carry the means of their arm.",
        )

    def rules(self) -> Section | None:
        """What a policy would have to beat."""
        shown = {setting: self.page.rules.get(setting, {}) for setting in self.settings}
        names = list(dict.fromkeys(name for rules in shown.values() for name in rules))
        if not names:
            return None
        rows: list[Sequence[Cell | str]] = [
            [setting, *(number(rules.get(name, math.nan)) for name in names)]
            for setting, rules in shown.items()
            if rules
        ]
        header = ["Setting", *(f"{name[:1].upper()}{name[1:]}" for name in names)]
        return section(
            "What simple rules get",
            [Table(header, rows, dict.fromkeys(range(1, len(header)), "n"))],
            f"On the same held-out prompts. {ABOUT_RULES} Clusters are those of the base config.",
        )

    def wins(self) -> Section | None:
        """How often which answer was the better one, of the primary questions."""
        rows: list[Sequence[Cell | str]] = []
        for claim in self.page.claims:
            if claim.wins is None:
                continue
            same = claim.after == claim.before
            after, before = " ".join(claim.after), " ".join(claim.before)
            winners = {
                "a": "one seed" if same else after,
                "b": "the other seed" if same else before,
                "level": "level",
            }
            of_clusters = [(f"cluster {name}", x) for name, x in claim.wins_of_clusters.items()]
            for people, found in [("all", claim.wins), *of_clusters]:
                rows.append(
                    [
                        claim.what if found is claim.wins else "",
                        people,
                        f"{found.num_pairs:,}",
                        *map(_share, (found.win, found.tie, found.loss, found.decided)),
                        winners[found.winner],
                    ]
                )
        if not rows:
            return None
        header = ["Question", "People", "Pairs", "Wins", "Ties", "Losses", "Of decided", "Winner"]
        return section(
            "Win rates",
            [Table(header, rows, {0: "text", **dict.fromkeys(range(2, 7), "n")})],
            "Prompt by prompt and seed by seed, the answer wins whose reward is higher: wins are those "
            "of the arm that a question names first. Shares have 95 % intervals that know seeds and "
            "people; there is a winner where that of the decided pairs leaves out a half.",
        )

    def ability(self) -> Section | None:
        """What the models could do besides, before and after."""
        runs = [found for found in self.page.runs if len(found.ability) == 2]
        if not runs:
            return None
        rows: list[Sequence[Cell | str]] = []
        for found in runs:
            told = {change.name: change for change in changes(*found.ability)}
            rows.append(
                [
                    found.run,
                    *(
                        Cell(
                            f"{told[name].before} → {told[name].after}", small=[told[name].verdict]
                        )
                        if name in told
                        else "–"
                        for name in PARTS.values()
                    ),
                ]
            )
        header = ["Run", *(name.capitalize() for name in PARTS.values())]
        return section(
            "General ability, before and after",
            [Table(header, rows, dict.fromkeys(range(1, len(header)), "n"))],
            *notes(),
            "Where nothing has changed, some two in a hundred of these differences exceed two standard "
            "errors all the same.",
        )

    def claims(self) -> Section | None:
        """What was asked beforehand, and the answers."""
        claims = self.page.claims
        if not claims:
            return None
        rows: list[Sequence[Cell | str]] = [
            [
                Cell(claim.what, small=_kind(claim)),
                " ".join(claim.after),
                " ".join(claim.before),
                number(_value(claim.mean), sign=True),
                _interval(claim),
                " ".join(number(change, sign=True) for change in claim.each),
                _exact(claim),
                Cell(
                    claim.verdict,
                    COLORS[claim.verdict],
                    small=[] if claim.margin is None else [f"margin {number(claim.margin)}"],
                ),
            ]
            for claim in claims
        ]
        header = ["Question", "After", "Before", "After − before", "95 % interval", "Each seed"]
        header += ["Exact means", ""]
        blocks: list[Block] = []
        known = [claim for claim in claims if claim.each]
        if known:
            figure = figures.differences(
                [claim.what for claim in known],
                [Paired(claim.each, _difference(claim)) for claim in known],
            )
            blocks.append(self.place(figure, "Differences with their intervals"))
        return section(
            "What was asked before the runs",
            [*blocks, Table(header, rows, {0: "text", 3: "n", 4: "n", 5: "n", 6: "n"})],
            "Better or worse where the whole interval is above or below zero, otherwise level. Where "
            "the question is whether one reaches the other, the interval has to be above minus the "
            "margin: reached, or not shown.",
            "Differences are taken by seed and held-out prompt. At either end the interval is the "
            "wider of two: of a bootstrap that draws seeds and, on their own, people with all their "
            "prompts, and Student's of the seeds' means. Fewer than two seeds tell nothing, nor do "
            "cells that were asked different prompts. Beside each seed stands the same difference of "
            "exact means, a look: verdicts do not rest on it.",
            f"There are {plural(len(claims), 'question')}, and each interval holds by itself: those "
            "marked primary are what this was run for, all others are looks.",
            "It speaks for this data set, its split and its clusters, which all seeds share.",
        )

    def curves(self) -> list[Section]:
        """Evaluations along the runs, over steps and rollouts, of settings with more than three."""
        found: list[Section] = []
        for setting in self.settings:
            of_arm = {
                arm: [r for (s, a, _), r in self.page.records.items() if (s, a) == (setting, arm)]
                for arm in self.colors
            }
            most = max((len(r.curve) for records in of_arm.values() for r in records), default=0)
            if most <= 3:
                continue
            # Figures of other reproductions, where runs are evaluated less often, have no curve.
            of_arm = {arm: [r for r in rs if len(r.curve) == most] for arm, rs in of_arm.items()}
            of_arm = {arm: records for arm, records in of_arm.items() if records}
            blocks: list[Block] = [legend({arm: self.colors[arm] for arm in of_arm})]
            for title, place in _AXES.items():
                drawn = [
                    figures.Dots(arm, self.colors[arm], *_along(records, place))
                    for arm, records in of_arm.items()
                ]
                figure = figures.evaluations(drawn, self.page.rules.get(setting, {}), title)
                blocks.append(self.place(figure, f"{setting}: held-out reward over {title}s"))
            found.append(
                section(
                    f"{setting}: along the runs",
                    blocks,
                    "By the runs' own evaluations (run.eval_prompts prompts): means over the seeds "
                    "with standard errors, for looks. The learning rate has come down at the end only.",
                )
            )
        return found

    def how(self) -> Section:
        """The commands."""
        rows = [[Cell(command)] for command in self.page.commands]
        return section(
            "How to run it again",
            [Table([""], rows, {0: "key"})],
            "Each line trains the runs of a setting, by pgrpo compare. Runs that come to the same are "
            "trained once and stand in every setting they belong to; these would train them for each. "
            "The pages of the settings are runs/SETTING/report.html.",
        )


_AXES: Mapping[str, Callable[[FigureRecord, int], float]] = {
    "step": lambda _record, step: float(step),
    "rollout": lambda record, step: step * record.rollouts / record.steps,
}


def _along(
    records: Sequence[FigureRecord], place: Callable[[FigureRecord, int], float]
) -> tuple[list[float], list[Estimate]]:
    steps = sorted({step for record in records for step in record.curve})
    return (
        [place(records[0], step) for step in steps],
        [over_seeds([r.curve[step] for r in records if step in r.curve]) for step in steps],
    )


def _said(claim: ClaimRecord) -> str:
    what = f"{claim.what[:1].upper()}{claim.what[1:]}: {claim.verdict}"
    if claim.low is None:
        return f"{what}."
    return f"{what} ({number(_value(claim.mean), sign=True)}, 95 % interval {_interval(claim)})."


def _difference(claim: ClaimRecord) -> Difference | None:
    if claim.mean is None or claim.low is None or claim.high is None:
        return None
    return Difference(claim.mean, claim.low, claim.high)


def _interval(claim: ClaimRecord) -> str:
    found = _difference(claim)
    if found is None:
        return "–"
    return f"{number(found.low, sign=True)} to {number(found.high, sign=True)}"


def _share(found: ShareRecord) -> Cell | str:
    if found.share is None or found.low is None or found.high is None:
        return "–"
    return Cell(number(found.share), small=[f"{number(found.low)} to {number(found.high)}"])


def _kind(claim: ClaimRecord) -> list[str]:
    return [
        *(["primary"] if claim.primary else []),
        *([] if claim.cluster is None else [f"people of cluster {claim.cluster}"]),
    ]


def _exact(claim: ClaimRecord) -> str:
    found = claim.expected
    if found is None:
        return "–"
    low, high = number(found.low, sign=True), number(found.high, sign=True)
    return f"{number(found.mean, sign=True)} ({low} to {high})"


def _value(x: float | None) -> float:
    return math.nan if x is None else x
