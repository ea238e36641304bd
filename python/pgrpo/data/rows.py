"""Rows of a file, one after the other: JSON lines, Parquet or CSV, which may be compressed."""

from __future__ import annotations

import csv
import gzip
import importlib
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from pgrpo.errors import DataError

Row = tuple[str, Mapping[str, Any]]
"""Where a row stands, for error messages, and its values by column."""


def read_jsonl(path: Path) -> Iterator[Row]:
    """Rows of a file that holds a JSON object a line; empty lines are skipped.

    Raises:
        DataError: a line is no JSON object (named by its number).
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as problem:
                raise DataError(f"{path}:{number} is not JSON: {problem}") from None
            if not isinstance(row, dict):
                raise DataError(f"{path}:{number} is not a JSON object")
            yield f"{path}:{number}", cast(dict[str, Any], row)


def read_parquet(path: Path) -> Iterator[Row]:
    """Rows of a Parquet file, whose values are such as JSON has too.

    Raises:
        DataError: it is no Parquet file, pyarrow is missing, or a column holds something else.
    """
    try:
        arrow = importlib.import_module("pyarrow")
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise DataError(f"reading {path} needs pyarrow: pip install pyarrow") from None
    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", _as_json(f"{path} row {number}", row)
    except (arrow.ArrowException, OSError) as problem:
        raise DataError(f"{path} is not a readable Parquet file: {problem}") from None


def read_csv(path: Path) -> Iterator[Row]:
    """Rows of a CSV file with a line of column names; all values are texts.

    Raises:
        DataError: it is not UTF-8 or not a whole gzip file, two columns have one name, or a row has
            another number of fields than there are columns.
    """
    opened = gzip.open if path.suffix == ".gz" else Path.open
    try:
        with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(cast(Iterator[str], file))
            columns = next(rows, [])
            if len(set(columns)) < len(columns):
                raise DataError(f"{path}:1 names a column twice: {', '.join(columns)}")
            for fields in rows:
                if not fields:
                    continue
                place = f"{path}:{rows.line_num}"
                if len(fields) != len(columns):
                    raise DataError(f"{place} has {len(fields)} fields, expected {len(columns)}")
                yield place, dict(zip(columns, fields, strict=True))
    except UnicodeDecodeError as problem:
        raise DataError(f"{path} is not UTF-8 text: {problem}") from None
    except (gzip.BadGzipFile, EOFError, zlib.error, csv.Error) as problem:
        raise DataError(f"{path} cannot be read as CSV: {problem}") from None


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": read_jsonl,
    ".parquet": read_parquet,
    ".csv": read_csv,
    ".csv.gz": read_csv,
}
"""End of a file's name -> who reads it."""


def read_rows(path: Path) -> Iterator[Row]:
    """Rows of a file, by the end of its name.

    Raises:
        DataError: the file does not exist, its name ends in nothing that is known, or it is damaged.
    """
    if not path.is_file():
        state = "is a folder" if path.exists() else "does not exist"
        raise DataError(f"{path} {state}; expected a file")
    for end, read in READERS.items():
        if path.name.endswith(end):
            return read(path)
    raise DataError(f"{path} ends in {path.suffix!r}; expected one of {', '.join(READERS)}")


def value_in(place: str, column: str, row: Mapping[str, Any]) -> Any:
    """The value of a column.

    Raises:
        DataError: there is no such column, or it has no value here.
    """
    if column not in row:
        raise DataError(f"{place}: no column {column!r}; found {', '.join(row)}")
    if row[column] is None:
        raise DataError(f"{place}: column {column} has no value")
    return row[column]


def _as_json(place: str, row: dict[str, Any]) -> dict[str, Any]:
    """Parquet has types that JSON has not, and checkpoints and metrics write columns as JSON."""
    for column, entry in row.items():
        try:
            json.dumps(entry)
        except TypeError:
            kind = type(entry).__name__
            raise DataError(
                f"{place}: column {column} holds a {kind}; expected numbers, texts or lists"
            ) from None
    return row
