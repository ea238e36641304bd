"""Data sets: one module per data set, with its settings and its loader; all give a `Dataset`.

In comes a section of `[data]`, out goes a `pgrpo.types.Dataset`. `packages` fetches what is shipped
inside Python packages, for data sets and models alike.
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import Field

from pgrpo.data.movielens import MovieLensConfig, load_movielens
from pgrpo.data.panel import PanelConfig, load_panel
from pgrpo.data.personas import PersonasConfig, load_personas
from pgrpo.data.rated import load_rated
from pgrpo.data.table import TableConfig, load_table
from pgrpo.types import Dataset

__all__ = ["DataConfig", "load_dataset"]

DataConfig: TypeAlias = Annotated[
    MovieLensConfig | PanelConfig | PersonasConfig | TableConfig, Field(discriminator="name")
]
"""The section `[data]`: of the data set that `name` names."""


def load_dataset(config: DataConfig) -> Dataset:
    """The data set that a config section describes.

    Loading twice gives equal examples, whatever order they are read in.

    Raises:
        DataError: the data is missing, empty or malformed, or leaves no example.
    """
    match config:
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
