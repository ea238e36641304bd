"""ClusterNormalizer as users meet it: batches, errors, state, threads."""

from __future__ import annotations

import copy
import inspect
import json
import math
import pickle
import pydoc
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pgrpo import CheckpointError, ClusterNormalizer, ClusterStats, ConfigError, DataError
from pgrpo.normalizer import RULES, Options
from pgrpo.normalizer.options import meaning

pytest_plugins = ["parallel"]

REWARDS = [1.0, 0.0, 4.0, 2.0]
CLUSTERS = ["ada", "ada", 7, 7]
ESTIMATORS = list(RULES)
INT_OR_STRING = "expected an int or a string"

plaintext: Any = vars(pydoc)["plaintext"]  # which its stubs leave out


def test_importing_needs_numpy_alone() -> None:
    heavy = "torch", "transformers", "pydantic", "pluggy", "sklearn", "tomli_w"
    code = f"import sys, pgrpo; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_the_two_halves_make_a_call() -> None:
    for estimator in ESTIMATORS:
        whole, halves = ClusterNormalizer(estimator), ClusterNormalizer(estimator)
        for _ in range(3):
            advantages = whole(REWARDS, CLUSTERS, [1, 1, 2, 2], lengths=[1, 2, 3, 4])
            halves.update(REWARDS, CLUSTERS, [1, 1, 2, 2])
            found = halves.normalize(REWARDS, CLUSTERS, [1, 1, 2, 2], lengths=[1, 2, 3, 4])
            assert found == advantages
        assert halves.state_dict() == whole.state_dict()


def test_normalizing_changes_no_history() -> None:
    normalizer = ClusterNormalizer()
    assert normalizer.normalize(REWARDS, CLUSTERS) == [0.0] * 4
    assert normalizer.snapshot() == {}


def test_an_empty_batch_is_a_batch() -> None:
    for estimator in ESTIMATORS:
        normalizer = ClusterNormalizer(estimator)
        assert normalizer([], [], [], lengths=[]) == []
        rewards, ids = np.zeros(0, np.float32), np.zeros(0, np.int32)
        assert normalizer(rewards, [], ids, lengths=[]).dtype == np.float32
        assert normalizer(torch.zeros(0), torch.zeros(0).long(), [], lengths=[]).shape == (0,)
        out, ids = np.zeros(0), np.array([], np.int64)
        assert normalizer(out, ids, ids, lengths=[], out=out) is out
        normalizer.update([], (), [])
        assert normalizer.snapshot() == {}


def test_missing_rewards() -> None:
    rewards, groups = [1.0, None, float("nan"), 3.0, float("inf")], [0] * 5
    lengths = [1, 2, 3, 4, 5]
    for estimator in ESTIMATORS:
        left = ClusterNormalizer(estimator)([1.0, 3.0], ["a"] * 2, [0] * 2, lengths=[1, 4])
        zero = ClusterNormalizer(estimator, nan_policy="zero")
        assert zero(rewards, ["a"] * 5, groups, lengths=lengths) == [left[0], 0, 0, left[1], 0]
        assert zero.num_nonfinite == 3
        assert zero.normalize(rewards, ["a"] * 5, groups, lengths=lengths)[1] == 0
        assert zero.num_nonfinite == 3
        assert zero.snapshot() == {"a": ClusterStats(2, 2.0, 1.0)}
        propagate = ClusterNormalizer(estimator, nan_policy="propagate")
        advantages = propagate(np.array(rewards, np.float64), ["a"] * 5, groups, lengths=lengths)
        np.testing.assert_array_equal(advantages, [left[0], np.nan, np.nan, left[1], np.nan])
        with pytest.raises(DataError, match=r"rewards\[1\] is None; expected a finite number"):
            ClusterNormalizer(estimator)(rewards, ["a"] * 5, groups, lengths=lengths)


def test_a_missing_reward_is_missed_whatever_it_weighs() -> None:
    normalizer = ClusterNormalizer(nan_policy="propagate")
    for weights in ([0.0, 0.0], [0.0, 1.0], [1.0, 0.0]):
        for rewards in ([float("nan"), 1.0], [1.0, float("nan")], [float("inf"), 1.0]):
            found = normalizer(rewards, ["a", "a"], weights=weights)
            assert [math.isnan(a) for a in found] == [not math.isfinite(r) for r in rewards]
            with pytest.raises(DataError, match="expected a finite number"):
                ClusterNormalizer()(rewards, ["a", "a"], weights=weights)


def test_a_cluster_without_any_reward_is_not_in_the_snapshot() -> None:
    normalizer = ClusterNormalizer(nan_policy="zero")
    assert normalizer(np.array([np.nan, 1.0]), ["none", "one"]).tolist() == [0.0, 0.0]
    normalizer.update([1.0], ["weightless"], weights=[0.0])
    assert set(normalizer.snapshot()) == {"one"}


def test_weights_count() -> None:
    weighted, repeated = ClusterNormalizer(), ClusterNormalizer()
    weighted.update([1.0, 4.0], ["a", "a"], weights=[3, 1])
    repeated.update([1.0, 1.0, 1.0, 4.0], ["a"] * 4)
    assert weighted.snapshot() == repeated.snapshot()
    weighted.update([1.0], ["a"], weights=[0.5])
    assert weighted.snapshot()["a"].count == 4.5
    assert type(repeated.snapshot()["a"].count) is int


