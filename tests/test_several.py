"""Several rewards of each rollout: advantages and histories against normalizers of one reward."""

from __future__ import annotations

import copy
import json
import pickle
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pgrpo import CheckpointError, ClusterNormalizer, ConfigError, DataError
from pgrpo.normalizer import RULES
from pgrpo.normalizer.several import MAGIC

pytest_plugins = ["parallel"]

NAMES = ["correct", "format", "length"]
WEIGHTS = [1.0, 0.5, -2.0]
ORDERS = "update_then_normalize", "normalize_then_update"
HISTORIES: dict[str, Any] = {"combine": "normalize_then_sum", "reward_names": NAMES}


def several(estimator: str = "pgrpo", **options: Any) -> ClusterNormalizer:
    arguments: dict[str, Any] = {"reward_weights": WEIGHTS, **options}
    return ClusterNormalizer(estimator, **arguments)


def batches(missing: bool = False, dtype: str = "f8") -> list[tuple[NDArray[Any], dict[str, Any]]]:
    """Three batches of rewards [24, 3], with all columns."""
    rng = np.random.default_rng(3)
    made: list[tuple[NDArray[Any], dict[str, Any]]] = []
    for _ in range(3):
        rewards = rng.normal(size=(24, 3)) * [1, 5, 0.1] + [0, 2, 7]
        if missing:
            rewards[rng.random((24, 3)) < 0.2] = np.nan
            rewards[0] = np.nan
        groups = np.repeat(np.arange(6), 4)
        columns = {
            "clusters": groups % 3, "groups": groups, "weights": rng.random(24),
            "score_norms": rng.random(24), "lengths": rng.random(24),
        }  # fmt: skip
        made.append((rewards.astype(dtype), columns))
    return made


@pytest.mark.parametrize("estimator", list(RULES))
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("missing", [False, True])
def test_each_reward_has_the_history_it_has_alone(
    estimator: str, order: str, missing: bool
) -> None:
    """Bit for bit; the advantage is the weighted sum of the three."""
    options: Any = {"order": order, "nan_policy": "zero"}
    for dtype in ("f4", "f8"):
        whole = several(estimator, **options, **HISTORIES)
        whitens = RULES[estimator].whitens
        each = [ClusterNormalizer("grpo" if whitens else estimator, **options) for _ in NAMES]
        for rewards, columns in batches(missing, dtype):
            found = whole(rewards, **columns)
            alone = [one(rewards[:, at].copy(), **columns) for at, one in enumerate(each)]
            expected: Any = sum(w * a.astype(float) for w, a in zip(WEIGHTS, alone, strict=True))
            if whitens:
                known = ~np.isnan(rewards).all(axis=1)
                weights = columns["weights"] * known
                mean = np.average(expected, weights=weights)
                std = np.sqrt(np.average((expected - mean) ** 2, weights=weights))
                expected = np.where(known, (expected - mean) / (std + 1e-4), 0.0)
            assert found.dtype == np.dtype(dtype)
            np.testing.assert_allclose(
                found, expected, rtol=1e-6, atol=1e-6 if dtype == "f4" else 1e-9
            )
            whole.update(rewards, **columns)
            for at, one in enumerate(each):
                one.update(rewards[:, at].copy(), **columns)
            assert whole.normalize(rewards, **columns).shape == (24,)
        assert list(whole.rewards) == NAMES
        for one, reward in zip(each, whole.rewards.values(), strict=True):
            assert reward.state_dict() == one.state_dict()
        assert whole.num_nonfinite == sum(one.num_nonfinite for one in each)


@pytest.mark.parametrize("estimator", list(RULES))
@pytest.mark.parametrize("order", ORDERS)
def test_a_sum_has_the_history_of_the_sum(estimator: str, order: str) -> None:
    whole = several(estimator, order=order, clip=1.0)
    one = ClusterNormalizer(estimator, order=order, clip=1.0)
    for rewards, columns in batches():
        total = np.zeros(24)
        for at, weight in enumerate(WEIGHTS):
            total += weight * rewards[:, at]
        np.testing.assert_array_equal(whole(rewards, **columns), one(total, **columns))
    assert whole.snapshot() == one.snapshot() == whole.rewards["sum"].snapshot()
    assert whole.rewards["sum"].state_dict() == one.state_dict()


