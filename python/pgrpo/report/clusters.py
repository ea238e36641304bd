"""The page about clusters that were found, before any run with them; and the file that runs load."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from pgrpo.clusters.analysis import HALVES, SAMPLE, Analysis, Candidate, ranks_of
from pgrpo.clusters.measures import PERMUTATIONS, RewardInformation, projection
from pgrpo.clusters.saved import FILE, VERSION
from pgrpo.config.sections import ClusteringConfig
from pgrpo.report import figures
from pgrpo.report.blocks import (
    Block,
    Cell,
    Charts,
    Grid,
    Key,
    Panel,
    Section,
    Table,
    estimate,
    folded,
    legend,
    section,
)
from pgrpo.report.page import document
from pgrpo.report.statistics import Estimate
from pgrpo.report.verdict import Verdict, enumerate_words, number, percent, plural
from pgrpo.runs.disk import disk_errors, replace_file
from pgrpo.runs.metrics import extremes
from pgrpo.types import ClusterId, Dataset, FloatArray

PAGE = "clusters.html"
"""What the page is called."""

EACH = 8
"""Clusters of each kind that a page shows, the largest, the smallest and the worst by reward or
silhouette, where there are more than all of these."""

DRAWN = 1500
"""People that the map and the silhouettes draw, at most: a point more would hide others."""

STRUCTURE = ((0.25, "no groups that stand apart"), (0.5, "groups that stand apart weakly"),
             (0.7, "groups that stand apart"), (math.inf, "groups that stand far apart"))  # fmt: skip
"""Mean silhouettes up to these values, and what Kaufman and Rousseeuw (1990) say of features then."""

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth")

WITHOUT_REWARDS = (
    "No rewards were given, so what the clusters tell of rewards is not known: --rewards takes a run "
    "folder, or rows with the columns user and reward."
)


@dataclass(frozen=True)
class Subject:
    """What was divided, by what."""

    data: Mapping[str, Any]
    """The section `[data]`, as JSON values."""
    clustering: ClusteringConfig
    """The clusterer and its settings."""
    examples: Mapping[str, str]
    """User -> the text of one of its examples, of those who are typical of a cluster."""


def examples_of(found: Analysis, dataset: Dataset) -> dict[str, str]:
    """The first example of everybody who is typical of a cluster that a page shows."""
    wanted = {user for cluster in shown(found) for user in found.typical[cluster]}
    texts: dict[str, str] = {}
    for example in dataset.train:
        if example.user in wanted:
            texts[example.user] = example.text
            wanted.remove(example.user)
            if not wanted:
                break
    return texts


def write_clusters(found: Analysis, subject: Subject, out: Path) -> Verdict:
    """Write `clusters.json`, which runs load, and `clusters.html`, which shows all this, into a folder.

    Each is replaced as a whole or not at all; whatever else is in the folder stays.

    Returns:
        What the page says first.

    Raises:
        RunFolderError: the folder cannot be written.
    """
    said = verdict(found)
    content = {
        "version": VERSION,
        "pgrpo": version("pgrpo"),
        "clusterer": {
            "name": subject.clustering.name,
            "options": subject.clustering.options,
            "state": found.state,
        },
        "data": subject.data,
        "feature_names": found.feature_names,
        **summary(found, subject),
        "assignment": found.cluster_of,
    }
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    html = _page(found, subject, said)
    with disk_errors(f"{out} cannot be written"):
        out.mkdir(parents=True, exist_ok=True)
    replace_file(out / FILE, text.encode("utf-8", "replace"))
    replace_file(out / PAGE, html.encode("utf-8", "replace"))
    return said


def summary(found: Analysis, subject: Subject) -> dict[str, Any]:
    """What was found, as plain values."""
    best = found.recommended
    per_cluster = _silhouettes(found)
    rewards = found.mean_rewards
    clusters = {
        str(cluster): {
            **about,
            "silhouette": per_cluster.get(cluster),
            "reward": rewards.get(cluster, (None, None))[0],
            "examples": [
                {"user": user, "text": subject.examples[user]}
                for user in found.typical[cluster]
                if user in subject.examples
            ],
        }
        for cluster, about in found.about.items()
    }
    return {
        "num_users": len(found.cluster_of),
        "num_clusters": len(found.about),
        "measures": _plain(found.own),
        "rewards": found.rewards and found.rewards.about,
        "reward_notes": list(found.rewards.notes) if found.rewards else [],
        "candidates": [_plain(each) for each in found.candidates],
        "recommended": best and best.num_clusters,
        "clusters": clusters,
    }


def _plain(candidate: Candidate) -> dict[str, Any]:
    told = candidate.information
    return {
        "num_clusters": candidate.num_clusters,
        "silhouette": candidate.silhouette,
        "stability": candidate.stability,
        "information": told
        and {
            "eta2": told.eta2,
            "null_mean": told.null_mean,
            "null_95": told.null_95,
            "p": told.p,
            "beyond_chance": told.adjusted,
            "num_users": told.num_users,
            "num_rewards": told.num_rewards,
        },
    }


def verdict(found: Analysis) -> Verdict:
    """What was found, in words."""
    clusters, people = plural(len(found.about), "cluster"), f"{len(found.cluster_of):,} people"
    told, own = found.own.information, found.own
    if told is None:
        headline = f"{clusters} of {people}."
        said = [WITHOUT_REWARDS] if found.rewards is None else [_untold(found)]
    elif told.is_clear:
        headline = f"The {clusters} of {people} carry reward information."
        said = [f"They explain {percent(told.eta2)} of the variance: {_explained(told)}."]
    else:
        headline = f"The {clusters} of {people} carry no reward information."
        said = [f"Clusters carry none: {_explained(told)}."]
    if told is not None and told.num_users < len(found.cluster_of):
        said.append(f"Rewards are known of {told.num_users:,} of the people.")
    if own.silhouette is not None:
        apart = next(words for limit, words in STRUCTURE if own.silhouette <= limit)
        said.append(f"By a mean silhouette of {_known(own.silhouette)}, features show {apart}.")
    if own.stability is not None:
        said.append(
            f"Fitted on two halves of the people, clusters agree by {_known(own.stability)} (adjusted "
            "Rand index; 1: wholly, 0: by chance)."
        )
    said += _recommendation(found)
    return Verdict(headline, tuple(said))


def _untold(found: Analysis) -> str:
    assert found.rewards is not None
    equal = np.ptp(found.rewards.values) == 0
    why = "all rewards are equal" if equal else "all people with a reward are in one cluster"
    return f"The clusters can tell nothing of the rewards: {why}."


def _explained(told: RewardInformation) -> str:
    """`eta squared 0.003, as random clusters of the same sizes have up to 0.009 (p = 0.4)`."""
    than = "where" if told.is_clear else "as"
    return (
        f"eta squared {_share(told.eta2)}, {than} random clusters of the same sizes have up to "
        f"{_share(told.null_95)} (p = {_chance(told.p)})"
    )


def _recommendation(found: Analysis) -> list[str]:
    best = found.recommended
    if best is None:
        return []
    words: list[str] = []
    for measure, place in ranks_of(best, found.candidates).items():
        value = getattr(best, measure)
        if isinstance(value, RewardInformation):
            if not value.is_clear:
                words.append("no more of the rewards explained than by chance")
                continue
            shown = f"{percent(value.adjusted)} of the variance of rewards beyond chance"
        else:
            shown = f"{measure} {_known(value)}"
        words.append(f"{shown} ({_ordinal(place)} of {len(found.candidates)})")
    configured = ", as configured," if best is found.own else ""
    said = [f"Recommended are {best.num_clusters} clusters{configured}: {enumerate_words(words)}."]
    informed = [each.information for each in found.candidates if each.information is not None]
    if informed and not any(each.is_clear for each in informed):
        said.append(
            "No number of clusters that was looked at explains more of the mean rewards than chance: "
            "one history for everybody (estimator.history = 'one') tells as much of them."
        )
    return said


def _ordinal(place: int) -> str:
    return ORDINALS[place - 1] if place <= len(ORDINALS) else f"{place}th"


def shown(found: Analysis) -> list[ClusterId]:
    """The clusters that a page shows, the largest first."""
    sizes = {cluster: float(about["num_users"]) for cluster, about in found.about.items()}
    rewards = {cluster: mean for cluster, (mean, _) in found.mean_rewards.items()}
    worst = rewards or _silhouettes(found)
    return extremes(sizes, {cluster: worst.get(cluster, math.inf) for cluster in sizes}, EACH)


def _sampled_clusters(found: Analysis) -> list[ClusterId]:
    """[S] clusters of the sampled users."""
    everybody = list(found.cluster_of.values())
    return [everybody[place] for place in found.sampled.tolist()]


def _silhouettes(found: Analysis) -> dict[ClusterId, float]:
    """Mean silhouette of each cluster with sampled users; empty where there are none."""
    values: dict[ClusterId, list[float]] = {}
    if found.silhouettes is not None:
        for cluster, value in zip(
            _sampled_clusters(found), found.silhouettes.tolist(), strict=True
        ):
            values.setdefault(cluster, []).append(value)
    return {cluster: sum(own) / len(own) for cluster, own in values.items()}


class _Page(Charts):
    """One page in the making; charts are collected as they are placed."""

    def __init__(self, found: Analysis, subject: Subject) -> None:
        super().__init__()
        self.found, self.subject = found, subject
        self.shown = shown(found)
        self.has_features = bool(found.points.shape[1])
        names = [str(cluster) for cluster in self.shown]
        few = len(names) <= len(figures.ARM_COLORS)
        # Neighbours on a map are told apart by hues, as far as there are any.
        self.colors = figures.arm_colors(names) if few else figures.cluster_colors(names, None)
        num = len(found.sampled)
        self.drawn = found.sampled[np.linspace(0, num - 1, min(num, DRAWN)).round().astype(int)]

    def legend(self) -> Block:
        return legend({f"cluster {name}": color for name, color in self.colors.items()})

    def selection(self) -> str:
        if len(self.shown) == len(self.found.about):
            return ""
        by = "of the lowest reward" if self.found.rewards else "of the lowest silhouette"
        return (
            f"Of {len(self.found.about):,} clusters {len(self.shown)} are shown: the {EACH} largest, "
            f"the {EACH} smallest and the {EACH} {by}; {FILE} has all."
        )

    def sampling(self, drawn: bool = False) -> str:
        num, all_of_them = len(self.found.sampled), len(self.found.cluster_of)
        said = f"Of {num:,} people drawn at random." if num < all_of_them else ""
        if drawn and len(self.drawn) < num:
            said = f"Drawn are {len(self.drawn):,} of {all_of_them:,} people."
        return said


def _page(found: Analysis, subject: Subject, said: Verdict) -> str:
    page = _Page(found, subject)
    makers: tuple[Callable[[_Page], Section | None], ...] = (
        _map, _clusters, _counts, _information, _apart, _made,
    )  # fmt: skip
    sections = [made for make in makers if (made := make(page)) is not None]
    facts = [
        f"{len(found.cluster_of):,} people",
        plural(len(found.feature_names), "feature"),
        plural(len(found.about), "cluster"),
        *([f"rewards: {found.rewards.about}"] if found.rewards else []),
    ]
    title = f"Clusters by {subject.clustering.name} on {subject.data['name']}"
    return document(
        title=title,
        facts=" · ".join(facts),
        verdict=said,
        sections=sections,
        charts=page.charts,
        version=version("pgrpo"),
    )


def _map(page: _Page) -> Section | None:
    found = page.found
    plane = projection(found.points)
    if plane is None:
        return None
    everybody, clusters = list(found.cluster_of), list(found.cluster_of.values())
    members: dict[str, list[int]] = {str(cluster): [] for cluster in page.shown}
    for place in page.drawn.tolist():
        members.get(str(clusters[place]), []).append(place)
    names = [name for name, places in members.items() if places]
    figure = figures.places(
        names,
        [plane.places[members[name]] for name in names],
        [[everybody[place] for place in members[name]] for name in names],
        page.colors,
        (
            f"first component, {percent(plane.explained[0])} of the variance",
            f"second, {percent(plane.explained[1])}",
        ),
    )
    ways = [
        f"{way} {enumerate_words(words)}"
        for way, words in zip(
            ("to the right", "to the left", "upwards", "downwards"),
            [side for axis in plane.axes for side in _sides(axis, found.feature_names)],
            strict=True,
        )
        if words
    ]
    return section(
        "Map of people",
        [page.legend(), page.place(figure, "People on the plane of their first two components")],
        "Each point is a person, on the plane along which standardised features differ most (principal "
        f"components). More of: {'; '.join(ways)}.",
        "What is near here may be far apart in other features.",
        page.sampling(drawn=True),
        page.selection(),
    )


def _sides(axis: FloatArray, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Up to two features each that an axis points to and away from most: those of at least half of the
    longest entry."""
    order: list[int] = np.argsort(-axis, kind="stable").tolist()
    least = np.abs(axis).max() / 2
    towards = [names[place] for place in order[:2] if axis[place] >= least > 0]
    away = [names[place] for place in order[::-1][:2] if -axis[place] >= least > 0]
    return towards, away


