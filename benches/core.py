"""The core against its targets: NumPy, numba, torch, a dict loop, and the rules of TRL and verl.

All contenders of a row run in one process on the same arrays, in rounds whose order rotates, so that
a drifting clock meets all alike. A contender's time in a round is the best of three runs; small calls
are repeated within a run. A measured ratio is the median over rounds of the ratio within each round.
Before it is timed, every peer must agree with the core in histories and advantages.

    python benches/core.py --out benches/results/core.json

writes the JSON, a table as core.md beside it, and a line of history.jsonl. Targets 10 and 11 are
measured natively and taken from the JSON named by --native:

    {"10": {"longest_wait_ms": x}, "11": {"torn": 0, "lost": 0, "commits": n}}
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
import timeit
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from importlib.metadata import version
from itertools import repeat
from pathlib import Path
from typing import Any

import history
import numpy as np
import torch
from core_peers import EPS, Contender, Memory, aligned, peers, rules_of_others, spin
from numpy.typing import NDArray

from pgrpo import ClusterNormalizer
from pgrpo.normalizer import _core
from pgrpo.runs.metrics import processor_name

K = 64
LARGE = 1 << 22
NUMBA = ("numba, arrays", "numba, table")
RUN_NS = 5_000_000
"""How long a run lasts at least: calls are repeated until then."""
THREAD_SAMPLES, THREAD_PASSES, SPIN_STEPS = 800 << 16, 25, 30_000_000
"""What a thread does in a run: tens of milliseconds, so that starting it does not count."""
FEATURES = ("sse4_2", "avx2", "fma", "avx512f", "avx512vl", "avx512vbmi2", "asimd", "sve")

Times = Mapping[str, Sequence[float]]


@dataclass
class Row:
    """One target: what was measured, and the bound it is to keep."""

    target: int
    what: str
    measured: float | None
    bound: float
    at_least: bool
    unit: str = "x"
    note: str = ""

    @property
    def met(self) -> bool | None:
        """None if it was not measured."""
        if self.measured is None:
            return None
        return self.measured >= self.bound if self.at_least else self.measured <= self.bound


@dataclass
class Result:
    """Everything measured so far."""

    rows: list[Row] = field(default_factory=list)
    ns_per_sample: dict[str, dict[str, float]] = field(default_factory=dict)
    """Median time of each contender, by batch."""
    noise: dict[str, dict[str, float]] = field(default_factory=dict)
    """Shares of the processor stolen by the host and used by other processes, by batch."""

    def add(self, row: Row) -> None:
        """Keep a row and tell of it."""
        self.rows.append(row)
        say(f"  target {row.target}, {row.what}: {shown(row)} ({goal(row)}) {row.note}")


class Load:
    """Who had the processor since this was made: the host (steal), other processes, us."""

    def __init__(self) -> None:
        self._start = self._ticks()

    @staticmethod
    def _ticks() -> tuple[float, float, float, float]:
        try:
            line = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
        except OSError:
            return 0.0, 0.0, 0.0, 0.0
        user, nice, system, idle, wait, interrupt, soft, steal = map(float, line)
        times, hertz = os.times(), os.sysconf("SC_CLK_TCK")
        own = hertz * (times.user + times.system + times.children_user + times.children_system)
        busy = user + nice + system + interrupt + soft
        return busy + idle + wait + steal, steal, busy, own

    def shares(self) -> dict[str, float]:
        """Shares of all cores' time."""
        whole, steal, busy, own = (b - a for a, b in zip(self._start, self._ticks(), strict=True))
        whole = max(whole, 1.0)
        return {"steal": steal / whole, "other_processes": max(busy - own, 0.0) / whole}


