"""The charts, as plain plotly figures: {"data": traces, "layout": layout}.

Text and grid colours are absent here: the page sets them by the reader's colour scheme. Names come
from data sets and configs, so whatever plotly shows as text is escaped.
"""

from __future__ import annotations

import base64
import colorsys
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from pgrpo.report.statistics import Estimate
from pgrpo.report.study import Curve, Paired
from pgrpo.types import FloatArray

Figure = dict[str, Any]
Trace = dict[str, Any]
Range = tuple[float, float]

ARM_COLORS = (
    "#2f6fde", "#e07b1a", "#1f9d6b", "#a855c7", "#d64550", "#0f9fb5", "#8a8f2a", "#8b5e3c",
)  # fmt: skip
"""Distinct hues that hold against white and near-black alike."""

POINTS = 200
"""Most points of a line: a panel is some 300 pixels wide. Of a thousand lines they are 2 MB."""

OTHERS = "others"
"""What clusters without a colour are called together."""

MINORITY_COLOR = "#e0115f"

PART_COLORS = {
    "generate": "#4f6d8f",
    "reward": "#8aa5bf",
    "wait": "#4f6d8f",
    "sync": "#7d9b84",
    "update": "#b79f76",
    "other": "#a3a3a3",
}
"""Parts of a step: muted, so that they are not taken for arms."""


@dataclass(frozen=True)
class Line:
    """A named curve in its colour."""

    name: str
    color: str
    curve: Curve


@dataclass(frozen=True)
class Dots:
    """Estimates of one arm at given positions."""

    name: str
    color: str
    positions: Sequence[float]
    estimates: Sequence[Estimate]


def arm_colors(names: Sequence[str]) -> dict[str, str]:
    """One colour per arm, in order, repeating after eight."""
    return {name: ARM_COLORS[i % len(ARM_COLORS)] for i, name in enumerate(names)}


def cluster_colors(names: Sequence[str], minority: str | None) -> dict[str, str]:
    """A ramp from the largest cluster (violet) to the smaller ones (green); the minority is red."""
    ramp = [name for name in names if name != minority]
    colors: dict[str, str] = {}
    for i, name in enumerate(ramp):
        hue = 0.74 - 0.5 * i / max(1, len(ramp) - 1)
        r, g, b = colorsys.hls_to_rgb(hue, 0.5 if hue > 0.55 else 0.4, 0.5)
        colors[name] = f"#{round(255 * r):02x}{round(255 * g):02x}{round(255 * b):02x}"
    return colors | ({minority: MINORITY_COLOR} if minority is not None else {})


def lines(
    drawn: Sequence[Line],
    height: int = 320,
    reference: float | None = None,
    y_range: Range | None = None,
    raw: bool = True,
    percent: bool = False,
    marks: Sequence[int] = (),
) -> Figure:
    """Curves over the steps, each with its band and faint unsmoothed points; some steps marked."""
    bands = [_band(line.curve.steps, line.curve.low, line.curve.high, line.color) for line in drawn]
    points = [_points(line) for line in drawn] if raw else []
    traces = [t for t in (*bands, *points) if t] + [_line(line) for line in drawn]
    layout = _layout(height, percent)
    layout["xaxis"] |= _step_axis(np.concatenate([line.curve.steps for line in drawn]))
    layout["hovermode"] = "x unified"
    if y_range is not None:
        layout["yaxis"]["range"] = list(y_range)
    levels = [] if reference is None else [_reference(reference)]
    # Between the step after which something happened and the next.
    layout["shapes"] = levels + [_reference(step + 0.5, vertical=True) for step in marks]
    return {"data": traces, "layout": layout}


def spreads(drawn: Sequence[tuple[Line, Curve]], height: int = 220) -> Figure:
    """Means with dotted lines at mean +- std: (line of the mean, curve of the std)."""
    edges: list[Trace] = []
    for line, std in drawn:
        mean = np.interp(std.steps, line.curve.steps, line.curve.mean)
        low, high = mean - std.raw, mean + std.raw
        edges += [_edge(std.steps, edge, line.color) for edge in (low, high)]
    traces = edges + [_line(line) for line, _ in drawn]
    layout = _layout(height)
    layout["xaxis"] |= _step_axis(np.concatenate([line.curve.steps for line, _ in drawn]))
    layout["hovermode"] = "x unified"
    return {"data": traces, "layout": layout}


