r"""How far nodes that hand each other deltas come, to 1,000 reward workers and 10^6 clusters, and what
histories that lack the newest rewards of other nodes do to advantages.

**Throughput**, by events, with what `stream.py` measured on one machine: the seconds of a call, of a
worker's beginning of a step, of sealing a step and of merging a delta. Nodes are those of that bench,
two cores and eight reward workers. A worker scores a batch of 64 elsewhere (on a GPU, in a sandbox: a
gamma-distributed time of shape 4, or none at all, which shows the limit) and folds it on one of its
node's cores, where calls, seals and merges wait for their turn. Once every worker has made its calls of
a step, the node seals it; once all nodes have, each merges the deltas of all others, one after the
other, as `collectives.exchange` does. Workers wait for that before the next step (`ahead` = 0), or go
on for one step meanwhile (1). Deltas arrive at once: their bytes are told, the network is not
simulated, for there is none here to be measured.

**Error**, by real histories: 125 nodes of 8 workers, 10^6 clusters, of which cluster k is met in
proportion to 1 / (k + 1). One node is observed. It merges the others' deltas of a step some steps late,
and its advantages are compared with those of one normalizer that has folded the rewards of all nodes in
the order in which they were made. The error is the root mean square of the difference, in units of the
exact advantages' deviation. For steady normal rewards theory has it: where m of a cluster's n rewards
are missing, the mean is off by a variance of m / (n (n - m)) and sigma by half of it, both in units of
sigma, so that the mean square of the error is 1.5 m / (n (n - m)).

    python benches/scale_simulation.py --out benches/results/scale_simulation.json \
      --figure docs/images/scale_simulation.svg
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import shutil
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import history
import numpy as np
from numpy.typing import NDArray

from pgrpo import ClusterNormalizer
from pgrpo.normalizer.nodes import Delta, NodeHistories
from pgrpo.report.figures import ARM_COLORS
from pgrpo.runs.metrics import processor_name

WORKERS_PER_NODE, CORES_PER_NODE, CALL = 8, 2, 64
"""As of the setting of `stream.py` that has the most processes; rewards a call."""
SHAPE = 4.0
"""Of the gamma distribution of scoring times: its deviation is half its mean."""
LAGS = 0, 1, 4, 16
"""Steps by which deltas come late."""
STEPS, OBSERVED = 64, 16
"""Steps of the error's run, and how many of its last are looked at."""
COMPACTED = 8
"""Steps after which the observed node's deltas are made one file, which saves memory."""
GRID_COLOR = "#ddd"
Process = Generator[float | tuple[float] | Callable[[], bool], None, None]
"""What goes on in a node, and waits: for seconds to pass, for work of (seconds,) on a core of the
node, or until something is so."""


def shares(num_clusters: int) -> NDArray[np.float64]:
    """The probability of each cluster [K]."""
    weights = 1 / np.arange(1, num_clusters + 1)
    return weights / weights.sum()


def distinct(num_clusters: int, rewards: int) -> float:
    """Clusters that are expected among so many rewards."""
    return float(-np.expm1(rewards * np.log1p(-shares(num_clusters))).sum())


@dataclass(frozen=True)
class Costs:
    """What one node spends, in seconds of one of its cores."""

    call_s: float
    """One call of `CALL` rewards."""
    begin_s: float
    """What the first call of a step takes longer in each process."""
    seal_s: float
    """Sealing one step."""
    merge_s: float
    """Merging the delta of one other node's step."""
    delta_bytes: float
    """Of one delta."""


