"""Several rewards of each rollout: how they make one advantage, and all that is remembered of them.

The core computes; here their options are checked, and the histories of each reward are kept together.
"""

from __future__ import annotations

import inspect
import json
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, NoReturn, cast

from pgrpo.errors import CheckpointError, ConfigError
from pgrpo.normalizer import _core, state
from pgrpo.normalizer.arrays import short
from pgrpo.normalizer.options import RULES, Options

COMBINATIONS = "sum_then_normalize", "normalize_then_sum"
"""What `combine` may be."""

SUM = "sum"
"""What the history of a weighted sum is called."""

MAGIC = b"pgrpo several rewards 1\n"
"""The first bytes of a file of several rewards; the length of its header and its CRC-32 follow."""


@dataclass(frozen=True)
class RewardOptions(Options):
    """
    reward_weights: [R] what each of several rewards of a rollout is multiplied by; None for one
        reward without a name. Rewards are [N, R] or [P, G, R] then.
    reward_names: [R] their names; `reward_0` and so on by default.
    combine: `sum_then_normalize` makes an advantage of the weighted sum of the rewards, with one
        history per cluster; `normalize_then_sum` sums up the weighted advantages of each, with one
        history per cluster and reward. `clip` bounds the sum.
    """

    _: KW_ONLY
    reward_weights: Sequence[float] | None = None
    reward_names: Sequence[str] | None = None
    combine: str = COMBINATIONS[0]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.combine not in COMBINATIONS:
            raise ConfigError(f"combine is {self.combine!r}; expected {' or '.join(COMBINATIONS)}")
        weights = cast(Any, self.reward_weights)
        if weights is None:
            for name, usual in (("reward_names", None), ("combine", COMBINATIONS[0])):
                if (value := getattr(self, name)) != usual:
                    raise ConfigError(f"{name} is {short(value)}; it needs reward_weights")
            return
        try:
            numbers = tuple(map(float, weights))
        except (TypeError, ValueError):
            numbers = ()
        if not numbers or isinstance(weights, str) or not all(map(math.isfinite, numbers)):
            what = f"reward_weights is {short(weights)}"
            raise ConfigError(f"{what}; expected a finite number for each reward")
        object.__setattr__(self, "reward_weights", numbers)
        names = cast(Any, self.reward_names)
        if names is None:
            return
        known = not isinstance(names, str) and all(isinstance(name, str) for name in names)
        if not known or len(set(names)) != len(names) or len(names) != len(numbers):
            what = f"reward_names is {short(names)}"
            raise ConfigError(f"{what}; expected {len(numbers)} different names")
        object.__setattr__(self, "reward_names", tuple(names))

    def names(self) -> list[str]:
        """What the rewards are called; none of one reward."""
        weights = self.reward_weights or ()
        return list(self.reward_names or (f"reward_{index}" for index in range(len(weights))))

    def parts(self) -> dict[str, RewardOptions]:
        """By history: the options of the normalizer that keeps it. None of one reward."""
        if self.reward_weights is None:
            return {}
        whole = COMBINATIONS[0]
        alone = replace(self, reward_weights=None, reward_names=None, combine=whole)
        if self.combine == whole:
            return {SUM: alone}
        # The sum is what is clipped, and what is whitened.
        estimator = "grpo" if RULES[self.estimator].whitens else self.estimator
        part = replace(alone, clip=None, estimator=estimator)
        return dict.fromkeys(self.names(), part)


# Its own arguments come after those that every normalizer has.
_usual, _raises, _errors = inspect.cleandoc(Options.__doc__ or "").partition("\n\nRaises:")
_own = "\n".join(
    f"    {line}" for line in inspect.cleandoc(RewardOptions.__doc__ or "").split("\n")
)
RewardOptions.__doc__ = f"{_usual}\n{_own}{_raises}{_errors}"


def core_of(
    options: RewardOptions, parts: Mapping[str, _core.Normalizer]
) -> _core.Normalizer | _core.Several:
    """What computes advantages with the histories of some normalizers."""
    if not parts:
        return _core.Normalizer(options)
    sums_first = options.combine == COMBINATIONS[0]
    weights = list(options.reward_weights or ())
    return _core.Several(options, options.names(), weights, sums_first, list(parts.values()))


