"""What rewards, ids and columns of a batch may come as, and what advantages go back as."""

from __future__ import annotations

import array
import ctypes
import math
import re
from enum import Enum, IntEnum
from fractions import Fraction
from typing import Any, cast
from uuid import UUID

import ml_dtypes
import numpy as np
import pandas
import polars
import pyarrow
import pytest
import torch
from test_normalizer import CLUSTERS, ESTIMATORS, INT_OR_STRING, REWARDS

from pgrpo import ClusterNormalizer, ClusterStats, DataError

pytest_plugins = ["parallel"]

EXPECTED = [0.5 / 0.5001, -0.5 / 0.5001, 1 / 1.0001, -1 / 1.0001]
"""Of REWARDS."""


def test_lists_give_a_list() -> None:
    for rewards in (REWARDS, tuple(REWARDS)):
        advantages = ClusterNormalizer()(rewards, CLUSTERS)
        assert type(advantages) is list
        assert all(type(advantage) is float for advantage in advantages)
        assert advantages == pytest.approx(EXPECTED, abs=1e-15)


@pytest.mark.parametrize(
    ("given_dtype", "dtype"),
    [
        *[("f4", "f4"), ("f8", "f8"), (">f8", "f8"), ("<f4", "f4"), (">f4", "f4"), ("f2", "f4")],
        *[("g", "f8"), ("i8", "f8"), ("u1", "f8"), (">i2", "f8"), ("O", "f8")],
    ],
)
def test_numpy_gives_numpy(given_dtype: str, dtype: str) -> None:
    rewards: Any = np.array(REWARDS, given_dtype)
    advantages: Any = ClusterNormalizer()(rewards, CLUSTERS)
    assert type(advantages) is np.ndarray
    assert advantages.dtype == np.dtype(dtype)
    np.testing.assert_allclose(advantages, EXPECTED, rtol=0, atol=1e-7 if dtype == "f4" else 1e-15)
    np.testing.assert_array_equal(rewards, REWARDS)


def odd_layouts(values: Any) -> dict[str, Any]:
    """The same numbers, lying in memory in ways that the core does not read."""
    values = np.asarray(values)
    strided = np.repeat(values, 2)[::2]
    misaligned = np.frombuffer(b"x" + values.tobytes(), np.uint8)[1:].view(values.dtype)
    read_only = values.copy()
    read_only.flags.writeable = False

    class Subclass(np.ndarray):
        pass

    return {
        "strided": strided,
        "reversed": values[::-1].copy()[::-1],
        "misaligned": misaligned,
        "read-only": read_only,
        "swapped": values.astype(values.dtype.newbyteorder()),
        "subclass": values.view(Subclass),
        "column": np.stack([values] * 3, axis=1)[:, 1],
    }


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("layout", list(odd_layouts([0])))
def test_any_layout_is_read(layout: str, dtype: str) -> None:
    rewards = np.array(REWARDS, dtype)
    clusters, weights = np.array([1, 1, 2, 2]), np.array([1.0, 2.0, 3.0, 4.0])
    arguments = {"weights": weights, "score_norms": weights, "lengths": weights}
    plain = ClusterNormalizer("auto")(rewards, clusters, clusters, **arguments)
    odd = {name: odd_layouts(value)[layout] for name, value in arguments.items()}
    ids = odd_layouts(clusters)[layout]
    advantages = ClusterNormalizer("auto")(odd_layouts(rewards)[layout], ids, ids, **odd)
    assert type(advantages) is np.ndarray
    np.testing.assert_array_equal(advantages, plain)


