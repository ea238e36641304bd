"""Plugins are found through real entry points: each test installs distributions into a folder."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import distributions
import numpy as np
import pytest
import tomli as tomllib
from conftest import write_config

from pgrpo.cli import main
from pgrpo.config.sections import ClusteringConfig, RewardConfig
from pgrpo.errors import ConfigError, PluginError
from pgrpo.plugins.registry import load_registry

HEADER = """
from pgrpo.config import Section
from pgrpo.plugins import hookimpl
from pydantic import Field
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
        others: list[str] = Field(default_factory=list)

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
    assert counting.settings["others"] == "Optional."
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
    with pytest.raises(
        PluginError, match="no clusterer 'zzz'; known: column, gaussian_mixture, hdbscan, kmeans"
    ):
        registry.clusterer(ClusteringConfig(name="zzz"))


def test_a_name_taken_twice_is_nobodys_and_takes_nothing_else_down(environment, monkeypatch):
    environment.install("one", COUNTING)
    environment.install("other", COUNTING.replace('"plain"', '"own"'), version="2.0")
    registry = load_registry()
    assert {"plain", "own", "choice"} <= registry.rewards.keys()
    assert "counting" not in registry.rewards and "halves" not in registry.clusterers
    said = [(b.owner, b.kind, b.name) for b in registry.broken]
    assert ("one 1.5, entry point 'entry'", "reward", "counting") in said
    assert ("other 2.0, entry point 'entry'", "clusterer", "halves") in said
    assert len(said) == 4
    with pytest.raises(PluginError) as caught:
        registry.reward(RewardConfig(name="counting"))
    assert "there is no reward 'counting'" in str(caught.value)
    assert "registered by both one 1.5 and other 2.0" in str(caught.value)
    with pytest.raises(PluginError) as caught:
        registry.reward(RewardConfig(name="something"))
    assert "registered by both" not in str(caught.value), "that is about another name"

    monkeypatch.setenv("PGRPO_LOAD_PLUGINS", "other")
    registry = load_registry()
    assert registry.rewards["counting"].distribution == "other 2.0" and not registry.broken


def test_a_builtin_name_cannot_be_taken(environment):
    environment.install("thief", COUNTING.replace('"counting"', '"choice"'))
    registry = load_registry()
    assert registry.rewards["choice"].distribution == f"pgrpo {metadata.version('pgrpo')}"
    assert registry.rewards["plain"].distribution == "thief 1.5", "its other names are its own"
    (broken,) = registry.broken
    assert (broken.distribution, broken.kind, broken.name) == ("thief 1.5", "reward", "choice")
    assert broken.error == "reward 'choice' has a name that pgrpo itself uses"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import module_that_is_not_there", ["bad 1.5", "ModuleNotFoundError", "not_there"]),
        ("raise SystemExit('no GPU')", ["bad 1.5", "SystemExit: no GPU"]),
        ("@hookimpl\ndef pgrpo_register_reward(register): pass", ["bad 1.5", "unknown hook"]),
        ("def pgrpo_register_rewards(register): pass", ["bad 1.5", "no hook marked"]),
        ("@hookimpl\ndef pgrpo_register_rewards(regster): pass", ["bad 1.5", "regster"]),
        ("@hookimpl\ndef pgrpo_register_rewards(register): 1 / 0", ["bad 1.5", "ZeroDivision"]),
        ("@hookimpl\ndef pgrpo_register_rewards(register): register('x', 3)", ["'x'", "is a int"]),
        ("@hookimpl\ndef pgrpo_register_rewards(register): register('', print)", ["needs a name"]),
        (
            "PGRPO_HOOKS = 2\n@hookimpl\ndef pgrpo_register_something_new(register): pass",
            ["bad 1.5", "written for version 2 of the hooks", "pgrpo 0.", "knows version 1"],
        ),
        (
            "PGRPO_HOOKS = '1'\n@hookimpl\ndef pgrpo_register_rewards(register): pass",
            ["bad 1.5", "PGRPO_HOOKS is '1'; expected a whole number"],
        ),
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
def test_what_cannot_work_is_broken_by_itself(environment, capsys, source, words):
    environment.install("bad", source)
    environment.install("good", COUNTING)
    registry = load_registry()
    assert {"counting", "plain", "choice"} <= registry.rewards.keys()
    assert "x" not in registry.rewards and "x" not in registry.clusterers
    (broken,) = registry.broken
    assert (broken.distribution, broken.entry_point) == ("bad 1.5", "entry")
    with pytest.raises(PluginError) as caught:
        registry.reward(RewardConfig(name="x"))
    said = str(caught.value)
    assert said.startswith("there is no reward 'x'")
    assert "plugin bad 1.5, entry point 'entry' is broken: " in said and "\n" not in said
    assert all(word in said for word in words), said

    assert main(["plugins"]) == 0
    listed = capsys.readouterr().out
    assert f"\nbroken: bad 1.5, entry point 'entry': {broken.error}\n" in listed
    assert "reward counting (good 1.5): Counts words.\n" in listed
    assert main(["plugins", "--json"]) == 0
    *others, last = json.loads(capsys.readouterr().out)
    assert {one["error"] for one in others} == {None}
    assert last.keys() == others[0].keys()
    found = (last["distribution"], last["entry_point"], last["kind"], last["name"], last["error"])
    assert found == ("bad 1.5", "entry", None, None, broken.error)