def evaluations(
    drawn: Sequence[Dots], levels: Mapping[str, float], title: str = "step", height: int = 320
) -> Figure:
    """Held-out reward with standard errors over the steps, or over what else `title` names; levels
    that do not change are dashed lines under their names."""
    traces = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": label(dots.name, 60),
            "x": list(dots.positions),
            "y": _values([e.mean for e in dots.estimates]),
            "error_y": _errors(dots),
            "line": {"color": dots.color, "width": 2.2},
            "marker": {"color": dots.color, "size": 8},
            "hovertemplate": "%{y:.3f}",
        }
        for dots in drawn
    ]
    layout = _layout(height)
    positions = np.concatenate([np.array(dots.positions, float) for dots in drawn])
    if title == "step":
        layout["xaxis"] |= _step_axis(positions)
    else:
        layout["xaxis"] |= {"title": {"text": title}, "rangemode": "tozero"}
    layout["hovermode"] = "x unified"
    layout["shapes"] = [_reference(level) for level in levels.values()]
    if levels:
        # Shapes do not widen an axis; a point without a mark does.
        ends = [float(positions.min())] * len(levels)
        traces.append(
            {"type": "scatter", "mode": "markers", "x": ends, "y": _values(list(levels.values())),
             "marker": {"opacity": 0}, "hoverinfo": "skip"}
        )  # fmt: skip
    layout["annotations"] = [
        # Names of neighbouring levels stand at opposite ends.
        {"xref": "paper", "x": place % 2, "xanchor": "right" if place % 2 else "left", "y": level,
         "yanchor": "bottom", "showarrow": False, "font": {"size": 11},
         "text": f"{label(name, 40)} {level:.3f}"}
        for place, (name, level) in enumerate(levels.items())
    ]  # fmt: skip
    return {"data": traces, "layout": layout}


LEVEL_MARKS = {
    "|": "line-ns-open",
    "×": "x-thin-open",
    "◇": "diamond-open",
    "□": "square-open",
    "☆": "star-open",
}
"""Grey marks of levels that rows are compared with: as text -> as Plotly draws them."""


def before_and_after(
    names: Sequence[str],
    before: Sequence[Dots],
    after: Sequence[Dots],
    levels: Mapping[str, Sequence[float]],
) -> Figure:
    """One row per name: an open mark before, a filled one after, one lane per arm; levels that the row
    is compared with as grey marks."""
    lanes = len(after)
    height = 70 + len(names) * (22 + 15 * lanes)
    traces: list[Trace] = []
    for lane, (first, last) in enumerate(zip(before, after, strict=True)):
        rows = [i + (lane - (lanes - 1) / 2) * 0.6 / max(1, lanes - 1) for i in range(len(names))]
        for y, a, b in zip(rows, first.estimates, last.estimates, strict=True):
            line = {"color": last.color, "width": 2}
            ends = _values([a.mean, b.mean])
            traces.append(
                {"type": "scatter", "mode": "lines", "x": ends, "y": [y, y], "line": line,
                 "opacity": 0.45, "hoverinfo": "skip"}
            )  # fmt: skip
        for dots, when, symbol in ((first, "before", "circle-open"), (last, "after", "circle")):
            traces.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "name": f"{label(dots.name, 60)}, {when}",
                    "x": _values([e.mean for e in dots.estimates]),
                    "y": rows,
                    "error_x": _errors(dots) if when == "after" else {"visible": False},
                    "marker": {"color": dots.color, "size": 9, "symbol": symbol,
                               "line": {"width": 2, "color": dots.color}},
                    "hovertemplate": "%{x:.3f}",
                }
            )  # fmt: skip
    traces += _level_marks(levels, "x", "y")
    layout = _row_layout(height, names, "held-out reward")
    return {"data": traces, "layout": layout}


