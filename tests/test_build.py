"""How a run is put together, and taken apart when that fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_run, train

from pgrpo.errors import CheckpointError, ConfigError
from pgrpo.rollout.engines.transformers import TransformersEngine
from pgrpo.runs.config import parse_config
from pgrpo.runs.display import Display
from pgrpo.runs.folder import RunFolder
from pgrpo.train.build import Assembly
from pgrpo.train.checkpoint import latest_checkpoint
from pgrpo.train.trainer import Trainer


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The engines that were closed."""
    engines: list[object] = []
    monkeypatch.setattr(TransformersEngine, "close", lambda self: engines.append(self))
    return engines


def test_parts_are_made_once_and_closed_at_the_end(closed: list[object]) -> None:
    with Assembly(parse_config(tiny_run())) as parts:
        assert "model" not in vars(parts), "nothing is made that nobody asked for"
        assert parts.engine is parts.engine
        assert parts.held_out_scorer is parts.scorer, "the config has no rewards of evaluation"
        assert parts.policy.model is parts.model
        assert not closed
        engine = parts.engine
    assert closed == [engine]


@pytest.mark.parametrize("where", ["rewards", "evaluation"])
def test_every_cluster_has_a_reward_and_every_reward_its_clusters(where: str) -> None:
    def scorer(*clusters: list[Any]) -> Any:
        sections = [{"name": "persona", "clusters": each} for each in clusters]
        with Assembly(parse_config(tiny_run({where: sections}))) as parts:
            return parts.scorer if where == "rewards" else parts.held_out_scorer

    with Assembly(parse_config(tiny_run())) as parts:
        first, *others = parts.members.about
    scorer([first], others)
    scorer([], [first])
    with pytest.raises(ConfigError, match=f"for cluster 'nobody', which .* some of {first}, "):
        scorer([], [first, "nobody"])
    with pytest.raises(ConfigError, match=f"no reward is for cluster {first}; expected one"):
        scorer(others)


@pytest.mark.parametrize(
    ("damaged", "words"),
    [("normalizer", "normalizer state"), ("batch", "the checkpoint lacks 'groups' in state.json")],
)
def test_a_state_that_cannot_be_restored_closes_the_engine(
    tmp_path: Path, closed: list[Any], damaged: str, words: str
) -> None:
    run = train(tmp_path)
    closed.clear()
    checkpoint = latest_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    state = json.loads((checkpoint.path / "state.json").read_text("utf-8"))
    state[damaged] = {}
    (checkpoint.path / "state.json").write_text(json.dumps(state), "utf-8")
    folder = RunFolder(run)
    with (
        pytest.raises(CheckpointError, match=words),
        folder,
        Assembly(folder.config(), checkpoint) as parts,
    ):
        Trainer(parts, folder, Display("x", 4))
    assert closed == [parts.engine]
