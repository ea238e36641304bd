"""One set of histories for all nodes of a cluster of machines, each with many processes.

A node's processes fold into shared tables of its own. What they folded in one step is the node's
delta of that step, which every other node merges once, however often it comes: a delta is known by
its step and its node. What a node holds is the deltas in its folder; its table of all histories is
made of them, and made again where a merge failed or was killed.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pgrpo.errors import CheckpointError, ConfigError, DataError
from pgrpo.normalizer.arrays import short
from pgrpo.normalizer.cluster_normalizer import ClusterNormalizer
from pgrpo.normalizer.options import Options
from pgrpo.normalizer.state import read_file, write_file

if sys.platform != "win32":
    import fcntl

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from pgrpo.normalizer.arrays import Columns, Ids

NODE = re.compile(r"[A-Za-z0-9._-]+")
"""Names of nodes are parts of names of files."""

UNMERGED = {
    "rae": "its exponential mean knows an order of rewards, and deltas may come in any",
    "auto": "its regression measures each step by all histories, and a delta knows its step alone",
}
"""Estimators that deltas cannot serve, and why not."""


@dataclass(frozen=True, slots=True)
class Delta:
    """What one node folded in one step."""

    step: int
    """The step, from 0 on."""
    node: str
    """The node's name, which no other node has."""
    histories: bytes
    """The histories of these rewards alone, as `ClusterNormalizer.save` writes them."""


