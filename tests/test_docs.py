"""What the documentation shows is run: its code, its examples and its reference of settings."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from pgrpo.cli import main
from pgrpo.config.toml import resolved_tree
from pgrpo.data import load_dataset
from pgrpo.data.feedback import FeedbackConfig
from pgrpo.data.table import TableConfig
from pgrpo.errors import ConfigError
from pgrpo.normalizer import RULES
from pgrpo.plugins.registry import load_registry
from pgrpo.runs.config import Config, load_config, parse_config

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
EXAMPLES = sorted((ROOT / "examples").glob("*.toml"))


def blocks(page: str, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```$", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE
    )


def generate_config(name="generate_config"):
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_of_settings_is_up_to_date():
    written = (DOCS / "config.md").read_text()
    assert written == generate_config().reference(), "run `make docs`"


def test_the_tables_of_estimators_and_options_are_up_to_date():
    page = (DOCS / "estimators.md").read_text()
    assert page == generate_config().estimators(page), "run `make docs`"
    used = page[page.index("| name | use it for") :]
    for name in RULES:
        assert re.search(rf"^\| [^|]*`{name}`[^|]* \|", used, re.MULTILINE), f"what is {name} for?"


def test_the_tables_of_a_run_folder_are_those_of_the_records():
    page = (DOCS / "run_folder.md").read_text()
    assert page == generate_config("generate_run_folder").renewed(page), "run `make docs`"


def test_the_reference_has_every_section():
    sections = {section for _, section in generate_config().TABLES}
    config = Config.model_json_schema()["$defs"]
    assert {section.__name__ for section in sections} == set(config)


def estimators_without_effect(line):
    """What a line made of RULES says: some options with some estimators."""
    line, unweighted, _ = line.partition(", and no `frequency_weight`")
    words = re.findall(r"`(\w+)`", line)
    values = {
        "history": "one",
        "order": "normalize_then_update",
        "forgetting": 0.9,
        "prior_count": 16.0,
        "sigma_floor": 0.1,
        "min_count": 2.0,
        "ddof": 1,
        "eps": 0.1,
    }
    assert words, line
    return [
        {"estimator": {"name": name, "frequency_weight": weight, option: values[option]}}
        for name in words
        if name in RULES
        for option in words
        if option not in RULES
        for weight in ((0.0,) if unweighted else (0.0, 0.5))
    ]


@pytest.mark.parametrize(
    "key", re.findall(r"^ *- (`.*)", (DOCS / "config.md").read_text(), re.MULTILINE)
)
def test_settings_said_to_have_no_effect_are_refused(key):
    idle = {
        "`model.system_prompt` without `model.chat = true`": [
            {"model": {"name": "tiny", "system_prompt": "x"}}
        ],
        "`model.revision` of `tiny` and of a `pypi:` model": [
            {"model": {"name": name, "revision": "main"}} for name in ("tiny", "pypi:a==1")
        ],
        "`run.resample` with an estimator that does not compare within the group": [
            {"run": {"resample": 1}, "estimator": {"name": name}}
            for name in ("pgrpo", "batch", "shrinkage", "auto", "rae")
        ],
        "`run.keep_best` without `run.eval_every`": [{"run": {"keep_best": True, "eval_every": 0}}],
        '`frequency_weight` of `[estimator]` with `history = "one"`': [
            {"estimator": {"history": "one", "frequency_weight": 0.5}}
        ],
        '`importance_cap`, `mask_below` and `mask_above` of `[loss]` with `importance = "off"`': [
            {"loss": {"importance": "off"} | setting}
            for setting in ({"importance_cap": 3.0}, {"mask_below": 0.5}, {"mask_above": 2.0})
        ],
        '`importance` and these three with `old_logprobs = "rollout"`': [
            {"loss": {"old_logprobs": "rollout"} | setting}
            for setting in (
                {"importance": "token"},
                {"importance_cap": 3.0},
                {"mask_below": 0.5},
                {"mask_above": 2.0},
            )
        ],
        "`generation.overlong_penalty` without `generation.overlong_buffer`": [
            {"generation": {"overlong_penalty": 0.5}}
        ],
        '`[generation.vllm]` without `engine = "vllm"`, and in it:': [
            {"generation": {"vllm": {"block_size": 64}}},
            {"generation": {"vllm": {}}},
        ],
        "`api_key_env`, `transfer`, `data_parallel_size` and `retry_s` without `servers`": [
            {"generation": {"engine": "vllm", "vllm": setting}}
            for setting in (
                {"api_key_env": "KEY"},
                {"transfer": "file"},
                {"data_parallel_size": 2},
                {"retry_s": 1.0},
            )
        ],
        "`transfer_folder` without `servers` or `tensor_parallel_size` > 1, and where no file is the means": [
            {"generation": {"engine": "vllm", "vllm": {"transfer_folder": "x"} | setting}}
            for setting in ({}, {"servers": ["http://x"], "transfer": "nccl"})
        ],
        "`sleep` with `servers`": [
            {"generation": {"engine": "vllm", "vllm": {"servers": ["http://x"], "sleep": False}}}
        ],
    }
    tree = {
        "model": {"name": "tiny"},
        "data": {"name": "personas"},
        "clustering": {"name": "single"},
        "rewards": [{"name": "persona"}],
    }
    parse_config(tree)
    for change in idle.get(key) or estimators_without_effect(key):
        with pytest.raises(ConfigError, match="has no effect"):
            parse_config(tree | change)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_configs_with_plugins_that_can_be_built(path):
    config, registry = load_config(path), load_registry()
    registry.clusterer(config.clustering)
    for section in [*config.rewards, *config.evaluation]:
        registry.reward(section)
    assert parse_config(resolved_tree(config)) == config


def test_the_row_that_own_data_shows_is_one(tmp_path):
    text = (ROOT / "examples" / "own-data.toml").read_text()
    comment = re.search(r"^#   (\{.*?\})$", text, re.DOTALL | re.MULTILINE)
    assert comment
    row = json.loads(" ".join(comment[1].replace("#", "").split()))
    for name in ("own-train.jsonl", "own-held-out.jsonl"):
        (tmp_path / name).write_text(json.dumps(row) + "\n")
    (tmp_path / "own-data.toml").write_text(text)
    config = load_config(tmp_path / "own-data.toml")
    assert isinstance(config.data, TableConfig)
    dataset = load_dataset(config.data)
    clusterer = load_registry().clusterer(config.clustering)
    none = np.zeros((1, 0))
    clusterer.fit(["u17"], none, [*dataset.train, *dataset.evaluation])
    assert clusterer.assign(["u17"], none) == ["patient"]
    assert dataset.train[0].choices == (" yes", " no")
    assert dataset.train[0].columns["answer"] == " no"


CODE_AND_OUTPUT = re.compile(
    r"^```python\n(.*?)^```$(?:\n\n^```\n(.*?)^```$)?", re.DOTALL | re.MULTILINE
)


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("code", "shown"), CODE_AND_OUTPUT.findall((DOCS / "estimators.md").read_text())
)
def test_the_code_of_the_estimators_page_prints_what_is_shown(one_rank, capsys, code, shown):
    exec(compile(code, "estimators.md", "exec"), {})
    assert capsys.readouterr().out == shown


@pytest.fixture
def my_plugins(tmp_path, monkeypatch):
    """The plugins page's module, found through its entry point as if it were installed."""
    _, project, _ = map(tomllib.loads, blocks("plugins.md", "toml"))
    (module,) = project["tool"]["setuptools"]["py-modules"]
    site = tmp_path / "site"
    info = site / f"{module}-{project['project']['version']}.dist-info"
    info.mkdir(parents=True)
    (site / f"{module}.py").write_text("\n".join(blocks("plugins.md", "python")))
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['project']['name']}\n"
        f"Version: {project['project']['version']}\n"
    )
    entries = project["project"]["entry-points"]["pgrpo"]
    (info / "entry_points.txt").write_text(
        "[pgrpo]\n" + "".join(f"{name} = {value}\n" for name, value in entries.items())
    )
    monkeypatch.syspath_prepend(str(site))
    yield
    sys.modules.pop(module, None)