def test_retracting_undoes() -> None:
    normalizer = ClusterNormalizer()
    normalizer.update([1.0, 3.0, 8.0], ["a", "a", "b"])
    before = normalizer.snapshot()
    normalizer.update([5.0, 7.0, 1.0], ["a", "b", "c"], weights=[2, 1, 1])
    normalizer.retract(torch.tensor([5.0, 7.0, 1.0]), ["a", "b", "c"], weights=[2, 1, 1])
    assert normalizer.snapshot() == before
    with pytest.raises(DataError, match=r'cluster "b" holds 1 samples; cannot retract 2'):
        normalizer.retract([1.0, 8.0, 8.0], ["a", "b", "b"])
    assert normalizer.snapshot() == before
    cases: list[dict[str, Any]] = [
        {"estimator": "shrinkage"},
        {"estimator": "auto"},
        {"track_delta": True},
        {"track_diagnostics": True},
    ]
    for options in cases:
        with pytest.raises(ConfigError, match="retract needs an estimator other than shrinkage"):
            ClusterNormalizer(**options).retract([1.0], ["a"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "pgrop"}, '"pgrop"; expected pgrpo, grpo, .* or '),
        ({"estimator": None}, "estimator is None; expected pgrpo, grpo, .* or "),
        ({"ddof": 2}, "ddof is 2; expected 0 or 1"),
        ({"ddof": -1}, "ddof is -1; expected 0 or 1"),
        ({"ddof": 10**30}, "ddof is 10*; expected 0 or 1"),
        ({"ddof": "0"}, "ddof is '0'; expected 0 or 1"),
        ({"ddof": 0.0}, "ddof is 0.0; expected 0 or 1"),
        ({"eps": 0.0}, "eps is 0.0; expected a number from 1e-100 on"),
        ({"eps": float("nan")}, "eps is NaN; expected a number from 1e-100 on"),
        ({"eps": "1"}, "eps is '1'; expected a number from 1e-100 on"),
        ({"order": "update"}, "expected update_then_normalize or normalize_then_update"),
        ({"nan_policy": "omit"}, "expected raise, zero or propagate"),
        ({"forgetting": 0.0}, "forgetting is 0.0; expected a number above 0, up to 1"),
        ({"forgetting": 1.5}, "forgetting is 1.5; expected"),
        (
            {"forgetting": 0.9, "track_delta": True},
            "forgetting is 0.9; expected 1 with track_delta",
        ),
        ({"prior_count": -1}, "prior_count is -1.0; expected a number of at least 0"),
        ({"sigma_floor": -0.5}, "sigma_floor is -0.5; expected a number of at least 0"),
        ({"clip": 0}, "clip is 0.0; expected a positive number or None"),
        ({"clip": "2"}, "clip is '2'; expected a positive number or None"),
        ({"min_count": -1}, "min_count is -1.0; expected a number of at least 0"),
        (
            {"frequency_weight": math.inf},
            "frequency_weight is inf; expected a number from -10 to 10",
        ),
        ({"track_delta": 1}, "track_delta is 1; expected True or False"),
        ({"track_diagnostics": "no"}, "track_diagnostics is 'no'; expected True or False"),
        ({"num_threads": 0}, "num_threads is 0; expected a whole number of at least 1"),
        ({"num_threads": -1}, "num_threads is -1; expected a whole number of at least 1"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ClusterNormalizer(**options)


def test_options_may_be_numbers_of_numpy() -> None:
    options: Any = {"ddof": np.int64(1), "eps": np.float32(0.5), "num_threads": np.int8(2)}
    normalizer = ClusterNormalizer(**options)
    assert normalizer([0.0, 1.0], [0, 0])[1] == pytest.approx(0.5 / (math.sqrt(0.5) + 0.5))


SHAPES = r"rewards has shape \(2, 3\), {} has {}; expected \(2,\) or \(2, 3\)"


@pytest.mark.parametrize(
    ("rewards", "clusters", "groups", "message"),
    [
        ([1.0] * 7, ["a"] * 8, None, "rewards has 7 entries, clusters has 8"),
        ([1.0] * 7, ["a"] * 7, [1] * 6, "rewards has 7 entries, groups has 6"),
        (np.ones(7), np.ones(8, int), None, "rewards has 7 entries, clusters has 8"),
        (torch.ones(7), torch.ones(8).long(), None, "rewards has 7 entries, clusters has 8"),
        (np.array(1.0), ["a"], None, r"rewards has shape \(\); expected \[N\], or \[P, G\]"),
        (torch.tensor(1.0), ["a"], None, r"rewards has shape \(\); expected \[N\], or \[P, G\]"),
        (np.ones((2, 2, 2)), ["a"] * 2, None, r"rewards has shape \(2, 2, 2\); expected \[N\], or"),
        (
            torch.ones(1, device="meta"),
            ["a"],
            None,
            r"rewards is tensor.*meta.*; expected \[N\] or \[P, G\] num",
        ),
        (3.0, ["a"], None, r"rewards has shape \(\); expected \[N\], or \[P, G\]"),
        (None, ["a"], None, r"rewards has shape \(\); expected \[N\], or \[P, G\]"),
        ((r for r in [1.0]), ["a"], None, r"rewards has shape \(\); expected \[N\], or \[P, G\]"),
        ([1.0, [2.0]], ["a"] * 2, None, r"rewards is \[1.0, \[2.0\]\]; expected \[N\] or \[P, G\]"),
        (["1.0"], ["a"], None, r"rewards is \['1.0'\]; expected \[N\] or \[P, G\] numbers"),
        (
            [None, "1.0"],
            ["a"] * 2,
            None,
            r"rewards is \[None, '1.0'\]; expected \[N\] or \[P, G\] numbers",
        ),
        (b"a", ["a"], None, r"rewards is b'a'; expected \[N\] or \[P, G\] numbers"),
        ("1", ["a"], None, r"rewards is '1'; expected \[N\] or \[P, G\] numbers"),
        ([1j], ["a"], None, r"rewards is \[1j\]; expected \[N\] or \[P, G\] numbers"),
        (
            np.array([1j]),
            ["a"],
            None,
            r"rewards has dtype complex128; expected \[N\] or \[P, G\] numbers",
        ),
        (
            np.array(["1"]),
            ["a"],
            None,
            r"rewards has dtype <U1; expected \[N\] or \[P, G\] numbers",
        ),
        (np.array(["2020-01-01"], "M8[D]"), ["a"], None, r"rewards has dtype datetime64"),
        ([1.0], [1.5], None, rf"clusters\[0\] is 1.5; {INT_OR_STRING}"),
        ([1.0, 1.0], [1, True], None, rf"clusters\[1\] is True; {INT_OR_STRING}"),
        ([1.0], np.array([True]), None, "clusters has dtype bool; expected ints or strings"),
        ([1.0], np.array([1.0]), None, "clusters has dtype float64; expected ints or strings"),
        ([1.0], torch.tensor([1.0]), None, "clusters has dtype float32; expected ints or strings"),
        ([1.0], torch.tensor([True]), None, "clusters has dtype bool; expected ints or strings"),
        ([1.0], np.array([b"a"]), None, r"clusters has dtype \|S1; expected ints or strings"),
        ([1.0], [b"a"], None, rf"clusters\[0\] is b'a'; {INT_OR_STRING}"),
        ([1.0], [None], None, rf"clusters\[0\] is None; {INT_OR_STRING}"),
        ([1.0], np.array([None]), None, rf"clusters\[0\] is None; {INT_OR_STRING}"),
        ([1.0], "a", None, r"clusters is 'a'; expected \[N\] ints or strings"),
        ([1.0], np.array(3), None, r"clusters has shape \(\); expected one dimension"),
        ([1.0], 3, None, r"clusters has shape \(\); expected one dimension"),
        ([1.0], np.ones((1, 1), int), None, r"clusters has shape \(1, 1\); expected one dimension"),
        (
            [1.0],
            [2**63],
            None,
            rf"clusters\[0\] is {2**63}; expected an int of 64 bits, below 2\^63",
        ),
        ([1.0], [-(2**63) - 1], None, rf"clusters\[0\] is {-(2**63) - 1}; expected an int of 64"),
        (
            [1.0] * 2,
            np.array([1, 2**63], np.uint64),
            None,
            rf"clusters\[1\] is {2**63}; expected an",
        ),
        ([1.0], ["a"], [2**70], rf"groups\[0\] is {2**70}; expected an int of 64 bits"),
        ([1.0], ["\ud800"], None, r"clusters\[0\] is '\\ud800', half of a surrogate pair"),
        ([1.0], ["a"], [[1]], rf"groups\[0\] is \[1\]; {INT_OR_STRING}"),
        ([1e140], ["a"], None, r"rewards\[0\] is 1e140; expected a finite number below 1e140"),
        ([10**200], ["a"], None, r"rewards\[0\] is 1e200; expected a finite number below 1e140"),
        (np.array([-np.inf], np.float32), ["a"], None, r"rewards\[0\] is -inf; expected a finite"),
        # Rows.
        (np.ones((2, 3)), np.ones(3, int), None, SHAPES.format("clusters", r"\(3,\)")),
        (np.ones((2, 3)), np.ones(6, int), None, SHAPES.format("clusters", r"\(6,\)")),
        (np.ones((2, 3)), np.ones((3, 2), int), None, SHAPES.format("clusters", r"\(3, 2\)")),
        (np.ones((2, 3)), np.ones((2, 1), int), None, SHAPES.format("clusters", r"\(2, 1\)")),
        (np.ones((2, 3)), ["a"], None, SHAPES.format("clusters", r"\(1,\)")),
        (np.ones((2, 3)), [["a"] * 3], None, SHAPES.format("clusters", r"\(1, 3\)")),
        (np.ones((2, 3)), ["a", "b"], np.arange(3), SHAPES.format("groups", r"\(3,\)")),
        (torch.ones(2, 3), ["a"] * 3, None, SHAPES.format("clusters", r"\(3,\)")),
        ([[1.0] * 3] * 2, torch.ones(3).long(), None, SHAPES.format("clusters", r"\(3,\)")),
        (
            [[1.0], [1.0, 2.0]],
            [0, 0],
            None,
            r"rewards is \[\[1.0\], .*; expected \[N\] or \[P, G\] num",
        ),
        (
            np.ones((2, 3)),
            [["a"] * 3, ["a"] * 2],
            None,
            r"clusters\[1\] is \['a', 'a'\]; expected 3 ids, as many as a row of rewards has",
        ),
        (np.ones((2, 1)), [["a"], "a"], None, r"clusters\[1\] is 'a'; expected 1 ids"),
        (np.ones((2, 1)), [["a"], [None]], None, rf"clusters\[1, 0\] is None; {INT_OR_STRING}"),
        (np.ones((2, 1)), ["a", None], None, rf"clusters\[1\] is None; {INT_OR_STRING}"),
        (
            np.ones((1, 2)),
            np.array([[1, 2**63]], np.uint64),
            None,
            rf"clusters\[0, 1\] is {2**63}; expected an int of 64 bits",
        ),
        ([[1.0, None]], ["a"], None, r"rewards\[0, 1\] is None; expected a finite number"),
        ([1.0, None], [0, 1], None, r"rewards\[1\] is None; expected a finite number"),
        (
            np.array([[1.0], [np.inf]]),
            ["a", "b"],
            None,
            r"rewards\[1, 0\] is inf; expected a finite",
        ),
    ],
)
def test_bad_batches_change_nothing(rewards: Any, clusters: Any, groups: Any, message: str) -> None:
    normalizer = ClusterNormalizer()
    normalizer.update(REWARDS, CLUSTERS)
    before = normalizer.state_dict()
    methods = normalizer, normalizer.advantages, normalizer.update, normalizer.normalize
    for method in methods:
        with pytest.raises(DataError, match=message):
            method(rewards, clusters, groups)
    assert normalizer.state_dict() == before


@pytest.mark.parametrize("name", ["weights", "score_norms", "lengths"])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, 2.0], "rewards has 3 entries, {} has 2"),
        (np.ones(4), "rewards has 3 entries, {} has 4"),
        ([1.0, -1.0, 1.0], r"{}\[1\] is -1.0; expected a number from 0 to below 2\^20"),
        ([1.0, 1.0, None], r"{}\[2\] is NaN; expected a number from 0 to below 2\^20"),
        ([math.inf, 1.0, 1.0], r"{}\[0\] is inf; expected a number from 0 to below 2\^20"),
        ([1.0, 2.0**20, 1.0], r"{}\[1\] is 1048576.0; expected a number from 0 to below 2\^20"),
        (["1"] * 3, r"{} is \['1', '1', '1'\]; expected \[N\] or \[P, G\] numbers"),
        (np.ones((3, 1)), r"{} has shape \(3, 1\); expected one dimension"),
        (2.0, r"{} has shape \(\); expected one dimension"),
    ],
)
def test_bad_weights(name: str, values: Any, message: str) -> None:
    normalizer = ClusterNormalizer("auto")
    for method in (normalizer, normalizer.update, normalizer.normalize):
        with pytest.raises(DataError, match=message.format(name)):
            method([1.0, 2.0, 3.0], [1, 1, 1], [1, 1, 1], **{name: values})
    assert normalizer.snapshot() == {}


