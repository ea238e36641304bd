"""Weights & Biases, trackio and MLflow: the same records, for whoever looks at runs there.

Each is imported when it is wanted. Nothing leaves the machine unless the library's own environment
variables say so: WANDB_MODE=online, TRACKIO_SPACE_ID or TRACKIO_SERVER_URL, MLFLOW_TRACKING_URI. A
resumed run continues the tracker's run; steps that it takes again are told again, with the same
numbers, times and memory aside.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pgrpo.runs.records import EvaluationRecord, Record, SampleRecord, StepRecord, numbers


@dataclass(frozen=True)
class Place:
    """Where a tracker files a run."""

    folder: Path
    """The run's folder."""
    project: str
    """`run.project`."""
    name: str
    """The folder's name behind that of its parent."""
    id: str
    """Names this run and no other, the same after a resumption."""
    settings: Mapping[str, str]
    """The whole config, flat."""


class Wandb:
    """Weights & Biases; offline into `RUN/wandb` (for `wandb sync`) unless WANDB_MODE is set."""

    def __init__(self, place: Place) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        wandb: Any = importlib.import_module("wandb")
        self._run: Any = wandb.init(
            project=place.project,
            name=place.name,
            id=place.id,
            resume="allow",
            reinit="create_new",
            mode=os.environ.get("WANDB_MODE", "offline"),
            dir=str(place.folder),
            config=dict(place.settings),
            # The terminal is the display's.
            settings=wandb.Settings(silent=True, console="off"),
        )

    def step(self, record: StepRecord, samples: list[SampleRecord]) -> None:
        """Log a step; it is complete, and sent, when the next one comes or the run is closed."""
        self._run.log(dict(numbers(record)), step=record.step)

    def evaluation(self, record: EvaluationRecord) -> None:
        """Log an evaluation with the step before it."""
        self._run.log(dict(numbers(record, "held_out/")), step=record.step)

    def close(self, *, finished: bool) -> None:
        """Send what is left."""
        self._run.finish(exit_code=0 if finished else 1)


class Trackio:
    """trackio; in its own folder (TRACKIO_DIR), where `trackio show` finds all runs of a project."""

    def __init__(self, place: Place) -> None:
        self._trackio: Any = importlib.import_module("trackio")
        with contextlib.redirect_stdout(io.StringIO()):
            self._run: Any = self._trackio.init(
                project=place.project,
                # Runs are continued by their name.
                name=f"{place.name} {place.id}",
                resume="allow",
                config=dict(place.settings),
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def step(self, record: StepRecord, samples: list[SampleRecord]) -> None:
        """Log a step."""
        self._run.log(dict(numbers(record)), step=record.step)

    def evaluation(self, record: EvaluationRecord) -> None:
        """Log an evaluation."""
        self._run.log(dict(numbers(record, "held_out/")), step=record.step)

    def close(self, *, finished: bool) -> None:
        """Write what is left."""
        with contextlib.redirect_stdout(io.StringIO()):
            self._trackio.finish()


class MLflow:
    """MLflow; files in `RUN/mlruns` unless MLFLOW_TRACKING_URI says otherwise."""

    def __init__(self, place: Place) -> None:
        # A database needs more packages than the client has; files are no longer developed, but read
        # and written.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        tracking: Any = importlib.import_module("mlflow.tracking")
        self._metric: Any = importlib.import_module("mlflow.entities").Metric
        param: Any = importlib.import_module("mlflow.entities").Param
        own = (place.folder / "mlruns").resolve().as_uri()
        self._client: Any = tracking.MlflowClient(os.environ.get("MLFLOW_TRACKING_URI", own))
        experiment = self._client.get_experiment_by_name(place.project)
        experiment_id = (
            experiment.experiment_id
            if experiment
            else self._client.create_experiment(place.project)
        )
        found = self._client.search_runs([experiment_id], f"tags.`pgrpo.run` = '{place.id}'")
        if found:
            self._id: str = found[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
        else:
            tags = {"pgrpo.run": place.id}
            run = self._client.create_run(experiment_id, run_name=place.name, tags=tags)
            self._id = run.info.run_id
            params = [param(_mlflow_name(k), v[:6000]) for k, v in place.settings.items()]
            for start in range(0, len(params), 100):
                self._client.log_batch(self._id, params=params[start : start + 100])

    def step(self, record: StepRecord, samples: list[SampleRecord]) -> None:
        """Log a step."""
        self._log(record, record.step, "")

    def evaluation(self, record: EvaluationRecord) -> None:
        """Log an evaluation."""
        self._log(record, record.step, "held_out/")

    def close(self, *, finished: bool) -> None:
        """Say how it ended."""
        self._client.set_terminated(self._id, "FINISHED" if finished else "KILLED")

    def _log(self, record: Record, step: int, prefix: str) -> None:
        now = int(1000 * time.time())
        metrics = [
            self._metric(_mlflow_name(path), value, now, step)
            for path, value in numbers(record, prefix)
        ]
        # What a server takes at once.
        for start in range(0, len(metrics), 1000):
            self._client.log_batch(self._id, metrics=metrics[start : start + 1000])


def _mlflow_name(path: str) -> str:
    """The path, what MLflow does not allow in a name replaced: it makes files of them."""
    parts = [re.sub(r"[^\w\- .]|^\.+$", "_", part) or "_" for part in path.split("/")]
    return "/".join(parts)