def over_settings(
    drawn: Sequence[Dots],
    levels: Mapping[str, Sequence[float]],
    settings: Sequence[str],
    title: str,
) -> Figure:
    """Means of arms with standard errors over settings, which are no line: neighbours may be two
    families. Levels that a setting is compared with are grey marks, as LEVEL_MARKS says."""
    figure = evaluations(drawn, {}, title)
    for trace in figure["data"]:
        trace["mode"] = "markers"
    figure["data"] += _level_marks(levels, "y", "x")
    figure["layout"]["hovermode"] = "closest"
    figure["layout"]["xaxis"] |= {
        "tickvals": list(range(len(settings))),
        "ticktext": [label(setting, 24) for setting in settings],
        "range": [-0.5, len(settings) - 0.5],
    }
    return figure


def _level_marks(levels: Mapping[str, Sequence[float]], value: str, place: str) -> list[Trace]:
    """Grey marks of what is compared with, one for each place in turn, on the axes of these letters."""
    return [
        {
            "type": "scatter",
            "mode": "markers",
            "name": label(name, 40),
            value: _values(values),
            place: list(range(len(values))),
            "marker": {"color": "#8c8c8c", "size": 13, "symbol": symbol, "line": {"width": 2}},
            "hovertemplate": f"%{{{value}:.3f}}",
        }
        for symbol, (name, values) in zip(LEVEL_MARKS.values(), levels.items(), strict=False)
    ]


def differences(names: Sequence[str], drawn: Sequence[Paired]) -> Figure:
    """One row per name: the mean difference with its interval, and a faint mark for each seed."""
    traces: list[Trace] = []
    for row, paired in enumerate(drawn):
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": "one seed",
                "x": _values(paired.each),
                "y": [row] * len(paired.each),
                "marker": {"color": translucent(ARM_COLORS[0], 0.35), "size": 7},
                "hovertemplate": "%{x:+.3f}",
            }
        )
        if paired.difference is not None:
            low, mean, high = (getattr(paired.difference, name) for name in ("low", "mean", "high"))
            traces.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "name": "mean",
                    "x": _values([mean]),
                    "y": [row],
                    "error_x": {"type": "data", "symmetric": False, "array": _values([high - mean]),
                                "arrayminus": _values([mean - low]), "thickness": 2, "width": 5,
                                "color": ARM_COLORS[0]},
                    "marker": {"color": ARM_COLORS[0], "size": 11},
                    "hovertemplate": "%{x:+.3f}",
                }
            )  # fmt: skip
    layout = _row_layout(76 + 44 * len(names), names, "difference of the reward")
    layout["shapes"] = [_reference(0.0, vertical=True)]
    return {"data": traces, "layout": layout}


def stacked(rows: Sequence[str], parts: Mapping[str, Sequence[float]]) -> Figure:
    """Seconds of a step as stacked horizontal bars, one row per arm."""
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "name": part,
            "y": list(range(len(rows))),
            "x": _values(list(seconds)),
            "text": [f"{s:.2f}" if s > 0 else "" for s in seconds],
            "textposition": "inside",
            "insidetextanchor": "middle",
            "textangle": 0,
            "textfont": {"color": "#ffffff", "size": 12},
            "marker": {"color": PART_COLORS[part]},
            "hovertemplate": "%{x:.3f} s",
        }
        for part, seconds in parts.items()
    ]
    layout = _row_layout(70 + 42 * len(rows), rows, "seconds per step")
    layout["xaxis"]["rangemode"] = "tozero"
    layout |= {"barmode": "stack", "bargap": 0.35, "uniformtext": {"mode": "hide", "minsize": 11}}
    return {"data": traces, "layout": layout}