@pytest.mark.parametrize("estimator", [name for name in RULES if RULES[name].needs_groups])
def test_groups_are_asked_for(estimator: str) -> None:
    normalizer = ClusterNormalizer(estimator)
    for method in (normalizer, normalizer.normalize):
        with pytest.raises(DataError, match=f"estimator {estimator} needs groups: one group id"):
            method(REWARDS, CLUSTERS)
    if RULES[estimator].keeps_parts:
        with pytest.raises(DataError, match=f"estimator {estimator} needs groups: one group id"):
            normalizer.update(REWARDS, CLUSTERS)
    assert normalizer.snapshot() == {}


PUBLIC = [
    *["__init__", "__call__", "advantages", "normalize", "update", "retract", "shared"],
    *["snapshot", "diagnostics", "state_dict", "load_state_dict", "save", "load", "merge", "delta"],
    *["forget", "keep", "reset", "parents"],
]


@pytest.mark.parametrize("name", PUBLIC)
def test_methods_explain_themselves_at_run_time(name: str) -> None:
    method = getattr(ClusterNormalizer, name)
    signature = inspect.signature(method)
    assert "memory" not in signature.parameters
    assert signature.parameters["self" if name != "shared" else "path_or_name"]
    lines = (inspect.getdoc(method) or "").splitlines()
    assert len(lines) > 0
    assert lines[0] in pydoc.render_doc(method, renderer=plaintext)


