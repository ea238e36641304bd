"""Wins, ties and losses of judged pairs: shares with intervals that know whose prompts they answer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from scipy import stats

from pgrpo.report.statistics import CONFIDENCE, paired_difference
from pgrpo.runs.judgement import PairRecord, RatesRecord, ShareRecord, Winner
from pgrpo.types import FloatArray

_Z = float(stats.norm.ppf((1 + CONFIDENCE) / 2))


def wilson(successes: float, trials: float) -> ShareRecord:
    """A share with its Wilson interval, corrected for continuity.

    With p = successes / n and z the normal quantile, the ends are (Newcombe 1998, method 4)

        (2 n p + z^2 -+ (1 + z sqrt(z^2 -+ 2 - 1/n + 4 p (n (1 - p) +- 1)))) / (2 (n + z^2))

    within 0 and 1, and at p = 0 or 1 that end itself. Without the correction four wins of four would
    exclude a half, which a coin does in one of eight.

    Args:
        successes: of the trials.
        trials: n, which need not be whole; 1 or more, or 0 for no interval.
    """
    if trials <= 0:
        return ShareRecord()
    n, p = trials, successes / trials

    def end(sign: int) -> float:
        inner = _Z * _Z + 2 * sign - 1 / n + 4 * p * (n * (1 - p) - sign)
        reach = 1 + _Z * math.sqrt(max(0.0, inner))
        return (2 * n * p + _Z * _Z + sign * reach) / (2 * (n + _Z * _Z))

    low = 0.0 if p == 0 else max(0.0, end(-1))
    high = 1.0 if p == 1 else min(1.0, end(1))
    return ShareRecord(share=p, low=low, high=high, trials=n)


def share_of(parts: FloatArray, sizes: FloatArray) -> ShareRecord:
    """The share p = sum(parts) / sum(sizes) with the Wilson interval of as many independent trials as
    it is worth.

    Where everybody has one pair, those are the pairs. Pairs of one person are not independent; by how
    much differs, so that the variance of p is taken between the U people who have any (linearised,
    Cochran 1977, 6.4), and the pairs are worth

        n = p (1 - p) / v    v = U / (U - 1) sum_u (parts_u - p sizes_u)^2 / (sum sizes)^2

    independent ones, no more than there are, times (z / t)^2 with Student's quantile of U - 1 degrees
    of freedom, for v is an estimate (Korn and Graubard 1998), and at least one. Where all went one way
    there is no v to see, and everybody is one trial: a bootstrap would be certain of three people who
    agree.

    Args:
        parts: [people] pairs of each that count.
        sizes: [people] all pairs of each.
    """
    parts, sizes = parts[sizes > 0], sizes[sizes > 0]
    people, total = len(sizes), float(sizes.sum())
    if people in (0, total):
        return wilson(float(parts.sum()), total)
    p = float(parts.sum()) / total
    spread = float(((parts - p * sizes) ** 2).sum())
    trials = float(people)
    if people > 1 and 0 < p < 1 and spread > 0:
        variance = people / (people - 1) * spread / total**2
        quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, people - 1))
        trials = max(1.0, min(total, p * (1 - p) / variance) * (_Z / quantile) ** 2)
    return wilson(p * trials, trials)


def share_by_person(found: Sequence[tuple[str, bool]]) -> ShareRecord:
    """The share of what is true, each a person's."""
    people: dict[str, list[int]] = {}
    for person, is_so in found:
        counts = people.setdefault(person, [0, 0])
        counts[0] += is_so
        counts[1] += 1
    parts, sizes = np.array(list(people.values()), float).reshape(-1, 2).T
    return share_of(parts, sizes)


def rates(pairs: Sequence[PairRecord]) -> RatesRecord:
    """How often the first run's answers win, tie and lose; it won where the interval of its share of
    decided pairs lies above a half."""
    people: dict[str, list[int]] = {}
    for pair in pairs:
        if pair.outcome is not None:
            counts = people.setdefault(pair.user, [0, 0, 0])
            counts[("a", "tie", "b").index(pair.outcome)] += 1
    counts = np.array(list(people.values()), float).reshape(-1, 3)
    win, tie, loss = counts.T
    decided = share_of(win, win + loss)
    return RatesRecord(
        num_pairs=int(counts.sum()),
        num_people=len(people),
        wins=int(win.sum()),
        ties=int(tie.sum()),
        losses=int(loss.sum()),
        win=share_of(win, counts.sum(1)),
        tie=share_of(tie, counts.sum(1)),
        loss=share_of(loss, counts.sum(1)),
        decided=decided,
        winner=_winner(decided),
    )


_WORTH: Mapping[str, Mapping[Winner, float]] = {
    "win": {"a": 1.0, "tie": 0.0, "b": 0.0},
    "tie": {"a": 0.0, "tie": 1.0, "b": 0.0},
    "loss": {"a": 0.0, "tie": 0.0, "b": 1.0},
    "decided": {"a": 1.0, "b": 0.0},
}
"""Share -> what an outcome adds to it; nothing is known of others."""


def rates_over_seeds(matches: Sequence[Sequence[PairRecord]]) -> RatesRecord:
    """How often the first runs' answers win, tie and lose, over pairs of runs of several seeds.

    Shares are those of all pairs together. At either end an interval is the farthest of three: of
    `rates`, which knows people, also few of them who agree, and nothing of seeds; and of the two of
    `paired_difference`, a bootstrap that draws seeds and people, and Student's of the seeds' shares.
    Of fewer than two seeds with any such pair, or of one person, nothing can be told: 0 to 1.

    Args:
        matches: of each seed its pairs, of the same prompts in the same order; of one it is `rates`.
    """
    pooled = rates([pair for match in matches for pair in match])
    if len(matches) < 2:
        return pooled
    people = [pair.user for pair in matches[0]]

    def widened(name: str, share: ShareRecord) -> ShareRecord:
        if share.share is None or share.low is None or share.high is None:
            return share
        worth = _WORTH[name]
        values = np.array(
            [
                [math.nan if p.outcome is None else worth.get(p.outcome, math.nan) for p in match]
                for match in matches
            ]
        )
        found = paired_difference(values[np.isfinite(values).any(1)], people)
        low, high = (0.0, 1.0) if found is None else (found.low, found.high)
        return ShareRecord(
            share=share.share,
            low=max(0.0, min(share.low, low)),
            high=min(1.0, max(share.high, high)),
        )

    shares = {name: widened(name, getattr(pooled, name)) for name in _WORTH}
    return pooled.model_copy(update={**shares, "winner": _winner(shares["decided"])})


def _winner(decided: ShareRecord) -> Literal["a", "b", "level"]:
    if decided.low is None or decided.high is None:
        return "level"
    return "a" if decided.low > 0.5 else "b" if decided.high < 0.5 else "level"
