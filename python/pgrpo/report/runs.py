"""What the trainer leaves in a run folder, read and checked.

config.toml and run.json describe the run; metrics.jsonl, evaluations.jsonl and samples.jsonl hold
one record a line. Records may carry keys that are not named here; numbers may be null.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import BaseModel, ConfigDict, ValidationError

from pgrpo.errors import RunFolderError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class Record(BaseModel):
    """A JSON object of a run folder."""

    model_config = ConfigDict(frozen=True, strict=True)


class ClusterStep(Record):
    """One cluster in one step: means over its rollouts, and its history after the step."""

    reward: float | None = None
    count: float | None = None
    mean: float | None = None
    std: float | None = None
    scale_ratio: float | None = None
    bias: float | None = None


class Fairness(Record):
    """Spread of the clusters' rewards in one step."""

    worst: float | None = None
    gap: float | None = None
    gini: float | None = None


class Timing(Record):
    """Seconds of one step."""

    generate: float | None = None
    reward: float | None = None
    wait: float | None = None
    sync: float | None = None
    update: float | None = None
    total: float | None = None


class Step(Record):
    """A line of metrics.jsonl."""

    step: int
    reward: float | None = None
    grad_norm: float | None = None
    completion_tokens: float | None = None
    truncated: float | None = None
    equal_groups: float | None = None
    entropy: float | None = None
    kl: float | None = None
    clipped: float | None = None
    peak_memory_bytes: float | None = None
    clusters: dict[str, ClusterStep] = {}
    fairness: Fairness = Fairness()
    timing_s: Timing = Timing()


class ClusterEvaluation(Record):
    """One cluster's share of an evaluation; `std` is that of single rewards."""

    reward: float | None = None
    std: float | None = None
    num_prompts: int = 0


class Evaluation(Record):
    """A line of evaluations.jsonl: greedy decoding on held-out prompts."""

    step: int
    reward: float | None = None
    std: float | None = None
    num_prompts: int = 0
    clusters: dict[str, ClusterEvaluation] = {}


class Sample(Record):
    """A line of samples.jsonl: one rollout."""

    step: int
    prompt: str
    completion: str
    reward: float | None = None
    advantage: float | None = None
    cluster_id: int | str | None = None
    user: int | str | None = None


class ClusterInfo(Record):
    """Who a cluster is."""

    num_users: int = 0
    share: float = 0.0
    about: str = ""


class RunInfo(Record):
    """run.json."""

    status: str = "running"
    processor: str = ""
    num_threads: int | None = None
    precision: str = ""
    versions: dict[str, str] = {}
    num_parameters: int | None = None
    started: str = ""
    chance: float | None = None
    reward_name: str = "reward"
    clusters: dict[str, ClusterInfo] = {}
    warnings: list[str] = []


@dataclass(frozen=True)
class Run:
    """A run folder in memory."""

    name: str
    """The folder's name behind that of its parent: `compare` names folders ARM/seed-K."""
    settings: Mapping[str, str]
    """The resolved config, flat: `generation.group_size` -> `8`."""
    info: RunInfo
    steps: tuple[Step, ...]
    """In order of the step, each step once, never empty."""
    evaluations: tuple[Evaluation, ...]
    samples: tuple[Sample, ...]

    @property
    def seeds(self) -> tuple[tuple[str, str], ...]:
        """Every setting that is a seed; what may differ between the runs of an arm."""
        return tuple(sorted(item for item in self.settings.items() if is_seed(item[0])))


def is_seed(key: str) -> bool:
    """Whether a flat setting is a seed."""
    return key.rpartition(".")[2] == "seed"


def read_run(folder: Path) -> Run:
    """Read a run folder.

    The last line of a `.jsonl` file may be incomplete (the run was killed while writing it) and is
    then left out. Where a resumed run repeats a step, the later line counts.

    Raises:
        RunFolderError: the folder or one of config.toml, run.json and metrics.jsonl is missing, a
            file is damaged (named with its line), or no step has been finished.
    """
    if not folder.is_dir():
        raise RunFolderError(f"run folder {folder} does not exist or is not a folder")
    for name in ("metrics.jsonl", "config.toml", "run.json"):
        if not (folder / name).is_file():
            raise RunFolderError(f"{folder} is not a run folder: it has no {name}")
    steps = _read_lines(folder / "metrics.jsonl", Step)
    if not steps:
        raise RunFolderError(f"{folder / 'metrics.jsonl'} holds no finished step, expected one")
    evaluations = _read_lines(folder / "evaluations.jsonl", Evaluation)
    return Run(
        name="/".join(folder.resolve().parts[-2:]),
        settings=_read_settings(folder / "config.toml"),
        info=_read_info(folder / "run.json"),
        steps=tuple(value for _, value in sorted({s.step: s for s in steps}.items())),
        evaluations=tuple(value for _, value in sorted({e.step: e for e in evaluations}.items())),
        samples=tuple(_read_lines(folder / "samples.jsonl", Sample)),
    )


RecordT = TypeVar("RecordT", bound=Record)


def _read_lines(path: Path, record: type[RecordT]) -> list[RecordT]:
    """The records of a `.jsonl` file; none when it does not exist."""
    if not path.exists():
        return []
    # Bytes, because a killed run can tear a character in two.
    *lines, last = path.read_bytes().split(b"\n")
    records = [_parse(record, line, f"{path} line {n}") for n, line in enumerate(lines, 1)]
    if last:
        try:
            json.loads(last)
        except ValueError:
            return records
        records.append(_parse(record, last, f"{path} line {len(lines) + 1}"))
    return records


def _read_info(path: Path) -> RunInfo:
    return _parse(RunInfo, path.read_bytes(), str(path))


def _parse(record: type[RecordT], text: bytes, where: str) -> RecordT:
    try:
        return record.model_validate_json(text)
    except ValidationError as error:
        complaint = error.errors()[0]
        key = ".".join(map(str, complaint["loc"]))
        what = f"{key} is {complaint['input']!r:.60}: " if key else ""
        raise RunFolderError(f"{where} is damaged: {what}{complaint['msg']}") from None


def _read_settings(path: Path) -> dict[str, str]:
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RunFolderError(f"{path} is not valid TOML: {error}") from None
    settings = dict(_flatten(tree))
    for key, default in (("estimator.name", "pgrpo"), ("estimator.history", "cluster")):
        settings.setdefault(key, default)
    return settings


def _flatten(node: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Leaves of a TOML tree with their dotted keys; lists of plain values are leaves."""
    if isinstance(node, dict):
        children = list(cast(dict[str, Any], node).items())
    elif isinstance(node, list) and any(isinstance(x, dict) for x in cast(list[Any], node)):
        children = [(str(i), child) for i, child in enumerate(cast(list[Any], node))]
    else:
        return [(prefix, node if isinstance(node, str) else json.dumps(node, default=str))]
    return [
        leaf for key, child in children for leaf in _flatten(child, f"{prefix}.{key}".lstrip("."))
    ]