def costs(measured: dict[str, Any], num_clusters: int, rewards: int) -> Costs:
    """What a node's step of so many rewards costs, as measured, between two measured deltas on a
    straight line of logarithms."""
    (row,) = (
        row
        for row in measured["rows"]
        if (row["processes"], row["clusters"], row["rewards_per_call"])
        == (WORKERS_PER_NODE, num_clusters, CALL)
    )
    handed = [entry for entry in measured["hand_over"] if entry["clusters"] == num_clusters]
    size = distinct(num_clusters, rewards)
    begin_s, seal_s, merge_s, delta_bytes = (
        math.exp(
            np.interp(
                math.log(size),
                [math.log(entry["clusters_of_delta"]) for entry in handed],
                [math.log(entry[key]) for entry in handed],
            )
        )
        for key in ("begin_s", "seal_s", "merge_s", "bytes")
    )
    call_s = CORES_PER_NODE * CALL / row["rewards_per_second"]["node"]
    return Costs(call_s, begin_s, seal_s, merge_s, delta_bytes)


@dataclass
class Node:
    """One node: its cores, who waits in it, and how far it is."""

    steps: int
    """How many it makes."""
    idle: int = CORES_PER_NODE
    queue: deque[tuple[float, Process]] = field(default_factory=deque)
    """Work that waits for a core, first come, first served."""
    blocked: list[tuple[Callable[[], bool], Process]] = field(default_factory=list)
    """Processes that wait until something is so."""
    merged: int = 0
    """Deltas of other nodes in its table of all histories."""
    exchanged: int = 0
    """Steps of which all deltas are in it."""

    def __post_init__(self) -> None:
        self.folded = [0] * self.steps
        """Calls that have returned, by step."""


class Simulation:
    """Nodes that fold, seal and merge: events in the order of their times."""

    def __init__(
        self, spent: Costs, nodes: int, calls: int, scoring_s: float, ahead: int, steps: int
    ) -> None:
        """Set it up.

        Args:
            spent: what a node's step costs.
            nodes: number of nodes.
            calls: of each worker in each step.
            scoring_s: mean time in which a worker scores the rewards of a call.
            ahead: steps by which workers may be ahead of what is merged.
            steps: steps to be made, of which the first half is how it starts, and not counted.
        """
        self.spent, self.calls, self.scoring_s, self.ahead = spent, calls, scoring_s, ahead
        self.steps = steps
        self.nodes = [Node(steps) for _ in range(nodes)]
        self.sealed = [0] * steps
        """Nodes that have sealed it, by step."""
        self.folded = 0
        self.stale: list[int] = []
        """Calls of other nodes that the table of a call lacks, for each call that is counted."""
        self.now = 0.0
        self.sealed_s = [0.0] * steps
        """When the last node had sealed it, by step."""
        self.events: list[tuple[float, int, Node, Process, bool]] = []
        self.made = 0
        self.rng = np.random.default_rng([nodes, calls, ahead])

    def run(self) -> float:
        """Rewards a second of all nodes together."""
        everything = len(self.nodes) * WORKERS_PER_NODE * self.calls * self.steps
        for node in self.nodes:
            for process in (*(self.work(node) for _ in range(WORKERS_PER_NODE)), self.hand(node)):
                self.go_on(node, process)
        while self.events:
            self.now, _, node, process, frees = heapq.heappop(self.events)
            if frees and node.queue:
                seconds, waiting = node.queue.popleft()
                self.after(seconds, waiting, node, True)
            else:
                node.idle += frees
            self.go_on(node, process)
            self.look(node)
        assert self.folded == everything
        assert all(node.merged == self.steps * (len(self.nodes) - 1) for node in self.nodes)
        half = self.steps // 2
        counted = everything * (self.steps - 1 - half) / self.steps
        return CALL * counted / (self.sealed_s[-1] - self.sealed_s[half])

    def work(self, node: Node) -> Process:
        """A reward worker: it scores and folds, step after step."""
        per_step = WORKERS_PER_NODE * self.calls
        for step in range(self.steps):
            yield lambda step=step: node.exchanged >= step - self.ahead
            for call in range(self.calls):
                if self.scoring_s:
                    yield self.rng.gamma(SHAPE, self.scoring_s / SHAPE)
                yield (self.spent.call_s + (self.spent.begin_s if call == 0 else 0.0),)
                self.folded += 1
                node.folded[step] += 1
                if step >= self.steps // 2:
                    own = sum(node.folded)
                    self.stale.append(self.folded - own - node.merged * per_step)

    def hand(self, node: Node) -> Process:
        """What `collectives.exchange` does after each step."""
        for step in range(self.steps):
            yield lambda step=step: node.folded[step] == WORKERS_PER_NODE * self.calls
            yield (self.spent.seal_s,)
            self.sealed[step] += 1
            if self.sealed[step] == len(self.nodes):
                self.sealed_s[step] = self.now
                for other in self.nodes:
                    if other is not node:
                        self.look(other)
            yield lambda step=step: self.sealed[step] == len(self.nodes)
            for _ in range(len(self.nodes) - 1):
                yield (self.spent.merge_s,)
                node.merged += 1
            node.exchanged += 1

    def after(self, seconds: float, process: Process, node: Node, frees: bool) -> None:
        """Let a process go on after so many seconds, and free a core then or not."""
        self.made += 1
        heapq.heappush(self.events, (self.now + seconds, self.made, node, process, frees))

    def go_on(self, node: Node, process: Process) -> None:
        """Let a process go on until it has to wait."""
        for want in process:
            if callable(want):
                if want():
                    continue
                node.blocked.append((want, process))
            elif not isinstance(want, tuple):
                self.after(want, process, node, False)
            elif node.idle:
                node.idle -= 1
                self.after(want[0], process, node, True)
            else:
                node.queue.append((want[0], process))
            return

    def look(self, node: Node) -> None:
        """Let those go on that wait until something is so which is so now."""
        blocked, node.blocked = node.blocked, []
        for until, process in blocked:
            if until():
                self.go_on(node, process)
            else:
                node.blocked.append((until, process))