@pytest.mark.parametrize(
    ("given_dtype", "dtype"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.int64, torch.float64),
        (torch.uint8, torch.float64),
    ],
)
def test_torch_gives_torch(given_dtype: torch.dtype, dtype: torch.dtype) -> None:
    rewards = torch.tensor(REWARDS, dtype=given_dtype, requires_grad=given_dtype.is_floating_point)
    ids = torch.tensor([5, 5, 7, 7])
    for strided in (False, True):
        given_rewards = torch.stack([rewards] * 2, 1)[:, 1] if strided else rewards
        advantages = ClusterNormalizer()(given_rewards, ids, groups=ids)
        assert isinstance(advantages, torch.Tensor)
        assert (advantages.dtype, advantages.device) == (dtype, rewards.device)
        assert not advantages.requires_grad
        torch.testing.assert_close(advantages, torch.tensor(EXPECTED, dtype=dtype))


def test_torch_weights_and_parameters() -> None:
    weights = torch.tensor([1.0, 3.0], dtype=torch.bfloat16)
    normalizer = ClusterNormalizer()
    advantages = normalizer(
        torch.nn.Parameter(torch.tensor([1.0, 0.0])), ["a"] * 2, weights=weights
    )
    assert type(advantages) is torch.Tensor
    assert normalizer.snapshot() == {"a": ClusterStats(4, 0.25, math.sqrt(3 / 16))}


@pytest.mark.parametrize("code", ["f", "d", "i", "Q"])
def test_buffers_give_buffers(code: str) -> None:
    kind = "f" if code == "f" else "d"
    values = array.array(code, [int(reward) for reward in REWARDS])
    advantages = ClusterNormalizer()(values, array.array("h", [5, 5, 7, 7]))
    assert type(advantages) is array.array
    assert advantages.typecode == kind
    assert advantages.tolist() == pytest.approx(EXPECTED, abs=1e-7)
    for buffer in (memoryview(values), (ctypes.c_double * 4)(*REWARDS)):
        view = ClusterNormalizer()(buffer, CLUSTERS)
        assert type(view) is memoryview
        assert view.tolist() == pytest.approx(EXPECTED, abs=1e-7)


class Exporter:
    """An array that says what it is by DLPack alone."""

    def __init__(self, values: Any) -> None:
        self.values = values

    def __dlpack__(self, **options: Any) -> Any:
        return self.values.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.values.__dlpack_device__()


class ArrayApiArray(Exporter):
    """An array of the Python array API standard, on a device of its own."""

    device = "its own"

    def __array_namespace__(self) -> Any:
        return type(self)

    @classmethod
    def asarray(cls, values: Any, device: str) -> ArrayApiArray:
        made = cls(values)
        made.device = device
        return made


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dlpack(dtype: type[np.floating[Any]]) -> None:
    rewards = np.array(REWARDS, dtype)
    ids: Any = Exporter(np.array([5, 5, 7, 7]))
    advantages: Any = ClusterNormalizer()(Exporter(rewards), ids)
    assert type(advantages) is np.ndarray
    assert advantages.dtype == dtype
    np.testing.assert_allclose(advantages, EXPECTED, atol=1e-7)
    elsewhere, weights = ArrayApiArray(rewards), cast(Any, Exporter(np.ones(4)))
    elsewhere.device = "gpu:3"
    advantages = ClusterNormalizer()(elsewhere, ids, weights=weights)
    assert (type(advantages), advantages.device) == (ArrayApiArray, "gpu:3")
    np.testing.assert_allclose(advantages.values, EXPECTED, atol=1e-7)


def test_array_api_strict() -> None:
    namespace = pytest.importorskip("array_api_strict")
    for device in namespace.__array_namespace_info__().devices():
        rewards = namespace.asarray(REWARDS, dtype=namespace.float32, device=device)
        ids = namespace.asarray([5, 5, 7, 7], device=device)
        advantages = ClusterNormalizer()(rewards, ids)
        assert type(advantages) is type(rewards)
        assert (advantages.dtype, advantages.device) == (namespace.float32, device)