def _clusters(page: _Page) -> Section:
    found, apart = page.found, _silhouettes(page.found)
    rewards = found.mean_rewards
    header = ["Cluster", "People", "Share", "Who they are"]
    header += ["Silhouette"] if apart else []
    header += ["Reward"] if rewards else []
    rows: list[list[Cell | str]] = []
    for cluster in page.shown:
        about = found.about[cluster]
        row: list[Cell | str] = [
            Cell(figures.shorten(str(cluster), 30), page.colors[str(cluster)]),
            f"{about['num_users']:,}",
            percent(about["share"]),
            about["about"] or "–",
        ]
        row += [number(apart.get(cluster, math.nan))] if apart else []
        if rewards:
            mean, error = rewards.get(cluster, (math.nan, None))
            row.append(estimate(Estimate(mean, math.nan if error is None else error)))
        rows.append(row)
    numeric = dict.fromkeys([1, 2, *range(4, len(header))], "n")
    blocks: list[Block] = [Table(header, rows, {**numeric, 3: "text"}, sorts=True)]
    texts = page.subject.examples
    typical = {
        cluster: [_example(user, texts[user]) for user in found.typical[cluster] if user in texts]
        for cluster in page.shown
    }
    width = max(map(len, typical.values()))
    if width:
        rows = [
            [
                Cell(figures.shorten(str(cluster), 30), page.colors[str(cluster)]),
                *cells,
                *[""] * (width - len(cells)),
            ]
            for cluster, cells in typical.items()
        ]
        columns = range(1, 1 + width)
        first = "Nearest to its mean" if page.has_features else "First in the data set"
        header = ["Cluster", first, *["Next"] * (width - 1)]
        blocks.append(Table(header, rows, dict.fromkeys(columns, "text")))
    return section(
        "Clusters",
        blocks,
        "Who they are: features whose mean in the cluster lies furthest above and below that of all "
        "people, in standard deviations.",
        f"Reward: mean of {found.rewards.about}, with its standard error over people."
        if found.rewards
        else "",
        _about_examples(page) if width else "",
        page.selection(),
    )


