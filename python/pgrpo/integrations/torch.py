"""A loop of one's own in PyTorch: tensors in, tensors out, one history for all ranks.

    from pgrpo.integrations.torch import advantages

    normalizer = pgrpo.ClusterNormalizer("pgrpo")
    loss_weights = advantages(normalizer, rewards, clusters)  # rewards [P, G], on any device

Under `torch.distributed` (DDP, FSDP) every rank hands in the rewards of its own rollouts, and every
rank folds those of all ranks, in the order of ranks: the histories are equal everywhere, bit for bit,
and nothing has to be merged. Save them with the model (`normalizer.state_dict()` is plain lists) from
any one rank, and load them on all. `pgrpo.normalizer.collectives.all_reduce` is for ranks that fold
their own rewards alone; after calls of this it would count them again.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from pgrpo.errors import ConfigError, DataError
from pgrpo.integrations.adapter import Adapter
from pgrpo.normalizer import ClusterNormalizer
from pgrpo.types import ClusterId, FloatArray

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Ids = Sequence[ClusterId] | torch.Tensor | Any


def advantages(
    normalizer: ClusterNormalizer,
    rewards: torch.Tensor,
    clusters: Ids,
    groups: Ids | None = None,
    *,
    training: bool = True,
    lengths: torch.Tensor | None = None,
    ranks: ProcessGroup | None = None,
) -> torch.Tensor:
    """Advantages of this rank's rollouts, which enter the histories together with all other ranks'.

    With `torch.distributed` initialised it is a collective call: every rank makes it, also one without
    rollouts.

    Args:
        normalizer: the same on every rank, and not `shared`.
        rewards: [N] or [P, G], P groups of G rollouts, on any device and of any float type; [N, R] or
            [P, G, R] where the normalizer has `reward_weights`. Ranks may have different numbers. A
            rollout all of whose rewards are NaN has none: it enters no history, and its advantage is 0.
        clusters: [N], or [P] or [P, G] for rewards in rows: cluster ids, ints or strings.
        groups: [N] group ids, ints or strings, the same id on two ranks being one group; for rewards in
            rows each row is a group of its own if none are given.
        training: False in evaluation, where histories are read and stay as they are.
        lengths: of the completions, shaped as rewards of one kind; `opo` needs them.
        ranks: the process group that takes part; by default all.

    Returns:
        [N] or [P, G], on the device and of the type of `rewards`; no gradient flows through.

    Raises:
        ConfigError: the normalizer is shared, so that each rank would fold all rewards into one table.
        DataError: shapes do not go together, an id or reward is none; raised on every rank, and nothing
            was folded on any.
    """
    if normalizer.is_shared:
        raise ConfigError(f"{normalizer!r} is shared; expected histories of this rank's own")
    own: RankBatch | DataError
    try:
        own = RankBatch.of(normalizer, rewards, clusters, groups, lengths)
    except DataError as error:
        own = error
    found = of_ranks(Adapter(normalizer), own, training=training, ranks=ranks)
    assert isinstance(own, RankBatch)  # what is wrong was raised
    return torch.from_numpy(found).to(rewards).reshape(own.shape)


def of_ranks(
    histories: Adapter,
    own: RankBatch | DataError,
    *,
    training: bool = True,
    batch: Hashable = None,
    ranks: ProcessGroup | None = None,
) -> FloatArray:
    """What `advantages` does, for a loop that keeps an adapter.

    Args:
        histories: the same on every rank.
        own: this rank's rollouts; or what is wrong with them, which is told to the other ranks, who
            would wait for it otherwise.
        training: as for `Adapter.advantages`.
        batch: as for `Adapter.advantages`.
        ranks: the process group that takes part; by default all.

    Returns:
        [N] of this rank's rollouts.
    """
    import torch.distributed as dist

    distributed = dist.is_available() and dist.is_initialized() and dist.get_world_size(ranks) > 1
    batches: list[Any] = [own]
    rank = 0
    if distributed:
        rank = dist.get_rank(ranks)
        batches = [None] * dist.get_world_size(ranks)
        dist.all_gather_object(batches, own, group=ranks)
    for place, each in enumerate(batches):
        if isinstance(each, DataError):
            raise DataError(f"rank {place}: {each}" if distributed else str(each)) from each
    lengths = [length for each in batches for length in each.lengths]
    found = histories.advantages(
        np.concatenate([each.rewards for each in batches]),
        [cluster for each in batches for cluster in each.clusters],
        _groups(batches),
        training=training,
        batch=batch,
        lengths=lengths or None,
    )
    first = sum(len(each.rewards) for each in batches[:rank])
    return found[first : first + len(batches[rank].rewards)]


def _groups(batches: Sequence[RankBatch]) -> list[ClusterId] | None:
    """Group ids of all ranks: an id of the caller is the same group everywhere, and a row is a group of
    its rank's own. None if rollouts come without."""
    found: list[ClusterId] = []
    for place, batch in enumerate(batches):
        if batch.groups is not None:
            found += batch.groups
        elif len(batch.shape) == 2:
            rows, size = batch.shape
            found += [f"rank {place} row {row}" for row in range(rows) for _ in range(size)]
    return found if found or not any(len(batch.rewards) for batch in batches) else None


