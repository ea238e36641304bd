"""Pieces of HTML. Whatever is called `body`, `header`, `rows` or `notes` is HTML already."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from pgrpo.report.figures import shorten
from pgrpo.report.study import Estimate
from pgrpo.report.verdict import number


def section(heading: str, body: str, *notes: str) -> str:
    """A heading, its caption, and what it is about."""
    return f"<section><h2>{heading}</h2>{_caption(notes)}{body}</section>"


def _caption(notes: Sequence[str]) -> str:
    return f'<p class="caption">{" ".join(notes)}</p>' if notes else ""


def legend(colors: Mapping[str, str], chance: float | None = None) -> str:
    """Names in their colours, and the dashed line where there is one."""
    keys = [
        f'<span class="key">{swatch(color)}{escape(shorten(name, 40))}</span>'
        for name, color in colors.items()
    ]
    if chance is not None:
        line = '<span class="swatch line"></span>'
        keys.append(f'<span class="key">{line}chance, {number(chance)}</span>')
    return f'<div class="legend">{"".join(keys)}</div>'


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    numeric: Sequence[int] = (),
    text: Sequence[int] = (),
    code: Sequence[int] = (),
) -> str:
    """Cells are HTML already; the column lists say how they are set."""
    kinds = {
        **dict.fromkeys(numeric, "n"),
        **dict.fromkeys(text, "text"),
        **dict.fromkeys(code, "key"),
    }

    def cell(tag: str, column: int, content: str) -> str:
        kind = f' class="{kinds[column]}"' if column in kinds else ""
        return f"<{tag}{kind}>{content}</{tag}>"

    head = "".join(cell("th", i, name) for i, name in enumerate(header))
    body = "".join(
        f"<tr>{''.join(cell('td', i, c) for i, c in enumerate(row))}</tr>" for row in rows
    )
    head = f"<thead><tr>{head}</tr></thead>" if any(header) else ""
    return f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'


def swatch(color: str) -> str:
    """A dot in a colour."""
    return f'<span class="swatch" style="background:{color}"></span>'


def folded(text: str, length: int) -> str:
    """A text, folded behind its beginning and end when it is long."""
    text = text.strip()
    if len(text) <= length:
        return escape(text)
    brief = escape(" ".join(shorten(text, length).split()))
    return f"<details><summary>{brief}</summary>{escape(text)}</details>"


def estimate(estimate: Estimate) -> str:
    """A mean above its standard error."""
    error = f"<small>± {number(estimate.se)}</small>" if math.isfinite(estimate.se) else ""
    return number(estimate.mean) + error
