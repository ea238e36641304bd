"""A data set of one's own, one example a row: JSON lines, CSV, Parquet, or a Hugging Face data set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
from pydantic import Field, model_validator

from pgrpo.config import Section
from pgrpo.data.columns import (
    number_in,
    prompt_in,
    split_by_time,
    time_in,
    user_in,
    value_in,
)
from pgrpo.data.rows import Row, fail, files, read_csv, read_hub, read_jsonl, read_parquet
from pgrpo.errors import DataError
from pgrpo.types import Dataset, Example, FloatArray, Json


class TableConfig(Section):
    """A data set of one's own, one example a row: JSON lines, CSV, Parquet, or a Hugging Face data
    set."""

    name: Literal["jsonl", "csv", "parquet", "datasets"]
    path: str | list[str]
    """The file to train on, or several; `*` stands for any part of a name. JSON lines and CSV may be
    compressed (`.gz`). With `name = "datasets"` the name of one on the hub, or a folder that
    `save_to_disk` wrote or that holds data files."""
    subset: str | None = None
    """Which configuration of a hub's data set."""
    split: str = "train"
    """Which split of a hub's data set is trained on."""
    evaluation_split: str | None = None
    """Which split of a hub's data set is held out."""
    evaluation_path: str | list[str] | None = None
    """Held-out examples, as for `path`."""
    evaluation_share: float = Field(default=0.0, ge=0, lt=1)
    """Share of every user's rows, the latest ones, that is held out; users keep at least one."""
    time_column: str | None = None
    """Column with a row's time, a number or an ISO date or time, by which rows are the latest ones;
    without it the rows that stand further down."""
    prompt_column: str = "prompt"
    """Column with the prompt: a text, or the turns of a chat, each a `role` and its `content`."""
    user_column: str = "user"
    """Column that tells users apart."""
    choices_column: str | None = None
    """Column with a list of the permitted completions."""
    feature_columns: list[str] = Field(default=[])
    """Numeric columns, averaged per user, for clusterers to read."""
    required_columns: list[str] = Field(default=[])
    """Columns that must have a value in every row, such as the one with the cluster; a row without is
    one that cannot be used."""
    on_bad_row: Literal["fail", "skip"] = "fail"
    """Whether a row that cannot be used stops the run, or is left out and counted."""

    def inactive(self) -> set[str]:
        files = (
            {"evaluation_path"}
            if self.name == "datasets"
            else {"subset", "split", "evaluation_split"}
        )
        return files | (set() if self.evaluation_share else {"time_column"})

    @model_validator(mode="after")
    def _check_held_out(self) -> TableConfig:
        if self.name == "datasets" and not isinstance(self.path, str):
            raise ValueError(f"data.path is {self.path!r}; expected one data set")
        if self.name == "datasets" and self.evaluation_split == self.split:
            raise ValueError(
                f"data.evaluation_split is {self.split!r}, which is trained on; expected another split"
            )
        given = self.evaluation_path or self.evaluation_split
        if given and self.evaluation_share:
            raise ValueError(
                f"data.evaluation_share is {self.evaluation_share:g}, and {given!r} is held out; "
                "expected one of them"
            )
        return self


@dataclass(frozen=True, slots=True)
class _Entry:
    """What a row says."""

    example: Example
    features: list[float]
    time: float
    """0 where no column tells."""


def load_table(config: TableConfig) -> Dataset:
    """Read a table, and the one of held-out examples if there is one.

    Columns other than the prompt's, the user's and the choices' go to `Example.columns`. A user's
    features are the means of the feature columns over the user's training rows; a user who is met
    only among held-out examples has the means over those rows (what columns say of a user is input,
    never a reward).

    Raises:
        DataError: a file is missing, unreadable or empty, is to be trained on and held out, or names
            the row and column at fault.
    """
    notes: list[str] = []
    _check_apart(config)
    train, later = _read(config, config.path, config.split, notes), list[_Entry]()
    if config.evaluation_path is not None:
        later = _read(config, config.evaluation_path, "", notes)
    elif config.evaluation_split is not None:
        later = _read(config, config.path, config.evaluation_split, notes)
    elif config.evaluation_share:
        train, later = split_by_time(
            train,
            config.evaluation_share,
            lambda entry: entry.example.user,
            lambda entry: entry.time,
        )
    return Dataset(
        [entry.example for entry in train],
        [entry.example for entry in later],
        _features(later) | _features(train),
        tuple(config.feature_columns),
        notes=tuple(notes),
    )


