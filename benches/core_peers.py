"""What the core is measured against: the same job in NumPy, numba, torch and plain Python, and the
memory itself.

The job: fold a batch, rewards [N] float32 and cluster ids [N] int32, into per-cluster histories
(count, mean, m2; float64) that stay between batches, and write (r - mean_p) / (sigma_p + eps) by the
histories that hold the batch into `out`, [N] float32. Sums are taken of the rewards less the cluster's
running mean, so that no peer trades accuracy for speed. All run on one thread.
"""

from __future__ import annotations

import ctypes
import math
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import rules
import torch
from numba import njit
from numpy.typing import NDArray

Float32s: TypeAlias = NDArray[np.float32]
Float64s: TypeAlias = NDArray[np.float64]
Int32s: TypeAlias = NDArray[np.int32]

EPS = 1e-4


@dataclass(frozen=True)
class Contender:
    """A call as it is timed: an expression over `rewards`, `clusters`, `out` and names of its own."""

    call: str
    names: dict[str, Any]
    histories: Callable[[], Float64s] | None = None
    """[3, K]: count, mean and standard deviation of each cluster; None if it does another job."""


def peers(num_clusters: int) -> dict[str, Contender]:
    """Every peer with empty histories, by name."""
    arrays = dict(zip("abcdefg", np.zeros((7, num_clusters)), strict=True))
    table = np.zeros((num_clusters, 8))
    plain: list[NumpyPeer | DictPeer | TorchPeer] = [
        NumpyPeer(num_clusters),
        DictPeer(num_clusters),
        TorchPeer(num_clusters),
    ]
    return {
        # The loops get their state as arguments: one array costs a call 55 ns.
        "numba, arrays": Contender(
            "step(rewards, clusters, out, a, b, c, d, e, f, g)",
            {"step": loop_arrays, **arrays},
            lambda: histories(*list(arrays.values())[:3]),
        ),
        "numba, table": Contender(
            "step(rewards, clusters, out, table)",
            {"step": loop_table, "table": table},
            lambda: histories(*table.T[:3]),
        ),
        **{
            peer.name: Contender("step(rewards, clusters, out)", {"step": peer}, peer.histories)
            for peer in plain
        },
    }


def histories(count: Float64s, mean: Float64s, m2: Float64s) -> Float64s:
    """[3, K]: count, mean and standard deviation."""
    return np.stack([count, mean, np.sqrt(m2 / np.maximum(count, 1.0))])


@njit(nogil=True)
def loop_arrays(
    rewards: Float32s,
    clusters: Int32s,
    out: Float32s,
    count: Float64s,
    mean: Float64s,
    m2: Float64s,
    scale: Float64s,
    batch_count: Float64s,
    batch_sum: Float64s,
    batch_squares: Float64s,
) -> None:
    """The job as a loop over one array [K] for each number."""
    for p in range(count.size):
        batch_count[p] = 0.0
        batch_sum[p] = 0.0
        batch_squares[p] = 0.0
    for i in range(rewards.size):
        p = np.uint32(clusters[i])  # unsigned, or each access asks for a negative index
        d = rewards[i] - mean[p]
        batch_count[p] += 1.0
        batch_sum[p] += d
        batch_squares[p] += d * d
    for p in range(count.size):
        n = batch_count[p]
        if n > 0.0:
            total = count[p] + n
            d = batch_sum[p] / n
            m2[p] += batch_squares[p] - batch_sum[p] * d + d * d * count[p] * n / total
            mean[p] += batch_sum[p] / total
            count[p] = total
            scale[p] = 1.0 / (math.sqrt(m2[p] / total) + EPS)
    for i in range(rewards.size):
        p = np.uint32(clusters[i])
        out[i] = (rewards[i] - mean[p]) * scale[p]


@njit(nogil=True)
def loop_table(rewards: Float32s, clusters: Int32s, out: Float32s, table: Float64s) -> None:
    """The same loop over one table [K, 8], a cache line per cluster.

    Columns: count, mean, m2, scale and the batch's count, sum and sum of squares.
    """
    for p in range(table.shape[0]):
        table[p, 4] = 0.0
        table[p, 5] = 0.0
        table[p, 6] = 0.0
    for i in range(rewards.size):
        p = np.uint32(clusters[i])
        d = rewards[i] - table[p, 1]
        table[p, 4] += 1.0
        table[p, 5] += d
        table[p, 6] += d * d
    for p in range(table.shape[0]):
        n = table[p, 4]
        if n > 0.0:
            total = table[p, 0] + n
            d = table[p, 5] / n
            table[p, 2] += table[p, 6] - table[p, 5] * d + d * d * table[p, 0] * n / total
            table[p, 1] += table[p, 5] / total
            table[p, 0] = total
            table[p, 3] = 1.0 / (math.sqrt(table[p, 2] / total) + EPS)
    for i in range(rewards.size):
        p = np.uint32(clusters[i])
        out[i] = (rewards[i] - table[p, 1]) * table[p, 3]