def test_gdpo_multi_is_the_formula_of_the_paper() -> None:
    rewards, columns = batches()[0]
    scores = rewards.reshape(6, 4, 3)
    centered = scores - scores.mean(axis=1, keepdims=True)
    standard = centered / (scores.std(axis=1, keepdims=True) + 1e-4)
    total = (standard @ WEIGHTS).ravel()
    expected = (total - total.mean()) / (total.std() + 1e-4)
    normalizer = several("gdpo_multi", **HISTORIES)
    found = normalizer(rewards, columns["clusters"], columns["groups"])
    np.testing.assert_allclose(found, expected, atol=1e-12)
    clipped = several("gdpo_multi", clip=0.5, **HISTORIES)
    found = clipped(rewards, columns["clusters"], columns["groups"])
    np.testing.assert_allclose(found, np.clip(expected, -0.5, 0.5), atol=1e-12)


@pytest.mark.parametrize("combine", ["sum_then_normalize", "normalize_then_sum"])
def test_rows_of_several_rewards(combine: str) -> None:
    rewards, columns = batches()[0]
    columns = {name: columns[name] for name in ("clusters", "weights")}
    expected = several("grpo", combine=combine)(rewards, groups=np.repeat(range(6), 4), **columns)
    rows = rewards.reshape(6, 4, 3)
    columns = {name: values.reshape(6, 4) for name, values in columns.items()}
    for given in (rows, torch.tensor(rows), rows.tolist(), np.asfortranarray(rows)):
        normalizer = several("grpo", combine=combine)
        found = normalizer(given, **columns)
        assert type(found) is type(given)
        np.testing.assert_array_equal(np.asarray(found), expected.reshape(6, 4))
    out = np.empty((6, 4))
    assert several("grpo", combine=combine)(rows, **columns, out=out) is out
    np.testing.assert_array_equal(out, expected.reshape(6, 4))
    # What is read may be what is written.
    buffer = rows.copy()
    view = buffer.reshape(-1)[:24].reshape(6, 4)
    several("grpo", combine=combine)(buffer, **columns, out=view)
    np.testing.assert_array_equal(view, expected.reshape(6, 4))


@pytest.mark.parametrize("combine", ["sum_then_normalize", "normalize_then_sum"])
def test_large_batches_leave_the_interpreter(combine: str) -> None:
    rewards = np.random.default_rng(0).normal(size=(5000, 3))
    clusters = np.arange(5000) % 7
    whole, parts = several(combine=combine), several(combine=combine)
    whole.update(rewards, clusters)
    for part in np.split(np.arange(5000), 50):
        parts.update(rewards[part], clusters[part])
    for name, reward in whole.rewards.items():
        for cluster, stats in parts.rewards[name].snapshot().items():
            assert stats.mean == pytest.approx(reward.snapshot()[cluster].mean, rel=1e-9)


HOLES: Any = [[1.0, None, 3.0], [2.0, 4.0, None], [None, None, None], [5.0, 1.0, 1.0]]


@pytest.mark.parametrize("combine", ["sum_then_normalize", "normalize_then_sum"])
def test_missing_rewards(combine: str) -> None:
    clusters = ["a"] * 4
    options: Any = {"combine": combine, "reward_names": NAMES}
    with pytest.raises(DataError, match=r'rewards\[0\] of "format" is NaN; expected a finite'):
        several(**options)(HOLES, clusters)
    with pytest.raises(DataError, match=r'rewards\[1, 0\] of "length" is NaN; expected a finite'):
        several(**options)([[row] for row in [HOLES[3], *HOLES[1:]]], clusters)
    propagated = several(nan_policy="propagate", **options)(HOLES, clusters)
    assert np.isnan(propagated).tolist() == [True, True, True, False]
    normalizer = several(nan_policy="zero", **options)
    found = normalizer(HOLES, clusters)
    assert found[2] == 0
    assert np.all(np.isfinite(found))
    if combine == "sum_then_normalize":
        assert normalizer.snapshot()["a"].count == 3
        assert normalizer.snapshot()["a"].mean == pytest.approx((-5 + 4 + 3.5) / 3)
    else:
        counts = [reward.snapshot()["a"].count for reward in normalizer.rewards.values()]
        assert counts == [3, 2, 2]