def test_every_public_method_is_looked_at() -> None:
    found = {name for name in vars(ClusterNormalizer) if not name.startswith("_")}
    assert set(PUBLIC) - {"__init__", "__call__"} == found - {
        "estimator",
        "is_shared",
        "num_nonfinite",
        "options",
        "rewards",
    }


def test_the_signature_is_that_of_the_options() -> None:
    signature = inspect.signature(ClusterNormalizer)
    own = {"reward_weights", "reward_names", "combine"}
    shared = {name: found for name, found in signature.parameters.items() if name not in own}
    assert shared == inspect.signature(Options).parameters
    assert own == signature.parameters.keys() - shared.keys()
    help_text = pydoc.render_doc(ClusterNormalizer, renderer=plaintext)
    for name in own:
        assert f"    {name}: " in help_text
    for field in fields(Options):
        assert signature.parameters[field.name].default == field.default
        assert meaning(field.name)[:30].lower() in " ".join(help_text.split()).lower()
    for rule in RULES.values():
        assert rule.formula in help_text
    for name in ("rewards", "clusters", "groups", "weights", "score_norms", "lengths", "parents"):
        assert name in inspect.signature(ClusterNormalizer.update).parameters


def test_errors_are_those_that_users_of_numbers_catch() -> None:
    wrong = (ValueError, TypeError)
    for kind in wrong:
        with pytest.raises(kind, match="expected a number from 1e-100 on"):
            ClusterNormalizer(eps="1")  # type: ignore[arg-type]
        with pytest.raises(kind, match="rewards has 1 entries, clusters has 2"):
            ClusterNormalizer()([1.0], ["a", "b"])


# State.

ids = st.one_of(
    st.integers(-(2**63), 2**63 - 1),
    st.integers(0, 3),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=3),
)
finite = st.floats(-1e100, 1e100)


def filled(estimator: str = "auto", **options: Any) -> ClusterNormalizer:
    """One that has something of everything."""
    normalizer = ClusterNormalizer(
        estimator, nan_policy="zero", track_diagnostics=True, track_delta=True, **options
    )
    rng = np.random.default_rng(0)
    for step in range(3):
        clusters = [["a", "b", 3, -7][i] for i in rng.integers(0, 4, 40)]
        normalizer(rng.normal(1e3, 1, 40), clusters, rng.integers(0, 9, 40), weights=rng.random(40))
        normalizer([None], ["c"], [0])
        if step == 1:
            normalizer.delta()
    return normalizer


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.lists(st.tuples(finite, ids, ids), max_size=20), max_size=4),
    st.sampled_from(ESTIMATORS),
)
def test_state_round_trips_exactly(batches: list[list[Any]], estimator: str) -> None:
    tracked = estimator != "rae"
    source = ClusterNormalizer(
        estimator, nan_policy="zero", track_delta=tracked, track_diagnostics=True
    )
    for batch in batches:
        rewards, clusters, groups = ([row[i] for row in batch] for i in range(3))
        source(rewards, clusters, groups, lengths=[1.0] * len(rewards))
    source.update(np.array([np.nan]), ["none"], [0])
    state = source.state_dict()
    other = ClusterNormalizer(estimator, ddof=1, track_delta=tracked, track_diagnostics=True)
    other.update([1.0], ["forgotten"], [0])
    other.load_state_dict(json.loads(json.dumps(state)))
    assert other.state_dict() == state
    assert list(other.snapshot()) == list(source.snapshot())
    assert list(map(type, other.snapshot())) == list(map(type, source.snapshot()))
    assert other.num_nonfinite == 1
    for made in (pickle.loads(pickle.dumps(source)), copy.copy(source), copy.deepcopy(source)):
        assert made.state_dict() == state
        assert repr(made) == repr(source)