def places(
    names: Sequence[str],
    found: Sequence[FloatArray],
    users: Sequence[Sequence[str]],
    colors: Mapping[str, str],
    titles: tuple[str, str],
) -> Figure:
    """People as points on a plane, a colour for each cluster: names of the clusters, the places [S, 2]
    of each one's people, and who they are."""
    traces = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": label(name, 40),
            "x": _packed(points[:, 0]),
            "y": _packed(points[:, 1]),
            "text": [label(user, 40) for user in who],
            "marker": {"color": translucent(colors[name], 0.65), "size": 6},
            "hovertemplate": "%{text}",
        }
        for name, points, who in zip(names, found, users, strict=True)
    ]
    layout = _layout(520)
    # A unit is as long one way as the other, so that distances are what they look like.
    domain = {"constrain": "domain"}
    layout["yaxis"] |= {"scaleanchor": "x", "title": {"text": titles[1]}} | domain
    layout["xaxis"] |= {"showgrid": True, "title": {"text": titles[0]}} | domain
    layout["hovermode"] = "closest"
    return {"data": traces, "layout": layout}


def silhouettes(
    names: Sequence[str], found: Sequence[FloatArray], colors: Mapping[str, str], mean: float
) -> Figure:
    """The silhouettes of each cluster's people, falling within it, clusters below each other; the mean
    of all is a dashed line."""
    traces: list[Trace] = []
    middles: list[float] = []
    gap = max(1.0, 0.015 * sum(map(len, found)))
    start = 0.0
    for name, values in zip(names, found, strict=True):
        rows = np.repeat(np.arange(len(values) + 1, dtype=np.float64) + start, 2)[1:-1]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": label(name, 40),
                "x": _packed(np.repeat(np.sort(values)[::-1], 2)),
                "y": _packed(rows),
                "fill": "tozerox",
                "fillcolor": translucent(colors[name], 0.7),
                "line": {"color": colors[name], "width": 0.5},
                "hovertemplate": "%{x:.3f}",
            }
        )
        middles.append(start + len(values) / 2)
        start += len(values) + gap
    layout = _row_layout(min(900, max(240, 60 + 34 * len(names))), names, "silhouette")
    layout["yaxis"] |= {"tickvals": middles, "range": [start, -gap]}
    layout["xaxis"] |= {"zeroline": True, "zerolinecolor": "#8c8c8c"}
    layout["shapes"] = [_reference(mean, vertical=True)]
    return {"data": traces, "layout": layout}


def over_counts(
    counts: Sequence[int],
    values: Sequence[float],
    chosen: int | None,
    levels: Sequence[float] = (),
    percent: bool = False,
) -> Figure:
    """A measure over numbers of clusters, evenly spaced, the chosen one larger; grey and dashed what
    chance reaches."""
    ticks = [str(count) for count in counts]
    traces: list[Trace] = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": "measured",
            "x": ticks,
            "y": _values(values),
            "line": {"color": ARM_COLORS[0], "width": 2.2},
            "marker": {"color": ARM_COLORS[0], "line": {"width": 0}, "opacity": 1,
                       "size": [13 if count == chosen else 7 for count in counts]},
            "hovertemplate": "%{y:.3~p}" if percent else "%{y:.3f}",
        }
    ]  # fmt: skip
    if levels:
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": "by chance",
                "x": ticks,
                "y": _values(levels),
                "line": {"color": "#8c8c8c", "width": 1.4, "dash": "dash"},
                "hovertemplate": "%{y:.3~p}" if percent else "%{y:.3f}",
            }
        )
    layout = _layout(210, percent)
    layout["xaxis"] |= {"type": "category", "title": {"text": "clusters"}}
    layout["yaxis"]["rangemode"] = "tozero"
    layout["hovermode"] = "x unified"
    return {"data": traces, "layout": layout}


