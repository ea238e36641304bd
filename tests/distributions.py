"""The distributions of plugins/, built and installed as a user would, each into a folder of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

PLUGINS = Path(__file__).parents[1] / "plugins"


def install(name: str, folder: Path) -> Path:
    """Build a distribution and install the wheel; returns the folder that belongs on sys.path.

    Args:
        name: of the distribution and its folder.
        folder: an empty one, for the source that is built and for what is installed.
    """
    source, site = folder / "source", folder / "site"
    # Building leaves files beside the source.
    shutil.copytree(PLUGINS / name, source)
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    pip = [uv, "pip"] if uv else [sys.executable, "-m", "pip"]
    which = ["--python", sys.executable] if uv else []
    options = ["--no-deps", "--no-build-isolation", "--target", str(site)]
    subprocess.run([*pip, "install", *which, *options, str(source)], check=True, timeout=120)
    return site


def pgrpo(site: Path, *arguments: str) -> str:
    """What `pgrpo ARGUMENTS` prints in a process of its own that finds what is installed in `site`."""
    path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "pgrpo", *arguments],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
