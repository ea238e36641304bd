"""What a run says when the disk refuses, and files that are replaced whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Generator
from pathlib import Path

from filelock import FileLock, Timeout

from pgrpo.errors import RunFolderError


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


def replace_file(target: Path, content: bytes) -> None:
    """Write a file, whole or not at all.

    Raises:
        RunFolderError: the disk refuses.
    """
    partial = target.with_name(f".{target.name}.partial")
    with disk_errors(f"{target} cannot be written"):
        partial.write_bytes(content)
        os.replace(partial, target)


def flush(path: Path) -> None:
    """Make a file's contents, or a folder's entries, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(folder: Path) -> Generator[None]:
    """Make a folder, if it is not there, and have it alone.

    Raises:
        RunFolderError: another process has it, or the disk refuses.
    """
    with disk_errors(f"{folder} cannot be used"):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout:
        raise RunFolderError(f"{folder} is in use by another process") from None
