"""A process that stops answering; `make scale` runs it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import install_plugin, write_config

TIMEOUT_S = 15

# From the second step on one process answers nothing any more, in the midst of its pass through the
# model, where the other one waits for its part of the weights.
STOPPING = """
import os, signal
from pgrpo.plugins import hookimpl
from pgrpo.model.language_model import LanguageModel

def stop(*_):
    os.kill(os.getpid(), signal.SIGSTOP)

def stopping(rollouts):
    if rollouts[0].policy_version == 1 and os.environ["RANK"] == "STOPPED_RANK":
        LanguageModel.hidden = stop
    return [float(len(r.completion)) for r in rollouts]

@hookimpl
def pgrpo_register_rewards(register):
    register("stopping", stopping)
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_the_others_wait_no_longer_than_they_are_told(tmp_path: Path, rank: int) -> None:
    install_plugin(tmp_path / "site", STOPPING.replace("STOPPED_RANK", str(rank)))
    changes = {
        "run.num_steps": 4,
        "run.prompts_per_step": 4,
        "rewards": [{"name": "stopping"}],
        "evaluation": [{"name": "persona"}],
        "parallel.timeout_s": TIMEOUT_S,
    }
    config, run = write_config(tmp_path, changes), tmp_path / "run"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), *filter(None, sys.path)]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
    }
    command = [sys.executable, "-m", "pgrpo", "train", str(config), "--out", str(run)]
    started = [
        subprocess.Popen(
            command,
            env={**common, "RANK": str(each), "LOCAL_RANK": str(each)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for each in range(2)
    ]
    other = started[1 - rank]
    try:
        while not (run / "metrics.jsonl").exists() and other.poll() is None:
            time.sleep(0.05)
        # By default such groups wait for half an hour.
        _, told = other.communicate(timeout=120)
    finally:
        for process in started:
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert other.returncode == 2
    assert "another process of the run is lost" in told
    assert f"{TIMEOUT_S}000ms" in told
