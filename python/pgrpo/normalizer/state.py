"""All that a normalizer remembers, as plain lists and as a file.

The core hands it over as ids and columns, and checks what the numbers may be; types and lengths are
checked here, for everything that a dict out of a file may hold.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np

from pgrpo.errors import CheckpointError
from pgrpo.normalizer.arrays import MAX_ID, short
from pgrpo.types import ClusterId, FloatArray

VERSION = 3

SUMS: tuple[str, ...] = (
    "count", "origin", "offset", "m2",
    "num_parts", "squared_sizes", "within_squares",
    "baseline_0", "baseline_1", "baseline_2",
    "num_advantages", "advantage_sum", "advantage_squares",
)  # fmt: skip
"""What a normalizer keeps of a cluster, in the order of the core's columns."""


POOL = SUMS[:4]
"""What it keeps of all clusters together where an option reads that; zeros where none does."""

Pool: TypeAlias = tuple[float, float, float, float]
"""Numbers of `POOL`."""
PARENT = "parent"
Id: TypeAlias = ClusterId | dict[str, ClusterId]
"""Of a cluster; or of a parent, as `{"parent": id}`."""
Columns: TypeAlias = tuple[list[Id], FloatArray, list[Id], FloatArray, Pool, int]
"""Ids [K] and sums [K, 13] of all clusters and parents; the same of what the next delta holds; the
history of all clusters together; number of non-finite rewards."""


@dataclass(frozen=True, slots=True)
class ClusterStats:
    """The reward history of one cluster, in units of the raw reward."""

    count: float
    """Finite rewards seen, an int; a float where they were weighted or forgotten into a fraction."""
    mean: float
    """Their mean."""
    std: float
    """Their standard deviation, dividing by count - ddof; 0 where count <= ddof."""


def part(
    ids: list[Id], sums: FloatArray, of_parents: bool = False
) -> tuple[list[ClusterId], FloatArray]:
    """Ids and sums of the clusters alone, or of the parents."""
    places = [place for place, name in enumerate(ids) if isinstance(name, dict) == of_parents]
    names = (ids[place] for place in places)
    return [name[PARENT] if isinstance(name, dict) else name for name in names], sums[places]


def stats(columns: Columns, ddof: int, of_parents: bool = False) -> dict[ClusterId, ClusterStats]:
    """Count, mean and standard deviation of each cluster, or of each parent."""
    ids, sums = part(columns[0], columns[1], of_parents)
    counts, origin, offset, m2 = sums[:, :4].T
    std = deviation(counts, m2, ddof)
    rows = zip(ids, counts.tolist(), (origin + offset).tolist(), std.tolist(), strict=True)
    return {
        cluster: ClusterStats(int(n) if n.is_integer() else n, mean, sigma)
        for cluster, n, mean, sigma in rows
    }


def deviation(count: FloatArray, m2: FloatArray, ddof: int) -> FloatArray:
    """Standard deviations sqrt(m2 / (count - ddof)) [K]; 0 where count <= ddof."""
    degrees = count - ddof
    return np.sqrt(np.divide(m2, degrees, out=np.zeros_like(m2), where=degrees > 0))


def to_dict(columns: Columns) -> dict[str, Any]:
    """Columns as plain lists of ints, strings and floats."""
    ids, sums, pending_ids, pending, pool, num_nonfinite = columns
    return {
        "version": VERSION,
        **_lists(ids, sums),
        "pending": _lists(pending_ids, pending),
        "pool": dict(zip(POOL, pool, strict=True)),
        "num_nonfinite": num_nonfinite,
    }


def from_dict(state: Mapping[str, Any]) -> Columns:
    """The columns that `to_dict` made lists of.

    Raises:
        CheckpointError: it lacks a key, or holds something of another type or length.
    """
    keys = ["version", "clusters", *SUMS, "pending", "pool", "num_nonfinite"]
    _expect_keys(state, keys, "")
    version, num_nonfinite = state["version"], state["num_nonfinite"]
    _expect(version == VERSION, f"version is {short(version)}; expected {VERSION}")
    whole = type(num_nonfinite) is int and 0 <= num_nonfinite < 2**63
    _expect(whole, f"num_nonfinite is {short(num_nonfinite)}; expected an int of at least 0")
    pending = state["pending"]
    _expect_keys(pending, ["clusters", *SUMS], "pending ")
    _expect_keys(state["pool"], POOL, "pool ")
    for key, value in state["pool"].items():
        _expect(type(value) is float, f"pool {key} is {short(value)}; expected float")
    pool = cast(Pool, tuple(state["pool"][key] for key in POOL))
    return *_read_lists(state, ""), *_read_lists(pending, "pending "), pool, num_nonfinite


def write_file(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file whole or not at all, through to the disk.

    Raises:
        CheckpointError: it cannot be written.
    """
    target = Path(path)
    partial = target.with_name(f".{target.name}.{secrets.token_hex(8)}.partial")
    try:
        try:
            with open(partial, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
        _flush_folder(target.parent)
    except OSError as error:
        raise CheckpointError(f"cannot write {target}: {error.strerror or error}") from None


def read_file(path: str | os.PathLike[str]) -> bytes:
    """What `write_file` wrote.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None


def _lists(ids: list[Id], columns: FloatArray) -> dict[str, list[Any]]:
    return {"clusters": ids, **dict(zip(SUMS, columns.T.tolist(), strict=True))}


def _expect(condition: bool, complaint: str) -> None:
    if not condition:
        raise CheckpointError(f"normalizer state: {complaint}")


def _expect_keys(state: Any, keys: Sequence[str], where: str) -> None:
    what = where.strip() or "it"
    _expect(isinstance(state, Mapping), f"{what} is {short(state)}; expected a dict")
    found = ", ".join(map(str, cast(Mapping[Any, Any], state))) or "nothing"
    _expect(set(state) == set(keys), f"{what} holds {found}; expected {', '.join(keys)}")


def _read_lists(state: Mapping[str, Any], where: str) -> tuple[list[Id], FloatArray]:
    """Ids [K] and columns [K, 13] of lists that have the right types and lengths."""
    for key in ("clusters", *SUMS):
        column = state[key]
        _expect(isinstance(column, list), f"{where}{key} is {short(column)}; expected a list")
        types, names = ((int, str), "int or str") if key == "clusters" else ((float, int), "float")
        for index, given in enumerate(cast(list[Any], column)):
            value = given
            if key == "clusters" and isinstance(given, dict) and set(given) == {PARENT}:
                value = given[PARENT]
            kind = type(value)
            if kind not in types or (kind is int and not -MAX_ID <= value < MAX_ID):
                _expect(False, f"{where}{key}[{index}] is {short(given)}; expected {names}")
    ids = cast(list[Id], state["clusters"])
    sizes = {key: len(state[key]) for key in SUMS if len(state[key]) != len(ids)}
    for key, size in sizes.items():
        _expect(False, f"{where}clusters has {len(ids)} entries, {where}{key} has {size}")
    different = {tuple(name.items()) if isinstance(name, dict) else name for name in ids}
    _expect(len(different) == len(ids), f"{where}clusters names one of them twice")
    columns = np.array([state[key] for key in SUMS], np.float64)
    return ids, np.ascontiguousarray(columns.reshape(len(SUMS), len(ids)).T)


def _flush_folder(folder: Path) -> None:
    """Make a rename last through a loss of power, where folders can be flushed."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