@pytest.mark.parametrize(
    "options", [{}, {"prior_count": 5.0}, {"frequency_weight": 0.5, "forgetting": 0.9}]
)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_restored_normalizer_goes_on_bit_for_bit(estimator: str, options: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    batches = [
        (rng.normal(3, 5, 40), rng.integers(0, 4, 40), rng.integers(0, 9, 40)) for _ in range(6)
    ]
    through, first, by_dict, by_file = (ClusterNormalizer(estimator, **options) for _ in range(4))
    lengths = np.arange(40)
    expected = [through(*batch, lengths=lengths) for batch in batches]
    for batch in batches[:3]:
        first(*batch, lengths=lengths)
    by_dict.load_state_dict(json.loads(json.dumps(first.state_dict())))
    with tempfile.TemporaryDirectory() as folder:
        first.save(Path(folder) / "histories")
        by_file.load(Path(folder) / "histories")
    for second in (by_dict, by_file, copy.deepcopy(first)):
        for batch, advantages in zip(batches[3:], expected[3:], strict=True):
            found = second(*batch, lengths=lengths)
            np.testing.assert_array_equal(found, advantages)


NAMES: list[Any] = ["a", 3, "b", -7, 2**40, 70_000, "", 4_194_303, 4_194_304]


@settings(max_examples=30, deadline=None)
@given(
    batches=st.lists(
        st.lists(st.tuples(st.integers(0, 8), st.floats(-50, 50)), min_size=1),
        min_size=1,
        max_size=5,
    ),
    dropped=st.sets(st.integers(0, 8)),
    forgetting=st.sampled_from([1.0, 0.9]),
)
def test_what_is_forgotten_was_never_there(
    batches: list[list[tuple[int, float]]], dropped: set[int], forgetting: float
) -> None:
    options: dict[str, Any] = {
        "prior_count": 3.0,
        "frequency_weight": 0.5,
        "forgetting": forgetting,
    }
    forgetful, keeping, other = (ClusterNormalizer("pgrpo", **options) for _ in range(3))
    for batch in batches:
        clusters, rewards = [NAMES[at] for at, _ in batch], [reward for _, reward in batch]
        for normalizer in (forgetful, keeping):
            normalizer.update(rewards, clusters)
        rest = [(NAMES[at], reward) for at, reward in batch if at not in dropped]
        other.update([reward for _, reward in rest], [cluster for cluster, _ in rest])
    seen = forgetful.snapshot()
    names = [NAMES[at] for at in sorted(dropped)]
    assert forgetful.forget(names) == len(seen.keys() & set(names))
    kept = [name for name in NAMES if name not in names]
    assert keeping.keep(np.array(kept, object)) == len(seen.keys() & set(names))
    assert keeping.state_dict() == forgetful.state_dict()
    assert set(forgetful.snapshot()) == seen.keys() - set(names)
    # Also in what is read of all clusters together: by all that come after.
    rewards, clusters = [1.0, -4.0, 2.5, 0.0], ["a", 3, 70_000, "new"]
    expected = other(rewards, clusters)
    for normalizer in (forgetful, keeping):
        np.testing.assert_allclose(normalizer(rewards, clusters), expected, rtol=1e-9, atol=1e-9)


def test_what_is_pending_is_forgotten_too() -> None:
    normalizer, other = ClusterNormalizer(track_delta=True), ClusterNormalizer()
    normalizer.update([1.0, 2.0, 3.0], ["a", "b", 5])
    assert normalizer.forget([5, "unknown"]) == 1
    other.merge(normalizer.delta())
    assert list(other.snapshot()) == ["a", "b"]
    with pytest.raises(DataError, match=r"clusters\[1\] is 2.0; expected an int or a string"):
        normalizer.forget(["a", 2.0])  # type: ignore[list-item]
    assert list(normalizer.snapshot()) == ["a", "b"]
    assert normalizer.keep([]) == 2
    assert normalizer.snapshot() == {}


def test_a_copy_is_another() -> None:
    source = filled()
    state, copied = source.state_dict(), copy.copy(source)
    copied([1.0], ["a"], [0])
    assert source.state_dict() == state
    assert copied.state_dict() != state

    class Mine(ClusterNormalizer):
        note = ""

    mine = Mine("rloo", eps=0.5)
    mine.note = "kept"
    copied = copy.deepcopy(mine)
    assert (type(copied), copied.note, repr(copied)) == (Mine, "kept", "Mine('rloo', eps=0.5)")


def set_entry(column: str, index: int, value: Any) -> dict[str, Any]:
    return {column: (index, value)}


COLUMNS = [
    *["count", "origin", "offset", "m2", "num_parts", "squared_sizes", "within_squares"],
    *["baseline_0", "baseline_1", "baseline_2"],
    *["num_advantages", "advantage_sum", "advantage_squares"],
]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"more": 1}, "it holds version, clusters, count, .*, num_nonfinite, more; expected"),
        ({"version": 2}, "version is 2; expected 3"),
        ({"offset": 1.0}, "offset is 1.0; expected a list"),
        ({"offset": ["1", 2.0]}, r"offset\[0\] is '1'; expected float"),
        ({"offset": [1.0]}, "clusters has 2 entries, offset has 1"),
        ({"count": [2, True]}, r"count\[1\] is True; expected float"),
        ({"count": [2, 10**400]}, r"count\[1\] is 1000.*; expected float"),
        ({"clusters": ["a", True]}, r"clusters\[1\] is True; expected int or str"),
        ({"clusters": ["a", 2**63]}, rf"clusters\[1\] is {2**63}; expected int or str"),
        ({"clusters": ["a", "a"]}, "clusters names one of them twice"),
        ({"clusters": ["a", "\ud800"]}, "surrogate"),
        ({"num_nonfinite": 0.0}, "num_nonfinite is 0.0; expected an int of at least 0"),
        ({"num_nonfinite": -1}, "num_nonfinite is -1; expected an int of at least 0"),
        ({"num_nonfinite": 2**64}, "num_nonfinite is 1844.*; expected an int of at least 0"),
        ({"pending": []}, r"pending is \[\]; expected a dict"),
        ({"pending": {}}, "pending holds nothing; expected clusters, count"),
        *[
            ({column: [1.0, value]}, "normalizer state: ")
            for column in COLUMNS
            for value in (math.nan, math.inf)
        ],
        *[({column: [1.0, -1.0]}, "normalizer state: ") for column in ("count", "m2")],
        ({"origin": [0.0, 1e140]}, "normalizer state: "),
    ],
)
def test_a_damaged_state_is_refused(damage: dict[str, Any], message: str) -> None:
    normalizer = ClusterNormalizer("auto", track_delta=True, track_diagnostics=True)
    normalizer(REWARDS, CLUSTERS, [1, 1, 2, 2])
    state = normalizer.state_dict()
    with pytest.raises(CheckpointError, match=message):
        normalizer.load_state_dict({**state, **damage})
    if damage.keys() <= state["pending"].keys():
        pending = {**state["pending"], **damage}
        with pytest.raises(CheckpointError):
            normalizer.load_state_dict({**state, "pending": pending})
    assert normalizer.state_dict() == state


