"""`pgrpo demo`."""

import inspect
from importlib import resources
from pathlib import Path
from typing import Annotated

from typer import Option

from pgrpo.cli.arguments import fresh, say


def demo(
    out: Annotated[Path | None, Option(help="folder for the runs and the report")] = None,
) -> None:
    """GRPO against P-GRPO on generated personas, in two minutes.

    Seven generated personas (a linguistic style and a music genre each) rate on scales of their
    own, and one of them is a small minority. A tiny transformer learns from two completions per
    prompt. Theory expects P-GRPO to do better than GRPO here: groups are small and rewards
    continuous, so that one group's own spread says little. The control arm pgrpo-one keeps a single
    history for everybody, which the personas with wide scales should dominate.
    """
    from pgrpo.experiments.compare import compare
    from pgrpo.runs.config import load_config

    with resources.as_file(resources.files("pgrpo.experiments") / "demo.toml") as path:
        config = load_config(path)
    out = out or fresh(Path("runs/demo"))
    print(inspect.getdoc(demo))
    say(compare(config, ["grpo", "pgrpo", "pgrpo:one"], [0, 1, 2], out), out / "report.html")
