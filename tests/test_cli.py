"""The command line: what goes wrong is one sentence on stderr and exit code 2, and costs nothing."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import textwrap
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    TINY_RUN,
    Tree,
    contents,
    install_plugin,
    start,
    tiny_model,
    train,
    write_config,
)
from transformers import LlamaConfig

from pgrpo import ClusterNormalizer
from pgrpo.cli import main
from pgrpo.errors import DataError
from pgrpo.runs.display import Display

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("finished"), {"run.num_steps": 2})


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys: Capture, *arguments: object) -> str:
    """The one sentence with which a command refuses."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("pgrpo: ")
    assert error.endswith("\n")
    assert error.count("\n") == 1, error
    return error[len("pgrpo: ") : -1]


def write_rows(path: Path, rows: list[Tree]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def rows(**columns: Any) -> list[Tree]:
    return [
        {
            "prompt": f"w{i}",
            "user": f"u{i % 3}",
            "answer": "w5",
            "choices": ["w5", "w6 w7"],
            **columns,
        }
        for i in range(6)
    ]


def make_model(folder: Path) -> str:
    """A model folder on disk without a chat template."""
    model = tiny_model("smollm2")
    model.model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return str(folder)


# What is wrong with a config.


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"run.num_step": 3}, "unknown key run.num_step; did you mean 'num_steps'?"),
        ({"modle.name": "tiny"}, "unknown key modle; did you mean 'model'?"),
        ({"data.wrods": 3}, "unknown key data.wrods; did you mean 'words'?"),
        ({"model.lora": {"rnak": 3}}, "unknown key model.lora.rnak; did you mean 'rank'?"),
        ({"run.num_steps": "3"}, "run.num_steps is '3': input should be a valid integer"),
        ({"run": 3}, "run is 3; expected a table"),
        ({"rewards": []}, "rewards is []; expected at least one entry"),
        ({"generation.group_size": 0}, "generation.group_size is 0: input should be greater than"),
        ({"optimizer.learning_rate": float("nan")}, "optimizer.learning_rate is nan: "),
        ({"data": {"name": "persona"}}, "data.name is 'persona'; did you mean 'personas'?"),
        ({"data": {"words": 3}}, "data.name is missing"),
        ({"model": {"precision": "fp32"}}, "model.name is missing"),
        ({"estimator": {"name": "pgpro"}}, 'estimator is "pgpro"; expected pgrpo, grpo, '),
        ({"estimator": {"name": "grpo", "history": "one"}}, "history has no effect here"),
        ({"optimizer.minibatches": 5}, "minibatches is 5, more than the 4 prompts of a step"),
        ({"rewards": [{"name": "personna"}]}, "there is no reward 'personna'; did you mean"),
        (
            {"clustering": {"name": "kmean"}},
            "there is no clusterer 'kmean'; did you mean 'kmeans'?",
        ),
        ({"clustering": {"name": "kmeans", "clusters": 2}}, "did you mean 'num_clusters'?"),
        ({"clustering": {"name": "kmeans", "num_clusters": 2.5}}, "num_clusters is 2.5"),
        ({"rewards": [{"name": "persona", "word": 1}]}, "takes no settings, but got 'word'"),
        ({"model.chat": True}, "model 'tiny' has no chat template; set model.chat = false"),
        ({"model.name": "./no-such-folder"}, "./no-such-folder does not exist; expected a folder"),
        ({"clustering.num_clusters": 500}, "num_clusters is 500, but only"),
        ({"generation.max_prompt_tokens": 2}, "more than generation.max_prompt_tokens = 2"),
    ],
)
def test_a_config_that_cannot_be_run(
    workplace: Path, capsys: Capture, changes: Tree, words: str
) -> None:
    config = write_config(workplace, changes)
    assert words in refused(capsys, "train", config)
    assert contents(workplace).keys() - {"run.toml"} <= STARTED


