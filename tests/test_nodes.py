"""Nodes that hand each other what they folded: counted once, whoever is killed or sends twice."""

from __future__ import annotations

import itertools
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pgrpo import ClusterNormalizer
from pgrpo.errors import CheckpointError, ConfigError, DataError
from pgrpo.normalizer import nodes as nodes_module
from pgrpo.normalizer.nodes import Delta, NodeHistories
from pgrpo.normalizer.state import write_file

pytestmark = pytest.mark.skipif(os.name != "posix", reason="there are no shared tables")

TIMEOUT_S = 120
NODES = "east", "west", "north-1"
STEPS, WORKERS, CALLS, SIZE, KILLS = 24, 2, 12, 64, 20
CLUSTERS = 900


def open_node(folder: Path, node: str, **options: Any) -> NodeHistories:
    settings: dict[str, Any] = {"capacity": 4096, **options}
    return NodeHistories(folder / node, node, **settings)


def batch(node: str, step: int, worker: int, call: int) -> tuple[Any, Any]:
    """Rewards far from 0, and clusters of which few are common and many rare."""
    rng = np.random.default_rng([NODES.index(node), step, worker, call])
    clusters = (CLUSTERS * rng.random(SIZE) ** 3).astype(np.int64)
    return 50 + clusters % 7 + rng.normal(size=SIZE), clusters


def batches(node: str, step: int) -> list[tuple[Any, Any]]:
    return [batch(node, step, worker, call) for worker in range(WORKERS) for call in range(CALLS)]


def fold(node: NodeHistories, step: int) -> None:
    for rewards, clusters in batches(node.node, step):
        node.update(step, rewards, clusters)


def assert_holds(histories: ClusterNormalizer, folded: list[tuple[Any, Any]]) -> None:
    """That histories are those of these batches, each once, by a look at all samples."""
    rewards, clusters = (np.concatenate(part) for part in zip(*folded, strict=True))
    state = histories.state_dict()
    found = {
        cluster: (count, origin + offset, m2)
        for cluster, count, origin, offset, m2 in zip(
            *(state[key] for key in ("clusters", "count", "origin", "offset", "m2")), strict=True
        )
        if count
    }
    assert found.keys() == set(clusters.tolist())
    for cluster, (count, mean, m2) in found.items():
        own = rewards[clusters == cluster]
        assert count == len(own)
        assert mean == pytest.approx(own.mean(), rel=1e-12)
        assert m2 == pytest.approx(((own - own.mean()) ** 2).sum(), rel=1e-12, abs=1e-12)


def everything(steps: int = STEPS) -> list[tuple[Any, Any]]:
    return [one for node in NODES for step in range(steps) for one in batches(node, step)]


def test_deltas_count_once_in_any_order(tmp_path: Path) -> None:
    nodes = {name: open_node(tmp_path, name) for name in NODES}
    sealed: list[Delta] = []
    for step in range(3):
        for node in nodes.values():
            fold(node, step)
            sealed.append(node.seal(step))
            assert node.seal(step) == sealed[-1]
    for number, node in enumerate(nodes.values()):
        mail = 2 * sealed
        random.Random(number).shuffle(mail)
        new = [node.merge(pickle.loads(pickle.dumps(delta))) for delta in mail]
        # Its own are none that it lacks.
        assert sum(new) == 3 * (len(NODES) - 1)
        assert_holds(node.histories, everything(3))
        assert sorted(node.deltas(), key=repr) == sorted(sealed, key=repr)


def test_deltas_that_come_together_count_once(tmp_path: Path) -> None:
    nodes = {name: open_node(tmp_path, name) for name in NODES}
    sealed: list[Delta] = []
    for step in range(3):
        for node in nodes.values():
            fold(node, step)
            sealed.append(node.seal(step))
    for node in nodes.values():
        others = [delta for delta in sealed if delta.node != node.node]
        assert node.merge(others[1])
        assert node.merge_all(2 * sealed) == len(others) - 1
        assert node.merge_all(sealed) == 0
        assert_holds(node.histories, everything(3))
        # The files that were written with it make the same histories.
        node.rewind()
        assert_holds(open_node(tmp_path, node.node).histories, everything(3))


