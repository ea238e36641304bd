"""`pgrpo chat`."""

import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from pgrpo.cli.arguments import Best
from pgrpo.errors import PgrpoError
from pgrpo.runs.terminal import printable


def chat(
    folder: Annotated[Path, Argument(metavar="RUN", help="run folder")],
    user: Annotated[str | None, Option(metavar="ID", help="ask as this user")] = None,
    cluster: Annotated[
        str | None, Option(metavar="ID", help="ask as the people of this cluster")
    ] = None,
    greedy: Annotated[
        bool, Option("--greedy", help="the likeliest tokens, not samples as in training")
    ] = False,
    best: Best = False,
) -> None:
    """Ask the model of a run, as one of its users."""
    from pgrpo.train.chat import talk

    with talk(folder, user=user, cluster=cluster, greedy=greedy, best=best) as talking:
        kind = "held out" if talking.held_out else "trained on"
        who = f"cluster {talking.cluster}" if user is None else f"user {user}"
        print(
            printable(
                f"the model after step {talking.step}, asked as {who}. Enter asks the next of "
                f"{len(talking.examples)} prompts that were {kind}; text is asked as it stands, with "
                "\\n for line breaks; Ctrl-D ends."
            )
        )
        places = count()
        for line in _lines():
            text = line.replace("\\n", "\n")
            try:
                reply = talking.say(text) if text.strip() else talking.example(next(places))
            except PgrpoError as error:
                print(printable(f"pgrpo: {error}"), file=sys.stderr)
                continue
            if not text.strip():
                print(printable(reply.prompt))
            rest = "" if reply.reward is None else f"   [reward {reply.reward:g}]"
            print(printable(f"> {reply.completion.strip()}{rest}"), flush=True)


def _lines() -> Iterator[str]:
    """What is typed, line by line, up to the end of the input."""
    while True:
        try:
            yield input("? " if sys.stdin.isatty() else "")
        except EOFError:
            return