def against_chance(value: float, draws: FloatArray, title: str) -> Figure:
    """How often chance reaches what, and where the value lies, as a line."""
    high = max(value, float(draws.max()))
    numbers, edges = np.histogram(draws, bins=60, range=(0.0, high * 1.02))
    last = int(np.flatnonzero(numbers)[-1]) + 1
    traces: list[Trace] = [
        {
            "type": "bar",
            "name": "by chance",
            "x": _values(((edges[1:] + edges[:-1]) / 2)[:last].tolist()),
            "y": _values((numbers[:last] / len(draws)).tolist()),
            "width": float(edges[1] - edges[0]),
            "marker": {"color": "#a3a3a3"},
            "hovertemplate": "%{x:.3~p}: %{y:.3~p} of the draws",
        },
        {
            "type": "scatter",
            "mode": "lines",
            "name": "these clusters",
            "x": _values([value, value]),
            "y": _values([0.0, float(numbers.max()) / len(draws)]),
            "line": {"color": ARM_COLORS[0], "width": 3},
            "hovertemplate": "%{x:.3~p}",
        },
    ]
    layout = _layout(240, percent=True)
    layout["xaxis"] |= {"tickformat": ".2~p", "title": {"text": title}, "range": [0, high * 1.05]}
    layout["yaxis"]["title"] = {"text": "share of the draws"}
    return {"data": traces, "layout": layout}


def flows(
    steps: Sequence[int],
    moves: Sequence[Mapping[str, Mapping[str, int]]],
    colors: Mapping[str, str],
) -> Figure:
    """People between clusters: a column of bars before each division and after the last, and bands for
    those who went from one to the next.

    Args:
        steps: after which people were divided again.
        moves: each time, cluster before -> cluster after -> number of people.
        colors: of the clusters that have a bar of their own; all others are one.
    """
    nodes: dict[tuple[int, str], int] = {}
    links: dict[tuple[int, int], int] = {}

    def node(column: int, cluster: str) -> int:
        return nodes.setdefault((column, cluster if cluster in colors else OTHERS), len(nodes))

    for column, users in enumerate(moves):
        for old, row in users.items():
            for new, num in row.items():
                ends = node(column, old), node(column + 1, new)
                links[ends] = links.get(ends, 0) + num
    shades = [colors.get(name, "#8c8c8c") for _, name in nodes]
    trace = {
        "type": "sankey",
        "node": {
            "label": [label(name, 20) for _, name in nodes],
            "color": shades,
            "align": "left",
            "pad": 12,
            "thickness": 14,
            "line": {"width": 0},
            "hovertemplate": "%{label}: %{value}<extra></extra>",
        },
        "link": {
            "source": [source for source, _ in links],
            "target": [target for _, target in links],
            "value": [*links.values()],
            "color": [translucent(shades[source], 0.35) for source, _ in links],
            "hovertemplate": "%{source.label} to %{target.label}: %{value}<extra></extra>",
        },
    }
    ends = "left", "right"
    times = ["before", *(f"from step {step + 1}" for step in steps)]
    titles = [
        {"xref": "paper", "yref": "paper", "x": place / len(steps), "y": 1, "yanchor": "bottom",
         "xanchor": "center" if 0 < place < len(steps) else ends[place > 0], "showarrow": False,
         "text": time, "font": {"size": 11}}
        for place, time in enumerate(times)
    ]  # fmt: skip
    margin = {"l": 8, "r": 8, "t": 28, "b": 8}
    layout = {"height": 320, "autosize": True, "margin": margin, "annotations": titles}
    return {"data": [trace], "layout": layout}


def outcomes(names: Sequence[str], parts: Mapping[str, tuple[Sequence[float], str]]) -> Figure:
    """Shares as stacked horizontal bars that fill one row per name, with a dashed line at a half;
    `parts` are shares and colour by what they are of."""
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "name": label(part, 60),
            "y": list(range(len(names))),
            "x": _values(shares),
            "text": [f"{share:.0%}" if share > 0 else "" for share in shares],
            "textposition": "inside",
            "insidetextanchor": "middle",
            "textangle": 0,
            "textfont": {"color": "#ffffff", "size": 12},
            "marker": {"color": color},
            "hovertemplate": "%{x:.1%}",
        }
        for part, (shares, color) in parts.items()
    ]
    layout = _row_layout(70 + 38 * len(names), names, "share of pairs")
    layout["xaxis"] |= {"range": [-0.02, 1.02], "tickformat": ".0%"}
    layout |= {"barmode": "stack", "bargap": 0.3, "uniformtext": {"mode": "hide", "minsize": 11}}
    layout["shapes"] = [_reference(0.5, vertical=True) | {"layer": "above"}]
    return {"data": traces, "layout": layout}