def test_masked_rewards_are_missing() -> None:
    rewards = np.ma.array([1.0, 9.0, 3.0], mask=[False, True, False])
    normalizer = ClusterNormalizer("dr_grpo", nan_policy="zero")
    assert normalizer(rewards, ["a"] * 3, ["x"] * 3).tolist() == [-1.0, 0.0, 1.0]
    with pytest.raises(DataError, match=r"clusters\[1\] is None; expected an int or a string"):
        normalizer(REWARDS[:3], np.ma.array([1, 2, 3], mask=[False, True, False]))


MISSING: list[Any] = [1, None, 3]


@pytest.mark.parametrize("dtype", ["Float32", "Float64", "Int64", "object", "float64[pyarrow]"])
def test_pandas_gives_pandas(dtype: str) -> None:
    rewards: Any = pandas.Series(MISSING, [5, 3, 9], dtype, "score")
    weights: Any = pandas.Series([1, 2, 1], dtype="Int64")
    for clusters in (pandas.Series(["a"] * 3), pandas.Series(["a"] * 3, dtype="category")):
        normalizer = ClusterNormalizer("dr_grpo", nan_policy="zero")
        advantages = normalizer(rewards, clusters, clusters, weights=weights)
        assert type(advantages) is pandas.Series
        assert advantages.dtype == ("float32" if dtype == "Float32" else "float64")
        assert list(advantages.items()) == [(5, -1.0), (3, 0.0), (9, 1.0)]
        assert advantages.name == "score"
        assert normalizer.snapshot() == {"a": ClusterStats(2, 2.0, 1.0)}


@pytest.mark.parametrize("dtype", [polars.Float32, polars.Float64, polars.Int16, None])
def test_polars_gives_polars(dtype: Any) -> None:
    rewards: Any = polars.Series("score", MISSING, dtype)
    weights: Any = polars.Series([1, 2, 1])
    for kind in (polars.String, polars.Categorical):
        clusters: Any = polars.Series(["a"] * 3, dtype=kind)
        normalizer = ClusterNormalizer("dr_grpo", nan_policy="zero")
        advantages = normalizer(rewards, clusters, clusters, weights=weights)
        assert type(advantages) is polars.Series
        assert advantages.dtype == (dtype if dtype == polars.Float32 else polars.Float64)
        assert (advantages.name, advantages.to_list()) == ("score", [-1.0, 0.0, 1.0])
        assert normalizer.snapshot() == {"a": ClusterStats(2, 2.0, 1.0)}


@pytest.mark.parametrize("dtype", ["float", "double", "int64", "halffloat"])
def test_arrow_gives_arrow(dtype: str) -> None:
    column = pyarrow.array(MISSING, pyarrow.type_for_alias(dtype))
    names = pyarrow.array(["a"] * 3)
    for rewards in (column, pyarrow.chunked_array([column[:1], column[1:]])):
        for clusters in (names, names.dictionary_encode(), pyarrow.chunked_array([names])):
            normalizer = ClusterNormalizer("dr_grpo", nan_policy="zero")
            weights: Any = pyarrow.array([1, 2, 1])
            advantages = normalizer(rewards, clusters, clusters, weights=weights)
            is_chunked = [isinstance(c, pyarrow.ChunkedArray) for c in (rewards, advantages)]
            assert is_chunked[0] == is_chunked[1]
            assert advantages.type == ("float" if dtype in ("float", "halffloat") else "double")
            assert advantages.to_pylist() == [-1.0, 0.0, 1.0]
            assert normalizer.snapshot() == {"a": ClusterStats(2, 2.0, 1.0)}


@pytest.mark.parametrize(
    "rewards",
    [
        MISSING,
        [1.0, pandas.NA, 3.0],
        np.array([1.0, pandas.NA, 3.0]),
        pandas.Series(MISSING, dtype="Int64"),
        polars.Series(MISSING),
        pyarrow.array(MISSING),
    ],
    ids=["list", "NA", "objects", "pandas", "polars", "arrow"],
)
def test_a_missing_reward_is_named(rewards: Any) -> None:
    normalizer = ClusterNormalizer()
    with pytest.raises(DataError, match=r"rewards\[1\] is (None|NaN); expected a finite number"):
        normalizer(rewards, ["a"] * 3)
    assert normalizer.snapshot() == {}


