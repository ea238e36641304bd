"""The page: sections in reading order, rendered by the templates.

Prompts, completions, cluster names and settings are other people's text: the templates escape every
text, plotly's pseudo-HTML is escaped in `figures`, and the page's own scripts are the only ones its
Content-Security-Policy lets run.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from pgrpo.report import facts, learning, results
from pgrpo.report.blocks import Section
from pgrpo.report.context import Context
from pgrpo.report.figures import Figure
from pgrpo.report.study import Study, differing_settings
from pgrpo.report.verdict import Verdict, enumerate_words, plural, verdict

SECTIONS = (
    results.held_out_by_cluster,
    results.summary,
    results.gains,
    results.differences,
    results.warnings,
    results.ability,
    results.held_out,
    results.reward,
    results.clusters,
    results.flow,
    results.fairness,
    learning.corollary,
    learning.histories,
    learning.optimisation,
    learning.time,
    facts.held_out_samples,
    facts.samples,
    facts.settings,
    facts.environment,
)


def render(study: Study) -> str:
    """The page of runs."""
    page = Context(study)
    return document(
        title=_title(study),
        facts=_facts(page),
        verdict=verdict(study),
        sections=[section for make in SECTIONS if (section := make(page)) is not None],
        charts=page.charts,
        version=_versions(study),
    )


def document(
    *,
    title: str,
    facts: str,
    verdict: Verdict,
    sections: Sequence[Section],
    charts: Mapping[str, Figure],
    version: str,
) -> str:
    """A page as one HTML document that loads nothing from outside itself.

    Args:
        title: of the page.
        facts: the size of what is shown, in one line.
        verdict: what it says first.
        sections: what follows.
        charts: the figures that they name.
        version: of the package that made what is shown.
    """
    environment = Environment(
        loader=PackageLoader("pgrpo.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    plotly, script = get_plotlyjs(), _asset("page.js")
    return environment.get_template("page.html").render(
        title=title,
        facts=facts,
        verdict=verdict,
        sections=sections,
        figures=charts,
        version=version,
        # These three are our own.
        css=Markup(_asset("page.css")),  # noqa: S704
        plotly=Markup(plotly),  # noqa: S704
        script=Markup(script),  # noqa: S704
        script_hashes=Markup(" ".join(map(_hash, (plotly, script)))),  # noqa: S704
    )


def _title(study: Study) -> str:
    """Arms and data set."""
    names = " against ".join(arm.name for arm in study.arms)
    if len(study.arms) > 3:
        names = f"{len(study.arms)} arms"
    data = dict.fromkeys(run.settings.get("data.name", "") for run in study.runs)
    return f"{names} on {enumerate_words(list(data))}" if all(data) else names


def _facts(page: Context) -> str:
    """The size of the experiment in one line."""
    study, settings = page.study, page.study.runs[0].settings
    found = [
        plural(len(study.runs), "run"),
        plural(study.last_step, "step"),
        plural(len(study.clusters), "cluster"),
    ]
    shared = differing_settings(study.runs)
    for key, label in (
        ("model.name", "model"),
        ("run.prompts_per_step", "prompts per step"),
        ("generation.group_size", "group size"),
    ):
        if key in settings and key not in shared:
            found.append(f"{label} {settings[key]}")
    return " · ".join([*found, f"reward: {page.reward_name}"])


def _versions(study: Study) -> str:
    """Versions of the package that wrote the runs."""
    versions = {run.info.versions.get("pgrpo", "of unknown version") for run in study.runs}
    return enumerate_words(sorted(versions))


def _asset(name: str) -> str:
    return (files("pgrpo.report") / "templates" / name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    digest = hashlib.sha256(script.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
