"""A run that is killed and resumed computes what an unbroken run does, bit by bit."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    PEAK,
    WITH_PEAK,
    contents,
    install_plugin,
    start,
    trace,
    train,
    write_config,
)
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from pgrpo.cli import main
from pgrpo.rollout.collector import Collector
from pgrpo.runs.folder import RunFolder
from pgrpo.train.checkpoint import chosen_checkpoint, latest_checkpoint, list_checkpoints
from pgrpo.train.policy import Policy

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
        *((".partial-000001", kill_at, 0) for kill_at in (1, 9, 23, 40)),
        *((".partial-000002", kill_at, 1) for kill_at in range(1, 43, 4)),
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


@pytest.mark.parametrize("kill_at", random.Random(0).sample(range(9, 240), 5))
def test_killed_anywhere(unbroken: Path, tmp_path: Path, kill_at: int) -> None:
    run = tmp_path / "run"
    killed(write_config(tmp_path), run, kill_at, run)
    resume(run)
    assert trace(run) == trace(unbroken)


VARIANTS = {
    # Killed before there is a checkpoint, and between two.
    "no checkpoint yet": ({"run.checkpoint_every": 3}, 18),
    "a checkpoint every third step": ({"run.checkpoint_every": 3, "run.num_steps": 5}, 85),
    "sampled evaluations": ({"run.eval_samples": 3}, 75),
    "groups without signal give their places to others": (
        {"run.resample": 2, "estimator": {"name": "grpo"}},
        75,
    ),
    "a penalty of long completions": (
        {"generation.overlong_buffer": 2, "generation.overlong_penalty": 0.5},
        75,
    ),
    "prompts by shares of clusters": (
        {
            "clustering.prompt_shares": {"2": 0.5},
            "run.resample": 2,
            "estimator": {"name": "grpo"},
        },
        75,
    ),
    "a reward that shifts": (
        {
            "rewards": [{"name": "persona", "shift": {"after": 2, "scale": 10.0, "offset": -2.0}}],
            "estimator": {"name": "pgrpo", "forgetting": 0.9},
        },
        75,
    ),
    "lora": ({"model.lora": {"rank": 2}}, 75),
    "lora with a KL penalty": ({"model.lora": {"rank": 2}, "loss.kl_coef": 0.1}, 75),
    "KL penalty to a reference": ({"loss.kl_coef": 0.1}, 75),
    "control arm": ({"estimator": {"name": "pgrpo", "history": "shuffled"}}, 75),
    "a history for each person": (
        {"estimator": {"name": "pgrpo", "history": "user", "prior_count": 8}},
        75,
    ),
    "control arm of auto": ({"estimator": {"name": "auto", "history": "shuffled"}}, 75),
    "a history of each reward": (
        {
            "rewards": [
                {"name": "persona", "weight": 2.0},
                {"name": "persona_utility", "clusters": [0, 1]},
            ],
            "estimator": {"name": "pgrpo", "combine": "normalize_then_sum"},
        },
        75,
    ),
    "auto that forgets": (
        {"estimator": {"name": "auto", "forgetting": 0.9, "frequency_weight": 0.5}},
        75,
    ),
    "shrinkage that reads what came before": (
        {"estimator": {"name": "shrinkage", "order": "normalize_then_update", "prior_count": 4}},
        75,
    ),
    "losses beside the usual one": (
        {
            "loss.ratio": "sequence",
            "loss.clipping": "cispo",
            "loss.mask_truncated": True,
            "loss.entropy_coef": 0.01,
            "optimizer.epochs": 2,
        },
        75,
    ),
    "samples that are cut and stopped": (
        {
            "generation.top_k": 90,
            "generation.top_p": 0.9,
            "generation.min_p": 0.01,
            "generation.stop": ["ea", "s t"],
            "generation.max_new_tokens": 8,
            "loss.mask_truncated": True,
        },
        75,
    ),
    "pairs": (
        {
            "loss.objective": "dpo",
            "generation.group_size": 4,
            "optimizer.minibatches": 2,
            "run.resample": 1,
        },
        75,
    ),
    "minibatches, epochs, a schedule": (
        {
            "optimizer.minibatches": 2,
            "optimizer.epochs": 2,
            "optimizer.warmup_steps": 2,
            "optimizer.schedule": "cosine",
        },
        75,
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


def weights(run: Path, step: int) -> bytes:
    return (run / "checkpoints" / f"step-{step:06d}" / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def with_peak(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("peak")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder / "site"))
        install_plugin(folder / "site", PEAK)
        yield train(folder, WITH_PEAK)


@pytest.mark.parametrize(
    ("folder", "kill_at"),
    [
        *(("checkpoints/.partial-000001", kill_at) for kill_at in (1, 23)),
        *(("checkpoints/.partial-000005", kill_at) for kill_at in range(1, 33, 8)),
        # It is there, and the one that was the best before goes, or the newest.
        *(("checkpoints/.partial-step-000001", kill_at) for kill_at in (1, 2)),
        *(("checkpoints/.partial-step-000003", kill_at) for kill_at in (1, 2)),
        *(("checkpoints/.partial-000006", kill_at) for kill_at in (1, 23)),
        *(("", kill_at) for kill_at in random.Random(2).sample(range(40, 200), 4)),
    ],
)
def test_the_best_checkpoint_outlives_kills(
    with_peak: Path, tmp_path: Path, folder: str, kill_at: int
) -> None:
    run = tmp_path / "run"
    killed(write_config(tmp_path, WITH_PEAK), run, kill_at, run / folder)
    found = list_checkpoints(run / "checkpoints")
    if found:
        best = RunFolder(run).best_step(found[-1].step)
        assert best in {checkpoint.step for checkpoint in found}
        assert chosen_checkpoint(RunFolder(run), best=True).step == best
    resume(run)
    assert trace(run) == trace(with_peak)
    assert chosen_checkpoint(RunFolder(run), best=True).step == 5
    assert weights(run, 5) == weights(with_peak, 5) != weights(with_peak, 6)


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
    assert main(["train", "--resume", str(unbroken)]) == 0
    assert capsys.readouterr().out == (
        f"the run in {unbroken} is finished; --set run.num_steps=N makes it longer, and pgrpo report "
        f"{unbroken} writes its report again\n"
    )
    assert contents(unbroken) == before


def test_a_finished_run_is_made_longer(unbroken: Path, tmp_path: Path) -> None:
    longer = {"run.num_steps": 5}
    whole = train(tmp_path / "whole", longer)
    run = Path(shutil.copytree(unbroken, tmp_path / "run"))
    assert main(["train", "--resume", str(run), "--set", "run.num_steps=5"]) == 0
    assert RunFolder(run).config() == RunFolder(whole).config()
    assert RunFolder(run).info().status == "finished"
    assert trace(run) == trace(whole)


SIGNALS = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129}


@pytest.mark.skipif(sys.platform == "win32", reason="it has no such signals")
@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_at_any_moment_loses_no_step(
    long_unbroken: tuple[Path, float], tmp_path: Path, name: str
) -> None:
    whole, duration_s = long_unbroken
    run, clock = tmp_path / "run", random.Random(name)
    # Nothing is saved but what the signals have saved.
    rare = {**LONG, "run.checkpoint_every": 1000}
    pgrpo = str(Path(sys.executable).with_name("pgrpo"))
    command = ["train", str(write_config(tmp_path, rare)), "--out", str(run)]
    for _ in range(3):
        taken = num_lines(run / "metrics.jsonl")
        with subprocess.Popen(
            [pgrpo, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as process:
            wait_for(lambda n=taken: num_lines(run / "metrics.jsonl") > n + 2)
            time.sleep(clock.uniform(0, 2) * duration_s / LONG["run.num_steps"])
            process.send_signal(getattr(signal, name))
            said = process.communicate(timeout=TIMEOUT_S)[1]
        steps = num_lines(run / "metrics.jsonl")
        assert process.returncode == SIGNALS[name], said
        assert said == (
            f"pgrpo: interrupted; step {steps} is saved, and pgrpo train --resume {run} goes on from "
            "there\n"
        )
        # On a busy machine it may have come to its end meanwhile.
        assert RunFolder(run).info().status == "interrupted" or steps == LONG["run.num_steps"]
        if steps == LONG["run.num_steps"]:
            break
        command = ["train", "--resume", str(run)]
    resume(run)
    assert trace(run) == trace(whole)


@pytest.mark.skipif(sys.platform == "win32", reason="it has no such signals")
def test_a_run_outlives_those_who_read_its_output(
    long_unbroken: tuple[Path, float], tmp_path: Path
) -> None:
    run, config = tmp_path / "run", write_config(tmp_path, LONG)
    pgrpo = str(Path(sys.executable).with_name("pgrpo"))
    # As in `pgrpo train ... | head -1`.
    with subprocess.Popen(
        [pgrpo, "train", str(config), "--out", str(run)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stdout.readline().startswith("[pgrpo] ")
        process.stdout.close()
        assert process.stderr is not None and process.stderr.read() == ""
    assert process.returncode == 0
    assert trace(run) == trace(long_unbroken[0])


@pytest.mark.skipif(sys.platform == "win32", reason="it has no such terminals")
def test_a_terminal_that_is_closed_ends_a_run_in_order(
    long_unbroken: tuple[Path, float], tmp_path: Path
) -> None:
    import pty

    run, config = tmp_path / "run", write_config(tmp_path, LONG)
    pid, terminal = pty.fork()
    if pid == 0:
        pgrpo = str(Path(sys.executable).with_name("pgrpo"))
        os.execv(pgrpo, [pgrpo, "train", str(config), "--out", str(run)])
    reader = threading.Thread(target=read_all, args=(terminal,), daemon=True)
    reader.start()
    wait_for(lambda: num_lines(run / "metrics.jsonl") >= 6)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 129
    resume(run)
    assert trace(run) == trace(long_unbroken[0])


def read_all(terminal: int) -> None:
    with contextlib.suppress(OSError):
        while os.read(terminal, 1 << 16):
            pass


def test_a_signal_in_an_update_waits_for_its_end(
    long_unbroken: tuple[Path, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    update, seen = Policy.update, []

    def interrupted(self: Policy, *arguments: Any) -> Any:
        seen.append(None)
        if len(seen) in (3, 7):
            signal.raise_signal(signal.SIGINT)
        if len(seen) == 7:
            signal.raise_signal(signal.SIGINT)  # whoever insists need not wait
        return update(self, *arguments)

    monkeypatch.setattr(Policy, "update", interrupted)
    rare = {**LONG, "run.checkpoint_every": 1000}
    assert main(["train", str(write_config(tmp_path, rare)), "--out", str(run)]) == 130
    found = latest_checkpoint(run / "checkpoints")
    assert found is not None and found.step == 3 == num_lines(run / "metrics.jsonl")
    assert main(["train", "--resume", str(run)]) == 130
    assert len(seen) == 7
    assert latest_checkpoint(run / "checkpoints") == found
    resume(run)
    assert trace(run) == trace(long_unbroken[0])


def test_a_signal_while_moments_are_written_is_no_refusal_of_the_disk(
    long_unbroken: tuple[Path, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch takes what is raised in its threads and planners for a failure of the storage."""
    run = tmp_path / "run"
    write, seen = HuggingFaceStorageWriter.write_data, []

    def interrupted(self: HuggingFaceStorageWriter, *arguments: Any) -> Any:
        seen.append(None)
        if len(seen) == 2:
            signal.raise_signal(signal.SIGINT)
        return write(self, *arguments)

    monkeypatch.setattr(HuggingFaceStorageWriter, "write_data", interrupted)
    assert main(["train", str(write_config(tmp_path, LONG)), "--out", str(run)]) == 130
    assert RunFolder(run).info().status == "interrupted"
    resume(run)
    assert trace(run) == trace(long_unbroken[0])


