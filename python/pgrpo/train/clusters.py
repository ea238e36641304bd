"""The clusters that a run would begin with, looked at: found without weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from pgrpo.clusters.analysis import KS, Analysis, Rewards, analyse
from pgrpo.config.sections import ClusteringConfig
from pgrpo.errors import ConfigError
from pgrpo.plugins.hookspecs import Clusterer
from pgrpo.report.clusters import Subject, examples_of
from pgrpo.runs.config import Config
from pgrpo.runs.rewards import read_rewards
from pgrpo.train.baselines import rewards_of_one_rule
from pgrpo.train.build import Assembly
from pgrpo.types import Dataset

NUMBER = "num_clusters"
"""The setting of a clusterer that says how many clusters to make."""


def look(
    config: Config,
    rewards: Path | None,
    ks: Sequence[int] | None,
    note: Callable[[str], None] = lambda _: None,
) -> tuple[Analysis, Subject]:
    """Fit the clusterer of a run's config and measure what it finds.

    Args:
        config: of the run.
        rewards: a run folder or a file of rows, see `read_rewards`; without it, what one rule for
            everybody gets of held-out choices, where the data set knows those.
        ks: numbers of clusters to compare; None for the usual ones.
        note: is told what takes long.

    Raises:
        ConfigError: there are `ks`, and the clusterer is not told a number.
        PgrpoError: whatever would stop the run at its start, or rewards cannot be read.
    """
    with Assembly(config, note=note) as parts:
        registry, section = parts.registry, config.clustering
        known = None if rewards is None else read_rewards(rewards)
        dataset = parts.dataset
    fields = getattr(registry.clusterers[section.name].config_class, "model_fields", {})
    if ks is not None and NUMBER not in fields:
        raise ConfigError(
            f"--ks has no effect: clusterer {section.name!r} is not told how many clusters to make"
        )
    if known is None:
        known = _of_choices(dataset, note)

    def make(num: int | None) -> Clusterer:
        changed = {} if num is None else {NUMBER: num}
        options = {**section.options, **changed, "name": section.name}
        return registry.clusterer(ClusteringConfig.model_validate(options))

    configured: int | None = None
    if NUMBER in fields:
        configured = section.options.get(NUMBER, fields[NUMBER].default)
    found = analyse(
        make,
        dataset,
        configured=configured,
        rewards=known,
        ks=KS if ks is None else ks,
        note=note,
    )
    note("reading examples")
    data = config.data.model_dump(mode="json")
    return found, Subject(data, section, examples_of(found, dataset))


def _of_choices(dataset: Dataset, note: Callable[[str], None]) -> Rewards | None:
    note("no rewards given: looking whether the data set knows choices")
    found = rewards_of_one_rule(dataset)
    if found is None:
        return None
    users, values = found
    about = f"one rule for everybody, fitted to choices, on {len(users):,} held-out ones"
    origin = "They are of later choices than those that features, the rule and clusters come from."
    return Rewards(users, values, about, (origin,))