@dataclass(frozen=True)
class RankBatch:
    """The rollouts of one rank, as they travel to the others."""

    shape: tuple[int, ...]
    """[N] or [P, G]."""
    rewards: FloatArray
    """[N] or [N, R]."""
    clusters: list[ClusterId]
    """[N]."""
    groups: list[ClusterId] | None
    """[N] the caller's ids."""
    lengths: list[float]
    """[N], or nothing."""

    @classmethod
    def of(
        cls,
        normalizer: ClusterNormalizer,
        rewards: torch.Tensor,
        clusters: Ids,
        groups: Ids | None,
        lengths: torch.Tensor | None,
    ) -> RankBatch:
        """Check the arguments of one rank against each other."""
        if not isinstance(cast(object, rewards), torch.Tensor):
            raise DataError(f"rewards is {type(rewards).__name__}; expected a torch tensor")
        several = len(normalizer.options.reward_weights or ())
        shape = tuple(rewards.shape[:-1]) if several else tuple(rewards.shape)
        if len(shape) not in (1, 2) or (several and rewards.shape[-1] != several):
            wanted = f"[N, {several}] or [P, G, {several}]" if several else "[N] or [P, G]"
            raise DataError(f"rewards has shape {list(rewards.shape)}; expected {wanted}")
        if lengths is not None and tuple(lengths.shape) != shape:
            raise DataError(f"lengths has shape {list(lengths.shape)}; expected {list(shape)}")
        values = rewards.detach().to("cpu", torch.float64).numpy()
        return cls(
            shape=shape,
            rewards=values.reshape((-1, several) if several else (-1,)),
            clusters=_ids("clusters", clusters, shape),
            groups=None if groups is None else _ids("groups", groups, shape),
            lengths=[] if lengths is None else lengths.detach().cpu().double().flatten().tolist(),
        )


def _ids(name: str, ids: Ids, shape: tuple[int, ...]) -> list[ClusterId]:
    """Ids [N], given so, or one for each row, or in rows."""
    if isinstance(ids, torch.Tensor):
        ids = ids.detach().cpu().numpy()
    rows: list[Any] = ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
    if rows and isinstance(rows[0], (list, tuple)):
        if len(shape) != 2 or [len(row) for row in rows] != [shape[1]] * shape[0]:
            raise DataError(f"{name} has {len(rows)} rows; expected those of rewards {list(shape)}")
        return [one for row in rows for one in row]
    if len(shape) == 2 and len(rows) == shape[0]:
        return [one for one in rows for _ in range(shape[1])]
    if len(rows) != int(np.prod(shape)):
        raise DataError(f"{name} has {len(rows)} entries; expected those of rewards {list(shape)}")
    return rows
