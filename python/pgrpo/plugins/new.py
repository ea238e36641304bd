"""Writes a distribution with a reward, a clusterer and a data set, for somebody to go on from.

What is written lies in the folder `template` as it is, under the name my-plugin, so that it is linted
and typed with everything else; only the name is another one.
"""

from __future__ import annotations

import importlib.util
import keyword
import re
import sys
from contextlib import suppress
from importlib import metadata, resources
from pathlib import Path

from pgrpo.data import BUILT_IN
from pgrpo.errors import ConfigError
from pgrpo.plugins.registry import canonical, load_registry

NAME, MODULE = "my-plugin", "my_plugin"
"""What the template is called."""

_READ_BY_NAME = {"setup": "setuptools", "conftest": "pytest"}
"""Modules that a tool runs unasked where they lie beside `pyproject.toml` or the tests."""


def write_distribution(name: str, folder: Path) -> list[Path]:
    """Write a working distribution.

    Args:
        name: of the distribution, and of what it registers.
        folder: to write it into; made if need be.

    Returns:
        The files that were written.

    Raises:
        ConfigError: it cannot be called so, or one of its files is there already; nothing is written
            then.
    """
    module = _module(name)
    files: dict[Path, str] = {}
    for file in (resources.files("pgrpo.plugins") / "template").iterdir():
        if file.is_file():
            path = folder / _renamed(file.name, name, module)
            files[path] = _renamed(file.read_text(encoding="utf-8"), name, module)
    for path in files:
        if path.exists():
            raise ConfigError(f"{path} exists already; expected a folder that does not have it")
    _check_free(name, module)
    folder.mkdir(parents=True, exist_ok=True)
    for path, text in files.items():
        path.write_text(text, encoding="utf-8")
    return sorted(files)


def _renamed(text: str, name: str, module: str) -> str:
    """A text of the template with its names replaced; both at once, for the new ones may hold them."""
    return re.sub(f"{NAME}|{MODULE}", lambda found: {NAME: name, MODULE: module}[found[0]], text)


def _module(name: str) -> str:
    """The module of a distribution, if both can be called so."""
    # What a distribution may be called: https://packaging.python.org/en/latest/specifications/name-normalization
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?", name):
        raise ConfigError(
            f"name {name!r} is none of a distribution; expected letters, digits and, between them, "
            "- _ and ., such as my-plugin"
        )
    module = canonical(name).replace("-", "_")
    if not module.isidentifier() or keyword.iskeyword(module):
        raise ConfigError(
            f"name {name!r} makes a module {module!r}, which Python cannot import; expected a name "
            "that begins with a letter and is no word of Python's own"
        )
    if module in _READ_BY_NAME:
        raise ConfigError(
            f"name {name!r} makes a file {module}.py, which {_READ_BY_NAME[module]} takes for its own; "
            "expected another name"
        )
    return module


def _check_free(name: str, module: str) -> None:
    """Refuse names that somebody else has."""
    found = None if module in sys.stdlib_module_names else importlib.util.find_spec(module)
    # A folder that happens to be called so is a module without an origin, and in nobody's way.
    if module in sys.stdlib_module_names or (found and found.origin):
        raise ConfigError(
            f"name {name!r} makes a module {module!r}, and there is one already; expected a name of "
            "its own"
        )
    with suppress(metadata.PackageNotFoundError):
        metadata.distribution(name)
        raise ConfigError(
            f"name {name!r} is that of a distribution which is installed; expected a name of its own"
        )
    taken = [(one.name, one.kind, one.distribution) for one in load_registry().listing()]
    for other, kind, distribution in [*taken, *((each, "data set", "pgrpo") for each in BUILT_IN)]:
        # Configs tell Choice from choice; whoever reads them might not.
        if canonical(other) == canonical(name):
            raise ConfigError(
                f"name {name!r} is that of {kind} {other!r} of {distribution}; expected a name of "
                "its own"
            )
