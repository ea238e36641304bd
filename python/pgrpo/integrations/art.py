"""ART's LocalBackend with advantages by per-cluster histories.

    from pgrpo.integrations.art import personalize

    backend = personalize(LocalBackend)(normalizer=pgrpo.ClusterNormalizer("pgrpo"))
    await model.register(backend)

A group names its cluster in `metadata["cluster_id"]`, or each of its trajectories does in its own. The
backend packs the batches of its model in one process, so there is one set of histories. They lie in the
model's checkpoints, beside the adapter, and are restored where the model is registered.

ART computes advantages where it tokenizes groups, in a function of its module. It is replaced by one
that does so for personalized backends alone, and for others is as before.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator, Sequence
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from art.utils.output_dirs import get_model_dir, get_step_checkpoint_dir

from pgrpo.errors import ConfigError, DataError
from pgrpo.integrations.adapter import HISTORIES, Adapter, check_version, cluster_means
from pgrpo.normalizer import ClusterNormalizer
from pgrpo.types import ClusterId

log = logging.getLogger(__name__)

local: Any = import_module("art.local.backend")
"""The module whose function is replaced."""

TESTED = "0.5.23", "0.5.24"
"""The first version of ART that this was tested with, and the first that it was not."""


@cache
def personalize(backend: type[Any]) -> type[Any]:
    """A class as `backend`, but with advantages by per-cluster histories.

    Args:
        backend: ART's LocalBackend, or a class made from it that packs batches in its own process.

    Returns:
        A subclass with three more arguments: `normalizer`, a `ClusterNormalizer`; `cluster_key`, the
        entry of the metadata that holds the cluster id, `cluster_id` by default; and `begin_empty`,
        True where a model that was trained without pgrpo goes on with it.

    Raises:
        ConfigError: ART is not installed, or the class packs batches elsewhere, as MegatronBackend.
    """
    check_version("openpipe-art", *TESTED)
    own = local.LocalBackend._prepare_training_batch
    if getattr(backend, "_prepare_training_batch", None) is not own:
        raise ConfigError(
            f"{backend.__name__} packs batches where histories cannot reach them; expected ART's "
            "LocalBackend or a subclass that packs as it does"
        )
    return type(f"Personalized{backend.__name__}", (_Personalized, backend), {})


class _Personalized:
    """What `personalize` puts before a backend: the calls that see groups and checkpoints.

    A backend trains one model, for histories are of that model's completions.
    """

    # Attributes and methods of ART's backend, which comes after this class.
    _path: str
    _get_step: Any

    def __init__(
        self,
        *args: Any,
        normalizer: ClusterNormalizer,
        cluster_key: str = "cluster_id",
        begin_empty: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.histories = Adapter(normalizer)
        self.cluster_key = cluster_key
        self._begin_empty = begin_empty
        self._trained: str | None = None
        self._metrics: dict[str, float] = {}

    async def register(self, model: Any) -> None:
        """ART's, which restores the histories of the model's last checkpoint."""
        await super().register(model)  # type: ignore[misc]
        if not model.trainable:
            return
        place = get_model_dir(model=model, art_path=self._path)
        if self._trained not in (None, place):
            raise ConfigError(
                f"the histories are of the model in {self._trained}; expected a backend of its own "
                f"for that in {place}"
            )
        self._trained = place
        if await self._get_step(model):
            folder = await self._checkpoint(model)
            if not self._begin_empty or (folder / HISTORIES).exists():
                self.histories.load(folder)

    def _get_packed_tensors(self, *args: Any, **kwargs: Any) -> Any:
        token = _packing.set(self)
        try:
            return super()._get_packed_tensors(*args, **kwargs)  # type: ignore[misc]
        finally:
            _packing.reset(token)

    async def _train_model(
        self, model: Any, *args: Any, **kwargs: Any
    ) -> AsyncIterator[dict[str, float]]:
        async for metrics in super()._train_model(model, *args, **kwargs):  # type: ignore[misc]
            yield {**metrics, **self._metrics}
        await self._save(model)

    async def _train_sft(
        self, model: Any, *args: Any, **kwargs: Any
    ) -> AsyncIterator[dict[str, float]]:
        """ART's, whose checkpoint has the histories as they were."""
        async for metrics in super()._train_sft(model, *args, **kwargs):  # type: ignore[misc]
            yield metrics
        await self._save(model)

    async def _save(self, model: Any) -> None:
        folder = await self._checkpoint(model)
        if folder.is_dir():
            self.histories.save(folder)
        for warning in self.histories.new_warnings():
            log.warning("%s", warning)

    async def _checkpoint(self, model: Any) -> Path:
        """Folder of the model's last checkpoint."""
        place = get_model_dir(model=model, art_path=self._path)
        return Path(get_step_checkpoint_dir(place, await self._get_step(model)))

    def weigh(self, groups: Sequence[Any], results: Sequence[Any]) -> None:
        """Give what ART tokenized the advantages of its trajectories, and fold their rewards.

        Args:
            groups: ART's groups of the batch.
            results: what ART made of their trajectories, of some of them several and of some none.

        Raises:
            DataError: a trajectory has no cluster.
        """
        lengths: dict[int, int] = {}
        for result in results:
            place = id(result.trajectory)
            lengths[place] = lengths.get(place, 0) + sum(result.assistant_mask)
        rows = [(number, group, t) for number, group in enumerate(groups) for t in group]
        rewards = np.array([trajectory.reward for *_, trajectory in rows], dtype=np.float64)
        clusters = [self._cluster(group, trajectory) for _, group, trajectory in rows]
        found = self.histories.advantages(
            rewards,
            clusters,
            [number for number, *_ in rows],
            training=True,
            lengths=[lengths.get(id(trajectory), 0) for *_, trajectory in rows],
        )
        self._metrics = cluster_means(rewards, found, clusters) | self.histories.metrics()
        by_trajectory = {id(row[-1]): one for row, one in zip(rows, found.tolist(), strict=True)}
        for result in results:
            result.advantage = by_trajectory[id(result.trajectory)]

    def _cluster(self, group: Any, trajectory: Any) -> ClusterId:
        for metadata in (trajectory.metadata, group.metadata):
            if self.cluster_key in metadata:
                return metadata[self.cluster_key]
        raise DataError(
            f"neither a trajectory nor its group has metadata {self.cluster_key!r}, which names its "
            f"cluster; they have {', '.join({**group.metadata, **trajectory.metadata}) or 'none'}"
        )


_packing: ContextVar[_Personalized | None] = ContextVar("pgrpo_art_packing", default=None)
"""The backend whose batch is being packed."""

_plain = local.tokenize_trajectory_groups


def _tokenize(
    tokenizer: Any,
    trajectory_groups: Sequence[Any],
    *args: Any,
    drop_zero_advantage_trajectories: bool = True,
    **kwargs: Any,
) -> Iterator[Any]:
    """ART's function, after which a personalized backend's results have other advantages."""
    backend = _packing.get()
    drop = drop_zero_advantage_trajectories
    results = _plain(
        tokenizer,
        trajectory_groups,
        *args,
        # What has no advantage by ART's rule may have one by a history.
        drop_zero_advantage_trajectories=drop and backend is None,
        **kwargs,
    )
    if backend is None:
        yield from results
        return
    tokenized = list(results)
    backend.weigh(trajectory_groups, tokenized)
    yield from (result for result in tokenized if result.advantage or not drop)


local.tokenize_trajectory_groups = _tokenize
