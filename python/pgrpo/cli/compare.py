"""`pgrpo compare`."""

from pathlib import Path
from typing import Annotated

from typer import Option

from pgrpo.cli.arguments import AsJson, ConfigFile, Overrides, Quiet, load, numbers, say
from pgrpo.errors import ConfigError
from pgrpo.runs.terminal import InterruptedRunError


def compare(
    config: ConfigFile,
    out: Annotated[Path, Option(help="folder for the runs and the report")],
    estimators: Annotated[
        str,
        Option(
            help="arms, with commas: names, NAME:user, control arms NAME:one and NAME:shuffled, "
            "objectives dpo and sft; any with ARM@section.key=value"
        ),
    ] = "grpo,pgrpo",
    seeds: Annotated[str, Option(help="seeds, with commas")] = "0",
    quiet: Quiet = False,
    as_json: AsJson = False,
    overrides: Overrides = None,
) -> None:
    """Train several estimators and seeds side by side."""
    seed_numbers = numbers(seeds, "--seeds")
    arms = [arm.strip() for arm in estimators.split(",") if arm.strip()]
    if not arms:
        raise ConfigError("--estimators names no arm")
    settings = load(config, overrides)
    from pgrpo.experiments.compare import compare
    from pgrpo.runs.display import console

    try:
        verdict = compare(
            settings, arms, seed_numbers, out, shown_on=console(quiet=quiet, stderr=as_json)
        )
    except KeyboardInterrupt as error:
        raise InterruptedRunError(
            f"the same command goes on with what is saved in {out}"
        ) from error
    say(verdict, out / "report.html", as_json=as_json)
