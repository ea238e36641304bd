"""One page that shows what a run did, or how several runs compare.

`runs` reads the folders, `ability` tells what was lost, `study` sorts and compares them, `verdict` says
it in words; `results`, `learning` and `facts` make the sections of the page of `blocks` and `figures`,
and `page` renders them with `templates/`. Of two policies that were judged `pairs` counts, and
`judgement` makes the page. A page is bounded, however long the runs and however many their clusters:
what it leaves out, it says.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from pgrpo.errors import RunFolderError
from pgrpo.report.page import render
from pgrpo.report.runs import read_runs
from pgrpo.report.study import Study
from pgrpo.report.verdict import Verdict, verdict
from pgrpo.runs.disk import disk_errors

__all__ = ["Verdict", "write_report"]


def write_report(runs: Sequence[Path], out: Path) -> Verdict:
    """Write one HTML page about the given run folders.

    The page needs no network and no other file. Runs that differ in nothing but seeds form one
    arm; curves are averaged over its seeds. `out` is replaced as a whole or not at all.

    Returns:
        What the page says first: the outcome in words.

    Raises:
        RunFolderError: no run is given, a folder lacks a file or holds a damaged one, the same
            arm and seed is given twice, or `out` cannot be written.
    """
    if not runs:
        raise RunFolderError("no run folder was given, a report needs at least one")
    if out.is_dir():
        raise RunFolderError(f"{out} is a folder; the report is written to an HTML file")
    study = Study.of(read_runs([Path(folder) for folder in runs]))
    html = render(study)
    draft = out.with_name(f".{out.name}.{os.getpid()}.partial")
    with disk_errors(f"{out} cannot be written"):
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            draft.write_text(html, encoding="utf-8")
            os.replace(draft, out)
        finally:
            draft.unlink(missing_ok=True)
    return verdict(study)
