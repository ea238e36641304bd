"""The benches' history: lines are added, and say which code was measured how."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

BENCHES = Path(__file__).parents[1] / "benches"
KEYS = ["bench", "date", "commit", "machine", "command", "ratios"]


def test_a_result_is_replaced_and_its_ratios_are_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHES))
    monkeypatch.setattr(sys, "argv", ["benches/some.py", "--out", "a file.json"])
    import history

    for measured in (2.0, 3.00001):
        history.write(tmp_path / "x" / "some.json", "some", {"all": measured}, {"a": measured})
    assert json.loads((tmp_path / "x" / "some.json").read_text("utf-8")) == {"all": 3.00001}
    lines = (tmp_path / "x" / "history.jsonl").read_text("utf-8").splitlines()
    first, last = map(json.loads, lines)
    assert list(first) == list(last) == KEYS
    assert (first["ratios"], last["ratios"]) == ({"a": 2.0}, {"a": 3.0})
    assert re.fullmatch(r"[0-9a-f]{7,}\+?", first["commit"])
    assert first["command"] == "python benches/some.py --out 'a file.json'"


def test_the_history_kept_here_can_be_read() -> None:
    lines = (BENCHES / "results" / "history.jsonl").read_text("utf-8").splitlines()
    assert len(lines) >= 4
    for line in map(json.loads, lines):
        assert list(line) == KEYS
        assert all(ratio > 0 for ratio in line["ratios"].values())
