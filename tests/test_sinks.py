"""Where records go: read back through each library's own reader, or from its own messages."""

from __future__ import annotations

import io
import json
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from conftest import start, train, write_config
from rich.console import Console

from pgrpo.cli import main
from pgrpo.errors import ConfigError, RunFolderError
from pgrpo.runs.config import load_config
from pgrpo.runs.display import Display
from pgrpo.runs.folder import RunFolder
from pgrpo.runs.log import Log
from pgrpo.runs.records import (
    ClusterEvaluation,
    ClusterRecord,
    EvaluationRecord,
    RunInfo,
    SampleRecord,
    StepRecord,
    TimingRecord,
    numbers,
)
from pgrpo.runs.sinks import Sinks, open_sinks, require_trackers
from pgrpo.runs.tensorboard import TensorBoard

TIMEOUT_S = 120


def step_record(step: int, num_clusters: int = 1, **fields: Any) -> StepRecord:
    clusters = {f"c {i}": ClusterRecord(reward=0.5, count=i, mean=i) for i in range(num_clusters)}
    return StepRecord(
        step=step,
        reward=step / 4,
        timing_s=TimingRecord(total=1.0),
        clusters=clusters,
        num_clusters=num_clusters,
        **fields,
    )


def evaluation_record(step: int) -> EvaluationRecord:
    clusters = {"c 0": ClusterEvaluation(reward=0.25, num_prompts=3)}
    return EvaluationRecord(step=step, reward=0.5, std=0.1, num_prompts=3, clusters=clusters)


# The log.


def test_a_log_gives_back_what_it_was_given(tmp_path: Path) -> None:
    log = Log(tmp_path / "metrics.jsonl", StepRecord)
    assert list(log) == [] and log.ends() is None
    records = [step_record(step, kl=None if step % 2 else 1 / 3) for step in range(1, 200)]
    log.append(*records[:5])
    for record in records[5:]:
        log.append(record)
    assert list(log) == records
    assert log.ends() == (1, 199)
    assert [record.step for record in log.at([1, 7, 150, 199, 300])] == [1, 7, 150, 199]
    assert list(log.at([42])) == [records[41]]
    line = json.loads(log.path.read_text().splitlines()[0])
    assert line["kl"] is None and line["clusters"]["c 0"]["bias"] is None


def test_several_records_of_a_step_are_found_together(tmp_path: Path) -> None:
    log = Log(tmp_path / "samples.jsonl", SampleRecord)
    records = [
        SampleRecord(step=step, prompt='say "step": 99', completion=f"{step} {n}")
        for step in (2, 3, 5)
        for n in range(step)
    ]
    log.append(*records)
    assert list(log.at([2, 5])) == [record for record in records if record.step in (2, 5)]
    assert log.ends() == (2, 5)


@pytest.mark.parametrize("torn", ["", '{"step": 4', '{"step": 4}', "\u00e9"])
def test_a_line_without_its_newline_is_not_there(tmp_path: Path, torn: str) -> None:
    log = Log(tmp_path / "metrics.jsonl", StepRecord)
    log.append(*map(step_record, (1, 2, 3)))
    whole = log.path.read_bytes()
    log.path.write_bytes(whole + torn.encode()[: -1 if torn == "\u00e9" else None])
    assert [record.step for record in log] == [1, 2, 3]
    assert log.ends() == (1, 3)
    assert [record.step for record in log.at([3, 4])] == [3]
    log.rewind(3)
    assert log.path.read_bytes() == whole
    log.rewind(1)
    assert log.path.read_bytes() == whole[: whole.index(b"\n") + 1]
    log.rewind(0)
    assert log.path.read_bytes() == b""