def throughput(measured: dict[str, Any], steps: int) -> list[dict[str, Any]]:
    """All settings of the simulation by events."""
    rows: list[dict[str, Any]] = []
    for num_clusters in (10_000, 1_000_000):
        for calls in (1, 16):
            rewards = WORKERS_PER_NODE * calls * CALL
            spent = costs(measured, num_clusters, rewards)
            for nodes in (1, 8, 32, 125):
                for rate in (100.0, 1_000.0, None):
                    for ahead in (0, 1):
                        scoring_s = CALL / rate if rate else 0.0
                        simulation = Simulation(spent, nodes, calls, scoring_s, ahead, steps)
                        found = simulation.run()
                        # A node receives the deltas of all others in the time of a step.
                        step_s = nodes * rewards / found
                        stale = np.array(simulation.stale) * CALL
                        rows.append(
                            {
                                "clusters": num_clusters,
                                "workers": nodes * WORKERS_PER_NODE,
                                "nodes": nodes,
                                "rewards_per_step": nodes * rewards,
                                "rewards_per_second_of_a_worker": rate,
                                "ahead": ahead,
                                "rewards_per_second": found,
                                "step_s": step_s,
                                "merging_s": (nodes - 1) * spent.merge_s,
                                "received_bytes_per_second": (nodes - 1)
                                * spent.delta_bytes
                                / step_s,
                                "missing_rewards": {
                                    "mean": float(stale.mean()),
                                    "max": int(stale.max()),
                                },
                                "missing_steps": float(stale.mean()) / (nodes * rewards),
                            }
                        )
                        print(rows[-1], flush=True)
    return rows


def rewards_of(kind: str, rng: np.random.Generator, clusters: NDArray[Any], step: int) -> Any:
    """Rewards of a kind [N]: those of a cluster lie about a level of its own."""
    level = clusters % 7
    if kind == "0 or 1":
        return (rng.random(len(clusters)) < (1 + level) / 8).astype(float)
    risen = step / STEPS if kind == "rising" else 0.0
    return 8 + level + risen + rng.normal(size=len(clusters))


