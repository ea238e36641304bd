"""`pgrpo train`."""

import shlex
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from pgrpo.cli.arguments import AsJson, Overrides, Quiet, fresh, load, say
from pgrpo.errors import ConfigError
from pgrpo.runs.terminal import InterruptedRunError


def train(
    config: Annotated[Path | None, Argument(metavar="CONFIG", help="TOML file")] = None,
    out: Annotated[Path | None, Option(help="run folder  [default: runs/CONFIG]")] = None,
    resume: Annotated[
        Path | None,
        Option(
            metavar="RUN",
            help="continue the run in this folder; --set run.num_steps=N makes it longer",
        ),
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
    overrides: Overrides = None,
) -> None:
    """Train one run."""
    from pgrpo.runs.folder import RunFolder

    if config is not None and resume is None:
        settings = load(config, overrides)
        folder = RunFolder(out or fresh(Path("runs") / config.stem))
        folder.require_new()
    elif resume is not None and config is None:
        if out:
            raise ConfigError("--resume continues a run in its folder; --out has no effect")
        folder = RunFolder(resume)
        settings = folder.longer_config(overrides or ())
        if folder.is_finished and settings == folder.config():
            print(
                f"the run in {resume} is finished; --set run.num_steps=N makes it longer, and pgrpo "
                f"report {resume} writes its report again"
            )
            return
    elif config is None:
        raise ConfigError("train needs a config file, or --resume RUN")
    else:
        raise ConfigError(
            f"--resume continues the run in {resume} with the config that lies there; {config} has "
            "no effect"
        )
    from pgrpo.runs.display import Display, console
    from pgrpo.train import trainer
    from pgrpo.train.checkpoint import list_checkpoints

    shown_on = console(quiet=quiet, stderr=as_json)
    display = Display(settings.estimator.name, settings.run.num_steps, shown_on=shown_on)
    try:
        with folder, display:
            verdict = trainer.train(settings, folder, display)
    except KeyboardInterrupt as error:
        if not folder.holds_run:
            raise InterruptedRunError("nothing was trained yet") from error
        saved = list_checkpoints(folder.checkpoints)
        what = f"step {saved[-1].step} is saved" if saved else "no step is saved yet"
        again = f"pgrpo train --resume {shlex.quote(str(folder.path))}"
        raise InterruptedRunError(f"{what}, and {again} goes on from there") from error
    say(verdict, folder.path / "report.html", as_json=as_json)
