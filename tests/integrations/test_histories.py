"""`pgrpo histories`: what lies in files and checkpoints, as people read it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pgrpo import ClusterNormalizer
from pgrpo.cli import main
from pgrpo.integrations.adapter import Adapter

REWARDS = {"a": [0.0, 1.0, 1.0], 7: [10.0, 30.0]}


def filled(scale: float = 1.0, **options: object) -> ClusterNormalizer:
    normalizer = ClusterNormalizer("pgrpo", **options)  # type: ignore[arg-type]
    for cluster, rewards in REWARDS.items():
        values = scale * np.array(rewards)
        if options:
            values = np.stack([values, 100 * values], axis=1)
        normalizer.update(values, [cluster] * len(rewards))
    return normalizer


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[list[str]]:
    """The lines of a command that succeeds, in words."""
    code = main(["histories", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert code == 0, err
    return [line.split() for line in out.splitlines()]


def test_a_file_is_shown_cluster_by_cluster(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled().save(tmp_path / "one.bin")
    lines = said(capsys, "show", tmp_path / "one.bin")
    assert lines[0][-2:] == ["2", "clusters"]
    assert lines[1] == ["cluster", "count", "share", "mean", "std"]
    assert lines[2] == ["a", "3", "60.0", "%", "0.666667", "0.471405"]
    assert lines[3] == ["7", "2", "40.0", "%", "20", "10"]
    assert any(line[:1] == ["warning:"] for line in lines)
    assert ["and", "1", "more"] in said(capsys, "show", tmp_path / "one.bin", "--limit", 1)
    assert main(["histories", "show", str(tmp_path / "one.bin"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)[str(tmp_path / "one.bin")][""]
    assert found["7"] == {"count": 2, "mean": 20.0, "std": 10.0}


def test_what_is_merged_and_what_differs_are_json_where_it_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two, both = (str(tmp_path / name) for name in ("one.bin", "two.bin", "both.bin"))
    filled().save(one)
    other = ClusterNormalizer()
    other.update([4.0], ["new"])
    other.save(two)
    assert main(["histories", "merge", one, two, "--out", both, "--json"]) == 0
    merged = json.loads(capsys.readouterr().out)[both][""]
    assert merged["7"]["count"] == 2 and merged["new"]["mean"] == 4.0
    assert main(["histories", "diff", one, both, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[""] == {
        "new": {"before": None, "after": {"count": 1, "mean": 4.0, "std": 0.0}}
    }


@pytest.mark.parametrize("layout", ["framework", "own", "json", "steps"])
def test_checkpoints_are_found_in_their_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: str
) -> None:
    place = tmp_path / "run"
    if layout == "framework":
        for step in (9, 10):
            (place / f"checkpoint-{step}").mkdir(parents=True)
            Adapter(filled(step)).save(place / f"checkpoint-{step}")
    elif layout == "json":
        place = tmp_path / "state.json"
        place.write_text(json.dumps(filled(10).state_dict()))
    else:
        inner = (
            place / "checkpoints" / "step-000010" if layout == "own" else place / "global_step_10"
        )
        inner.mkdir(parents=True)
        (inner / "state.json").write_text(json.dumps({"histories": filled(10).state_dict()}))
    lines = said(capsys, "show", place)
    assert ["7", "2", "40.0", "%", "200", "100"] in lines


@pytest.mark.parametrize("combine", ["sum_then_normalize", "normalize_then_sum"])
@pytest.mark.parametrize("form", ["bin", "json"])
def test_several_rewards_are_shown_one_by_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], combine: str, form: str
) -> None:
    normalizer = filled(reward_weights=[1, 1], reward_names=["right", "short"], combine=combine)
    path = tmp_path / f"two.{form}"
    if form == "bin":
        normalizer.save(path)
    else:
        path.write_text(json.dumps(normalizer.state_dict()))
    lines = said(capsys, "show", path)
    means = [line[-2] for line in lines if line[0] == "7"]
    assert means == (["2020"] if combine == "sum_then_normalize" else ["20", "2000"])


def test_shards_merge_to_one_stream(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = ClusterNormalizer("pgrpo")
    for shard in range(3):
        part = filled(shard + 1)
        part.save(tmp_path / f"{shard}.bin")
        whole.merge(part)
    files = [tmp_path / f"{shard}.bin" for shard in range(3)]
    said(capsys, "merge", *files, "--out", tmp_path / "all.bin")
    merged = ClusterNormalizer("pgrpo")
    merged.load(tmp_path / "all.bin")
    assert merged.state_dict() == whole.state_dict()


def test_differences_are_those_of_clusters_that_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    normalizer = filled()
    normalizer.save(tmp_path / "old.bin")
    normalizer.update([50.0], [7])
    normalizer.update([1.0], ["new"])
    normalizer.save(tmp_path / "new.bin")
    lines = said(capsys, "diff", tmp_path / "old.bin", tmp_path / "new.bin")
    assert " ".join(lines[0]) == "2 of 3 clusters differ"
    assert lines[2][:7] == ["7", "2", "→", "3", "20", "→", "30"]
    assert lines[3][:4] == ["new", "0", "→", "1"]
    assert said(capsys, "diff", tmp_path / "old.bin", tmp_path / "old.bin") == [
        ["0", "of", "2", "clusters", "differ"]
    ]


def test_what_holds_no_histories_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.json").write_text("[1, 2]")
    (tmp_path / "other.bin").write_bytes(b"nothing of the kind")
    filled().save(tmp_path / "one.bin")
    filled(reward_weights=[1, 1]).save(tmp_path / "two.bin")
    for arguments, complaint in (
        (["show", "empty"], "holds no histories"),
        (["show", "other.json"], "holds no histories"),
        (["show", "other.bin"], "other.bin"),
        (["show", "absent.bin"], "absent.bin"),
        (["merge", "one.bin", "--out", "all.bin"], "expected two or more"),
        (["merge", "one.bin", "two.bin", "--out", "all.bin"], "two.bin holds the rewards"),
        (["diff", "one.bin", "two.bin"], "holds the rewards"),
    ):
        words = [
            w if w in ("show", "merge", "diff", "--out") else str(tmp_path / w) for w in arguments
        ]
        assert main(["histories", *words]) == 2
        assert complaint in capsys.readouterr().err
    assert not (tmp_path / "all.bin").exists()
