"""Rewards of people: of a run, as far as it logs them, or of a file of one's own."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from pgrpo.clusters.analysis import Rewards
from pgrpo.data.columns import number_in, user_in
from pgrpo.data.rows import read_rows
from pgrpo.errors import DataError
from pgrpo.runs.folder import RunFolder


def read_rewards(path: Path) -> Rewards:
    """Read whose rewards were what.

    Args:
        path: a run folder, of which the rollouts in samples.jsonl are read, or a file of rows with the
            columns `user` and `reward`, such as JSON lines or CSV. Rows without a reward are left out.

    Raises:
        RunFolderError: the folder holds no run, or its log is damaged.
        DataError: the file cannot be read, lacks a column, or holds no reward.
    """
    if path.is_dir():
        return _of_run(RunFolder(path))
    rows = (
        (user_in(place, "user", row), number_in(place, "reward", row))
        for place, row in read_rows(path)
        if row.get("reward", ...) not in (None, "")
    )
    users, values = _collected(rows, path)
    note = (
        "The file does not say of when the rewards are: of the time that clusters were made from, they "
        "are in-sample, and later ones may differ less between the clusters."
    )
    return Rewards(users, values, f"{len(users):,} rewards in {path.name}", (note,))


def _of_run(folder: RunFolder) -> Rewards:
    settings = folder.config().run
    rows = (
        (str(sample.user), sample.reward)
        for sample in folder.samples
        if sample.user is not None and sample.reward is not None
    )
    users, values = _collected(rows, folder.samples.path)
    total = sum((record.num_rollouts or 0) for record in folder.metrics)
    about = f"{len(users):,} rollouts of the run {folder.path.name}"
    in_sample = (
        "They are in-sample: a run's prompts are of the training period, from which features come, and "
        "clusters that are made from answers; later rewards may differ less between the clusters."
    )
    notes = [in_sample]
    if len(users) < total:
        about += (
            f", of {total:,}: run.samples_per_step = {settings.samples_per_step} logs so many of each "
            "step"
        )
        notes.append(
            "They are a stratified sample: a run logs one rollout of each of its own clusters in turn, "
            "so that people of small ones count for more than they have rewards."
        )
    return Rewards(users, values, about, notes)


def _collected(rows: Iterable[tuple[str, float]], path: Path) -> tuple[list[str], np.ndarray]:
    found = list(rows)
    if not found:
        raise DataError(f"{path} holds no reward of anybody")
    return [user for user, _ in found], np.array([reward for _, reward in found])
