"""A run that is killed and resumed computes what an unbroken run does, bit by bit."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import contents, install_plugin, start, trace, train, write_config

from pgrpo.cli import main
from pgrpo.train.checkpoint import latest_checkpoint

TIMEOUT_S = 120


def killed(config: Path, run: Path, kill_at: int, folder: Path) -> None:
    """Train until the process kills itself before its `kill_at`th operation on a path that starts with `folder`."""
    process = start("train", config, "--out", run, kill_at=kill_at, folder=folder)
    process.join(TIMEOUT_S)
    assert process.exitcode == -9, "the run ended before it was killed"


def resume(run: Path) -> None:
    assert main(["train", "--resume", str(run)]) == 0


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.005)


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("unbroken"))


@pytest.mark.parametrize(
    ("folder", "kill_at", "last_good"),
    [
        *((".partial-000001", kill_at, 0) for kill_at in (1, 9, 23)),
        *((".partial-000002", kill_at, 1) for kill_at in range(1, 33, 4)),
        # Once the new one is there, the old one goes.
        *((".partial-step-000001", kill_at, 2) for kill_at in (1, 2)),
    ],
)
def test_killed_inside_a_save(
    unbroken: Path, tmp_path: Path, folder: str, kill_at: int, last_good: int
) -> None:
    run = tmp_path / "run"
    killed(write_config(tmp_path), run, kill_at, run / "checkpoints" / folder)
    found = latest_checkpoint(run / "checkpoints")
    assert (found.step if found else 0) == last_good
    resume(run)
    assert trace(run) == trace(unbroken)


@pytest.mark.parametrize("kill_at", random.Random(0).sample(range(9, 180), 5))
def test_killed_anywhere(unbroken: Path, tmp_path: Path, kill_at: int) -> None:
    run = tmp_path / "run"
    killed(write_config(tmp_path), run, kill_at, run)
    resume(run)
    assert trace(run) == trace(unbroken)


VARIANTS = {
    # Killed before there is a checkpoint, and between two.
    "no checkpoint yet": ({"run.checkpoint_every": 3}, 18),
    "a checkpoint every third step": ({"run.checkpoint_every": 3, "run.num_steps": 5}, 60),
    "lora": ({"model.lora": {"rank": 2}}, 61),
    "lora with a KL penalty": ({"model.lora": {"rank": 2}, "loss.kl_coef": 0.1}, 61),
    "KL penalty to a reference": ({"loss.kl_coef": 0.1}, 61),
    "control arm": ({"estimator": {"name": "pgrpo", "history": "shuffled"}}, 61),
    "control arm of auto": ({"estimator": {"name": "auto", "history": "shuffled"}}, 61),
    "auto that forgets": (
        {"estimator": {"name": "auto", "forgetting": 0.9, "frequency_weight": 0.5}},
        61,
    ),
    "shrinkage that reads what came before": (
        {"estimator": {"name": "shrinkage", "order": "normalize_then_update", "prior_count": 4}},
        61,
    ),
    "minibatches, epochs, a schedule": (
        {
            "optimizer.minibatches": 2,
            "optimizer.epochs": 2,
            "optimizer.warmup_steps": 2,
            "optimizer.schedule": "cosine",
        },
        61,
    ),
}


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_variants(tmp_path: Path, variant: str) -> None:
    changes, kill_at = VARIANTS[variant]
    whole = train(tmp_path / "whole", changes)
    run = tmp_path / "run"
    killed(write_config(tmp_path, changes), run, kill_at, run)
    assert (latest_checkpoint(run / "checkpoints") is None) == (variant == "no checkpoint yet")
    resume(run)
    assert trace(run) == trace(whole)


NOISY = """
import random
import numpy as np
import torch
from pgrpo.plugins import hookimpl

def noisy(rollouts):
    return [random.random() + np.random.random() + torch.rand(1).item() for _ in rollouts]

@hookimpl
def pgrpo_register_rewards(register):
    register("noisy", noisy)
"""


def test_a_plugin_that_draws_global_random_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    install_plugin(tmp_path / "site", NOISY)
    # In calls for single groups, which overlap, who draws first would be chance.
    rewards = [{"name": "noisy", "batch": "step"}]
    changes = {"rewards": rewards, "evaluation": [{"name": "persona"}]}
    whole = train(tmp_path / "whole", changes)
    run = tmp_path / "run"
    killed(write_config(tmp_path, changes), run, 61, run)
    resume(run)
    assert trace(run) == trace(whole)


def test_lines_that_were_cut_short_are_forgotten(unbroken: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    killed(write_config(tmp_path), run, 60, run)
    for name in ("metrics.jsonl", "samples.jsonl", "evaluations.jsonl"):
        with open(run / name, "a", encoding="utf-8") as log:
            log.write('{"step": 2, "reward": 0.')
    resume(run)
    assert trace(run) == trace(unbroken)


LONG: Mapping[str, Any] = {"run.num_steps": 30, "run.checkpoint_every": 4}


@pytest.fixture(scope="module")
def long_unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A run of many steps, and the seconds it took."""
    started = time.monotonic()
    run = train(tmp_path_factory.mktemp("long"), LONG)
    return run, time.monotonic() - started


def test_killed_again_and_again_by_the_clock(
    long_unbroken: tuple[Path, float], tmp_path: Path
) -> None:
    """Somewhere within a step: other load slows the run down, but not past what it is watched for."""
    whole, duration_s = long_unbroken
    run, clock = tmp_path / "run", random.Random(1)
    command = ["train", write_config(tmp_path, LONG), "--out", run]
    for num_steps in (4, 9, 15, 20):
        process = start(*command)
        wait_for(lambda n=num_steps: num_lines(run / "metrics.jsonl") >= n)
        process.join(clock.uniform(0, 2) * duration_s / LONG["run.num_steps"])
        process.kill()
        process.join()
        assert process.exitcode == -9
        command = ["train", "--resume", run]
    resume(run)
    assert trace(run) == trace(whole)


def test_the_command_itself_is_killed(long_unbroken: tuple[Path, float], tmp_path: Path) -> None:
    run, config = tmp_path / "run", write_config(tmp_path, LONG)
    command = [str(Path(sys.executable).with_name("pgrpo")), "train", str(config)]
    with subprocess.Popen([*command, "--out", str(run)], stdout=subprocess.DEVNULL) as process:
        wait_for((run / "checkpoints" / "step-000004").exists)
        process.kill()
    assert process.returncode == -9
    resume(run)
    assert trace(run) == trace(long_unbroken[0])


def test_resuming_a_finished_run_changes_nothing(
    unbroken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(unbroken)
    assert main(["train", "--resume", str(unbroken)]) == 2
    captured = capsys.readouterr()
    assert captured.err == (
        f"pgrpo: the run in {unbroken} is finished; pgrpo report {unbroken} writes its report again\n"
    )
    assert contents(unbroken) == before