def check_table(config: TableConfig) -> None:
    """Read the rows up to the first that can be used, or must be; raises as `load_table`. A hub's data
    set, which takes long to open, is not looked at."""
    if config.name != "datasets":
        _check_apart(config)
        for paths in filter(None, (config.path, config.evaluation_path)):
            next(_entries(config, paths, "", lambda _: None), None)


def _check_apart(config: TableConfig) -> None:
    """Refuse files that are both trained on and held out."""
    if config.evaluation_path is not None:
        train = {file.resolve() for file in files(config.name, config.path)}
        for file in files(config.name, config.evaluation_path):
            if file.resolve() in train:
                raise DataError(
                    f"{file} is named by data.path and by data.evaluation_path; expected other rows to "
                    "hold out than to train on"
                )


def _read(
    config: TableConfig, paths: str | list[str], split: str, notes: list[str]
) -> list[_Entry]:
    """What the rows say that can be used; a note tells how many cannot."""
    left_out: list[DataError] = []
    found = list(_entries(config, paths, split, left_out.append))
    said = paths if isinstance(paths, str) else ", ".join(paths)
    check_rows(said, len(found), left_out, notes)
    return found


def _entries(
    config: TableConfig, paths: str | list[str], split: str, leave_out: Callable[[DataError], None]
) -> Iterator[_Entry]:
    """What the rows say that can be used; `leave_out` is told of the others, unless they must be."""
    refuse = fail if config.on_bad_row == "fail" else leave_out
    for place, row in _rows(config, paths, split, refuse):
        try:
            entry = _entry(config, place, row)
        except DataError as complaint:
            refuse(complaint)
        else:
            yield entry


def check_rows(path: str, num_used: int, left_out: Sequence[DataError], notes: list[str]) -> None:
    """Note how many rows were left out.

    Raises:
        DataError: none is left.
    """
    if not num_used:
        rest = f" that can be used; the first: {left_out[0]}" if left_out else ""
        raise DataError(f"{path} holds no rows{rest}")
    if left_out:
        number = f"{len(left_out):,} of {len(left_out) + num_used:,} rows"
        notes.append(f"{number} of {path} were left out; the first: {left_out[0]}")


def _rows(
    config: TableConfig, paths: str | list[str], split: str, refuse: Callable[[DataError], None]
) -> Iterator[Row]:
    if config.name == "datasets":
        yield from read_hub(cast(str, paths), config.subset, split)
        return
    for file in files(config.name, paths):
        match config.name:
            case "jsonl":
                yield from read_jsonl(file, refuse)
            case "csv":
                yield from read_csv(file, refuse)
            case "parquet":
                yield from read_parquet(file)


def _features(entries: Sequence[_Entry]) -> dict[str, FloatArray]:
    """Each user's features [F], the means over its rows."""
    rows: dict[str, list[list[float]]] = {}
    for entry in entries:
        rows.setdefault(entry.example.user, []).append(entry.features)
    return {user: np.mean(own, axis=0) for user, own in rows.items()}


def _entry(config: TableConfig, place: str, row: Mapping[str, Any]) -> _Entry:
    text, turns = prompt_in(place, config.prompt_column, row)
    for column in config.required_columns:
        value_in(place, column, row)
    used = {config.prompt_column, config.user_column, config.choices_column}
    example = Example(
        text=text,
        user=user_in(place, config.user_column, row),
        columns={column: cast(Json, value) for column, value in row.items() if column not in used},
        choices=_choices(config.choices_column, place, row),
        turns=turns,
    )
    return _Entry(
        example,
        [number_in(place, column, row) for column in config.feature_columns],
        0.0 if config.time_column is None else time_in(place, config.time_column, row),
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
