"""The folder a run lives in: one process at a time, and nothing in it half-written."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from filelock import FileLock, Timeout

from pgrpo.config.toml import resolved_toml
from pgrpo.errors import ConfigError, PgrpoError, RunFolderError
from pgrpo.runs.config import Config, load_config
from pgrpo.runs.disk import disk_errors, flush, replace_file
from pgrpo.runs.log import Log, parse
from pgrpo.runs.records import (
    AbilityRecord,
    EvaluationRecord,
    RunInfo,
    SampleRecord,
    StepRecord,
)


class RunFolder:
    """`config.toml`, `run.json`, the JSON-lines logs and `checkpoints/` of one run.

    Use as a context manager: it holds the folder's lock meanwhile.

    Attributes:
        metrics: the log of the steps.
        evaluations: the log of the held-out evaluations.
        samples: the log of rollouts.
        held_out: the log of held-out completions.
        ability: the log of general ability.
        log: the text file of what ended the run before its time.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.metrics = Log(self.path / "metrics.jsonl", StepRecord)
        self.evaluations = Log(self.path / "evaluations.jsonl", EvaluationRecord)
        self.samples = Log(self.path / "samples.jsonl", SampleRecord)
        self.held_out = Log(self.path / "held_out.jsonl", SampleRecord)
        self.ability = Log(self.path / "ability.jsonl", AbilityRecord)
        self._logs = (self.metrics, self.evaluations, self.samples, self.held_out, self.ability)
        self.log = self.path / "log.txt"
        self._lock = FileLock(self.path / ".lock", timeout=0)
        self._is_new = False

    @property
    def holds_run(self) -> bool:
        """Whether a run was begun here."""
        return (self.path / "config.toml").is_file()

    @property
    def is_finished(self) -> bool:
        """Whether the run here reached its last step."""
        return self.holds_run and self.info().status == "finished"

    def __enter__(self) -> RunFolder:
        with disk_errors(f"run folder {self.path} cannot be used"):
            self._is_new = not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire()
            except Timeout:
                raise RunFolderError(
                    f"run folder {self.path} is in use by another process"
                ) from None
            self.checkpoints.mkdir(exist_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_new and not self.holds_run:
            # The config was refused: an empty folder would only be in the way of the next attempt.
            with contextlib.suppress(OSError):
                self.checkpoints.rmdir()
                (self.path / ".lock").unlink()
                self.path.rmdir()
        self._lock.release()

    def require_new(self) -> None:
        """Refuse a folder with a run in it.

        Raises:
            RunFolderError: there is a run here already.
        """
        if self.holds_run:
            raise RunFolderError(
                f"run folder {self.path} already holds a run; continue it with --resume, or choose "
                "another --out"
            )

    def create(self, config: Config) -> None:
        """Make this the folder of a run, once all that the run needs could be loaded."""
        replace_file(self.path / "config.toml", resolved_toml(config).encode())

    def config(self) -> Config:
        """The run's config.

        Raises:
            RunFolderError: there is no run here.
        """
        if not self.holds_run:
            raise RunFolderError(f"{self.path} is not a run folder: it holds no config.toml")
        return load_config(self.path / "config.toml")

    def longer_config(self, overrides: Sequence[str]) -> Config:
        """The run's config, with more steps if the overrides say so.

        Raises:
            ConfigError: they say anything else, or the run would have fewer steps.
        """
        for override in overrides:
            key = override.partition("=")[0].strip()
            if key != "run.num_steps":
                raise ConfigError(
                    f"--resume continues a run as it was, so --set {key} has no effect; expected "
                    "run.num_steps alone"
                )
        config = self.config()
        longer = load_config(self.path / "config.toml", overrides)
        if longer.run.num_steps < config.run.num_steps:
            raise ConfigError(
                f"run.num_steps is {longer.run.num_steps}; expected {config.run.num_steps} or more, "
                f"for the run in {self.path} was begun with as many"
            )
        return longer

    def info(self) -> RunInfo:
        """What run.json says of the run and the machine; all defaults before the first step.

        Raises:
            RunFolderError: it is damaged.
        """
        path = self.path / "run.json"
        return parse(RunInfo, path.read_bytes(), str(path)) if path.exists() else RunInfo()

    def write_info(self, info: RunInfo) -> None:
        """Replace run.json."""
        replace_file(self.path / "run.json", f"{info.model_dump_json(indent=2)}\n".encode())

    def log_error(self, error: BaseException) -> str:
        """Add an error with its traceback to the log of errors; returns it in one sentence."""
        with (
            disk_errors(f"{self.log} cannot be written"),
            open(self.log, "a", encoding="utf-8") as file,
        ):
            file.write(f"{datetime.now(timezone.utc).isoformat(timespec='seconds')}\n")
            file.writelines(traceback.format_exception(type(error), error, error.__traceback__))
        said = " ".join(str(error).split())
        return said if isinstance(error, PgrpoError) else f"{type(error).__name__}: {said}"

    def best_step(self, last: int) -> int | None:
        """Of steps 1, ..., `last`, the one whose held-out reward is the highest, the first of equal
        ones; None where none of them was evaluated."""
        steps = [
            (-record.reward, record.step)
            for record in self.evaluations
            if 1 <= record.step <= last and record.reward is not None
        ]
        return min(steps)[1] if steps else None

    def flush_logs(self) -> None:
        """Have the logs survive a power cut.

        Raises:
            RunFolderError: the disk refuses.
        """
        for log in self._logs:
            if log.path.exists():
                with disk_errors(f"{log.path} cannot be written"):
                    flush(log.path)

    def rewind(self, step: int) -> None:
        """Forget what the logs say of later steps, which will be taken again; after step 0, of
        what was measured before the first step too."""
        for log in self._logs:
            log.rewind(step)
