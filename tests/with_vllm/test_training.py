"""Runs with vLLM in this process, through the command line."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import install_plugin, trace
from models import SMOLLM2, Tree, write

from pgrpo.cli import main


def metrics(run: Path) -> list[Tree]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]


def train(folder: Path, changes: Tree) -> Path:
    config = write(folder, changes)
    assert main(["train", str(config), "--out", str(folder / "run")]) == 0
    return folder / "run"


def test_three_steps_are_those_of_the_transformers_engine(tmp_path: Path) -> None:
    """Labels are drawn by the same random numbers, so the runs differ by rounding alone."""
    changes: Tree = {"model.name": SMOLLM2, "optimizer.learning_rate": 5e-5, "run.num_steps": 3}
    vllm = metrics(train(tmp_path / "vllm", changes))
    ours = metrics(train(tmp_path / "transformers", {**changes, "generation": {"group_size": 4}}))
    assert len(vllm) == len(ours) == 3
    for a, b in zip(vllm, ours, strict=True):
        assert a["mismatch"]["max"] < 1e-4
        assert a["mismatch"]["weight"] == pytest.approx(1.0, abs=1e-4)
        assert a["sync"]["probe_error"] < 1e-4
        assert a["rollout_version"] == a["policy_version"] - 1
        assert b["sync"] is None
        assert b["mismatch"]["weight"] == 1.0
        assert a["reward"] == b["reward"]
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


FREE: Tree = {"free": True, "rewards": [{"name": "regex", "pattern": "w[0-4]"}]}


def test_a_seeded_run_repeats(tmp_path: Path) -> None:
    changes = {**FREE, "run.num_steps": 2, "run.eval_every": 2}
    first, second = (train(tmp_path / name, changes) for name in ("first", "second"))
    assert comparable(first) == comparable(second)


def comparable(run: Path) -> Tree:
    """All that a run computed, without the time that a transfer took."""
    found = trace(run)
    for record in found["metrics"]:
        del record["sync"]
    return found


FAILS_ONCE = """
import pathlib
from pgrpo.config import Section
from pgrpo.plugins import hookimpl

class Once:
    '''Length of the completion; the call that finds the file fails.'''
    class Config(Section):
        file: str
    def __init__(self, config):
        self.file = pathlib.Path(config.file)
    def __call__(self, rollouts):
        if self.file.exists() and self.file.read_text() == "now":
            self.file.unlink()
            raise RuntimeError("this once")
        return [float(len(set(r.completion_ids))) for r in rollouts]

@hookimpl
def pgrpo_register_rewards(register):
    register("once", Once)
"""


def test_one_step_off_trains_on_older_rollouts_and_resumes_bit_by_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    install_plugin(tmp_path / "site", FAILS_ONCE)
    file = tmp_path / "fail"
    changes: Tree = {
        **FREE,
        "rewards": [{"name": "once", "file": str(file)}],
        "run.num_steps": 5,
        "run.pipeline": "one_step_off",
        "run.eval_every": 2,
        "optimizer.learning_rate": 1e-2,
    }
    whole = train(tmp_path / "whole", changes)
    records = metrics(whole)
    # The first batch has no older weights to come from.
    assert [r["policy_version"] - 1 - r["rollout_version"] for r in records] == [0, 1, 1, 1, 1]
    assert records[0]["mismatch"]["max"] < 1e-4
    # An update of this size moves log-probabilities, and the correction sees it.
    assert all(r["mismatch"]["mean"] > 1e-3 for r in records[1:])
    assert any(abs(r["mismatch"]["weight"] - 1) > 1e-3 for r in records[1:])
    assert all("wait" in r["timing_s"] for r in records[1:])

    # The reward fails while step 4's rollouts are scored, which is while step 3 trains.
    config = write(tmp_path / "broken", {**changes, "run.checkpoint_every": 1})
    run = tmp_path / "broken" / "run"
    arm(file, run, monkeypatch)
    assert main(["train", str(config), "--out", str(run)]) == 2
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000003"]
    assert main(["train", "--resume", str(run)]) == 0
    assert len(metrics(run)) == 5

    # Stopped by us between two steps, nothing is lost: the batch that was collected is in the
    # checkpoint.
    run = tmp_path / "stopped" / "run"
    config = write(tmp_path / "stopped", {**changes, "run.checkpoint_every": 1})
    interrupt_after(3, monkeypatch)
    assert main(["train", str(config), "--out", str(run)]) == 130
    state = json.loads((run / "checkpoints" / "step-000003" / "state.json").read_text("utf-8"))
    assert state["batch"]["step"] == 4
    monkeypatch.undo()
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert main(["train", "--resume", str(run)]) == 0
    assert comparable(run) == comparable(whole)


def arm(file: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the reward fail in step 4."""
    from pgrpo.rollout.collector import Collector

    collect = Collector.collect

    def watched(self: Collector, step: int) -> Any:
        if step == 4 and not (run / "failed").exists():
            (run / "failed").touch()
            file.write_text("now")
        return collect(self, step)

    monkeypatch.setattr(Collector, "collect", watched)


