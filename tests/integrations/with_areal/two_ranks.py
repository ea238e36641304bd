"""One of two ranks, which AReaL's actor shares a step with: `python two_ranks.py RANK PORT FOLDER`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from real_areal import Actor, actor, advantages, groups, meta

from pgrpo import DataError

BATCHES = [
    ([0.0, 1.0, 4.0, 2.0], ["a", "a", 3, 3]),
    ([7.0, None, 7.5, 1.0], ["a", "a", "b", "a"]),
]
"""Rewards and clusters of each rank."""


def main() -> None:
    """Train for two steps, and print what came of it."""
    rank, port, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    made = actor(folder, None, Actor, backend="fsdp:d2")
    found = [advantages(made, groups(*BATCHES[rank], 2)) for _ in range(2)]
    made.save(meta(folder / "saved"))
    # Wrong on one rank, which the other must not wait for.
    wrong = groups(*BATCHES[rank], 2)
    if rank == 1:
        del wrong[0]["cluster_id"]
    refusal = ""
    try:
        advantages(made, wrong)
    except DataError as error:
        refusal = str(error)
    state = made.histories.normalizer.state_dict()
    (folder / f"rank_{rank}.json").write_text(json.dumps([found, state, refusal]))
    made.destroy()


if __name__ == "__main__":
    main()