# A prompt is looked at when its step comes.
STARTED = {"runs/run/.lock", "runs/run/config.toml", "runs/run/run.json"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "config file run.toml does not exist"),
        ("[run", "run.toml is not valid TOML: "),
        ("\udcff", "run.toml is not valid TOML: "),
        ("", "run.toml: model is missing"),
    ],
)
def test_a_file_that_is_no_config(
    workplace: Path, capsys: Capture, text: str | None, words: str
) -> None:
    if text is not None:
        (workplace / "run.toml").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert refused(capsys, "train", "run.toml").startswith(words)
    assert (
        refused(capsys, "train", workplace) == f"{workplace} is a folder; a config is a TOML file"
    )
    assert not (workplace / "runs").exists()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("run.num_steps", "override 'run.num_steps' is not of the form section.key=value"),
        ("=3", "override '=3' is not of the form section.key=value"),
        ("run.num_stesp=3", "unknown key run.num_stesp; did you mean 'num_steps'?"),
        ("run.num_steps=many", "run.num_steps is 'many': input should be a valid integer"),
        ("rewards.4.weight=2", "override 'rewards.4.weight=2': there is no entry '4'"),
        ("rewards.0=2", "override 'rewards.0=2' must end in the name of a setting"),
        ("run.seed.deep=2", "unknown key run.seed"),
        ("model.name.deep=2", "override 'model.name.deep=2': model.name is a value, not a section"),
        ("generation.group_size=0", "generation.group_size is 0: input should be greater"),
    ],
)
def test_an_override_that_cannot_be(
    workplace: Path, capsys: Capture, override: str, words: str
) -> None:
    config = write_config(workplace)
    said = refused(capsys, "train", config, "--set", override)
    assert words in said or "run.seed is {'deep': 2}" in said
    assert set(contents(workplace)) == {"run.toml"}


# What is wrong with the data.


@pytest.mark.parametrize(
    ("table", "column", "words"),
    [
        (None, None, "data.jsonl does not exist; expected a jsonl file"),
        ([], None, "data.jsonl holds no rows"),
        ([{"user": "u"}], None, "data.jsonl:1: no column 'prompt'; found user"),
        (rows(), "club", "column 'club' of user 'u0' is missing in 2 of 2 rows"),
        ([*rows(club=1), {**rows()[0], "club": None}], "club", "'u0' is missing in 1 of 3 rows"),
        ([*rows(club=1), {**rows()[0], "club": 2}], "club", "expected one cluster in all of them"),
    ],
)
def test_data_that_cannot_be_used(
    workplace: Path, capsys: Capture, table: list[Tree] | None, column: str | None, words: str
) -> None:
    if table is not None:
        write_rows(workplace / "data.jsonl", table)
    clustering = {"name": "column", "column": column} if column else {"name": "single"}
    changes: Tree = {
        "data": {"name": "jsonl", "path": "data.jsonl"},
        "clustering": clustering,
        "rewards": [{"name": "exact_match"}],
    }
    before = contents(workplace)
    config = write_config(workplace, changes)
    assert words in refused(capsys, "train", config)
    assert contents(workplace).keys() - before.keys() == {"run.toml"}, "an empty folder was left"


def test_nothing_to_evaluate_on(workplace: Path, capsys: Capture) -> None:
    write_rows(workplace / "data.jsonl", rows())
    changes: Tree = {
        "model": {"name": make_model(workplace / "model"), "precision": "fp32"},
        "data": {"name": "jsonl", "path": "data.jsonl", "choices_column": "choices"},
        "clustering": {"name": "single"},
        "rewards": [{"name": "exact_match"}],
    }
    config = write_config(workplace, changes)
    said = refused(capsys, "train", config)
    assert said.startswith("the data set holds out no examples to evaluate on; give it some")


def test_training_without_held_out_examples(workplace: Path, capsys: Capture) -> None:
    """The advice of the sentence above works, and a model folder is found beside the config."""
    write_rows(workplace / "data.jsonl", rows())
    make_model(workplace / "model")
    run = {k: v for k, v in TINY_RUN["run"].items() if not k.startswith("eval")}
    changes: Tree = {
        "run": {**run, "num_steps": 2},
        "model": {"name": "model", "precision": "fp32"},
        "data": {"name": "jsonl", "path": "data.jsonl", "choices_column": "choices"},
        "clustering": {"name": "single"},
        "rewards": [{"name": "exact_match"}],
    }
    assert main(["train", str(write_config(workplace, changes)), "--out", "out"]) == 0
    samples = (workplace / "out" / "samples.jsonl").read_text("utf-8").splitlines()
    assert {json.loads(line)["completion"] for line in samples} <= {"w5", "w6 w7"}


