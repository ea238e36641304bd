"""What a page is made of, as data; `templates/` makes HTML of it and escapes every text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from pgrpo.report.figures import Figure, shorten
from pgrpo.report.statistics import Estimate
from pgrpo.report.verdict import number


@dataclass(frozen=True)
class Key:
    """A name in its colour; without one the dashed line."""

    name: str
    color: str = ""


@dataclass(frozen=True)
class Legend:
    """Names in their colours."""

    kind: ClassVar[str] = "legend"
    keys: Sequence[Key]


@dataclass(frozen=True)
class Cell:
    """A cell of a table."""

    text: str
    color: str = ""
    """Of a dot before the text."""
    small: Sequence[str] = ()
    """Lines below it."""
    full: str = ""
    """What the text opens to, where it is the beginning and end of something longer."""


@dataclass(frozen=True)
class Table:
    """Rows of cells; a plain text is a cell of its own."""

    kind: ClassVar[str] = "table"
    header: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    classes: Mapping[int, str] = field(default_factory=dict[int, str])
    """Column -> `n` (numbers), `text` (prose) or `key` (code)."""
    sorts: bool = False
    """Whether a click on a column's heading sorts the rows by it."""


@dataclass(frozen=True)
class Folded:
    """A table behind a line that opens it."""

    kind: ClassVar[str] = "folded"
    summary: str
    table: Table


@dataclass(frozen=True)
class Chart:
    """The place of a figure."""

    kind: ClassVar[str] = "chart"
    id: str
    label: str
    height: int


class Charts:
    """A page in the making, which collects its charts as they are placed.

    Attributes:
        charts: id of each -> its figure.
    """

    def __init__(self) -> None:
        self.charts: dict[str, Figure] = {}

    def place(self, figure: Figure, label: str) -> Chart:
        """A chart's place in the page."""
        name = f"figure-{len(self.charts)}"
        self.charts[name] = figure
        return Chart(name, label, figure["layout"]["height"])


@dataclass(frozen=True)
class Panel:
    """A small chart with a heading."""

    title: Key
    chart: Chart
    aside: Key | None = None
    """Beside the title."""
    badge: str = ""
    about: str | None = None
    """A line below the title."""
    full: str = ""
    """What that line says unshortened."""


@dataclass(frozen=True)
class Grid:
    """Panels beside each other: as many as fit, or so many a row."""

    kind: ClassVar[str] = "grid"
    panels: Sequence[Panel]
    columns: int = 0


Block = Legend | Table | Folded | Chart | Grid


@dataclass(frozen=True)
class Section:
    """A heading, its caption, and what it is about."""

    heading: str
    blocks: Sequence[Block]
    notes: Sequence[str]
    """Of Markup where they are our own HTML."""


def section(heading: str, blocks: Sequence[Block], *notes: str) -> Section:
    """A section; empty notes are left out."""
    return Section(heading, blocks, [note for note in notes if note])


def legend(colors: Mapping[str, str], chance: float | None = None) -> Legend:
    """Names in their colours, and the dashed line where there is one."""
    keys = [Key(shorten(name, 40), color) for name, color in colors.items()]
    return Legend([*keys, *([] if chance is None else [Key(f"chance, {number(chance)}")])])


def estimate(value: Estimate, *small: str) -> Cell:
    """A mean above its standard error."""
    error = [f"± {number(value.se)}"] if math.isfinite(value.se) else []
    return Cell(number(value.mean), small=[*error, *small])


def folded(text: str, length: int) -> Cell:
    """A text, folded behind its beginning and end when it is long."""
    text = text.strip()
    if len(text) <= length:
        return Cell(text)
    return Cell(" ".join(shorten(text, length).split()), full=text)
