"""Histories as they lie on disk: in a file of `ClusterNormalizer.save`, a state as JSON, or a
checkpoint of pgrpo's own runs or of another framework's."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pgrpo.errors import CheckpointError, PgrpoError
from pgrpo.integrations.adapter import HISTORIES
from pgrpo.normalizer import ClusterNormalizer
from pgrpo.normalizer.several import COMBINATIONS, header_of
from pgrpo.normalizer.state import read_file

STATE = "state.json"
"""File of a checkpoint of pgrpo's own, whose `histories` are a `state_dict`."""

CHECKPOINT = re.compile(r"(?:(?:checkpoint|global_step|step)[-_])?(\d+)")
"""How folders of checkpoints are named: TRL's, verl's, pgrpo's own, and ART's, which are numbers."""


def read_histories(path: Path) -> ClusterNormalizer:
    """The histories that a file or a folder holds; of several rewards where it holds those.

    Of a folder with checkpoints it is the last one.

    Raises:
        CheckpointError: there are none, or they are damaged.
    """
    if path.is_dir():
        return read_histories(_file_in(path))
    if path.suffix == ".json":
        return _from_json(path)
    header = header_of(read_file(path))
    normalizer = ClusterNormalizer() if header is None else _of_rewards(*header)
    normalizer.load(path)
    return normalizer


def _of_rewards(names: Sequence[str], num_histories: int) -> ClusterNormalizer:
    """One whose clusters have a history of each reward, or one of their sum."""
    return ClusterNormalizer(
        reward_weights=[1.0] * len(names),
        reward_names=names,
        combine=COMBINATIONS[num_histories == len(names)],
    )


def _file_in(folder: Path) -> Path:
    for name in (HISTORIES, STATE):
        if (folder / name).exists():
            return folder / name
    inner = folder / "checkpoints"
    places = list(inner.iterdir() if inner.is_dir() else folder.iterdir())
    found = {
        int(match[1]): place for place in places if (match := CHECKPOINT.fullmatch(place.name))
    }
    if not found:
        raise CheckpointError(
            f"{folder} holds no histories: no {HISTORIES}, no {STATE} and no folder of a checkpoint"
        )
    return _file_in(found[max(found)])


def _from_json(path: Path) -> ClusterNormalizer:
    try:
        state: Any = json.loads(path.read_text(encoding="utf-8"))
        if "count" not in state and "rewards" not in state:
            state = state["histories"]
        normalizer = ClusterNormalizer()
        if "rewards" in state:
            normalizer = _of_rewards(state["rewards"], len(state["histories"]))
        normalizer.load_state_dict(state)
    except (OSError, ValueError, TypeError, KeyError, PgrpoError) as error:
        raise CheckpointError(f"{path} holds no histories: {error}") from None
    return normalizer