def test_names_are_shown_as_they_are(
    workplace: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a terminal too, where brackets and colons could be taken for markup."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    write_rows(workplace / "data.jsonl", rows(club="[/bold] :smile:"))
    changes: Tree = {
        "run": {"num_steps": 1, "num_threads": 1, "trackers": []},
        "model": {"name": make_model(workplace / "model"), "precision": "fp32"},
        "data": {"name": "jsonl", "path": "data.jsonl", "choices_column": "choices"},
        "clustering": {"name": "column", "column": "club"},
        "rewards": [{"name": "exact_match"}],
    }
    assert main(["train", str(write_config(workplace, changes)), "--out", "[red]"]) == 0
    said = capsys.readouterr().out
    assert "[/bold] :smile:" in said
    assert "done: 1 steps in [red]" in said


# Plugins.

NAN = """
from pgrpo.plugins import hookimpl

calls = 0

def nan(rollouts):
    global calls
    calls += 1
    return [float("nan") if calls == 3 and i == 1 else 1.0 for i, _ in enumerate(rollouts)]

def nothing(rollouts):
    return [None for _ in rollouts]

def verbose(rollouts):
    raise ValueError("this\\n  goes on\\n  and on")

@hookimpl
def pgrpo_register_rewards(register):
    for reward in (nan, nothing, verbose):
        register(reward.__name__, reward)
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three bad rewards."""
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    install_plugin(tmp_path / "site", NAN)


@pytest.mark.usefixtures("plugin")
def test_a_reward_of_nan_costs_no_step(tmp_path: Path, capsys: Capture) -> None:
    config = write_config(
        tmp_path,
        {
            "run.checkpoint_every": 10,
            "run.eval_every": 10,
            "rewards": [{"name": "nan", "batch": "step"}],
            "evaluation": [{"name": "persona"}],
        },
    )
    run = tmp_path / "run"
    said = refused(capsys, "train", config, "--out", run)
    assert said.startswith("reward 'nan' failed on a rollout of group 0, prompt '")
    assert f": it returned nan, expected a finite number or None (see {run / 'log.txt'})" in said
    # Two steps were taken; they are there, and the run can go on from them.
    assert len((run / "metrics.jsonl").read_text("utf-8").splitlines()) == 2
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000002"]
    assert main(["train", "--resume", str(run)]) == 0
    assert len((run / "metrics.jsonl").read_text("utf-8").splitlines()) == 4


@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize(
    ("reward", "words"),
    [
        ("nothing", "no rollout of step 1 got a reward; there is nothing to learn from"),
        ("verbose", "ValueError: this   goes on   and on"),
    ],
)
def test_rewards_that_teach_nothing(
    tmp_path: Path, capsys: Capture, reward: str, words: str
) -> None:
    changes = {"rewards": [{"name": reward}], "evaluation": [{"name": "persona"}]}
    config = write_config(tmp_path, changes)
    assert words in refused(capsys, "train", config, "--out", tmp_path / "run")


# Run folders.


def test_train_wants_a_config_or_a_run(workplace: Path, capsys: Capture, finished: Path) -> None:
    assert refused(capsys, "train") == "train needs a config file, or --resume RUN"
    said = refused(capsys, "train", "x.toml", "--resume", finished)
    assert said == (
        f"--resume continues the run in {finished} with the config that lies there; x.toml has no effect"
    )
    said = refused(capsys, "train", "--resume", finished, "--out", "elsewhere")
    assert said == "--resume continues a run in its folder; --out has no effect"
    said = refused(capsys, "train", "--resume", finished, "--set", "optimizer.learning_rate=1")
    assert said == (
        "--resume continues a run as it was, so --set optimizer.learning_rate has no effect; expected "
        "run.num_steps alone"
    )
    said = refused(capsys, "train", "--resume", finished, "--set", "run.num_steps=1")
    assert said.startswith("run.num_steps is 1; expected 2 or more, for the run in ")
    said = refused(capsys, "train", "--resume", workplace / "missing")
    assert said.endswith("missing is not a run folder: it holds no config.toml")


def test_a_folder_that_holds_a_run_is_left_alone(
    tmp_path: Path, capsys: Capture, finished: Path
) -> None:
    before = contents(finished)
    said = refused(capsys, "train", write_config(tmp_path), "--out", finished)
    assert said == (
        f"run folder {finished} already holds a run; continue it with --resume, or choose another "
        "--out"
    )
    assert contents(finished) == before


def test_out_is_a_file(tmp_path: Path, capsys: Capture) -> None:
    config = write_config(tmp_path)
    said = refused(capsys, "train", config, "--out", config)
    assert said == f"run folder {config} cannot be used: File exists"
    said = refused(capsys, "compare", config, "--out", config)
    assert said == f"{config} cannot be used: File exists"
    said = refused(capsys, "report", config, "--out", tmp_path / "x.html")
    assert said == f"run folder {config} does not exist or is not a folder"


def test_a_run_that_another_process_works_on(tmp_path: Path, capsys: Capture) -> None:
    run = tmp_path / "run"
    process = start("train", write_config(tmp_path, {"run.num_steps": 10_000}), "--out", run)
    try:
        deadline = time.monotonic() + 60
        while not list((run / "checkpoints").glob("step-*")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        said = refused(capsys, "train", "--resume", run)
        assert said == f"run folder {run} is in use by another process"
        assert process.is_alive()
    finally:
        process.kill()
        process.join()


def test_a_damaged_checkpoint(tmp_path: Path, capsys: Capture) -> None:
    run = tmp_path / "run"
    process = start(
        "train", write_config(tmp_path), "--out", run, kill_at=3, folder=run / "samples.jsonl"
    )
    process.join()
    [checkpoint] = (run / "checkpoints").glob("step-*")
    weights = checkpoint / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    before = contents(run)
    for command in (("train", "--resume", run), ("evaluate", run)):
        said = refused(capsys, *command)
        assert said.startswith(f"checkpoint {checkpoint} is damaged: model/model.safetensors has ")
        assert said.endswith("move that folder away to go on from the beginning")
    # A save that was cut short, and only that, is cleared away.
    assert {k: v for k, v in before.items() if "/.partial" not in k} == contents(run)


def test_a_damaged_log(finished: Path, tmp_path: Path, capsys: Capture) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    (run / "run.json").write_text("{}", "utf-8")
    (run / "metrics.jsonl").write_bytes(b'\xff{"step": 1}\n{"step": 2}\n')
    said = refused(capsys, "train", "--resume", run)
    assert said.startswith(f"{run / 'metrics.jsonl'} line 1 is damaged: ")


def test_the_default_folder_is_a_new_one(workplace: Path) -> None:
    config = write_config(workplace, {"run.num_steps": 1})
    for name in ("run", "run-2"):
        assert main(["train", str(config), "--set", "run.seed=3"]) == 0
        assert "seed = 3" in (workplace / "runs" / name / "config.toml").read_text("utf-8")
        assert (workplace / "runs" / name / "report.html").stat().st_size > 10_000


# The other commands.


def test_evaluate(finished: Path, capsys: Capture) -> None:
    before = contents(finished)
    assert main(["evaluate", str(finished), "--prompts", "8", "--json"]) == 0
    [result] = json.loads(capsys.readouterr().out)
    assert (result["step"], result["num_prompts"], result["candidates"]) == (2, 8, None)
    assert sum(c["num_prompts"] for c in result["clusters"].values()) == 8
    # The same 8 prompts as after the last step of training.
    last = json.loads((finished / "evaluations.jsonl").read_text("utf-8").splitlines()[-1])
    assert {key: result[key] for key in last} == last
    assert result["standard_error"] == pytest.approx(result["std"] / 8**0.5)

    assert main(["evaluate", str(finished), "--prompts", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"reward {result['reward']:.3f} +- ")
    assert len(lines) == 1 + len(result["clusters"])
    assert contents(finished) == before


def test_evaluate_refuses(finished: Path, tmp_path: Path, capsys: Capture) -> None:
    said = refused(capsys, "evaluate", finished, "--candidates", "4,8")
    assert said == "data set 'personas' has no candidates to vary"
    for candidates in ("four", "4;8", "", ","):
        said = refused(capsys, "evaluate", finished, "--candidates", candidates)
        assert said == f"--candidates is {candidates!r}; expected whole numbers with commas"
    assert refused(capsys, "evaluate", finished, "--prompts", "0") == (
        "--prompts is 0; expected 1 or more"
    )
    said = refused(capsys, "evaluate", tmp_path)
    assert said == f"{tmp_path} is not a run folder: it holds no config.toml"
    (tmp_path / "config.toml").write_text((finished / "config.toml").read_text("utf-8"))
    assert refused(capsys, "evaluate", tmp_path) == f"{tmp_path} has no checkpoint yet"


def test_report(finished: Path, tmp_path: Path, capsys: Capture) -> None:
    page = tmp_path / "some where" / "page.html"
    assert main(["report", str(finished), "--out", str(page)]) == 0
    assert capsys.readouterr().out.endswith(f"report: {page.as_uri()}\n")
    assert "some%20where" in page.as_uri()
    text = page.read_text("utf-8")
    assert "<html" in text
    assert refused(capsys, "report", finished, finished, "--out", page)
    assert refused(capsys, "report", tmp_path, "--out", page)
    assert page.read_text("utf-8") == text


def test_plugins(capsys: Capture) -> None:
    assert main(["plugins"]) == 0
    said = capsys.readouterr().out
    for line in ("reward choice (pgrpo ", "clusterer kmeans (pgrpo ", "    num_clusters: Clusters"):
        assert line in said


def test_the_command_as_installed(tmp_path: Path) -> None:
    """The console script, and that a refusal is quick: neither torch nor transformers is loaded."""
    command = str(Path(sys.executable).with_name("pgrpo"))
    config = write_config(tmp_path, {"run.num_step": 3})
    result = subprocess.run(
        [command, "train", str(config)], capture_output=True, text=True, cwd=tmp_path
    )
    said = f"pgrpo: {config}: unknown key run.num_step; did you mean 'num_steps'?\n"
    assert (result.returncode, result.stdout, result.stderr) == (2, "", said)
    program = """
        import sys
        from pgrpo.cli import main
        assert main(sys.argv[1:]) == 2
        assert "torch" not in sys.modules
    """
    for arguments in (["train", str(config)], ["compare", str(config), "--out", "x"]):
        subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program), *arguments], check=True, cwd=tmp_path
        )
    assert set(contents(tmp_path)) == {"run.toml"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "Missing command"),
        (("tarin",), "No such command 'tarin'. Did you mean 'train'?"),
        (("train", "--rseume", "x"), "No such option: --rseume"),
        (("compare", "x.toml"), "Missing option '--out'"),
        (("evaluate",), "Missing argument 'RUN'"),
        (
            ("evaluate", "x", "--prompts", "many"),
            "Invalid value for '--prompts': Input should be a valid integer",
        ),
        (("report", "--out"), "Option '--out' requires an argument"),
    ],
)
def test_a_command_line_that_cannot_be_read(
    workplace: Path, capsys: Capture, arguments: tuple[str, ...], words: str
) -> None:
    said = refused(capsys, *arguments)
    assert words in said
    assert said.endswith("; pgrpo --help tells what is expected")
    assert not contents(workplace)


