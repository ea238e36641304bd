"""Plugins with one flaw each, and which check finds it; what is sound passes all of them."""

from __future__ import annotations

import json
import re
import sys
import textwrap
from typing import Any

import pytest
from conftest import install_plugin, write_config

from pgrpo.cli import main
from pgrpo.errors import ConfigError, PluginError
from pgrpo.train import conformance
from pgrpo.train.conformance import Check

HEADER = """
import asyncio, itertools, random, time, uuid
import numpy as np
from pgrpo.config import Section
from pgrpo.errors import DataError
from pgrpo.plugins import hookimpl
from pgrpo.types import Dataset, Example
COUNT = itertools.count()
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs the distribution my-plugin with what a source registers as `mine`."""
    site = tmp_path / "site"
    monkeypatch.syspath_prepend(str(site))

    def install(kind: str, source: str) -> None:
        hook = f"@hookimpl\ndef pgrpo_register_{kind}s(register): register('mine', Mine)\n"
        install_plugin(site, f"{HEADER}\n{textwrap.dedent(source)}\n{hook}")

    yield install
    sys.modules.pop("my_plugin", None)


def outcomes(checks: list[Check]) -> dict[str, str]:
    return {check.name: check.outcome for check in checks}


REWARD = [
    "settings",
    "shape",
    "unusual completions",
    "determinism",
    "threads",
    "speed",
]
BEFORE = {
    "shape": "settings",
    "unusual completions": "shape",
    "determinism": "shape",
    "threads": "determinism",
    "speed": "shape",
}


def expected(flaw: str | None, *, skipped: tuple[str, ...] = ()) -> dict[str, str]:
    """All is well but one check, those that need it, and those that say nothing about the plugin."""
    found: dict[str, str] = {}
    for name in REWARD:
        needed = found.get(BEFORE.get(name, ""), "ok")
        outcome = "failed" if name == flaw else "skipped" if name in skipped else "ok"
        found[name] = outcome if needed == "ok" else "skipped"
    return found


COUNTING = """
class Mine:
    class Config(Section):
        word: str
    def __init__(self, config):
        self.word = config.word
    def __call__(self, rollouts):
        return [float(r.completion.split().count(self.word)) for r in rollouts]
"""

DRAWING = """
class Mine:
    def __init__(self): self.generator = random.Random(0)
    def __call__(self, rollouts): return [self.generator.random() for _ in rollouts]
"""

SHARED = """
class Mine:
    def __call__(self, rollouts):
        self.lengths = [float(len(r.completion)) for r in rollouts]
        time.sleep(0.002)
        return self.lengths
"""

RACE = """
class Mine:
    def __call__(self, rollouts):
        self.rollouts = rollouts
        return [self.score(place) for place in range(len(rollouts))]
    def score(self, place): return float(len(self.rollouts[place].completion))
"""

SHARED_ASYNC = SHARED.replace("def __call__", "async def __call__")


@pytest.mark.parametrize(
    ("source", "settings", "flaw", "words"),
    [
        ("Mine = lambda rollouts: [0.5]", {}, "shape", "returned 1 rewards for 4 rollouts"),
        ("Mine = lambda rollouts: 0.5", {}, "shape", "returned a float, expected one reward per"),
        (
            "Mine = lambda rollouts: [float('nan') for _ in rollouts]",
            {},
            "shape",
            "returned nan, expected a finite number or None",
        ),
        (
            "Mine = lambda rs: [r.prompt.example.columns['taste'] for r in rs]",
            {},
            "shape",
            "KeyError: 'taste'; the examples are made up: a run's own are taken with --config",
        ),
        (
            "Mine = lambda rollouts: time.sleep(9)",
            {"timeout_s": 0.1},
            "shape",
            "no answer within timeout_s = 0.1",
        ),
        (
            "Mine = lambda rs: [1 / len(r.completion.split()) for r in rs]",
            {},
            "unusual completions",
            "completion '': ZeroDivisionError",
        ),
        (DRAWING, {}, "determinism", "wants batch = 'step'"),
        (
            "Mine = lambda rs: [float(uuid.uuid4().int % 1000) for r in rs]",
            {"batch": "step"},
            "determinism",
            "an object made anew gave",
        ),
        (SHARED, {}, "threads", "called while other calls are under way it gave"),
        (RACE, {}, "threads", "called while other calls are under way it gave"),
        # Nothing comes between where nothing is awaited.
        (SHARED_ASYNC, {}, None, ""),
        (
            SHARED_ASYNC.replace("time.sleep", "await asyncio.sleep"),
            {},
            "threads",
            "expected the same, or num_workers = 1",
        ),
        (
            COUNTING.replace("(Section)", "(Section, extra='ignore')"),
            {"word": "of"},
            "settings",
            "'no_such_setting', which it does not have, is taken",
        ),
    ],
)
def test_a_reward_with_a_flaw(install, source, settings, flaw, words):
    install("reward", source)
    checks = conformance.check_reward("mine", settings)
    skipped = ("threads",) if settings.get("batch") == "step" else ()
    assert outcomes(checks) == expected(flaw, skipped=skipped), checks
    assert [check.name for check in conformance.failed(checks)] == ([flaw] if flaw else [])
    for check in conformance.failed(checks):
        assert words in check.reason and "\n" not in check.reason, check.reason


