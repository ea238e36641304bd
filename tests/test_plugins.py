"""Plugins are found through real entry points: each test installs distributions into a folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_config

from pgrpo.cli import main
from pgrpo.config.sections import ClusteringConfig, RewardConfig
from pgrpo.errors import ConfigError, PluginError
from pgrpo.plugins.registry import load_registry

HEADER = """
from pgrpo.config import Section
from pgrpo.plugins import hookimpl
"""

COUNTING = """
class Counting:
    '''Counts words.

    Not this line.
    '''

    class Config(Section):
        word: str
        '''The word to count.'''
        factor: float = 2.0
        '''Worth of each.'''
        seed: int = 0

    def __init__(self, config):
        self.config = config

    def __call__(self, rollouts):
        return [self.config.factor * r.completion.split().count(self.config.word) for r in rollouts]

def plain(rollouts):
    return [None for _ in rollouts]

class Halves:
    def fit(self, users, features, examples): pass
    def assign(self, users, features): return [len(user) % 2 for user in users]
    def state_dict(self): return {}
    def load_state_dict(self, state): pass

@hookimpl
def pgrpo_register_rewards(register):
    register("counting", Counting)
    register("plain", plain)

@hookimpl
def pgrpo_register_clusterers(register):
    register("halves", Halves)
"""


class Environment:
    """A folder on sys.path into which distributions are installed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.modules: list[str] = []

    def install(self, distribution: str, source: str, version: str = "1.5") -> None:
        module = distribution.replace("-", "_")
        (self.folder / f"{module}.py").write_text(HEADER + source)
        info = self.folder / f"{module}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
        )
        (info / "entry_points.txt").write_text(f"[pgrpo]\nentry = {module}\n")
        self.modules.append(module)


@pytest.fixture
def environment(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    environment = Environment(tmp_path)
    yield environment
    for module in environment.modules:
        sys.modules.pop(module, None)


def test_builtins_come_through_the_entry_points_of_the_package():
    registry = load_registry()
    assert {"choice", "exact_match", "regex", "persona", "judge"} <= registry.rewards.keys()
    assert {"kmeans", "column", "single", "sklearn"} <= registry.clusterers.keys()
    for plugin in registry.listing():
        assert plugin.doc, plugin.name
        if plugin.name in ("choice", "kmeans"):
            assert plugin.distribution == f"pgrpo {metadata.version('pgrpo')}"


def test_a_foreign_plugin_is_listed_and_built(environment):
    environment.install("my-rewards", COUNTING)
    registry = load_registry()
    listed = {(p.kind, p.name): p for p in registry.listing()}
    counting = listed["reward", "counting"]
    assert counting.distribution == "my-rewards 1.5"
    assert counting.doc == "Counts words."
    assert counting.settings["word"] == "The word to count. Required."
    assert counting.settings["factor"] == "Worth of each. Default: 2.0."
    assert listed["reward", "plain"].settings == {}

    section = RewardConfig.model_validate({"name": "counting", "word": "blue", "weight": 0.5})
    reward: Any = registry.reward(section, seed=7)
    assert (reward.config.word, reward.config.factor, reward.config.seed) == ("blue", 2.0, 7)
    plain: Any = registry.reward(RewardConfig(name="plain"))
    assert plain([1, 2]) == [None, None]
    halves = registry.clusterer(ClusteringConfig(name="halves"))
    assert halves.assign(["a", "bb"], np.zeros((2, 0))) == [1, 0]
    assert registry.clusterer(ClusteringConfig(name="halves")) is not halves


def test_a_setting_named_seed_wins_over_the_seed_of_the_run(environment):
    environment.install("my-rewards", COUNTING)
    section = RewardConfig.model_validate({"name": "counting", "word": "blue", "seed": 3})
    reward: Any = load_registry().reward(section, seed=7)
    assert reward.config.seed == 3


def test_the_seed_of_the_run_is_a_setting_that_need_not_be_written(environment):
    environment.install("my-rewards", COUNTING.replace("seed: int = 0", "seed: int"))
    registry = load_registry()
    section = RewardConfig.model_validate({"name": "counting", "word": "blue"})
    registry.check("reward", section)
    reward: Any = registry.reward(section, seed=7)
    assert reward.config.seed == 7


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "counting", "wrod": "blue"}, ["counting", "wrod", "did you mean 'word'"]),
        ({"name": "counting"}, ["counting", "word is missing"]),
        ({"name": "counting", "word": 3}, ["counting", "word is 3", "string"]),
        ({"name": "plain", "word": "blue"}, ["plain", "takes no settings", "word"]),
    ],
)
def test_wrong_settings_are_config_errors(environment, settings, words):
    environment.install("my-rewards", COUNTING)
    with pytest.raises(ConfigError) as caught:
        load_registry().reward(RewardConfig.model_validate(settings))
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_misspelt_plugin_gets_a_suggestion():
    registry = load_registry()
    with pytest.raises(PluginError, match="no reward 'choise'; did you mean 'choice'"):
        registry.reward(RewardConfig(name="choise"))
    with pytest.raises(PluginError, match="no clusterer 'zzz'; known: column, kmeans"):
        registry.clusterer(ClusteringConfig(name="zzz"))


