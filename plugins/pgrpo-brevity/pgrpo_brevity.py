"""A reward for short completions."""

from collections.abc import Callable, Sequence
from typing import Any

from pydantic import Field

from pgrpo.config import Section
from pgrpo.plugins import hookimpl
from pgrpo.types import Rollout


class Brevity:
    """1 for an empty completion, falling evenly to 0 at `limit` words."""

    class Config(Section):
        """How short is short."""

        limit: int = Field(20, ge=1)
        """Words at which the reward reaches 0."""

    def __init__(self, config: Config) -> None:
        self._limit = config.limit

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float]:
        return [max(0.0, 1 - len(r.completion.split()) / self._limit) for r in rollouts]


@hookimpl
def pgrpo_register_rewards(register: Callable[[str, Any], None]) -> None:
    """Offer the reward under the name that a config uses."""
    register("brevity", Brevity)
