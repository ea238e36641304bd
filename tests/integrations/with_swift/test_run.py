"""`swift rlhf --rlhf_type grpo`, as a user calls it, from a data set to a checkpoint on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from real_swift import CLUSTERS, SAMPLES, arguments, prepare, rollouts
from safetensors.numpy import load_file

from pgrpo import ClusterNormalizer
from pgrpo.integrations.saved import read_histories

STEPS = 4

RANKS = """
import atexit, json, os, pathlib
import pgrpo
from pgrpo.integrations.swift import personalize

normalizer = pgrpo.ClusterNormalizer("pgrpo")
personalize(normalizer, cluster_key="cluster_id")
at = pathlib.Path(__file__).with_name(f"rank{os.environ.get('RANK', '')}.json")
atexit.register(lambda: at.write_text(json.dumps(normalizer.state_dict())))
"""


def run(folder: Path, ranks: int = 1, **settings: Any) -> list[dict[str, Any]]:
    """What a run logs of its steps, and of its evaluations."""
    several = {"NPROC_PER_NODE": str(ranks), "OMP_NUM_THREADS": "1"} if ranks > 1 else {}
    done = subprocess.run(
        [Path(sys.executable).with_name("swift"), "rlhf", *arguments(folder, **settings)],
        cwd=folder,
        env={**os.environ, "MODELSCOPE_CACHE": str(folder / "cache"), **several},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    out = settings.get("output_dir", folder / "out")
    lines = [json.loads(line) for line in (out / "logging.jsonl").read_text().splitlines()]
    return [line for line in lines if "reward" in line or "eval_reward" in line]


def counts(found: dict[Any, Any]) -> dict[Any, int]:
    return {name: history.count for name, history in found.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    prepare(tmp_path)
    return tmp_path


def test_a_run_learns_with_histories_and_goes_on_where_it_was_stopped(folder: Path) -> None:
    settings: dict[str, Any] = {
        "val_dataset": folder / "rows.jsonl",
        "eval_strategy": "steps",
        "eval_steps": 2,
        "per_device_eval_batch_size": 4,
    }
    logged = run(folder, **settings)
    steps = [line for line in logged if "reward" in line]
    assert len(steps) == STEPS and len(logged) > STEPS
    # The first generation's histories are too young to learn by.
    assert all(line["grad_norm"] > 0 for line in steps[1:])
    # Two epochs of training and no evaluation; the seventh row has no reward.
    rows = Counter(CLUSTERS[:6] + CLUSTERS[7:])
    whole = read_histories(folder / "out")
    expected = {name: 2 * SAMPLES * count for name, count in rows.items()}
    assert counts(whole.snapshot()) == expected
    last = steps[-1]
    assert last["clusters/c1/history_mean"] == pytest.approx(whole.snapshot()["c1"].mean)

    # As a job goes on that was killed in its second step.
    again = folder / "again"
    settings |= {"output_dir": again, "resume_from_checkpoint": folder / "out" / "checkpoint-1"}
    run(folder, **settings)
    assert read_histories(again).state_dict() == whole.state_dict()
    ours, theirs = (
        load_file(out / "checkpoint-4" / "model.safetensors") for out in (again, folder / "out")
    )
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_all_ranks_have_the_histories_of_what_is_trained_on(folder: Path) -> None:
    (folder / "plugin.py").write_text(RANKS)
    run(
        folder,
        ranks=2,
        ddp_backend="gloo",
        tuner_type="lora",
        per_device_train_batch_size=2,
        save_steps=2,
    )
    first, second = (json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    alone = ClusterNormalizer("pgrpo")
    for generation in rollouts(folder, STEPS):
        rewards, clusters = np.array(generation["Even"], dtype=float), generation["cluster"]
        expected = np.zeros(len(rewards))
        scored = np.flatnonzero(~np.isnan(rewards))
        expected[scored] = alone(rewards[scored], [clusters[i] for i in scored])
        np.testing.assert_allclose(generation["advantages"], expected, rtol=1e-6, atol=1e-6)
    assert sum(counts(alone.snapshot()).values()) == 2 * SAMPLES * (len(CLUSTERS) - 1)
    assert alone.state_dict() == first == read_histories(folder / "out").state_dict()
