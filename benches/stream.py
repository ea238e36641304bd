"""A stream of rewards from several processes of one machine into one set of histories.

Contenders of a setting, in rounds whose order rotates, each with the same rewards of the same
processes: `table`, a shared table that all processes fold into; `node`, what a node among several
folds into, which is that and the table of the step; and the peer, one process that keeps the same
histories with NumPy and is fed by the others through a queue of multiprocessing. It takes whatever
waits in the queue, up to 65,536 rewards, and makes one update of it (counts and sums by bincount, then
Chan's merge). Time runs from the moment at which all processes are ready until the last reward is in a
history; tables are new in every run, so that every cluster is also met for the first time in it.

After every run the histories are compared with a look at all samples, in extended precision: counts
must be the same, means and m2 to 1e-12 of themselves. What sealing a step and merging a delta takes is
measured as well, which is what `scale_simulation.py` reckons with.

    python benches/stream.py --out benches/results/stream.json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import history
import numpy as np
from numpy.typing import NDArray

from pgrpo import ClusterNormalizer
from pgrpo.normalizer.nodes import NodeHistories
from pgrpo.runs.metrics import processor_name

CONTENDERS: tuple[str, ...] = ("table", "node", "queue")
TARGET = 1e6
"""Rewards a second that the stream is to take, on two cores."""
DRAIN = 1 << 16
"""Rewards that the peer puts together at most, for NumPy to have much to do at once."""
GRID = 64
"""Rewards are multiples of 1 / GRID, as scores often are: no difference of two is all rounding."""
Arrays = tuple[NDArray[np.float64], NDArray[np.int64]]
Moments = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]

spawning = multiprocessing.get_context("fork")


def share(num_clusters: int, size: int, number: int) -> Arrays:
    """The rewards and clusters [size] of one process; cluster k is met in proportion to 1 / (k + 1)."""
    rng = np.random.default_rng([num_clusters, number])
    upper = np.cumsum(1 / np.arange(1, num_clusters + 1))
    clusters = np.searchsorted(upper, upper[-1] * rng.random(size), side="right")
    rewards = np.round(GRID * (8 + clusters % 7 + rng.normal(size=size))) / GRID
    return rewards, clusters.astype(np.int64)


def moments(rewards: NDArray[np.float64], clusters: NDArray[np.int64], num: int) -> Moments:
    """Count, mean and m2 [num] of each cluster, by a look at all samples in extended precision."""
    order = np.argsort(clusters, kind="stable")
    values, counts = rewards[order].astype(np.longdouble), np.bincount(clusters, minlength=num)
    met = counts > 0
    starts = (np.cumsum(counts) - counts)[met]
    mean, m2 = np.zeros(num, np.longdouble), np.zeros(num, np.longdouble)
    mean[met] = np.add.reduceat(values, starts) / counts[met]
    m2[met] = np.add.reduceat((values - mean[clusters[order]]) ** 2, starts)
    return counts, mean, m2


class Queued:
    """The peer's histories of clusters 0 to K - 1."""

    def __init__(self, num_clusters: int) -> None:
        self.count = np.zeros(num_clusters)
        self.mean = np.zeros(num_clusters)
        self.m2 = np.zeros(num_clusters)

    def update(self, rewards: NDArray[np.float64], clusters: NDArray[np.int64]) -> None:
        """Chan's merge of each cluster's rewards; those that are not among them are not touched."""
        if len(clusters) < len(self.count):
            met, places = np.unique(clusters, return_inverse=True)
        else:
            met, places = np.arange(len(self.count)), clusters
        new = np.bincount(places, minlength=len(met)).astype(float)
        mean = np.bincount(places, rewards, len(met)) / np.maximum(new, 1)
        m2 = np.bincount(places, (rewards - mean[places]) ** 2, len(met))
        old = self.count[met]
        both = np.maximum(old + new, 1)
        delta = mean - self.mean[met]
        self.count[met] = old + new
        self.mean[met] += delta * new / both
        self.m2[met] += m2 + delta * delta * old * new / both