def test_a_name_taken_twice_names_both_distributions(environment):
    environment.install("one", COUNTING)
    environment.install("other", COUNTING, version="2.0")
    with pytest.raises(PluginError) as caught:
        load_registry()
    assert all(word in str(caught.value) for word in ("one 1.5", "other 2.0", "registered by both"))


def test_a_builtin_name_cannot_be_taken(environment):
    environment.install("thief", COUNTING.replace('"counting"', '"choice"'))
    with pytest.raises(PluginError, match="'choice' is registered by both"):
        load_registry()


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import module_that_is_not_there", ["bad 1.5", "ModuleNotFoundError", "not_there"]),
        ("@hookimpl\ndef pgrpo_register_reward(register): pass", ["bad 1.5", "unknown hook"]),
        ("def pgrpo_register_rewards(register): pass", ["bad 1.5", "no hook marked"]),
        ("@hookimpl\ndef pgrpo_register_rewards(regster): pass", ["bad 1.5", "regster"]),
        ("@hookimpl\ndef pgrpo_register_rewards(register): 1 / 0", ["bad 1.5", "ZeroDivision"]),
        ("@hookimpl\ndef pgrpo_register_rewards(register): register('x', 3)", ["'x'", "is a int"]),
        ("@hookimpl\ndef pgrpo_register_rewards(register): register('', print)", ["needs a name"]),
        (
            "class C: pass\n@hookimpl\ndef pgrpo_register_rewards(register): register('x', C)",
            ["'x' of bad 1.5", "cannot be called"],
        ),
        (
            "class C:\n def fit(self): pass\n"
            "@hookimpl\ndef pgrpo_register_clusterers(register): register('x', C)",
            ["clusterer 'x' of bad 1.5", "load_state_dict"],
        ),
        (
            "class C:\n class Config: pass\n def __call__(self, r): pass\n"
            "@hookimpl\ndef pgrpo_register_rewards(register): register('x', C)",
            ["'x' of bad 1.5", "pgrpo.config.Section"],
        ),
        (
            "class C:\n class Config(Section):\n  weight: float = 1\n def __call__(self, r): pass\n"
            "@hookimpl\ndef pgrpo_register_rewards(register): register('x', C)",
            ["'x' of bad 1.5", "'weight'", "already"],
        ),
    ],
)
def test_what_cannot_work_is_refused_at_load(environment, source, words):
    environment.install("bad", source)
    with pytest.raises(PluginError) as caught:
        load_registry()
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_constructor_that_raises_is_named(environment):
    environment.install(
        "bad",
        "class C:\n def __init__(self): raise OSError('no disk')\n def __call__(self, r): pass\n"
        "@hookimpl\ndef pgrpo_register_rewards(register): register('x', C)",
    )
    with pytest.raises(PluginError, match=r"'x' of bad 1\.5 could not be built: OSError: no disk"):
        load_registry().reward(RewardConfig(name="x"))


