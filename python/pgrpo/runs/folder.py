"""The folder a run lives in: one process at a time, and nothing in it half-written."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from filelock import FileLock, Timeout

from pgrpo.config.toml import resolved_toml
from pgrpo.errors import RunFolderError
from pgrpo.runs.config import Config, load_config

Record = dict[str, Any]


class RunFolder:
    """`config.toml`, `run.json`, the JSON-lines logs and `checkpoints/` of one run.

    Use as a context manager: it holds the folder's lock meanwhile.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self._lock = FileLock(self.path / ".lock", timeout=0)
        self._is_new = False

    @property
    def holds_run(self) -> bool:
        """Whether a run was begun here."""
        return (self.path / "config.toml").is_file()

    @property
    def is_finished(self) -> bool:
        """Whether the run here reached its last step."""
        return self.holds_run and self.info().get("status") == "finished"

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
        self.write("config.toml", resolved_toml(config))

    def config(self) -> Config:
        """The run's config.

        Raises:
            RunFolderError: there is no run here.
        """
        if not self.holds_run:
            raise RunFolderError(f"{self.path} is not a run folder: it holds no config.toml")
        return load_config(self.path / "config.toml")

    def info(self) -> Record:
        """What run.json says of the run and the machine; empty before the first step."""
        try:
            return cast(Record, json.loads((self.path / "run.json").read_text(encoding="utf-8")))
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise RunFolderError(f"{self.path / 'run.json'} is damaged: {error}") from None

    def write_info(self, info: Mapping[str, Any]) -> None:
        """Replace run.json."""
        self.write("run.json", json.dumps(info, indent=2) + "\n")

    def write(self, name: str, text: str) -> None:
        """Replace a file, whole or not at all."""
        target = self.path / name
        partial = target.with_name(f".{target.name}.partial")
        with disk_errors(f"{target} cannot be written"):
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, target)

    def append(self, name: str, *records: Mapping[str, Any]) -> None:
        """Add lines to a JSON-lines log."""
        lines = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
        with (
            disk_errors(f"{self.path / name} cannot be written"),
            open(self.path / name, "a", encoding="utf-8") as file,
        ):
            file.write(lines)

    def records(self, name: str) -> list[Record]:
        """The whole lines of a JSON-lines log; a last line that was cut short is left out."""
        try:
            text = (self.path / name).read_text(encoding="utf-8")
            return [json.loads(line) for line in text.split("\n")[:-1]]
        except FileNotFoundError:
            return []
        except ValueError as error:
            raise RunFolderError(f"{self.path / name} is damaged: {error}") from None

    def rewind(self, step: int) -> None:
        """Forget what the logs say of later steps, which will be taken again; after step 0, of the
        evaluation before the first step too."""
        for name in ("metrics.jsonl", "evaluations.jsonl", "samples.jsonl"):
            if (self.path / name).exists():
                kept = [record for record in self.records(name) if 0 <= record["step"] <= step > 0]
                self.write(name, "".join(json.dumps(record) + "\n" for record in kept))


class disk_errors:  # noqa: N801 - a context manager, used like a function
    """Turns the operating system's refusals into one sentence; `what` says what failed."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        # Libraries written in Rust report the system's refusal in errors of their own.
        if any(os.strerror(code) in str(error) for code in (errno.ENOSPC, errno.EDQUOT)):
            raise RunFolderError(f"{self._what}: the disk is full") from error
        if isinstance(error, OSError):
            raise RunFolderError(f"{self._what}: {error.strerror or error}") from error