def test_rewinding_refuses_a_damaged_log_and_leaves_it(tmp_path: Path) -> None:
    log = Log(tmp_path / "metrics.jsonl", StepRecord)
    log.append(*map(step_record, (1, 2)))
    log.path.write_bytes(log.path.read_bytes().replace(b"0.5", b'"x"'))
    before = log.path.read_bytes()
    with pytest.raises(
        RunFolderError, match=r"metrics.jsonl line 1 is damaged: clusters.c 0.reward"
    ):
        log.rewind(2)
    assert log.path.read_bytes() == before


def test_the_trainer_fills_every_field(tmp_path: Path) -> None:
    run = RunFolder(train(tmp_path))
    for record in (*run.metrics, *run.evaluations, *run.samples, run.info()):
        assert record.model_fields_set == set(type(record).model_fields)
    assert all(
        cluster.reward is not None for r in run.evaluations for cluster in r.clusters.values()
    )


# The display.


def test_the_display_is_bounded() -> None:
    for terminal in (False, True):
        console = Console(
            force_terminal=terminal, width=200, height=50, record=True, file=io.StringIO()
        )
        with Display("x", 1, shown_on=console) as display:
            display.step(step_record(1, 64).model_copy(update={"num_clusters": 10_000}))
        text = console.export_text()
        assert "c 63" in text and "c 0" in text and "c 30" not in text
        assert ("9992 more" in text) == terminal


def test_the_display_fits_a_small_terminal_and_a_log() -> None:
    record = step_record(1, 64).model_copy(update={"num_clusters": 10_000})
    long = {f"{name} {'of a long name' * 9}": values for name, values in record.clusters.items()}
    peers = {"grpo": {1: 0.25}, "pgrpo-one": {1: 0.5}}
    for terminal in (False, True):
        console = Console(
            force_terminal=terminal,
            width=60,
            height=24,
            record=True,
            file=io.StringIO(),
            soft_wrap=True,
        )
        with Display("pgrpo seed 0", 1, peers=peers, shown_on=console) as display:
            display.evaluation(evaluation_record(0))
            console.export_text(clear=True)
            display.step(record.model_copy(update={"clusters": long}))
        lines = console.export_text().splitlines()
        assert max(map(len, lines)) <= (60 if terminal else 200)
        assert any("c 0 of a" in line for line in lines)
        if terminal:
            shown = lines[max(n for n, line in enumerate(lines) if "step 1/1" in line) :]
            assert len(shown) <= 24
            assert any("more: not the largest" in line for line in shown)


# Trackers.


def read_events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    tags: Any = accumulator.Tags()["scalars"]
    return {tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in tags}


def test_events_are_read_by_tensorboard(tmp_path: Path) -> None:
    events = TensorBoard(tmp_path / "tensorboard", 1)
    events.step(StepRecord(step=1, reward=0.5, clusters={"a": ClusterRecord(count=3)}), [])
    # On disk at once, however the process ends.
    assert read_events(tmp_path / "tensorboard") == {
        "reward": [(1, 0.5)],
        "clusters/a/count": [(1, 3.0)],
        "clusters/a/num_rollouts": [(1, 0.0)],
        "assignment_version": [(1, 0.0)],
    }
    events.step(StepRecord(step=2, reward=0.75), [])
    events.evaluation(evaluation_record(2))
    found = read_events(tmp_path / "tensorboard")
    assert found["reward"] == [(1, 0.5), (2, 0.75)]
    assert found["held_out/reward"] == [(2, 0.5)]
    assert found["held_out/clusters/c 0/reward"] == [(2, 0.25)]


def test_a_resumed_run_has_every_step_once_in_tensorboard(tmp_path: Path) -> None:
    changes = {"run.trackers": ["tensorboard"], "run.checkpoint_every": 3, "run.num_steps": 5}
    whole = read_events(train(tmp_path / "whole", changes) / "tensorboard")
    assert [step for step, _ in whole["reward"]] == [1, 2, 3, 4, 5]
    assert [step for step, _ in whole["held_out/reward"]] == [0, 2, 4, 5]
    run = kill_and_resume(tmp_path, changes)
    again = read_events(run / "tensorboard")
    for tag in ("reward", "loss", "clusters/0/mean", "held_out/reward"):
        assert again[tag] == whole[tag]


