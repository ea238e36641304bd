"""`pgrpo cluster`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from pgrpo.cli.arguments import AsJson, Overrides, Quiet, checked, load, numbers
from pgrpo.errors import ConfigError, DataError
from pgrpo.runs.terminal import printable

if TYPE_CHECKING:
    from pgrpo.runs.config import Config

SHOWN = 12
"""Clusters that are told of; the page has more."""


def cluster(
    config: Annotated[
        Path,
        Argument(
            metavar="CONFIG", help="TOML file; or rows, clustered by their columns of numbers"
        ),
    ],
    out: Annotated[Path, Option(help="folder for clusters.json and clusters.html")],
    rewards: Annotated[
        Path | None,
        Option(
            metavar="RUN|FILE", help="rewards of people: a run folder, or rows with user and reward"
        ),
    ] = None,
    ks: Annotated[
        str | None, Option("--ks", metavar="K,...", help="numbers of clusters to compare")
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
    overrides: Overrides = None,
) -> None:
    """Who belongs together, how many clusters to make, and whether rewards differ between them."""
    wanted = None if ks is None else numbers(ks, "--ks")
    if wanted is not None and min(wanted) < 1:
        raise ConfigError(f"--ks is {ks!r}; expected whole numbers from 1 on")
    from pgrpo.data.rows import READERS

    are_rows = config.name.endswith(tuple(READERS))
    settings = _config_of_rows(config, overrides or ()) if are_rows else load(config, overrides)
    from pgrpo.clusters.saved import FILE
    from pgrpo.report.clusters import PAGE, summary, write_clusters
    from pgrpo.runs.display import console
    from pgrpo.train.clusters import look

    shown_on = console(quiet=quiet, stderr=as_json)
    found, subject = look(settings, rewards, wanted, lambda text: shown_on.print(printable(text)))
    verdict, told = write_clusters(found, subject, out), summary(found, subject)
    if as_json:
        files = {"page": str(out / PAGE), "saved": str(out / FILE)}
        print(json.dumps({**asdict(verdict), **told, **files}, indent=2))
        return
    lines = ["", verdict.headline, *verdict.sentences, "", *_lines(told)]
    print(printable("\n".join(lines)))
    print(f"saved: {out / FILE}, for clustering.name = 'saved'")
    print(f"page: {(out / PAGE).resolve().as_uri()}")


def _lines(told: dict[str, Any]) -> list[str]:
    """The clusters and the numbers of them, as text."""
    lines: list[str] = []
    for name, cluster in list(told["clusters"].items())[:SHOWN]:
        who = f": {cluster['about']}" if cluster["about"] else ""
        size = f"{cluster['num_users']:,} people ({100 * cluster['share']:.0f} %)"
        lines.append(f"cluster {name}, {size}{who}")
        for example in cluster["examples"][:1]:
            text = " / ".join(example["text"].splitlines())
            short = text if len(text) <= 160 else f"{text[:80]} ... {text[-75:]}"
            lines.append(f"  such as {example['user']}: {short}")
    if len(told["clusters"]) > SHOWN:
        lines.append(f"and {len(told['clusters']) - SHOWN:,} smaller clusters")
    if told["candidates"]:
        lines += ["", f"{'clusters':>8} {'silhouette':>10} {'stability':>10}"]
        if told["rewards"]:
            lines[-1] += f" {'eta squared':>12} {'by chance to':>13} {'p':>7}"
    for each in told["candidates"]:
        row = f"{each['num_clusters']:8} {_shown(each['silhouette']):>10}"
        row += f" {_shown(each['stability']):>10}"
        known = each["information"] or {}
        if told["rewards"]:
            row += f" {_shown(known.get('eta2')):>12} {_shown(known.get('null_95')):>13}"
            row += f" {_shown(known.get('p')):>7}"
        is_best = each["num_clusters"] == told["recommended"]
        lines.append(row + ("  recommended" if is_best else ""))
    return [*lines, ""]


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _config_of_rows(path: Path, overrides: Sequence[str]) -> Config:
    """A config that clusters the people of a file of rows: by what they said of answers, where its
    columns are a layout of `feedback`, else by the columns that hold a number in the first row.

    Raises:
        PgrpoError: the file is no file of rows, or an override does not fit.
    """
    from pgrpo.config.toml import Tree, apply_override
    from pgrpo.data.rows import read_rows
    from pgrpo.runs.config import parse_config

    first = next(read_rows(path), None)
    if first is None:
        raise DataError(f"{path} holds no rows")
    # A run wants more than is read here; `--set` may say anything.
    tree: Tree = {"model": {"name": "tiny"}, "rewards": [{"name": "choice"}]}
    tree |= {"data": {"path": str(path)}, "clustering": {"name": "kmeans"}}
    for override in overrides:
        apply_override(tree, override)
    if tree["clustering"]["name"] == "kmeans":
        tree["clustering"].setdefault("num_clusters", 5)
    tree["data"] = _columns(path, tree["data"], *first) | tree["data"]
    return checked(parse_config(tree, source=str(path)))


def _columns(
    path: Path, given: Mapping[str, Any], place: str, row: Mapping[str, Any]
) -> dict[str, Any]:
    """What `[data]` says of a file whose first row is this one, where it was not `given`."""
    from pgrpo.data.columns import number_in
    from pgrpo.data.layouts import layout_of

    with suppress(DataError):
        layout_of(place, row)
        return {"name": "feedback"}
    kinds = {".csv": "csv", ".parquet": "parquet"}
    user = given.get("user_column", "user")
    prompt = given.get("prompt_column", "prompt" if "prompt" in row else user)
    features: list[str] = []
    for column in row.keys() - {user, prompt, given.get("time_column"), "reward"}:
        with suppress(DataError):
            number_in(place, column, row)
            features.append(column)
    found = {
        "name": next((kind for end, kind in kinds.items() if end in path.suffixes), "jsonl"),
        "prompt_column": prompt,
    }
    return found | {"feature_columns": [column for column in row if column in features]}
