"""`pgrpo train`."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from pgrpo.cli.arguments import Overrides, fresh, say
from pgrpo.errors import ConfigError, RunFolderError


def train(
    config: Annotated[Path | None, Argument(metavar="CONFIG", help="TOML file")] = None,
    out: Annotated[Path | None, Option(help="run folder  [default: runs/CONFIG]")] = None,
    resume: Annotated[
        Path | None, Option(metavar="RUN", help="continue the run in this folder")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Train one run."""
    from pgrpo.runs.config import load_config
    from pgrpo.runs.folder import RunFolder

    if config is not None and resume is None:
        settings = load_config(config, overrides or ())
        folder = RunFolder(out or fresh(Path("runs") / config.stem))
        folder.require_new()
    elif resume is not None and config is None:
        if overrides or out:
            raise ConfigError("--resume continues a run as it was; --set and --out have no effect")
        folder = RunFolder(resume)
        settings = folder.config()
        if folder.is_finished:
            raise RunFolderError(
                f"the run in {resume} is finished; pgrpo report {resume} writes its report again"
            )
    else:
        raise ConfigError("train needs a config file, or --resume RUN")
    from pgrpo.runs.display import Display
    from pgrpo.train import trainer

    display = Display(settings.estimator.name, settings.run.num_steps)
    with folder, display:
        verdict = trainer.train(settings, folder, display)
    say(verdict, folder.path / "report.html")