def kill_and_resume(folder: Path, changes: dict[str, Any]) -> Path:
    """A run of five steps that is killed when steps 4 and 5 are logged, but not saved."""
    run, config = folder / "run", write_config(folder, changes)
    process = start(
        "train", config, "--out", run, kill_at=1, folder=run / "checkpoints/.partial-000005"
    )
    process.join(TIMEOUT_S)
    assert process.exitcode == -9
    assert main(["train", "--resume", str(run)]) == 0
    return run


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Trackers as on a machine where nobody set one up, and without a network."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "MLFLOW_TRACKING_URI", "TRACKIO_SPACE_ID"):
        monkeypatch.delenv(name, raising=False)
    import trackio.sqlite_storage
    import trackio.utils

    # It reads TRACKIO_DIR once, when it is imported.
    for module in (trackio, trackio.utils, trackio.sqlite_storage):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    real = socket.socket.connect

    def connect(self: socket.socket, address: Any) -> None:
        assert not isinstance(address, tuple) or address[0] in ("127.0.0.1", "localhost"), address
        real(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect)
    return tmp_path


def read_wandb(run: Path) -> Iterator[Any]:
    """The messages of the offline files, oldest first: blocks of 32 KiB as LevelDB logs have them."""
    from wandb.proto import wandb_internal_pb2

    for path in sorted(run.glob("wandb/offline-run-*/*.wandb"), key=lambda p: p.stat().st_mtime_ns):
        data, place, message = path.read_bytes(), 7, b""
        while place + 7 <= len(data):
            if 32768 - place % 32768 < 7:
                place += 32768 - place % 32768
                continue
            _, length, kind = struct.unpack("<IHB", data[place : place + 7])
            message += data[place + 7 : place + 7 + length]
            place += 7 + length
            if kind in (1, 4):  # whole, or the last part
                yield cast(Any, wandb_internal_pb2).Record.FromString(message)
                message = b""


def wandb_history(run: Path) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for record in read_wandb(run):
        if record.HasField("history"):
            row = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            for key, value in row.items():
                found.setdefault(key, []).append((row["_step"], value))
    return found


def trackio_history(project: str, run: Path) -> dict[str, list[tuple[int, float]]]:
    from trackio.sqlite_storage import SQLiteStorage

    name = f"{run.parent.name}/{run.name} {RunFolder(run).info().id}"
    found: dict[str, list[tuple[int, float]]] = {}
    for row in SQLiteStorage.get_logs(project, name):
        for key, value in row.items():
            found.setdefault(key, []).append((row["step"], value))
    return found


def mlflow_history(project: str, run: Path) -> dict[str, list[tuple[int, float]]]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient((run / "mlruns").as_uri())
    experiment = client.get_experiment_by_name(project)
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    assert found.data.params["generation.group_size"] == "2"
    return {
        key: [(m.step, m.value) for m in client.get_metric_history(found.info.run_id, key)]
        for key in found.data.metrics
    }


def test_trackers_are_told_what_the_logs_are(offline: Path) -> None:
    changes = {
        "run.trackers": ["wandb", "trackio", "mlflow"],
        "run.project": "a project",
        "run.num_steps": 5,
        "run.checkpoint_every": 3,
    }
    run = train(offline / "whole", changes)
    folder = RunFolder(run)
    wanted: dict[str, list[tuple[int, float]]] = {}
    for log, prefix in ((folder.metrics, ""), (folder.evaluations, "held_out/")):
        for record in log:
            for path, value in numbers(record, prefix):
                wanted.setdefault(path, []).append((record.step, value))
    for history in (
        wandb_history(run),
        trackio_history("a project", run),
        mlflow_history("a project", run),
    ):
        assert {path: history.get(path) for path in wanted} == wanted


