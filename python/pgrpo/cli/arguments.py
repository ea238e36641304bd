"""What several commands take, and how they say where they ended."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

from typer import Argument, Exit, Option

from pgrpo.errors import ConfigError
from pgrpo.runs.terminal import printable

if TYPE_CHECKING:
    from pgrpo.report import Verdict
    from pgrpo.runs.config import Config

ConfigFile: TypeAlias = Annotated[Path, Argument(metavar="CONFIG", help="TOML file")]
Overrides: TypeAlias = Annotated[
    list[str] | None,
    Option("--set", metavar="SECTION.KEY=VALUE", help="override a setting; may be repeated"),
]

Best: TypeAlias = Annotated[
    bool,
    Option(
        "--best", help="the checkpoint of the best held-out reward, not the last (run.keep_best)"
    ),
]

AsJson: TypeAlias = Annotated[bool, Option("--json", help="print JSON")]
Quiet: TypeAlias = Annotated[bool, Option("--quiet", "-q", help="show no progress")]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"pgrpo {version('pgrpo')}")
        raise Exit


def options(
    show_version: Annotated[
        bool,
        Option("--version", help="print the version", callback=_print_version, is_eager=True),
    ] = False,
    verbose: Annotated[
        bool, Option("--verbose", "-v", help="where an error comes from, and what libraries note")
    ] = False,
) -> None:
    """What stands before a command."""
    if verbose:
        logging.getLogger().setLevel(logging.INFO)
        logging.getLogger("pgrpo").setLevel(logging.DEBUG)


def load(path: Path, overrides: list[str] | None) -> Config:
    """The config in a file, of which also names and rows were looked at: what is wrong is told before
    torch is imported, which takes seconds.

    Raises:
        PgrpoError: something is wrong.
    """
    from pgrpo.runs.config import load_config

    return checked(load_config(path, overrides or ()))


def checked(config: Config) -> Config:
    """The config, of which names and rows were looked at; raises as `load`."""
    from pgrpo.data import check_beginning
    from pgrpo.plugins.registry import load_registry

    registry = load_registry()
    registry.check("clusterer", config.clustering)
    for section in (*config.rewards, *config.evaluation):
        registry.check("reward", section)
    check_beginning(config.data)
    return config


def numbers(text: str, option: str) -> list[int]:
    """Whole numbers with commas between; `option` is named where there are none."""
    try:
        found = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = []
    if not found:
        raise ConfigError(f"{option} is {text!r}; expected whole numbers with commas")
    return found


def fresh(path: Path) -> Path:
    """The path, or the first of path-2, path-3, ... that does not exist yet."""
    return next(folder for folder in _numbered(path) if not folder.exists())


def unfinished(path: Path, *files: str) -> Path:
    """The first of path, path-2, path-3, ... that lacks one of the files; it need not exist."""
    return next(f for f in _numbered(path) if not all((f / name).exists() for name in files))


def _numbered(path: Path) -> Iterator[Path]:
    yield path
    for number in count(2):
        yield path.with_name(f"{path.name}-{number}")


def say(verdict: Verdict, report: Path, *, as_json: bool = False) -> None:
    """The outcome in words, and where to look at it; or the same as JSON."""
    if as_json:
        print(json.dumps({**asdict(verdict), "report": str(report)}, indent=2))
        return
    lead = [verdict.lead] if verdict.lead else []
    # Signs that isolate names from the text around them are for pages; terminals show them as boxes.
    isolates = dict.fromkeys(map(ord, "\u2068\u2069"))
    said = ["", *lead, verdict.headline, *verdict.sentences]
    print(printable("\n".join(said).translate(isolates)))
    print(f"report: {report.resolve().as_uri()}")