@pytest.mark.parametrize("combine", ["sum_then_normalize", "normalize_then_sum"])
def test_what_is_refused_changes_no_history(combine: str) -> None:
    normalizer = several("auto", combine=combine)
    rewards, columns = batches()[0]
    normalizer(rewards, **columns)
    before = normalizer.state_dict()
    last = rewards.copy()
    last[23, 2] = np.inf
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (last, {}, r'rewards\[23\] of "reward_2" is inf'),
        (rewards, {"weights": np.ones(23)}, "rewards has 24 entries, weights has 23"),
        (rewards, {"weights": -np.ones(24)}, r"weights\[0\] is -1.0"),
        (rewards, {"groups": None}, "estimator auto needs groups"),
        (rewards, {"clusters": np.arange(3)}, "rewards has 24 entries, clusters has 3"),
        (rewards[:, :2], {}, r"rewards has shape \(24, 2\); expected \[N, 3\], or \[P, G, 3\]"),
        (rewards[:, 0], {}, r"rewards has shape \(24,\); expected \[N, 3\], or \[P, G, 3\]"),
    ]
    for given, changes, message in cases:
        for method in (normalizer, normalizer.update, normalizer.normalize):
            with pytest.raises(DataError, match=message):
                method(given, **{**columns, **changes})
    assert normalizer.state_dict() == before


@pytest.mark.parametrize("combine", ["sum_then_normalize", "normalize_then_sum"])
def test_retracting_from_all_or_none(combine: str) -> None:
    normalizer = several(combine=combine, nan_policy="zero")
    normalizer.update([[1.0, 2.0, 3.0], [2.0, 2.0, 4.0]], ["a", "b"])
    normalizer.update([[4.0, 3.0, 9.0]], ["a"])
    normalizer.retract([[4.0, 3.0, 9.0]], ["a"])
    assert all(r.snapshot()["a"].count == 1 for r in normalizer.rewards.values())
    if combine == "normalize_then_sum":
        # The last reward of "c" was never there.
        normalizer.update([[1.0, 1.0, None]], ["c"])
        before = normalizer.state_dict()
        with pytest.raises(DataError, match="cannot retract 1"):
            normalizer.retract([[1.0, 1.0, 1.0]], ["c"])
        assert normalizer.state_dict() == before


def filled(**options: Any) -> ClusterNormalizer:
    normalizer = several("auto", nan_policy="zero", track_delta=True, **options)
    for rewards, columns in batches(missing=True):
        normalizer(rewards, **columns)
    return normalizer


@pytest.mark.parametrize("combine", ["sum_then_normalize", "normalize_then_sum"])
def test_state_goes_through_every_form(combine: str, tmp_path: Path) -> None:
    source = filled(combine=combine)
    expected = source.state_dict()
    restored = filled(combine=combine)
    restored.update([[1.0, 2.0, 3.0]], ["other"], ["g"])
    restored.load_state_dict(json.loads(json.dumps(expected)))
    assert restored.state_dict() == expected
    source.save(tmp_path / "state")
    loaded = several("auto", combine=combine, nan_policy="zero", track_delta=True)
    loaded.load(tmp_path / "state")
    assert loaded.state_dict() == expected
    for made in (copy.deepcopy(source), pickle.loads(pickle.dumps(source))):
        assert repr(made) == repr(source)
        assert made.state_dict() == expected
        made.update([[1.0, 2.0, 3.0]], ["other"], ["g"])
    assert source.state_dict() == expected
    merged = several("auto", combine=combine)
    merged.merge(source.delta())
    other = several("auto", combine=combine)
    other.merge(source)
    for name, reward in source.rewards.items():
        assert (
            merged.rewards[name].snapshot() == reward.snapshot() == other.rewards[name].snapshot()
        )
    assert other.forget([0, "unknown"]) == len(source.rewards)
    assert other.keep(np.array([1, 7])) == len(source.rewards)
    assert all(list(reward.snapshot()) == [1] for reward in other.rewards.values())
    with pytest.raises(DataError, match="clusters.1. is None; expected an int"):
        other.forget(np.array([1, None]))