def test_a_resumed_run_goes_on_in_its_trackers(offline: Path) -> None:
    changes = {
        "run.trackers": ["wandb", "mlflow"],
        "run.project": "p",
        "run.num_steps": 5,
        "run.checkpoint_every": 3,
    }
    run = kill_and_resume(offline, changes)
    rewards = {record.step: record.reward for record in RunFolder(run).metrics}
    assert list(rewards) == [1, 2, 3, 4, 5]
    # One run, as `mlflow_history` sees to; steps taken again are told again, the same.
    history = mlflow_history("p", run)
    assert sorted(history["reward"]) == sorted([*rewards.items(), (4, rewards[4]), (5, rewards[5])])
    assert {step for step, _ in history["held_out/reward"]} == {0, 2, 4, 5}
    # wandb's own process writes late: what it had not written went with the one that was killed.
    files = sorted(run.glob("wandb/offline-run-*"))
    assert len(files) == 2
    assert {path.name.rpartition("-")[2] for path in files} == {RunFolder(run).info().id}
    history = wandb_history(run)
    assert {(4, rewards[4]), (5, rewards[5])} <= set(history["reward"]) <= set(rewards.items())


class Failing:
    """A tracker whose server is gone after a step."""

    def __init__(self) -> None:
        self.told: list[int] = []

    def step(self, record: StepRecord, samples: list[SampleRecord]) -> None:
        self.told.append(record.step)
        if record.step == 2:
            raise ConnectionError("no route\nto host")

    def evaluation(self, record: EvaluationRecord) -> None:
        raise AssertionError("nothing more is told")

    def close(self, *, finished: bool) -> None:
        raise AssertionError("nothing more is told")


def test_a_failing_tracker_loses_no_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failing = Failing()
    with RunFolder(tmp_path / "run") as folder, Display("x", 3) as display:
        working = TensorBoard(folder.path / "tensorboard", 1)
        sinks = Sinks(folder, display, {"wandb": failing, "tensorboard": working})
        for step in (1, 2, 3):
            sinks.log(step_record(step), [])
            sinks.show(step_record(step), [])
        sinks.evaluation(evaluation_record(3))
        sinks.close(finished=True)
        assert [record.step for record in folder.metrics] == [1, 2, 3]
        assert [record.step for record in folder.evaluations] == [3]
    assert failing.told == [1, 2]
    assert [step for step, _ in read_events(tmp_path / "run/tensorboard")["reward"]] == [1, 2, 3]
    said = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert said == [
        f"[x] warning: wandb failed and gets no more of this run; all is in {tmp_path / 'run'}: "
        "no route to host"
    ]


def test_a_tracker_that_is_not_installed_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"'wandb', which is not installed; .* 'pgrpo\[wandb\]'"):
        require_trackers(["wandb"])


def test_a_tracker_that_cannot_be_started_is_told_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://x")
    config = load_config(write_config(tmp_path, {"run.trackers": ["mlflow"]}))
    with RunFolder(tmp_path / "run") as folder, Display("x", 3) as display:
        folder.create(config)
        folder.write_info(RunInfo(id="1"))
        with pytest.raises(
            ConfigError, match=r"run.trackers: mlflow cannot be started: .*nonsense"
        ):
            open_sinks(config, folder, display, 1)


def test_a_project_needs_a_tracker_that_has_them(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="project has no effect"):
        load_config(write_config(tmp_path, {"run.project": "x"}))


def test_half_a_surrogate_pair_is_no_reason_to_stop(tmp_path: Path) -> None:
    """JSON can smuggle one into a data set, and UTF-8 cannot hold it."""
    log = Log(tmp_path / "samples.jsonl", SampleRecord)
    log.append(SampleRecord(step=1, prompt="a\ud800b", completion="\udc00", user="\ud800"))
    (found,) = log
    assert (found.prompt, found.completion, found.user) == ("a?b", "?", "?")