@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "float8_e5m2", "int4"])
def test_numbers_of_ml_dtypes(name: str) -> None:
    rewards: Any = np.array(REWARDS).astype(getattr(ml_dtypes, name))
    ids: Any = np.array([5, 5, 7, 7]).astype(ml_dtypes.int4)
    weights: Any = np.ones(4).astype(ml_dtypes.bfloat16)
    advantages: Any = ClusterNormalizer()(rewards, ids, weights=weights)
    assert advantages.dtype == (np.float64 if name == "int4" else np.float32)
    np.testing.assert_allclose(advantages, EXPECTED, atol=1e-7)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32"])
def test_jax(dtype: str) -> None:
    jax: Any = pytest.importorskip("jax")
    rewards = jax.numpy.asarray(REWARDS, dtype=dtype)
    advantages: Any = ClusterNormalizer()(rewards, jax.numpy.asarray([5, 5, 7, 7]))
    assert isinstance(advantages, jax.Array)
    assert advantages.device == rewards.device
    # JAX has no float64 unless it is asked to.
    assert advantages.dtype == "float32"
    np.testing.assert_allclose(advantages, EXPECTED, atol=1e-7)


def test_verdicts_are_rewards() -> None:
    for verdicts in ([True, False], np.array([True, False]), polars.Series([True, False])):
        advantages: Any = ClusterNormalizer()(verdicts, ["a", "a"])
        assert list(advantages) == pytest.approx([0.5 / 0.5001, -0.5 / 0.5001], abs=1e-15)


def test_numbers_of_other_kinds_in_a_list() -> None:
    rewards: Any = [Fraction(1), np.float32(0), 4, True + 1]
    assert ClusterNormalizer()(rewards, CLUSTERS) == pytest.approx(EXPECTED, abs=1e-15)


# Shapes.

ROWS: list[list[float]] = [
    [1.0, 0.0, 2.0],
    [4.0, 2.0, 2.0],
    [7.0, 8.0, 7.5],
    [0.0, 1.0, 5.0],
]
ROW_IDS: list[Any] = ["ada", 7, "ada", 7]


def flat(values: Any) -> Any:
    """Columns [P] or [P, G] of `ROWS` as [N]."""
    found = np.asarray(values, object)
    return (np.repeat(found, 3) if found.ndim == 1 else found.ravel()).tolist()


def as_tensor(values: Any) -> torch.Tensor:
    return torch.tensor(np.array(values))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("form", ["row", "grid"])
