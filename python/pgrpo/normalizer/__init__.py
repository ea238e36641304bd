"""Rewards in, advantages out: per-cluster reward histories around any training loop.

In come arrays of rewards, cluster ids and group ids; out go advantages. NumPy is all that is needed:
no torch, no settings files, nothing of the trainer. `_core` is the compiled Rust core.
"""

from pgrpo.normalizer.cluster_normalizer import ClusterNormalizer, ClusterStats
from pgrpo.normalizer.diagnostics import ClusterDiagnostics, Diagnostics

__all__ = ["ClusterDiagnostics", "ClusterNormalizer", "ClusterStats", "Diagnostics"]
