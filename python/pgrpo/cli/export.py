"""`pgrpo export`."""

import json
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from pgrpo.cli.arguments import AsJson, Best


def export(
    folder: Annotated[Path, Argument(metavar="RUN", help="run folder")],
    out: Annotated[Path, Option(help="folder to make")],
    merge: Annotated[
        bool, Option("--merge", help="add adapters to the weights that they adapt")
    ] = False,
    best: Best = False,
    as_json: AsJson = False,
) -> None:
    """A run's model as a folder that transformers loads elsewhere, with a model card."""
    from pgrpo.train.export import export

    export(folder, out, merge=merge, best=best)
    if as_json:
        print(json.dumps({"model": str(out), "card": str(out / "README.md")}, indent=2))
        return
    print(f"{out} holds the model; {out / 'README.md'} tells of it")
