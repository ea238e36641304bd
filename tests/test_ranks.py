"""A run of several processes: the same as of one, and no process waits for ever.

The processes are started here as torchrun does it, from one that has everything imported; one test has
torchrun itself.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import install_plugin, processes, trace, train, write_config
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pgrpo.cli import main
from pgrpo.errors import EngineError, ParallelError
from pgrpo.runs.folder import RunFolder
from pgrpo.train.checkpoint import latest_checkpoint, list_checkpoints
from pgrpo.train.parallel import Sharded, _Outcome

TIMEOUT_S = 120

# Five groups a step and eleven held-out prompts are shared unevenly, and of four processes some get none
# of two groups.
# Adam's first steps are of full length, along gradients that are nothing but rounding too: at a learning
# rate of 5e-3 the fourth gradient's norm is off by 1.6e-5 on some processors, at this one by 2e-7.
UNEVEN = {
    "run.prompts_per_step": 5,
    "run.eval_prompts": 11,
    "run.num_steps": 4,
    "optimizer.learning_rate": 1e-3,
}


def _rank_in_child(
    arguments: Sequence[str], rank: int, size: int, port: int, said: Path, limit: int | None
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    with (
        open(said / f"{rank}.txt", "w", encoding="utf-8", buffering=1) as file,
        redirect_stdout(file),
        redirect_stderr(file),
    ):
        code = main(arguments)
    sys.exit(code)


def start_ranks(size: int, said: Path, *arguments: object, limit: int | None = None) -> list[Any]:
    """`pgrpo ARGUMENTS` on so many processes; what each says goes to SAID/RANK.txt. Files may have
    `limit` bytes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said.mkdir(parents=True, exist_ok=True)
    command = [str(argument) for argument in arguments]
    started = [
        processes.Process(target=_rank_in_child, args=(command, rank, size, port, said, limit))
        for rank in range(size)
    ]
    for process in started:
        process.start()
    return started


def ended(started: Sequence[Any]) -> list[int]:
    """The exit codes, once all have ended; a process that waits for ever is an error."""
    until = time.monotonic() + TIMEOUT_S
    for process in started:
        process.join(max(0.0, until - time.monotonic()))
    alive = [rank for rank, process in enumerate(started) if process.is_alive()]
    for rank in alive:
        started[rank].kill()
    assert not alive, f"ranks {alive} still wait"
    return [process.exitcode for process in started]


def train_on(size: int, folder: Path, changes: dict[str, Any]) -> Path:
    """A whole tiny run of several processes; returns its folder."""
    config, run = write_config(folder, changes), folder / "run"
    codes = ended(start_ranks(size, folder / "said", "train", config, "--out", run))
    assert codes == [0] * size, (folder / "said" / "0.txt").read_text()
    return run


