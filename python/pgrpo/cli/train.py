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
    from pgrpo.runs.launch import num_processes, num_restarts

    if config is not None and resume is None:
        settings = load(config, overrides)
        if out is None and num_processes() > 1:
            raise ConfigError(
                "train on several processes needs --out, which they write to together"
            )
        # No process writes before all have looked, for they wait for each other first.
        folder = RunFolder(out or fresh(Path("runs") / config.stem))
        if num_restarts() and folder.holds_run:
            settings = folder.config()
        else:
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
    vllm = settings.generation.vllm if settings.generation.engine == "vllm" else None
    if vllm and num_processes() > 1 and vllm.tensor_parallel_size > 1 and not vllm.servers:
        raise ConfigError(
            f"generation.vllm.tensor_parallel_size is {vllm.tensor_parallel_size}, and each of "
            f"{num_processes()} processes has a vLLM of its own; expected 1, or servers"
        )
    from pgrpo.runs.display import Display, console
    from pgrpo.train import trainer
    from pgrpo.train.parallel import connect

    with connect(settings.parallel) as ranks:
        shown_on = console(quiet=quiet or not ranks.leads, stderr=as_json)
        display = Display(settings.estimator.name, settings.run.num_steps, shown_on=shown_on)
        try:
            with ranks.alone(lambda: folder), display:
                verdict = trainer.train(settings, folder, display, ranks)
        except KeyboardInterrupt as error:
            raise InterruptedRunError(
                _how_to_go_on(folder.path) if ranks.leads else None
            ) from error
        if ranks.leads:
            say(verdict, folder.path / "report.html", as_json=as_json)


def _how_to_go_on(path: Path) -> str:
    from pgrpo.runs.folder import RunFolder
    from pgrpo.train.checkpoint import list_checkpoints

    folder = RunFolder(path)
    if not folder.holds_run:
        return "nothing was trained yet"
    saved = list_checkpoints(folder.checkpoints)
    what = f"step {saved[-1].step} is saved" if saved else "no step is saved yet"
    again = f"pgrpo train --resume {shlex.quote(str(path))}"
    return f"{what}, and {again} goes on from there"