def test_what_is_said_of_a_sound_reward(install):
    install("reward", COUNTING)
    checks = conformance.check_reward("mine", {"word": "of"})
    assert outcomes(checks) == expected(None)
    said = {check.name: check.reason for check in checks}
    # "0 of 8, said ..." is one of the four completions of each of eight groups.
    assert said["shape"] == "32 rewards from 0 to 1"
    assert said["threads"].startswith("4 calls under way at once")
    assert "of 4 rollouts each" in said["speed"]
    for settings, words in (({}, "word is missing"), ({"word": 3}, "word is 3")):
        with pytest.raises(ConfigError, match=f"reward 'mine': {words}"):
            conformance.check_reward("mine", settings)
    with pytest.raises(PluginError, match="no reward 'mien'; did you mean 'mine'"):
        conformance.check_reward("mien")


def test_a_reward_of_whole_steps_may_draw(install):
    install("reward", DRAWING)
    checks = conformance.check_reward("mine", {"batch": "step"})
    assert outcomes(checks) == expected(None, skipped=("threads",)), checks
    assert "of 32 rollouts each" in checks[-1].reason


def test_rewards_that_are_missing_are_counted(install):
    install("reward", "Mine = lambda rs: [None if ' of ' in r.completion else 2 for r in rs]")
    checks = conformance.check_reward("mine")
    assert outcomes(checks) == expected(None)
    assert checks[1].reason == "24 rewards from 2 to 2, none for 8"


def test_a_reward_that_gives_nothing_is_not_said_to_be_sound(install):
    install("reward", "Mine = lambda rollouts: [None for _ in rollouts]")
    checks = conformance.check_reward("mine")
    assert outcomes(checks) == expected(None, skipped=("shape",))
    assert checks[1].reason.startswith("it gave none of 32 rollouts a reward; the examples are")


CLUSTERER = """
class Mine:
    def fit(self, users, features, examples):
        self.median = float(np.median(features[:, 0]))
    def assign(self, users, features):
        return ["high" if x > self.median else "low" for x in features[:, 0]]
    def state_dict(self): return {"median": self.median}
    def load_state_dict(self, state): self.median = state["median"]
"""

SOFT = (
    CLUSTERER
    + """
    def __init__(self): self.least = 0.125
    def memberships(self, users, features):
        other = {"high": "low", "low": "high"}
        return [{c: 0.75, other[c]: 0.25} for c in self.assign(users, features)]
"""
).replace(
    "def fit(self, users, features, examples):",
    "def fit(self, users, features, examples):\n        self.least = 0.2",
)

BY_NAME = """
class Mine:
    def fit(self, users, features, examples):
        self.cluster_of = {user: len(user) % 2 for user in users}
    def assign(self, users, features): return [self.cluster_of[user] for user in users]
    def state_dict(self): return {"cluster_of": self.cluster_of}
    def load_state_dict(self, state): self.cluster_of = dict(state["cluster_of"])
"""


