"""`pgrpo train`."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from pgrpo.cli.arguments import AsJson, Overrides, Quiet, fresh, load, say
from pgrpo.errors import ConfigError
from pgrpo.runs.terminal import InterruptedRunError

if TYPE_CHECKING:
    from pgrpo.report import Verdict
    from pgrpo.runs.config import Config
    from pgrpo.runs.folder import RunFolder


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
    ray: Annotated[
        str | None,
        Option(
            metavar="ADDRESS",
            help="train on processes of a Ray cluster: HOST:PORT, auto (the one of RAY_ADDRESS, or "
            "that runs here) or local (one of its own)",
        ),
    ] = None,
    num_workers: Annotated[
        int | None, Option(min=1, help="processes on Ray  [default: 1]", show_default=False)
    ] = None,
    max_failures: Annotated[
        int | None,
        Option(
            min=0,
            help="times that Ray may start the processes again, which go on from the last checkpoint "
            " [default: 0]",
            show_default=False,
        ),
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
    overrides: Overrides = None,
) -> None:
    """Train one run."""
    from pgrpo.runs.folder import RunFolder
    from pgrpo.runs.launch import num_processes, num_restarts

    if ray is None and (num_workers is not None or max_failures is not None):
        raise ConfigError("--num-workers and --max-failures have no effect without --ray")
    if ray is not None and num_processes() > 1:
        raise ConfigError(
            f"--ray starts processes by itself, and there are {num_processes()} already; expected one"
        )
    size = num_processes() if ray is None else num_workers or 1
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
    settings.check_processes(size)
    work = partial(_take_part, settings, folder.path, quiet=quiet, as_json=as_json)
    if ray is None:
        verdict = work()
    else:
        from pgrpo.on_ray import connected
        from pgrpo.train.on_ray import run_on_ray

        num_cpus = settings.run.num_threads or 1
        with connected(ray, size * num_cpus):
            verdict = run_on_ray(
                partial(_take_part_on_ray, work),
                num_workers=size,
                num_cpus=num_cpus,
                max_failures=max_failures or 0,
                timeout_s=settings.parallel.timeout_s,
            )
    if verdict is not None:
        say(verdict, folder.path / "report.html", as_json=as_json)


def _take_part(settings: Config, path: Path, *, quiet: bool, as_json: bool) -> Verdict | None:
    """What each process of a run does; the one that writes returns what the report says first."""
    from pgrpo.runs.display import Display, console
    from pgrpo.runs.folder import RunFolder
    from pgrpo.train import trainer
    from pgrpo.train.parallel import connect

    folder = RunFolder(path)
    with connect(settings.parallel) as ranks:
        shown_on = console(quiet=quiet or not ranks.leads, stderr=as_json)
        display = Display(settings.rule, settings.run.num_steps, shown_on=shown_on)
        try:
            with ranks.alone(lambda: folder), display:
                verdict = trainer.train(settings, folder, display, ranks)
        except KeyboardInterrupt as error:
            raise InterruptedRunError(_how_to_go_on(folder) if ranks.leads else None) from error
        return verdict if ranks.leads else None


def _take_part_on_ray(work: Callable[[], Verdict | None]) -> Verdict | None:
    from pgrpo.cli import quiet_libraries

    quiet_libraries()
    return work()


def _how_to_go_on(folder: RunFolder) -> str:
    from pgrpo.train.checkpoint import list_checkpoints

    if not folder.holds_run:
        return "nothing was trained yet"
    saved = list_checkpoints(folder.checkpoints)
    what = f"step {saved[-1].step} is saved" if saved else "no step is saved yet"
    again = f"pgrpo train --resume {shlex.quote(str(folder.path))}"
    return f"{what}, and {again} goes on from there"
