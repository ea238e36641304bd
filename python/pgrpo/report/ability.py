"""Whether general ability was lost between two measurements, and how that is said."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from pgrpo.runs.records import AbilityPart, AbilityRecord, perplexity

Part: TypeAlias = Literal["text", "arithmetic", "formats", "continents"]

PARTS: dict[Part, str] = {
    "text": "perplexity",
    "arithmetic": "arithmetic",
    "formats": "formats",
    "continents": "continents",
}
"""Parts of a record, and what they are called."""

ERRORS = 2.0
"""A drop of more than so many standard errors is a loss."""


def notes() -> tuple[str, ...]:
    """What stands beside a table of changes."""
    parts = (
        "Perplexity of English text a token, which is better where it is lower; right answers to sums "
        "and to where countries lie, of four each (chance 0.250); and instructions whose form an "
        "answer has."
    )
    rule = (
        f"“Lost”: the mean drop over a part's items exceeds {ERRORS:g} standard errors of the paired "
        "differences. “No loss shown” does not say that there is none: the parts are small."
    )
    return parts, rule


@dataclass(frozen=True)
class Change:
    """One part before and after."""

    name: str
    before: str
    after: str
    verdict: Literal["lost", "no loss shown", "not compared"]
    """`not compared` where the two did not ask the same, as with other versions of packages."""

    def __str__(self) -> str:
        return f"{self.name} {self.before} → {self.after} ({self.verdict})"


def values(record: AbilityRecord) -> Iterator[tuple[Part, AbilityPart]]:
    """The parts that a record has."""
    for name in PARTS:
        part: AbilityPart | None = getattr(record, name)
        if part is not None:
            yield name, part


def told(name: Part, part: AbilityPart) -> str:
    """A part's value as people read it: a perplexity, so many of so many, or a share."""
    if name == "text":
        return f"{perplexity(part):,.1f}"
    if name == "formats":
        return f"{sum(part.values):.0f}/{part.num_items}"
    return f"{part.value:.3f}"


def changes(before: AbilityRecord, after: AbilityRecord) -> list[Change]:
    """What became of the parts that both records have.

    A part is lost where the mean drop over its items exceeds ERRORS of its standard errors, which are
    those of the paired differences: sd (ddof 1) / sqrt(items). Otherwise no loss is shown, which does
    not say that there is none.
    """
    later = dict(values(after))
    found: list[Change] = []
    for name, x in values(before):
        if (y := later.get(name)) is None:
            continue
        verdict = "not compared"
        if x.asked == y.asked and len(x.values) == len(y.values) > 1:
            # More nats are worse, and more right answers are better.
            drop = (1 if name == "text" else -1) * np.subtract(y.values, x.values)
            error = float(drop.std(ddof=1)) / math.sqrt(len(drop))
            verdict = "lost" if float(drop.mean()) > ERRORS * error else "no loss shown"
        found.append(Change(PARTS[name], told(name, x), told(name, y), verdict))
    return found