def batch(num_clusters: int, size: int, kind: str, seed: int = 0) -> dict[str, NDArray[Any]]:
    """Rewards, cluster ids and a place for advantages.

    `random` ids are uniform; `grouped` ones come in runs of 8 equal, as GRPO's groups do.
    """
    rng = np.random.default_rng(seed)
    run = 8 if kind == "grouped" else 1
    ids = np.repeat(rng.integers(0, num_clusters, size // run), run).astype(np.int32)
    rewards = (rng.standard_normal(size) + ids % 7).astype(np.float32)
    return {
        "rewards": aligned(rewards),
        "clusters": aligned(ids),
        "out": aligned(np.zeros(size, np.float32)),
    }


def ours(num_clusters: int, num_threads: int = 1, method: str = "advantages") -> Contender:
    """The core, empty, called by one of its two ways."""
    normalizer = ClusterNormalizer(eps=EPS, num_threads=num_threads)

    def histories() -> NDArray[np.float64]:
        table = np.zeros((3, num_clusters))
        for p, stats in normalizer.snapshot().items():
            table[:, int(p)] = stats.count, stats.mean, stats.std
        return table

    step = normalizer if method == "__call__" else normalizer.advantages
    return Contender("step(rewards, clusters, out=out)", {"step": step}, histories)


def noop(
    rewards: object,
    clusters: object,
    groups: object = None,
    weights: object = None,
    score_norms: object = None,
    lengths: object = None,
    parents: object = None,
    out: object = None,
) -> None:
    """What a call costs before anything is done: the way of `advantages` through Python and Rust."""
    return _core._noop(rewards, clusters, groups, weights, score_norms, lengths, parents, out)


def check(arrays: Mapping[str, NDArray[Any]], contenders: Mapping[str, Contender]) -> None:
    """Fold three batches of different means by each contender: all must agree with the first.

    Raises:
        SystemExit: one of them does another job.
    """
    rewards, out = arrays["rewards"], arrays["out"]
    base = rewards.copy()
    for shift in (0.0, 1.5, -1.0):
        rewards[:] = base + np.float32(shift)
        expected = None
        for name, contender in contenders.items():
            out[:] = np.nan
            eval(contender.call, {**arrays, **contender.names})
            if expected is None:
                expected = out.astype(np.float64)
            error = float(np.max(np.abs(out - expected) / (1 + np.abs(expected))))
            if not error <= 1e-5:
                raise SystemExit(f"{name}: advantages are off by {error:.2g}; expected <= 1e-5")
    rewards[:] = base
    tables = {name: c.histories() for name, c in contenders.items() if c.histories}
    count, *moments = next(iter(tables.values()))
    for name, (its_count, *its_moments) in tables.items():
        same = np.array_equal(its_count, count) and np.allclose(its_moments, moments, 1e-9, 1e-9)
        if not same:
            raise SystemExit(f"{name}: other histories than the core's")


def measure(
    arrays: Mapping[str, NDArray[Any]], contenders: Mapping[str, Contender], rounds: int
) -> dict[str, list[float]]:
    """Nanoseconds per call of each contender, one number a round."""
    timers = {
        name: timeit.Timer(c.call, timer=time.perf_counter_ns, globals={**arrays, **c.names})
        for name, c in contenders.items()
    }
    repeats: dict[str, int] = {}
    for name, timer in timers.items():
        timer.timeit(1)  # compiles, warms up
        repeats[name] = max(1, round(3 * RUN_NS / timer.timeit(3)))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for k in range(rounds):
        turn = k % len(names)
        for name in names[turn:] + names[:turn]:
            runs = timers[name].repeat(3, repeats[name])
            times[name].append(min(runs) / repeats[name])
    return times


def ratio(times: Times, slow: str, fast: str) -> float:
    """Median over rounds of how many times longer `slow` takes."""
    return statistics.median(a / b for a, b in zip(times[slow], times[fast], strict=True))


def against(times: Times, *names: str) -> tuple[float, str]:
    """How many times longer the fastest of these peers takes than the core, and all of them."""
    ratios = {name: ratio(times, name, "pgrpo") for name in names}
    return min(ratios.values()), ", ".join(f"{name} {x:.2f}" for name, x in ratios.items())


def time_batches(result: Result, rounds: int) -> None:
    """Targets 1 to 5 and 7: one call at a time."""

    def run(num_clusters: int, size: int, kind: str, *names: str, **more: Contender) -> Times:
        """Times of the core, of the peers named and of `more`; who does the job is checked first."""
        title = f"K={num_clusters}, B={size}, {kind}"
        available = peers(num_clusters)
        chosen = {"pgrpo": ours(num_clusters), **{n: available[n] for n in names}, **more}
        return timed(result, title, batch(num_clusters, size, kind), chosen, rounds)

    def faster(target: int, what: str, times: Times, bound: float, *names: str) -> None:
        measured, each = against(times, *names)
        note = each if len(names) > 1 else ""
        result.add(Row(target, what, measured, bound, at_least=True, note=note))

    nothing = Contender("step(rewards, clusters, out=out)", {"step": noop})
    called = ours(K, method="__call__")
    times = run(K, 8, "random", "NumPy", "dict loop", *NUMBA, noop=nothing, called=called)
    faster(1, "B=8 against numba", times, 1, *NUMBA)
    faster(1, "B=8 against NumPy", times, 40, "NumPy")
    for kind, bound in (("random", 0.9), ("grouped", 1.1)):
        times = run(K, 64, kind, "NumPy", *NUMBA)
        faster(2, f"B=64 {kind} against numba", times, bound, *NUMBA)
    times = run(K, 65536, "random", "NumPy", "torch", *NUMBA)
    faster(3, "65536 against numba", times, 2.5, *NUMBA)
    faster(3, "65536 against NumPy", times, 9, "NumPy")
    times = run(K, LARGE, "random", "NumPy", *NUMBA)
    faster(4, "4M random against numba", times, 1.8, *NUMBA)
    two = {"pgrpo, 2 threads": ours(K, num_threads=2)}
    both = two_threads_of_anything(Memory())
    times = run(K, LARGE, "grouped", *NUMBA, **two, **both)
    faster(4, "4M grouped against numba", times, 3.2, *NUMBA)
    measured = ratio(times, "pgrpo", "pgrpo, 2 threads")
    what = "one grouped 4M call on 2 threads against 1"
    result.add(Row(8, what, measured, 1.4, at_least=True, note=ceiling(times)))
    for size, bound in ((65536, 0.9), (LARGE, 1.8)):
        times = run(10_000, size, "random", *NUMBA)
        faster(5, f"K=10k: {size} against numba", times, bound, *NUMBA)


def timed(
    result: Result,
    title: str,
    arrays: Mapping[str, Any],
    contenders: Mapping[str, Contender],
    rounds: int,
) -> Times:
    """Times of contenders, of which those with histories are checked to do the same job first."""
    say(title)
    load = Load()
    if comparable := {name: c for name, c in contenders.items() if c.histories}:
        check(arrays, comparable)
    times = measure(arrays, contenders, rounds)
    result.noise[title] = load.shares()
    size = math.prod(arrays["rewards"].shape)
    result.ns_per_sample[title] = {n: statistics.median(t) / size for n, t in times.items()}
    return times


def time_pooled(result: Result, rounds: int) -> None:
    """Target 6: reading all clusters together costs a call no more than it reads of its own."""
    low, high = (
        Contender("step(rewards, ids, out=out)", {"step": pooled(highest), "ids": ids})
        for highest, ids in ((3, np.arange(8, dtype=np.int32) % 4), (HIGHEST, spread_to(HIGHEST)))
    )
    contenders = {"pgrpo, ids to 3": low, "pgrpo, ids to 4M": high}
    times = timed(result, "prior_count, B=8", batch(4, 8, "random"), contenders, rounds)
    what = "B=8 with prior_count and an id of 4 million against small ids"
    measured = ratio(times, "pgrpo, ids to 4M", "pgrpo, ids to 3")
    result.add(Row(6, what, measured, 1.5, at_least=False))


HIGHEST = (1 << 22) - 1


def spread_to(highest: int) -> NDArray[np.int32]:
    """Eight ids of four clusters, one of them the highest."""
    return np.array([0, 1, 2, highest] * 2, np.int32)


def pooled(highest: int) -> Callable[..., object]:
    """The method of a normalizer that reads all clusters together and knows four of them."""
    normalizer = ClusterNormalizer(eps=EPS, prior_count=10)
    normalizer.update(np.zeros(8, np.float32), spread_to(highest))
    return normalizer.advantages


def time_rules(result: Result, rounds: int) -> None:
    """Target 7: GRPO's rule as TRL and verl compute it, at 64 groups of 8, on tensors on the CPU."""
    torch.set_num_threads(1)
    rewards = torch.from_numpy(np.random.default_rng(0).random((64, 8), np.float32))
    normalizer = ClusterNormalizer("grpo", ddof=1)
    clusters = np.arange(64, dtype=np.int32)
    names = {"step": normalizer.advantages, "clusters": clusters}
    numpys = {**names, "rewards": rewards.numpy()}
    contenders = {
        "pgrpo": Contender("step(rewards, clusters)", names),
        "pgrpo, NumPy": Contender("step(rewards, clusters)", numpys),
        **rules_of_others(64, 8),
    }
    expected = eval(contenders["TRL"].call, {"rewards": rewards, **contenders["TRL"].names})
    for name, contender in contenders.items():
        found = eval(contender.call, {"rewards": rewards, **contender.names})
        # verl adds 1e-6 to standard deviations, the others 1e-4.
        found = torch.as_tensor(found)
        if not torch.allclose(found.flatten(), expected.flatten(), atol=3e-3):
            raise SystemExit(f"{name}: other advantages than TRL's")
    times = timed(result, "64 groups of 8, GRPO", {"rewards": rewards}, contenders, rounds)
    for name in ("TRL", "verl"):
        for kind, ours in (("tensors", "pgrpo"), ("NumPy", "pgrpo, NumPy")):
            what = f"64 x 8 rewards, ours as {kind}, against the rule of {name}"
            result.add(Row(7, what, ratio(times, name, ours), 10, at_least=True))


def together(*jobs: Callable[[], object]) -> None:
    """Run each job in a thread of its own, all starting at once."""
    barrier = threading.Barrier(len(jobs))

    def run(job: Callable[[], object]) -> None:
        barrier.wait()
        job()

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def threads_of(
    name: str, alone: Callable[[], object], *halves: Callable[[], object]
) -> dict[str, Contender]:
    """Contenders: the whole work in one thread, and its halves in two."""
    return {
        f"{name}, 1 thread": Contender("step(alone)", {"step": together, "alone": alone}),
        f"{name}, 2 threads": Contender("step(*halves)", {"step": together, "halves": halves}),
    }


def two_threads_of_anything(memory: Memory) -> dict[str, Contender]:
    """What the machine itself gives two threads: of computing, and of streaming through memory."""
    arrays = batch(K, LARGE, "grouped")

    def stream(part: slice) -> Callable[[], object]:
        rewards, clusters, out = (arrays[n][part] for n in ("rewards", "clusters", "out"))

        def passes() -> None:
            for _ in range(THREAD_PASSES):
                memory.read(rewards, clusters)
                memory.triad(rewards, clusters, out)

        return passes

    def compute(steps: int) -> Callable[[], object]:
        return lambda: spin(steps)

    whole, first, second = slice(LARGE), slice(LARGE // 2), slice(LARGE // 2, LARGE)
    half = compute(SPIN_STEPS // 2)
    return {
        **threads_of("computing", compute(SPIN_STEPS), half, half),
        **threads_of("streaming", stream(whole), stream(first), stream(second)),
    }


def gain(times: Times, name: str) -> float:
    """How many times faster two threads are than one."""
    return ratio(times, f"{name}, 1 thread", f"{name}, 2 threads")


def ceiling(times: Times) -> str:
    """What two threads got of the machine in the same rounds."""
    return f"computing {gain(times, 'computing'):.2f}, streaming {gain(times, 'streaming'):.2f}"


def calls(
    normalizer: ClusterNormalizer, arrays: Mapping[str, NDArray[Any]], number: int
) -> Callable[[], None]:
    """A function that calls the normalizer so many times with this batch."""
    rewards, clusters, out = arrays["rewards"], arrays["clusters"], arrays["out"]

    def run() -> None:
        for _ in repeat(None, number):
            normalizer(rewards, clusters, out=out)

    return run


def time_threads(result: Result, rounds: int) -> None:
    """Target 8: two Python threads, each with its batch, on one normalizer."""
    machine = two_threads_of_anything(Memory())
    for size in (8192, 65536):
        title = f"two Python threads, B={size}"
        say(title)
        normalizer = ClusterNormalizer(eps=EPS)

        first, second = (
            calls(normalizer, batch(K, size, "random", seed), THREAD_SAMPLES // size)
            for seed in (1, 2)
        )

        def alone(first: Any = first, second: Any = second) -> None:
            first()
            second()

        load = Load()
        times = measure({}, {**threads_of("pgrpo", alone, first, second), **machine}, rounds)
        result.noise[title] = load.shares()
        measured = gain(times, "pgrpo")
        what = f"{title}, against one"
        result.add(Row(8, what, measured, 1.85, at_least=True, note=ceiling(times)))


def accuracy(result: Result, samples: int) -> None:
    """Targets 12 and 13."""
    say(f"accuracy: {samples:.0e} samples of mean 1e8, standard deviation 1e-3")
    mean_error, std_error = far_mean_errors(samples)
    of = f"{samples:.0e} samples, mean 1e8, sd 1e-3: error of"
    what = f"{of} the mean, in sigma"
    result.add(Row(12, what, mean_error, 1e-10, at_least=False, unit=""))
    result.add(Row(12, f"{of} sigma", std_error, 1e-10, at_least=False, unit=""))
    what = "constant rewards: largest absolute advantage or sigma"
    result.add(Row(12, what, largest_of_constants(), 0, at_least=False, unit=""))
    for dtype, bound in ((np.float32, 2e-7), (np.float64, 1e-12)):
        what = f"{np.dtype(dtype)} advantages: error relative to 1 + abs A"
        result.add(Row(13, what, advantage_error(dtype), bound, at_least=False, unit=""))


def far_mean_errors(samples: int) -> tuple[float, float]:
    """Errors of the mean, in sigma, and of sigma, relative, against exact integer sums.

    Samples are 1e8 plus a whole number of its last places, 2^-26, so their sums are exact. A mean
    near 1e8 cannot be told in float64 to better than 1e-5 sigma; the core's own is seen in the
    advantage of a reward of exactly 1e8, -(mean - 1e8) / (sigma + eps).
    """
    place, rng = 2.0**-26, np.random.default_rng(0)
    normalizer = ClusterNormalizer(eps=EPS)
    n = s = squares = 0
    block, size = 1 << 20, 8192
    ids, out = np.zeros(size, np.int32), np.empty(size)
    while n < samples:
        steps = np.rint(rng.standard_normal(min(block, samples - n)) * (1e-3 / place))
        rewards = 1e8 + steps * place
        for start in range(0, len(rewards), size):
            part = rewards[start : start + size]
            normalizer(part, ids[: len(part)], out=out[: len(part)])
        whole = steps.astype(np.int64)
        n, s, squares = n + len(whole), s + int(whole.sum()), squares + int(whole @ whole)
    mean = float(Fraction(s, n)) * place
    std = math.sqrt(Fraction(n * squares - s * s, n * n)) * place
    found = normalizer.snapshot()[0]
    if found.count != n:
        raise SystemExit(f"the core counted {found.count} rewards; expected {n}")
    probe = normalizer.normalize(np.array([1e8]), ids[:1])[0]
    return abs(float(probe) * (found.std + EPS) + mean) / std, abs(found.std / std - 1)


def largest_of_constants() -> float:
    """The largest |advantage| and sigma of clusters whose rewards never change: 0 if exact."""
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.standard_normal(K - 3), [0.1, 1e8 + 0.1, -1e-30]])
    largest = 0.0
    for dtype in (np.float32, np.float64):
        normalizer = ClusterNormalizer(eps=EPS)
        for size in (1, 3, 8, 64, 1000, 8192, 65537):
            ids = rng.integers(0, K, size).astype(np.int32)
            rewards = values.astype(dtype)[ids]
            out: Any = np.full(size, np.nan, dtype)
            advantages = normalizer(rewards, ids, out=out)
            largest = max(largest, float(np.abs(advantages).max()))
        largest = max(largest, *(stats.std for stats in normalizer.snapshot().values()))
    return largest


def advantage_error(dtype: type[Any]) -> float:
    """Largest |A - exact| / (1 + |exact|) over batches of several sizes, offsets and scales.

    Exact: two passes in long double over all rewards of the cluster so far.
    """
    rng, worst = np.random.default_rng(0), 0.0
    for offset, scale in ((0.0, 1.0), (3.0, 0.5), (-1000.0, 1.0), (0.5, 1e-3)):
        normalizer = ClusterNormalizer(eps=EPS)
        seen: list[list[NDArray[Any]]] = [[] for _ in range(K)]
        for size in (8, 64, 1000, 8192, 65536, 200_000):
            ids = rng.integers(0, K, size).astype(np.int32)
            rewards = (offset + scale * rng.standard_normal(size)).astype(dtype)
            advantages = normalizer(rewards, ids, out=np.empty(size, dtype)).astype(np.longdouble)
            for p in range(K):
                mine = rewards[ids == p].astype(np.longdouble)
                if len(mine):
                    seen[p].append(mine)
                    whole = np.concatenate(seen[p])
                    exact = (mine - whole.mean()) / (whole.std() + np.longdouble(EPS))
                    errors = np.abs(advantages[ids == p] - exact) / (1 + np.abs(exact))
                    worst = max(worst, float(errors.max()))
    return worst


MEMORY_SCRIPT = """
import gc, os
import numpy as np
from pgrpo import ClusterNormalizer

def resident():
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

MILLION, SIZE = 1 << 20, 1 << 16
ids = np.arange(SIZE, dtype=np.int32)
rewards, out = np.ones(SIZE, np.float32), np.empty(SIZE, np.float32)
normalizer = ClusterNormalizer()
normalizer(rewards, ids % 2, out=out)
sizes = [resident()]
for _ in range(4):
    for _ in range(MILLION // SIZE):
        normalizer(rewards, ids, out=out)
        ids += SIZE
    sizes.append(resident())
print((sizes[1] - sizes[0]) / MILLION, (sizes[4] - sizes[1]) / (3 * MILLION))
"""


def bytes_per_cluster(result: Result) -> None:
    """Target 14: growth of resident memory in a process of its own, over four million clusters.

    What is paid once, such as room to work in, falls into the first million.
    """
    say("bytes per cluster")
    if not Path("/proc/self/statm").exists():
        result.add(Row(14, "bytes per cluster", None, 64, at_least=False, unit=""))
        return
    command = [sys.executable, "-c", MEMORY_SCRIPT]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    first, later = map(float, out.split())
    note = f"first million, with what is paid once: {first:.1f}"
    # A page more or less is no byte per cluster.
    result.add(
        Row(14, "bytes per cluster", round(later, 1), 64, at_least=False, unit="", note=note)
    )


def native(result: Result, path: Path | None) -> None:
    """Targets 10 and 11, from the native benches' JSON."""
    found: dict[str, dict[str, float]] = {}
    if path and path.exists():
        found = json.loads(path.read_text())
    wait, lost = (found.get(key, {}) for key in ("10", "11"))
    what = "longest wait beside a writer frozen for 50 ms"
    result.add(Row(10, what, wait.get("longest_wait_ms"), 1, at_least=False, unit=" ms"))
    note = f"of {lost['commits']:.3g} commits" if lost else ""
    for key, what in (("torn", "torn reads"), ("lost", "lost updates")):
        row = Row(11, what, lost.get(key), 0, at_least=False, unit="", note=note)
        result.add(row)


def shown(row: Row) -> str:
    """What was measured, as read."""
    if row.measured is None:
        return "not run"
    digits = f"{row.measured:.2g}" if abs(row.measured) < 0.01 else f"{row.measured:.2f}"
    return f"{digits}{row.unit}"


def goal(row: Row) -> str:
    """The bound, as read."""
    return f"{'>=' if row.at_least else '<='} {row.bound:g}{row.unit}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def markdown(record: Mapping[str, Any], result: Result) -> str:
    """The result as a page."""
    machine = record["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    met = {True: "yes", False: "**no**", None: ""}
    rows = sorted(result.rows, key=lambda row: row.target)
    targets = [
        [str(row.target), row.what, shown(row), goal(row), met[row.met], row.note] for row in rows
    ]
    names = list(dict.fromkeys(n for times in result.ns_per_sample.values() for n in times))
    # Threads of anything work on batches of their own.
    names = [n for n in names if not n.startswith(("computing", "streaming"))]
    times = [
        [title, *(f"{by[n]:.3g}" if n in by else "" for n in names)]
        for title, by in result.ns_per_sample.items()
    ]
    noise = [
        [title, f"{shares['steal']:.1%}", f"{shares['other_processes']:.1%}"]
        for title, shares in result.noise.items()
    ]
    return f"""# The core against its targets

{machine["processor"]}, {machine["cores"]} cores, {", ".join(machine["features"])}; {machine["system"]};
{machine["steal"]:.1%} of its time stolen by the host, {machine["other_processes"]:.1%} used by other
processes during the run. {versions}. {record["date"]}.

    {record["command"]}

Rewards float32, ids int32, K = {K}, `out=` given, the method `advantages`, one thread unless said
otherwise. Ratios are medians of {record["rounds"]} rounds, in which all contenders of a row take turns;
`grouped` ids come in runs of 8 equal. Where there are two forms of a peer, the faster counts. Notes
beside two threads: what two threads got done against one of pure computing, and of streaming through
memory, in the same rounds. The rules of TRL and verl are their own code, on tensors [64, 8] and with
one token a completion.

{table(["target", "what", "measured", "target value", "met", "note"], targets)}
## Nanoseconds per sample

{table(["batch", *names], times)}
`noop` is a call of the same signature that reads nothing; `called` is `normalizer(...)`.

## Neighbours

{table(["part", "stolen by the host", "other processes"], noise)}"""


def machine() -> dict[str, Any]:
    """What this runs on."""
    try:
        cpu = Path("/proc/cpuinfo").read_text().replace("Features", "flags")
        flags = next(line for line in cpu.splitlines() if line.startswith("flags")).split()
    except (OSError, StopIteration):
        flags = []
    return {
        "processor": processor_name(),
        "features": [name for name in FEATURES if name in flags],
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    }


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Run the bench; writes JSON and a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--samples", type=float, default=1e8, help="of target 12")
    parser.add_argument("--native", type=Path, help="JSON of the native benches: targets 9 to 11")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    result, load = Result(), Load()
    gc.disable()
    time_batches(result, options.rounds)
    time_pooled(result, options.rounds)
    time_rules(result, options.rounds)
    time_threads(result, options.rounds)
    gc.enable()
    accuracy(result, int(options.samples))
    bytes_per_cluster(result)
    native(result, options.native)
    record = {
        "bench": "core",
        "date": history.today(),
        "machine": {**machine(), **load.shares()},
        "versions": {n: version(n) for n in ("pgrpo", "numpy", "numba", "torch", "trl", "verl")},
        "command": history.command(),
        "rounds": options.rounds,
        "targets": [{**asdict(row), "met": row.met} for row in result.rows],
        "ns_per_sample": result.ns_per_sample,
        "noise": result.noise,
    }
    page = markdown(record, result)
    print(page)
    if options.out:
        ratios = {row.what: row.measured for row in result.rows if row.unit == "x" and row.measured}
        history.write(options.out, "core", record, ratios)
        options.out.with_suffix(".md").write_text(page)


if __name__ == "__main__":
    main()
