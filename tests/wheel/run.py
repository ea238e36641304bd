"""Installs wheels into empty environments, with NumPy alone, and runs check.py there.

    python tests/wheel/run.py dist --pythons 3.10 3.13 3.14t [--require-all]

Every Python gets two environments: with the newest NumPy and with the oldest that the wheel permits
and that has wheels for it. Needs uv, which finds the Pythons, also those of pyenv.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CHECK = Path(__file__).with_name("check.py")
PLATFORMS = {
    "linux": r"(manylinux_2_17|manylinux2014|musllinux_1_2)_\w+",
    "darwin": r"macosx_\d+_\d+_\w+",
    "win32": r"win_\w+",
}


def uv(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "uv", *arguments]
    return subprocess.run(command, env=environment(), text=True, **options)


def environment() -> dict[str, str]:
    """Nothing of the caller's Python, and every version of pyenv switched on, if it is there."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    kept.pop("VIRTUAL_ENV", None)
    if pyenv := shutil.which("pyenv"):
        versions = subprocess.run([pyenv, "versions", "--bare"], capture_output=True, text=True)
        kept["PYENV_VERSION"] = ":".join(reversed(versions.stdout.split()))
    return kept


def find_python(version: str) -> str | None:
    found = uv("python", "find", "--system", "--no-python-downloads", version, capture_output=True)
    return found.stdout.strip() or None


def wheel_for(version: str, wheels: list[Path]) -> Path:
    """The abi3 wheel, or for a free-threaded Python the one built for it."""
    minor = re.fullmatch(r"3\.(\d+)(t?)", version)
    assert minor, f"{version} is no Python version; expected 3.X or 3.Xt"
    tag = f"cp3{minor[1]}-cp3{minor[1]}t" if minor[2] else "cp310-abi3"
    fitting = [wheel for wheel in wheels if f"-{tag}-" in wheel.name]
    assert len(fitting) == 1, f"{len(fitting)} wheels are {tag}; expected one of {wheels}"
    platforms = fitting[0].stem.split(f"-{tag}-")[1]
    for platform in platforms.split("."):
        expected = PLATFORMS[sys.platform]
        assert re.fullmatch(expected, platform), f"tag {platform}; expected {expected}"
    return fitting[0]


def check(python: str, wheel: Path, resolution: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        venv = Path(folder, "venv")
        uv("venv", "--quiet", "--python", python, str(venv), check=True)
        binary = next(
            path for path in (venv / "bin/python", venv / "Scripts/python.exe") if path.exists()
        )
        options = ["--resolution", resolution, "--only-binary", ":all:"]
        uv("pip", "install", "--quiet", "--python", str(binary), *options, str(wheel), check=True)
        # -I: neither the current folder nor the user's packages.
        subprocess.run([binary, "-I", CHECK], env=environment(), cwd=folder, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("dist", type=Path, help="folder with the wheels")
    parser.add_argument("--pythons", nargs="+", required=True, help="versions, such as 3.10 3.14t")
    parser.add_argument("--require-all", action="store_true", help="fail where one is not there")
    options = parser.parse_args()
    wheels = sorted(options.dist.resolve().glob("pgrpo-*.whl"))
    checked = 0
    for version in options.pythons:
        wheel = wheel_for(version, wheels)
        python = find_python(version)
        if python is None:
            print(f"Python {version}: not found, skipped")
            continue
        print(f"Python {version}: {wheel.name}, {wheel.stat().st_size / 1024:.0f} KiB")
        for resolution in ("highest", "lowest"):
            check(python, wheel, resolution)
        checked += 1
    if checked == 0 or (options.require_all and checked < len(options.pythons)):
        sys.exit(f"{checked} of the Pythons {', '.join(options.pythons)} were found")


if __name__ == "__main__":
    main()
