"""What a run shows while it works: a live table on a terminal, a line per step elsewhere."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pgrpo.runs.metrics import extremes
from pgrpo.runs.records import EvaluationRecord, SampleRecord, StepRecord
from pgrpo.runs.terminal import discard_output, printable

_AVERAGE_STEPS = 10
"""Steps that the averages shown are taken over."""
_EXTREMES = 4
"""Clusters shown of each kind, largest, smallest and worst, where there are more than all of these."""
_LINE_LENGTH = 200
"""Without a terminal, most characters of a step's line: as many clusters are in it as there is room."""
_NARROW = 100
"""Columns of a terminal below which the table tells less of each cluster."""
_COLUMNS = ("cluster", "reward", "rollouts", "history mean", "std", "count", "who")
_OTHER_LINES = 16
"""Lines of a terminal that are not clusters'."""
_LINE_EVERY_S = 2.0
"""Without a terminal, steps that follow each other faster than this share a line."""


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Go on: that nobody reads any more, as behind `| head`, ends no run."""
        discard_output()


def console(*, quiet: bool = False, stderr: bool = False) -> Console:
    """Where progress is shown: on standard output, on standard error, or, where it is to be quiet,
    nowhere."""
    return _Console(
        markup=False, emoji=False, highlight=False, soft_wrap=True, quiet=quiet, stderr=stderr
    )


class Display:
    """Progress of one run, or of one arm of a comparison.

    Args:
        title: shown above the table, for example the arm's name.
        num_steps: length of the run.
        about: cluster -> what is known of it.
        peers: name -> rewards by step of arms already run, shown beside this one's.
        steps_after: of the runs that follow, for the time that is left.
        shown_on: a terminal or file; standard output by default.
    """

    def __init__(
        self,
        title: str,
        num_steps: int,
        *,
        about: Mapping[str, str] | None = None,
        peers: Mapping[str, Mapping[int, float]] | None = None,
        steps_after: int = 0,
        shown_on: Console | None = None,
    ) -> None:
        self._console = shown_on or console()
        self._title = title
        self._num_steps = num_steps
        self._steps_after = steps_after
        self.about = dict(about or {})
        self._peers = dict(peers or {})
        self._rewards: deque[float] = deque(maxlen=_AVERAGE_STEPS)
        self._seconds: deque[float] = deque(maxlen=_AVERAGE_STEPS)
        self._cluster_rewards: dict[str, deque[float]] = {}
        self._held_out = ""
        self._last_line = -_LINE_EVERY_S
        self._live: Live | None = None

    def __enter__(self) -> Display:
        if self._console.is_terminal:
            self._live = Live(console=self._console, refresh_per_second=4, transient=False)
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            with _nobody_need_read():
                self._live.stop()

    def note(self, text: str) -> None:
        """One line of news: what is being prepared, saved or found."""
        with _nobody_need_read():
            self._console.print(printable(f"[{self._title}] {text}"))
            sys.stdout.flush()

    def evaluation(self, record: EvaluationRecord) -> None:
        """A held-out evaluation was made."""
        how = f"{record.num_samples} samples each" if record.num_samples else "greedy"
        self._held_out = (
            f"held-out reward {_number(record.reward)} "
            f"({record.num_prompts} prompts, {how}, after step {record.step})"
        )
        self.note(self._held_out)

    def step(self, record: StepRecord, samples: Sequence[SampleRecord] = ()) -> None:
        """A step was taken."""
        step, seconds = record.step, record.timing_s.total or 0.0
        self._rewards.append(_known(record.reward))
        self._seconds.append(seconds)
        for cluster, values in record.clusters.items():
            if values.reward is not None:
                kept = self._cluster_rewards.setdefault(cluster, deque(maxlen=_AVERAGE_STEPS))
                kept.append(values.reward)
        shown = extremes(
            {c: _known(values.count) for c, values in record.clusters.items()},
            {c: _known(values.mean) for c, values in record.clusters.items()},
            self._extremes(),
        )
        left = self._num_steps + self._steps_after - step
        left_s = left * _mean(self._seconds)
        peers = "".join(
            f" ({name} {rewards[step]:.3f})"
            for name, rewards in self._peers.items()
            if step in rewards
        )
        if self._live is not None:
            with _nobody_need_read():
                self._live.update(self._table(record, shown, samples, left_s))
            return
        now = time.monotonic()
        if now - self._last_line < _LINE_EVERY_S and step < self._num_steps:
            return
        self._last_line = now
        lead = (
            f"step {step}/{self._num_steps}  reward {_number(record.reward)}{peers}  "
            f"mean of last {len(self._rewards)} {_mean(self._rewards):.3f}  by cluster"
        )
        rest = f"  {seconds:.1f} s  left {_clock(left_s)}"
        room = _LINE_LENGTH - len(f"[{self._title}] {lead}{rest}")
        for cluster in sorted(shown):
            if cluster in self._cluster_rewards:
                part = f"  {_short(cluster)}: {_mean(self._cluster_rewards[cluster]):.2f}"
                if (room := room - len(part)) < 0:
                    break
                lead += part
        self.note(lead + rest)

    def _extremes(self) -> int:
        """Clusters of each kind that a terminal of this height has room for."""
        if not self._console.is_terminal:
            return _EXTREMES
        return max(1, min(_EXTREMES, (self._console.height - _OTHER_LINES) // 3))

    def _table(
        self,
        record: StepRecord,
        shown: Sequence[str],
        samples: Sequence[SampleRecord],
        left_s: float,
    ) -> RenderableType:
        step, timing = record.step, record.timing_s
        head = Table.grid(padding=(0, 2))
        narrow = self._console.width < _NARROW
        head.add_row(
            Text(_short(self._title, 20) if narrow else self._title, style="bold"),
            *([] if narrow else [ProgressBar(self._num_steps, step, width=30)]),
            f"step {step}/{self._num_steps}",
            f"left {_clock(left_s)}",
        )
        rows: list[dict[str, str]] = []
        for cluster in shown:
            values = record.clusters[cluster]
            rows.append(
                {
                    "cluster": printable(_short(cluster, 20)),
                    "reward": f"{_mean(self._cluster_rewards.get(cluster, ())):.3f}",
                    "rollouts": str(values.num_rollouts),
                    "history mean": _number(values.mean),
                    "std": _number(values.std),
                    "count": f"{_known(values.count):.0f}",
                    "who": printable(self.about.get(cluster, "")),
                }
            )
        hidden = (record.num_clusters or 0) - len(shown)
        note = f"{hidden} more: not the largest, smallest or worst" if hidden > 0 else ""
        summary = {
            "cluster": "all",
            "reward": f"{_mean(self._rewards):.3f}",
            "rollouts": str(record.num_rollouts),
            "who": note,
        }
        told = ("cluster", "reward", "history mean", "count") if narrow else _COLUMNS
        table = Table(expand=False)
        for name in told:
            table.add_column(name, justify="left" if name in ("cluster", "who") else "right")
        for row in rows:
            table.add_row(*(row[name] for name in told))
        table.add_section()
        table.add_row(*(summary.get(name, "") for name in told))
        lines: list[RenderableType] = [head, table]
        if narrow and note:
            lines.append(Text(note))
        for name, rewards in self._peers.items():
            past = [
                rewards[s] for s in range(step - len(self._rewards) + 1, step + 1) if s in rewards
            ]
            if past:
                lines.append(Text(f"{name} at this step: {_mean(past):.3f}"))
        lines.append(
            Text(
                f"rewards are means of the last {len(self._rewards)} steps; "
                f"loss {_known(record.loss):.4f}, gradient norm {_number(record.grad_norm)}; "
                f"{_known(timing.total):.1f} s a step (generate "
                f"{_known(timing.generate):.1f}, reward {_known(timing.reward):.1f}, update "
                f"{_known(timing.update):.1f})",
                style="dim",
            )
        )
        if self._held_out:
            lines.append(Text(self._held_out))
        if samples:
            first = samples[0]
            lines.append(
                Text(
                    f"sample: {first.prompt[-160:]!r} -> {first.completion[:80]!r}  reward "
                    f"{_number(first.reward)}, advantage {_number(first.advantage)}",
                    style="dim",
                )
            )
        for line in lines:
            if isinstance(line, Text):
                line.no_wrap, line.overflow = True, "ellipsis"
        return Group(*lines)


@contextmanager
def _nobody_need_read() -> Generator[None]:
    """A terminal that was closed ends no run either; its signal may."""
    try:
        yield
    except OSError:
        discard_output()


class Stopwatch:
    """Seconds spent in named phases."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Book the time since the last lap."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now

    def skip(self) -> None:
        """Book the time since the last lap nowhere; something else did."""
        self._last = time.perf_counter()

    def total(self) -> dict[str, float]:
        """All phases, and `total` since the watch was made."""
        return {**self.seconds, "total": time.perf_counter() - self._start}


def _mean(values: Sequence[float] | deque[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def _known(value: float | None) -> float:
    return float("nan") if value is None else value


def _short(name: str, length: int = 12) -> str:
    """A name that may be long, or its beginning."""
    return name if len(name) <= length else f"{name[: length - 1]}\N{HORIZONTAL ELLIPSIS}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