def test_help_is_quick_and_tells_every_command(capsys: Capture) -> None:
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    for command in ("demo", "train", "compare", "evaluate", "report", "serve", "plugins"):
        assert f"  {command} " in said
        assert main([command, "--help"]) == 0
        assert f"Usage: pgrpo {command} " in capsys.readouterr().out
    program = """
        import sys
        from pgrpo.cli import main
        assert main(["--help"]) == 0
        loaded = {"torch", "transformers", "sklearn", "plotly", "rich"} & set(sys.modules)
        assert not loaded, loaded
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True)


def test_words_are_completed() -> None:
    command = str(Path(sys.executable).with_name("pgrpo"))
    for typed, offered in (("pgrpo eval", "evaluate"), ("pgrpo compare --est", "--estimators")):
        words = typed.split()
        completing = {
            "_PGRPO_COMPLETE": "complete_bash",
            "COMP_WORDS": typed,
            "COMP_CWORD": str(len(words) - 1),
        }
        result = subprocess.run(
            [command], env={**os.environ, **completing}, capture_output=True, text=True
        )
        assert result.stdout.split() == [offered], result.stderr


def test_without_the_trainers_packages_it_says_what_to_install() -> None:
    program = """
        import sys
        sys.modules["typer"] = None  # not to be imported, as where it is not installed
        from pgrpo.cli import main
        assert main(["train", "x.toml"]) == 2
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True
    )
    said = "pgrpo: this command needs typer; install it with pip install 'pgrpo[train]'\n"
    assert (result.returncode, result.stderr) == (0, said)


