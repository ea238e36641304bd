"""Engines: what turns prompts into rollouts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

from pgrpo.types import Group, Prompt

if TYPE_CHECKING:
    # vLLM's own processes import this package for its weight transfer, and need no more of it.
    from pgrpo.config.sections import ModelConfig
    from pgrpo.model.language_model import LanguageModel
    from pgrpo.rollout.settings import GenerationConfig

T = TypeVar("T")


class Peers(Protocol):
    """The processes of a run, each of which has an engine."""

    @property
    def size(self) -> int:
        """How many they are."""
        ...

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes and prints."""
        ...

    def gather(self, make: Callable[[], Sequence[T]]) -> list[T]:
        """What all processes make, in the order of ranks."""
        ...

    def first(self, make: Callable[[], T]) -> T:
        """What the one that writes makes; the others are told, also of an error."""
        ...


@dataclass(frozen=True, slots=True)
class SyncStats:
    """What taking over the policy's weights came to."""

    num_bytes: int
    """Weights (or adapters) that were moved."""
    transfer_s: float
    """Seconds it took to move them, the probe left out."""
    probe_error: float | None
    """Mean absolute difference between the engine's and the trainer's log-probabilities, in nats, where
    it was probed."""


class Engine(Protocol):
    """Samples completions from the policy as it was when it was last synced."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        group_size: int,
        *,
        seed: int,
        first: int = 0,
        greedy: bool = False,
    ) -> Iterator[Group]:
        """A group of `group_size` rollouts for each prompt, as soon as it is finished, in any order.

        Who takes no further group makes the engine wait; closing the iterator abandons the rest.

        Args:
            prompts: B prompts; `first` and the position in this sequence together are the group_id.
            group_size: G.
            seed: with the group_id it decides which rollouts a prompt gets, whatever other prompts a
                call has: a step's groups may be generated in several calls, and in several processes.
            first: group_id of the first prompt.
            greedy: take the likeliest token instead of sampling; `top_k`, `top_p` and `min_p` then cut
                nothing.

        Raises:
            EngineError: it failed, and trying again did not help.
        """
        ...

    def sync(self, policy_version: int) -> SyncStats | None:
        """Take over the policy's weights as they are after this many updates; None where there is
        nothing to move. All processes of a run call it at the same time.

        Raises:
            EngineError: they did not arrive, or the engine computes something else with them.
        """
        ...

    def interrupt(self) -> None:
        """Make a `generate` that another thread is in end soon, with an EngineError; after it, the
        engine can only be closed."""
        ...

    def sleep(self) -> None:
        """Give up what memory can be given up until the next sync."""
        ...

    def close(self) -> None:
        """Free what the engine holds."""
        ...


def make_engine(
    config: GenerationConfig,
    model: LanguageModel,
    source: ModelConfig,
    peers: Peers,
    *,
    may_sleep: bool = False,
) -> Engine:
    """The engine that `generation.engine` names.

    Args:
        config: the section `[generation]`.
        model: the policy's model.
        source: the section `[model]`, where it came from.
        peers: the processes of the run.
        may_sleep: nobody generates while the policy is updated.
    """
    match config.engine:
        case "transformers":
            from pgrpo.rollout.engines.transformers import TransformersEngine

            return TransformersEngine(config, model)
        case "vllm":
            from pgrpo.rollout.engines.vllm.engine import VllmEngine

            return VllmEngine(config, model, source, peers, may_sleep=may_sleep)
