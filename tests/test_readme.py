"""What the README shows is what happens."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

from typer.main import get_command

from pgrpo.cli import commands

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_code_prints_what_is_shown() -> None:
    code, shown = re.findall(r"```python\n(.*?)```\s+```\n(.*?)```", README, re.DOTALL)[0]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    assert printed.getvalue() == shown


def test_make_targets_and_files_named_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)", README)) <= targets
    for link in re.findall(r"\]\(([^):#]+)\)", README):
        assert (ROOT / link).exists(), link


def test_commands_shown_parse() -> None:
    """Each command's parameters are read, and nothing is run."""
    app: Any = get_command(commands())
    block = re.search(r"```\n(pgrpo train.*?)```", README, re.DOTALL)
    assert block
    for line in block[1].splitlines():
        words = line.split("#")[0].split()
        assert words[0] == "pgrpo"
        context = app.make_context("pgrpo", words[1:])
        name, command, rest = app.resolve_command(context, words[1:])
        command.make_context(name, rest, parent=context)
