"""`pgrpo score`."""

import json
import re
import sys
from pathlib import Path
from typing import Annotated

from typer import Option

from pgrpo.cli.arguments import AsJson, ConfigFile, Overrides, load
from pgrpo.errors import ConfigError
from pgrpo.runs.terminal import printable


def score(
    config: ConfigFile,
    text: Annotated[
        Path,
        Option(
            metavar="FILE",
            help="completions, one a line; - reads them from standard input",
            allow_dash=True,
        ),
    ],
    user: Annotated[str | None, Option(help="whose first prompt they answer")] = None,
    as_json: AsJson = False,
    overrides: Overrides = None,
) -> None:
    """What the rewards of a run think of completions, without a model."""
    settings = load(config, overrides)
    try:
        read = sys.stdin.read() if str(text) == "-" else text.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--text {text} cannot be read: {error}") from None
    # Also line breaks of a completion are written in one line, as backslash and n.
    texts = [line.replace("\\n", "\n") for line in re.split(r"\r?\n", read) if line]
    if not texts:
        raise ConfigError(f"--text {text} holds no lines")
    from pgrpo.train.check import score

    prompt, scores = score(settings, texts, user)
    if as_json:
        found = {"prompt": prompt, "scores": [each.model_dump() for each in scores]}
        print(json.dumps(found, indent=2))
        return
    lines = [f"  | {line}" for line in prompt.splitlines()]
    for each in scores:
        parts = "".join(f", {name} {_shown(value)}" for name, value in each.rewards.items())
        rest = parts if len(each.rewards) > 1 else ""
        lines.append(f"{each.text!r}: reward {_shown(each.reward)}{rest}")
    print(printable("\n".join(lines)))


def _shown(reward: float | None) -> str:
    return "none" if reward is None else f"{reward:g}"