def test_what_is_no_state_is_refused() -> None:
    states: list[Any] = [{}, [], None]
    for state in states:
        with pytest.raises(CheckpointError, match="normalizer state: it "):
            ClusterNormalizer().load_state_dict(state)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_files() -> None:
    source, other = filled(), filled()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source.save(folder / "histories")
        source.save(str(folder / "histories"))
        assert names_in(folder) == ["histories"]
        other([1.0], ["a"], [0])
        other.load(str(folder / "histories"))
        state = other.state_dict()
        assert state == source.state_dict()
        whole = (folder / "histories").read_bytes()
        for at in range(0, len(whole), 7):
            damaged = bytearray(whole)
            damaged[at] ^= 4
            for content in (whole[:at], bytes(damaged), whole + b"x"):
                (folder / "damaged").write_bytes(content)
                with pytest.raises(CheckpointError, match="damaged: .*"):
                    other.load(folder / "damaged")
                with pytest.raises(CheckpointError):
                    other.merge(content)
        with pytest.raises(CheckpointError, match="cannot read .*absent: No such file"):
            other.load(folder / "absent")
        with pytest.raises(CheckpointError, match="cannot write .*histories: No such file"):
            other.save(folder / "absent" / "histories")
        (folder / "taken").mkdir()
        with pytest.raises(CheckpointError, match="cannot write .*taken: "):
            other.save(folder / "taken")
        assert names_in(folder) == ["damaged", "histories", "taken"]
        assert other.state_dict() == state


WRITER = """
import sys, numpy as np, pgrpo
normalizer = pgrpo.ClusterNormalizer()
print("ready", flush=True)
for step in range(1, 10**9):
    normalizer.update(np.ones(2000), np.arange(2000))
    normalizer.save(sys.argv[1])
"""


