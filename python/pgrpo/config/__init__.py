"""Settings: the sections every run has, their checks, and TOML in and out.

In come plain values; out go frozen, checked sections, or one sentence on what is wrong. No data set,
plugin or engine is known here by name: their sections derive from `Section` and stand beside them,
and `pgrpo.runs.config` puts the sections of a run together.
"""

from pgrpo.config.sections import Section

__all__ = ["Section"]
