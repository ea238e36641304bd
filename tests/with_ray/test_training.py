"""Runs on several raylets, which stand for several machines: errors, interrupts, and kills in turn."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import install_plugin, trace, write_config
from test_ranks import FAULTY, UNEVEN, train_on

from pgrpo.on_ray import ray
from pgrpo.train.checkpoint import list_checkpoints

NUM_KILLS = 8
TIMEOUT_S = 900


@pytest.fixture(scope="module", autouse=True)
def site(tmp_path_factory: pytest.TempPathFactory) -> Generator[Path]:
    site = tmp_path_factory.mktemp("site")
    install_plugin(site, FAULTY.replace("FAULTY_RANK", "1"))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(site))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(site), *sys.path]))
        patch.setenv("OMP_NUM_THREADS", "1")
        # Ray kills what it has started when others take the machine's memory.
        patch.setenv("RAY_memory_monitor_refresh_ms", "0")
        yield site


@pytest.fixture(scope="module")
def cluster(site: Path) -> Generator[Any]:
    """One raylet where the driver is, and two with a processor each for the processes that train."""
    started = ray("ray.cluster_utils").Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    for _ in range(2):
        started.add_node(num_cpus=1)
    yield started
    started.shutdown()


def driver(address: str, config: Path, run: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [
        *(sys.executable, "-m", "pgrpo", "train", str(config), "--out", str(run)),
        *("--ray", address, "--num-workers", "2", *arguments),
    ]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        start_new_session=True,
    )


def actors(cluster: Any, title: str) -> list[int]:
    """Process ids of the cluster's actors of a class: Ray gives processes such names, and raylets start
    them."""
    raylets = {node.all_processes["raylet"][0].process.pid for node in cluster.list_all_nodes()}
    children = [
        child
        for raylet in raylets
        for task in Path(f"/proc/{raylet}/task").iterdir()
        for child in read(task / "children").split()
    ]
    name = f"ray::{title}"
    return [
        int(child) for child in children if read(Path(f"/proc/{child}/cmdline")).startswith(name)
    ]


def read(about: Path) -> str:
    """What the system says of a process or thread; nothing where that has ended meanwhile."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return about.read_text()
    return ""


def kill_one(cluster: Any, title: str, chance: random.Random) -> None:
    """Kill one of the actors of a class, as soon as there is one: they may be about to be started."""
    until = time.monotonic() + TIMEOUT_S
    while time.monotonic() < until:
        if found := actors(cluster, title):
            with suppress(ProcessLookupError):
                os.kill(chance.choice(found), signal.SIGKILL)
                return
        time.sleep(0.01)
    raise TimeoutError(f"no {title} within {TIMEOUT_S} s")


@pytest.mark.parametrize(
    ("title", "cause"), [("RayTrainWorker", "rank "), ("_Desk", "ActorDiedError: ")]
)
def test_one_sentence_tells_of_a_process_that_is_lost(
    cluster: Any, tmp_path: Path, title: str, cause: str
) -> None:
    """Where none may be: one that trains, or the one by which the driver hears of the others."""
    changes = {**UNEVEN, "run.num_steps": 20000, "run.eval_every": 0}
    run = tmp_path / "run"
    with driver(cluster.address, write_config(tmp_path, changes), run) as process:
        while not newest(run):
            assert process.poll() is None
            time.sleep(0.1)
        kill_one(cluster, title, random.Random(0))
        _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 2
    (sentence,) = err.splitlines()
    assert sentence.startswith("pgrpo: the run was given up after --max-failures 0: " + cause)


def test_a_cluster_with_too_little_is_waited_for(cluster: Any, tmp_path: Path) -> None:
    """And not any more after an interrupt."""
    config, run = write_config(tmp_path, UNEVEN), tmp_path / "run"
    with driver(cluster.address, config, run, "--set", "run.num_threads=8") as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert line == "pgrpo: Ray has 2 processors, and the run waits for 16\n"
        time.sleep(2)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 143
    assert err == "pgrpo: interrupted\n"
    assert not run.exists()