def test_the_plugins_of_the_plugins_page_train(my_plugins, tmp_path, capsys):
    by_cluster, _, config = blocks("plugins.md", "toml")

    def trained(name: str, config: str) -> list[Any]:
        (tmp_path / f"{name}.toml").write_text(config)
        run = tmp_path / name
        assert main(["train", str(tmp_path / f"{name}.toml"), "--out", str(run)]) == 0
        return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]

    others = tomllib.loads(by_cluster)["rewards"]
    for line in trained("by_cluster", tomli_w.dumps({**tomllib.loads(config), "rewards": others})):
        found = {name: stats["reward"] for name, stats in line["clusters"].items()}
        assert found["low"] == 1 and 5 < found["high"] <= 10

    lines = trained("run", config)
    assert len(lines) == 2
    assert {cluster for line in lines for cluster in line["clusters"]} == {"high", "low"}
    # variety and patient give nearly 1 to six random words; length 0.5 to six, 1 to four.
    assert all(0.8 < line["reward"] < 1.6 for line in lines)

    assert main(["plugins"]) == 0
    listed = capsys.readouterr().out
    assert "clusterer halves (my-plugins 0.1.0): Two clusters, parted at the median" in listed
    assert "    words: Wanted number of words. Required." in listed


@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md")))
def test_settings_that_a_page_names_exist(page):
    sections = ["run", "model", "generation", "estimator", "loss", "optimizer"]
    classes: dict[str, Any] = {name: Config.model_fields[name].annotation for name in sections}
    known = {f"{name}.{key}" for name, section in classes.items() for key in section.model_fields}
    pattern = rf"`((?:{'|'.join(sections)})\.(?!json|safetensors)[a-z_]+)"
    assert set(re.findall(pattern, (DOCS / page).read_text())) <= known


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("personas") / "run"
    changes = {"num_steps": 2, "prompts_per_step": 16, "eval_prompts": 16}
    overrides = [part for k, v in changes.items() for part in ("--set", f"run.{k}={v}")]
    example = str(ROOT / "examples" / "personas.toml")
    assert main(["train", example, "--out", str(out), *overrides]) == 0
    return out