def interrupt_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Ctrl-C once a step is done and saved."""
    from pgrpo.train.trainer import Trainer

    save = Trainer._save

    def interrupted(self: Trainer, number: int) -> None:
        save(self, number)
        if number == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_save", interrupted)


HANGS_ONCE = """
import pathlib, time
from pgrpo.config import Section
from pgrpo.plugins import hookimpl

class Hang:
    '''Length of the completion; the calls for step 3 take a minute, the first time.'''
    class Config(Section):
        folder: str
    def __init__(self, config):
        self.folder = pathlib.Path(config.folder)
    def __call__(self, rollouts):
        if rollouts[0].policy_version == 1 and not (self.folder / "interrupted").exists():
            (self.folder / "hanging").touch()
            time.sleep(60)
            (self.folder / "waited").touch()
        return [float(len(set(r.completion_ids))) for r in rollouts]

@hookimpl
def pgrpo_register_rewards(register):
    register("hang", Hang)
"""


def test_ctrl_c_does_not_wait_for_the_next_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pgrpo.train.trainer import Trainer

    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    install_plugin(tmp_path / "site", HANGS_ONCE)
    changes: Tree = {
        **FREE,
        "rewards": [{"name": "hang", "folder": str(tmp_path)}],
        "run.num_steps": 4,
        "run.pipeline": "one_step_off",
        "run.checkpoint_every": 50,
    }
    config, run = write(tmp_path, changes), tmp_path / "run"

    def interrupt(self: Trainer, step: int, *_: object) -> None:
        """A Ctrl-C after step 2, while a reward of step 3 hangs."""
        if step == 2:
            while not (tmp_path / "hanging").exists():
                time.sleep(0.01)
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_evaluate_if_due", interrupt)
    assert main(["train", str(config), "--out", str(run)]) == 130
    assert not (tmp_path / "waited").exists()
    # What was learned is kept; what was being collected is made again.
    state = json.loads((run / "checkpoints" / "step-000002" / "state.json").read_text("utf-8"))
    assert state["batch"] is None
    monkeypatch.undo()
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    (tmp_path / "interrupted").touch()
    assert main(["train", "--resume", str(run)]) == 0
    assert [record["step"] for record in metrics(run)] == [1, 2, 3, 4]


def test_bf16_in_vllm_is_corrected_for(tmp_path: Path) -> None:
    changes = {**FREE, "generation.vllm.precision": "bf16", "run.num_steps": 2}
    for record in metrics(train(tmp_path, changes)):
        found = record["mismatch"]
        assert 1e-4 < found["mean"] < found["max"] < 1.0
        assert 0 < found["kl"] < 0.1
        assert abs(found["weight"] - 1) < 0.1
        assert np.isfinite(record["loss"])


def test_evaluate_runs_with_the_last_weights(tmp_path: Path, capsys: Any) -> None:
    run = train(tmp_path, {"run.num_steps": 2, "run.eval_every": 2})
    last = json.loads((run / "evaluations.jsonl").read_text("utf-8").splitlines()[-1])
    capsys.readouterr()
    assert main(["evaluate", str(run), "--prompts", "8", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["reward"] == last["reward"]


def test_vllm_that_does_not_start_leaves_no_run(tmp_path: Path, capsys: Any) -> None:
    changes = {"generation.vllm.options": {"max_num_seqs": 0}}
    config = write(tmp_path, changes)
    assert main(["train", str(config), "--out", str(tmp_path / "run")]) == 2
    assert "vLLM does not start" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
