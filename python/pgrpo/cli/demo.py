"""`pgrpo demo`."""

import inspect
import json
import shlex
import subprocess
import sys
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Annotated

from typer import Option

from pgrpo.cli.arguments import AsJson, Quiet, say, unfinished
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
    as_json: AsJson = False,
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
    from pgrpo.report import Verdict
    from pgrpo.runs.config import load_config
    from pgrpo.runs.display import console

    out = out or unfinished(Path("runs/demo"), "report.html", f"{LEVEL}/report.html")
    if not quiet and not as_json:
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
                 "--estimators", "grpo,pgrpo", "--seeds", "0,1,2", "--json",
                 "--set", "generation.group_size=16"],
                stdout=subprocess.PIPE, stderr=output, text=True,
            )  # fmt: skip
        try:
            shown_on = console(quiet=quiet, stderr=as_json)
            verdict = compare(config, ARMS, [0, 1, 2, 3, 4], out, shown_on=shown_on)
            said, _ = beside.communicate()
        except KeyboardInterrupt as error:
            again = "" if out.parent == Path("runs") else f" --out {shlex.quote(str(out))}"
            raise InterruptedRunError(f"pgrpo demo{again} goes on from there") from error
        finally:
            beside.kill()
    if beside.returncode:
        complaint = log.read_text(encoding="utf-8").strip().splitlines()[-1:]
        raise PgrpoError(f"the runs with groups of 16 failed: {complaint}")
    level_verdict = json.loads(said)
    if as_json:
        found = {**asdict(verdict), "report": str(out / "report.html"), LEVEL: level_verdict}
        print(json.dumps(found, indent=2))
        return
    say(verdict, out / "report.html")
    print("\nWith 16 completions per prompt instead of two:")
    report = Path(level_verdict.pop("report"))
    say(Verdict(**level_verdict), report)
