"""The `pgrpo` command.

In come words of a command line; out go exit codes and text. What the commands do is done in the
rooms below, which a command imports when it runs, for that takes seconds: help is quick, and what is
wrong with a config is told at once.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING

from pgrpo.errors import PgrpoError
from pgrpo.runs.terminal import (
    InterruptedRunError,
    discard_output,
    exit_code,
    interrupts,
    printable,
)

if TYPE_CHECKING:
    from typer import Typer

_log = logging.getLogger("pgrpo")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    What goes wrong through the input, the environment or a plugin is one sentence on stderr and exit
    code 2. Ctrl-C is exit code 130, SIGTERM 143 and SIGHUP 129. Output that nobody reads any more, as
    behind `| head`, ends no run.
    """
    for stream in (sys.stdout, sys.stderr):
        # Signs that a terminal or a pipe cannot show must not end a run.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    # What the commands raise ends within, for what an interrupt left half made hangs on it.
    with interrupts():
        try:
            quiet_libraries()
            return _run(arguments)
        except InterruptedRunError as error:
            return _interrupted(error.rest)
        except KeyboardInterrupt:
            return _interrupted()
        except BrokenPipeError:
            discard_output()
            return 141  # 128 and the number of SIGPIPE, as shells have it
        except PgrpoError as error:
            _log.debug("where the error comes from:", exc_info=True)
            sentence = str(error)
        except ModuleNotFoundError as error:
            if error.name and error.name.partition(".")[0] == "pgrpo":
                raise
            sentence = (
                f"this command needs {error.name}; install it with pip install 'pgrpo[train]'"
            )
    # What a plugin or a library said may have line breaks of its own. Of several processes one tells.
    if sentence:
        _tell(sentence)
    return 2


def commands() -> Typer:
    """All commands, each from the file of its name."""
    import typer  # here, for an environment with NumPy alone has none

    # Without markup, for help has the brackets of TOML; and rich takes long to import.
    app = typer.Typer(
        help="Reinforcement learning that is fair where users differ.",
        rich_markup_mode=None,
    )
    from pgrpo.cli import arguments, histories, plugins

    app.callback()(arguments.options)
    for name in (
        "demo",
        "check",
        "plan",
        "cluster",
        "score",
        "train",
        "compare",
        "reproduce",
        "judge",
        "evaluate",
        "export",
        "chat",
        "report",
        "serve",
    ):
        app.command()(getattr(import_module(f"pgrpo.cli.{name}"), name))
    inner = typer.Typer(help=histories.__doc__, rich_markup_mode=None, no_args_is_help=True)
    for command in (histories.show, histories.merge, histories.diff):
        inner.command()(command)
    app.add_typer(inner, name="histories")
    inner = typer.Typer(rich_markup_mode=None, invoke_without_command=True)
    inner.callback()(plugins.plugins)
    for command in (plugins.new, plugins.check):
        inner.command()(command)
    app.add_typer(inner, name="plugins")
    return app


def _run(arguments: Sequence[str] | None) -> int:
    app = commands()
    from typer import TyperException

    try:
        code = app(arguments, prog_name="pgrpo", standalone_mode=False) or 0
    except TyperException as error:
        message = error.format_message().rstrip(".")
        raise PgrpoError(f"{message}; pgrpo --help tells what is expected") from error
    # What typer makes of an interrupt that no command said more of.
    return _interrupted() if code == 130 else code


def _interrupted(rest: str | None = "") -> int:
    if rest is not None:
        _tell("; ".join(filter(None, ["interrupted", rest])))
    return exit_code()


def _tell(sentence: str) -> None:
    # A terminal that was closed shows nothing any more.
    with suppress(OSError):
        print("pgrpo:", printable(" ".join(sentence.splitlines())), file=sys.stderr, flush=True)


def quiet_libraries() -> None:
    """Other libraries' progress bars and notices would tear our own display."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.basicConfig(format="pgrpo: %(message)s", level=logging.WARNING)
    warnings.filterwarnings("ignore", module="torch|transformers")