def _about_examples(page: _Page) -> str:
    if page.has_features:
        return (
            "Below, of each cluster the people whose features are nearest to its mean, each with its "
            "first prompt."
        )
    return (
        "Below, of each cluster the people who come first in the data set, each with its first prompt: "
        "there are no features to tell who is typical."
    )


def _example(user: str, text: str) -> Cell:
    """A person's prompt, and who it is below."""
    cell = folded(text, 160)
    return Cell(cell.text, small=[f"person {figures.shorten(user, 30)}"], full=cell.full)


def _counts(page: _Page) -> Section:
    """Also of a clusterer that is not told a number: then of its clusters alone."""
    found, best = page.found, page.found.recommended
    candidates = found.candidates or [found.own]
    rows: list[list[Cell | str]] = []
    for each in candidates:
        notes = [
            *(["configured"] if each is found.own and found.candidates else []),
            *(["recommended"] if each is best else []),
        ]
        told = each.information
        row: list[Cell | str] = [
            Cell(str(each.num_clusters), small=notes),
            _known(each.silhouette),
            _known(each.stability),
        ]
        if found.rewards:
            row += (
                ["–"] * 4
                if told is None
                else [
                    _share(told.eta2),
                    _share(told.null_95),
                    _chance(told.p),
                    _share(told.adjusted),
                ]
            )
        rows.append(row)
    header = ["Clusters", "Silhouette", "Stability"]
    if found.rewards:
        header += ["Eta squared", "by chance up to", "p", "beyond chance"]
    numeric = dict.fromkeys(range(1, len(header)), "n")
    blocks: list[Block] = [Table(header, rows, numeric)]
    if found.candidates:
        blocks.insert(0, Grid(_panels(page, candidates)))
    how = (
        "The best mean rank in all measures is recommended, of equal ones fewer clusters; differences "
        "below the second decimal are ties, and reward information counts only where p < 0.05."
        if found.candidates
        else f"No others are compared: {page.subject.clustering.name} is not told how many to make."
    )
    return section(
        "How many clusters",
        blocks,
        "Silhouette: how much nearer people are to their own cluster than to the next, from −1 to 1, "
        "by standardised features; in-sample, of the people whom the clusters were made of. "
        f"Stability: mean adjusted Rand index between fits on {HALVES} halves of the people, each pair "
        "of fits compared on those it shares.",
        "Eta squared: share of the variance of rewards between clusters; by chance: the same after the "
        f"clusters were dealt to the people at random, {PERMUTATIONS:,} times."
        if found.rewards
        else "",
        how,
        page.sampling(),
    )


