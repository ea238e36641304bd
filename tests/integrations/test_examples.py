"""The examples run, learn and keep their histories."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pgrpo import ClusterNormalizer

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(folder: Path, *command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,  # a step of TRL takes a minute where bf16 has no units of its own
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def last_shares(text: str) -> list[float]:
    return [float(x) for x in re.findall(r"(?:critic|fan|bot) ([\d.]+)", text.split("step 90")[1])]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_loop_of_ones_own_learns_for_everybody(tmp_path: Path, ranks: int) -> None:
    script = str(EXAMPLES / "plain_loop.py")
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2"] if ranks == 2 else []
    text = run(tmp_path, *launcher, script, "--steps", "90")
    assert min(last_shares(text)) > 0.8
    saved = torch.load(tmp_path / "plain_loop.pt")
    normalizer = ClusterNormalizer("pgrpo")
    normalizer.load_state_dict(saved["histories"])
    # Eight prompts of four answers in each of the steps, on every rank.
    assert sum(stats.count for stats in normalizer.snapshot().values()) == 90 * 8 * 4 * ranks


@pytest.mark.assets
@pytest.mark.skipif(sys.version_info < (3, 11), reason="TRL 1.16 needs Python 3.11")
def test_the_panel_is_trained_on_in_trl(tmp_path: Path) -> None:
    text = run(
        tmp_path,
        str(EXAMPLES / "trl_panel.py"),
        *("--estimators", "pgrpo", "--steps", "1", "--held-out", "20", "--out", "out"),
    )
    before, after = (
        [float(share) for share in re.findall(r"\.\d{3}", line)]
        for line in text.splitlines()
        if line.startswith(("before", "pgrpo"))
    )
    # Five clusters and all of them together; one step of warm-up moves few answers.
    assert len(before) == len(after) == 6
    assert abs(before[-1] - after[-1]) <= 0.2
    assert "guessing" in (tmp_path / "out" / "clusters.html").read_text(encoding="utf-8")
