"""`pgrpo report`."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from pgrpo.cli.arguments import AsJson, say


def report(
    folders: Annotated[list[Path], Argument(metavar="RUN", help="run folders")],
    out: Annotated[Path, Option(help="file to write")] = Path("report.html"),
    as_json: AsJson = False,
) -> None:
    """One HTML page over one or more runs."""
    from pgrpo.report import write_report

    say(write_report(folders, out), out, as_json=as_json)