def test_what_a_plugin_prints_when_it_is_loaded_is_not_among_what_commands_print(
    environment, capsys
):
    environment.install("my-rewards", COUNTING + "    print('hello')\nprint('welcome')")
    assert main(["plugins", "--json"]) == 0
    said = capsys.readouterr()
    assert "counting" in {one["name"] for one in json.loads(said.out)}
    assert said.err == "welcome\nhello\n"


def test_what_a_broken_plugin_registered_before_it_broke_is_not_there(environment):
    environment.install("bad", COUNTING.replace('"plain", plain', '"plain", 3'))
    registry = load_registry()
    assert not {"counting", "halves"} & {plugin.name for plugin in registry.listing()}
    (broken,) = registry.broken
    assert broken.error == "reward 'plain' of bad 1.5 is a int; a reward is a function or a class"


def test_a_run_without_a_broken_plugin_is_not_concerned(environment, tmp_path, capsys):
    environment.install("bad", "import module_that_is_not_there")
    config = write_config(tmp_path, {"run.num_steps": 1})
    assert main(["train", str(config), "--out", str(tmp_path / "run")]) == 0
    assert "not_there" not in capsys.readouterr().err
    for changes, missing in (
        ({"rewards": [{"name": "mine"}]}, "there is no reward 'mine'"),
        ({"clustering": {"name": "mine"}}, "there is no clusterer 'mine'"),
        ({"data": {"name": "mine"}}, "data.name is 'mine'"),
    ):
        config = write_config(tmp_path, changes)
        assert main(["train", str(config), "--out", str(tmp_path / "no")]) == 2
        said = capsys.readouterr().err
        assert missing in said and "plugin bad 1.5, entry point 'entry' is broken: Module" in said


def test_what_is_loaded_can_be_limited(environment, monkeypatch, capsys):
    environment.install("my-words", WORDS)
    environment.install("My_Rewards", COUNTING)
    environment.install("bad", "import module_that_is_not_there")

    def loaded(value: str) -> set[str]:
        monkeypatch.setenv("PGRPO_LOAD_PLUGINS", value)
        registry = load_registry()
        own = f"pgrpo {metadata.version('pgrpo')}"
        assert {"choice", "kmeans"} <= {p.name for p in registry.listing() if p.distribution == own}
        found = {plugin.distribution for plugin in registry.listing()} - {own}
        return found | {one.distribution for one in registry.broken}

    assert loaded("") == set()
    assert "my_words" not in sys.modules, "what is left out is not even imported"
    assert loaded("my-rewards") == {"My_Rewards 1.5"}
    assert loaded(" My.Rewards , my_words,") == {"My_Rewards 1.5", "my-words 1.5"}
    assert loaded("entry") == {"My_Rewards 1.5", "my-words 1.5", "bad 1.5"}
    assert loaded("pgrpo") == set()
    with pytest.raises(ConfigError, match="PLUGINS names 'my-wrods', .*; did you mean 'my-words'"):
        loaded("my-rewards,my-wrods")

    assert loaded("my-words") == {"my-words 1.5"}
    with pytest.raises(PluginError, match="'plain'.*; PGRPO_LOAD_PLUGINS leaves out .*My_Rewards"):
        load_registry().reward(RewardConfig(name="plain"))
    assert main(["plugins"]) == 0
    assert "\nleft out by PGRPO_LOAD_PLUGINS: My_Rewards 1.5\n" in capsys.readouterr().out


def test_a_constructor_that_raises_is_named(environment):
    environment.install(
        "bad",
        "class C:\n def __init__(self): raise OSError('no disk')\n def __call__(self, r): pass\n"
        "@hookimpl\ndef pgrpo_register_rewards(register): register('x', C)",
    )
    with pytest.raises(PluginError, match=r"'x' of bad 1\.5 could not be built: OSError: no disk"):
        load_registry().reward(RewardConfig(name="x"))


