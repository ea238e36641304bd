"""Look at saved reward histories, of pgrpo or in another framework's checkpoint."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from pgrpo.cli.arguments import AsJson
from pgrpo.errors import CheckpointError, ConfigError
from pgrpo.integrations.saved import read_histories
from pgrpo.normalizer import ClusterNormalizer
from pgrpo.normalizer.state import ClusterStats
from pgrpo.runs.terminal import printable
from pgrpo.types import ClusterId

FilesArgument = Annotated[
    list[Path],
    Argument(metavar="FILE...", help="files of histories, states as JSON, checkpoints or runs"),
]
LimitOption = Annotated[int, Option(help="clusters, those with most rewards first; 0: all")]

Table = Mapping[ClusterId, ClusterStats]


def show(files: FilesArgument, limit: LimitOption = 40, as_json: AsJson = False) -> None:
    """Count, mean and standard deviation of each cluster's rewards, and what they warn of."""
    read = {path: read_histories(path) for path in files}
    if as_json:
        _print_json({str(path): normalizer for path, normalizer in read.items()})
        return
    for path, normalizer in read.items():
        for reward, table in _tables(normalizer).items():
            label = f", reward {reward}" if reward else ""
            print(f"{path}{label}: {_clusters(len(table))}")
            total = sum(stats.count for stats in table.values())
            rows = {
                c: {
                    "count": f"{stats.count:,.10g}",
                    "share": f"{100 * stats.count / (total or 1):.1f} %",
                    "mean": f"{stats.mean:.6g}",
                    "std": f"{stats.std:.6g}",
                }
                for c, stats in _largest_first(table).items()
            }
            _print(rows, limit)
        for part in normalizer.rewards.values() or [normalizer]:
            for warning in part.diagnostics().warnings:
                print(f"warning: {warning}")


def merge(
    files: FilesArgument,
    out: Annotated[Path, Option(help="where to write the histories of all")],
    as_json: AsJson = False,
) -> None:
    """Histories of several files as those of one stream, for shards that folded apart."""
    if len(files) < 2:
        raise ConfigError(f"{len(files)} file is given; expected two or more to merge")
    first, *others = (read_histories(path) for path in files)
    for path, other in zip(files[1:], others, strict=True):
        if list(other.rewards) != list(first.rewards):
            raise CheckpointError(
                f"{path} holds the rewards {list(other.rewards)}, and {files[0]} {list(first.rewards)}"
            )
        first.merge(other)
    first.save(out)
    if as_json:
        _print_json({str(out): first})
        return
    for reward, table in _tables(first).items():
        total = sum(stats.count for stats in table.values())
        label = f", reward {reward}" if reward else ""
        print(f"{out}{label}: {_clusters(len(table))}, {total:,.10g} rewards")


def diff(
    before: Annotated[Path, Argument(metavar="BEFORE", help="as for show")],
    after: Annotated[Path, Argument(metavar="AFTER", help="as for show")],
    limit: LimitOption = 40,
    as_json: AsJson = False,
) -> None:
    """What changed from one file to another, cluster by cluster; nothing is printed of equal ones."""
    old, new = (_tables(read_histories(path)) for path in (before, after))
    if list(old) != list(new):
        raise CheckpointError(f"{before} holds the rewards {list(old)}, and {after} {list(new)}")
    nothing = ClusterStats(0, math.nan, math.nan)
    differences: dict[str, dict[str, Any]] = {}
    for reward, table in new.items():
        was, now = (
            {c: t.get(c, nothing) for c in {**old[reward], **table}} for t in (old[reward], table)
        )
        changed = {c: now[c] for c in now if now[c] != was[c]}
        if as_json:
            differences[reward] = {
                str(c): {
                    "before": asdict(was[c]) if was[c].count else None,
                    "after": asdict(stats) if stats.count else None,
                }
                for c, stats in changed.items()
            }
            continue
        label = f"reward {reward}: " if reward else ""
        print(f"{label}{len(changed)} of {_clusters(len(now))} differ")
        rows = {
            c: {
                "count": f"{was[c].count:,.10g} → {stats.count:,.10g}",
                "mean": f"{was[c].mean:.6g} → {stats.mean:.6g}",
                "std": f"{was[c].std:.6g} → {stats.std:.6g}",
            }
            for c, stats in _largest_first(changed).items()
        }
        _print(rows, limit)
    if as_json:
        print(json.dumps(differences, indent=2))


def _print_json(read: Mapping[str, ClusterNormalizer]) -> None:
    """Path -> reward -> cluster -> its history."""
    found = {
        path: {
            reward: {str(c): asdict(stats) for c, stats in table.items()}
            for reward, table in _tables(normalizer).items()
        }
        for path, normalizer in read.items()
    }
    print(json.dumps(found, indent=2))


def _tables(normalizer: ClusterNormalizer) -> dict[str, Table]:
    """By reward, "" where it has no name."""
    parts = normalizer.rewards or {"": normalizer}
    return {name: part.snapshot() for name, part in parts.items()}


def _clusters(number: int) -> str:
    return f"{number:,} cluster{'' if number == 1 else 's'}"


def _largest_first(table: Table) -> Table:
    return dict(sorted(table.items(), key=lambda item: -item[1].count))


def _print(rows: Mapping[ClusterId, Mapping[str, str]], limit: int) -> None:
    """Aligned columns under their names: cluster -> column -> text."""
    shown = list(rows.items())[: limit or None]
    lines = [[printable(str(c)), *cells.values()] for c, cells in shown]
    if shown:
        lines.insert(0, ["cluster", *shown[0][1]])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *cells in lines:
        aligned = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        print("  ".join(["", first.ljust(widths[0]), *aligned]))
    if len(rows) > len(shown):
        print(f"  and {len(rows) - len(shown):,} more")
