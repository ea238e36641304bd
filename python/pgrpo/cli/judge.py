"""`pgrpo judge`."""

import json
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from pgrpo.cli.arguments import AsJson, Best, Quiet, say
from pgrpo.runs.terminal import InterruptedRunError, printable

BASE = "base"


def judge(
    run_a: Annotated[Path, Argument(help="run folder, or an arm's folder of runs by seed")],
    run_b: Annotated[
        Path, Argument(help=f"another, or `{BASE}` for the model that RUN_A began with")
    ],
    judge_file: Annotated[Path, Option("--judge", help="TOML file: who judges what")],
    out: Annotated[Path, Option(help="folder for what comes of it")],
    best: Best = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Which of two policies, or arms with a run for each seed, people like these would rather be
    answered by."""
    from pgrpo.experiments.judge import judge
    from pgrpo.experiments.opinions import load_judge
    from pgrpo.runs.display import console

    settings = load_judge(judge_file)
    shown_on = console(quiet=quiet, stderr=as_json)
    other = None if str(run_b) == BASE and not run_b.exists() else run_b
    try:
        record, verdict = judge(
            run_a,
            other,
            settings,
            out,
            best=best,
            note=lambda text: shown_on.print(printable(f"[judge] {text}")),
        )
    except KeyboardInterrupt as error:
        raise InterruptedRunError(
            f"the same command goes on with what is saved in {out}"
        ) from error
    if as_json:
        print(json.dumps({**record.model_dump(), "report": str(out / "judge.html")}, indent=2))
        return
    say(verdict, out / "judge.html")