def _panels(page: _Page, candidates: Sequence[Candidate]) -> list[Panel]:
    best = page.found.recommended
    counts = [each.num_clusters for each in candidates]
    chosen = best and best.num_clusters

    def values(name: str) -> list[float]:
        return [math.nan if (v := getattr(each, name)) is None else v for each in candidates]

    panels: list[Panel] = []
    for name, about in (
        ("silhouette", "how far clusters stand apart"),
        ("stability", "how far two halves of the people agree"),
    ):
        drawn = values(name)
        if any(map(math.isfinite, drawn)):
            figure = figures.over_counts(counts, drawn, chosen)
            title = Key(name[0].upper() + name[1:])
            panels.append(Panel(title, page.place(figure, name), about=about))
    told = [each.information for each in candidates]
    if any(told):
        figure = figures.over_counts(
            counts,
            [math.nan if each is None else each.eta2 for each in told],
            chosen,
            [math.nan if each is None else each.null_95 for each in told],
            percent=True,
        )
        about = "variance of rewards between clusters; dashed: 95\u00a0% of random ones"
        panels.append(
            Panel(Key("Reward information"), page.place(figure, "eta squared"), about=about)
        )
    return panels


def _information(page: _Page) -> Section | None:
    found, told = page.found, page.found.own.information
    if told is None:
        why = WITHOUT_REWARDS if found.rewards is None else _untold(found)
        return section("Reward information", [], why)
    title = "share of the variance of rewards between clusters"
    figure = figures.against_chance(told.eta2, told.null, title)
    return section(
        "Reward information",
        [page.place(figure, "Eta squared of these clusters, and of random ones")],
        f"{told.num_rewards:,} rewards of {told.num_users:,} people. "
        "Blue: these clusters; grey: random clusters of the same sizes. People are dealt out, not "
        "rewards: those of one person belong together.",
        *(found.rewards.notes if found.rewards else ()),
    )


