"""ClusterNormalizer as users meet it: kinds of input, ids, errors, state, threads."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from enum import IntEnum
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pgrpo import CheckpointError, ClusterNormalizer, ClusterStats, ConfigError, DataError

REWARDS = [1.0, 0.0, 4.0, 2.0]
CLUSTERS = ["ada", "ada", 7, 7]
EXPECTED = [0.5 / 0.5001, -0.5 / 0.5001, 1 / 1.0001, -1 / 1.0001]


def test_importing_needs_numpy_alone() -> None:
    heavy = "torch", "transformers", "pydantic", "pluggy", "sklearn", "tomli_w"
    code = f"import sys, pgrpo; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_lists_give_a_list() -> None:
    for rewards in (REWARDS, tuple(REWARDS)):
        advantages = ClusterNormalizer()(rewards, CLUSTERS)
        assert type(advantages) is list
        assert all(type(advantage) is float for advantage in advantages)
        assert advantages == pytest.approx(EXPECTED, abs=1e-15)


@pytest.mark.parametrize(
    ("given_dtype", "dtype"),
    [("f4", "f4"), ("f8", "f8"), (">f8", "f8"), ("f2", "f4"), ("i8", "f8"), ("u1", "f8")],
)
def test_numpy_gives_numpy(given_dtype: str, dtype: str) -> None:
    rewards: Any = np.array(REWARDS, given_dtype)
    call: Any = ClusterNormalizer()
    advantages: Any = call(rewards, CLUSTERS)
    assert type(advantages) is np.ndarray
    assert advantages.dtype == np.dtype(dtype)
    np.testing.assert_allclose(advantages, EXPECTED, rtol=0, atol=1e-7 if dtype == "f4" else 1e-15)
    np.testing.assert_array_equal(rewards, REWARDS)


def test_strided_and_read_only_arrays_are_read() -> None:
    wide = np.repeat(np.array(REWARDS), 2)
    wide.flags.writeable = False
    np.testing.assert_allclose(ClusterNormalizer()(wide[::2], CLUSTERS), EXPECTED)


@pytest.mark.parametrize(
    ("given_dtype", "dtype"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.int64, torch.float64),
    ],
)
def test_torch_gives_torch(given_dtype: torch.dtype, dtype: torch.dtype) -> None:
    rewards = torch.tensor(REWARDS, dtype=given_dtype, requires_grad=given_dtype.is_floating_point)
    ids = torch.tensor([5, 5, 7, 7])
    advantages = ClusterNormalizer()(rewards, ids, groups=ids)
    assert isinstance(advantages, torch.Tensor)
    assert (advantages.dtype, advantages.device) == (dtype, rewards.device)
    assert not advantages.requires_grad
    torch.testing.assert_close(advantages, torch.tensor(EXPECTED, dtype=dtype))


def test_ids_are_the_same_wherever_they_come_from() -> None:
    class Persona(IntEnum):
        ADA = 7

    sources: list[Any] = [
        [7],
        np.array([7], np.uint8),
        torch.tensor([7]),
        [np.int32(7)],
        [Persona.ADA],
    ]
    normalizer = ClusterNormalizer()
    for ids in sources:
        normalizer.update([1.0], ids)
    for ids in (["7"], np.array(["7"]), [np.str_("7")]):
        normalizer.update([2.0], ids)
    assert normalizer.snapshot() == {7: ClusterStats(5, 1.0, 0.0), "7": ClusterStats(3, 2.0, 0.0)}
    assert {type(cluster) for cluster in normalizer.snapshot()} == {int, str}


def test_group_ids_are_ints_or_strings_in_any_order() -> None:
    rewards = [1.0, 10.0, 3.0, 20.0, 5.0]
    expected = [-2.0, -5.0, 0.0, 5.0, 2.0]
    sources: list[Any] = [
        [0, 1, 0, 1, 0],
        [-(2**70), "b", -(2**70), "b", -(2**70)],
        [1, "1", 1, "1", 1],
        np.array([2**63, 3, 2**63, 3, 2**63], np.uint64),
    ]
    for groups in sources:
        assert ClusterNormalizer("dr_grpo")(rewards, ["x"] * 5, groups) == expected


def test_the_two_halves_make_a_call() -> None:
    whole, halves = ClusterNormalizer(), ClusterNormalizer()
    advantages = whole(REWARDS, CLUSTERS)
    halves.update(REWARDS, CLUSTERS)
    assert halves.normalize(REWARDS, CLUSTERS) == advantages
    assert halves.state_dict() == whole.state_dict()


def test_normalizing_changes_no_history() -> None:
    normalizer = ClusterNormalizer()
    assert normalizer.normalize(REWARDS, CLUSTERS) == [0.0] * 4
    assert normalizer.snapshot() == {}


def test_an_empty_batch_is_a_batch() -> None:
    assert ClusterNormalizer("rloo")([], [], []) == []
    assert ClusterNormalizer()(np.zeros(0, np.float32), []).dtype == np.float32


def test_missing_rewards() -> None:
    rewards, groups = [1.0, None, float("nan"), 3.0, float("inf")], [0] * 5
    for estimator in ("pgrpo", "grpo", "dr_grpo", "rloo", "batch"):
        left = ClusterNormalizer(estimator)([1.0, 3.0], ["a"] * 2, [0] * 2)
        zero = ClusterNormalizer(estimator, nan_policy="zero")
        assert zero(rewards, ["a"] * 5, groups) == [left[0], 0, 0, left[1], 0]
        assert zero.num_nonfinite == 3
        assert zero.snapshot() == {"a": ClusterStats(2, 2.0, 1.0)}
        propagate = ClusterNormalizer(estimator, nan_policy="propagate")
        advantages = propagate(np.array(rewards, np.float64), ["a"] * 5, groups)
        np.testing.assert_array_equal(advantages, [left[0], np.nan, np.nan, left[1], np.nan])
        with pytest.raises(DataError, match=r"rewards\[1\] is NaN; expected a finite number"):
            ClusterNormalizer(estimator)(rewards, ["a"] * 5, groups)


def test_a_cluster_without_any_reward_is_not_in_the_snapshot() -> None:
    normalizer = ClusterNormalizer(nan_policy="zero")
    assert normalizer(np.array([np.nan, 1.0]), ["none", "one"]).tolist() == [0.0, 0.0]
    assert set(normalizer.snapshot()) == {"one"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "pgrop"}, '"pgrop"; expected pgrpo, grpo, dr_grpo, rloo or batch'),
        (
            {"estimator": None},
            "ClusterNormalizer\\(None, ddof=0.*'None' is not an instance of 'str'",
        ),
        ({"ddof": 2}, "ddof is 2; expected 0 or 1"),
        ({"ddof": -1}, "ddof is -1; expected 0 or 1"),
        ({"ddof": 10**30}, "ddof=1000.* too large"),
        ({"ddof": "0"}, "ddof='0'.* cannot be interpreted as an integer"),
        ({"eps": 0.0}, "eps is 0.0; expected a positive number"),
        ({"eps": float("nan")}, "eps is NaN; expected a positive number"),
        ({"order": "update"}, "expected update_then_normalize or normalize_then_update"),
        ({"nan_policy": "omit"}, "expected raise, zero or propagate"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ClusterNormalizer(**options)


@pytest.mark.parametrize(
    ("rewards", "clusters", "groups", "message"),
    [
        ([1.0] * 7, ["a"] * 8, None, "rewards has 7 entries, clusters has 8"),
        ([1.0] * 7, ["a"] * 7, [1] * 6, "rewards has 7 entries, groups has 6"),
        ([[1.0, 2.0]], ["a"], None, r"rewards has shape \(1, 2\); expected one dimension"),
        (3.0, ["a"], None, r"rewards has shape \(\); expected one dimension"),
        ([1.0, [2.0]], ["a"] * 2, None, r"rewards is \[1.0, \[2.0\]\]; expected \[N\] numbers"),
        (["1.0"], ["a"], None, r"rewards is \['1.0'\]; expected \[N\] numbers"),
        ([1j], ["a"], None, r"rewards is \[1j\]; expected \[N\] numbers"),
        ([1.0], [1.5], None, r"clusters\[0\] is 1.5; expected an int or a string"),
        ([1.0, 1.0], [1, True], None, r"clusters\[1\] is True; expected an int or a string"),
        ([1.0], np.array([True]), None, r"clusters\[0\] is True; expected an int or a string"),
        ([1.0], [None], None, r"clusters\[0\] is None; expected an int or a string"),
        ([1.0], "a", None, r"clusters is 'a'; expected \[N\] ints or strings"),
        ([1.0], np.array(3), None, r"clusters is array\(3\); expected \[N\] ints or strings"),
        ([1.0], ["a"], [[1]], r"groups\[0\] is \[1\]; expected an int or a string"),
        ([1e140], ["a"], None, r"rewards\[0\] is 1e140; expected a finite number below 1e140"),
    ],
)
def test_bad_batches_change_nothing(rewards: Any, clusters: Any, groups: Any, message: str) -> None:
    normalizer = ClusterNormalizer()
    normalizer.update(REWARDS, CLUSTERS)
    before = normalizer.state_dict()
    with pytest.raises(DataError, match=message):
        normalizer(rewards, clusters, groups)
    assert normalizer.state_dict() == before


@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "rloo"])
def test_groups_are_asked_for(estimator: str) -> None:
    normalizer = ClusterNormalizer(estimator)
    with pytest.raises(DataError, match=f"estimator {estimator} needs groups: one group id"):
        normalizer(REWARDS, CLUSTERS)
    assert normalizer.snapshot() == {}


ids = st.one_of(st.integers(), st.text(max_size=3))
finite = st.floats(-1e100, 1e100)


@given(st.lists(st.lists(st.tuples(finite, ids), max_size=20), max_size=5))
def test_state_round_trips_exactly(batches: list[list[tuple[float, int | str]]]) -> None:
    source = ClusterNormalizer(nan_policy="zero")
    for batch in batches:
        source.update([reward for reward, _ in batch], [cluster for _, cluster in batch])
    source.update(np.array([np.nan]), ["none"])
    state = source.state_dict()
    copy = ClusterNormalizer("grpo", ddof=1)
    copy.update([1.0], ["forgotten"])
    copy.load_state_dict(json.loads(json.dumps(state)))
    assert copy.state_dict() == state
    assert list(map(type, copy.snapshot())) == list(map(type, source.snapshot()))
    assert copy.num_nonfinite == 1


def test_a_restored_normalizer_goes_on_bit_for_bit() -> None:
    rng = np.random.default_rng(0)
    batches = [(rng.normal(3, 5, 40), rng.integers(0, 4, 40)) for _ in range(6)]
    through, first, second = (ClusterNormalizer() for _ in range(3))
    expected = [through(*batch) for batch in batches]
    for batch in batches[:3]:
        first(*batch)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for batch, advantages in zip(batches[3:], expected[3:], strict=True):
        np.testing.assert_array_equal(second(*batch), advantages)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"more": 1}, "it holds version, clusters, count, mean, m2, num_nonfinite, more; expected"),
        ({"version": 2}, "version is 2; expected 1"),
        ({"mean": 1.0}, "mean is 1.0; expected a list"),
        ({"mean": ["1", 2.0]}, r"mean\[0\] is '1'; expected float"),
        ({"mean": [1.0]}, r"columns have \[2, 2, 1, 2\] entries; expected as many of each"),
        ({"mean": [1.0, float("nan")]}, "history 1 has a mean that is not a finite reward"),
        ({"m2": [-1.0, 1.0]}, "history 0 has a negative or non-finite m2"),
        ({"count": [2, -1]}, "-1"),
        ({"count": [2, 2**63]}, "history 1 has a count above 2\\^53"),
        ({"count": [2, 1.5]}, r"count\[1\] is 1.5; expected int"),
        ({"clusters": ["a", True]}, r"clusters\[1\] is True; expected int or str"),
        ({"clusters": ["a", "a"]}, "clusters names one of them twice"),
        ({"num_nonfinite": 0.0}, "num_nonfinite is 0.0; expected int"),
        ({"num_nonfinite": -1}, "negative"),
    ],
)
def test_a_damaged_state_is_refused(damage: dict[str, Any], message: str) -> None:
    normalizer = ClusterNormalizer()
    normalizer.update(REWARDS, CLUSTERS)
    state = normalizer.state_dict()
    with pytest.raises(CheckpointError, match=message):
        normalizer.load_state_dict({**state, **damage})
    assert normalizer.state_dict() == state


def test_what_is_no_state_is_refused() -> None:
    states: list[Any] = [{}, [], None]
    for state in states:
        with pytest.raises(CheckpointError, match="normalizer state: it "):
            ClusterNormalizer().load_state_dict(state)


def test_merging_normalizers_with_clusters_in_another_order() -> None:
    one, other, both = (ClusterNormalizer(nan_policy="zero") for _ in range(3))
    one.update([1.0, 2.0, 4.0], ["a", "b", "b"])
    other.update([6.0, 8.0, 6.0, None, 9.0], ["b", "b", "c", "c", 1])
    one.merge(other)
    rewards = [1.0, 2.0, 4.0, 6.0, 8.0, 6.0, None, 9.0]
    both.update(rewards, ["a", "b", "b", "b", "b", "c", "c", 1])
    assert one.snapshot() == both.snapshot()
    assert one.num_nonfinite == 1
    assert set(other.snapshot()) == {"b", "c", 1}


def test_it_says_what_it_is() -> None:
    normalizer = ClusterNormalizer("grpo", ddof=1)
    copy = eval(repr(normalizer))
    assert repr(copy) == repr(normalizer)
    assert repr(normalizer).startswith("ClusterNormalizer('grpo', ddof=1, eps=0.0001")


@pytest.fixture
def restless_threads() -> Iterator[None]:
    """The interpreter changes threads every few bytecodes instead of every 5 ms."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("restless_threads")