class Plaintive:
    """What only the garbage collector frees, and not in silence."""

    def __init__(self) -> None:
        self.myself = self

    def __del__(self) -> None:
        raise ValueError


def test_what_a_signal_leaves_half_made_is_not_worth_a_word(
    long_unbroken: tuple[Path, float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """An event loop that was interrupted before it had its sockets complains when it is freed, and
    that is as late as its traceback is."""
    run = tmp_path / "run"
    make, seen = socket.socketpair, []

    def interrupted() -> Any:
        seen.append(None)
        if len(seen) == 3:
            gc.disable()
            Plaintive()
            signal.raise_signal(signal.SIGTERM)
        return make()

    complaints: list[Any] = []
    monkeypatch.setattr(socket, "socketpair", interrupted)
    monkeypatch.setattr(sys, "unraisablehook", complaints.append)
    assert main(["train", str(write_config(tmp_path, LONG)), "--out", str(run)]) == 143
    gc.enable()
    gc.collect()
    assert complaints == []
    steps = num_lines(run / "metrics.jsonl")
    assert capsys.readouterr().err == (
        f"pgrpo: interrupted; step {steps} is saved, and pgrpo train --resume {run} goes on from "
        "there\n"
    )
    resume(run)
    assert trace(run) == trace(long_unbroken[0])


def test_a_signal_while_histories_change_waits_for_the_batch(
    long_unbroken: tuple[Path, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    normalize, seen = Collector._normalize, []  # pyright: ignore[reportPrivateUsage]

    def interrupted(self: Collector, *arguments: Any) -> Any:
        seen.append(None)
        if len(seen) == 4:
            signal.raise_signal(signal.SIGINT)
        return normalize(self, *arguments)

    monkeypatch.setattr(Collector, "_normalize", interrupted)
    rare = {**LONG, "run.checkpoint_every": 1000}
    assert main(["train", str(write_config(tmp_path, rare)), "--out", str(run)]) == 130
    found = latest_checkpoint(run / "checkpoints")
    assert found is not None and found.step == 3, (
        "three steps were taken, and a fourth batch is kept"
    )
    resume(run)
    assert trace(run) == trace(long_unbroken[0])


BROKEN = """
from pgrpo.plugins import hookimpl

calls = []

def broken(rollouts):
    calls.append(None)
    if len(calls) > 3:
        raise RuntimeError("the library is closed")
    return [1.0] * len(rollouts)

@hookimpl
def pgrpo_register_rewards(register):
    register("broken", broken)
"""


def test_what_ended_a_run_stands_in_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    install_plugin(tmp_path / "site", BROKEN)
    changes = {
        "rewards": [{"name": "broken", "batch": "step"}],
        "evaluation": [{"name": "persona"}],
        "run.num_steps": 9,
    }
    run = tmp_path / "run"
    assert main(["train", str(write_config(tmp_path, changes)), "--out", str(run)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("pgrpo: reward 'broken' failed on ")
    assert said.endswith(f"RuntimeError: the library is closed (see {run / 'log.txt'})\n")
    info = RunFolder(run).info()
    assert info.status == "failed" and f"pgrpo: {info.error} (see " in said
    log = (run / "log.txt").read_text()
    assert 'raise RuntimeError("the library is closed")' in log and "PluginError" in log
    # What was wrong is mended, and the run goes on.
    (tmp_path / "site" / "my_plugin.py").write_text(BROKEN.replace("> 3", "> 300"))
    sys.modules.pop("my_plugin", None)
    resume(run)
    assert RunFolder(run).info().error == "" and RunFolder(run).info().status == "finished"
