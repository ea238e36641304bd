"""The file by which processes of one machine share a table, and its mapping.

The file comes to its name complete, by a hard link, so that nobody sees a half-made one. Whoever
has it mapped holds a shared lock on it, which the kernel drops with the process, however that ends.
Who could lock it alone knows that nobody else is using it, and repairs what killed processes left.

Everybody may make files in the folders of names, so a table is opened only from a file that no other
user can have put there or can write to. What was opened is checked, not what the path leads to
before or after.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from pgrpo.errors import ConfigError, PgrpoError
from pgrpo.normalizer import _core
from pgrpo.normalizer.arrays import short
from pgrpo.normalizer.options import Options

if sys.platform != "win32":
    import fcntl


def shared_path(path_or_name: str | os.PathLike[str]) -> Path:
    """The file of a shared table: a path as it is; a name without a path separator in memory.

    That is `/dev/shm/pgrpo-NAME` on Linux, `pgrpo-NAME` in the folder for temporary files elsewhere.
    The table lives until this file is deleted or, in memory, until the machine goes down.
    """
    text = os.fspath(path_or_name)
    if not text:
        raise ConfigError("shared table: its name is empty; expected a name or a path")
    if os.sep in text or (os.altsep or os.sep) in text or not isinstance(path_or_name, str):
        return Path(text)
    folder = "/dev/shm" if sys.platform == "linux" else tempfile.gettempdir()  # noqa: S108
    return Path(folder, f"pgrpo-{text}")


def open_table(path: Path, options: Options, capacity: int) -> _core.Normalizer:
    """A normalizer whose histories lie in the file of a shared table, which is made if there is none.

    Raises:
        ConfigError: the table is of another capacity, other sums or another `forgetting`, or no table.
    """
    if isinstance(cast(object, capacity), bool) or not isinstance(cast(object, capacity), int):
        raise ConfigError(f"capacity is {short(capacity)}; expected an int")
    agreed = f"forgetting={float(options.forgetting)!r}"
    try:
        length, header = _core.layout(options, capacity, agreed)
    except OverflowError:
        raise ConfigError(f"capacity is {capacity}; expected a positive int") from None
    with mapped(path, length, header) as (mapping, alone):
        return _core.Normalizer(options, (str(path), mapping, capacity, agreed, alone))


@contextlib.contextmanager
def mapped(
    path: Path, length: int, header: bytes
) -> Generator[tuple[NDArray[np.uint8], bool], None, None]:
    """Map the file of a shared table, making it if there is none.

    The mapping, and with it the lock, lasts as long as the array or a view of it. Inside the `with`
    block nobody else may have come when `alone` is true; others that open the file wait meanwhile.

    Args:
        path: the file.
        length: bytes of the file if it has to be made.
        header: its first bytes then. All others are zeros.

    Yields:
        The bytes of the file [its length], writable, and `alone`: nobody else has it mapped. Always
        false on Windows.

    Raises:
        ConfigError: the file cannot be made or mapped, is none, or is not this user's alone to write
            to; or, with the path added, one that was raised inside the block.
    """
    try:
        try:
            descriptor = _open(path)
        except FileNotFoundError:
            _make(path, length, header)
            descriptor = _open(path)
        with os.fdopen(descriptor, "r+b", buffering=0) as file:
            _check(os.fstat(descriptor))
            alone = _lock(file.fileno())
            # The mapping keeps a descriptor of its own on the same open file: the lock stays.
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_WRITE)
            try:
                yield np.frombuffer(memory, np.uint8), alone
            finally:
                # Also after an error, whose traceback may keep the mapping for a while.
                if sys.platform != "win32":
                    fcntl.flock(file, fcntl.LOCK_SH)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except PgrpoError:
        raise
    except (OSError, ValueError) as error:
        # Python refuses to map an empty file with a ValueError.
        raise ConfigError(f"{path}: cannot be a shared table: {error}") from None


def _open(path: Path) -> int:
    if sys.platform == "win32":
        return os.open(path, os.O_RDWR | os.O_BINARY)
    try:
        # Python adds O_CLOEXEC. A device could keep whoever opens it waiting, but for O_NONBLOCK.
        return os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        # Systems have different errors for it.
        if path.is_symlink():
            raise ConfigError(
                "shared table: is a symbolic link; expected a regular file of this user"
            ) from None
        raise


def _check(met: os.stat_result) -> None:
    """Refuse a file that is not this user's, or that others may write to."""
    if not stat.S_ISREG(met.st_mode):
        kind = stat.filemode(met.st_mode)[0]
        raise ConfigError(f"shared table: is of kind {kind!r}; expected a regular file")
    if sys.platform == "win32":
        return
    if met.st_uid != os.geteuid():
        raise ConfigError(
            f"shared table: belongs to user {met.st_uid}; expected user {os.geteuid()}, "
            "whose process this is"
        )
    if met.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(
            f"shared table: others may write to it, by its mode {stat.S_IMODE(met.st_mode):04o}; "
            "expected one by which only its owner may, such as 0600"
        )


def _make(path: Path, length: int, header: bytes) -> None:
    free = shutil.disk_usage(path.parent).free
    if length > free:
        # The file is sparse; a page that then finds no room would kill its process by SIGBUS.
        raise ConfigError(f"a shared table of {length} bytes finds {free} free; lower its capacity")
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-") as file:
        if sys.platform != "win32":
            # A umask may have taken more than the rights of others.
            os.fchmod(file.fileno(), 0o600)
        file.write(header)
        file.truncate(length)
        # Where another process was faster, its file is as good.
        with contextlib.suppress(FileExistsError):
            os.link(file.name, path)


def _lock(descriptor: int) -> bool:
    """Lock a file alone if nobody else has locked it, else together with the others."""
    if sys.platform == "win32":
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        return False
    return True
