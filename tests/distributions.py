"""Distributions of plugins, built and installed as a user would.

`fresh` makes an environment that holds a distribution, what it declares to need, and nothing else: what
it forgets to declare is missing there. `install` is quicker, and for tests that look at what is in a
distribution: it puts the distribution alone into a folder beside the packages of this process.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import tomli

import pgrpo
from pgrpo.config.sections import ClusteringConfig, RewardConfig
from pgrpo.plugins.registry import load_registry

ROOT = Path(__file__).parents[1]
PLUGINS = ROOT / "plugins"


def fresh(source: Path, folder: Path, *extras: str) -> Path:
    """An environment of its own for a distribution; returns the folder of its commands.

    The distribution is built by the backend that it names, and what it needs is resolved from what it
    declares, in the versions of constraints.txt: out of uv's cache, else from the registry. pgrpo is a
    wheel of the package that is tested.

    Args:
        source: the distribution's folder.
        folder: an empty one.
        extras: of the distribution.
    """
    venv = folder / "venv"
    wanted = f"{_copy(source, folder)}[{','.join(extras)}]"
    own = f"pgrpo @ {_own_wheel(folder).as_uri()}"
    constraints = ["--constraint", str(ROOT / "constraints.txt")]
    for command in (
        ["venv", "--python", sys.executable, str(venv)],
        ["pip", "install", "--python", str(venv), *constraints, wanted, own],
    ):
        uv = [sys.executable, "-m", "uv", "--quiet", *command]
        subprocess.run(uv, check=True, timeout=600, env=outside())
    return venv / ("Scripts" if os.name == "nt" else "bin")


def run(command: str, environment: Path, *arguments: str, cwd: Path | None = None) -> str:
    """What a command of a fresh environment prints."""
    return _output([str(environment / command), *arguments], outside(), cwd)


def _output(command: Sequence[str], env: Mapping[str, str], cwd: Path | None = None) -> str:
    done = subprocess.run(
        command, env=env, cwd=cwd, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def outside() -> dict[str, str]:
    """The environment variables for a process that is to find nothing of this one's packages."""
    mine = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PYTHONDONTWRITEBYTECODE")
    return {name: value for name, value in os.environ.items() if name not in mine}


def _own_wheel(folder: Path) -> Path:
    """pgrpo as a wheel, of the files that this process imports and the metadata of what is installed:
    to build it would compile the core once more."""
    package, info = Path(pgrpo.__file__).parent, metadata.distribution("pgrpo")
    path = folder / f"pgrpo-{info.version}-py3-none-any.whl"
    about = f"pgrpo-{info.version}.dist-info"
    texts = {
        f"{about}/METADATA": info.read_text("METADATA"),
        f"{about}/entry_points.txt": info.read_text("entry_points.txt"),
        f"{about}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: py3-none-any\n",
    }
    files = [file for file in package.rglob("*") if file.is_file() and file.suffix != ".pyc"]
    names = {file: file.relative_to(package.parent).as_posix() for file in files}
    with zipfile.ZipFile(path, "w") as wheel:
        for file, name in names.items():
            wheel.write(file, name)
        for name, text in texts.items():
            wheel.writestr(name, text or "")
        with wheel.open(f"{about}/RECORD", "w") as binary:
            rows = [*names.values(), *texts, f"{about}/RECORD"]
            binary.write("".join(f"{name},,\n" for name in rows).encode())
    return path


def install(source: Path, folder: Path) -> Path:
    """Build a distribution out of a copy of its folder and install it beside the packages of this
    process, its dependencies not looked at; returns the folder that belongs on sys.path.

    Args:
        source: the distribution's folder.
        folder: an empty one, for the copy and for what is installed.
    """
    site = folder / "site"
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    pip = [uv, "pip"] if uv else [sys.executable, "-m", "pip"]
    which = ["--python", sys.executable] if uv else []
    options = ["--no-deps", "--no-build-isolation", "--target", str(site)]
    subprocess.run(
        [*pip, "install", *which, *options, str(_copy(source, folder))], check=True, timeout=120
    )
    return site


def _copy(source: Path, folder: Path) -> Path:
    """Of a distribution's folder, for building leaves files beside the source."""
    return Path(shutil.copytree(source, folder / "source"))


def pgrpo_with(site: Path, *arguments: str) -> str:
    """What `pgrpo ARGUMENTS` prints in a process of its own that finds what is installed in `site`."""
    path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    return _output([sys.executable, "-m", "pgrpo", *arguments], {**os.environ, "PYTHONPATH": path})


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