def _apart(page: _Page) -> Section | None:
    found = page.found
    if found.silhouettes is None or found.own.silhouette is None:
        return None
    clusters = _sampled_clusters(found)
    members: dict[str, list[float]] = {str(cluster): [] for cluster in page.shown}
    kept = set(page.drawn.tolist())
    for place, cluster, value in zip(
        found.sampled.tolist(), clusters, found.silhouettes.tolist(), strict=True
    ):
        if place in kept:
            members.get(str(cluster), []).append(value)
    drawn = {name: np.array(values) for name, values in members.items() if values}
    figure = figures.silhouettes(
        list(drawn), list(drawn.values()), page.colors, found.own.silhouette
    )
    below = float((found.silhouettes < 0).mean())
    nearer = f"{percent(below)} are" if below else "nobody is"
    return section(
        "Silhouettes",
        [page.place(figure, "Silhouettes of people, by cluster")],
        "Each row is a person: the wider, the nearer to its own cluster than to the next; below 0, "
        f"where {nearer}, nearer to another one. Dashed: the mean of all. In-sample: the people are "
        "those whom the clusters were made of.",
        page.sampling(drawn=True),
        page.selection(),
    )


def _made(page: _Page) -> Section:
    clustering = page.subject.clustering
    sections = {
        "data": page.subject.data,
        "clustering": {"name": clustering.name, **clustering.options},
    }
    rows: list[list[Cell | str]] = [
        [f"{name}.{key}", folded(json.dumps(value, ensure_ascii=False, default=str), 160)]
        for name, settings in sections.items()
        for key, value in settings.items()
        if value not in (None, [], {})
    ]
    rows.append(["Features", ", ".join(page.found.feature_names) or "none"])
    return section(
        "How they were made",
        [Table(["", ""], rows, {1: "text"})],
        f'A run with clustering = {{ name = "saved", path = "…/{FILE}" }} has these clusters. '
        f"Silhouettes and stability are of at most {SAMPLE:,} people.",
    )


def _share(share: float) -> str:
    """Three decimals, four of what is small; it may be below 0, as what is beyond chance."""
    return f"{share:.{3 if abs(share) >= 0.01 else 4}f}".replace("-", "−")


def _chance(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else f"{p:.4f}"


def _known(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}".replace("-", "−")
