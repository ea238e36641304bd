"""Ray places the processes of a run, and starts again what is killed. The cases that take longer are in
tests/with_ray."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import install_plugin, trace, write_config
from test_ranks import TIMEOUT_S, UNEVEN, train_on

from pgrpo.cli import main
from pgrpo.config.sections import ModelConfig
from pgrpo.errors import EngineError
from pgrpo.on_ray import connected, ray
from pgrpo.rollout.engines.vllm import on_ray as vllm_on_ray
from pgrpo.rollout.engines.vllm.on_ray import _Place, _Process, _Server
from pgrpo.rollout.settings import GenerationConfig

# As the extra `ray` of pyproject.toml says.
needs_ray = pytest.mark.skipif(
    sys.version_info >= (3, 15)
    or (sys.platform != "linux" and platform.machine() not in ("arm64", "AMD64")),
    reason="Ray has no wheel for it",
)

DEADLY = """
import os, signal
from pathlib import Path
from pgrpo.plugins import hookimpl

def die_once(name):
    killed = Path(__file__).with_name(name)
    if not killed.exists():
        killed.touch()
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))

def deadly(rollouts):
    if rollouts[0].policy_version == 3 and os.environ.get("RANK") == "1":
        die_once("killed training")
    return [float(len(r.completion)) for r in rollouts]

def mortal(rollouts):
    if rollouts[0].policy_version == 1:
        die_once("killed reward")
    return [float(r.completion.count("a")) for r in rollouts]

@hookimpl
def pgrpo_register_rewards(register):
    register("deadly", deadly)
    register("mortal", mortal)
"""


@needs_ray
def test_processes_that_are_killed_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In step 2 one that answers for a reward, in step 4 one that trains."""
    site = tmp_path / "site"
    install_plugin(site, DEADLY)
    mortal: dict[str, object] = {"name": "mortal", "workers": "ray", "num_workers": 1}
    changes = {**UNEVEN, "rewards": [{"name": "deadly"}, mortal]}
    config, run = write_config(tmp_path, changes), tmp_path / "run"
    command = [
        *(sys.executable, "-m", "pgrpo", "train", config, "--out", run),
        *("--ray", "local", "--num-workers", "2", "--max-failures", "1"),
    ]
    path = os.pathsep.join([str(site), *sys.path])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    # Ray kills what it has started when others take the machine's memory.
    environment["RAY_memory_monitor_refresh_ms"] = "0"
    driver = subprocess.run(
        command, env=environment, capture_output=True, encoding="utf-8", timeout=2 * TIMEOUT_S
    )
    assert driver.returncode == 0, driver.stderr
    assert "continuing after step 3" in driver.stdout, "it was killed, and went on"
    assert driver.stdout.count("step 4/4") == 1, "one process tells"
    assert (site / "killed training").exists()
    assert (site / "killed reward").exists()
    mortal["workers"] = "threads"
    monkeypatch.syspath_prepend(str(site))
    unbroken = train_on(2, tmp_path / "unbroken", changes)
    assert trace(run) == trace(unbroken), "to the last bit"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--num-workers", "2"), "--num-workers and --max-failures have no effect without --ray"),
        (("--ray", "local"), "Ray needs ray; install it with pip install 'pgrpo[ray]'"),
    ],
)
def test_what_cannot_be_is_told_at_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    sentence: str,
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    config = str(write_config(tmp_path))
    assert main(["train", config, "--out", str(tmp_path / "run"), *arguments]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--num-servers", "2"), "--num-servers has no effect without --ray"),
        (("--ray", "local", "--port", "81"), "--host and --port have no effect with --ray"),
        (("--ray", "local"), "Ray needs ray; install it with pip install 'pgrpo[ray]'"),
    ],
)
def test_what_cannot_be_served_is_told_at_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    sentence: str,
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["serve", str(write_config(tmp_path)), *arguments]) == 2
    assert sentence in capsys.readouterr().err