@pytest.mark.parametrize("make", [list, np.array, as_tensor], ids=["list", "numpy", "torch"])
def test_rows_are_groups(make: Any, form: str, estimator: str) -> None:
    """The same as one row after another, with the rows as groups, in every kind of array."""
    numbers = np.array([1.0, 3.0, 0.5, 2.0])
    columns: Any = {"weights": numbers, "score_norms": numbers**2, "lengths": numbers + 1}
    clusters: Any = ROW_IDS if make is list else np.array([5, 7, 5, 7], np.int32)
    if form == "grid":
        columns = {name: np.outer(values, [1.0, 2.0, 3.0]) for name, values in columns.items()}
        clusters = (
            [[i, i, "ada"] for i in clusters] if make is list else np.stack([clusters] * 3, 1)
        )
    expected_rewards = np.ravel(ROWS)
    expected_columns = {name: np.array(flat(values)) for name, values in columns.items()}
    whole, rows = ClusterNormalizer(estimator), ClusterNormalizer(estimator)
    arguments: Any = {name: make(values) for name, values in columns.items()}
    given_clusters = clusters if make is list else make(clusters)
    for method in ("advantages", "update", "normalize", "__call__"):
        expected: Any = getattr(whole, method)(
            expected_rewards, flat(clusters), np.repeat(range(4), 3), **expected_columns
        )
        found = getattr(rows, method)(make(ROWS), given_clusters, **arguments)
        if method == "update":
            assert found is None
        else:
            assert type(found) is type(make(ROWS))
            np.testing.assert_array_equal(np.asarray(found), expected.reshape(4, 3))
    assert rows.state_dict() == whole.state_dict()


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_rows_of_plain_arrays_go_straight_to_the_core(dtype: str) -> None:
    rewards = np.array(ROWS, dtype)
    core: Any = vars(ClusterNormalizer("grpo"))["_core"]
    sources: list[Any] = [
        np.array([5, 7, 5, 7]), np.full((4, 3), 5, np.int32), ROW_IDS, tuple(ROW_IDS),
        [[name] * 3 for name in ROW_IDS],
    ]  # fmt: skip
    for clusters in sources:
        columns = None, np.ones(4), np.ones((4, 3)), None, None
        found = core.advantages(rewards, clusters, *columns, None)
        assert (found.shape, found.dtype) == ((4, 3), np.dtype(dtype))
    for clusters in (
        np.arange(3),
        np.arange(12),
        np.ones((3, 4), int),
        ROW_IDS[:3],
        [["a"] * 2] * 4,
    ):
        assert core.update(rewards, clusters, *[None] * 5) is NotImplemented
    assert core.update(np.ones(4), np.ones((4, 1), int), *[None] * 5) is NotImplemented


def test_groups_of_rows_may_be_given() -> None:
    expected = ClusterNormalizer("rloo")(np.ravel(ROWS), flat(ROW_IDS), np.repeat([1, 2, 1, 2], 3))
    sources: list[Any] = [
        [1, 2, 1, 2], np.array([1, 2, 1, 2]), torch.tensor([1, 2, 1, 2]),
        np.repeat([1, 2, 1, 2], 3).reshape(4, 3), [[name] * 3 for name in "xyxy"],
    ]  # fmt: skip
    for groups in sources:
        for rewards in (np.array(ROWS), torch.tensor(ROWS, dtype=torch.float64), ROWS):
            found = ClusterNormalizer("rloo")(rewards, ROW_IDS, groups)
            np.testing.assert_array_equal(np.ravel(found), expected)


def test_rows_are_retracted() -> None:
    for rewards, weights in ((np.array(ROWS), np.ones((4, 3))), (ROWS, [1.0] * 4)):
        normalizer = ClusterNormalizer()
        normalizer.update([1.0, 3.0], ["ada", 7])
        before = normalizer.snapshot()
        normalizer.update(rewards, ROW_IDS, weights=weights)
        assert normalizer.snapshot()["ada"].count == 7
        normalizer.retract(rewards, ROW_IDS, weights=weights)
        for cluster, stats in normalizer.snapshot().items():
            assert stats.count == before[cluster].count == 1
            assert stats.mean == pytest.approx(before[cluster].mean, rel=1e-12)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (1, 1), (5000, 2)])
def test_odd_shapes_are_shapes(shape: tuple[int, int]) -> None:
    rewards = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    clusters = np.arange(shape[0]) % 3
    expected = ClusterNormalizer("grpo")(
        rewards.ravel(), np.repeat(clusters, shape[1]), np.repeat(np.arange(shape[0]), shape[1])
    ).reshape(shape)
    for given_rewards in (rewards, np.asfortranarray(rewards), torch.tensor(rewards)):
        found = ClusterNormalizer("grpo")(given_rewards, clusters)
        assert found.shape == shape
        np.testing.assert_array_equal(np.asarray(found), expected)
    transposed: Any = rewards.T
    assert ClusterNormalizer("grpo")(transposed, [0] * shape[1]).shape == transposed.shape


