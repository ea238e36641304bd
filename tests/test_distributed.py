"""Histories of several processes made one, over torch.distributed with gloo."""

from __future__ import annotations

import multiprocessing
import pickle
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from pgrpo import CheckpointError, ClusterNormalizer, ConfigError
from pgrpo.normalizer.collectives import all_reduce, exchange
from pgrpo.normalizer.nodes import NodeHistories

Stats = dict[Any, tuple[float, float, float]]


def run(work: Callable[[int, int], Any], size: int, folder: Path) -> list[Any]:
    """What `work(rank, size)` returns in each of so many processes."""
    context = multiprocessing.get_context(None if sys.platform == "win32" else "forkserver")
    arguments = [(work, rank, size, str(folder)) for rank in range(size)]
    ranks = [context.Process(target=_rank, args=one) for one in arguments]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
    assert [rank.exitcode for rank in ranks] == [0] * size
    return [pickle.loads((folder / str(rank)).read_bytes()) for rank in range(size)]


def _rank(work: Callable[[int, int], Any], rank: int, size: int, folder: str) -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    store = Path(folder)
    dist.init_process_group("gloo", init_method=f"file://{store}/store", rank=rank, world_size=size)
    found = work(rank, size)
    (store / str(rank)).write_bytes(pickle.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def shard(rank: int, step: int) -> tuple[Any, Any, Any]:
    """Rewards, clusters and groups: far from 0, and of clusters that not every rank meets."""
    rng = np.random.default_rng([rank, step])
    size = 5 + 7 * rank
    names: list[Any] = ["ä", "common", 3, -1, f"only {rank}", 2**40 + rank]
    rewards = 1e3 + rng.normal(size=size)
    return rewards, [names[i] for i in rng.integers(0, 6, size)], rng.integers(0, 4, size)


def stats(normalizer: ClusterNormalizer) -> Stats:
    state = normalizer.state_dict()
    columns = (state[key] for key in ("count", "origin", "offset", "m2"))
    rows = zip(state["clusters"], *columns, strict=True)
    return {cluster: (n, origin + offset, m2) for cluster, n, origin, offset, m2 in rows}


def single_stream(size: int, rounds: int, steps: int) -> Stats:
    one = ClusterNormalizer("shrinkage")
    for step in range(rounds * steps):
        for rank in range(size):
            one.update(*shard(rank, step))
    return stats(one)


def assert_same(found: Stats, expected: Stats) -> None:
    assert found.keys() == expected.keys()
    for cluster, (count, mean, m2) in expected.items():
        assert found[cluster][0] == count
        assert found[cluster][1] == pytest.approx(mean, rel=1e-12)
        assert found[cluster][2] == pytest.approx(m2, rel=1e-12, abs=1e-12)


def several_rounds(rank: int, size: int) -> list[Stats]:
    normalizer = ClusterNormalizer("shrinkage", track_delta=True)
    seen: list[Stats] = []
    for round_ in range(3):
        for step in range(2):
            normalizer(*shard(rank, 2 * round_ + step))
        all_reduce(normalizer)
        seen.append(stats(normalizer))
    # Nothing is new: nothing changes.
    all_reduce(normalizer)
    assert stats(normalizer) == seen[-1]
    return seen


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_hold_what_one_stream_would(size: int, tmp_path: Path) -> None:
    for ranks in run(several_rounds, size, tmp_path):
        for round_, found in enumerate(ranks):
            assert_same(found, single_stream(size, round_ + 1, 2))


def idle_first_rank(rank: int, size: int) -> Stats:
    normalizer = ClusterNormalizer(track_delta=True, nan_policy="zero")
    if rank:
        normalizer(*shard(rank, 0))
    normalizer([None], ["none"])
    all_reduce(normalizer)
    assert normalizer.num_nonfinite == 1
    return stats(normalizer)


def test_a_rank_may_have_seen_nothing(tmp_path: Path) -> None:
    one = ClusterNormalizer()
    one.update(*shard(1, 0))
    for found in run(idle_first_rank, 2, tmp_path):
        assert_same(found, stats(one))


def restored(rank: int, size: int) -> list[Stats]:
    """From the first rank's state, right after a round; and from each rank's own, amid one."""
    first = ClusterNormalizer("shrinkage", track_delta=True)
    first(*shard(rank, 0))
    all_reduce(first)
    states: list[Any] = [first.state_dict() if rank == 0 else None]
    dist.broadcast_object_list(states, src=0)
    second = ClusterNormalizer("shrinkage", track_delta=True)
    second.load_state_dict(states[0])
    all_reduce(second)
    seen = [stats(second)]
    second(*shard(rank, 1))
    third = ClusterNormalizer("shrinkage", track_delta=True)
    third.load_state_dict(second.state_dict())
    all_reduce(third)
    return [*seen, stats(third)]


def test_restoring_does_not_multiply_counts(tmp_path: Path) -> None:
    for found in run(restored, 3, tmp_path):
        for rounds, one in enumerate(found, start=1):
            assert_same(one, single_stream(3, rounds, 1))


def subgroup(rank: int, size: int) -> Any:
    pair: Any = dist.new_group([0, 2])
    normalizer = ClusterNormalizer(track_delta=True)
    normalizer.update([float(rank)], ["x"])
    if rank == 1:
        with pytest.raises(ConfigError, match="rank 1 is not of the group"):
            all_reduce(normalizer, pair)
    else:
        all_reduce(normalizer, pair)
    return normalizer.snapshot()["x"].count, normalizer.snapshot()["x"].mean


def test_a_group_of_some_ranks(tmp_path: Path) -> None:
    assert run(subgroup, 3, tmp_path) == [(2, 1.0), (1, 1.0), (2, 1.0)]


def untracked(rank: int, size: int) -> None:
    normalizer = ClusterNormalizer()
    with pytest.raises(ConfigError, match="delta needs the option track_delta"):
        all_reduce(normalizer)


def test_deltas_have_to_be_tracked(tmp_path: Path) -> None:
    run(untracked, 2, tmp_path)


def exchanged(rank: int, size: int, folder: str) -> Stats:
    """Every rank is a node; a step is done again and exchanged again, as by one that was killed."""
    path = Path(folder, f"node {rank}")
    for step in (0, 1, 1):
        node = NodeHistories(path, f"node-{rank}", "shrinkage", capacity=64)
        node.rewind()
        node.update(step, *shard(rank, step))
        exchange(node, step)
    return stats(node.histories)


@pytest.mark.skipif(sys.platform == "win32", reason="there are no shared tables")
@pytest.mark.parametrize("size", [2, 3])
def test_nodes_hold_what_one_stream_would(size: int, tmp_path: Path) -> None:
    for found in run(partial(exchanged, folder=str(tmp_path)), size, tmp_path):
        assert_same(found, single_stream(size, 1, 2))


def twice_the_same(rank: int, size: int, folder: str) -> None:
    node = NodeHistories(folder, "node", capacity=64)
    with pytest.raises(ConfigError, match="two ranks are of node 'node'; expected one rank"):
        exchange(node, 0)


@pytest.mark.skipif(sys.platform == "win32", reason="there are no shared tables")
def test_two_ranks_of_a_node_do_not_exchange(tmp_path: Path) -> None:
    run(partial(twice_the_same, folder=str(tmp_path / "node")), 2, tmp_path)


def unsealed(rank: int, size: int, folder: str) -> Stats:
    """The first node cannot seal a step; the next one is exchanged as if nothing had been."""
    node = NodeHistories(Path(folder, f"node {rank}"), f"node-{rank}", "shrinkage", capacity=64)
    node.update(0, *shard(rank, 0))
    if rank == 0:
        node.seal(0)
        node.compact(0)
    named = "^" if rank == 0 else "^node 'node-0' cannot seal step 0: CheckpointError: "
    with pytest.raises(CheckpointError, match=f"{named}step 0 of 'node-0' was compacted"):
        exchange(node, 0)
    node.update(1, *shard(rank, 1))
    exchange(node, 1)
    return stats(node.histories)


@pytest.mark.skipif(sys.platform == "win32", reason="there are no shared tables")
def test_a_node_that_cannot_seal_tells_the_others(tmp_path: Path) -> None:
    for rank, found in enumerate(run(partial(unsealed, folder=str(tmp_path)), 3, tmp_path)):
        one = ClusterNormalizer("shrinkage")
        one.update(*shard(rank, 0))
        for other in range(3):
            one.update(*shard(other, 1))
        assert_same(found, stats(one))
