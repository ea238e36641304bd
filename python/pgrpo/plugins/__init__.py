"""Rewards and clusterers that anybody can add.

All that a plugin's author needs is exported here. `registry` finds what is installed and builds what a
config names; nobody else sees pluggy. `new` writes the beginning of one, which
`pgrpo.train.conformance` tries as a run uses it.
"""

from pgrpo.errors import UnreadableError
from pgrpo.plugins.hookspecs import Clusterer, Reward, Rewards, SoftClusterer, hookimpl

__all__ = ["Clusterer", "Reward", "Rewards", "SoftClusterer", "UnreadableError", "hookimpl"]