class NumpyPeer:
    """The job in vectorised NumPy: `bincount`, then gathers.

    In blocks, so that temporaries stay in the cache: whole arrays take up to three times as long.
    `np.add.at` is no faster.
    """

    name = "NumPy"
    block = 16384

    def __init__(self, num_clusters: int) -> None:
        self.count, self.mean, self.m2 = np.zeros((3, num_clusters))

    def __call__(self, rewards: Float32s, clusters: Int32s, out: Float32s) -> None:
        blocks = [slice(i, i + self.block) for i in range(0, len(rewards), self.block)]
        sums = [self._sums(rewards[b], clusters[b]) for b in blocks]
        n, s, squares = sums[0] if len(sums) == 1 else np.sum(sums, axis=0)
        total = self.count + n
        d = s / np.maximum(n, 1.0)
        seen = np.maximum(total, 1.0)
        self.m2 += squares - s * d + d * d * (self.count * n / seen)
        self.mean += s / seen
        self.count = total
        scale = 1.0 / (np.sqrt(self.m2 / seen) + EPS)
        for b in blocks:
            index = clusters[b].astype(np.intp)
            centred = rewards[b] - self.mean.take(index)
            np.multiply(centred, scale.take(index), out=out[b], casting="same_kind")

    def _sums(self, rewards: Float32s, clusters: Int32s) -> tuple[NDArray[Any], ...]:
        index, k = clusters.astype(np.intp), len(self.count)
        d = rewards - self.mean.take(index)
        return np.bincount(index, None, k), np.bincount(index, d, k), np.bincount(index, d * d, k)

    def histories(self) -> Float64s:
        return histories(self.count, self.mean, self.m2)


class DictPeer:
    """The job as plain Python: Welford's algorithm in a dict."""

    name = "dict loop"

    def __init__(self, num_clusters: int) -> None:
        self.num_clusters = num_clusters
        self.rows: dict[int, list[float]] = {}

    def __call__(self, rewards: Float32s, clusters: Int32s, out: Float32s) -> None:
        rows, values, ids = self.rows, rewards.tolist(), clusters.tolist()
        for r, p in zip(values, ids, strict=True):
            row = rows.get(p)
            if row is None:
                rows[p] = [1.0, r, 0.0]
            else:
                row[0] += 1.0
                d = r - row[1]
                row[1] += d / row[0]
                row[2] += d * (r - row[1])
        sqrt = math.sqrt
        out[:] = [
            (r - mean) / (sqrt(m2 / n) + EPS)
            for r, (n, mean, m2) in zip(values, map(rows.__getitem__, ids), strict=True)
        ]

    def histories(self) -> Float64s:
        rows = [self.rows.get(p, [0.0] * 3) for p in range(self.num_clusters)]
        return histories(*np.array(rows).T)


class TorchPeer:
    """The job in torch: `index_add_` and `index_select` in float64."""

    name = "torch"

    def __init__(self, num_clusters: int) -> None:
        torch.set_num_threads(1)
        self.count, self.mean, self.m2 = torch.zeros(3, num_clusters, dtype=torch.float64)

    @torch.inference_mode()
    def __call__(self, rewards: Float32s, clusters: Int32s, out: Float32s) -> None:
        r, index = torch.from_numpy(rewards), torch.from_numpy(clusters)
        d = r.double().sub_(self.mean.index_select(0, index))
        # As exact as adding ones by index, and faster.
        n = torch.bincount(index, minlength=len(self.count)).double()
        s, squares = torch.zeros(2, len(self.count), dtype=torch.float64)
        s.index_add_(0, index, d)
        squares.index_add_(0, index, d.square_())
        total = self.count + n
        d = s / n.clamp(min=1.0)
        seen = total.clamp(min=1.0)
        self.m2 += squares - s * d + d * d * (self.count * n / seen)
        self.mean += s / seen
        self.count = total
        scale = 1.0 / ((self.m2 / seen).sqrt() + EPS)
        centred = r.double().sub_(self.mean.index_select(0, index))
        torch.mul(centred, scale.index_select(0, index), out=torch.from_numpy(out))

    def histories(self) -> Float64s:
        return histories(self.count.numpy(), self.mean.numpy(), self.m2.numpy())


