"""A TensorBoard event file, written on the spot."""

from __future__ import annotations

import importlib
import os
import platform
import time
from pathlib import Path
from typing import Any

from pgrpo.runs.disk import disk_errors
from pgrpo.runs.records import EvaluationRecord, Record, SampleRecord, StepRecord, numbers


class TensorBoard:
    """Every number of a record under its path, those of an evaluation below `held_out/`.

    By hand, for torch's SummaryWriter writes from a thread of its own, where a full disk is noticed
    too late to be told, and what is not flushed is lost with the process.

    Args:
        folder: what `tensorboard --logdir` is pointed at.
        first_step: of what will be written; TensorBoard forgets what earlier files say of it and of
            later steps, which a resumed run takes again.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        # tensorboard's modules are untyped, and made when they are imported.
        protocol: Any = importlib.import_module("tensorboard.compat.proto.event_pb2")
        summary: Any = importlib.import_module("tensorboard.compat.proto.summary_pb2")
        records: Any = importlib.import_module("tensorboard.summary.writer.record_writer")
        self._event, self._summary = protocol.Event, summary.Summary
        self._framed = records.RecordWriter
        name = f"events.out.tfevents.{int(time.time())}.{platform.node()}.{os.getpid()}"
        self._path = folder / name
        with disk_errors(f"{self._path} cannot be written"):
            folder.mkdir(exist_ok=True)
        self._add(file_version="brain.Event:2")
        start = protocol.SessionLog(status=protocol.SessionLog.START)
        self._add(step=first_step, session_log=start)

    def step(self, record: StepRecord, samples: list[SampleRecord]) -> None:
        """Write a step; samples are no numbers."""
        self._write(record, record.step, "")

    def evaluation(self, record: EvaluationRecord) -> None:
        """Write an evaluation."""
        self._write(record, record.step, "held_out/")

    def close(self, *, finished: bool) -> None:
        """Nothing is open between two records."""

    def _write(self, record: Record, step: int, prefix: str) -> None:
        values = [
            self._summary.Value(tag=path, simple_value=value)
            for path, value in numbers(record, prefix)
        ]
        self._add(step=step, summary=self._summary(value=values))

    def _add(self, **fields: Any) -> None:
        event = self._event(wall_time=time.time(), **fields)
        with disk_errors(f"{self._path} cannot be written"), open(self._path, "ab") as file:
            self._framed(file).write(event.SerializeToString())
