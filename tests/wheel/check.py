"""Checks the pgrpo that is installed, with NumPy and the standard library alone.

    python tests/wheel/check.py

Runs every function of CHECKS, then computes the same results once more under each kernel that
PGRPO_SIMD can force and compares. `--results FILE` only computes and stores them.
"""

from __future__ import annotations

import copy
import importlib.metadata
import json
import os
import pickle
import platform
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import pgrpo

IMPORTED = set(sys.modules)  # before a check imports anything
KERNELS = ("baseline", "avx2")
"""Values of PGRPO_SIMD; one that the processor lacks must fall back, not crash."""
EPS = 1e-4
TOLERANCE = 1e-12
"""Of a result against its oracle, relative to the largest."""


def assert_close(actual: object, expected: object, what: str, tolerance: float = TOLERANCE) -> None:
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, not {expected.shape}"
    if actual.size:
        error = np.abs(actual - expected).max() / max(np.abs(expected).max(), 1.0)
        assert error <= tolerance, f"{what}: off by {error:.1e}, more than {tolerance:.0e}"


# Two passes over all rewards in float64: what running statistics must agree with.


def by_key(keys: np.ndarray, rule: Callable[[np.ndarray], np.ndarray], rewards: np.ndarray):
    out = np.empty(len(rewards))
    for key in np.unique(keys):
        out[keys == key] = rule(rewards[keys == key])
    return out


def standardized(r: np.ndarray) -> np.ndarray:
    deviations = r - r.mean()
    return deviations / (np.sqrt((deviations**2).mean()) + EPS)


def pgrpo_oracle(rewards, clusters, groups, past):
    """`past`: rewards and clusters of the earlier calls."""
    everything = np.concatenate([past[0], rewards])
    keys = np.concatenate([past[1], clusters])
    return by_key(keys, standardized, everything)[len(past[0]) :]


ORACLES: dict[str, Callable[..., np.ndarray]] = {
    "pgrpo": pgrpo_oracle,
    "grpo": lambda r, clusters, groups, past: by_key(groups, standardized, r),
    "dr_grpo": lambda r, clusters, groups, past: by_key(groups, lambda g: g - g.mean(), r),
    "rloo": lambda r, clusters, groups, past: by_key(
        groups, lambda g: (g - g.mean()) * (len(g) / max(len(g) - 1, 1)), r
    ),
    "batch": lambda r, clusters, groups, past: standardized(r),
}


