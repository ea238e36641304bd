"""What `pgrpo reproduce --on` takes beside the panel and MovieLens: reviews by path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w

from pgrpo.cli import main
from pgrpo.config.toml import read_toml

EXAMPLE = Path(__file__).parents[1] / "examples" / "goodreads.toml"
READERS, REVIEWS = 12, 10


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The example with made-up reviews in the place of the published ones, and a tiny model: harsh
    readers give one to three stars, generous ones three to five, and one row in ten has no rating."""
    rng = np.random.default_rng(0)
    rows = [
        {
            "user_id": f"u{reader}",
            "book_id": str(100 * reader + n),
            "review_id": f"{reader}-{n}",
            "rating": 0 if n == 4 else int(rng.integers(1, 4)) + 2 * (reader % 2),
            "review_text": "a book of war and love" if n % 2 else "slow and long, in the end dull",
            "date_added": f"Fri Aug 25 13:{10 + n}:00 -0700 2017",
        }
        for reader in range(READERS)
        for n in range(REVIEWS)
    ]
    (tmp_path / "reviews.json").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    tree: dict[str, Any] = read_toml(EXAMPLE)
    tree["data"]["path"] = "reviews.json"
    tree["model"] = {"name": "tiny", "precision": "fp32"}
    tree["run"] |= {"num_steps": 2, "prompts_per_step": 4, "checkpoint_every": 2}
    tree["clustering"]["num_clusters"] = 2
    changed = tmp_path / "reviews.toml"
    changed.write_text(tomli_w.dumps(tree), "utf-8")
    return changed


def test_reviews_by_path_are_a_base(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["reproduce", "rollouts", "--on", str(config), "--out", str(out), "--seeds", "0,1"]
    command += ["--settings", "steps-1,steps-2", "--arms", "grpo,pgrpo", "--quiet"]
    assert main(command) == 0
    rows = json.loads((out / "table.json").read_text("utf-8"))
    figures = [row["figure"] for row in rows if row["figure"] is not None]
    assert len(rows) == 8 and len(figures) == 6
    assert all(0 <= figure <= 1 for figure in figures)
    # A space and a digit are two tokens, so that answers are generated: there is no exact mean.
    assert all(row["expected"] is None for row in rows)
    rules = json.loads((out / "rules.json").read_text("utf-8"))
    assert rules["steps-1"] == rules["steps-2"]
    # Any of five answers to one who says 1 is worth .5, to one who says 3 .7.
    assert 0.5 <= rules["steps-1"]["chance"] <= 0.7