@pytest.mark.parametrize(
    ("source", "flaw", "outcome", "words"),
    [
        (CLUSTERER, None, "", ""),
        (
            CLUSTERER.replace('"high" if', "1.5 if"),
            "shape",
            "failed",
            "a cluster is an int or a string, not 1.5",
        ),
        (
            CLUSTERER.replace('{"median": self.median}', '{"median": np.float32(1)}'),
            "shape",
            "failed",
            "not JSON serializable",
        ),
        (
            CLUSTERER.replace("np.median(features[:, 0])", "7 * next(COUNT)"),
            "determinism",
            "failed",
            "and, fitted anew, in",
        ),
        (
            CLUSTERER.replace("x > self.median", "x > np.median(features[:, 0])"),
            "assignment",
            "failed",
            "and, asked for alone, in 'low'",
        ),
        (
            CLUSTERER.replace('self.median = state["median"]', "self.median = 1e9"),
            "state",
            "failed",
            "and, restored from its state, in 'low'",
        ),
        (
            # Keys that are numbers come back out of JSON as texts.
            BY_NAME.replace("user: len(user) % 2", "len(user): len(user) % 2").replace(
                "[user] for", ".get(len(user), 2) for"
            ),
            "state",
            "failed",
            "and, restored from its state, in 2",
        ),
        (SOFT, None, "", ""),
        (SOFT.replace("0.25", "0.5"), "memberships", "failed", "with the sum 1"),
        (
            SOFT.replace("0.25", "self.least").replace("0.75", "1 - self.least"),
            "memberships",
            "failed",
            "and, restored from the state, {'",
        ),
        (BY_NAME, "unseen users", "failed", "KeyError: 'unseen user-0'"),
        (
            BY_NAME.replace(
                "[self.cluster_of[user] for user in users]",
                "[self.cluster_of[user] for user in users if self.known(user)]\n"
                "    def known(self, user):\n"
                "        if user in self.cluster_of: return True\n"
                "        raise DataError(f'user {user!r} is unknown')",
            ),
            "unseen users",
            "skipped",
            "it refuses them: user 'unseen user-0' is unknown",
        ),
    ],
)
def test_a_clusterer_with_a_flaw(install, source, flaw, outcome, words):
    install("clusterer", source)
    checks = conformance.check_clusterer("mine")
    names = ["settings", "shape", "determinism", "assignment", "state", "memberships"]
    names += ["unseen users", "speed"]
    found = dict.fromkeys(names, "ok")
    if "def memberships" not in source or flaw == "state":
        found["memberships"] = "skipped"
    if flaw == "shape":
        found |= dict.fromkeys(names[2:], "skipped")
    if flaw:
        found[flaw] = outcome
    assert outcomes(checks) == found, checks
    for check in checks:
        assert check.name != flaw or words in check.reason, check.reason


DATASET = """
def Mine():
    people = [f"u{n}" for n in range(4)]
    examples = [Example(f"Hello {user}", user, {"answer": "x"}) for user in people]
    users = {user: np.array([float(n)]) for n, user in enumerate(people)}
    return Dataset(examples, examples[:1], users, ("number",))
"""


@pytest.mark.parametrize(
    ("old", "new", "flaw", "words"),
    [
        ("", "", None, ""),
        ("return Dataset(", "return (", "shape", "gave a tuple; expected a pgrpo.types.Dataset"),
        ('user, {"answer"', '"nobody", {"answer"', "shape", "user 'nobody' of an example is not"),
        ("[float(n)]", "[float(n), 1]", "shape", "have shape [2], and there are 1 feature_names"),
        ("[float(n)]", "[np.inf]", "shape", "features of user 'u0' are [inf]; expected numbers"),
        ('"answer": "x"', '"answer": {1}', "shape", "is not JSON serializable"),
        ('"Hello', '"Hello {uuid.uuid4()}', "determinism", "another one when it is loaded anew"),
        ("[float(n)]", "[random.random()]", "determinism", "features of user 'u0' are others"),
        (
            'u{n}" for n in range(4)]',
            'u{n}" for n in range(4 + next(COUNT))]',
            "determinism",
            "examples and, loaded anew,",
        ),
    ],
)
def test_a_data_set_with_a_flaw(install, old, new, flaw, words):
    install("dataset", DATASET.replace(old, new))
    checks = conformance.check_dataset("mine")
    found = dict.fromkeys(["settings", "shape", "determinism", "speed"], "ok")
    if flaw == "shape":
        found |= {"determinism": "skipped", "speed": "skipped"}
    if flaw:
        found[flaw] = "failed"
    assert outcomes(checks) == found, checks
    for check in checks:
        assert check.name != flaw or words in check.reason, check.reason
    if not flaw:
        assert checks[1].reason == "4 examples and 1 held out, of 4 users; features of each: 1"