def batches(sizes=(1, 7, 64, 257, 10_000), num_clusters=5, seed=0):
    """Rewards, clusters and ragged groups; 10 000 is large enough to leave the interpreter."""
    rng = np.random.default_rng(seed)
    for size in sizes:
        clusters = rng.integers(0, num_clusters, size)
        groups = np.sort(rng.integers(0, max(size // 4, 1), size))
        yield rng.normal(clusters - 2.0, 1.0 + clusters), clusters, groups


def results() -> dict[str, np.ndarray]:
    """Advantages of several batches by every estimator, and the histories they leave."""
    found = {}
    for estimator in ORACLES:
        normalizer = pgrpo.ClusterNormalizer(estimator, eps=EPS)
        for call, batch in enumerate(batches()):
            found[f"{estimator}-{call}"] = normalizer(*batch)
            # Few cells of float32 have a kernel of their own, rounded otherwise.
            rewards, clusters, groups = batch
            plain = rewards.astype(np.float32), clusters.astype(np.int32), groups
            narrow = pgrpo.ClusterNormalizer(estimator, eps=EPS)(*plain)
            found[f"{estimator}-{call}-float32"] = narrow
        stats = normalizer.snapshot()
        found[f"{estimator}-history"] = np.array(
            [[s.count, s.mean, s.std] for _, s in sorted(stats.items())]
        )
    return found


# The checks.


def nothing_else_is_needed():
    heavy = {"torch", "transformers", "pydantic", "pluggy", "sklearn", "scipy", "vllm"}
    assert not IMPORTED & heavy, f"import pgrpo imports {sorted(IMPORTED & heavy)}"
    tools = {"pip", "setuptools", "wheel"}
    names = {d.metadata["Name"].lower() for d in importlib.metadata.distributions()} - tools
    assert names == {"numpy", "pgrpo"}, f"the environment holds {sorted(names)}"


def installed_files():
    version = importlib.metadata.version("pgrpo")
    assert pgrpo.__version__ == version, f"{pgrpo.__version__}, but metadata say {version}"
    home = Path(pgrpo.__file__).resolve()
    site = Path(sysconfig.get_path("platlib")).resolve()
    assert site in home.parents, f"pgrpo comes from {home}, not from {site}"
    listed = [Path(str(f)) for f in importlib.metadata.files("pgrpo") or []]
    files = [f for f in listed if f.suffix != ".pyc"]
    pages = [
        f"report/templates/{name}" for name in ("page.html", "blocks.html", "page.css", "page.js")
    ]
    template = [
        f"plugins/template/{name}"
        for name in ("README.md", "my_plugin.py", "pyproject.toml", "run.toml", "test_my_plugin.py")
    ]
    configs = [
        f"experiments/{name}.toml" for name in ("demo", "electricity", "movielens-100k-candidates")
    ]
    for name in ("py.typed", "normalizer/_core.pyi", *configs, *pages, *template):
        needed = f"pgrpo/{name}"
        assert Path(needed) in files, f"{needed} is missing"
    assert any(f.name == "LICENSE" for f in files), "LICENSE is missing"
    native = [f.name for f in files if f.suffix in {".so", ".pyd", ".dylib", ".dll"}]
    assert [name.split(".")[0] for name in native] == ["_core"], f"native files: {native}"
    plain = {".py", ".pyi", ".typed", ".toml", ".css", ".html", ".js", ".so", ".pyd"}
    stray = [
        str(f)
        for f in files
        if not (
            (f.parts[0] == "pgrpo" and f.suffix in plain and "test" not in str(f))
            or f.as_posix().removeprefix("pgrpo/") in template
            or f.parts[0] == f"pgrpo-{version}.dist-info"
            or f.stem == "pgrpo"  # the command
        )
    ]
    assert not stray, f"stray files: {stray}"


def free_of_the_gil():
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        enabled: Any = vars(sys)["_is_gil_enabled"]  # from 3.13 on
        assert not enabled(), "importing pgrpo switched the GIL on"


def three_lines():
    normalizer = pgrpo.ClusterNormalizer()
    advantages = normalizer([1.0, 0.0, 0.0, 1.0], ["north", "north", "south", "south"])
    assert isinstance(advantages, list)
    assert_close(advantages, np.array([1, -1, -1, 1]) * 0.5 / (0.5 + EPS), "three lines")


def estimators_against_two_passes():
    for estimator, oracle in ORACLES.items():
        normalizer = pgrpo.ClusterNormalizer(estimator, eps=EPS)
        past = (np.empty(0), np.empty(0, np.int64))
        for rewards, clusters, groups in batches():
            expected = oracle(rewards, clusters, groups, past)
            # A group of one has no deviation; eps keeps its 0 a 0 in the oracle too.
            assert_close(normalizer(rewards, clusters, groups), expected, estimator)
            past = (np.concatenate([past[0], rewards]), np.concatenate([past[1], clusters]))
        for cluster, stats in normalizer.snapshot().items():
            seen = past[0][past[1] == cluster]
            assert stats.count == len(seen), f"{estimator}: {stats.count} of {len(seen)} rewards"
            assert_close([stats.mean, stats.std], [seen.mean(), seen.std()], "history")


def kinds_of_rewards_and_ids():
    rewards = np.array([1.0, 0.0, 0.25, 1.0, 0.5])
    ids = np.array([3, 3, 9, 9, 3])
    expected = pgrpo.ClusterNormalizer(eps=EPS)(rewards, ids)
    assert expected.dtype == np.float64
    for dtype in (np.int32, np.int64):
        assert_close(pgrpo.ClusterNormalizer(eps=EPS)(rewards, ids.astype(dtype)), expected, "ids")
    names = np.array(["a", "b"])[(ids == 9).astype(int)]
    for strings in (names, names.tolist()):
        assert_close(pgrpo.ClusterNormalizer(eps=EPS)(rewards, strings), expected, "strings")
    narrow = pgrpo.ClusterNormalizer(eps=EPS)(rewards.astype(np.float32), ids)
    assert narrow.dtype == np.float32
    assert_close(narrow, expected, "float32", 1e-6)
    strided = np.repeat(rewards, 2)[::2]
    assert_close(pgrpo.ClusterNormalizer(eps=EPS)(strided, ids), expected, "strided rewards")
    mixed = pgrpo.ClusterNormalizer()
    mixed.update([1.0, 2.0, 3.0], [1, "1", -(2**40)])
    counts = {cluster: stats.count for cluster, stats in mixed.snapshot().items()}
    assert counts == {1: 1, "1": 1, -(2**40): 1}, counts


def errors_name_both_lengths():
    normalizer = pgrpo.ClusterNormalizer()
    try:
        normalizer([1.0, 2.0, 3.0], [0, 1])
    except pgrpo.DataError as error:
        assert "3" in str(error) and "2" in str(error), str(error)
    else:
        raise AssertionError("3 rewards of 2 clusters were accepted")
    assert normalizer.snapshot() == {}, "a refused batch was folded"


def threads_share_one_normalizer():
    num_threads, num_calls = 8, 40
    normalizer = pgrpo.ClusterNormalizer()
    parts = [list(batches([64, 5_000], seed=s)) for s in range(num_threads)]
    start, failures = threading.Barrier(num_threads), []

    def work(part):
        try:
            start.wait()
            for call in range(num_calls):
                rewards, clusters, _ = part[call % 20 == 0]
                advantages = normalizer(rewards, clusters)
                assert np.isfinite(advantages).all(), "an advantage is not finite"
        except BaseException as error:  # raised below, in the main thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(part,)) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    folded = [part[call % 20 == 0] for part in parts for call in range(num_calls)]
    rewards = np.concatenate([batch[0] for batch in folded])
    clusters = np.concatenate([batch[1] for batch in folded])
    for cluster, stats in normalizer.snapshot().items():
        seen = rewards[clusters == cluster]
        assert stats.count == len(seen), f"cluster {cluster}: {stats.count} of {len(seen)}"
        assert_close([stats.mean, stats.std], [seen.mean(), seen.std()], "history of threads")


def states_round_trip():
    normalizer, other = pgrpo.ClusterNormalizer(), pgrpo.ClusterNormalizer()
    normalizer.update([1.0, 0.5, 0.1, 0.7], [1, "1", 1, "one"])
    other.load_state_dict(json.loads(json.dumps(normalizer.state_dict())))
    assert other.snapshot() == normalizer.snapshot(), "JSON changed the histories"
    assert copied(normalizer).snapshot() == normalizer.snapshot(), "a copy differs"


def copied(normalizer):
    restored = pickle.loads(pickle.dumps(normalizer))
    assert copy.deepcopy(normalizer).snapshot() == restored.snapshot()
    return restored


def shards_merge_to_the_whole():
    whole, left, right = (pgrpo.ClusterNormalizer() for _ in range(3))
    for at, (rewards, clusters, _) in enumerate(batches()):
        whole.update(rewards, clusters)
        (left if at % 2 else right).update(rewards, clusters)
    left.merge(right)
    merged, expected = left.snapshot(), whole.snapshot()
    assert merged.keys() == expected.keys()
    for cluster, stats in expected.items():
        assert merged[cluster].count == stats.count
        assert_close(
            [merged[cluster].mean, merged[cluster].std], [stats.mean, stats.std], "merged history"
        )


CHECKS = (
    nothing_else_is_needed,
    installed_files,
    free_of_the_gil,
    three_lines,
    estimators_against_two_passes,
    kinds_of_rewards_and_ids,
    errors_name_both_lengths,
    threads_share_one_normalizer,
    states_round_trip,
    shards_merge_to_the_whole,
)


def kernels_agree():
    """A kernel is chosen once per process, so each needs one of its own."""
    expected = results()
    with tempfile.TemporaryDirectory() as folder:
        for kernel in KERNELS:
            file = Path(folder, f"{kernel}.npz")
            command = [sys.executable, "-I", __file__, "--results", str(file)]
            subprocess.run(command, env={**os.environ, "PGRPO_SIMD": kernel}, check=True)
            with np.load(file) as found:
                assert set(found) == set(expected)
                for name, values in expected.items():
                    tolerance = 4e-7 if name.endswith("float32") else TOLERANCE
                    assert_close(found[name], values, f"PGRPO_SIMD={kernel}: {name}", tolerance)


def main(arguments: list[str]) -> None:
    if arguments:
        option, file = arguments
        assert option == "--results", f"{option} is no option; expected --results FILE"
        arrays: dict[str, Any] = dict(results())
        np.savez(file, **arrays)
        return
    for check in (*CHECKS, kernels_agree):
        try:
            check()
        except AssertionError as error:
            sys.exit(f"{check.__name__}: {error}")
    print(
        f"  ok: pgrpo {pgrpo.__version__}, NumPy {np.__version__}, {platform.python_implementation()} "
        f"{platform.python_version()} {platform.machine()}, {len(CHECKS) + 1} checks"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
