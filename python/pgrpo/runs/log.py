"""JSON-lines logs: one record a line, in the order of the steps.

A record is there once the newline behind it is: a last line without one is what a killed process
left, and everybody who reads the log leaves it out, whether or not it could be parsed.
"""

from __future__ import annotations

import io
import math
import os
import re
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Generic, TypeVar

from pydantic import ValidationError

from pgrpo.errors import RunFolderError
from pgrpo.runs.disk import disk_errors
from pgrpo.runs.records import (
    AbilityRecord,
    EvaluationRecord,
    Record,
    SampleRecord,
    StepRecord,
)

RecordT = TypeVar("RecordT", bound=Record)
LogT = TypeVar("LogT", StepRecord, EvaluationRecord, SampleRecord, AbilityRecord)

_STEP = re.compile(rb'"step":\s*(\d+)')
_STEP_WITHIN = 64
"""Bytes of a line that are looked at for its step, with which every record begins."""


class Log(Generic[LogT]):
    """One log of a run folder; a file that does not exist holds no record."""

    def __init__(self, path: Path, record: type[LogT]) -> None:
        self.path = path
        self._record = record

    def append(self, *records: LogT) -> None:
        """Add a line for each record.

        Raises:
            RunFolderError: the disk refuses.
        """
        lines = "".join(record.model_dump_json() + "\n" for record in records)
        with (
            disk_errors(f"{self.path} cannot be written"),
            open(self.path, "a", encoding="utf-8") as file,
        ):
            file.write(lines)

    def __iter__(self) -> Iterator[LogT]:
        """All records, one at a time.

        Raises:
            RunFolderError: a line is damaged; it is named.
        """
        with self._open() as file:
            for number, line in enumerate(_whole_lines(file), 1):
                yield self._parse(line, f"line {number}")

    def at(self, steps: Sequence[int]) -> Iterator[LogT]:
        """The records of some steps: few of a long log are found without reading the rest.

        Args:
            steps: in any order; those without a record are left out.

        Raises:
            RunFolderError: a line that is met is damaged.
        """
        with self._open() as file:
            size = file.seek(0, os.SEEK_END)

            def step_behind(place: int) -> float:
                _to_line(file, place)
                start = file.readline(_STEP_WITHIN)
                torn = len(start) < _STEP_WITHIN and not start.endswith(b"\n")
                return math.inf if torn else self._step(start)

            for step in steps:
                # Lines are in the order of their steps, so each may be looked for by halving.
                found = bisect_left(range(size), step, key=step_behind)
                for line in _whole_lines(file, found):
                    if self._step(line) != step:
                        break
                    yield self._parse(line, f"line of step {step}")

    def ends(self) -> tuple[int, int] | None:
        """The first and the last step that has a record; None where there is none."""
        with self._open() as file:
            first = next(_whole_lines(file), None)
            if first is None:
                return None
            size, reach, last = file.seek(0, os.SEEK_END), 1 << 16, deque[bytes]()
            while not last:
                # The last line may be longer than what is looked at first.
                last = deque(_whole_lines(file, max(0, size - reach)), maxlen=1)
                reach *= 2
            return self._step(first), self._step(last[0])

    def rewind(self, step: int) -> None:
        """Forget later steps, which will be taken again, and what a killed process left of a line;
        after step 0, of what was measured before the first step too.

        Raises:
            RunFolderError: a line is damaged, or the disk refuses.
        """
        kept = 0
        with self._open() as file:
            for number, line in enumerate(_whole_lines(file), 1):
                if not self._parse(line, f"line {number}").step <= step > 0:
                    break
                kept += len(line)
        if self.path.exists():
            with disk_errors(f"{self.path} cannot be written"):
                os.truncate(self.path, kept)

    def _open(self) -> IO[bytes]:
        return open(self.path, "rb") if self.path.exists() else io.BytesIO()

    def _step(self, line: bytes) -> int:
        found = _STEP.search(line)
        if found is None:
            raise RunFolderError(f"{self.path} is damaged: a line names no step: {line[:60]!r}")
        return int(found[1])

    def _parse(self, line: bytes, which: str) -> LogT:
        return parse(self._record, line, f"{self.path} {which}")


def parse(record: type[RecordT], text: bytes, where: str) -> RecordT:
    """A record from JSON.

    Raises:
        RunFolderError: `where` is damaged: the name, the value met and what was expected.
    """
    try:
        return record.model_validate_json(text)
    except ValidationError as error:
        complaint = error.errors()[0]
        key = ".".join(map(str, complaint["loc"]))
        what = f"{key} is {complaint['input']!r:.60}: " if key else ""
        raise RunFolderError(f"{where} is damaged: {what}{complaint['msg']}") from None


def _whole_lines(file: IO[bytes], place: int = 0) -> Iterator[bytes]:
    """The lines that start at or behind a place and have their newline."""
    _to_line(file, place)
    for line in file:
        if line.endswith(b"\n"):
            yield line


def _to_line(file: IO[bytes], place: int) -> None:
    """Go to the first line that starts at or behind a place."""
    file.seek(max(0, place - 1))
    if place:
        file.readline()