class NodeHistories:
    """The histories of one node among several, for all its processes.

        node = NodeHistories("/dev/shm/run-7", "node-3", "pgrpo", capacity=1_000_000)
        advantages = node.advantages(step, rewards, clusters)   # in any process, lock-free
        delta = node.seal(step)                                 # in one, after the step
        node.merge_all(others)                                  # what the other nodes sealed

    Every process of the node opens the same folder. A call folds into two shared tables: one of what
    this node folded in this step, and one of all histories, which advantages are made by and which
    holds what was merged from other nodes. `seal` turns the first into a delta, a file of the folder.

    **Counted once.** A delta is known by its step and its node. One that comes again, from a node
    that restarted or by a message that was sent twice, changes nothing; deltas may come in any order.
    Counts are exact; means and m2 are those of one stream up to rounding.

    **Killed.** The deltas of the folder are what counts, and each is there as a whole or not at all.
    A process that is killed within `seal` has sealed or not; within `merge`, a delta is counted or
    has to come again, as where it fails, and who next opens the folder, seals or merges makes the
    table of all histories anew: processes that still have the old one mapped meet a DataError in
    their next call, and open the folder again.
    A call that is killed may have folded some of its clusters, as `ClusterNormalizer.shared` tells:
    after it, `rewind` drops what was not sealed, and the step is done again. Steps that were sealed
    before a `rewind` may be done again too; their rewards are in the histories, and are not folded
    twice. Without a `rewind`, a call of a sealed step is one that comes too late, and is refused.

    **The folder** lies best in memory, as under `/dev/shm`: that outlives processes, not the machine.
    A node that has lost it, or comes new, begins with a copy of another node's folder, or with that
    one's `deltas`. `compact` keeps it small.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        node: str,
        estimator: str = Options.estimator,
        *,
        capacity: int = 65536,
        **options: Any,
    ) -> None:
        """Open a node's folder, which is made if it is not there.

        Args:
            folder: of this node alone.
            node: this node's name, of letters, digits, `.`, `_` and `-`.
            estimator: as of a `ClusterNormalizer`, but neither `rae` nor `auto`. The exponential mean
                of `rae` knows an order of rewards, and deltas may come in any; the regression of
                `auto` measures each step by all histories, and a delta knows its step alone. For
                these, gather the rewards of all ranks instead (`pgrpo.integrations.torch`).
            capacity: as of `ClusterNormalizer.shared`, the same in all processes.
            **options: as of a `ClusterNormalizer`; `forgetting` below 1 is refused, for deltas do not
                tell how much was forgotten.

        Raises:
            ConfigError: an option is none of these, or the folder's table was made with others.
            CheckpointError: a file of the folder is damaged.
        """
        if not NODE.fullmatch(node):
            raise ConfigError(
                f"node is {short(node)}; expected letters, digits, '.', '_' and '-' alone"
            )
        if estimator in UNMERGED:
            raise ConfigError(
                f"estimator is {estimator!r}: {UNMERGED[estimator]}; expected another estimator"
            )
        # What else deltas cannot hold is refused as where they are tracked.
        made: dict[str, Any] = {"estimator": estimator, **options}
        tracked: dict[str, Any] = {**made, "track_delta": True}
        ClusterNormalizer(**tracked)
        self.node = node
        self._folder = Path(folder)
        self._made = made
        self._capacity = capacity
        self._current: tuple[int, ClusterNormalizer | None] | None = None
        # Apart from these many, what is looked for in every call is found in a small folder.
        for of in (self._deltas_folder, self._steps_folder):
            of.mkdir(parents=True, exist_ok=True)
        with self._locked():
            if self._table.exists() and not self._mark.exists():
                self._histories = self._open(self._table)
            else:
                self._make_again()

    @property
    def histories(self) -> ClusterNormalizer:
        """All histories, as far as they have come to this node, to be read and saved."""
        return self._histories

    def advantages(
        self,
        step: int,
        rewards: Any,
        clusters: Ids,
        groups: Ids | None = None,
        **columns: Unpack[Columns],
    ) -> Any:
        """Fold a batch of a step and return its advantages, by the histories as they are then.

        If the step was sealed before the last `rewind`, it is done again, and nothing is folded.

        Args:
            step: the step, from 0 on.
            rewards: as of `ClusterNormalizer.advantages`, like all others.
            clusters: [N] cluster ids.
            groups: [N] group ids.
            **columns: [N] each.

        Raises:
            DataError: as there, or the step was sealed, or the histories were made again: open the
                folder anew.
        """
        table = self._table_of(step)
        if table is None:
            return self._histories.normalize(rewards, clusters, groups, **columns)
        # All histories first, for they refuse what the step's would not: groups that are missing.
        found = self._histories.advantages(rewards, clusters, groups, **columns)
        self._keep(table, rewards, clusters, groups, columns)
        return found

    def update(
        self,
        step: int,
        rewards: Any,
        clusters: Ids,
        groups: Ids | None = None,
        **columns: Unpack[Columns],
    ) -> None:
        """Fold a batch of a step: the first half of `advantages`."""
        table = self._table_of(step)
        if table is not None:
            self._histories.update(rewards, clusters, groups, **columns)
            self._keep(table, rewards, clusters, groups, columns)

    def seal(self, step: int) -> Delta:
        """What this node folded in a step, for `merge` in all other nodes.

        Call it once all calls of the step have returned; later ones are refused, in all processes.
        Sealed again, a step gives the same delta.

        Raises:
            CheckpointError: the delta cannot be written, or was compacted away.
            ConfigError: the histories have to be made again, and there is no room for it.
        """
        with self._locked():
            self._mend()
            path = self._file_of(step, self.node)
            if step <= self._compacted():
                raise CheckpointError(
                    f"step {step} of {self.node!r} was compacted: no delta is left"
                )
            if not path.exists():
                self._open(self._step_file(step)).save(path)
            self._close(self._step_file(step))
            self._current = None
            return Delta(step, self.node, read_file(path))

    def merge(self, delta: Delta) -> bool:
        """Fold in what another node sealed, once.

        Returns:
            Whether it was new. If not, nothing was changed.

        Raises:
            CheckpointError: it is damaged, or cannot be written; it is not counted then, and may come
                again.
            ConfigError: the histories have to be made again, and there is no room for it.
            DataError: the histories were made again meanwhile: open the folder anew.
        """
        return self.merge_all([delta]) == 1

    def merge_all(self, deltas: Iterable[Delta]) -> int:
        """Fold in what several nodes sealed, each once.

        They are put together first, so that a cluster that several of them hold is looked for in the
        table of all histories once.

        Returns:
            How many were new. The others changed nothing.

        Raises:
            CheckpointError: one is damaged, and none is counted; or one cannot be written, and neither
                it nor those after it are. They may come again.
            ConfigError: the histories have to be made again, and there is no room for it.
            DataError: the histories were made again meanwhile: open the folder anew.
        """
        with self._locked():
            self._mend()
            new = {(d.step, d.node): d for d in deltas if not self._holds(d.step, d.node)}
            for step, node in new:
                if node == self.node and self._step_file(step).exists():
                    raise DataError(
                        f"step {step} of this node {self.node!r} comes from elsewhere, and was begun "
                        "here; expected rewind() before it"
                    )
            together: ClusterNormalizer | bytes
            match list(new.values()):
                case []:
                    return 0
                case [delta]:
                    together = delta.histories
                case several:
                    together = ClusterNormalizer(**self._made)
                    for delta in several:
                        together.merge(delta.histories)
            # Where another process has made them again, this raises: theirs need no mark.
            _ = self._histories.num_nonfinite
            self._mark.touch()
            try:
                self._histories.merge(together)
            except CheckpointError:
                self._mark.unlink()
                raise
            for (step, node), delta in new.items():
                write_file(self._file_of(step, node), delta.histories)
            self._mark.unlink()
            return len(new)

    def deltas(self) -> Iterator[Delta]:
        """All deltas of the folder, of this and of other nodes, for a node that lacks some."""
        for step, node, path in self._deltas():
            yield Delta(step, node, read_file(path))

    def rewind(self, step: int | None = None) -> None:
        """Go back to what is sealed: unsealed steps are dropped, and the histories made again.

        No other process of the node may be within a call; all of them open the folder again.

        Args:
            step: the last step to stay. Later deltas of all nodes are dropped, as for going on from
                a checkpoint of that step; by default all stay.

        Raises:
            CheckpointError: later steps were compacted. Nothing was dropped then.
        """
        with self._locked():
            if step is not None and step < self._compacted():
                raise CheckpointError(
                    f"step {step} cannot be gone back to; steps up to {self._compacted()} were "
                    "compacted"
                )
            # Should this be killed, who opens the folder next goes on with it.
            self._mark.touch()
            for path in self._steps_folder.glob("[0-9]*"):
                self._drop(path)
            for later, _, path in list(self._deltas()):
                if step is not None and later > step:
                    path.unlink()
            self._current = None
            self._make_again()

    def compact(self, step: int) -> None:
        """Make one file of all deltas up to a step, all of which must be there, as at a checkpoint.

        From then on every delta of such a step is taken for one that was counted, and every call for
        one of a step that is done again.
        """
        with self._locked():
            if step <= self._compacted():
                return
            whole = ClusterNormalizer(**self._made)
            for path in self._sources(step):
                whole.merge(read_file(path))
            whole.save(self._folder / f"base-{step}")
            self._sweep()

    def _keep(
        self,
        table: ClusterNormalizer,
        rewards: Any,
        clusters: Ids,
        groups: Ids | None,
        columns: Columns,
    ) -> None:
        """Fold into the table of a step what all histories have already."""
        try:
            table.update(rewards, clusters, groups, **columns)
        except DataError:
            # The step was sealed meanwhile: all histories hold what no delta will. Without the lock,
            # a merge under way would take the mark away with its own.
            with self._locked():
                self._mark.touch()
            raise

    def _open(self, path: Path) -> ClusterNormalizer:
        return ClusterNormalizer.shared(path, capacity=self._capacity, **self._made)

    @property
    def _table(self) -> Path:
        """The table of all histories."""
        return self._folder / "table"

    @property
    def _mark(self) -> Path:
        """It is there while the table of all histories is not what the deltas make."""
        return self._folder / "merging"

    @property
    def _deltas_folder(self) -> Path:
        return self._folder / "deltas"

    @property
    def _steps_folder(self) -> Path:
        return self._folder / "steps"

    def _step_file(self, step: int) -> Path:
        """The table of what this node folds in a step; empty once it is sealed, until a rewind."""
        return self._steps_folder / str(step)

    def _file_of(self, step: int, node: str) -> Path:
        if isinstance(step, bool) or step < 0 or not NODE.fullmatch(node):
            raise DataError(
                f"delta is of step {step} and node {short(node)}; expected 0 and a name"
            )
        return self._deltas_folder / f"{step}-{node}"

    def _deltas(self) -> Iterator[tuple[int, str, Path]]:
        """Step, node and file of each delta, in this order, so that all rebuild the same bits."""
        found: list[tuple[int, str, Path]] = []
        for path in self._deltas_folder.glob("[0-9]*"):
            step, node = path.name.split("-", 1)
            found.append((int(step), node, path))
        return iter(sorted(found))

    def _compacted(self) -> int:
        """The last step of those that were compacted; -1 if none was."""
        steps = (int(path.name.split("-")[1]) for path in self._folder.glob("base-*"))
        return max(steps, default=-1)

    def _holds(self, step: int, node: str) -> bool:
        return self._file_of(step, node).exists() or step <= self._compacted()

    def _table_of(self, step: int) -> ClusterNormalizer | None:
        """The table of a step; None if it is done again."""
        current = self._current
        if current is None or current[0] != step:
            path = self._step_file(step)
            if not self._holds(step, self.node):
                current = step, self._open(path)
            elif path.exists():
                raise DataError(
                    f"step {step} of {self.node!r} was sealed; expected its calls before that, or "
                    "rewind() before it is done again"
                )
            else:
                current = step, None
            self._current = current
        return current[1]

    def _sources(self, step: int | None = None) -> Iterator[Path]:
        """The files that histories are made of, up to a step."""
        base = self._compacted()
        if base >= 0:
            yield self._folder / f"base-{base}"
        for at, _, path in self._deltas():
            if at > base and (step is None or at <= step):
                yield path

    def _mend(self) -> None:
        """Make the table of all histories again if it is marked.

        Whoever merges holds the lock, so a mark that is there now was left by a call that failed, was
        killed, or came too late.
        """
        if self._mark.exists():
            self._make_again()

    def _make_again(self) -> None:
        """Make the table of all histories of what the folder holds, unsealed steps included."""
        self._mark.touch()
        self._sweep()
        new = self._folder / "new"
        new.unlink(missing_ok=True)
        table = self._open(new)
        for path in self._sources():
            table.merge(read_file(path))
        for path in self._steps_folder.glob("[0-9]*"):
            if path.stat().st_size:
                table.merge(self._open(path))
        del table
        self._drop(self._table)
        new.replace(self._table)
        self._histories = self._open(self._table)
        self._mark.unlink()

    def _sweep(self) -> None:
        """Delete what a killed process did not come to: of what is compacted or sealed."""
        base = self._compacted()
        for path in self._folder.glob("base-*"):
            if path.name != f"base-{base}":
                path.unlink()
        for path in self._steps_folder.glob("[0-9]*"):
            if int(path.name) <= base:
                self._drop(path)
        for step, node, path in list(self._deltas()):
            if step <= base:
                path.unlink()
            elif node == self.node:
                self._close(self._step_file(step))

    @staticmethod
    def _close(table: Path) -> None:
        """Empty a table, so that whoever still has it mapped meets an error, not a stale table."""
        with contextlib.suppress(FileNotFoundError):
            os.truncate(table, 0)

    @classmethod
    def _drop(cls, table: Path) -> None:
        """Empty a table and delete it."""
        cls._close(table)
        table.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _locked(self) -> Generator[None, None, None]:
        """Wait for the folder's lock and hold it; the kernel takes it from whoever is killed."""
        with open(self._folder / "lock", "a") as file:
            if sys.platform != "win32":
                fcntl.flock(file, fcntl.LOCK_EX)
            yield