def intervals(
    names: Sequence[str],
    shares: Sequence[tuple[float, float | None, float | None]],
    color: str,
    title: str,
) -> Figure:
    """One row per name: a share with the ends of its interval, and a dashed line at a half."""
    known = [(row, share, low, high) for row, (share, low, high) in enumerate(shares)
             if low is not None and high is not None]  # fmt: skip
    traces: list[Trace] = [
        {
            "type": "scatter",
            "mode": "markers",
            "x": _values([share for _, share, _, _ in known]),
            "y": [row for row, *_ in known],
            "error_x": {"type": "data", "symmetric": False, "thickness": 2, "width": 5,
                        "array": _values([high - share for _, share, _, high in known]),
                        "arrayminus": _values([share - low for _, share, low, _ in known]),
                        "color": color},
            "marker": {"color": color, "size": 10},
            "hovertemplate": "%{x:.1%}",
        }
    ]  # fmt: skip
    layout = _row_layout(76 + 32 * len(names), names, label(title, 80))
    layout["xaxis"] |= {"range": [-0.02, 1.02], "tickformat": ".0%"}
    layout["shapes"] = [_reference(0.5, vertical=True)]
    return {"data": traces, "layout": layout}


def extent(curves: Sequence[Curve]) -> Range | None:
    """Least and greatest value drawn by `lines`."""
    parts = [part for c in curves for part in (c.mean, c.low, c.high, c.raw)]
    values = np.concatenate(parts) if parts else np.array([])
    values = values[np.isfinite(values)]
    return (float(values.min()), float(values.max())) if len(values) else None


def common_range(panels: Sequence[Sequence[Curve]]) -> Range | None:
    """One y range for several panels, or None where it would flatten one of them.

    Clusters can be rewarded on scales of their own; a panel that would fill less than a fifth of
    the common range gets, like all others, an axis of its own.
    """
    extents = [e for e in map(extent, panels) if e is not None]
    if not extents:
        return None
    low, high = min(e[0] for e in extents), max(e[1] for e in extents)
    heights = [e[1] - e[0] for e in extents]
    if max(heights) > 0 and min(heights) < 0.2 * (high - low):
        return None
    pad = 0.06 * (high - low)
    return (low - pad, high + pad) if high > low else None


def shorten(text: str, length: int) -> str:
    """At most `length` characters, the middle left out."""
    if len(text) <= length:
        return text
    head = (length - 1) // 2
    return f"{text[:head].rstrip()}…{text[len(text) - (length - 1 - head) :].lstrip()}"


def label(text: str, length: int) -> str:
    """A text of somebody else's as plotly shows it as it stands: of HTML it knows tags and entities,
    and quotes are not among these."""
    return escape(shorten(text, length), quote=False)


def translucent(color: str, alpha: float) -> str:
    """A #rrggbb colour with an opacity."""
    r, g, b = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({r},{g},{b},{alpha})"


def _line(line: Line) -> Trace:
    steps, mean = _drawn(line.curve.steps, line.curve.mean)
    # A line through one or two points is hardly seen.
    mode = "lines" if len(steps) > 2 else "lines+markers"
    return {
        "type": "scatter",
        "mode": mode,
        "name": label(line.name, 60),
        **_places(steps),
        "y": _packed(mean),
        "line": {"color": line.color, "width": 2.2},
        "hovertemplate": "%{y:.3~f}",
    }


def _points(line: Line) -> Trace | None:
    steps, raw = _drawn(line.curve.steps, line.curve.raw)
    if len(steps) < 3:
        return None
    return {
        "type": "scatter",
        "mode": "markers",
        **_places(steps),
        "y": _packed(raw),
        "marker": {"color": translucent(line.color, 0.28), "size": 4},
        "hoverinfo": "skip",
    }


