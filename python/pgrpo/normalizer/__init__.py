"""Rewards in, advantages out: per-cluster reward histories around any training loop.

In come arrays of rewards, cluster ids and group ids; out go advantages. NumPy is all that is needed:
no torch, no settings files, nothing of the trainer. `_core` is the compiled Rust core.
"""

from pgrpo.normalizer.cluster_normalizer import ClusterNormalizer
from pgrpo.normalizer.diagnostics import ClusterDiagnostics, Diagnostics
from pgrpo.normalizer.nodes import Delta, NodeHistories
from pgrpo.normalizer.options import RULES, Options
from pgrpo.normalizer.state import ClusterStats

__all__ = [
    "RULES",
    "ClusterDiagnostics",
    "ClusterNormalizer",
    "ClusterStats",
    "Delta",
    "Diagnostics",
    "NodeHistories",
    "Options",
]
