"""OpenRLHF as a user starts it, from a data set to checkpoints, stopped and resumed, without a GPU."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from with_openrlhf import cpu_openrlhf
from with_openrlhf.real_openrlhf import arguments, prepare

from pgrpo import ClusterNormalizer

SAMPLES = 4
ROWS = [("c0", 1.0), ("c1", 10.0), ("c0", 1.0), ("c2", None), ("c1", 10.0), ("c0", 2.0)]
"""Cluster and scale of rewards; a step is two of them. The cluster c2 never has a reward."""


def run(folder: Path, *more: str) -> str:
    given = arguments(folder, "--ckpt.save_steps=1", f"--eval.dataset={folder}/rows.jsonl", *more)
    found = subprocess.run(
        [sys.executable, cpu_openrlhf.__file__, *given, "--eval.steps=1", "--ckpt.max_num=9"],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        cwd=folder,
    )
    assert found.returncode == 0, found.stdout[-5000:] + found.stderr[-5000:]
    return found.stdout + found.stderr


def histories(folder: Path, step: int) -> ClusterNormalizer:
    file = folder / f"ckpt/_actor/global_step{step}/mp_rank_00_model_states.pt"
    found = ClusterNormalizer("pgrpo")
    found.load_state_dict(torch.load(file, weights_only=False)["pgrpo"])
    return found


@pytest.mark.parametrize("mode", [[], ["--train.async_enable"]], ids=["sync", "async"])
def test_a_run_and_a_resumed_one_count_every_reward_of_training_once(
    tmp_path: Path, mode: list[str]
) -> None:
    prepare(tmp_path, ROWS)
    rewards: dict[str, list[float]] = {}
    for place, (cluster, scale) in enumerate(ROWS):
        draws = random.Random(f"w{place} w{place % 7}")
        if scale is not None:
            found = [round(scale * draws.random(), 3) for _ in range(SAMPLES)]
            rewards.setdefault(cluster, []).extend(found)
    for killed_after in (None, 2):
        if killed_after:
            saved = tmp_path / "ckpt/_actor"
            for left in saved.glob("best_*"):
                shutil.rmtree(left)
            shutil.rmtree(saved / "global_step3")
            (saved / "latest").write_text(f"global_step{killed_after}")
            assert sum(h.count for h in histories(tmp_path, killed_after).snapshot().values()) < 20
        said = run(tmp_path, *mode, *(["--ckpt.load_enable"] if killed_after else []))
        assert "clusters/c0/history_mean" in said and "eval_default_pass1" in said
        assert said.count("clusters/c1/history_std") == (1 if killed_after else 3)
        end = histories(tmp_path, 3).snapshot()
        assert end.keys() == rewards.keys()
        for cluster, given in rewards.items():
            assert end[cluster].count == len(given)
            np.testing.assert_allclose(end[cluster].mean, np.mean(given), rtol=1e-6)
            np.testing.assert_allclose(end[cluster].std, np.std(given), rtol=1e-5)
