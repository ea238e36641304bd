"""A long run whose processes are killed again and again; `make scale` runs it, in some minutes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from conftest import trace, write_config

from pgrpo.train.checkpoint import list_checkpoints

NUM_KILLS = 20
CHANGES = {
    "run.num_steps": 120,
    "run.prompts_per_step": 5,
    "run.checkpoint_every": 3,
    "run.eval_every": 10,
    "run.eval_prompts": 11,
}


def launched(config: Path, run: Path) -> subprocess.Popen[bytes]:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
        *("--max-restarts", str(NUM_KILLS), "--monitor-interval", "0.1"),
        *("-m", "pgrpo", "train", str(config), "--out", str(run), "--quiet"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)


def newest(run: Path) -> int:
    return max((saved.step for saved in list_checkpoints(run / "checkpoints")), default=0)


def test_twenty_kills_change_nothing(tmp_path: Path) -> None:
    """Each kill hits either process, at any moment after its start or between two checkpoints; what is
    left at the end is what an unbroken run leaves, to the last bit."""
    config = write_config(tmp_path, CHANGES)
    with launched(config, tmp_path / "unbroken") as agent:
        assert agent.wait(600) == 0
    chance, run = random.Random(0), tmp_path / "run"
    print(f"\n{NUM_KILLS} kills of a run of {CHANGES['run.num_steps']} steps")
    with launched(config, run) as agent:
        children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children")
        for number in range(NUM_KILLS):
            before = newest(run)
            while len(children.read_text().split()) < 2:
                time.sleep(0.05)
            victims = children.read_text().split()
            # A quarter of the kills fall into the start, the others behind some progress.
            if number % 4:
                while newest(run) <= before and agent.poll() is None:
                    time.sleep(0.01)
            time.sleep(chance.uniform(0, 0.5))
            assert agent.poll() is None, "the run ended before all kills"
            victim = chance.choice(victims)
            os.kill(int(victim), signal.SIGKILL)
            print(f"kill {number + 1}: behind step {newest(run)}", flush=True)
            while victim in children.read_text().split():
                time.sleep(0.05)
        assert agent.wait(600) == 0
    assert trace(run) == trace(tmp_path / "unbroken")