def test_holes_in_rows() -> None:
    rows = [[1.0, None, 3.0], [2.0, 5.0, None]]
    found = ClusterNormalizer("dr_grpo", nan_policy="zero")(rows, ["a", "b"])
    assert found == [[-1.0, 0.0, 1.0], [-1.5, 1.5, 0.0]]


def test_rows_are_written_to_out() -> None:
    rewards = np.array(ROWS)
    expected = ClusterNormalizer()(rewards, ROW_IDS)
    outs: list[Any] = [
        np.empty((4, 3)), np.empty((3, 4)).T, np.empty((4, 6))[:, ::2],
        torch.empty((4, 3), dtype=torch.float64),
    ]  # fmt: skip
    for out in [*outs, rewards]:
        assert ClusterNormalizer()(rewards, ROW_IDS, out=out) is out
        np.testing.assert_array_equal(np.asarray(out), expected)
    normalizer = ClusterNormalizer()
    for out in (np.empty(12), np.empty((3, 4)), np.empty((4, 3, 1))):
        with pytest.raises(DataError, match=r"out has shape .*; expected \(4, 3\)"):
            normalizer(expected, ROW_IDS, out=out)
    assert normalizer.snapshot() == {}


# out=


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_out_is_written_and_returned(dtype: type[np.floating[Any]]) -> None:
    rewards, ids = np.array(REWARDS, dtype), np.array([5, 5, 7, 7])
    expected = ClusterNormalizer()(rewards, ids)
    for method in ("__call__", "advantages", "normalize"):
        outs: list[Any] = [
            np.empty(4, dtype),
            np.empty(8, dtype)[::2],
            np.empty(4, dtype)[::-1],
            torch.empty(4, dtype=getattr(torch, np.dtype(dtype).name)),
            torch.empty((4, 2), dtype=getattr(torch, np.dtype(dtype).name))[:, 0],
            array.array("f" if dtype == np.float32 else "d", [0.0] * 4),
            np.empty(4, dtype).view(np.recarray),
        ]
        for out in outs:
            for given_rewards in (rewards, torch.tensor(rewards), np.repeat(rewards, 2)[::2]):
                normalizer = ClusterNormalizer()
                normalizer.update(rewards, ids)
                if method != "normalize":
                    normalizer = ClusterNormalizer()
                returned = getattr(normalizer, method)(given_rewards, ids, out=out)
                assert returned is out
                np.testing.assert_array_equal(np.asarray(out), expected)
                np.asarray(out)[...] = 0


def test_out_may_be_what_is_read() -> None:
    ids = np.array([5, 5, 7, 7])
    expected = ClusterNormalizer()(np.array(REWARDS), ids)
    rewards = np.array(REWARDS)
    assert ClusterNormalizer()(rewards, ids, out=rewards) is rewards
    np.testing.assert_array_equal(rewards, expected)
    # One entry on: a loop that wrote as it read would read what it wrote.
    longer = np.array([*REWARDS, 0.0])
    ClusterNormalizer()(longer[:4], ids, out=longer[1:])
    np.testing.assert_array_equal(longer[1:], expected)
    weights = np.ones(4)
    ClusterNormalizer()(np.array(REWARDS), ids, weights=weights, out=weights)
    np.testing.assert_array_equal(weights, expected)
    tensor = torch.tensor(REWARDS, dtype=torch.float64)
    assert ClusterNormalizer()(tensor, ids, out=tensor) is tensor
    np.testing.assert_array_equal(tensor.numpy(), expected)
    ClusterNormalizer()(np.array(REWARDS), ids, out=ids.view(np.float64))
    np.testing.assert_array_equal(ids.view(np.float64), expected)