@pytest.mark.parametrize("size", [8, 5000])
def test_threads_lose_nothing(size: int) -> None:
    """Batches on both sides of the size from which the interpreter is released."""
    normalizer = ClusterNormalizer(nan_policy="zero")
    num_threads, num_calls = 8, 20

    def work(seed: int) -> list[tuple[np.ndarray[Any, Any], list[str]]]:
        rng = np.random.default_rng(seed)
        batches: list[tuple[np.ndarray[Any, Any], list[str]]] = []
        for call in range(num_calls):
            # New clusters come up all the time, in several threads at once.
            clusters = [f"c{i}" for i in rng.integers(0, 3 * call + 3, size)]
            rewards = rng.normal(100, 3, size)
            rewards[rng.integers(size)] = np.nan
            advantages = normalizer(rewards, clusters)
            assert np.all(np.isfinite(advantages))
            normalizer.snapshot()
            batches.append((rewards, clusters))
        return batches

    with ThreadPoolExecutor(num_threads) as pool:
        results = [batch for batches in pool.map(work, range(num_threads)) for batch in batches]
    rewards = np.concatenate([batch[0] for batch in results])
    clusters = np.array([cluster for batch in results for cluster in batch[1]])
    snapshot = normalizer.snapshot()
    assert set(snapshot) == set(clusters[np.isfinite(rewards)].tolist())
    for cluster, stats in snapshot.items():
        seen = rewards[(clusters == cluster) & np.isfinite(rewards)]
        assert stats.count == len(seen)
        assert stats.mean == pytest.approx(seen.mean(), rel=1e-12)
        assert stats.std == pytest.approx(seen.std(), rel=1e-9, abs=1e-9)
    assert normalizer.num_nonfinite == num_threads * num_calls