RUNNER = """
    import os, pickle, random, sys, time
    from pathlib import Path

    sys.path.insert(0, sys.argv[1])
    from test_nodes import CALLS, NODES, STEPS, WORKERS, batch, open_node

    folder, name, seed = Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    rng = random.Random(seed)
    mail = folder / "mail"
    node = open_node(folder, name)
    node.rewind()
    print("begun", flush=True)
    sealed = sum(delta.node == name for delta in node.deltas())
    # As from a checkpoint: some of the steps that were sealed are done again.
    for step in range(max(sealed - 2, 0), STEPS):
        workers = []
        for worker in range(WORKERS):
            pid = os.fork()
            if pid == 0:
                own = open_node(folder, name)
                for call in range(CALLS):
                    own.advantages(step, *batch(name, step, worker, call))
                    time.sleep(rng.uniform(0, 0.002))
                os._exit(0)
            workers.append(pid)
        assert [os.waitpid(pid, 0)[1] for pid in workers] == [0] * WORKERS
        delta = node.seal(step)
        message = mail / f"{step}-{name}"
        message.with_suffix(f".{os.getpid()}").write_bytes(pickle.dumps(delta))
        message.with_suffix(f".{os.getpid()}").rename(message)
        # The next step waits for the others, as it does with `exchange`.
        while sum(delta.step == step for delta in node.deltas()) < len(NODES):
            received = [path for path in mail.iterdir() if path.name.startswith(f"{step}-")]
            received = 2 * [path for path in received if not path.suffix]
            rng.shuffle(received)
            for path in received:
                node.merge(pickle.loads(path.read_bytes()))
            time.sleep(0.005)
"""


def start(name: str, folder: Path, seed: int) -> subprocess.Popen[str]:
    """A node with its workers, as a group of processes, once it has begun."""
    arguments = [str(Path(__file__).parent), str(folder), name, str(seed)]
    command = [sys.executable, "-c", textwrap.dedent(RUNNER), *arguments]
    node = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert node.stdout is not None
    assert node.stdout.readline() == "begun\n"
    return node


def test_nodes_that_are_killed_and_started_again_count_each_step_once(tmp_path: Path) -> None:
    (tmp_path / "mail").mkdir()
    rng = random.Random(1)
    nodes = {name: start(name, tmp_path, 0) for name in NODES}
    try:
        kills = 0
        for seed in itertools.count(1):
            if kills == KILLS:
                break
            time.sleep(rng.uniform(0, 0.15))
            running = [name for name in NODES if nodes[name].poll() is None]
            # Once all have ended well, one does its last steps again.
            name = rng.choice(running or NODES)
            if nodes[name].poll() is None:
                os.killpg(nodes[name].pid, signal.SIGKILL)
                kills += 1
            nodes[name].communicate(timeout=TIMEOUT_S)
            nodes[name] = start(name, tmp_path, seed)
        for node in nodes.values():
            node.communicate(timeout=TIMEOUT_S)
            assert node.returncode == 0
    finally:
        for node in nodes.values():
            node.kill()
            node.communicate()
    for name in NODES:
        assert_holds(open_node(tmp_path, name).histories, everything())


# A merge of many clusters is killed in its middle, again and again, by its parent.
MERGES = """
    import os, pickle, random, signal, sys, time
    from pathlib import Path
    from pgrpo.normalizer.nodes import NodeHistories

    folder, deltas = sys.argv[1], pickle.loads(Path(sys.argv[2]).read_bytes())
    rng = random.Random(0)
    amid = 0
    for number in range(24):
        child = os.fork()
        if child == 0:
            node = NodeHistories(folder, "a", capacity=65536)
            Path(folder, "begun").touch()
            for delta in deltas:
                node.merge(delta)
            os._exit(0)
        while not Path(folder, "begun").exists():
            time.sleep(0)
        time.sleep(rng.uniform(0, 0.08))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        Path(folder, "begun").unlink()
        amid += Path(folder, "merging").exists()
        node = NodeHistories(folder, "a", capacity=65536)
        counts = {stats.count for stats in node.histories.snapshot().values()}
        # Whole deltas, each once: every cluster has as many.
        assert counts <= {2 * len(list(node.deltas()))}, (counts, len(list(node.deltas())))
    for delta in deltas:
        node.merge(delta)
    assert {stats.count for stats in node.histories.snapshot().values()} == {2 * len(deltas)}
    print(amid)
"""