@pytest.mark.assets
def test_the_example_distribution_is_found_in_an_environment_of_its_own(tmp_path):
    environment = distributions.fresh(distributions.PLUGINS / "pgrpo-brevity", tmp_path)
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
from pgrpo.train import conformance
print([check.name for check in conformance.check_reward("brevity") if check.outcome != "ok"])
"""
    said = distributions.run("python", environment, "-c", program)
    assert said.splitlines() == [
        "pgrpo-brevity 0.1.0",
        "[0.75, 0.0, 1.0]",
        "[]",
    ]


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
    broken = {(one.distribution, one.name): one.error for one in load_registry().broken}
    assert broken["thief 1.5", "panel"] == "data set 'panel' has a name that pgrpo itself uses"
    assert "registered by both my-words 1.5 and thief 1.5" in broken["my-words 1.5", "nothing"]


@pytest.mark.assets
def test_a_new_distribution_keeps_what_it_promises_and_trains(tmp_path, capsys):
    name, folder, run = "Some.New-tones", tmp_path / "a new one", tmp_path / "run"
    assert main(["plugins", "new", name, "--out", str(folder)]) == 0
    module, tests = "some_new_tones.py", "test_some_new_tones.py"
    files = {path.name for path in folder.iterdir()}
    assert files == {"README.md", "pyproject.toml", "run.toml", module, tests}
    said = capsys.readouterr().out
    assert module in said and str(folder) in said
    for path in folder.iterdir():
        assert "my-plugin" not in path.read_text() and "my_plugin" not in path.read_text()

    ruff = str(Path(sys.executable).with_name("ruff"))
    for options in (["check"], ["format", "--check"]):
        subprocess.run([ruff, *options], cwd=folder, check=True)
    environment = distributions.fresh(folder, tmp_path, "test")
    distributions.run("pytest", environment, "-q", cwd=folder)
    said = distributions.run(
        "pgrpo", environment, "plugins", "check", name, "--config", "run.toml", cwd=folder
    )
    for kind in ("reward", "clusterer", "data set"):
        assert f"{kind} {name} (" in said
    # Its users belong to one cluster each.
    skipped = [line.split()[1] for line in said.splitlines() if "skipped" in line]
    assert skipped == ["memberships:"]
    distributions.run("pgrpo", environment, "train", "run.toml", "--out", str(run), cwd=folder)
    lines = (run / "evaluations.jsonl").read_text().splitlines()
    before, *_, after = [json.loads(line)["reward"] for line in lines]
    # Half of the words are liked at the start, and all could be.
    assert before < 0.75 < after


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("two words", "is none of a distribution; expected letters"),
        ("../elsewhere", "is none of a distribution"),
        ("-x", "is none of a distribution"),
        ("", "is none of a distribution"),
        ("3d", "makes a module '3d', which Python cannot import"),
        ("class", "makes a module 'class', which Python cannot import"),
        ("setup", "makes a file setup.py, which setuptools takes for its own"),
        ("Conftest", "makes a file conftest.py, which pytest takes for its own"),
        ("json", "makes a module 'json', and there is one already"),
        ("pgrpo", "makes a module 'pgrpo', and there is one already"),
        ("Scikit.Learn", "is that of a distribution which is installed"),
        ("choice", "is that of reward 'choice' of pgrpo"),
        ("KMeans", "is that of clusterer 'kmeans' of pgrpo"),
        ("exact-match", "is that of reward 'exact_match' of pgrpo"),
        ("panel", "is that of data set 'panel' of pgrpo"),
    ],
)
def test_a_new_distribution_needs_a_name_of_its_own(tmp_path, capsys, name, words):
    assert main(["plugins", "new", "--out", str(tmp_path / "new"), "--", name]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_new_distribution_may_have_a_name_with_that_of_the_template_in_it(tmp_path):
    assert main(["plugins", "new", "my_plugin-2", "--out", str(tmp_path)]) == 0
    project = tomllib.loads((tmp_path / "pyproject.toml").read_text())["project"]
    assert project["name"] == "my_plugin-2"
    assert project["entry-points"]["pgrpo"] == {"my_plugin_2": "my_plugin_2"}
    assert {path.name for path in tmp_path.glob("*.py")} == {
        "my_plugin_2.py",
        "test_my_plugin_2.py",
    }
    assert tomllib.loads((tmp_path / "run.toml").read_text())["data"] == {"name": "my_plugin-2"}


def test_a_new_distribution_overwrites_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("tones").mkdir()
    Path("tones/run.toml").write_text("mine")
    assert main(["plugins", "new", "tones"]) == 2
    assert f"{Path('tones/run.toml')} exists already" in capsys.readouterr().err
    assert [path.read_text() for path in Path("tones").iterdir()] == ["mine"]
    Path("tones/run.toml").rename("tones/LICENSE")
    assert main(["plugins", "new", "tones"]) == 0
    assert len(list(Path("tones").iterdir())) == 6
    Path("file").write_text("")
    assert main(["plugins", "new", "tones", "--out", "file"]) == 2
    assert "pgrpo: file cannot be written: File exists" in capsys.readouterr().err