def consume(queue: Any, num_clusters: int, size: int, result: Any) -> None:
    """Take rewards out of the queue until there were `size`, and tell when the last was in."""
    histories, taken = Queued(num_clusters), 0
    while taken < size:
        batches = [queue.get()]
        waiting = len(batches[0][0])
        while waiting < DRAIN and not queue.empty():
            batches.append(queue.get())
            waiting += len(batches[-1][0])
        rewards, clusters = (np.concatenate(part) for part in zip(*batches, strict=True))
        histories.update(rewards, clusters)
        taken += waiting
    result.send(time.perf_counter())
    result.send((histories.count, histories.mean, histories.m2))


def send(
    fold: Callable[[], Callable[[Any, Any], None]], own: Arrays, size: int, ready: Any, ends: Any
) -> None:
    """One process: all its calls once everybody is ready. It tells when it began and ended."""
    call = fold()
    rewards, clusters = (part.reshape(-1, size) for part in own)
    ready.wait()
    begin = time.perf_counter()
    for one, ids in zip(rewards, clusters, strict=True):
        call(one, ids)
    ends.put((begin, time.perf_counter()))


def of_snapshot(state: dict[str, Any], num_clusters: int) -> Moments:
    """Count, mean and m2 of clusters 0 to K - 1 of a state of a normalizer."""
    found = np.zeros((3, num_clusters))
    mean = np.add(state["origin"], state["offset"])
    found[:, state["clusters"]] = state["count"], mean, state["m2"]
    return found[0], found[1], found[2]


def run(
    contender: str, num_clusters: int, size: int, shares: list[Arrays], expected: Moments
) -> tuple[float, float]:
    """Rewards a second of one run, and the largest relative error of a mean or m2."""
    folder = Path(tempfile.mkdtemp(prefix="pgrpo-stream-", dir="/dev/shm"))
    total = sum(len(rewards) for rewards, _ in shares)
    ready, ends = spawning.Barrier(len(shares)), spawning.SimpleQueue()
    try:
        queue, consumer, pipe = spawning.SimpleQueue(), None, None

        def opened() -> ClusterNormalizer:
            return ClusterNormalizer.shared(folder / "table", capacity=num_clusters)

        def node() -> NodeHistories:
            return NodeHistories(folder, "node", capacity=num_clusters)

        def fold() -> Callable[[Any, Any], None]:
            if contender == "table":
                return opened().update
            if contender == "node":
                own = node()
                return lambda rewards, clusters: own.update(0, rewards, clusters)
            return lambda rewards, clusters: queue.put((rewards, clusters))

        if contender == "queue":
            pipe, theirs = spawning.Pipe(duplex=False)
            arguments = (queue, num_clusters, total, theirs)
            consumer = spawning.Process(target=consume, args=arguments)
            consumer.start()
        senders = [
            spawning.Process(target=send, args=(fold, own, size, ready, ends)) for own in shares
        ]
        for sender in senders:
            sender.start()
        times = [ends.get() for _ in senders]
        if consumer and pipe:
            end = pipe.recv()
            found: Moments = pipe.recv()
            consumer.join()
        else:
            end = max(end for _, end in times)
            histories = opened()
            found = of_snapshot(histories.state_dict(), num_clusters)
        for sender in senders:
            sender.join()
    finally:
        shutil.rmtree(folder)
    assert (found[0] == expected[0]).all(), f"{contender}: counts differ"
    errors = [
        float(np.max(np.abs(one - true) / np.where(true == 0, 1, true)))
        for one, true in zip(found[1:], expected[1:], strict=True)
    ]
    return total / (end - min(begin for begin, _ in times)), max(errors)