def test_an_interrupt_is_no_error(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Display, "step", interrupt)
    run = tmp_path / "run"
    assert main(["train", str(write_config(tmp_path)), "--out", str(run)]) == 130
    assert capsys.readouterr().err == (
        f"pgrpo: interrupted; step 1 is saved, and pgrpo train --resume {run} goes on from there\n"
    )
    assert json.loads((run / "run.json").read_text())["status"] == "interrupted"
    monkeypatch.undo()
    assert main(["train", "--resume", str(run)]) == 0


def test_names_cannot_command_the_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    normalizer = ClusterNormalizer()
    normalizer.update([1.0, 2.0], ["\x1b[2Jgone", "zo\xeb"])
    normalizer.save(tmp_path / "histories")
    assert main(["histories", "show", str(tmp_path / "histories")]) == 0
    shown = capfd.readouterr().out
    assert "\\x1b[2Jgone" in shown and "zo\xeb" in shown and "\x1b" not in shown
    assert main(["report", "\x1b[2J"]) == 2
    assert "\x1b" not in capfd.readouterr().err
    Display("x\x1bc", 4).note("a b\x9bK")
    assert capfd.readouterr().out == "[x\\x1bc] a b\\x9bK\n"


def test_the_version_and_the_module(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    said = capfd.readouterr().out
    assert said == f"pgrpo {metadata.version('pgrpo')}\n"
    subprocess.run([sys.executable, "-m", "pgrpo", "--version"], check=True)
    assert capfd.readouterr().out == said


def test_every_error_a_user_can_meet_is_exported() -> None:
    import pgrpo
    from pgrpo import errors

    kinds = {kind for kind in vars(errors).values() if isinstance(kind, type)}
    kinds = {kind for kind in kinds if issubclass(kind, errors.PgrpoError)}
    assert kinds == {kind for name in pgrpo.__all__ if (kind := getattr(pgrpo, name)) in kinds}


def test_serve_without_vllm_says_what_to_install(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "made by the trainer" in refused(capsys, "serve", config)
    said = refused(capsys, "serve", config, "--set", "model.name=some/model")
    assert said == "pgrpo serve needs vLLM; install it with pip install 'pgrpo[vllm]'"


def test_serve_starts_vllm_with_what_a_run_needs(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command line; tests/with_vllm has real servers."""
    LlamaConfig(max_position_embeddings=128).save_pretrained(tmp_path / "model")
    started: list[Any] = []
    spec = type("Spec", (), {"origin": "somewhere"})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    monkeypatch.setattr("os.execve", lambda *call: started.append(call))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("MY_KEY", "sk-secret")
    changes = {
        "model": {"name": str(tmp_path / "model"), "precision": "fp32"},
        "generation": {
            "engine": "vllm",
            "max_prompt_tokens": 100,
            "vllm": {
                "servers": ["http://a"],
                "api_key_env": "MY_KEY",
                "options": {"max_num_seqs": 7},
            },
        },
    }
    assert main(["serve", str(write_config(tmp_path, changes)), "--port", "81"]) == 0
    ((program, command, environment),) = started
    assert program == sys.executable
    line = " ".join(command)
    for part in (
        f"--model {tmp_path / 'model'} --",
        "--host 127.0.0.1 --port 81",
        "--dtype float32",
        "--max-model-len 128",
        "--block-size 32",
        "--enable-prefix-caching",
        "--no-enable-chunked-prefill",
        "--logprobs-mode processed_logprobs",
        '--weight-transfer-config {"backend": "pgrpo"}',
        "--max-num-seqs 7",
    ):
        assert part in f"{line} ", part
    assert environment["VLLM_SERVER_DEV_MODE"] == "1"
    assert environment["VLLM_API_KEY"] == "sk-secret"
    assert "sk-secret" not in line + capsys.readouterr().out


def test_results_are_json_where_it_is_asked_for(workplace: Path, capsys: Capture) -> None:
    config, run, both = write_config(workplace), workplace / "run", workplace / "both"
    words = ["--set", "run.num_steps=1"]
    assert main(["train", str(config), "--out", str(run), "--json", *words]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert found["report"] == str(run / "report.html") and found["headline"]
    assert said.err.startswith("[pgrpo] "), "progress is not in the way"
    assert main(["train", str(config), "--out", str(run) + "2", "--quiet", *words]) == 0
    quiet = capsys.readouterr()
    assert found["headline"] in quiet.out and "[pgrpo]" not in quiet.out and quiet.err == ""
    compare = ["compare", str(config), "--out", str(both), "--json", "-q", *words]
    assert main([*compare, "--estimators", "grpo,pgrpo"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["report"] == str(both / "report.html") and said.err == ""
    assert main(["report", str(run), "--out", str(workplace / "r.html"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["headline"] == found["headline"]
    assert main(["plugins", "--json"]) == 0
    assert {"kind": "reward", "name": "choice"}.items() <= json.loads(capsys.readouterr().out)[
        0
    ].items()


def test_verbose_tells_where_an_error_comes_from(
    workplace: Path, capsys: Capture, caplog: pytest.LogCaptureFixture
) -> None:
    config = write_config(workplace, {"clustering.num_clusters": 500})
    for name in ("", "pgrpo"):
        caplog.set_level(logging.WARNING, logger=name)  # which are what they were afterwards
    caplog.handler.setLevel(logging.DEBUG)
    assert main(["check", str(config)]) == 2
    assert not caplog.records
    assert main(["-v", "check", str(config)]) == 2
    assert "num_clusters is 500, but only" in capsys.readouterr().err
    (record,) = [each for each in caplog.records if each.name == "pgrpo"]
    assert record.exc_info is not None and isinstance(record.exc_info[1], DataError)


WITHOUT_TORCH = """
import sys
from pgrpo.cli import main
assert main(sys.argv[1:]) == 2
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.path": "nope.jsonl"}, "nope.jsonl does not exist; expected a jsonl file"),
        ({"data.user_column": "who"}, "rows.jsonl:1: no column 'who'; found prompt, user"),
        (
            {"data": {"name": "feedback", "path": "rows.jsonl"}},
            "rows.jsonl:1 has columns prompt, user, by which its layout is none of those known",
        ),
        ({"rewards": [{"name": "chioce"}]}, "there is no reward 'chioce'; did you mean 'choice'?"),
        (
            {"rewards": [{"name": "choice", "x": 1}]},
            "reward 'choice' takes no settings, but got 'x'",
        ),
        ({"clustering": {"name": "kmeans", "k": 2}}, "unknown key k"),
    ],
)
def test_mistakes_are_told_before_torch_is_imported(
    workplace: Path, changes: Tree, message: str
) -> None:
    (workplace / "rows.jsonl").write_text(json.dumps({"prompt": "a", "user": "u"}))
    data = {"data": {"name": "jsonl", "path": "rows.jsonl"}, "rewards": [{"name": "choice"}]}
    config = write_config(workplace, {**data, **changes})
    command = [sys.executable, "-c", WITHOUT_TORCH, "train", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=workplace, check=False)
    assert done.returncode == 0, done.stderr
    assert message in done.stderr
