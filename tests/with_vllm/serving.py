"""Real `pgrpo serve` processes, for the tests of several files: pytest finds the fixture through them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from models import Tree, write

SMALL: Tree = {"free": True, "rewards": [{"name": "regex", "pattern": "w[0-4]"}]}
KEY = "a-secret-that-nobody-may-read"
START_S = 240


class Served:
    """`pgrpo serve` on a port of its own."""

    def __init__(self, config: Path) -> None:
        self._config = config
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None
        self.log = config.parent / f"server-{self.port}.log"

    def start(self) -> None:
        program = Path(sys.executable).parent / "pgrpo"
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                [program, "serve", self._config, "--port", str(self.port)],
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "VLLM_LOGGING_LEVEL": "INFO"},
            )

    def wait(self) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            assert self._process is not None and self._process.poll() is None, self.log.read_text()
            try:
                if httpx.get(f"{self.url}/health", timeout=5).is_success:
                    return
            except httpx.TransportError:
                time.sleep(0.5)
        raise TimeoutError(self.log.read_text())

    def kill(self) -> None:
        """With all the processes it started."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@pytest.fixture
def start_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Served]]:
    """Starts servers that ask for an API key."""
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    started: list[Served] = []

    def start(changes: Tree | None = None) -> Served:
        served = Served(write(tmp_path / f"server-{len(started)}", changes))
        started.append(served)
        served.start()
        return served

    yield start
    for served in started:
        served.kill()


def metrics(run: Path) -> list[Tree]:
    path = run / "metrics.jsonl"
    return (
        [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []
    )
