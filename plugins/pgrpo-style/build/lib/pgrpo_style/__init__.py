"""Two rewards without a model: how a completion is written, and which music it speaks of.

`measures` counts what can be counted in a text, `lexicons` holds the words, and `rewards` makes scores
of both.
"""

from collections.abc import Callable
from typing import Any

from pgrpo.plugins import hookimpl

from .rewards import Genre, Style

__all__ = ["Genre", "Style"]


@hookimpl
def pgrpo_register_rewards(register: Callable[[str, Any], None]) -> None:
    """Offer both under the names that a config uses."""
    register("style", Style)
    register("genre", Genre)
