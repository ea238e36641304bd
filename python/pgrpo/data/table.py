"""A data set of one's own: JSON lines or Parquet, one example a row."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from pydantic import Field

from pgrpo.config import Section
from pgrpo.data.rows import read_jsonl, read_parquet, value_in
from pgrpo.errors import DataError
from pgrpo.types import Dataset, Example, FloatArray, Json


class TableConfig(Section):
    """A data set of one's own: JSON lines or Parquet, one example a row."""

    name: Literal["jsonl", "parquet"]
    path: str
    """The file to train on."""
    evaluation_path: str | None = None
    """A file of held-out examples."""
    prompt_column: str = "prompt"
    """Column with the prompt's text."""
    user_column: str = "user"
    """Column that tells users apart."""
    choices_column: str | None = None
    """Column with a list of the permitted completions."""
    feature_columns: list[str] = Field(default=[])
    """Numeric columns, averaged per user, for clusterers to read."""


def load_table(config: TableConfig) -> Dataset:
    """Read a table, and the one of held-out examples if there is one.

    Columns other than the prompt's, the user's and the choices' go to `Example.columns`. A user's
    features are the means of the feature columns over the user's training rows; a user who is met
    only among held-out examples has the means over those rows (what columns say of a user is input,
    never a reward).

    Raises:
        DataError: a file is missing, unreadable or empty, or names the row and column at fault.
    """
    train, features = _load(config, config.path)
    evaluation: list[Example] = []
    if config.evaluation_path is not None:
        evaluation, later = _load(config, config.evaluation_path)
        features = later | features
    return Dataset(train, evaluation, features, tuple(config.feature_columns))


def _load(config: TableConfig, path: str) -> tuple[list[Example], dict[str, FloatArray]]:
    """The examples of one file, and each user's features [F]."""
    file = Path(path).expanduser()
    if not file.is_file():
        state = "is a folder" if file.is_dir() else "does not exist"
        raise DataError(f"{path} {state}; expected a {config.name} file")
    examples: list[Example] = []
    values: dict[str, list[list[float]]] = {}
    for place, row in read_jsonl(file) if config.name == "jsonl" else read_parquet(file):
        example = _example(config, place, row)
        numbers = [_number(place, column, row) for column in config.feature_columns]
        values.setdefault(example.user, []).append(numbers)
        examples.append(example)
    if not examples:
        raise DataError(f"{path} holds no rows")
    return examples, {user: np.mean(rows, axis=0) for user, rows in values.items()}


def _example(config: TableConfig, place: str, row: Mapping[str, Any]) -> Example:
    text = value_in(place, config.prompt_column, row)
    if not isinstance(text, str) or not text:
        raise DataError(f"{place}: column {config.prompt_column} is {text!r}; expected a text")
    user = value_in(place, config.user_column, row)
    if isinstance(user, bool) or not isinstance(user, str | int) or user == "":
        raise DataError(
            f"{place}: column {config.user_column} is {user!r}; expected a text or whole number"
        )
    used = {config.prompt_column, config.user_column, config.choices_column}
    return Example(
        text=text,
        user=str(user),
        columns={column: cast(Json, value) for column, value in row.items() if column not in used},
        choices=_choices(config.choices_column, place, row),
    )


def _choices(column: str | None, place: str, row: Mapping[str, Any]) -> tuple[str, ...] | None:
    if column is None:
        return None
    value = value_in(place, column, row)
    entries = cast(list[Any], value) if isinstance(value, list) else []
    if not entries or not all(isinstance(entry, str) and entry for entry in entries):
        raise DataError(f"{place}: column {column} is {value!r}; expected a list of texts")
    if len(set(entries)) < len(entries):
        raise DataError(f"{place}: column {column} is {value!r}; the choices must differ")
    return tuple(entries)


def _number(place: str, column: str, row: Mapping[str, Any]) -> float:
    value = value_in(place, column, row)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"{place}: column {column} is {value!r}; expected a finite number")
    return float(value)
