"""What torchrun, or whoever starts processes as it does, tells each of them in its environment."""

from __future__ import annotations

import os


def num_processes() -> int:
    """How many processes make this run together; 1 where nobody says otherwise."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def num_restarts() -> int:
    """How often the processes were started again, after one of them was lost."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