@needs_ray
def test_a_cluster_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        config = str(write_config(tmp_path))
        assert main(["train", config, "--out", str(tmp_path / "run"), "--ray", address]) == 2
    assert f"pgrpo: there is no Ray to join at '{address}': " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@needs_ray
@pytest.mark.parametrize("left", ["nothing", "what answers", "what is gone"])
def test_no_cluster_is_joined_that_nobody_left_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    """Only what `ray start` left, which it notes in a file, and never what another run has for itself."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    module = ray()
    joined: list[str] = []
    monkeypatch.setattr(module, "is_initialized", lambda: False)
    monkeypatch.setattr(module, "init", lambda *, address, **_: joined.append(address))
    monkeypatch.setattr(module, "shutdown", lambda: None)
    with socket.create_server(("127.0.0.1", 0)) as cluster:
        address = f"127.0.0.1:{cluster.getsockname()[1]}"
        if left != "nothing":
            (tmp_path / "ray").mkdir()
            (tmp_path / "ray" / "ray_current_cluster").write_text(address)
        if left == "what is gone":
            cluster.close()
        with connected(None):
            pass
        assert joined == [address if left == "what answers" else "local"]
        monkeypatch.setenv("RAY_ADDRESS", "auto")
        with connected(None):
            pass
    assert joined[1:] == ["auto"]


class Answers:
    """In the place of Ray: actors whose servers answer at once, and end when the clock says so."""

    def remote(self, **_: object) -> Any:
        place = _Place("node", "host", 1)
        actor = SimpleNamespace(
            start=SimpleNamespace(remote=lambda *_: place), end=SimpleNamespace(remote=lambda: 1)
        )
        return lambda _: SimpleNamespace(remote=lambda: actor)

    def get(self, reference: object) -> object:
        return reference

    def kill(self, _: object) -> None: ...

    def nodes(self) -> list[Any]:
        return []

    def cluster_resources(self) -> dict[str, float]:
        return {}


def test_a_server_that_dies_whenever_it_answers_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And one that keeps up for a while is started again as often as it dies."""
    clock = 0.0
    monkeypatch.setattr(vllm_on_ray, "ray", Answers)
    monkeypatch.setattr(vllm_on_ray, "time", SimpleNamespace(monotonic=lambda: clock))
    said: list[str] = []
    generation = GenerationConfig.model_validate({"max_new_tokens": 4})
    server = _Server(generation, ModelConfig(name="some/model"), said.append)
    for lives_s in (61.0, 59.0, 61.0, 61.0, 61.0, 59.0, 59.0):
        server.go_on()
        clock += lives_s
        server.go_on()
    assert said == ["http://host:1 ended with code 1; starting it again"] * 7
    server.go_on()
    clock += 59.0
    with pytest.raises(
        EngineError, match="ended with code 1 before it had answered for 60 s, 3 times"
    ):
        server.go_on()


SERVER = """
import socket, sys
with socket.create_server(("127.0.0.1", int(sys.argv[1]))) as server:
    server.settimeout(20)
    for answer in (b"what is no HTTP\\n", b"HTTP/1.0 200 OK\\r\\n\\r\\n"):
        connection, _ = server.accept()
        connection.recv(4096)
        connection.sendall(answer)
        connection.close()
"""


@needs_ray
@pytest.mark.skipif(sys.platform == "win32", reason="vLLM is not there")
def test_a_server_is_asked_until_it_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the environment's proxy, and also after an answer that is none."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    command = [sys.executable, "-c", SERVER, str(port)]
    monkeypatch.setattr(vllm_on_ray, "serve_command", lambda *_, **__: (command, dict(os.environ)))
    place = _Place("node", "127.0.0.1", port)
    process = _Process()
    generation = GenerationConfig.model_validate({"max_new_tokens": 4})
    found = process.start(generation, ModelConfig(name="some/model"), None, place)
    assert process.end() == 0
    assert found == place
