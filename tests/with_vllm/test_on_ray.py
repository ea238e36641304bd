"""vLLM servers on several raylets, which stand for several machines, killed in mid-run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from models import Tree, write
from serving import SMALL, metrics

from pgrpo.cli import main
from pgrpo.on_ray import ray

START_S = 400


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    # Ray kills what it has started when others take the machine's memory.
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "0")
    started = ray("ray.cluster_utils").Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    started.add_node(num_cpus=1)
    yield started
    started.shutdown()


def rewards_and_losses(run: Path) -> list[tuple[float, float]]:
    return [(r["reward"], round(r["loss"], 4)) for r in metrics(run)]


def servers(cluster: Any) -> list[tuple[int, int]]:
    """Process ids of the actors, which raylets start, and of each one's server."""
    raylets = [node.all_processes["raylet"][0].process.pid for node in cluster.list_all_nodes()]
    return sorted(
        (actor, child)
        for raylet in raylets
        for actor in children(raylet)
        if "ray::_Process" in read(Path(f"/proc/{actor}/cmdline"))
        for child in children(actor)
        if "vllm.entrypoints" in read(Path(f"/proc/{child}/cmdline"))
    )


def children(process: int) -> list[int]:
    with suppress(FileNotFoundError):
        tasks = list(Path(f"/proc/{process}/task").iterdir())
        return [int(child) for task in tasks for child in read(task / "children").split()]
    return []


def read(about: Path) -> str:
    """What the system says of a process or thread; nothing where that has ended meanwhile."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return about.read_text()
    return ""


def test_servers_and_their_actors_are_killed_in_mid_run(cluster: Any, tmp_path: Path) -> None:
    changes: Tree = {**SMALL, "run.num_steps": 8}
    whole, run = tmp_path / "whole" / "run", tmp_path / "remote" / "run"
    assert main(["train", str(write(tmp_path / "whole", changes)), "--out", str(whole)]) == 0
    command = [sys.executable, "-m", "pgrpo", "serve", str(write(tmp_path / "server", changes))]
    command += ["--ray", cluster.address, "--num-servers", "2"]
    with (
        ExitStack() as started,
        subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8") as serving,
    ):
        try:
            assert serving.stdout is not None
            name, _, value = serving.stdout.readline().strip().partition("=")
            assert name == "generation.vllm.servers"
            urls = json.loads(value)
            assert len(set(urls)) == 2
            (_, one), (two, other) = servers(cluster)
            started_there = [one, *children(one), other, *children(other)]
            assert len(started_there) > 2, "each has an engine of its own"
            remote = {**changes, "generation.vllm": {"servers": urls, "retry_s": START_S}}
            config = write(tmp_path / "remote", remote)
            training = subprocess.Popen(
                [sys.executable, "-m", "pgrpo", "train", str(config), "--out", str(run)]
            )
            started.callback(training.kill)
            wait_for_step(training, run, 2)
            os.kill(one, signal.SIGKILL)
            said = serving.stdout.readline().strip()
            assert said.split(maxsplit=1) in [
                [url, "ended with code -9; starting it again"] for url in urls
            ]
            wait_for_step(training, run, 4)
            os.kill(two, signal.SIGKILL)
            said = serving.stdout.readline().strip()
            assert said.split(maxsplit=1) in [[url, "was lost; starting it again"] for url in urls]
            assert training.wait(START_S) == 0
            # They are up again; what is left of them is looked for below.
            while len(found := servers(cluster)) < 2:
                time.sleep(0.5)
            started_there += [
                process for _, server in found for process in (server, *children(server))
            ]
        finally:
            serving.send_signal(signal.SIGTERM)
            said, _ = serving.communicate(timeout=60)
    assert serving.returncode == 143
    assert said == "", "they are where they were"
    assert rewards_and_losses(run) == rewards_and_losses(whole), "nothing lost, nothing twice"
    until = time.monotonic() + 60
    while any(Path(f"/proc/{process}").exists() for process in started_there):
        assert time.monotonic() < until, "a server's processes outlive it"
        time.sleep(0.5)


def wait_for_step(training: subprocess.Popen[bytes], run: Path, step: int) -> None:
    while len(metrics(run)) < step:
        assert training.poll() is None
        time.sleep(0.05)
