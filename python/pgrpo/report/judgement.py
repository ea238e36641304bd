"""The page of a judgement: who won with whom, how far the judge can be trusted, and some pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version

from pgrpo.report import figures
from pgrpo.report.blocks import Block, Cell, Charts, Folded, Section, Table, folded, legend, section
from pgrpo.report.page import document
from pgrpo.report.verdict import Verdict, enumerate_words, isolated, percent, plural
from pgrpo.runs.judgement import (
    ContestantRecord,
    JudgementRecord,
    PairRecord,
    RatesRecord,
    ShareRecord,
    Winner,
)
from pgrpo.runs.metrics import one_of_each

TIE_COLOR = "#a3a3a3"
EVERYBODY = "everybody"
DRAWN = 24
"""Clusters that are drawn; the table has all."""
RULES = {
    "endpoint": "Each pair was shown in both orders. A run won it where both votes name it; all else "
    "is a tie, also votes that contradict each other.",
    "reward": "A reward scores each answer by itself, so that there is no order: the higher one wins, "
    "equal ones tie.",
}
"""How a pair is won, by the kind of judge."""
EXAMPLES = 12
"""Pairs that are shown: an impression, not a measurement."""


def verdict(record: JudgementRecord) -> Verdict:
    """Who won, as far as intervals tell, and what speaks for and against the judge."""
    overall, a, b = record.overall, record.a.name, record.b.name
    if not overall.num_pairs:
        return Verdict("No pair was judged.", tuple(_gaps(record)))
    match overall.winner:
        case "a":
            headline = f"{a} won against {b}."
        case "b":
            headline = f"{b} won against {a}."
        case "level":
            headline = f"{a} and {b} are level."
    people = "" if overall.num_people == overall.num_pairs else f" of {_people(overall)}"
    said = [
        (
            f"Of {plural(overall.num_pairs, 'pair')}{people}, {a} won {_share(overall.win)}, {b} won "
            f"{_share(overall.loss)}, and {_share(overall.tie)} were ties."
        )
    ]
    if overall.wins + overall.losses:
        said.append(f"Of the decided pairs {a} won {_with_interval(overall.decided)}.")
    if record.matches:
        said.append(_by_seed(record))
    return Verdict(
        headline, (*said, *_by_cluster(record), *_trust(record), *_gaps(record), *record.notes)
    )


def render(
    record: JudgementRecord, pairs: Sequence[PairRecord], criteria: Mapping[str, str]
) -> str:
    """The page as one HTML document that loads nothing from outside itself.

    Args:
        record: all numbers.
        pairs: of which some are shown.
        criteria: by which a language model judged; empty for a reward.
    """
    page = _Page(record)
    sections = [page.clusters(), page.seeds(), page.trust(), page.examples(pairs)]
    sections.append(page.how(criteria))
    how = f"{plural(record.num_samples, 'sample')} each" if record.num_samples else "greedy"
    facts = [
        plural(record.num_pairs, "pair"),
        f"{plural(record.num_prompts, 'held-out prompt')}, {how}",
        plural(len(record.clusters), "cluster"),
        f"judge: {record.judge}",
    ]
    if record.matches:
        facts.insert(0, f"{len(record.matches)} pairs of runs")
    return document(
        title=f"{record.a.name} against {record.b.name}",
        facts=" · ".join(facts),
        verdict=verdict(record),
        sections=[found for found in sections if found is not None],
        charts=page.charts,
        version=version("pgrpo"),
    )


class _Page(Charts):
    """The sections of one page."""

    def __init__(self, record: JudgementRecord) -> None:
        super().__init__()
        self.record = record
        names = [record.a.name, record.b.name]
        self._a, self._b = names
        self._colors = figures.arm_colors(names)

    def clusters(self) -> Section | None:
        """Who won with whose people."""
        record = self.record
        if not record.overall.num_pairs:
            return None
        everybody = EVERYBODY
        while everybody in record.clusters:
            # Data may call a cluster so.
            everybody = f"all: {everybody}"
        listed = {everybody: record.overall, **record.clusters}
        rows = dict(list(listed.items())[: 1 + DRAWN])
        names = [f"{figures.shorten(name, 24)} ({r.num_pairs})" for name, r in rows.items()]
        colors = {
            f"{self._a} won": self._colors[self._a],
            "tie": TIE_COLOR,
            f"{self._b} won": self._colors[self._b],
        }
        outcomes = figures.outcomes(
            names,
            {
                name: ([_value(getattr(r, part)) for r in rows.values()], color)
                for (name, color), part in zip(colors.items(), ("win", "tie", "loss"), strict=True)
            },
        )
        blocks: list[Block] = [
            legend(colors),
            self.place(outcomes, "Wins, ties and losses of each cluster"),
        ]
        if record.overall.decided.share is not None:
            decided = figures.intervals(
                names,
                [(_value(r.decided), r.decided.low, r.decided.high) for r in rows.values()],
                self._colors[self._a],
                f"share of decided pairs that {self._a} won",
            )
            blocks.append(self.place(decided, f"Share of decided pairs that {self._a} won"))
        blocks.append(self._table(listed))
        return section(
            "Who won with whom",
            blocks,
            RULES[record.kind],
            "The largest cluster first; in brackets how many pairs were judged. Where the middle of "
            f"the ties lies right of the dashed half, {self._a} won more pairs than {self._b}.",
            "A winner is named where the 95 % interval of the decided pairs excludes a half; otherwise "
            "the two are level. Each interval holds by itself: of twenty clusters in which the two are "
            "really level, one is called won.",
            "Where people have several pairs, which are not independent, the interval is that of as "
            "many independent ones as they are worth, by how people differ (“worth”)."
            if not record.matches and any(r.num_people < r.num_pairs for r in listed.values())
            else "",
            "Over pairs of runs an interval is at either end the farthest of three: that of people, "
            "each with all their pairs; of a bootstrap that draws seeds and, on their own, people; and "
            "Student's of the seeds' shares."
            if record.matches
            else "",
            f"Of {len(record.clusters)} clusters the {DRAWN} largest are drawn."
            if len(record.clusters) > DRAWN
            else "",
        )

    def seeds(self) -> Section | None:
        """Every pair of runs by itself."""
        if not self.record.matches:
            return None
        names = {"a": self._a, "b": self._b, "level": "level"}
        colors = {"a": self._colors[self._a], "b": self._colors[self._b], "level": ""}
        rows: list[Sequence[Cell | str]] = [
            [
                Cell(f"{match.a.name} and {match.b.name}", small=[f"{match.folder}/judge.html"]),
                str(match.overall.num_pairs),
                *map(_estimate, (match.overall.win, match.overall.tie, match.overall.loss)),
                _decided(match.overall),
                Cell(names[match.overall.winner], colors[match.overall.winner]),
            ]
            for match in self.record.matches
        ]
        header = ["Runs", "Pairs", f"{self._a} won", "Ties", f"{self._b} won"]
        header += ["Of decided pairs", "Outcome"]
        return section(
            "Each pair of runs",
            [Table(header, rows, dict.fromkeys(range(1, 6), "n"))],
            "By themselves: these intervals know people and not seeds, so that they tell of two "
            "policies and nothing of the arms. What they disagree on is what seeds do.",
        )

    def trust(self) -> Section | None:
        """What tells of the judge, not of the runs."""
        record = self.record
        rows: list[Sequence[Cell | str]] = []
        if record.kind == "endpoint":
            rows += [
                ["Same vote in both orders", *_cells(record.consistent), "of the pairs asked for"],
                [
                    "Same place twice",
                    str(record.flipped),
                    "–",
                    "pairs: first in both orders, or second",
                ],
                [
                    "First place preferred",
                    *_cells(record.first),
                    "of the votes for one of the two; a half where order does not count",
                ],
            ]
        if record.num_compared:
            rows.append(
                [
                    "Winner has the higher held-out reward",
                    *_cells(record.agreement),
                    f"of {plural(record.num_compared, 'decided pair')} whose held-out rewards differ",
                ]
            )
        rows += [
            [name, str(number), "–", what]
            for name, number, what in (
                ("Equal texts", record.num_identical, "pairs, which tie without being asked for"),
                (
                    "No verdict",
                    record.num_unreadable,
                    "pairs with a reply or reward that says none",
                ),
                ("Not to be had", record.num_failed, "pairs; the same command asks for them again"),
                ("Not asked for", record.num_unasked, "pairs that the budget left no room for"),
            )
            if number
        ]
        if not rows:
            return None
        return section(
            "How far the judge can be trusted",
            [Table(["", "", "95 % interval", ""], rows, {1: "n", 2: "n"})],
        )

    def examples(self, pairs: Sequence[PairRecord]) -> Section | None:
        """Some pairs, of every outcome and cluster in turn."""
        shown = one_of_each(
            [pair for pair in pairs if pair.outcome is not None and pair.a != pair.b],
            lambda pair: (pair.outcome, pair.cluster),
        )[:EXAMPLES]
        if not shown:
            return None
        rows: list[list[Cell | str]] = []
        for pair in shown:
            assert pair.outcome is not None
            color = {"a": self._colors[self._a], "b": self._colors[self._b], "tie": TIE_COLOR}
            votes = [f"first vote {self._said(pair.votes[0])}"] if len(pair.votes) == 2 else []
            votes += [f"second vote {self._said(pair.votes[1])}"] if votes else []
            if pair.votes and pair.votes[0] == pair.votes[1]:
                votes = []
            rows.append(
                [
                    Cell(figures.shorten(pair.cluster, 18), small=[pair.user]),
                    folded(pair.prompt, 160),
                    _answer(pair, 0),
                    _answer(pair, 1),
                    Cell(self._said(pair.outcome), color[pair.outcome], small=votes),
                    folded("\n".join(" ".join(reply.split()) for reply in pair.replies), 120),
                ]
            )
        header = ["Cluster, user", "Prompt", self._a, self._b, "Winner", "The judge's words"]
        if not any(pair.replies for pair in shown):
            header, rows = header[:-1], [row[:-1] for row in rows]
        return section(
            "Some pairs",
            [Table(header, rows, dict.fromkeys((1, 2, 3, 5), "text"))],
            f"At most {EXAMPLES}, of every outcome and cluster in turn: an impression, not a "
            "measurement. Long texts open on a click; all pairs are in pairs.jsonl.",
        )

    def how(self, criteria: Mapping[str, str]) -> Section:
        """What was judged by whom, and what it took."""
        record, usage = self.record, self.record.usage
        rows: list[list[Cell | str]] = [
            ["A", self._a, _where(record.a)],
            ["B", self._b, _where(record.b)],
            ["Judge", record.judge, record.kind],
        ]
        if record.kind == "endpoint":
            tokens = (
                f"{usage.prompt_tokens:,} tokens of prompts, {usage.completion_tokens:,} of replies"
            )
            rows.append(["Questions", f"{usage.requests:,}", tokens])
            if usage.cost is not None:
                told = "each by the prices that were told when it was paid for"
                if usage.priced_now:
                    told += f"; {usage.priced_now:,} without any, by the prices of the last call"
                if usage.unpriced:
                    told += f"; {usage.unpriced:,} more of which no cost is known"
                rows.append(["Cost", f"{usage.cost:.4g}", told])
        blocks: list[Block] = [Table(["", "", ""], rows, {2: "text"})]
        if criteria:
            table = Table(["Criterion", ""], [[k, v] for k, v in criteria.items()], {1: "text"})
            blocks.append(Folded("What the judge was asked to compare by", table))
        note = "Questions, tokens and cost are those of all opinions in the folder."
        return section(
            "What was judged",
            blocks,
            f"Of {len(record.matches)} pairs of runs, which differ in their seeds."
            if record.matches
            else "Of two policies. Whether methods make the difference takes several seeds of each.",
            note if record.kind == "endpoint" else "",
        )

    def _table(self, rows: Mapping[str, RatesRecord]) -> Table:
        header = ["Cluster", "People", "Pairs", f"{self._a} won", "Ties", f"{self._b} won"]
        header += ["Of decided pairs", "Outcome", "Who they are"]
        colors = {"a": self._colors[self._a], "b": self._colors[self._b], "level": ""}
        names = {"a": self._a, "b": self._b, "level": "level"}
        return Table(
            header,
            [
                [
                    figures.shorten(name, 30),
                    str(r.num_people),
                    str(r.num_pairs),
                    *map(_estimate, (r.win, r.tie, r.loss)),
                    _decided(r),
                    Cell(names[r.winner], colors[r.winner]),
                    figures.shorten(self.record.about.get(name, ""), 140),
                ]
                for name, r in rows.items()
            ],
            {**dict.fromkeys(range(1, 7), "n"), 8: "text"},
            sorts=True,
        )

    def _said(self, winner: Winner | None) -> str:
        return {"a": self._a, "b": self._b, "tie": "tie", None: "none"}[winner]


def _where(contestant: ContestantRecord) -> str:
    chosen = ", that of the best held-out reward" if contestant.best else ""
    step = "the runs of each seed" if contestant.step is None else f"step {contestant.step}"
    return f"{contestant.run}, {step}{chosen}"


def _by_seed(record: JudgementRecord) -> str:
    """What each pair of runs came to."""
    won = [match.overall.winner for match in record.matches]
    counts = {
        f"{record.a.name} won with": won.count("a"),
        f"{record.b.name} won with": won.count("b"),
        "they are level with": won.count("level"),
    }
    said = [f"{what} {number}" for what, number in counts.items() if number]
    return f"Of {len(won)} pairs of runs by themselves, {enumerate_words(said)}."


def _by_cluster(record: JudgementRecord) -> list[str]:
    """Clusters by who won with them."""
    if len(record.clusters) < 2:
        return []
    won: dict[str, list[str]] = {"a": [], "b": [], "level": []}
    for name, found in record.clusters.items():
        won[found.winner].append(name)
    said = [
        f"{run.name} won with {_clusters(won[side])}"
        for side, run in (("a", record.a), ("b", record.b))
        if won[side]
    ]
    if not said:
        return [f"By cluster they are level in all {len(record.clusters)}."]
    if won["level"]:
        said.append(f"they are level with {_clusters(won['level'])}")
    return [f"By cluster, {'; '.join(said)}."]


def _clusters(names: Sequence[str]) -> str:
    if len(names) > 4:
        return f"{len(names)} clusters"
    return enumerate_words([f"“{isolated(name)}”" for name in names])


def _trust(record: JudgementRecord) -> list[str]:
    said: list[str] = []
    if record.consistent.share is not None:
        said.append(
            f"The judge's vote was the same in both orders for {_share(record.consistent)} of the pairs"
            + (
                f", and for the first place in {_share(record.first)} of its votes for either."
                if record.first.share is not None
                else "."
            )
        )
    if record.num_compared:
        said.append(
            f"The winner has the higher held-out reward in {_share(record.agreement)} of the "
            f"{record.num_compared} decided pairs whose held-out rewards differ."
        )
    return said


def _gaps(record: JudgementRecord) -> list[str]:
    """Pairs that have no outcome."""
    gaps = {
        "have no verdict": record.num_unreadable,
        "could not be judged": record.num_failed,
        "were not asked for": record.num_unasked,
    }
    said = [f"{number} {what}" for what, number in gaps.items() if number]
    return [f"Of {plural(record.num_pairs, 'pair')}, {enumerate_words(said)}."] if said else []


def _answer(pair: PairRecord, which: int) -> Cell:
    cell = folded((pair.a, pair.b)[which], 160)
    small = [
        f"{name} {values[which]:.3f}"
        for name, values in (("reward", pair.rewards), ("held-out reward", pair.held_out))
        if values and values[which] is not None
    ]
    return Cell(cell.text, small=small, full=cell.full)


def _estimate(share: ShareRecord, *small: str) -> Cell:
    value, interval = _cells(share)
    return Cell(value, small=[interval, *small] if share.share is not None else [])


def _decided(found: RatesRecord) -> Cell:
    """Wins among the decided pairs, and what those are worth."""
    number, trials = found.wins + found.losses, found.decided.trials
    worth = f" worth {trials:.0f}" if trials is not None and trials != number else ""
    return _estimate(found.decided, f"of {number}{worth}")


def _cells(share: ShareRecord) -> tuple[str, str]:
    """A share, and its interval."""
    if share.share is None or share.low is None or share.high is None:
        return "–", "–"
    return percent(share.share), f"{percent(share.low)} to {percent(share.high)}"


def _share(share: ShareRecord) -> str:
    return _cells(share)[0]


def _with_interval(share: ShareRecord) -> str:
    value, interval = _cells(share)
    return f"{value} (95 % interval {interval})"


def _people(found: RatesRecord) -> str:
    return "one person" if found.num_people == 1 else f"{found.num_people} people"


def _value(share: ShareRecord) -> float:
    return float("nan") if share.share is None else share.share