def error(kind: str, nodes: int, calls: int, num_clusters: int) -> dict[str, Any]:
    """How far advantages by histories that lack the newest deltas are from exact ones.

    Args:
        kind: of the rewards: `steady`, normal with deviation 1; `rising`, the same, of which the mean
            rises by one deviation in the course of all steps; or `0 or 1`.
        nodes: number of nodes.
        calls: of each node in each step.
        num_clusters: K.
    """
    rng = np.random.default_rng(0)
    upper = shares(num_clusters).cumsum()
    exact = ClusterNormalizer()
    folder = Path(tempfile.mkdtemp(prefix="pgrpo-scale-", dir="/dev/shm"))
    late = {lag: NodeHistories(folder / str(lag), "0", capacity=num_clusters) for lag in LAGS}
    counts = np.zeros(num_clusters, np.int64)
    known = {lag: np.zeros(num_clusters, np.int64) for lag in LAGS}
    mail: deque[tuple[list[Delta], NDArray[np.int64]]] = deque(maxlen=max(LAGS) + 1)
    seen: dict[str, list[NDArray[Any]]] = {"count": [], "exact": []}
    advantages: dict[int, list[NDArray[Any]]] = {lag: [] for lag in LAGS}
    missing: dict[int, list[NDArray[Any]]] = {lag: [] for lag in LAGS}
    merging: list[float] = []
    sizes: list[int] = []
    try:
        for step in range(STEPS):
            for lag, node in late.items():
                if len(mail) > lag:
                    deltas, folded = mail[-1 - lag]
                    begin = time.process_time()
                    new = [node.merge(delta) for delta in deltas]
                    merging.append((time.process_time() - begin) / len(deltas))
                    assert all(new)
                    known[lag] += folded
                    if step % COMPACTED == 0:
                        node.compact(step - 1 - lag)
            # [calls, nodes, CALL], so that the first axis is time.
            shape = calls, nodes, CALL
            clusters = np.searchsorted(upper, rng.random(shape).ravel(), side="right")
            clusters = np.minimum(clusters, num_clusters - 1).astype(np.int64)
            rewards = rewards_of(kind, rng, clusters, step).reshape(shape)
            clusters = clusters.reshape(shape)
            for values, ids in zip(rewards, clusters, strict=True):
                exact.update(values[1:].ravel(), ids[1:].ravel())
                np.add.at(counts, ids.ravel(), 1)
                true = exact.advantages(values[0], ids[0])
                if step >= STEPS - OBSERVED:
                    seen["count"].append(counts[ids[0]])
                    seen["exact"].append(true)
                for lag, node in late.items():
                    found = node.advantages(step, values[0], ids[0])
                    np.add.at(known[lag], ids[0], 1)
                    if step >= STEPS - OBSERVED:
                        advantages[lag].append(found)
                        missing[lag].append(counts[ids[0]] - known[lag][ids[0]])
            for node in late.values():
                node.seal(step)
            deltas = []
            for number in range(1, nodes):
                own = ClusterNormalizer()
                own.update(rewards[:, number].ravel(), clusters[:, number].ravel())
                sizes.append(len(np.unique(clusters[:, number])))
                own.save(folder / "delta")
                deltas.append(Delta(step, str(number), (folder / "delta").read_bytes()))
            mail.append((deltas, np.bincount(clusters[:, 1:].ravel(), minlength=num_clusters)))
    finally:
        shutil.rmtree(folder)
    count, true = (np.concatenate(seen[key]) for key in ("count", "exact"))
    rows: list[dict[str, Any]] = []
    for lag in LAGS:
        squares = (np.concatenate(advantages[lag]) - true) ** 2
        lacking = np.concatenate(missing[lag])
        theory = 1.5 * lacking / (count * (count - lacking))
        for power in range(10):
            of = (count >= 4**power) & (count < 4 ** (power + 1))
            if of.sum() >= 100:
                rows.append(
                    {
                        "lag_steps": lag,
                        "rewards_per_cluster": [4**power, 4 ** (power + 1) - 1],
                        "mean_rewards_per_cluster": float(np.exp(np.log(count[of]).mean())),
                        "advantages": int(of.sum()),
                        "missing_share": float(lacking[of].sum() / count[of].sum()),
                        "error": float(np.sqrt(squares[of].mean()) / true.std()),
                        "theory": float(np.sqrt(theory[of].mean()) / true.std())
                        if kind == "steady"
                        else None,
                    }
                )
        rows.append(
            {
                "lag_steps": lag,
                "rewards_per_cluster": None,
                "advantages": len(count),
                "missing_share": float(lacking.sum() / count.sum()),
                "error": float(np.sqrt(squares.mean()) / true.std()),
            }
        )
    return {
        "kind": kind,
        "rows": rows,
        "clusters_per_delta": statistics.mean(sizes),
        "merge_s": statistics.median(merging),
    }


