"""SkyRL as a user starts it, from a data set to checkpoints, stopped and resumed, without a GPU."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from with_skyrl import cpu_skyrl
from with_skyrl.real_skyrl import SIZE, arguments, prepare

from pgrpo.integrations.saved import read_histories

ROWS = [("c0", 1.0), ("c1", 10.0), ("c0", 1.0), ("c2", None), ("c1", 10.0), ("c0", 2.0)]
"""Cluster and scale of rewards; a step is two of them. The cluster c2 never has a reward."""


def run(folder: Path, *more: str) -> str:
    given = ["trainer.ckpt_interval=1", "trainer.eval_interval=1", "trainer.eval_before_train=true"]
    found = subprocess.run(
        [sys.executable, cpu_skyrl.__file__, *arguments(folder, *given, *more)],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        cwd=folder,
    )
    assert found.returncode == 0, found.stdout[-5000:] + found.stderr[-5000:]
    return found.stdout + found.stderr


def test_a_run_and_a_resumed_one_count_every_reward_of_training_once(tmp_path: Path) -> None:
    prepare(tmp_path, ROWS)
    rewards: dict[str, list[float]] = {}
    for row, (cluster, scale) in enumerate(ROWS):
        draws = random.Random(row)
        if scale is not None:
            found = [round(scale * draws.random(), 3) for _ in range(SIZE)]
            rewards.setdefault(cluster, []).extend(found)
    for killed_after in (None, 2):
        if killed_after:
            shutil.rmtree(tmp_path / "ckpt/global_step_3")
            (tmp_path / "ckpt/latest_ckpt_global_step.txt").write_text(str(killed_after))
            before = read_histories(tmp_path / f"ckpt/global_step_{killed_after}/pgrpo").snapshot()
            assert sum(history.count for history in before.values()) < 20
        by_skyrl = ["trainer.override_entrypoint=pgrpo.integrations.skyrl"]
        said = run(tmp_path, *(by_skyrl if killed_after else []))
        assert "clusters/c1/history_std" in said and "eval/all/avg_score" in said
        end = read_histories(tmp_path / "ckpt/global_step_3/pgrpo").snapshot()
        assert end.keys() == rewards.keys()
        for cluster, given in rewards.items():
            assert end[cluster].count == len(given)
            np.testing.assert_allclose(end[cluster].mean, np.mean(given), rtol=1e-6)
            np.testing.assert_allclose(end[cluster].std, np.std(given), rtol=1e-5)
