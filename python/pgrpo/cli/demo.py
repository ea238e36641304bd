"""`pgrpo demo`."""

import inspect
import shlex
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Annotated

from typer import Option

from pgrpo.cli.arguments import Quiet, say, unfinished
from pgrpo.errors import PgrpoError
from pgrpo.runs.disk import disk_errors
from pgrpo.runs.terminal import InterruptedRunError

ALONE = "import sys; from pgrpo.cli import main; sys.exit(main(sys.argv[1:]))"
"""The command in a process of its own."""

ARMS = ["grpo", "pgrpo:one", "pgrpo"]

LEVEL = "groups-of-16"
"""Folder of the runs in which the arms are level."""


def demo(
    out: Annotated[Path | None, Option(help="folder for the runs and the reports")] = None,
    quiet: Quiet = False,
) -> None:
    """Where P-GRPO matters and where it does not, on generated personas, in two minutes.

    Seven generated personas (a linguistic style and a music genre each) rate words on scales of
    their own, and the smallest of them has the smallest scale. A tiny transformer learns from two
    completions per prompt, five seeds of each arm: grpo normalises by the group, pgrpo by the
    history of the persona's cluster, and pgrpo-one, a control arm, by a single history for
    everybody, which the wide scales should dominate. Beside it, with 16 completions per prompt,
    grpo is expected to be level with pgrpo.
    """
    from pgrpo.experiments.compare import compare
    from pgrpo.runs.config import load_config
    from pgrpo.runs.display import console

    out = out or unfinished(Path("runs/demo"), "report.html", f"{LEVEL}/report.html")
    if not quiet:
        print(inspect.getdoc(demo))
    level = out / LEVEL
    with resources.as_file(resources.files("pgrpo.experiments") / "demo.toml") as path:
        config = load_config(path)
        # Both use one thread, and most machines have two processors.
        log = level / "log.txt"
        with disk_errors(f"{level} cannot be used"):
            level.mkdir(parents=True, exist_ok=True)
            output = log.open("w", encoding="utf-8")
        with output:
            beside = subprocess.Popen(
                [sys.executable, "-c", ALONE, "compare", str(path), "--out", str(level),
                 "--estimators", "grpo,pgrpo", "--seeds", "0,1,2",
                 "--set", "generation.group_size=16"],
                stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip
        try:
            verdict = compare(config, ARMS, [0, 1, 2, 3, 4], out, shown_on=console(quiet=quiet))
            beside.wait()
        except KeyboardInterrupt as error:
            again = "" if out.parent == Path("runs") else f" --out {shlex.quote(str(out))}"
            raise InterruptedRunError(f"pgrpo demo{again} goes on from there") from error
        finally:
            beside.kill()
    said = log.read_text(encoding="utf-8").strip()
    if beside.returncode:
        raise PgrpoError(f"the runs with groups of 16 failed: {said.splitlines()[-1:]}")
    say(verdict, out / "report.html")
    # An empty line stands before the outcome.
    print("\nWith 16 completions per prompt instead of two:", said.rpartition("\n\n")[2], sep="\n")
