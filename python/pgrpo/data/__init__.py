"""Data sets: each config section has one loader, and all give a `Dataset`."""

from __future__ import annotations

from pgrpo.config import DataConfig, MovieLensConfig, PersonasConfig
from pgrpo.data.movielens import load_movielens
from pgrpo.data.personas import load_personas
from pgrpo.data.table import load_table
from pgrpo.types import Dataset

__all__ = ["load_dataset"]


def load_dataset(config: DataConfig) -> Dataset:
    """The data set that a config section describes.

    Loading twice gives equal examples, whatever order they are read in.

    Raises:
        DataError: the data is missing, empty or malformed, or leaves no example.
    """
    if isinstance(config, MovieLensConfig):
        return load_movielens(config)
    if isinstance(config, PersonasConfig):
        return load_personas(config)
    return load_table(config)