def test_foreign_state_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    # Threads that run this at once write to files of their own.
    tmp_path = Path(tempfile.mkdtemp(dir=tmp_path))
    normalizer = filled(combine="normalize_then_sum")
    before = normalizer.state_dict()
    others: list[ClusterNormalizer] = [
        several("auto", combine="normalize_then_sum", reward_names=["b", "a", "c"]),
        several("auto", combine="normalize_then_sum", reward_weights=[1.0]),
        several("auto"),
        ClusterNormalizer("auto"),
    ]
    for other in others:
        other.save(tmp_path / "other")
        with pytest.raises(CheckpointError, match="of several rewards"):
            normalizer.load_state_dict(other.state_dict())
        with pytest.raises(CheckpointError, match="of several rewards"):
            normalizer.load(tmp_path / "other")
        with pytest.raises(CheckpointError, match="of several rewards"):
            normalizer.merge(other)
    # One of three histories is no history.
    damaged = normalizer.state_dict()
    damaged["histories"][2]["count"][0] = -1.0
    with pytest.raises(CheckpointError):
        normalizer.load_state_dict(damaged)
    normalizer.save(tmp_path / "state")
    content = bytearray((tmp_path / "state").read_bytes())
    for at in (0, 30, len(content) // 2, len(content) - 1):
        spoilt = content.copy()
        spoilt[at] ^= 1
        for part in (spoilt, content[:at]):
            (tmp_path / "spoilt").write_bytes(part)
            with pytest.raises(CheckpointError):
                normalizer.load(tmp_path / "spoilt")
            with pytest.raises(CheckpointError):
                normalizer.merge(bytes(part))
    header = b'[["reward_0", "reward_1", "reward_2"], [-1, 2, "3"]]'
    for forged in (header, b"[]", b"{", b"[1, 2, 3]", b"\xff"):
        sizes = len(forged).to_bytes(4, "little") + zlib.crc32(forged).to_bytes(4, "little")
        with pytest.raises(CheckpointError, match="of several rewards"):
            normalizer.merge(MAGIC + sizes + forged)
    with pytest.raises(CheckpointError):
        ClusterNormalizer("auto").load(tmp_path / "state")
    assert normalizer.state_dict() == before


def test_it_says_whose_histories_to_ask_for() -> None:
    normalizer = several(**HISTORIES)
    for ask in (normalizer.snapshot, normalizer.diagnostics):
        with pytest.raises(
            ConfigError, match=r"normalizer.rewards\[name\] of one of 'correct', 'fo"
        ):
            ask()
    normalizer.update([[1.0, 2.0, 3.0]], ["a"])
    assert normalizer.rewards["format"].snapshot()["a"].mean == 2.0
    assert normalizer.rewards["format"].diagnostics().clusters["a"].mean == 2.0
    assert repr(normalizer) == (
        "ClusterNormalizer('pgrpo', reward_weights=(1.0, 0.5, -2.0), "
        "reward_names=('correct', 'format', 'length'), combine='normalize_then_sum')"
    )
    assert repr(eval(repr(normalizer))) == repr(normalizer)
    assert dict(ClusterNormalizer().rewards) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward_weights": []}, r"reward_weights is \[\]; expected a finite number for each"),
        ({"reward_weights": [1, float("nan")]}, r"reward_weights is \[1, nan\]; expected a finite"),
        ({"reward_weights": "12"}, "reward_weights is '12'; expected a finite number"),
        ({"reward_weights": 2.0}, "reward_weights is 2.0; expected a finite number"),
        ({"reward_names": ["a", "b"]}, r"reward_names is \['a', 'b'\]; expected 3 different names"),
        ({"reward_names": ["a", "b", "a"]}, "expected 3 different names"),
        ({"reward_names": "abc"}, "reward_names is 'abc'; expected 3 different names"),
        ({"combine": "sum"}, "combine is 'sum'; expected sum_then_normalize or normalize_then_sum"),
        (
            {"reward_weights": None, "reward_names": ["a"]},
            r"reward_names is \['a'\]; it needs reward_weights",
        ),
        ({"reward_weights": None, "combine": "normalize_then_sum"}, "it needs reward_weights"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        several(**options)


def test_a_shared_table_is_of_one_reward(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="reward_weights are given; a shared table is of one"):
        ClusterNormalizer.shared(tmp_path / "table", reward_weights=[1.0, 2.0])
    assert not (tmp_path / "table").exists()


@pytest.mark.parametrize("combine", ["sum_then_normalize", "normalize_then_sum"])
def test_out_of_another_shape_is_refused_first(combine: str) -> None:
    normalizer = several(combine=combine)
    rewards = np.ones((4, 3))
    for out in (np.empty(3), np.empty((4, 3)), np.empty(12)):
        with pytest.raises(DataError, match=r"out has|expected \(4,\)"):
            normalizer(rewards, [0, 0, 1, 1], out=out)
    assert all(reward.snapshot() == {} for reward in normalizer.rewards.values())
