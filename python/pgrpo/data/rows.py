"""Rows, one after the other: of files of JSON lines, Parquet or CSV, which may be compressed, and of
Hugging Face data sets."""

from __future__ import annotations

import codecs
import csv
import gzip
import importlib
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
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


def read_csv(path: Path, refuse: Callable[[DataError], None] = fail) -> Iterator[Row]:
    """Rows of a CSV file with a line of column names; all values are texts.

    Args:
        path: of the file, which may be compressed (`.gz`) and may begin with a byte-order mark.
        refuse: is told of each row with another number of fields than there are columns; by default it
            raises that.

    Raises:
        DataError: it is not UTF-8 or not a whole gzip file, or two columns have one name.
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
                    problem = f"{place} has {len(fields)} fields, expected {len(columns)}"
                    refuse(DataError(problem))
                else:
                    yield place, dict(zip(columns, fields, strict=True))
    except UnicodeDecodeError as problem:
        raise DataError(f"{path} is not UTF-8 text: {problem}") from None
    except (gzip.BadGzipFile, EOFError, zlib.error, csv.Error) as problem:
        raise DataError(f"{path} cannot be read as CSV: {problem}") from None


def read_hub(name: str, subset: str | None, split: str) -> Iterator[Row]:
    """Rows of a split of a Hugging Face data set, in values that JSON has too, as `read_parquet`.

    Args:
        name: on the hub, or a folder: one that `save_to_disk` wrote, or one of data files.
        subset: the configuration, where the data set has several.
        split: such as `train`, also a part as in `train[:10%]` where `load_dataset` reads it.

    Raises:
        DataError: there is none, it cannot be had, or the library `datasets` is missing.
    """
    try:
        library = importlib.import_module("datasets")
    except ImportError:
        raise DataError(f"reading {name} needs datasets: pip install 'pgrpo[datasets]'") from None
    library.disable_progress_bars()
    folder = Path(name).expanduser()
    saved = any((folder / mark).is_file() for mark in ("state.json", "dataset_dict.json"))
    try:
        if saved:
            found = library.load_from_disk(str(folder))
            if not isinstance(found, library.Dataset):
                found = found[split]
            elif split != "train":
                raise KeyError("a folder of one saved data set has no splits; expected train")
        else:
            found = library.load_dataset(
                str(folder) if folder.is_dir() else name, subset, split=split
            )
    except Exception as problem:  # readers of many formats raise what they like
        said = (str(problem).strip().splitlines() or [""])[0]
        reason = f"{type(problem).__name__}: {said}"
        raise DataError(
            f"data set {name!r}, split {split!r}, cannot be read: {reason}"
        ) from problem
    for number, row in enumerate(found, start=1):
        yield f"{name} {split} row {number}", _as_json(row)


READERS: dict[str, Callable[[Path, Callable[[DataError], None]], Iterator[Row]]] = {
    ".jsonl": read_jsonl,
    ".jsonl.gz": read_jsonl,
    ".json": read_jsonl,
    ".json.gz": read_jsonl,
    ".parquet": lambda path, _: read_parquet(path),
    ".csv": read_csv,
    ".csv.gz": read_csv,
}
"""End of a file's name -> who reads it. Files called `.json` hold an object a line too."""


def read_rows(path: Path, refuse: Callable[[DataError], None] = fail) -> Iterator[Row]:
    """Rows of a file, by the end of its name.

    Args:
        path: of the file.
        refuse: is told of each line of JSON lines that is no object, and each row of CSV of another
            width; by default it raises that.

    Raises:
        DataError: the file does not exist, its name ends in nothing that is known, or it is damaged.
    """
    if not path.is_file():
        state = "is a folder" if path.exists() else "does not exist"
        raise DataError(f"{path} {state}; expected a file")
    for end, read in READERS.items():
        if path.name.endswith(end):
            return read(path, refuse)
    raise DataError(f"{path} ends in {path.suffix!r}; expected one of {', '.join(READERS)}")


def files(kind: str, paths: str | Sequence[str]) -> list[Path]:
    """The files that are named, each once, in the order of their names where a pattern stands for
    several.

    Raises:
        DataError: one does not exist, or a pattern fits none; it is called a `kind` file.
    """
    found: list[Path] = []
    for path in [paths] if isinstance(paths, str) else paths:
        fitting = matching(path)
        if not fitting:
            state = "is a folder" if Path(path).expanduser().is_dir() else "does not exist"
            raise DataError(f"{path} {state}; expected a {kind} file")
        found += fitting
    return list({file.resolve(): file for file in reversed(found)}.values())[::-1]


def matching(path: str) -> list[Path]:
    """The file, or all files that a pattern with `*` fits, in the order of their names.

    Raises:
        DataError: it is no pattern that pathlib knows.
    """
    file = Path(path).expanduser()
    if file.is_file() or "*" not in path:
        return [file] if file.is_file() else []
    try:
        found = Path(file.anchor or ".").glob(str(file.relative_to(file.anchor)))
        return sorted(each for each in found if each.is_file())
    except ValueError as problem:
        raise DataError(f"{path} is no pattern of files: {problem}") from None


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
