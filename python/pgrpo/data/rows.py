"""Rows of a file, one after the other: JSON lines, Parquet or CSV, which may be compressed."""

from __future__ import annotations

import codecs
import csv
import gzip
import importlib
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import date, time
from decimal import Decimal
from pathlib import Path
from typing import Any, cast

from pgrpo.errors import DataError

Row = tuple[str, Mapping[str, Any]]
"""Where a row stands, for error messages, and its values by column."""


def fail(complaint: DataError) -> None:
    """What is done about a bad row where nothing else is wanted."""
    raise complaint


def read_jsonl(path: Path, refuse: Callable[[DataError], None] = fail) -> Iterator[Row]:
    """Rows of a file that holds a JSON object a line; empty lines are skipped.

    Args:
        path: of the file, which may be compressed (`.gz`) and may begin with a byte-order mark.
        refuse: is told of each line that is no JSON object, by its number; by default it raises that.

    Raises:
        DataError: the file is no whole gzip file.
    """
    opened = gzip.open if path.suffix == ".gz" else Path.open
    try:
        with opened(path, "rb") as file:
            for number, line in enumerate(cast(Iterator[bytes], file), start=1):
                text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if text.strip():
                    try:
                        yield f"{path}:{number}", _object(text)
                    except (ValueError, RecursionError) as problem:
                        refuse(DataError(f"{path}:{number} is not {problem}"))
    except (gzip.BadGzipFile, EOFError, zlib.error) as problem:
        raise DataError(f"{path} cannot be read as gzip: {problem}") from None


def _object(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as problem:
        raise ValueError(f"JSON: {problem}") from None
    if not isinstance(row, dict):
        raise ValueError("a JSON object")  # noqa: TRY004 - of the line, which holds another one
    if b"\\u" in line:
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as problem:
            # Half of a sign of two, which a text cut in the middle leaves.
            half = f"\\u{ord(problem.object[problem.start]):04x}"
            raise ValueError(f"text: it has {half} without its other half") from None
    return cast(dict[str, Any], row)


def read_parquet(path: Path) -> Iterator[Row]:
    """Rows of a Parquet file, in values that JSON has too: dates and times are their ISO texts,
    decimals numbers, bytes in UTF-8 texts. A value of any other kind is left out.

    Raises:
        DataError: it is no Parquet file, or pyarrow is missing.
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
                    yield f"{path} row {number}", _as_json(row)
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
    ".jsonl.gz": read_jsonl,
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


def matching(path: str) -> list[Path]:
    """The file, or all files that a pattern with `*` fits, in the order of their names."""
    file = Path(path).expanduser()
    if file.is_file():
        return [file]
    found = Path(file.anchor or ".").glob(str(file.relative_to(file.anchor)))
    return sorted(each for each in found if each.is_file()) if "*" in path else []


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


class _LeftOut(Exception):  # noqa: N818 - it is caught here
    """A value that JSON has nothing for."""


def _as_json(row: Mapping[str, Any]) -> dict[str, Any]:
    """Parquet has types that JSON has not, and checkpoints and metrics write columns as JSON."""
    kept: dict[str, Any] = {}
    for column, entry in row.items():
        with suppress(_LeftOut):
            kept[column] = _value(entry)
    return kept


def _value(entry: Any) -> Any:
    if entry is None or isinstance(entry, str | int | float):
        return entry
    if isinstance(entry, list):
        return [_value(part) for part in cast(list[Any], entry)]
    if isinstance(entry, dict):
        return {str(name): _value(part) for name, part in cast(dict[Any, Any], entry).items()}
    if isinstance(entry, date | time):
        return entry.isoformat()
    if isinstance(entry, Decimal):
        return float(entry)
    if isinstance(entry, bytes):
        with suppress(UnicodeDecodeError):
            return entry.decode()
    raise _LeftOut