def read_only(size: int) -> Any:
    out = np.zeros(size)
    out.flags.writeable = False
    return out


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (np.zeros(3), "rewards has 4 entries, out has 3"),
        (np.zeros(10)[::2], r"out has shape \(5,\); expected \(4,\)"),
        (np.zeros((4, 1)), r"out has shape \(4, 1\); expected \(4,\)"),
        (np.array(0.0), r"out has shape \(\); expected \(4,\)"),
        (np.zeros(4, np.float32), "out has dtype float32; expected float64"),
        (np.zeros(4, np.int64), "out has dtype int64; expected float64"),
        (np.zeros(4, ">f8"), "out has dtype >f8; expected float64"),
        (torch.zeros(4), "out has dtype float32; expected float64"),
        (torch.zeros(4, dtype=torch.float64, requires_grad=True), "out is a tensor that requires"),
        (torch.zeros(4, dtype=torch.float64, device="meta"), "out is a tensor on meta; expected"),
        (read_only(4), "out is read-only"),
        ([0.0] * 4, r"out is \[0.0, 0.0, 0.0, 0.0\]; expected an array or a tensor"),
        (3, "out is 3; expected an array or a tensor"),
    ],
)
def test_bad_out(out: Any, message: str) -> None:
    normalizer = ClusterNormalizer()
    with pytest.raises(DataError, match=message):
        normalizer(np.array(REWARDS), CLUSTERS, out=out)
    assert normalizer.snapshot() == {}


# Ids.


def test_ids_are_the_same_wherever_they_come_from() -> None:
    class Persona(IntEnum):
        ADA = 7

    class Name(str, Enum):
        SEVEN = "7"

    class Text(str):
        __slots__ = ()

    sources: list[Any] = [
        [7],
        (7,),
        range(7, 8),
        np.array([7], np.uint8),
        np.array([7], np.uint64),
        np.array([7], ">i4"),
        np.array([7], np.int32),
        np.array([7], object),
        torch.tensor([7]),
        torch.tensor([7], dtype=torch.int16),
        array.array("b", [7]),
        [np.int32(7)],
        [np.uint64(7)],
        pandas.Series([7], dtype="Int64"),
        pandas.Series([7], dtype="int64[pyarrow]"),
        pandas.Series([7], dtype="category"),
        pandas.Index([7]),
        polars.Series([7]),
        pyarrow.array([7]),
        pyarrow.array([7]).dictionary_encode(),
        [Persona.ADA],
    ]
    normalizer = ClusterNormalizer()
    for ids in sources:
        normalizer.update([1.0], ids)
    names: list[Any] = [["7"], ("7",), np.array(["7"]), [np.str_("7")], [Name.SEVEN], [Text("7")]]
    names += [np.array(["7"], object), pandas.Series(["7"]), pandas.Series(["7"], dtype="string")]
    names += [
        pandas.Series(["7"], dtype="category"),
        polars.Series(["7"], dtype=polars.Categorical),
    ]
    names += [polars.Series(["7"]), pyarrow.array(["7"]), pyarrow.array(["7"]).dictionary_encode()]
    names += [pyarrow.chunked_array([["7"]]), polars.Series(["7"], dtype=polars.Enum(["7"]))]
    if hasattr(np.dtypes, "StringDType"):
        names.append(np.array(["7"], np.dtypes.StringDType()))
    for ids in names:
        normalizer.update([2.0], ids)
    assert normalizer.snapshot() == {
        7: ClusterStats(len(sources), 1.0, 0.0),
        "7": ClusterStats(len(names), 2.0, 0.0),
    }
    assert {type(cluster) for cluster in normalizer.snapshot()} == {int, str}


