"""Random numbers that depend on nothing but the seed, what they are for, and the step."""

from __future__ import annotations

import random
import zlib

import numpy as np
import torch


def derive_seed(seed: int, purpose: str, step: int = 0) -> int:
    """A 32-bit seed of its own for every (seed, purpose, step)."""
    key = [seed, zlib.crc32(purpose.encode()), step]
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def seed_globals(seed: int) -> None:
    """Seed the global generators, which plugins may use, so that resuming repeats them too."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