@pytest.mark.parametrize(
    ("kind", "name", "settings"),
    [
        ("reward", "choice", {}),
        ("reward", "likeness", {}),
        ("reward", "exact_match", {"casefold": True}),
        ("reward", "persona", {"clusters": ["somebody's"], "weight": 0.0}),
        ("reward", "persona_utility", {"batch": "step"}),
        ("clusterer", "kmeans", {"num_clusters": 5}),
        ("clusterer", "column", {"column": "persona"}),
        ("clusterer", "single", {}),
        ("clusterer", "minibatch_kmeans", {"num_clusters": 3}),
        ("clusterer", "gaussian_mixture", {"num_clusters": 3}),
        ("clusterer", "hdbscan", {}),
        ("clusterer", "random", {"num_clusters": 4}),
        ("clusterer", "sklearn", {"estimator": "sklearn.cluster.DBSCAN", "eps": 1.5}),
    ],
)
def test_what_is_built_in_conforms(kind, name, settings):
    found = getattr(conformance, f"check_{kind}")(name, settings)
    assert conformance.failed(found) == []
    skipped = {check.name for check in found if check.outcome == "skipped"}
    allowed = {"persona_utility": {"threads"}, "column": {"unseen users"}}
    if kind == "clusterer" and name != "gaussian_mixture":
        skipped.remove("memberships")
    assert skipped == allowed.get(name, set())