@pytest.mark.parametrize(
    ("ids", "index", "missing"),
    [
        (pandas.Series([2**60, None], dtype="Int64"), 1, "<NA>"),
        (pandas.Series(["a", None], dtype="category"), 1, "nan"),
        (pandas.Series(["a", None]), 1, "nan"),
        (polars.Series([2**60, None]), 1, "None"),
        (polars.Series([None, "a"]), 0, "None"),
        (pyarrow.array([2**60, None]), 1, "None"),
        (pyarrow.chunked_array([["a"], [None]]), 1, "None"),
        (np.ma.array([3, 4], mask=[False, True]), 1, "None"),
        (["a", math.nan], 1, "nan"),
    ],
)
def test_a_missing_id_is_named(ids: Any, index: int, missing: str) -> None:
    out = "leave out what has no id, or give it one"
    with pytest.raises(DataError, match=rf"clusters\[{index}\] is {missing}; .* string: {out}"):
        ClusterNormalizer()([1.0, 2.0], ids)


@pytest.mark.parametrize(
    ("value", "what_to_do"),
    [
        (UUID(int=5), r"str\(id\) makes one of it"),
        (("ada", 3), r"str\(id\) makes one of it"),
        (frozenset("a"), r"str\(id\) makes one of it"),
        (b"ada", r"id\.decode\(\) makes one of it"),
        (1.5, r"int\(id\) or str\(id\) makes one of it"),
        (True, r"int\(id\) or str\(id\) makes one of it"),
        (None, "leave out what has no id, or give it one"),
    ],
)
def test_what_is_no_id_is_refused_with_a_way_out(value: Any, what_to_do: str) -> None:
    objects = np.empty(2, object)
    objects[:] = ["a", value]
    shown = re.escape(repr(value))
    for ids in (
        ["a", value],
        ("a", value),
        cast(Any, objects),
        pandas.Series(["a", value], dtype=object),
    ):
        message = rf"clusters\[1\] is {shown}; {INT_OR_STRING}: {what_to_do}"
        with pytest.raises(DataError, match=message):
            ClusterNormalizer()([1.0, 2.0], ids)
    for ids in (np.array([1.5]), torch.tensor([True])):
        with pytest.raises(DataError, match=r"expected ints or strings: int\(id\) or str\(id\)"):
            ClusterNormalizer()([1.0], cast(Any, ids))


def test_ids_at_the_edges() -> None:
    """Small ints are rows of the table, others are interned: nobody can tell."""
    ids = [0, -1, 2**22 - 1, 2**22, 2**31, 2**32, -(2**31), 2**63 - 1, -(2**63), "", "\0", "ä", "𝄞"]
    normalizer = ClusterNormalizer()
    for _ in range(2):
        normalizer.update([float(i) for i in range(len(ids))], ids)
        ints = [i for i in ids if isinstance(i, int)]
        normalizer.update(np.arange(len(ints), dtype=np.float64), np.array(ints))
    twice = {cluster: 4 if isinstance(cluster, int) else 2 for cluster in ids}
    assert {cluster: stats.count for cluster, stats in normalizer.snapshot().items()} == twice
    restored = ClusterNormalizer()
    restored.load_state_dict(normalizer.state_dict())
    assert restored.snapshot() == normalizer.snapshot()


def test_the_order_of_snapshots() -> None:
    normalizer = ClusterNormalizer()
    normalizer.update([0.0] * 6, ["z", 9, -1, "a", 2**40, 3])
    assert list(normalizer.snapshot()) == [3, 9, "z", -1, "a", 2**40]


def test_group_ids_are_ints_or_strings_in_any_order() -> None:
    rewards = [1.0, 10.0, 3.0, 20.0, 5.0]
    expected = [-2.0, -5.0, 0.0, 5.0, 2.0]
    sources: list[Any] = [
        [0, 1, 0, 1, 0],
        [-(2**63), "b", -(2**63), "b", -(2**63)],
        [1, "1", 1, "1", 1],
        np.array([2**63 - 1, 3, 2**63 - 1, 3, 2**63 - 1], np.uint64),
        np.array(["", "a", "", "a", ""]),
        torch.tensor([-1, 0, -1, 0, -1], dtype=torch.int8),
    ]
    for groups in sources:
        assert ClusterNormalizer("dr_grpo")(rewards, ["x"] * 5, groups) == expected