@dataclass(frozen=True)
class Panel:
    """A chart with logarithmic axes, as parts of an SVG."""

    left: float
    title: str
    x_title: str
    x_powers: tuple[int, int]
    """The axis goes from 10 to the first to 10 to the second power."""
    y_powers: tuple[int, int]
    top: float = 64
    width: float = 400
    height: float = 300

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Where a point lies."""
        (x_low, x_high), (y_low, y_high) = self.x_powers, self.y_powers
        return (
            self.left + self.width * (math.log10(x) - x_low) / (x_high - x_low),
            self.top + self.height * (y_high - math.log10(y)) / (y_high - y_low),
        )

    def axes(self) -> list[str]:
        """Title, grid and numbers."""
        parts = [
            text(self.left - 36, self.top - 24, self.title, weight="bold"),
            text(self.left + self.width / 2, self.top + self.height + 42, self.x_title, "middle"),
        ]
        for power in range(self.x_powers[0], self.x_powers[1] + 1):
            x, y = self.place(10**power, 10 ** self.y_powers[0])
            parts += [stroke([(x, y), (x, self.top)], GRID_COLOR, 1)]
            parts += [text(x, y + 20, power_of_ten(power), "middle")]
        for power in range(self.y_powers[0], self.y_powers[1] + 1):
            x, y = self.place(10 ** self.x_powers[0], 10**power)
            parts += [stroke([(x, y), (x + self.width, y)], GRID_COLOR, 1)]
            parts += [text(x - 8, y + 4, power_of_ten(power), "end")]
        return parts

    def curve(self, points: list[tuple[float, float]], color: str, dashes: str = "") -> str:
        """A line through points."""
        return stroke([self.place(*point) for point in points], color, 2, dashes)


def power_of_ten(power: int) -> str:
    """A number of an axis."""
    return f"10^{power}" if abs(power) > 3 else f"{10.0**power:,g}"


def stroke(places: list[tuple[float, float]], color: str, width: float, dashes: str = "") -> str:
    """A line of an SVG."""
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return (
        f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="{width}" '
        f'stroke-dasharray="{dashes}"/>'
    )


def text(x: float, y: float, words: str, anchor: str = "start", weight: str = "normal") -> str:
    """Words of an SVG; `^` raises the rest."""
    plain, _, raised = words.partition("^")
    if raised:
        plain += f'<tspan dy="-5" font-size="9">{raised}</tspan>'
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}">{plain}</text>'


def picture(result: dict[str, Any]) -> str:
    """Both results as an SVG."""
    error_panel = Panel(
        64, "Error of the advantage, in its deviations", "rewards of the cluster", (0, 6), (-4, 0)
    )
    parts = error_panel.axes()
    legend: list[tuple[float, str, str, str]] = []
    for lag, color in zip(LAGS, ARM_COLORS, strict=False):
        for kind, dashes in (("steady", ""), ("rising", "7 4")):
            (found,) = (entry for entry in result["error"] if entry["kind"] == kind)
            rows = [
                row
                for row in found["rows"]
                if row["lag_steps"] == lag and row["rewards_per_cluster"] is not None
            ]
            at = [row["mean_rewards_per_cluster"] for row in rows]
            parts.append(
                error_panel.curve(
                    [(x, row["error"]) for x, row in zip(at, rows, strict=True)], color, dashes
                )
            )
            if kind == "steady":
                parts += [
                    f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="none" stroke="{color}"/>'
                    for x, y in (error_panel.place(row["mean_rewards_per_cluster"], row["theory"])
                                 for row in rows)
                ]  # fmt: skip
        late = f"{lag} steps late" if lag != 1 else "1 step late"
        legend.append(
            (64, color, "", "deltas merged once sealed" if lag == 0 else f"deltas merged {late}")
        )
    legend += [(64, "#555", "7 4", "the same, where rewards rise by one deviation in 64 steps")]
    rate_panel = Panel(
        600, "Rewards a second of all workers, 10⁶ clusters", "reward workers", (0, 3), (2, 7)
    )
    parts += rate_panel.axes()
    workers = sorted({row["workers"] for row in result["throughput"]})
    goal = [(1.0, 1e6), (1e3, 1e6)]
    parts.append(rate_panel.curve(goal, "#555", "2 4"))
    for (rate, calls, ahead), color, words in zip(
        ((None, 16, 0), (None, 1, 0), (1000.0, 16, 1), (1000.0, 16, 0), (100.0, 16, 0)),
        ARM_COLORS,
        (
            "scored in no time, each worker 1,024 a step",
            "scored in no time, each worker 64 a step",
            "each worker scores 1,000 a second, 1,024 a step, going on meanwhile",
            "the same, waiting for the exchange after each step",
            "each worker scores 100 a second, 1,024 a step, waiting",
        ),
        strict=False,
    ):
        rows = [
            row
            for row in result["throughput"]
            if row["clusters"] == 1_000_000
            and row["rewards_per_second_of_a_worker"] == rate
            and row["ahead"] == ahead
            and row["rewards_per_step"] == row["workers"] * calls * CALL
        ]
        assert [row["workers"] for row in rows] == workers
        parts.append(
            rate_panel.curve([(row["workers"], row["rewards_per_second"]) for row in rows], color)
        )
        legend.append((600, color, "", words))
    legend.append((600, "#555", "2 4", "10⁶ rewards a second"))
    lines: dict[float, int] = {}
    for left, color, dashes, words in legend:
        y = 432 + 20 * lines.setdefault(left, 0)
        lines[left] += 1
        parts += [
            stroke([(left, y), (left + 34, y)], color, 2, dashes),
            text(left + 44, y + 4, words),
        ]
    parts += ['<circle cx="81" cy="532" r="4" fill="none" stroke="#555"/>']
    parts += [text(108, 536, "theory for steady rewards")]
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" width="1040" height="560" viewBox="0 0 1040 560" '
        'font-family="sans-serif" font-size="12" fill="#222">\n'
        '<rect width="1040" height="560" fill="#fff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def main() -> None:
    """Run both, print and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    here = Path(__file__).parent
    parser.add_argument("--measured", type=Path, default=here / "results" / "stream.json")
    parser.add_argument("--steps", type=int, default=24, help="of the simulation by events")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    measured = json.loads(options.measured.read_text())
    nodes, calls, num_clusters = 125, 16, 1_000_000
    errors = []
    for kind in ("steady", "rising", "0 or 1"):
        errors.append(error(kind, nodes, calls, num_clusters))
        print(errors[-1], flush=True)
    rows = throughput(measured, options.steps)
    result: dict[str, Any] = {
        "date": history.today(),
        "processor": processor_name(),
        "measured": measured["date"],
        # Of the real histories, and what the simulation by events would reckon.
        "merge_s": statistics.median(found["merge_s"] for found in errors),
        "merge_s_reckoned": costs(measured, num_clusters, calls * CALL).merge_s,
        "throughput": rows,
        "error": errors,
    }
    ratios = {"a merge, seen against reckoned": result["merge_s"] / result["merge_s_reckoned"]}
    if options.out:
        history.write(options.out, "scale_simulation", result, ratios)
    if options.figure:
        options.figure.write_text(picture(result), "utf-8")


if __name__ == "__main__":
    main()
