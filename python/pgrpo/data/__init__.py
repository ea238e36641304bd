"""Data sets: one module per data set, with its settings and its loader; all give a `Dataset`.

In comes a section of `[data]`, out goes a `pgrpo.types.Dataset`. `packages` fetches what is shipped
inside Python packages, for data sets and models alike. Data sets of plugins are loaded by
`pgrpo.plugins.registry`, and have a section here alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeAlias, cast

from pydantic import Discriminator, Tag

from pgrpo.config.sections import PluginSection
from pgrpo.data.feedback import FeedbackConfig, check_feedback, load_feedback
from pgrpo.data.movielens import MovieLensConfig, load_movielens
from pgrpo.data.panel import PanelConfig, load_panel
from pgrpo.data.personas import PersonasConfig, load_personas
from pgrpo.data.rated import load_rated
from pgrpo.data.table import TableConfig, check_table, load_table
from pgrpo.types import Dataset

__all__ = [
    "BUILT_IN",
    "BuiltInDataConfig",
    "DataConfig",
    "DataPluginConfig",
    "check_beginning",
    "load_dataset",
]


class DataPluginConfig(PluginSection):
    """A data set that a plugin brings."""


BUILT_IN = {
    "movielens": "movielens",
    "panel": "panel",
    "personas": "personas",
    "feedback": "feedback",
    **dict.fromkeys(("jsonl", "csv", "parquet", "datasets"), "table"),
}
"""Name of a data set of our own -> the kind of its section."""


def _kind(section: Any) -> str:
    mapping = isinstance(section, Mapping)
    name = cast(Mapping[str, Any], section).get("name") if mapping else section.name
    return BUILT_IN.get(name, "plugin") if isinstance(name, str) else "plugin"


BuiltInDataConfig: TypeAlias = (
    FeedbackConfig | MovieLensConfig | PanelConfig | PersonasConfig | TableConfig
)

DataConfig: TypeAlias = Annotated[
    Annotated[FeedbackConfig, Tag("feedback")]
    | Annotated[MovieLensConfig, Tag("movielens")]
    | Annotated[PanelConfig, Tag("panel")]
    | Annotated[PersonasConfig, Tag("personas")]
    | Annotated[TableConfig, Tag("table")]
    | Annotated[DataPluginConfig, Tag("plugin")],
    Discriminator(_kind),
]
"""The section `[data]`: of the data set that `name` names."""


def load_dataset(config: BuiltInDataConfig) -> Dataset:
    """The data set that a config section describes.

    Loading twice gives equal examples, whatever order they are read in.

    Raises:
        DataError: the data is missing, empty or malformed, or leaves no example.
    """
    match config:
        case FeedbackConfig():
            return load_feedback(config)
        case MovieLensConfig(task="rated"):
            return load_rated(config)
        case MovieLensConfig():
            return load_movielens(config)
        case PanelConfig():
            return load_panel(config)
        case PersonasConfig():
            return load_personas(config)
        case TableConfig():
            return load_table(config)


def check_beginning(config: DataConfig) -> None:
    """See that the files of a data set are there and begin as they should, in no time; raises as
    `load_dataset`. It does so for rows of one's own, in which something is wrong most often."""
    match config:
        case FeedbackConfig():
            check_feedback(config)
        case TableConfig():
            check_table(config)
        case _:
            pass