class Histories:
    """The histories of several rewards as one: the methods of `_core.Normalizer` that are about state.

    What is refused changes none of them. Calls of other threads may come between two of them.
    """

    def __init__(self, options: RewardOptions, parts: Mapping[str, _core.Normalizer]) -> None:
        self._options = options
        self._names = options.names()
        self._parts = dict(parts)

    @property
    def num_nonfinite(self) -> int:
        return sum(part.num_nonfinite for part in self._parts.values())

    def columns(self) -> state.Columns:
        if len(self._parts) == 1:
            return next(iter(self._parts.values())).columns()
        names = ", ".join(map(repr, self._parts))
        raise ConfigError(
            f"each cluster has a history per reward; ask normalizer.rewards[name] of one of {names}"
        )

    def to_dict(self) -> dict[str, Any]:
        histories = [state.to_dict(part.columns()) for part in self._parts.values()]
        return {"rewards": self._names, "histories": histories}

    def restore_dict(self, kept: Mapping[str, Any]) -> None:
        if not isinstance(cast(object, kept), Mapping) or set(kept) != {"rewards", "histories"}:
            _refuse(f"it is {short(kept)}; expected a dict of rewards and histories")
        self._check(kept["rewards"], kept["histories"])
        columns = [state.from_dict(history) for history in kept["histories"]]
        self._all(lambda part, one: part.restore_columns(one), columns)

    def encode(self) -> bytes:
        return self._pack([part.encode() for part in self._parts.values()])

    def restore(self, snapshot: bytes) -> None:
        self._all(lambda part, one: part.restore(one), self._unpack(snapshot))

    def merge(self, snapshot: bytes) -> None:
        self._all(lambda part, one: part.merge(one), self._unpack(snapshot))

    def delta(self) -> bytes:
        return self._pack([part.delta() for part in self._parts.values()])

    def forget(self, clusters: Any, /) -> Any:
        return self._drop([part.forget for part in self._parts.values()], clusters)

    def keep(self, clusters: Any, /) -> Any:
        return self._drop([part.keep for part in self._parts.values()], clusters)

    @staticmethod
    def _drop(methods: Sequence[Callable[[Any], Any]], clusters: Any) -> Any:
        # Ids are refused by the first, if at all.
        dropped = [methods[0](clusters)]
        if dropped[0] is NotImplemented:
            return NotImplemented
        return sum(dropped + [method(clusters) for method in methods[1:]])

    def _all(self, change: Callable[[_core.Normalizer, Any], None], given: Sequence[Any]) -> None:
        """Change every history, or none: it is tried on copies first."""
        options = self._options.parts()
        for (name, part), one in zip(self._parts.items(), given, strict=True):
            copy = _core.Normalizer(options[name])
            copy.restore(part.encode())
            change(copy, one)
        for part, one in zip(self._parts.values(), given, strict=True):
            change(part, one)

    def _check(self, names: Any, histories: Any) -> None:
        if names != self._names:
            _refuse(f"rewards is {short(names)}; expected {self._names}")
        if not isinstance(histories, list) or len(cast(list[Any], histories)) != len(self._parts):
            _refuse(f"histories is {short(histories)}; expected {len(self._parts)} of them")

    def _pack(self, histories: Sequence[bytes]) -> bytes:
        header = json.dumps([self._names, list(map(len, histories))]).encode()
        sizes = len(header).to_bytes(4, "little") + zlib.crc32(header).to_bytes(4, "little")
        return MAGIC + sizes + header + b"".join(histories)

    def _unpack(self, packed: bytes) -> list[bytes]:
        if not packed.startswith(MAGIC):
            _refuse("no snapshot of several rewards")
        names, lengths, stop = _header(packed)
        self._check(names, lengths)
        whole = all(type(length) is int and length >= 0 for length in lengths)
        if not whole or stop + sum(lengths) != len(packed):
            _refuse(f"histories of {short(lengths)} bytes in a file of {len(packed)}")
        histories: list[bytes] = []
        for length in lengths:
            histories.append(packed[stop : stop + length])
            stop += length
        return histories


def header_of(snapshot: bytes) -> tuple[list[str], int] | None:
    """Names of the rewards in a file, and how many histories a cluster has there; None where it is of
    one reward.

    Raises:
        CheckpointError: the header is damaged.
    """
    if not snapshot.startswith(MAGIC):
        return None
    names, lengths, _ = _header(snapshot)
    return list(names), len(lengths)


def _header(packed: bytes) -> tuple[Any, Any, int]:
    """Names of rewards, lengths of their histories, and where these begin."""
    start = len(MAGIC) + 8
    sizes = packed[len(MAGIC) : start]
    stop = start + int.from_bytes(sizes[:4], "little")
    header = packed[start:stop]
    if len(sizes) < 8 or zlib.crc32(header) != int.from_bytes(sizes[4:], "little"):
        _refuse("the header is damaged")
    try:
        names, lengths = json.loads(header)
    except ValueError:
        _refuse("the header is damaged")
    return names, lengths, stop


def _refuse(complaint: str) -> NoReturn:
    raise CheckpointError(f"normalizer state of several rewards: {complaint}")
