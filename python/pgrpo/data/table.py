"""A data set of one's own, one example a row: JSON lines, CSV or Parquet."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from pydantic import Field

from pgrpo.config import Section
from pgrpo.data.rows import Row, fail, matching, read_csv, read_jsonl, read_parquet, value_in
from pgrpo.errors import DataError
from pgrpo.types import Dataset, Example, FloatArray, Json


class TableConfig(Section):
    """A data set of one's own, one example a row: JSON lines, CSV or Parquet."""

    name: Literal["jsonl", "csv", "parquet"]
    path: str | list[str]
    """The file to train on, or several; `*` stands for any part of a name. JSON lines and CSV may be
    compressed (`.gz`)."""
    evaluation_path: str | list[str] | None = None
    """Held-out examples, as for `path`."""
    prompt_column: str = "prompt"
    """Column with the prompt: a text, or the turns of a chat, each a `role` and its `content`."""
    user_column: str = "user"
    """Column that tells users apart."""
    choices_column: str | None = None
    """Column with a list of the permitted completions."""
    feature_columns: list[str] = Field(default=[])
    """Numeric columns, averaged per user, for clusterers to read."""
    on_bad_row: Literal["fail", "skip"] = "fail"
    """Whether a row that cannot be used stops the run, or is left out and counted."""


def load_table(config: TableConfig) -> Dataset:
    """Read a table, and the one of held-out examples if there is one.

    Columns other than the prompt's, the user's and the choices' go to `Example.columns`. A user's
    features are the means of the feature columns over the user's training rows; a user who is met
    only among held-out examples has the means over those rows (what columns say of a user is input,
    never a reward).

    Raises:
        DataError: a file is missing, unreadable or empty, or names the row and column at fault.
    """
    notes: list[str] = []
    train, features = _load(config, config.path, notes)
    evaluation: list[Example] = []
    if config.evaluation_path is not None:
        evaluation, later = _load(config, config.evaluation_path, notes)
        features = later | features
    names = tuple(config.feature_columns)
    return Dataset(train, evaluation, features, names, notes=tuple(notes))


def _load(
    config: TableConfig, paths: str | list[str], notes: list[str]
) -> tuple[list[Example], dict[str, FloatArray]]:
    """The examples of some files, and each user's features [F]."""
    examples: list[Example] = []
    values: dict[str, list[list[float]]] = {}
    left_out: list[DataError] = []
    for file in files(config.name, paths):
        for place, row in _rows(config, file, left_out.append):
            try:
                example = _example(config, place, row)
                numbers = [_number(place, column, row) for column in config.feature_columns]
            except DataError as complaint:
                left_out.append(complaint)
                if config.on_bad_row == "fail":
                    raise
                continue
            values.setdefault(example.user, []).append(numbers)
            examples.append(example)
    said = paths if isinstance(paths, str) else ", ".join(paths)
    if not examples:
        rest = f" that can be used; the first: {left_out[0]}" if left_out else ""
        raise DataError(f"{said} holds no rows{rest}")
    if left_out:
        number = f"{len(left_out):,} of {len(left_out) + len(examples):,} rows"
        notes.append(f"{number} of {said} were left out; the first: {left_out[0]}")
    return examples, {user: np.mean(rows, axis=0) for user, rows in values.items()}


def files(kind: str, paths: str | list[str]) -> list[Path]:
    """The files that are named, in the order of their names where a pattern stands for several.

    Raises:
        DataError: one does not exist, or a pattern fits none.
    """
    found: list[Path] = []
    for path in [paths] if isinstance(paths, str) else paths:
        fitting = matching(path)
        if not fitting:
            state = "is a folder" if Path(path).expanduser().is_dir() else "does not exist"
            raise DataError(f"{path} {state}; expected a {kind} file")
        found += fitting
    return found


def _rows(config: TableConfig, file: Path, leave_out: Callable[[DataError], None]) -> Iterator[Row]:
    if config.name == "jsonl":
        return read_jsonl(file, fail if config.on_bad_row == "fail" else leave_out)
    return read_csv(file) if config.name == "csv" else read_parquet(file)


def _example(config: TableConfig, place: str, row: Mapping[str, Any]) -> Example:
    prompt = value_in(place, config.prompt_column, row)
    turns = _turns(prompt)
    text = "\n".join(f"{role}: {content}" for role, content in turns) if turns else prompt
    if not isinstance(text, str) or not text:
        raise DataError(
            f"{place}: column {config.prompt_column} is {text!r:.100}; expected a text, or turns of a "
            "chat with role and content, of which the last is not the assistant's"
        )
    user = value_in(place, config.user_column, row)
    if isinstance(user, float) and user.is_integer():
        # Whole numbers beside gaps become such in pandas.
        user = int(user)
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
        turns=turns,
    )


def _turns(prompt: object) -> tuple[tuple[str, str], ...]:
    """Role and content of each turn; empty where the prompt is no chat."""
    turns: list[tuple[str, str]] = []
    for turn in cast(list[object], prompt) if isinstance(prompt, list) else []:
        if not isinstance(turn, Mapping):
            return ()
        role, content = (cast(Mapping[str, object], turn).get(key) for key in ("role", "content"))
        if not isinstance(role, str) or not isinstance(content, str):
            return ()
        turns.append((role, content))
    return () if not turns or turns[-1][0] == "assistant" else tuple(turns)


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
    if isinstance(value, str):
        # All that CSV holds are texts.
        with suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"{place}: column {column} is {value!r}; expected a finite number")
    return float(value)
