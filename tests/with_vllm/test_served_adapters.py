"""Adapters on a server; in a file of its own, so that another process can run it beside the other servers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from models import write
from serving import SMALL, Served, metrics

from pgrpo.cli import main

pytest_plugins = ["serving"]


def test_one_step_off_and_adapters_with_a_server(
    tmp_path: Path, start_vllm: Callable[..., Served]
) -> None:
    changes = {**SMALL, "model.lora": {"rank": 4, "alpha": 64}}
    server = start_vllm(changes)
    server.wait()
    remote = {
        **changes,
        "generation.vllm": {"servers": [server.url]},
        "run.pipeline": "one_step_off",
        "run.num_steps": 4,
    }
    run = tmp_path / "run" / "run"
    assert main(["train", str(write(tmp_path / "run", remote)), "--out", str(run)]) == 0
    records = metrics(run)
    assert [r["policy_version"] - 1 - r["rollout_version"] for r in records] == [0, 1, 1, 1]
    assert records[0]["mismatch"]["max"] < 1e-4
    assert all(r["sync"]["num_bytes"] < 200_000 for r in records), "the adapters alone"
    assert all(r["sync"]["probe_error"] < 1e-4 for r in records[:3])
