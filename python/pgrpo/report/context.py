"""What the sections of a page share: the study, its colours, and sentences said in several places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pgrpo.report import figures
from pgrpo.report.blocks import Charts, Grid, Key, Panel
from pgrpo.report.figures import Figure, Line
from pgrpo.report.study import EACH, Study
from pgrpo.report.verdict import enumerate_words, percent, plural

ABOUT_RULES = (
    "“Most popular” takes what people took most often; the other rules are logits, fitted to the "
    "choices of the training period for everybody, for each cluster and for each person. What lies "
    "above the rule for all is personal."
)
"""What the baselines of a page are."""


class Context(Charts):
    """The page of a study in the making."""

    def __init__(self, study: Study) -> None:
        super().__init__()
        self.study = study
        self.arm_colors = figures.arm_colors([arm.name for arm in study.arms])
        self.cluster_colors = figures.cluster_colors(study.shown, study.minority)
        self.explained = False
        # The points of many arms would hide the lines.
        self.raw = len(study.arms) <= 3
        self.reward_name = study.runs[0].info.reward_name

    def arm_lines(self, path: str) -> list[Line]:
        """A curve per arm that has the number."""
        curves = {arm.name: self.study.curve(arm, path) for arm in self.study.arms}
        return [Line(name, self.arm_colors[name], curve) for name, curve in curves.items() if curve]

    def small(
        self, quantities: Mapping[str, tuple[str, str]], shares: Sequence[str] = ()
    ) -> list[Grid]:
        """A grid of small charts, name -> (what it is, path); empty where no run has any."""
        panels: list[Panel] = []
        for name, (about, path) in quantities.items():
            drawn = self.arm_lines(path)
            if drawn:
                figure = figures.lines(drawn, 210, raw=self.raw, percent=name in shares)
                panels.append(Panel(Key(name), self.place(figure, name), about=about))
        return [Grid(panels)] if panels else []

    def panel(self, cluster: str, figure: Figure, label: str) -> Panel:
        """A chart of one cluster under its name, share and description."""
        info = self.study.clusters[cluster]
        users = [plural(info.num_users, "user")] if info.num_users else []
        about = [figures.shorten(info.about, 140)] if info.about else []
        return Panel(
            Key(figures.shorten(cluster, 30), self.cluster_colors[cluster]),
            self.place(figure, f"{label} of cluster {cluster}"),
            aside=Key(percent(info.share)) if info.share > 0 else None,
            badge="smallest" if cluster == self.study.minority else "",
            about=" · ".join([*users, *about]),
            full=info.about,
        )

    def drawing(self) -> str:
        """How curves over the steps are drawn, said in full once."""
        if self.explained:
            return "Lines, bands and points as above."
        self.explained = True
        study, width = self.study, self.study.smoothing
        of = "" if study.stride == 1 else " of those read"
        smooth = (
            f"centred moving mean over {plural(width, 'step')}{of}"
            if width > 1
            else "each step's value"
        )
        counts = {len(arm.runs) for arm in study.arms}
        bands = [
            *(["the range of two seeds"] if 2 in counts else []),
            *(["mean ± 1.96 standard errors over three seeds or more"] if max(counts) > 2 else []),
        ]
        said = [f"Lines: {smooth}, averaged over seeds."]
        if bands:
            said.append(f"Bands: {enumerate_words(bands)}.")
        if 1 in counts:
            said.append("One seed has no band.")
        if width > 1 and self.raw:
            said.append("Faint points: unsmoothed.")
        if study.stride > 1:
            said.append(
                f"Of so many steps one in {study.stride:,} was read, and all of the first and the "
                "last ten."
            )
        if study.num_drawn > figures.POINTS:
            said.append(f"A line has at most {figures.POINTS} points, evenly spaced.")
        return " ".join(said)

    @property
    def outcome_name(self) -> str:
        """What arms are compared by, in words."""
        study = self.study
        if study.evaluated:
            return f"held-out reward at step {study.evaluated[1]}"
        return f"training reward over the last {plural(study.window, 'step')}"

    def levels(self) -> dict[str, float]:
        """What held-out rewards are compared with: the baselines, else chance where it is known."""
        study = self.study
        if study.baselines or study.own_evaluation or study.chance is None:
            return study.baselines
        return {"chance": study.chance}

    def about_levels(self) -> str:
        """What the baselines are."""
        if len(self.study.baselines) < 2:
            return ""
        return f"Dashed: what simple rules get on the same prompts. {ABOUT_RULES}"

    def selection(self) -> str:
        """Which clusters are drawn, where not all are."""
        all_of_them, shown = len(self.study.clusters), len(self.study.shown)
        if shown == all_of_them:
            return ""
        return (
            f"Of {all_of_them:,} clusters {shown} are drawn: the {EACH} largest, the {EACH} smallest "
            f"and the {EACH} with the lowest reward at the end."
        )

    def scales(self, held_out: bool = False) -> str:
        """Whether rewards of different clusters may be compared."""
        personas = self.study.runs[0].settings.get("data.name") == "personas"
        if personas and not (held_out and self.study.own_evaluation):
            return (
                "Personas are rewarded on scales of their own: differences between them are mostly "
                "differences of scale."
            )
        return "Comparing clusters presumes that their rewards are on one scale."
