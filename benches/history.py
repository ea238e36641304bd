"""What was measured, by commit: lines of `history.jsonl` beside a bench's result, which is the latest.

A line holds the bench, the day, the commit (with `+` where files differed from it), the machine, the
command and the ratios, by name. Lines are added and never changed, so that a ratio can be followed.
The first four tell of results older than this file, with the commit that brought each.

    jq -r 'select(.bench == "core") | [.date, .commit, .ratios["B=8 against NumPy"]] | @tsv' \
      benches/results/history.jsonl
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path

from pgrpo.runs.metrics import processor_name

ROOT = Path(__file__).parents[1]


def today() -> str:
    """The day, as a result tells it."""
    return datetime.now(timezone.utc).date().isoformat()


def command() -> str:
    """This process's command line."""
    return shlex.join(["python", *sys.argv])


def write(out: Path, bench: str, result: Mapping[str, object], ratios: Mapping[str, float]) -> None:
    """Write a result as JSON, and add its ratios to the history in the same folder."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    line = {
        "bench": bench,
        "date": today(),
        "commit": _commit(),
        "machine": f"{processor_name()}, {os.cpu_count()} cores",
        "command": command(),
        "ratios": {name: round(ratio, 4) for name, ratio in ratios.items()},
    }
    with (out.parent / "history.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _commit() -> str:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        changed = git(
            "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benches/results"
        )
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):  # no git, or no clone
        return "unknown"
