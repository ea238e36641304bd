"""Ray places the processes of a run, and starts again what is killed. The cases that take longer are in
tests/with_ray."""

from __future__ import annotations

import os
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

killed = Path(__file__).with_name("killed")

def deadly(rollouts):
    '''In step 4 the second process is killed, once.'''
    if rollouts[0].policy_version == 3 and os.environ.get("RANK") == "1" and not killed.exists():
        killed.touch()
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
    return [float(len(r.completion)) for r in rollouts]

@hookimpl
def pgrpo_register_rewards(register):
    register("deadly", deadly)
"""


@needs_ray
def test_a_process_that_is_killed_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    install_plugin(site, DEADLY)
    changes = {**UNEVEN, "rewards": [{"name": "deadly"}]}
    config, run = write_config(tmp_path, changes), tmp_path / "run"
    command = [
        *(sys.executable, "-m", "pgrpo", "train", config, "--out", run),
        *("--ray", "local", "--num-workers", "2", "--max-failures", "1"),
    ]
    path = os.pathsep.join([str(site), *sys.path])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    driver = subprocess.run(
        command, env=environment, capture_output=True, encoding="utf-8", timeout=2 * TIMEOUT_S
    )
    assert driver.returncode == 0, driver.stderr
    assert "continuing after step 3" in driver.stdout, "it was killed, and went on"
    assert driver.stdout.count("step 4/4") == 1, "one process tells"
    assert (site / "killed").exists()
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
