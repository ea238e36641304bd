"""One set of histories for all ranks, or all nodes, of a torch.distributed job."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

from pgrpo.errors import CheckpointError, ConfigError
from pgrpo.normalizer import ClusterNormalizer, NodeHistories

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from pgrpo.normalizer.nodes import Delta


def all_reduce(normalizer: ClusterNormalizer, group: ProcessGroup | None = None) -> None:
    """Give every rank the samples that the other ranks have folded since the last time.

    Each rank hands its `delta()` to all others and merges theirs, in the order of ranks. After it,
    this rank's histories hold the samples of all ranks: counts are exact, means and m2 those of one
    stream up to rounding (below 1e-12 of them). Ranks may have seen different clusters, or none.
    `auto`'s regression adds up as well, of points that each rank measured against its own histories.
    `num_nonfinite` stays each rank's own.

    It is a collective call: all ranks of the group make it, from one thread each, and wait for each
    other. Other threads may go on folding meanwhile; their samples go with this delta or the next.

    To resume, let all ranks load the state that one of them had right after this, or each its own:
    samples not yet handed over are part of a state, and a state that holds some would hand them over
    once for each rank that loads it. If a rank is lost in the call, what was in the deltas is not
    handed over again: resume from a state saved before.

    Args:
        normalizer: one made with `track_delta=True`.
        group: the ranks that take part; by default all.

    Raises:
        ConfigError: the normalizer does not track deltas, its table is shared (ranks of one machine
            would hand each other what they have already; `exchange` is for those), or this rank is
            not of the group.
    """
    import torch.distributed as dist

    if normalizer.is_shared:
        raise ConfigError(f"{normalizer!r} is shared; expected histories of this rank's own")

    own = _own_rank(group)
    deltas: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(deltas, normalizer.delta(), group=group)
    for rank, delta in enumerate(deltas):
        if rank != own:
            normalizer.merge(delta)


def exchange(node: NodeHistories, step: int, group: ProcessGroup | None = None) -> None:
    """Seal a step on every node, and give each node what the others folded in it.

    It is a collective call of one rank of each node, made once all calls of the step have returned in
    all processes of the node. If a rank is lost in it, it may be made again, by those as well that were
    done with it: a delta is counted once. So it may if a node cannot seal the step, which all ranks are
    told of, before anything is merged. A node whose processes were killed in the step calls `rewind`
    first.

    Args:
        node: this node's histories.
        step: the step to be sealed.
        group: one rank of each node; by default all ranks.

    Raises:
        ConfigError: two ranks are of the same node, or this rank is not of the group.
        CheckpointError: another node, which is named, cannot seal the step. The rank of that node
            raises what its `seal` did.
    """
    import torch.distributed as dist

    _own_rank(group)
    sealed: Delta | str
    error: Exception | None = None
    try:
        sealed = node.seal(step)
    except Exception as raised:
        # Whatever it is, the others wait for this rank: they are told of it first.
        error, sealed = raised, f"{type(raised).__name__}: {raised}"
    told: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(told, (node.node, sealed), group=group)
    if error is not None:
        raise error
    deltas: list[Delta] = []
    for name, delta in told:
        if isinstance(delta, str):
            raise CheckpointError(f"node {name!r} cannot seal step {step}: {delta}")
        deltas.append(delta)
    names = sorted(delta.node for delta in deltas)
    for name, other in pairwise(names):
        if name == other:
            raise ConfigError(f"two ranks are of node {name!r}; expected one rank of each node")
    node.merge_all(deltas)


def _own_rank(group: ProcessGroup | None) -> int:
    """This rank in the group."""
    import torch.distributed as dist

    own = dist.get_rank(group)
    if own < 0:
        raise ConfigError(f"rank {dist.get_rank()} is not of the group; expected one that is")
    return own
