"""Run folders in memory: of each step the numbers alone, and of a long run not every step."""

from __future__ import annotations

import math
import sys
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pgrpo.config.toml import flat
from pgrpo.errors import RunFolderError
from pgrpo.report.ability import Change, changes
from pgrpo.runs.folder import RunFolder
from pgrpo.runs.records import (
    ClusterRecord,
    EvaluationRecord,
    RunInfo,
    SampleRecord,
    StepRecord,
    number_names,
    parts,
)
from pgrpo.runs.sinks import run_name
from pgrpo.types import FloatArray

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

READ_STEPS = 1000
"""Most steps that are read of one run, besides its first and last ones: more than a line has points,
and a thousand lines of 64 clusters are read in well under a second."""

LAST_STEPS = 10
"""Steps whose mean stands for the beginning or the end of a run: enough to calm sampling noise,
few enough that the policy hardly moves meanwhile."""


class Table:
    """The numbers of records by their path, `clusters/0/reward`: each an array over the steps.

    Args:
        records: in order of the step, each step once.
        where: names their file in errors.

    Attributes:
        steps: [T].
        clusters: every cluster that a record names.
        rewards: every one of several rewards of which a cluster has a history.

    Raises:
        RunFolderError: a step follows one that is not smaller.
    """

    def __init__(self, records: Iterable[StepRecord | EvaluationRecord], where: Path) -> None:
        steps: list[int] = []
        # Path of a record -> its rows, and its numbers row by row: most of many clusters have few.
        self._rows: dict[str, array[int]] = {}
        self._numbers: dict[str, array[float]] = {}
        self._names: dict[str, tuple[str, ...]] = {}
        self.clusters: dict[str, None] = {}
        self.rewards: dict[str, None] = {}
        for row, record in enumerate(records):
            if steps and record.step <= steps[-1]:
                raise RunFolderError(
                    f"{where} is damaged: step {record.step} follows step {steps[-1]}"
                )
            steps.append(record.step)
            self.clusters |= dict.fromkeys(record.clusters)
            for cluster in record.clusters.values():
                if isinstance(cluster, ClusterRecord) and cluster.rewards:
                    self.rewards |= dict.fromkeys(cluster.rewards)
            for path, part in parts(record):
                names = number_names(type(part))
                if path not in self._rows:
                    self._rows[path], self._numbers[path] = array("q"), array("d")
                    self._names[path] = names
                self._rows[path].append(row)
                self._numbers[path].extend(
                    [math.nan if (value := getattr(part, n)) is None else value for n in names]
                )
        self.steps: FloatArray = np.array(steps, dtype=np.float64)

    def __getitem__(self, path: str) -> FloatArray:
        """[T], NaN where a record has no such number."""
        values = np.full(len(self.steps), np.nan)
        part, _, name = path.rpartition("/")
        names = self._names.get(part, ())
        if name in names:
            found = np.array(self._numbers[part]).reshape(-1, len(names))
            values[np.array(self._rows[part])] = found[:, names.index(name)]
        return values

    def at(self, step: int, path: str) -> float:
        """The number of one step; NaN where it has none."""
        found = self[path][self.steps == step]
        return float(found[0]) if len(found) else float("nan")


@dataclass(frozen=True)
class Run:
    """A run folder in memory."""

    name: str
    """The folder's name behind that of its parent: `compare` names folders ARM/seed-K."""
    settings: Mapping[str, str]
    """The resolved config, flat: `generation.group_size` -> `8`. An objective that takes no estimator
    stands in the place of its name."""
    info: RunInfo
    steps: Table
    """Never empty."""
    last_step: int
    stride: int
    """Every step that is a multiple of it was read, besides the first and the last LAST_STEPS; 1 where
    all were."""
    evaluations: Table
    samples: tuple[SampleRecord, ...]
    """Those of the first and of the last step that have some."""
    held_out: tuple[SampleRecord, ...]
    """Held-out completions of the last evaluation that has some."""
    ability: tuple[Change, ...]
    """What became of general ability from its first measurement to its last; empty where there are not
    two."""

    @property
    def seeds(self) -> tuple[tuple[str, str], ...]:
        """Every setting that is a seed; what may differ between the runs of an arm."""
        return tuple(sorted(item for item in self.settings.items() if is_seed(item[0])))


def is_seed(key: str) -> bool:
    """Whether a flat setting is a seed."""
    return key.rpartition(".")[2] == "seed"


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read run folders, of all of them the same steps.

    Where one is longer than READ_STEPS, every second, third, ... step is read, and besides the first
    LAST_STEPS and the last ones that all runs have taken.

    Raises:
        RunFolderError: a folder or one of its config.toml, run.json and metrics.jsonl is missing, a
            file is damaged (named with its line), or no step has been finished.
    """
    found = [_open(folder) for folder in folders]
    longest = max(last for _, (_, last) in found)
    common = min(last for _, (_, last) in found)
    stride = -(-longest // READ_STEPS)
    return [_read(folder, first, last, common, stride) for folder, (first, last) in found]


def _open(folder: Path) -> tuple[RunFolder, tuple[int, int]]:
    """The folder, its first and its last step."""
    if not folder.is_dir():
        raise RunFolderError(f"run folder {folder} does not exist or is not a folder")
    for name in ("metrics.jsonl", "config.toml", "run.json"):
        if not (folder / name).is_file():
            raise RunFolderError(f"{folder} is not a run folder: it has no {name}")
    run = RunFolder(folder)
    ends = run.metrics.ends()
    if ends is None:
        raise RunFolderError(f"{run.metrics.path} holds no finished step, expected one")
    return run, ends


def _read(folder: RunFolder, first: int, last: int, common: int, stride: int) -> Run:
    records: Iterable[StepRecord] = folder.metrics
    if stride > 1:
        wanted = {
            *range(stride, last + 1, stride),
            *range(first, first + LAST_STEPS),
            *range(common - LAST_STEPS + 1, common + 1),
        }
        records = folder.metrics.at(sorted(step for step in wanted if first <= step <= last))
    measured = list(folder.ability)
    logged, held_out = folder.samples.ends(), folder.held_out.ends()
    return Run(
        name=run_name(folder.path),
        settings=_read_settings(folder.path / "config.toml"),
        info=folder.info(),
        steps=Table(records, folder.metrics.path),
        last_step=last,
        stride=stride,
        evaluations=Table(folder.evaluations, folder.evaluations.path),
        samples=tuple(folder.samples.at(sorted(set(logged)))) if logged else (),
        held_out=tuple(folder.held_out.at([held_out[1]])) if held_out else (),
        ability=tuple(changes(measured[0], measured[-1])) if len(measured) > 1 else (),
    )


def _read_settings(path: Path) -> dict[str, str]:
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RunFolderError(f"{path} is not valid TOML: {error}") from None
    settings = dict(flat(tree))
    objective = settings.get("loss.objective", "policy_gradient")
    rule = "pgrpo" if objective == "policy_gradient" else objective
    for key, default in (("estimator.name", rule), ("estimator.history", "cluster")):
        settings.setdefault(key, default)
    return settings