def test_one_sentence_tells_of_an_error(cluster: Any, tmp_path: Path) -> None:
    """And nothing is tried again that would fail again."""
    changes = {**UNEVEN, "rewards": [{"name": "faulty"}], "evaluation": [{"name": "persona"}]}
    run = tmp_path / "run"
    with driver(
        cluster.address, write_config(tmp_path, changes), run, "--max-failures", "2"
    ) as process:
        out, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 2, err
    (sentence,) = err.splitlines()
    assert sentence.startswith("pgrpo: rank 1: reward 'faulty' failed on a rollout of group ")
    assert "out of paper" in sentence
    assert out.count("loading model") == 1
    assert "in faulty" in (run / "log.txt").read_text()


@pytest.mark.parametrize("where", ["cluster", "local"])
def test_an_interrupt_ends_it_between_two_steps(cluster: Any, tmp_path: Path, where: str) -> None:
    """SIGTERM to the driver; or Ctrl-C, which a terminal sends to all that was started there."""
    changes = {**UNEVEN, "run.num_steps": 20000, "run.checkpoint_every": 20000, "run.eval_every": 0}
    run = tmp_path / "run"
    address = cluster.address if where == "cluster" else "local"
    with driver(address, write_config(tmp_path, changes), run) as process:
        while not (run / "metrics.jsonl").exists():
            assert process.poll() is None
            time.sleep(0.1)
        if where == "cluster":
            process.send_signal(signal.SIGTERM)
        else:
            os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=TIMEOUT_S)
    steps = len((run / "metrics.jsonl").read_text().splitlines())
    assert process.returncode == (143 if where == "cluster" else 130), err
    assert err == (
        f"pgrpo: interrupted; step {steps} is saved, and pgrpo train --resume {run} goes on from there\n"
    )
    assert [saved.step for saved in list_checkpoints(run / "checkpoints")] == [steps]


def test_kills_in_turn_change_nothing(cluster: Any, tmp_path: Path) -> None:
    """Each kill hits a process that trains or one that answers for a reward, at any moment after some
    progress; what is left at the end is what an unbroken run leaves, to the last bit."""
    reward: dict[str, object] = {"name": "persona", "workers": "ray", "num_workers": 2}
    changes = {
        **UNEVEN,
        "run.num_steps": 60,
        "run.checkpoint_every": 3,
        "run.eval_every": 10,
        "rewards": [reward],
    }
    config, run = write_config(tmp_path, changes), tmp_path / "run"
    chance = random.Random(0)
    with driver(
        cluster.address, config, run, "--max-failures", str(NUM_KILLS), "--quiet"
    ) as process:
        try:
            for number in range(NUM_KILLS):
                before = newest(run)
                while newest(run) <= before:
                    assert process.poll() is None, "the run ended before all kills"
                    time.sleep(0.01)
                time.sleep(chance.uniform(0, 0.5))
                title = ("RayTrainWorker", "_Actor")[number % 2]
                kill_one(cluster, title, chance)
                print(f"kill {number + 1}, of a {title}: behind step {newest(run)}", flush=True)
            _, err = process.communicate(timeout=TIMEOUT_S)
            assert process.returncode == 0, err
        finally:
            process.kill()
    reward["workers"] = "threads"
    assert trace(run) == trace(train_on(2, tmp_path / "unbroken", changes)), "to the last bit"


def test_a_machine_that_is_lost_changes_nothing(cluster: Any, tmp_path: Path) -> None:
    """The processes go on where there is a place for them."""
    changes = {**UNEVEN, "run.num_steps": 40, "run.checkpoint_every": 1, "run.eval_every": 20}
    config, run = write_config(tmp_path, changes), tmp_path / "run"
    with driver(cluster.address, config, run, "--max-failures", "1") as process:
        while newest(run) < 2:
            assert process.poll() is None
            time.sleep(0.01)
        # Its processor is one of the two that the run has.
        cluster.remove_node(cluster.list_all_nodes()[-1], allow_graceful=False)
        cluster.add_node(num_cpus=1)
        out, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, err
    assert "continuing after step" in out
    assert trace(run) == trace(train_on(2, tmp_path / "unbroken", changes)), "to the last bit"


def newest(run: Path) -> int:
    return max((saved.step for saved in list_checkpoints(run / "checkpoints")), default=0)
