"""Where the records of a run go: the logs in its folder, the display, and the trackers.

Every sink gets the same objects, the logs first: what a tracker fails on is not lost.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from pgrpo.config.toml import flat, resolved_tree
from pgrpo.errors import ConfigError, PgrpoError
from pgrpo.runs.config import Config
from pgrpo.runs.display import Display
from pgrpo.runs.folder import RunFolder
from pgrpo.runs.records import EvaluationRecord, SampleRecord, StepRecord
from pgrpo.runs.tensorboard import TensorBoard
from pgrpo.runs.trackers import MLflow, Place, Trackio, Wandb


class Sink(Protocol):
    """Takes the records of a run, in the order of its steps."""

    def step(self, record: StepRecord, samples: list[SampleRecord]) -> None:
        """A step was taken."""
        ...

    def evaluation(self, record: EvaluationRecord) -> None:
        """A held-out evaluation was made."""
        ...

    def close(self, *, finished: bool) -> None:
        """No record follows; `finished` where the run reached its last step."""
        ...


class Sinks:
    """All sinks of a run, used as one; a context manager that closes them.

    A tracker that raises is told of in one line and gets nothing more until the run is started
    again; the run goes on.

    Args:
        folder: of the run; its logs.
        display: shows the progress.
        trackers: name -> tracker.
    """

    def __init__(self, folder: RunFolder, display: Display, trackers: dict[str, Sink]) -> None:
        self._folder = folder
        self._display = display
        self._trackers = dict(trackers)

    def log(self, record: StepRecord, samples: list[SampleRecord]) -> None:
        """Write a step to the logs of the folder: with that it is done.

        Raises:
            RunFolderError: the disk refuses.
        """
        self._folder.metrics.append(record)
        self._folder.samples.append(*samples)

    def show(self, record: StepRecord, samples: list[SampleRecord]) -> None:
        """Show a step that is logged, and let the trackers know."""
        self._display.step(record, samples)
        self._tell(lambda tracker: tracker.step(record, samples))

    def evaluation(self, record: EvaluationRecord, samples: Sequence[SampleRecord] = ()) -> None:
        """Write and show an evaluation, and write some of its completions.

        Raises:
            RunFolderError: the disk refuses.
        """
        self._folder.evaluations.append(record)
        self._folder.held_out.append(*samples)
        self._display.evaluation(record)
        self._tell(lambda tracker: tracker.evaluation(record))

    def __enter__(self) -> Sinks:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(finished=kind is None)

    def close(self, *, finished: bool) -> None:
        """No record follows."""
        self._tell(lambda tracker: tracker.close(finished=finished))

    def _tell(self, send: Callable[[Sink], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                send(tracker)
            except Exception as error:
                del self._trackers[name]
                with contextlib.suppress(Exception):
                    tracker.close(finished=False)
                self._display.note(
                    f"warning: {name} failed and gets no more of this run; all is in "
                    f"{self._folder.path}: {' '.join(str(error).split())}"
                )


def require_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker that is not installed, before anything is loaded.

    Raises:
        ConfigError: names the extra to install.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"run.trackers names {name!r}, which is not installed; install it with pip install "
                f"'pgrpo[{'train' if name == 'tensorboard' else name}]'"
            )


def open_sinks(config: Config, folder: RunFolder, display: Display, first_step: int) -> Sinks:
    """The sinks that a config asks for, once the folder has its run.json.

    Raises:
        ConfigError: a tracker is not installed, or cannot be started.
        RunFolderError: the disk refuses.
    """
    require_trackers(config.run.trackers)
    place = Place(
        folder.path,
        config.run.project,
        run_name(folder.path),
        folder.info().id,
        dict(flat(resolved_tree(config))),
    )
    makers: dict[str, Callable[[], Sink]] = {
        "tensorboard": lambda: TensorBoard(folder.path / "tensorboard", first_step),
        "wandb": lambda: Wandb(place),
        "trackio": lambda: Trackio(place),
        "mlflow": lambda: MLflow(place),
    }
    trackers: dict[str, Sink] = {}
    for name in dict.fromkeys(config.run.trackers):
        try:
            trackers[name] = makers[name]()
        except Exception as error:
            Sinks(folder, display, trackers).close(finished=False)
            if isinstance(error, PgrpoError):
                raise
            raise ConfigError(
                f"run.trackers: {name} cannot be started: {' '.join(str(error).split())}"
            ) from error
    return Sinks(folder, display, trackers)


def run_name(folder: Path) -> str:
    """A run's name: that of its folder behind that of its parent, as `compare` makes ARM/seed-K."""
    return "/".join(folder.resolve().parts[-2:])