def test_a_merge_that_is_killed_has_happened_or_not(tmp_path: Path) -> None:
    clusters = np.arange(60_000).repeat(2)
    deltas: list[Delta] = []
    for step in range(6):
        one = ClusterNormalizer()
        one.update(np.tile([4.0, 6.0], 60_000), clusters)
        one.save(tmp_path / "one")
        deltas.append(Delta(step, "b", (tmp_path / "one").read_bytes()))
    (tmp_path / "deltas").write_bytes(pickle.dumps(deltas))
    command = [sys.executable, "-c", textwrap.dedent(MERGES), str(tmp_path / "a")]
    done = subprocess.run(
        [*command, str(tmp_path / "deltas")], capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 0, done.stderr
    # Some were killed within a merge, or this shows nothing.
    assert int(done.stdout) >= 1


class Killed(BaseException):
    """No handler of errors sees it, as none sees a SIGKILL."""


def raises(error: BaseException) -> Any:
    def fail(*_: object) -> None:
        raise error

    return fail


def test_a_merge_that_found_no_space_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    east, west = open_node(tmp_path, "east"), open_node(tmp_path, "west")
    deltas: list[Delta] = []
    for step in range(2):
        fold(west, step)
        deltas.append(west.seal(step))
    full = CheckpointError("cannot write: no space left on device")
    for step, delta in enumerate(deltas):
        fold(east, step)
        with monkeypatch.context() as patch:
            patch.setattr(nodes_module, "write_file", raises(full))
            with pytest.raises(CheckpointError, match="no space left"):
                east.merge(delta)
        if step == 0:
            # It is made good by the first call that can, be it this one or the merge.
            east.seal(step)
            assert_holds(east.histories, batches("east", 0))
        assert [east.merge(delta), east.merge(delta)] == [True, False]
        folded = [one for at in range(step + 1) for n in NODES[:2] for one in batches(n, at)]
        assert_holds(east.histories, folded)


def test_a_merge_that_is_killed_is_made_again_by_a_process_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    west = open_node(tmp_path, "west")
    deltas: list[Delta] = []
    for step in range(2):
        fold(west, step)
        deltas.append(west.seal(step))
    killed, other, third = (open_node(tmp_path, "east") for _ in range(3))
    with monkeypatch.context() as patch:
        patch.setattr(nodes_module, "write_file", raises(Killed()))
        with pytest.raises(Killed):
            killed.merge(deltas[0])
    assert [other.merge(deltas[0]), other.merge(deltas[0])] == [True, False]
    assert_holds(other.histories, batches("west", 0))
    # Who has the old table mapped is told so, and leaves the new one to those who have that.
    with pytest.raises(DataError, match="became shorter"):
        third.merge(deltas[1])
    third = open_node(tmp_path, "east")
    assert other.merge(deltas[1])
    assert_holds(third.histories, [*batches("west", 0), *batches("west", 1)])


def test_a_late_call_beside_a_merge_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    west = open_node(tmp_path, "west")
    fold(west, 0)
    late, node = open_node(tmp_path, "east"), open_node(tmp_path, "east")
    fold(late, 0)
    node.seal(0)
    refused: list[DataError] = []

    def call() -> None:
        try:
            late.update(0, [1.0], [5000])
        except DataError as error:
            refused.append(error)

    thread = threading.Thread(target=call)

    def write_beside_it(path: Path, content: bytes) -> None:
        thread.start()
        # It ends when the merge has.
        thread.join(0.5)
        write_file(path, content)

    monkeypatch.setattr(nodes_module, "write_file", write_beside_it)
    assert node.merge(west.seal(0))
    thread.join()
    assert len(refused) == 1
    histories = open_node(tmp_path, "east").histories
    assert_holds(histories, [*batches("east", 0), *batches("west", 0)])


def test_a_sealed_step_is_done_again_without_being_folded(tmp_path: Path) -> None:
    node = open_node(tmp_path, "east")
    expected = ClusterNormalizer()
    for rewards, clusters in batches("east", 0):
        advantages = node.advantages(0, rewards, clusters)
        np.testing.assert_array_equal(advantages, expected.advantages(rewards, clusters))
    delta = node.seal(0)
    node.rewind()
    again = open_node(tmp_path, "east")
    rewards, clusters = batch("east", 0, 0, 0)
    found = again.advantages(0, rewards, clusters)
    np.testing.assert_array_equal(found, expected.normalize(rewards, clusters))
    again.update(0, rewards, clusters)
    assert again.seal(0) == delta
    assert_holds(again.histories, batches("east", 0))


def test_a_late_call_of_a_sealed_step_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    late, other, node = (open_node(tmp_path, "east") for _ in range(3))
    fold(late, 0)
    node.seal(0)
    with pytest.raises(DataError, match="became shorter"):
        late.update(0, [1.0], [5000])
    # Nor is it taken for one of a step that is done again, whichever process makes it.
    for process in (other, node, open_node(tmp_path, "east")):
        with pytest.raises(
            DataError, match="step 0 of 'east' was sealed; expected its calls before"
        ):
            process.update(0, [1.0], [5000])
    node.seal(0)
    with pytest.raises(DataError, match="step 0 of 'east' was sealed"):
        node.advantages(0, [1.0], [5000])
    assert_holds(open_node(tmp_path, "east").histories, batches("east", 0))


def test_rewinding_drops_what_is_not_sealed(tmp_path: Path) -> None:
    node, other = open_node(tmp_path, "east"), open_node(tmp_path, "east")
    for step in range(3):
        fold(node, step)
        node.seal(step)
    fold(node, 3)
    node.rewind()
    assert_holds(node.histories, [one for step in range(3) for one in batches("east", step)])
    with pytest.raises(DataError, match="became shorter"):
        other.update(4, [1.0], [1])
    node.rewind(0)
    assert_holds(node.histories, batches("east", 0))
    fold(node, 1)
    assert_holds(node.histories, [*batches("east", 0), *batches("east", 1)])


def test_an_unsealed_step_outlives_its_processes(tmp_path: Path) -> None:
    fold(open_node(tmp_path, "east"), 0)
    node = open_node(tmp_path, "east")
    # As after a merge that was killed, all histories are made again, this step included.
    (tmp_path / "east" / "merging").touch()
    node = open_node(tmp_path, "east")
    assert_holds(node.histories, batches("east", 0))
    other = open_node(tmp_path, "west")
    assert other.merge(node.seal(0))
    assert_holds(other.histories, batches("east", 0))


def test_a_seal_that_is_killed_has_happened_once_its_delta_is_there(tmp_path: Path) -> None:
    node = open_node(tmp_path, "east")
    fold(node, 0)
    step, kept = tmp_path / "east" / "steps" / "0", tmp_path / "kept"
    shutil.copy(step, kept)
    delta = node.seal(0)
    # Killed before it could delete the table of the step.
    shutil.copy(kept, step)
    (tmp_path / "east" / "merging").touch()
    node = open_node(tmp_path, "east")
    assert_holds(node.histories, batches("east", 0))
    assert node.seal(0) == delta


def test_compacted_deltas_stay_counted(tmp_path: Path) -> None:
    east, west = open_node(tmp_path, "east"), open_node(tmp_path, "west")
    for step in range(4):
        fold(west, step)
        assert east.merge(west.seal(step))
    early = list(west.deltas())
    for _ in range(2):
        east.compact(2)
    assert [delta.step for delta in east.deltas()] == [3]
    assert not any(east.merge(delta) for delta in early)
    with pytest.raises(CheckpointError, match="step 1 cannot be gone back to; steps up to 2 were"):
        east.rewind(1)
    with pytest.raises(CheckpointError, match="step 2 of 'east' was compacted"):
        east.seal(2)
    # What a killed compaction leaves is swept away when histories are made again.
    shutil.copy(tmp_path / "west" / "deltas" / "1-west", tmp_path / "east" / "deltas")
    east.rewind()
    assert [delta.step for delta in east.deltas()] == [3]
    assert_holds(east.histories, [one for step in range(4) for one in batches("west", step)])


def test_a_damaged_delta_is_refused_and_may_come_again(tmp_path: Path) -> None:
    east, west = open_node(tmp_path, "east"), open_node(tmp_path, "west")
    fold(west, 0)
    delta = west.seal(0)
    damaged = Delta(0, "west", delta.histories[:-9] + b"!" + delta.histories[-8:])
    with pytest.raises(CheckpointError):
        east.merge(damaged)
    assert east.histories.snapshot() == {}
    assert east.merge(delta)
    assert_holds(open_node(tmp_path, "east").histories, batches("west", 0))


def test_a_damaged_delta_keeps_those_away_that_come_with_it(tmp_path: Path) -> None:
    east, west = open_node(tmp_path, "east"), open_node(tmp_path, "west")
    deltas: list[Delta] = []
    for step in range(2):
        fold(west, step)
        deltas.append(west.seal(step))
    damaged = Delta(1, "west", deltas[1].histories[:-9] + b"!" + deltas[1].histories[-8:])
    with pytest.raises(CheckpointError):
        east.merge_all([deltas[0], damaged])
    assert list(east.deltas()) == []
    assert east.histories.snapshot() == {}
    assert east.merge_all(deltas) == 2


def test_what_is_written_of_several_before_the_disk_is_full_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    east, west = open_node(tmp_path, "east"), open_node(tmp_path, "west")
    deltas: list[Delta] = []
    for step in range(3):
        fold(west, step)
        deltas.append(west.seal(step))
    written: list[Path] = []

    def write_two(path: Path, data: bytes) -> None:
        if len(written) == 2:
            raise CheckpointError("no room")
        written.append(path)
        write_file(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(nodes_module, "write_file", write_two)
        with pytest.raises(CheckpointError, match="no room"):
            east.merge_all(deltas)
    again = open_node(tmp_path, "east")
    assert_holds(again.histories, [one for step in range(2) for one in batches("west", step)])
    assert again.merge_all(deltas) == 1
    assert_holds(again.histories, [one for step in range(3) for one in batches("west", step)])


def test_a_node_that_lost_its_folder_begins_with_the_deltas_of_another(tmp_path: Path) -> None:
    east, west = open_node(tmp_path, "east"), open_node(tmp_path, "west")
    fold(east, 0)
    west.merge(east.seal(0))
    shutil.rmtree(tmp_path / "east")
    east = open_node(tmp_path, "east")
    assert [east.merge(delta) for delta in west.deltas()] == [True]
    fold(east, 0)
    assert_holds(east.histories, batches("east", 0))
    # Not while it is doing that step itself, which would count twice.
    fold(east, 1)
    with pytest.raises(DataError, match="step 1 of this node 'east' comes from elsewhere"):
        east.merge(Delta(1, "east", b""))


def test_sums_of_groups_go_along(tmp_path: Path) -> None:
    one = ClusterNormalizer("shrinkage")
    nodes = [open_node(tmp_path, name, estimator="shrinkage") for name in NODES[:2]]
    for node in nodes:
        rewards, clusters = batch(node.node, 0, 0, 0)
        one.update(rewards, clusters, np.arange(SIZE) // 8)
        node.update(0, rewards, clusters, np.arange(SIZE) // 8)
    deltas = [node.seal(0) for node in nodes]
    assert nodes[0].merge(deltas[1])
    found, expected = nodes[0].histories.state_dict(), one.state_dict()
    order = [found["clusters"].index(cluster) for cluster in expected["clusters"]]
    for key in ("num_parts", "squared_sizes", "within_squares"):
        assert [found[key][at] for at in order] == pytest.approx(expected[key], rel=1e-12)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"estimator": "rae"}, "estimator is 'rae': its exponential mean .*; expected another"),
        ({"estimator": "auto"}, "estimator is 'auto': its regression .*; expected another"),
        ({"forgetting": 0.5}, "forgetting"),
        ({"node": "a/b"}, "node is 'a/b'; expected letters"),
    ],
)
def test_what_deltas_cannot_hold_is_refused(
    tmp_path: Path, options: dict[str, Any], complaint: str
) -> None:
    settings: dict[str, Any] = {"node": "a", **options}
    with pytest.raises(ConfigError, match=complaint):
        NodeHistories(tmp_path / "folder", **settings)
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("step", [-1, True])
def test_steps_are_whole_numbers_from_0_on(tmp_path: Path, step: int) -> None:
    node = open_node(tmp_path, "east")
    for call in (
        lambda: node.update(step, [1.0], [1]),
        lambda: node.seal(step),
        lambda: node.merge(Delta(step, "west", b"")),
    ):
        with pytest.raises(DataError, match=f"delta is of step {step}"):
            call()