def _band(steps: FloatArray, low: FloatArray, high: FloatArray, color: str) -> Trace | None:
    x, low, high = _drawn(steps, low, high)
    if not len(x):
        return None
    return {
        "type": "scatter",
        "mode": "lines",
        "x": _packed(np.concatenate([x, x[::-1]])),
        "y": _packed(np.concatenate([high, low[::-1]])),
        "fill": "toself",
        "fillcolor": translucent(color, 0.14),
        "line": {"width": 0},
        "hoverinfo": "skip",
    }


def _edge(steps: FloatArray, values: FloatArray, color: str) -> Trace:
    steps, values = _drawn(steps, values)
    return {
        "type": "scatter",
        "mode": "lines",
        **_places(steps),
        "y": _packed(values),
        "line": {"color": translucent(color, 0.7), "width": 1.2, "dash": "dot"},
        "hoverinfo": "skip",
    }


def _drawn(steps: FloatArray, *values: FloatArray) -> list[FloatArray]:
    """The steps at which all values are finite and the values there; of more than POINTS only every
    second, third, ..., and the last."""
    where = np.flatnonzero(np.isfinite(values).all(axis=0))
    where = where[::-1][:: max(1, -(-len(where) // POINTS))][::-1]
    return [steps[where], *(row[where] for row in values)]


def _places(steps: FloatArray) -> dict[str, Any]:
    """The points' x: two numbers where they are evenly spaced, for each line has them."""
    gaps = np.unique(np.diff(steps))
    if len(gaps) == 1:
        return {"x0": int(steps[0]), "dx": int(gaps[0])}
    return {"x": _packed(steps)}


def _packed(values: FloatArray) -> dict[str, str]:
    """An array as plotly reads it in half the room of digits: float32 in base64."""
    data = values.astype("<f4").tobytes()
    return {"dtype": "f4", "bdata": base64.b64encode(data).decode()}


def _errors(dots: Dots) -> dict[str, Any]:
    errors = [e.se if math.isfinite(e.se) else 0.0 for e in dots.estimates]
    return {"type": "data", "array": _values(errors), "thickness": 1.4, "width": 0,
            "color": dots.color}  # fmt: skip


def _values(values: Sequence[float]) -> list[float | None]:
    """Six significant digits; what is not finite becomes a gap."""
    return [float(f"{v:.6g}") if math.isfinite(v) else None for v in values]


def _step_axis(steps: FloatArray) -> dict[str, Any]:
    first, last = float(steps.min()), float(steps.max())
    pad = 0.015 * (last - first) or 0.5
    axis: dict[str, Any] = {
        "range": [first - pad, last + pad],
        "tickformat": "d",
        "title": {"text": "step"},
    }
    return axis | ({"dtick": 1} if last - first < 5 else {})


def _reference(at: float, vertical: bool = False) -> dict[str, Any]:
    across, along = ("x", "y") if vertical else ("y", "x")
    return {
        "type": "line",
        f"{along}ref": "paper",
        f"{along}0": 0,
        f"{along}1": 1,
        f"{across}0": at,
        f"{across}1": at,
        "layer": "below",
        "line": {"color": "#8c8c8c", "width": 1.4, "dash": "dash"},
    }


def _row_layout(height: int, names: Sequence[str], title: str) -> dict[str, Any]:
    """A layout with an axis of names, the first one at the top, and numbers along the other."""
    layout = _layout(height)
    layout["margin"]["l"] = 16
    layout["yaxis"] |= {
        "tickvals": list(range(len(names))),
        "ticktext": [label(name, 34) for name in names],
        "range": [len(names) - 0.5, -0.5],
        "showgrid": False,
        "ticklabelstandoff": 6,
    }
    layout["xaxis"] |= {"showgrid": True, "title": {"text": title}}
    return layout


def _layout(height: int, percent: bool = False) -> dict[str, Any]:
    return {
        "height": height,
        "autosize": True,
        "showlegend": False,
        "margin": {"l": 8, "r": 12, "t": 8, "b": 8},
        "xaxis": {"automargin": True, "zeroline": False, "showgrid": False, "nticks": 7},
        "yaxis": {"automargin": True, "zeroline": False, "nticks": 6}
        | ({"tickformat": ".3~p"} if percent else {}),
    }