def handing_over(num_clusters: int, size: int, rounds: int) -> dict[str, float]:
    """Median processor seconds of what nodes hand over, where histories hold all of so many clusters:
    of a process's first call in a step, of sealing a step of so many rewards, of merging its delta.

    Work in memory alone: what other programs of the machine take is none of it.
    """
    folder = Path(tempfile.mkdtemp(prefix="pgrpo-stream-", dir="/dev/shm"))
    spent: dict[str, list[float]] = {"begin_s": [], "seal_s": [], "merge_s": []}
    met: list[int] = []
    length: list[int] = []

    def timed(what: str, call: Callable[[], Any]) -> Any:
        begin = time.process_time()
        found = call()
        spent[what].append(time.process_time() - begin)
        return found

    try:
        first, second, other = (
            NodeHistories(folder / name, name, capacity=num_clusters)
            for name in ("node", "node", "other")
        )
        everybody = np.arange(num_clusters)
        for histories in (first.histories, other.histories):
            histories.update(np.zeros(num_clusters), everybody)
        for step in range(rounds):
            rewards, clusters = share(num_clusters, size, step)
            first.update(step, rewards, clusters)
            timed("begin_s", lambda step=step: second.update(step, [1.0], [0]))
            delta = timed("seal_s", lambda step=step: first.seal(step))
            assert timed("merge_s", lambda delta=delta: other.merge(delta))
            met.append(len(np.unique(clusters)))
            length.append(len(delta.histories))
    finally:
        shutil.rmtree(folder)
    return {
        "clusters": num_clusters,
        "clusters_of_delta": statistics.median(met),
        **{what: statistics.median(seconds) for what, seconds in spent.items()},
        "bytes": statistics.median(length),
    }


def main() -> None:
    """Run all settings, print and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rewards", type=int, default=1 << 21, help="of all processes together")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--hand-over", action="store_true", help="that alone, into the result that is there"
    )
    options = parser.parse_args()
    hand_over = [
        handing_over(num_clusters, size, 40)
        for num_clusters in (10_000, 1_000_000)
        for size in (64, 512, 4096, 32_768, 262_144)
    ]
    for entry in hand_over:
        print(entry, flush=True)
    if options.hand_over:
        result = {**json.loads(options.out.read_text()), "hand_over": hand_over}
        options.out.write_text(json.dumps(result, indent=2) + "\n")
        return
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    for num_clusters in (100, 10_000, 1_000_000):
        for processes in (2, 4, 8):
            shares = [
                share(num_clusters, options.rewards // processes, number)
                for number in range(processes)
            ]
            rewards, clusters = (np.concatenate(part) for part in zip(*shares, strict=True))
            expected = moments(rewards, clusters, num_clusters)
            for size in (64, 1024):
                rates: dict[str, list[float]] = {name: [] for name in CONTENDERS}
                worst = dict.fromkeys(CONTENDERS, 0.0)
                for turn in range(options.rounds):
                    for place in range(len(CONTENDERS)):
                        name = CONTENDERS[(place + turn) % len(CONTENDERS)]
                        rate, error = run(name, num_clusters, size, shares, expected)
                        rates[name].append(rate)
                        worst[name] = max(worst[name], error)
                for name in ("table", "node"):
                    assert worst[name] <= 1e-12, f"{name}: off by {worst[name]}"
                row = {
                    "processes": processes,
                    "clusters": num_clusters,
                    "rewards_per_call": size,
                    "rewards_per_second": {n: statistics.median(r) for n, r in rates.items()},
                    "lowest_rewards_per_second": {n: min(r) for n, r in rates.items()},
                    "largest_relative_error": worst,
                    "target_reached": {n: min(r) >= TARGET for n, r in rates.items()},
                }
                rows.append(row)
                where = f"{processes} processes, K={num_clusters}, B={size}"
                for name in ("table", "node"):
                    pairs = zip(rates[name], rates["queue"], strict=True)
                    ratio = statistics.median(mine / peer for mine, peer in pairs)
                    ratios[f"{name} against queue, {where}"] = ratio
                shown = ", ".join(
                    f"{name} {statistics.median(rate) / 1e6:.2f} M/s (off by {worst[name]:.0e})"
                    for name, rate in rates.items()
                )
                print(f"{where}: {shown}", flush=True)
    result = {
        "date": history.today(),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "rewards": options.rewards,
        "rounds": options.rounds,
        "rows": rows,
        "hand_over": hand_over,
    }
    if options.out:
        history.write(options.out, "stream", result, ratios)


if __name__ == "__main__":
    main()