def chapter(page: str, title: str) -> str:
    """What a page says below `## title`."""
    return (DOCS / page).read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]


def names(record: dict[str, Any]) -> set[str]:
    """Every key of a record, and of the records below it; cluster ids and packages are data."""
    found: set[str] = set()
    for key, value in record.items():
        found.add(key)
        if key == "clusters":
            found |= {name for cluster in value.values() for name in cluster}
        elif isinstance(value, dict) and key != "versions":
            found |= names(value)
    return found


@pytest.mark.parametrize("log", ["metrics.jsonl", "evaluations.jsonl", "samples.jsonl"])
def test_every_name_in_a_log_is_documented(run, log):
    text = chapter("run_folder.md", log)
    for line in (run / log).read_text().splitlines():
        assert not {name for name in names(json.loads(line)) if f"`{name}`" not in text}


def test_every_file_of_a_run_is_documented(run):
    info = json.loads((run / "run.json").read_text())
    text = chapter("run_folder.md", "run.json")
    assert not {name for name in names(info) if f"`{name}`" not in text}

    page = (DOCS / "run_folder.md").read_text()
    assert not {path.name for path in run.iterdir() if path.name not in page}
    (checkpoint,) = (run / "checkpoints").iterdir()
    text = chapter("run_folder.md", "checkpoints/step-000040/")
    state = json.loads((checkpoint / "state.json").read_text())
    found = {path.name for path in checkpoint.iterdir()} | state.keys()
    assert not {name for name in found if f"`{name}" not in text}


def test_the_log_of_thumbs_is_a_data_set(tmp_path: Path) -> None:
    for name in ("thumbs.py", "thumbs.toml"):
        shutil.copy(ROOT / "examples" / name, tmp_path)
    subprocess.run([sys.executable, str(tmp_path / "thumbs.py")], check=True)
    config = load_config(tmp_path / "thumbs.toml")
    assert isinstance(config.data, FeedbackConfig)
    dataset = load_dataset(config.data)
    assert (len(dataset.train), len(dataset.evaluation), len(dataset.users)) == (780, 180, 60)
    shown = (DOCS / "data.md").read_text().partition("```toml\nmodel.name")[2].partition("```")[0]
    lines = (tmp_path / "thumbs.toml").read_text().partition("model.name")[2]
    assert "".join(shown.split()) == "".join(lines.split())
