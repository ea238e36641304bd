"""Reinforcement learning that is fair where users differ: per-cluster reward histories (P-GRPO).

Importing this needs NumPy alone; the trainer's parts are imported where they are used.
"""

from pgrpo.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    EngineError,
    ModelError,
    ParallelError,
    PgrpoError,
    PluginError,
    RunFolderError,
    UnreadableError,
)
from pgrpo.normalizer import ClusterNormalizer, ClusterStats
from pgrpo.normalizer._core import __version__
from pgrpo.normalizer.diagnostics import ClusterDiagnostics, Diagnostics

__all__ = [
    "CheckpointError",
    "ClusterDiagnostics",
    "ClusterNormalizer",
    "ClusterStats",
    "ConfigError",
    "DataError",
    "Diagnostics",
    "EngineError",
    "ModelError",
    "ParallelError",
    "PgrpoError",
    "PluginError",
    "RunFolderError",
    "UnreadableError",
    "__version__",
]