@pytest.mark.usefixtures("restless_threads")
def test_threads_that_meet_the_same_new_clusters_agree_on_them() -> None:
    """Each cluster only ever gets its own number as reward."""
    num_threads, num_clusters = 4, 20_000
    normalizer, start = ClusterNormalizer(), threading.Barrier(num_threads)

    def work(seed: int) -> None:
        clusters = np.random.default_rng(seed).permutation(num_clusters)
        start.wait()
        normalizer.update(clusters.astype(np.float64), clusters)

    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(work, range(num_threads)))
    expected = {i: ClusterStats(num_threads, float(i), 0.0) for i in range(num_clusters)}
    assert normalizer.snapshot() == expected


def test_a_call_overtaken_by_a_load_never_mixes_clusters() -> None:
    source, normalizer = ClusterNormalizer(), ClusterNormalizer()
    source.update([3.0, 1.0, 2.0], [3, 1, 2])
    normalizer.update([1.0, 2.0, 3.0], [1, 2, 3])
    state = source.state_dict()

    class Ids:
        """Ids during whose reading somebody else loads a state that numbers them otherwise."""

        def tolist(self) -> list[int]:
            normalizer.load_state_dict(state)
            return [1, 2, 3]

    ids: Any = Ids()
    for call in (normalizer, normalizer.update, normalizer.normalize):
        call([1.0, 2.0, 3.0], ids)
        assert normalizer.state_dict() == state
