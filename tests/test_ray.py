"""Ray places the processes of a run, and starts again what is killed. The cases that take longer are in
tests/with_ray."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import install_plugin, trace, write_config
from test_ranks import TIMEOUT_S, UNEVEN, train_on

from pgrpo.cli import main

needs_ray = pytest.mark.skipif(
    sys.version_info >= (3, 15) or (sys.platform == "darwin" and os.uname().machine != "arm64"),
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