def test_the_example_distribution_installs_and_is_found(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(Path(__file__).parents[1] / "plugins" / "pgrpo-brevity", source)
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    pip = [uv, "pip"] if uv else [sys.executable, "-m", "pip"]
    which = ["--python", sys.executable] if uv else []
    options = ["--no-deps", "--no-build-isolation", "--target", str(tmp_path / "site")]
    subprocess.run([*pip, "install", *which, *options, str(source)], check=True, timeout=120)
    program = """
from pgrpo.config.sections import RewardConfig
from pgrpo.plugins.registry import load_registry
from pgrpo.types import Example, Prompt, Rollout
registry = load_registry()
reward = registry.reward(RewardConfig.model_validate({"name": "brevity", "limit": 4}))
prompt = Prompt(Example("Say it.", "u"), 0, (1,))
say = lambda text: Rollout(prompt, 0, (1,), text, (0.0,), False)
print(registry.rewards["brevity"].distribution)
print(reward([say("one"), say("one two three four five"), say("")]))
"""
    path = os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert result.stdout.splitlines() == ["pgrpo-brevity 0.1.0", "[0.75, 0.0, 1.0]"]


WORDS = (
    HEADER
    + """
from pgrpo.types import Dataset, Example
import numpy as np

class Words:
    '''People who like a word each.'''

    class Config(Section):
        people: int = 4
        '''How many.'''

    def __init__(self, config):
        self.config = config

    def __call__(self):
        people = range(self.config.people)
        examples = [Example(f"Say {n % 2}:", f"u{n}", {"answer": str(n % 2)}) for n in people]
        features = {f"u{n}": np.array([float(n)]) for n in people}
        return Dataset(examples, examples[:2], features, ("number",))

@hookimpl
def pgrpo_register_datasets(register):
    register("words", Words)
    register("nothing", lambda: Dataset([], [], {}, ()))
    register("list", lambda: [])
    register("raises", lambda: 1 / 0)
"""
)


def test_data_sets_are_plugins_too(environment, tmp_path, capsys):
    environment.install("my-words", WORDS)
    listed = {(p.kind, p.name): p for p in load_registry().listing()}
    assert listed["data set", "words"].settings == {"people": "How many. Default: 4."}

    def config(**data: Any) -> Path:
        return write_config(
            tmp_path, {"data": data, "rewards": [{"name": "exact_match"}], "run.num_steps": 1}
        )

    run = tmp_path / "run"
    assert main(["train", str(config(name="words", people=6)), "--out", str(run)]) == 0
    assert 'name = "words"' in (run / "config.toml").read_text()
    lines = (run / "samples.jsonl").read_text().splitlines()
    assert {json.loads(line)["prompt"] for line in lines} <= {"Say 0:", "Say 1:"}
    capsys.readouterr()
    for data, message in (
        ({"name": "wrods"}, "data.name is 'wrods'; did you mean 'words'?"),
        ({"name": "panle"}, "data.name is 'panle'; did you mean 'panel'?"),
        (
            {"name": "words", "peple": 3},
            "data set 'words': unknown key peple; did you mean 'people'",
        ),
        ({"name": "nothing"}, "data set 'nothing' of my-words 1.5 gave no examples to train on"),
        (
            {"name": "list"},
            "data set 'list' of my-words 1.5 gave a list; expected a pgrpo.types.Dat",
        ),
        ({"name": "raises"}, "data set 'raises' of my-words 1.5 failed: ZeroDivisionError"),
    ):
        assert main(["train", str(config(**data)), "--out", str(tmp_path / "no")]) == 2
        assert message in capsys.readouterr().err
    environment.install("thief", WORDS.replace('"words"', '"panel"'))
    with pytest.raises(PluginError, match="data set 'panel' of thief 1.5 has a name that pgrpo"):
        load_registry()