def test_a_killed_save_leaves_a_whole_file() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "histories"
        for attempt in range(4):
            process = subprocess.Popen(
                [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE
            )
            assert process.stdout is not None
            process.stdout.readline()
            while not path.exists():
                assert process.poll() is None
            threading.Event().wait(0.01 * attempt)
            process.kill()
            process.wait()
            process.stdout.close()
            normalizer = ClusterNormalizer()
            normalizer.load(path)
            assert len({stats.count for stats in normalizer.snapshot().values()}) == 1
            path.unlink()


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


def test_deltas() -> None:
    source, sink, whole = (ClusterNormalizer("shrinkage", track_delta=True) for _ in range(3))
    rng = np.random.default_rng(3)
    deltas: list[bytes] = []
    for _ in range(5):
        clusters = [["a", "b", 3][i] for i in rng.integers(0, 3, 30)]
        batch = (rng.normal(1e6, 1, 30), clusters, rng.integers(0, 9, 30))
        source.update(*batch)
        whole.update(*batch)
        deltas.append(source.delta())
    for at in (3, 0, 4, 2, 1):
        sink.merge(deltas[at])
    found, expected = sink.snapshot(), whole.snapshot()
    assert found.keys() == expected.keys()
    for cluster, stats in expected.items():
        assert found[cluster].count == stats.count
        assert found[cluster].mean == pytest.approx(stats.mean, rel=1e-15)
        assert found[cluster].std == pytest.approx(stats.std, rel=1e-12)
    # Each sample is in one delta only; what was merged is in none.
    empty = ClusterNormalizer()
    empty.merge(source.delta())
    empty.merge(sink.delta())
    assert empty.snapshot() == {}


def test_what_cannot_be_merged() -> None:
    normalizer = ClusterNormalizer()
    with pytest.raises(ConfigError, match="delta needs the option track_delta"):
        normalizer.delta()
    others: list[Any] = [None, "delta", {}]
    for other in others:
        with pytest.raises(DataError, match=f"other is {re.escape(repr(other))}; expected a Clus"):
            normalizer.merge(other)
    with pytest.raises(CheckpointError):
        normalizer.merge(b"no delta")


def test_it_says_what_it_is() -> None:
    normalizer = ClusterNormalizer("grpo", ddof=1, clip=2.5)
    again = eval(repr(normalizer))
    assert repr(again) == repr(normalizer) == "ClusterNormalizer('grpo', ddof=1, clip=2.5)"


# Diagnostics.


def test_diagnostics_against_two_passes() -> None:
    rng = np.random.default_rng(5)
    normalizer = ClusterNormalizer("pgrpo", ddof=1, track_diagnostics=True)
    rewards, clusters, advantages, parts = [], [], [], []
    for _ in range(4):
        groups = np.repeat(np.arange(30), 4)
        cluster = np.where(groups % 3 == 0, "few", "many")
        reward = rng.normal(size=120) + rng.normal(size=30)[groups] + (cluster == "few")
        advantages.append(normalizer(reward, cluster, groups))
        rewards.append(reward)
        clusters.append(cluster)
        parts.append(reward.reshape(30, 4))
    reward, cluster, advantage = map(np.concatenate, (rewards, clusters, advantages))
    part = np.concatenate(parts)
    found = normalizer.diagnostics()
    assert list(found.clusters) == list(normalizer.snapshot())
    for name, one in found.clusters.items():
        own, means = (
            reward[cluster == name],
            part[np.tile(np.arange(30) % 3 == 0, 4) == (name == "few")],
        )
        assert one.count == len(own)
        assert one.share == pytest.approx(len(own) / 480)
        assert one.mean == pytest.approx(own.mean(), rel=1e-12)
        assert one.std == pytest.approx(own.std(ddof=1), rel=1e-12)
        assert one.group_size == pytest.approx(4)
        within = means.var(axis=1, ddof=1).mean()
        between = 4 * ((means.mean(axis=1) - own.mean()) ** 2).sum()
        tau2 = (between - len(means) * within) / (len(own) - 4)
        assert one.icc == pytest.approx(tau2 / (tau2 + within), rel=1e-10)
        assert one.scale_ratio == pytest.approx((math.sqrt(within) + 1e-4) / (one.std + 1e-4))
        assert one.bias_rms == pytest.approx(math.sqrt(between / len(own)) / (one.std + 1e-4))
        assert one.mean_advantage == pytest.approx(advantage[cluster == name].mean(), abs=1e-12)
        assert one.std_advantage == pytest.approx(advantage[cluster == name].std(), rel=1e-10)
    between = sum(
        (cluster == c).sum() * (reward[cluster == c].mean() - reward.mean()) ** 2
        for c in found.clusters
    )
    assert found.eta2 == pytest.approx(between / (480 * reward.var()), rel=1e-12)
    assert found.eta2_null == pytest.approx(1 / 479)
    dealt = [rng.permutation(cluster) for _ in range(400)]
    etas = [
        480 * 0.0
        + sum((c == k).sum() * (reward[c == k].mean() - reward.mean()) ** 2 for k in found.clusters)
        for c in dealt
    ]
    below = np.mean(np.array(etas) / (480 * reward.var()) < found.eta2_threshold)
    assert 0.91 < below < 0.98
    assert [w for w in found.warnings if "ICC * group size > 1" in w]


def warned(normalizer: ClusterNormalizer) -> str:
    return "\n".join(normalizer.diagnostics().warnings)


def test_warnings() -> None:
    rng = np.random.default_rng(7)
    groups = np.repeat(np.arange(100), 4)
    clusters = np.where(groups < 96, groups % 2, 2)
    healthy = ClusterNormalizer(track_diagnostics=True)
    for _ in range(5):
        healthy(rng.normal(clusters % 2, 1.0), groups % 2, groups)
    assert warned(healthy) == ""
    # Prompts that differ, and rewards that mean more than 0 or 1.
    prompts = ClusterNormalizer(track_diagnostics=True)
    prompts(rng.normal(rng.normal(size=100)[groups], 0.5), clusters, groups)
    assert "ICC * group size > 1" in warned(prompts)
    binary = ClusterNormalizer(track_diagnostics=True)
    binary((rng.random(400) < rng.random(100)[groups]).astype(float), clusters, groups)
    assert "ICC" not in warned(binary)
    assert "cluster 2: under 5% of the data" in warned(binary)
    assert "clusters carry no information" in warned(binary)
    # A judge who changes his mind.
    lagging = ClusterNormalizer(track_diagnostics=True)
    for shift in (0.0, 3.0):
        lagging(rng.normal(shift, 1, 400), clusters, groups)
    assert "|mean advantage| > 0.3" in warned(lagging)
    young = ClusterNormalizer(track_diagnostics=True)
    young([1.0, 2.0, 3.0, 5.0], ["a"] * 4, [0] * 4)
    assert "cluster 'a': fewer rewards than two groups have" in warned(young)
    equal = ClusterNormalizer(nan_policy="zero")
    equal([1.0] * 10 + [None], [*range(5)] * 2 + ["none"])
    assert "clusters 0, 1, 2 and 2 more: the standard deviation is 0" in warned(equal)
    assert "rewards that are None, NaN or infinite were left out: 1" in warned(equal)


def test_diagnostics_of_little() -> None:
    found = ClusterNormalizer(track_diagnostics=True).diagnostics()
    assert (found.clusters, found.eta2, found.warnings) == ({}, None, [])
    untracked = ClusterNormalizer()
    untracked(REWARDS, CLUSTERS)
    ada = untracked.diagnostics().clusters["ada"]
    assert (ada.count, ada.share, ada.mean, ada.std) == (2, 0.5, 0.5, 0.5)
    assert {ada.icc, ada.group_size, ada.scale_ratio, ada.bias_rms, ada.mean_advantage} == {None}
    one = ClusterNormalizer(track_diagnostics=True)
    one([1.0], [0], [0])
    assert one.diagnostics().clusters[0].icc is None


@pytest.mark.parametrize("denominator", [3, 10, 1000, 1e5])
@pytest.mark.parametrize("numerator", [1, 2, 10, 1000])
def test_f_quantiles(numerator: float, denominator: float) -> None:
    from scipy.stats import f

    from pgrpo.normalizer.diagnostics import f_quantile_95

    level = f.sf(f_quantile_95(numerator, denominator), numerator, denominator)
    assert level == pytest.approx(0.05, abs=0.005)


# Threads that share one.


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
        batches = [batch for found in pool.map(work, range(num_threads)) for batch in found]
    rewards = np.concatenate([batch[0] for batch in batches])
    clusters = np.concatenate([batch[1] for batch in batches])
    snapshot = normalizer.snapshot()
    kept = np.isfinite(rewards)
    assert set(snapshot) == set(clusters[kept].tolist())
    for cluster, stats in snapshot.items():
        own = rewards[kept & (clusters == cluster)]
        assert stats.count == len(own)
        assert stats.mean == pytest.approx(own.mean(), rel=1e-12)
        assert stats.std == pytest.approx(own.std(), rel=1e-9, abs=1e-9)
    assert normalizer.num_nonfinite == num_threads * num_calls


@pytest.mark.usefixtures("restless_threads")
@pytest.mark.parametrize("first", [0, 2**22 - 100, 2**40], ids=["rows", "both", "interned"])
def test_threads_that_meet_the_same_new_clusters_agree_on_them(first: int) -> None:
    """Each cluster only ever gets its own number as reward."""
    num_threads, num_clusters = 4, 5_000
    normalizer, start = ClusterNormalizer(), threading.Barrier(num_threads)

    def work(seed: int) -> None:
        clusters = first + np.random.default_rng(seed).permutation(num_clusters)
        start.wait()
        for part in np.array_split(clusters, 20):
            normalizer.update(part.astype(np.float64), part)

    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(work, range(num_threads)))
    expected = {
        first + i: ClusterStats(num_threads, float(first + i), 0.0) for i in range(num_clusters)
    }
    assert normalizer.snapshot() == expected


