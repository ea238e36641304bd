"""The distributions of plugins/, built and installed as a user would, each into a folder of its own."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import tomli

from pgrpo.config.sections import ClusteringConfig, RewardConfig
from pgrpo.plugins.registry import load_registry

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


@contextmanager
def importable(site: Path, package: str) -> Generator[None]:
    """This process finds what is installed in `site` too, until it leaves."""
    sys.path.insert(0, str(site))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(site))
        for name in [name for name in sys.modules if name.partition(".")[0] == package]:
            del sys.modules[name]


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


def check_readme(name: str) -> None:
    """The sections in the TOML of a distribution's README are those of installed plugins."""
    registry = load_registry()
    shown = re.findall(r"```toml\n(.*?)```", (PLUGINS / name / "README.md").read_text(), re.DOTALL)
    assert shown
    for config in map(tomli.loads, shown):
        for section in config.get("rewards", []):
            registry.check("reward", RewardConfig.model_validate(section))
        if "clustering" in config:
            registry.check("clusterer", ClusteringConfig.model_validate(config["clustering"]))
