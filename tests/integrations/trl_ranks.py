"""One rank of a TRL run, started by `test_trl.py`: writes what its histories are."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import tiny_trl

from pgrpo import ClusterNormalizer


def of_prompt(prompts: list[str], **_: Any) -> list[float]:
    """A reward that does not depend on what a rank happened to sample."""
    return [100.0 + len(p) + 0.3 * (ord(p[1]) - ord("0")) for p in prompts]


def main(folder: str, per_rank: str) -> None:
    normalizer = ClusterNormalizer("pgrpo")
    trainer = tiny_trl.trainer(
        Path(folder),
        normalizer,
        of_prompt,
        per_device_train_batch_size=int(per_rank),
        max_steps=3,
        log_completions=True,
    )
    trainer.train()
    found = {
        "state": normalizer.state_dict(),
        "advantages": list(trainer._logs["advantages"]),
    }
    (Path(folder) / f"rank{os.environ.get('RANK', '0')}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