@pytest.mark.usefixtures("restless_threads")
def test_every_sample_is_in_one_delta() -> None:
    """While others fold, deltas are taken and merged elsewhere: nothing is lost or told twice."""
    source, sink = ClusterNormalizer(track_delta=True), ClusterNormalizer()
    running = threading.Event()
    running.set()

    def fold(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(200):
            clusters = rng.integers(0, 5, 16)
            source.update(rng.normal(size=16), clusters)

    def send() -> None:
        while running.is_set():
            sink.merge(source.delta())

    with ThreadPoolExecutor(5) as pool:
        sending = [pool.submit(send) for _ in range(2)]
        folding = [pool.submit(fold, seed) for seed in range(3)]
        for future in folding:
            future.result()
        running.clear()
        for future in sending:
            future.result()
    sink.merge(source.delta())
    counts = [stats.count for stats in source.snapshot().values()]
    assert sum(counts) == 3 * 200 * 16
    assert [stats.count for stats in sink.snapshot().values()] == counts


def test_a_call_overtaken_by_a_load_never_mixes_clusters() -> None:
    source, normalizer = ClusterNormalizer(), ClusterNormalizer()
    source.update([3.0, 1.0, 2.0], ["3", "1", "2"])
    normalizer.update([1.0, 2.0, 3.0], ["1", "2", "3"])
    state = source.state_dict()
    stop = threading.Event()

    def load() -> None:
        while not stop.is_set():
            normalizer.load_state_dict(state)

    loading = threading.Thread(target=load)
    loading.start()
    try:
        for _ in range(300):
            # Equal rewards have advantage 0 in their own cluster, and in no other.
            assert normalizer([1.0, 2.0, 3.0], ["1", "2", "3"]) == [0.0] * 3
    finally:
        stop.set()
        loading.join()
    means = {cluster: stats.mean for cluster, stats in normalizer.snapshot().items()}
    assert means == {"1": 1.0, "2": 2.0, "3": 3.0}


def test_equal_rewards_give_zero_beyond_the_range_of_float32() -> None:
    for size in (63, 64, 200):
        advantages = ClusterNormalizer(eps=1e-50)(np.ones(size, "f4"), np.zeros(size, "i4"))
        np.testing.assert_array_equal(advantages, 0.0)


def test_retracting_passes_over_what_was_never_folded() -> None:
    normalizer = ClusterNormalizer(nan_policy="zero")
    normalizer.update([1.0, 2.0], [0, 0])
    before = normalizer.snapshot()
    normalizer.update([5.0, float("nan")], [0, 0])
    normalizer.retract([5.0, float("nan")], [0, 0])
    assert normalizer.snapshot()[0].count == before[0].count
    with pytest.raises(DataError, match="cannot retract 1"):
        normalizer.retract([1.0], ["never seen"])
    with pytest.raises(ConfigError, match="forgetting 1"):
        ClusterNormalizer(forgetting=0.5).retract([1.0], [0])


def test_deltas_taken_by_two_threads_lose_no_sums() -> None:
    normalizer, whole = (
        ClusterNormalizer("shrinkage", track_delta=True),
        ClusterNormalizer("shrinkage"),
    )
    rewards, groups = np.arange(32.0), np.repeat(np.arange(8), 4)
    clusters = np.repeat(np.arange(4), 8)
    deltas: list[bytes] = []
    done = threading.Event()

    def take() -> None:
        while not done.is_set():
            deltas.append(normalizer.delta())

    takers = [threading.Thread(target=take) for _ in range(2)]
    for taker in takers:
        taker.start()
    for _ in range(300):
        normalizer.update(rewards, clusters, groups)
        whole.update(rewards, clusters, groups)
    done.set()
    for taker in takers:
        taker.join()
    gathered = ClusterNormalizer("shrinkage")
    for delta in (*deltas, normalizer.delta()):
        gathered.merge(delta)
    for key in ("count", "num_parts", "squared_sizes"):
        assert gathered.state_dict()[key] == whole.state_dict()[key]


@pytest.mark.parametrize("estimator", RULES)
def test_after_a_reset_it_is_as_it_was_made(estimator: str) -> None:
    random = np.random.default_rng(5)
    rewards = random.normal(size=24).tolist()
    extra: dict[str, Any] = {}
    if RULES[estimator].reads_score_norms:
        extra["score_norms"] = np.abs(random.normal(size=24))
    if RULES[estimator].needs_lengths:
        extra["lengths"] = random.integers(1, 9, size=24)
    groups = np.repeat(np.arange(6), 4)

    def call(normalizer: ClusterNormalizer) -> Any:
        return np.asarray(normalizer(rewards, groups % 2, groups, **extra)).tolist()

    # The exponential means of `rae` have no deltas.
    made: dict[str, Any] = {"nan_policy": "zero", "track_diagnostics": True}
    made["track_delta"] = estimator != "rae"
    normalizer, fresh = (ClusterNormalizer(estimator, **made) for _ in range(2))
    assert normalizer.estimator == estimator == normalizer.options.estimator
    normalizer([math.nan, 3.0, 4.0, 5.0], [7] * 4, [0] * 4, **{k: v[:4] for k, v in extra.items()})
    call(normalizer)
    normalizer.reset()
    assert normalizer.state_dict() == fresh.state_dict()
    assert normalizer.num_nonfinite == 0 and normalizer.snapshot() == {}
    assert call(normalizer) == call(fresh)
    if made["track_delta"]:
        assert normalizer.delta() == fresh.delta()
    with pytest.raises(AttributeError):
        normalizer.estimator = "grpo"  # type: ignore[misc]
