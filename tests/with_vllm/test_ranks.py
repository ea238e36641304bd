"""Runs of two processes, each with a vLLM of its own or both with the same servers."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from models import Tree, write
from serving import SMALL, START_S, Served, metrics

from pgrpo.cli import main

pytest_plugins = ["serving"]

ADAPTERS: Tree = {"model.lora": {"rank": 4, "alpha": 64}}
LONGER: Tree = {
    **SMALL,
    "run.num_steps": 6,
    "optimizer.learning_rate": 1e-4,
    "rewards": [{"name": "regex", "pattern": "w1"}],
}


def torchrun(folder: Path, changes: Tree) -> subprocess.Popen[str]:
    """A run of two processes in FOLDER/run."""
    arguments = ["train", str(write(folder, changes)), "--out", str(folder / "run")]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "pgrpo", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def train_on_two(folder: Path, changes: Tree, says: str = "") -> Path:
    with torchrun(folder, changes) as process:
        said, _ = process.communicate(timeout=2 * START_S)
    assert process.returncode == 0, said
    assert says in said
    return folder / "run"


def assert_same(run: Path, expected: Path) -> None:
    found, wanted = metrics(run), metrics(expected)
    assert len(found) == len(wanted) > 0
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine["reward"] == theirs["reward"]
        assert mine["completion_tokens"] == theirs["completion_tokens"]
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4, abs=1e-5)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
        assert mine["mismatch"]["max"] < 1e-4, "the weights of all processes, put together"
        if theirs["sync"]["probe_error"] is not None:
            assert mine["sync"]["probe_error"] < 1e-4
        assert mine["sync"]["num_bytes"] == theirs["sync"]["num_bytes"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process with vLLM in it."""
    folder = tmp_path_factory.mktemp("alone")
    assert main(["train", str(write(folder, LONGER)), "--out", str(folder / "run")]) == 0
    return folder / "run"


def test_each_process_has_a_vllm(tmp_path: Path, alone: Path) -> None:
    assert_same(train_on_two(tmp_path, LONGER), alone)


@pytest.mark.parametrize("adapters", [False, True])
def test_processes_share_a_server_that_is_killed(
    tmp_path: Path, start_vllm: Callable[..., Served], adapters: bool
) -> None:
    """Whichever process meets the new server first gives it the weights again."""
    changes: Tree = {**LONGER, **(ADAPTERS if adapters else {})}
    server = start_vllm(changes)
    server.wait()
    remote = {**changes, "generation.vllm": {"servers": [server.url], "retry_s": START_S}}
    one, config = tmp_path / "one", write(tmp_path / "one", remote)
    assert main(["train", str(config), "--out", str(one / "run")]) == 0
    log = tmp_path / "run" / "metrics.jsonl"

    def restart() -> None:
        while not log.exists():
            time.sleep(0.05)
        server.kill()
        server.start()

    restarted = threading.Thread(target=restart, daemon=True)
    restarted.start()
    run = train_on_two(tmp_path, remote, says="trying again")
    restarted.join(START_S)
    assert_same(run, one / "run")


def test_adapters_of_each_process_s_vllm(tmp_path: Path) -> None:
    changes = {**SMALL, **ADAPTERS, "run.num_steps": 2}
    records = metrics(train_on_two(tmp_path, changes))
    assert len(records) == 2
    for record in records:
        assert record["mismatch"]["max"] < 1e-4
        assert record["sync"]["probe_error"] < 1e-4