def rules_of_others(num_groups: int, group_size: int) -> dict[str, Contender]:
    """GRPO of TRL and vectorised GRPO of verl, of rewards [P, G] as of completions of one token."""
    trl, verl = rules.folder_of("trl"), rules.folder_of("verl")
    if trl is None or verl is None:
        raise SystemExit("TRL and verl are wanted: make bench-core installs them")
    function = rules.verl_rules(verl).compute_grpo_vectorized_outcome_advantage
    names = {
        "rule": function,
        "mask": torch.ones(num_groups * group_size, 1),
        "index": np.repeat(np.arange(num_groups), group_size),
    }
    of_trl = {"rule": rules.trl_rule(trl), "group_size": group_size}
    return {
        "TRL": Contender("rule(rewards.view(-1, 1), group_size)", of_trl),
        "verl": Contender("rule(rewards.view(-1, 1), mask, index)[0]", names),
    }


@njit(nogil=True)
def spin(steps: int) -> np.uint64:
    """A chain of integer steps: computing that needs no memory."""
    x = np.uint64(88172645463325252)
    for _ in range(steps):
        x ^= x << np.uint64(13)
        x ^= x >> np.uint64(7)
        x ^= x << np.uint64(17)
    return x


MEMORY_SOURCE = """
#include <stddef.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__AVX512F__)
#define BYTES 64
#define STREAM(to, value) _mm512_stream_si512((void *)(to), (__m512i)(value))
#elif defined(__AVX__)
#define BYTES 32
#define STREAM(to, value) _mm256_stream_si256((void *)(to), (__m256i)(value))
#elif defined(__SSE2__)
#define BYTES 16
#define STREAM(to, value) _mm_stream_si128((void *)(to), (__m128i)(value))
#else
#define BYTES 16
#define STREAM(to, value) (*(to) = (value))
#endif
typedef int V __attribute__((vector_size(BYTES), may_alias));

int read_pass(const V *a, const V *b, size_t bytes) {
    V w = {0}, x = {0}, y = {0}, z = {0};
    for (size_t i = 0; i < bytes / BYTES; i += 2)
        w += a[i], x += b[i], y += a[i + 1], z += b[i + 1];
    w += x + y + z;
    return w[0] + w[1] + w[2] + w[3];
}

void triad(const V *a, const V *b, V *out, size_t bytes) {
    for (size_t i = 0; i < bytes / BYTES; i++) STREAM(out + i, a[i] + b[i]);
#if defined(__x86_64__)
    _mm_sfence();
#endif
}
"""


class Memory:
    """What two passes over a batch take if nothing is computed.

    `read` reads rewards and ids once; `triad` reads both and writes `out` past the cache. Compiled
    with the system's `cc -O3 -march=native`, for the widest vectors there are.
    """

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as name:
            source, library = Path(name) / "memory.c", Path(name) / "memory.so"
            source.write_text(MEMORY_SOURCE)
            command = ["cc", "-O3", "-march=native", "-shared", "-fPIC"]
            subprocess.run([*command, "-o", str(library), str(source)], check=True)
            self._library = ctypes.CDLL(str(library))

    def read(self, rewards: Float32s, clusters: Int32s) -> None:
        self._library.read_pass(*_pointers(rewards, clusters), ctypes.c_size_t(rewards.nbytes))

    def triad(self, rewards: Float32s, clusters: Int32s, out: Float32s) -> None:
        self._library.triad(*_pointers(rewards, clusters, out), ctypes.c_size_t(rewards.nbytes))


def _pointers(*arrays: NDArray[Any]) -> Iterator[ctypes.c_void_p]:
    for array in arrays:
        # Vectors of 64 bytes, two at a time.
        if array.ctypes.data % 64 or array.nbytes % 128:
            raise ValueError(
                f"array of {array.nbytes} bytes at {array.ctypes.data:#x}; expected a multiple of "
                "128 bytes at a multiple of 64"
            )
        yield ctypes.c_void_p(array.ctypes.data)


def aligned(values: NDArray[Any]) -> NDArray[Any]:
    """A copy that starts at a cache line."""
    space = np.empty(values.nbytes + 64, np.uint8)
    start = -space.ctypes.data % 64
    array = space[start : start + values.nbytes].view(values.dtype)
    array[:] = values
    return array