def weights(run: Path) -> dict[str, torch.Tensor]:
    checkpoint = latest_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    return {
        name: tensor
        for path in checkpoint.model.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def assert_close(found: Any, expected: Any, place: str) -> None:
    """Equal, floating-point numbers to rounding."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), place
        for key, value in expected.items():
            assert_close(found[key], value, f"{place}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), place
        for number, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
            assert_close(mine, theirs, f"{place}[{number}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-6), place
    else:
        assert found == expected, place


def assert_same(run: Path, expected: Path) -> None:
    """Rewards and histories to the last bit; what is computed of weights to rounding."""
    found, wanted = trace(run), trace(expected)
    assert [m["reward"] for m in found["metrics"]] == [m["reward"] for m in wanted["metrics"]]
    kept = (
        "normalizer",
        "histories",
        "clusterer",
        "assignment",
        "people",
        "policy_version",
        "step",
    )
    for key in kept:
        assert found["state"][key] == wanted["state"][key], key
    for log in ("metrics", "samples", "evaluations"):
        assert_close(found[log], wanted[log], log)
    mine, theirs = weights(run), weights(expected)
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        # Adam makes steps of full length of gradients that are nothing but rounding.
        assert torch.dist(mine[name], tensor) <= 1e-4 * tensor.norm(), name


VARIANTS: dict[str, tuple[int, dict[str, Any]]] = {
    "two": (2, {}),
    "more than groups": (4, {"run.prompts_per_step": 2}),
    "a KL penalty, minibatches, epochs": (
        3,
        {"loss.kl_coef": 0.1, "optimizer.minibatches": 2, "optimizer.epochs": 2},
    ),
    "pairs": (
        2,
        {"loss.objective": "dpo", "generation.group_size": 4, "optimizer.minibatches": 2},
    ),
    "adapters, sampled evaluations": (2, {"model.lora": {"rank": 2}, "run.eval_samples": 3}),
    "replaced groups": (2, {"run.resample": 2, "estimator": {"name": "grpo"}}),
    "copies": (4, {"parallel.replicate": 2}),
    "passes of one rollout": (2, {"optimizer.token_budget": 5}),
    "nothing to evaluate for some": (3, {"run.eval_prompts": 1}),
    "users divided again": (
        2,
        {"clustering": {"name": "kmeans", "num_clusters": 3, "recluster_every": 1}},
    ),
    "prompts by shares of clusters": (2, {"clustering.prompt_shares": {"0": 0.7}}),
    "gradient checkpointing": (2, {"model.gradient_checkpointing": True}),
}


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_any_number_of_processes_makes_the_same_run(tmp_path: Path, variant: str) -> None:
    size, changes = VARIANTS[variant]
    changes = {**UNEVEN, **changes}
    run = train_on(size, tmp_path / "several", changes)
    assert_same(run, train(tmp_path / "one", changes))
    said = [(tmp_path / "several" / "said" / f"{rank}.txt").read_text() for rank in range(size)]
    assert "done: 4 steps" in said[0], "one process tells"
    assert said[1:] == [""] * (size - 1), "and the others do not"


@pytest.mark.parametrize("recluster_every", [0, 2])
def test_what_some_processes_saved_others_go_on_with(tmp_path: Path, recluster_every: int) -> None:
    clustering = {"name": "kmeans", "num_clusters": 3, "recluster_every": recluster_every}
    changes = {**UNEVEN, "run.checkpoint_every": 1, "run.num_steps": 2, "clustering": clustering}
    run = train_on(2, tmp_path, changes)
    more = ("train", "--resume", run, "--set")
    assert main([*map(str, more), "run.num_steps=4"]) == 0
    assert ended(start_ranks(3, tmp_path / "more", *more, "run.num_steps=6")) == [0] * 3
    assert_same(run, train(tmp_path / "one", {**changes, "run.num_steps": 6}))
    # What three processes hold parts of is one model for whoever loads it.
    assert main(["export", str(run), "--out", str(tmp_path / "model")]) == 0
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    for name, tensor in weights(run).items():
        assert torch.equal(exported[name], tensor), name


def said_by(folder: Path, size: int) -> list[str]:
    return [(folder / "said" / f"{rank}.txt").read_text() for rank in range(size)]


FAULTY = """
import os
from pgrpo.plugins import hookimpl

def faulty(rollouts):
    if rollouts[0].policy_version == 1 and os.environ.get("RANK") == "FAULTY_RANK":
        raise RuntimeError("out of paper")
    return silent(rollouts)

def silent(rollouts):
    return [None if r.group_id == 3 else float(len(r.completion)) for r in rollouts]

@hookimpl
def pgrpo_register_rewards(register):
    register("faulty", faulty)
    register("silent", silent)
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_what_fails_on_one_fails_on_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    install_plugin(tmp_path / "site", FAULTY.replace("FAULTY_RANK", str(rank)))
    changes = {**UNEVEN, "rewards": [{"name": "faulty"}], "evaluation": [{"name": "persona"}]}
    changes["run.checkpoint_every"] = 4
    config, run = write_config(tmp_path, changes), tmp_path / "run"
    assert ended(start_ranks(2, tmp_path / "said", "train", config, "--out", run)) == [2, 2]
    told, silent = said_by(tmp_path, 2)
    last = told.strip().splitlines()[-1]
    assert last.startswith("pgrpo: rank 1: " if rank else "pgrpo: "), told
    assert "out of paper" in last
    assert silent == ""
    info = RunFolder(run).info()
    assert info.status == "failed"
    assert "out of paper" in info.error
    assert "in faulty" in (run / "log.txt").read_text(), "where it was raised, on whichever process"
    saved = latest_checkpoint(run / "checkpoints")
    assert saved is not None
    assert saved.step == 1, "what all met in order costs no step"
    # Nobody has the faulty process's number here.
    assert main(["train", "--resume", str(run)]) == 0
    expected = {**changes, "rewards": [{"name": "silent"}]}
    assert_same(run, train(tmp_path / "one", expected))


def test_an_evaluation_that_fails_on_one_fails_on_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first of several calls of the engine, which the other process would go on with."""
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    install_plugin(tmp_path / "site", FAULTY.replace("FAULTY_RANK", "1"))
    changes = {**UNEVEN, "optimizer.token_budget": 15, "evaluation": [{"name": "faulty"}]}
    changes |= {"run.eval_every": 1, "run.checkpoint_every": 4}
    config, run = write_config(tmp_path, changes), tmp_path / "run"
    assert ended(start_ranks(2, tmp_path / "said", "train", config, "--out", run)) == [2, 2]
    told, silent = said_by(tmp_path, 2)
    assert "out of paper" in told.strip().splitlines()[-1]
    assert silent == ""
    assert [saved.step for saved in list_checkpoints(run / "checkpoints")] == [1]


def test_a_disk_that_refuses_one_ends_all(tmp_path: Path) -> None:
    changes = {**UNEVEN, "run.checkpoint_every": 2}
    config, run = write_config(tmp_path, changes), tmp_path / "run"
    started = start_ranks(2, tmp_path / "said", "train", config, "--out", run, limit=150_000)
    assert ended(started) == [2, 2]
    told, silent = said_by(tmp_path, 2)
    assert "cannot be written" in told.strip().splitlines()[-1]
    assert silent == ""


def test_a_sentence_is_told_before_what_another_process_lost() -> None:
    ranks = Sharded.__new__(Sharded)
    ranks._rank, ranks.leads, ranks._agreed = 0, True, []
    mine = _Outcome(None, RuntimeError("timed out"))
    theirs = _Outcome(None, EngineError("no server answers"))
    with pytest.raises(EngineError, match=r"^rank 1: no server answers$") as caught:
        ranks._raise_together(mine, [mine.told(), theirs.told()])
    assert ranks.agrees(caught.value)
    with pytest.raises(RuntimeError, match=r"^timed out$"):
        ranks._raise_together(mine, [mine.told(), _Outcome(None, ParallelError("")).told()])


def test_groups_of_one_process_without_reward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    install_plugin(tmp_path / "site", FAULTY)
    changes = {**UNEVEN, "rewards": [{"name": "silent"}], "evaluation": [{"name": "persona"}]}
    run = train_on(4, tmp_path / "several", changes)
    assert_same(run, train(tmp_path / "one", changes))


TORN = """
import os
from pgrpo.plugins import hookimpl

class Torn:
    def fit(self, users, features, examples): self.rank = int(os.environ.get("RANK", "0"))
    def assign(self, users, features): return [(i + self.rank) % 3 for i in range(len(users))]
    def state_dict(self): return {"rank": self.rank}
    def load_state_dict(self, state): self.rank = state["rank"]

@hookimpl
def pgrpo_register_clusterers(register):
    register("torn", Torn)
"""


@pytest.mark.parametrize("recluster_every", [0, 1])
def test_all_processes_have_the_clusters_that_one_has_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recluster_every: int
) -> None:
    """Each would find others here, as a library may on another machine."""
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    install_plugin(tmp_path / "site", TORN)
    changes = {**UNEVEN, "clustering": {"name": "torn", "recluster_every": recluster_every}}
    run = train_on(2, tmp_path / "several", changes)
    assert_same(run, train(tmp_path / "one", changes))


def test_a_signal_to_one_ends_all_between_two_steps(tmp_path: Path) -> None:
    changes = {**UNEVEN, "run.num_steps": 2000, "run.checkpoint_every": 2000, "run.eval_every": 0}
    run = tmp_path / "run"
    started = start_ranks(
        2, tmp_path / "said", "train", write_config(tmp_path, changes), "--out", run
    )
    while not (run / "metrics.jsonl").exists():
        time.sleep(0.05)
    os.kill(started[1].pid, signal.SIGTERM)
    codes = ended(started)
    assert codes[1] == 143
    assert codes[0] == 130, "it heard of it from the other"
    steps = len((run / "metrics.jsonl").read_text().splitlines())
    told, silent = said_by(tmp_path, 2)
    assert told.endswith(
        f"pgrpo: interrupted; step {steps} is saved, and pgrpo train --resume {run} goes on from there\n"
    )
    assert silent == ""
    found = latest_checkpoint(run / "checkpoints")
    assert found is not None
    assert found.step == steps


@pytest.mark.parametrize("rank", [0, 1])
def test_the_others_of_a_process_that_is_killed_do_not_wait(tmp_path: Path, rank: int) -> None:
    changes = {**UNEVEN, "run.num_steps": 2000, "run.checkpoint_every": 1, "run.eval_every": 0}
    run = tmp_path / "run"
    started = start_ranks(
        2, tmp_path / "said", "train", write_config(tmp_path, changes), "--out", run
    )
    while not list_checkpoints(run / "checkpoints"):
        time.sleep(0.05)
    started[rank].kill()
    codes = ended(started)
    assert codes[rank] == -9
    assert codes[1 - rank] == 2
    assert "another process of the run is lost" in said_by(tmp_path, 2)[1 - rank]


@pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")
def test_torchrun_starts_again_what_was_killed(tmp_path: Path) -> None:
    """By SIGKILL in the third step or soon after: the processes are started again, and go on from the
    last step that was saved."""
    changes = {**UNEVEN, "run.num_steps": 30, "run.checkpoint_every": 1, "run.eval_every": 15}
    config, run = write_config(tmp_path, changes), tmp_path / "run"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
        *("--max-restarts", "1", "--monitor-interval", "0.1"),
        *("-m", "pgrpo", "train", config, "--out", run),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as agent:
        try:
            while not any(saved.step >= 2 for saved in list_checkpoints(run / "checkpoints")):
                assert agent.poll() is None, "it ended too soon"
                time.sleep(0.01)
            children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
            os.kill(int(children[-1]), signal.SIGKILL)
            assert agent.wait(TIMEOUT_S) == 0
        finally:
            agent.kill()
    assert trace(run) == trace(train_on(2, tmp_path / "unbroken", changes)), "to the last bit"


@pytest.mark.parametrize(
    ("changes", "out", "sentence"),
    [
        ({"parallel.replicate": 3}, True, "parallel.replicate is 3, and there are 2 processes"),
        (
            {"generation": {"engine": "vllm", "vllm": {"tensor_parallel_size": 2}}},
            True,
            "generation.vllm.tensor_parallel_size is 2, and each of 2 processes",
        ),
        ({}, False, "train on several processes needs --out"),
        pytest.param(
            {"parallel.offload": True},
            True,
            "to the memory of the processors; there is no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_what_several_processes_cannot_do(
    tmp_path: Path, changes: dict[str, Any], out: bool, sentence: str
) -> None:
    where = ("--out", tmp_path / "run") if out else ()
    config = write_config(tmp_path, changes)
    assert ended(start_ranks(2, tmp_path / "said", "train", config, *where)) == [2, 2]
    assert sentence in said_by(tmp_path, 2)[0]
    assert not (tmp_path / "run").exists()


def test_one_process_has_nothing_to_offload(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, {"parallel.offload": True})
    assert main(["train", str(config), "--out", str(tmp_path / "run")]) == 2
    assert "parallel.offload moves the parts of a model" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