def test_the_command_tells_each_check_and_fails_where_one_does(install, tmp_path, capsys):
    install("reward", COUNTING)
    check = ["plugins", "check", "mine"]
    assert main(check) == 2
    assert "reward 'mine': word is missing" in capsys.readouterr().err
    assert main([*check, "--set", "word=of", "--set", "num_workers=1"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("reward mine (my-plugin 1.0)\n  ok       settings: one that it does not")
    assert "\n  skipped  threads: num_workers = 1 makes one call at a time\n" in said
    assert main([*check, "--set", "wrod=of"]) == 2
    assert "--set wrod: mine has no such setting" in capsys.readouterr().err
    assert main(["plugins", "check", "my_plugin", "--set", "word=of", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["name"]) == ("reward", "mine")
    assert {c["name"]: c["outcome"] for c in found["checks"]} == expected(None)

    # A run's table gives the settings, and its data the examples.
    rows = [{"prompt": f"Say {n}.", "user": f"u{n}", "answer": "of of"} for n in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes: dict[str, Any] = {
        "data": {"name": "jsonl", "path": str(tmp_path / "rows.jsonl")},
        "rewards": [{"name": "mine", "word": "of", "weight": 2.0}],
    }
    config = write_config(tmp_path, changes)
    assert main([*check, "--config", str(config)]) == 0
    assert "shape: 12 rewards from 0 to 2\n" in capsys.readouterr().out
    assert main([*check, "--config", str(config), "--set", "word=zzz"]) == 0
    assert "shape: 12 rewards from 0 to 0\n" in capsys.readouterr().out


def test_the_command_on_what_is_broken_or_not_there(install, capsys):
    install("reward", "Mine = lambda rs: [1 / len(r.completion.split()) for r in rs]")
    assert main(["plugins", "check", "mine"]) == 1
    assert "\n  failed   unusual completions: reward 'mine' failed on" in capsys.readouterr().out
    assert main(["plugins", "check", "mien"]) == 2
    assert "there is no plugin 'mien'; did you mean 'mine'?" in capsys.readouterr().err
    assert main(["plugins", "--json", "check", "mine"]) == 2
    assert "--json stands before" in capsys.readouterr().err


def test_the_command_on_a_distribution_that_is_broken(install, capsys):
    install("reward", "1 / 0")
    assert main(["plugins", "check", "my-plugin"]) == 1
    assert capsys.readouterr().out == (
        "broken (my-plugin 1.0)\n  failed   loading: ZeroDivisionError: division by zero\n"
    )


OTHERS = """
Reward = Mine

class Other(Reward):
    class Config(Section):
        words: list[str]
        '''Words that
        count.'''
        seed: int
        '''Of nothing.'''
    def __init__(self, config):
        self.word = config.words[0]

def plain(rollouts): return [1.0 for _ in rollouts]

@hookimpl
def pgrpo_register_rewards(register):
    register('mine', Reward)
    register('my-plugin', plain)
    register('other', Other)
    register('choice', plain)
"""


def test_all_of_a_distribution_is_tried_whatever_one_of_it_is_called(install, capsys):
    install("clusterer", COUNTING + OTHERS + CLUSTERER)
    assert main(["plugins", "check", "my-plugin", "--set", "word=of", "--set", "words=['of']"]) == 1
    headings = [line for line in capsys.readouterr().out.splitlines() if line[0] != " "]
    assert headings == [
        "reward mine (my-plugin 1.0)",
        "reward my-plugin (my-plugin 1.0)",
        "reward other (my-plugin 1.0)",
        "clusterer mine (my-plugin 1.0)",
        "reward choice (my-plugin 1.0)",
    ], "its last one has a name of pgrpo's own, which fails"
    assert main(["plugins", "check", "mine", "--set", "word=of"]) == 0
    headings = [line for line in capsys.readouterr().out.splitlines() if line[0] != " "]
    assert headings == ["reward mine (my-plugin 1.0)", "clusterer mine (my-plugin 1.0)"]


def test_what_lacks_settings_is_told_of_and_the_others_are_tried(install, capsys):
    install(
        "clusterer", COUNTING + OTHERS.replace("    register('choice', plain)\n", "") + CLUSTERER
    )
    assert main(["plugins", "check", "my-plugin", "--set", "words=3"]) == 2
    said = capsys.readouterr()
    assert said.err == (
        "pgrpo: not tried for want of settings: reward 'mine': word is missing; "
        "reward 'other': words is 3: input should be a valid list\n"
    )
    mine, plain, other, clusterer = re.split(r"\n(?=\w)", said.out)
    assert (
        mine
        == """reward mine (my-plugin 1.0)
  skipped  settings: word is missing
           expected by --set KEY=VALUE, or in the file of --config:
             [[rewards]]
             name = "mine"
             word = ...  # Required."""
    )
    for tried in (plain, clusterer):
        assert "  ok       determinism: " in tried and "failed" not in tried
    assert other.endswith('name = "other"\n             words = ...  # Words that count. Required.')
    assert main(["plugins", "check", "my-plugin", "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert [one["needs"] is not None for one in found] == [True, False, True, False]
    assert [len(one["checks"]) for one in found] == [1, 6, 1, 8]


def test_each_table_of_a_run_that_names_a_plugin_is_tried(install, tmp_path, capsys):
    install("reward", COUNTING)
    changes: dict[str, Any] = {
        "rewards": [{"name": "mine", "word": "of"}, {"name": "mine", "word": "zzz", "weight": 2.0}],
        "evaluation": [{"name": "mine", "word": "of"}, {"name": "mine", "word": "8,"}],
    }
    config = ["--config", str(write_config(tmp_path, changes))]
    assert main(["plugins", "check", "mine", *config]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if line[0] != " " or "shape" in line] == [
        "reward mine (my-plugin 1.0), rewards.0",
        "  ok       shape: 32 rewards from 0 to 1",
        "reward mine (my-plugin 1.0), rewards.1",
        "  ok       shape: 32 rewards from 0 to 0",
        "reward mine (my-plugin 1.0), evaluation.1",
        "  ok       shape: 32 rewards from 0 to 1",
    ], "the first of evaluation is as that of training"
    assert main(["plugins", "check", "mine", *config, "--set", "word=of", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["table"] for one in found] == ["rewards.0", "rewards.1"], "they differ in weight"
