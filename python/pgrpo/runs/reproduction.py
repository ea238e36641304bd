"""The folder of a reproduction: what its trained policies get, line by line, and what came of it.

`figures.jsonl` only grows, a line for each run that was measured; `table.json`, `claims.json` and
`report.html` are made anew of it, whole, after every run.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from pydantic import Field

from pgrpo.runs.judgement import KeyedRecord, RatesRecord
from pgrpo.runs.records import AbilityRecord, Record, Text


class FigureRecord(KeyedRecord):
    """A line of figures.jsonl: what the last checkpoint of a run gets on held-out prompts. Its key
    is of what the run's config sets, but for what only watches the run: what comes to the same is
    trained once."""

    run: str
    """folder of the run, `SETTING/ARM/seed-K`"""
    users: list[Text]
    """whose each held-out prompt is"""
    prompts: str
    """digest of users and texts of the held-out prompts: only figures of the same ones are compared"""
    rewards: list[float | None]
    """of each: its greedy completion's, or with `run.eval_samples` the mean over its samples; `null`
    where none got one"""
    expected: list[float | None] = Field(default=[])
    """of each: the exact mean over its choices, as the policy would draw them at temperature 1; empty
    where completions are no choices of one token"""
    commonest: float
    """share of the commonest completion, of the first one of each prompt: 1 where a policy says one
    thing to everybody"""
    steps: int
    """that were taken"""
    rollouts: int
    """that were generated in them"""
    seconds: float
    """that the run took, its own evaluations included (`seconds` of run.json)"""
    measuring_s: float
    """and this measurement after it"""
    curve: dict[int, float]
    """step -> held-out reward of the run's own evaluations, of `run.eval_prompts` prompts"""
    settings: dict[str, str]
    """of the run's config, by their dotted names, those that have an effect"""
    versions: dict[str, str]
    """of pgrpo, torch, transformers and numpy, by which it was trained"""
    ability: list[AbilityRecord] = Field(default=[])
    """general ability before the first and after the last step"""
    precision: str
    """that it was trained in: what `auto` stood for"""

    @property
    def figure(self) -> float | None:
        """Mean of the rewards there are."""
        return mean_known(self.rewards)


def mean_known(values: Iterable[float | None]) -> float | None:
    """Mean of what is known; None where nothing is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


class RowRecord(Record):
    """A row of table.json: an arm in a setting with one seed."""

    setting: str
    arm: str
    seed: int
    figure: float | None = None
    """mean held-out reward; `null` where the rule gives no signal in this setting"""
    expected: float | None = None
    """mean of the exact expected rewards at temperature 1, where completions are single tokens"""
    clusters: dict[str, float] = Field(default={})
    """mean held-out reward of the people of each of the base's clusters, the same ones in all rows"""
    commonest: float | None = None
    """share of the commonest completion: 1 where the policy says one thing to everybody"""
    steps: int | None = None
    rollouts: int | None = None
    minutes: float | None = None
    """that training took, the run's own evaluations included"""


class DifferenceRecord(Record):
    """A difference with its 95 % interval."""

    mean: float
    low: float
    high: float


class ClaimRecord(Record):
    """An entry of claims.json: a difference that was asked for before anything was run."""

    what: str
    """the respect in which the two differ"""
    after: list[str]
    """setting and arm"""
    before: list[str]
    """setting and arm that it is compared with"""
    primary: bool = False
    """whether the reproduction was made to tell this; all others are looks"""
    margin: float | None = None
    """how much less than `before` would still do, where that is the question"""
    cluster: str | None = None
    """of whose people's prompts it is asked; `null`: of all"""
    each: list[float] = Field(default=[])
    """mean of after - before over the held-out prompts, of each seed that both have"""
    mean: float | None = None
    low: float | None = None
    """end of the 95 % interval; `null` with fewer than two seeds"""
    high: float | None = None
    """its other end"""
    verdict: Literal["better", "level", "worse", "reached", "not shown", "not known"] = "not known"
    """by rule: `better` and `worse` where the interval is above or below zero, else `level`; with a
    margin `reached` where it is above minus the margin, else `not shown`; `not known` without one"""
    expected: DifferenceRecord | None = None
    """the same difference of exact expected rewards, as a look; `null` where they are not known"""
    wins: RatesRecord | None = None
    """of a primary question without margin: how often the answer of `after` (`a`) has the higher
    reward, prompt by prompt and seed by seed"""
    wins_of_clusters: dict[str, RatesRecord] = Field(default={})
    """the same for the people of each of the base's clusters"""
