"""The statistics of a report: arms, curves over seeds, differences with their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy import stats

from pgrpo.errors import RunFolderError
from pgrpo.report.runs import ClusterInfo, Evaluation, Run, Step, is_seed
from pgrpo.runs.metrics import fairness
from pgrpo.types import FloatArray

LAST_STEPS = 10
"""Steps whose mean stands for the beginning or the end of a run: enough to calm sampling noise,
few enough that the policy hardly moves meanwhile."""

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and its standard error (NaN where it is unknown)."""

    mean: float
    se: float = math.nan


@dataclass(frozen=True)
class Difference:
    """A difference of means over seeds, with its 95 % confidence interval."""

    mean: float
    low: float
    high: float

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out zero.

        An interval without width does not count: on the coarse grid of a few held-out prompts two
        seeds may well differ equally by chance.
        """
        return self.high - self.low > 1e-9 and (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class Arm:
    """Runs that differ in nothing but their seeds."""

    name: str
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class Curve:
    """A quantity over the steps, averaged over seeds; every array is [T] with NaN for gaps."""

    steps: FloatArray
    mean: FloatArray
    """Mean over seeds of the smoothed values."""
    low: FloatArray
    high: FloatArray
    """The band, see `mean_and_band`."""
    raw: FloatArray
    """Mean over seeds before smoothing."""


@dataclass(frozen=True)
class Study:
    """All runs of a report, and over which steps they are compared."""

    arms: tuple[Arm, ...]
    clusters: dict[str, ClusterInfo]
    """Ordered by falling share, shares averaged over the runs."""
    last_step: int
    """The last step that every run has finished; comparisons end here."""
    window: int
    """Steps averaged for the beginning and the end of a run."""
    smoothing: int
    """Odd width, in steps, of the centred moving mean."""
    evaluated: tuple[int, int] | None
    """First and last step at which every run was evaluated; None if that was before step 1."""

    @classmethod
    def of(cls, runs: Sequence[Run]) -> Study:
        """Sort runs into arms and fix what they are compared on."""
        last_step = min(run.steps[-1].step for run in runs)
        shortest = min(sum(step.step <= last_step for step in run.steps) for run in runs)
        longest = max(len(run.steps) for run in runs)
        common = set[int].intersection(*({e.step for e in run.evaluations} for run in runs))
        return cls(
            arms=_arms(runs),
            clusters=_clusters(runs),
            last_step=last_step,
            window=max(1, min(LAST_STEPS, shortest // 2)),
            smoothing=min(51, 2 * (longest // 20) + 1),
            evaluated=(min(common), max(common)) if common and max(common) > 0 else None,
        )

    @property
    def runs(self) -> list[Run]:
        """Every run, arm by arm."""
        return [run for arm in self.arms for run in arm.runs]

    @property
    def minority(self) -> str | None:
        """The cluster with the smallest known share, where there are several."""
        known = [name for name, info in self.clusters.items() if info.share > 0]
        return known[-1] if len(known) > 1 else None

    @property
    def chance(self) -> float | None:
        """Reward of guessing, where all runs agree on it."""
        values = {run.info.chance for run in self.runs}
        return values.pop() if len(values) == 1 else None

    @property
    def same_clusters(self) -> bool:
        """Whether a cluster of one run is the cluster of that name in every other."""
        return not any(key.startswith("clustering.") for key in differing_settings(self.runs))

    @property
    def same_rewards(self) -> bool:
        """Whether the runs were rewarded for the same thing on the same data."""
        differing = differing_settings(self.runs)
        return not any(key.startswith(("data.", "rewards.", "evaluation")) for key in differing)

    @property
    def own_evaluation(self) -> bool:
        """Whether held-out completions are scored by other rewards than those of training."""
        return any(key.startswith("evaluation.") for run in self.runs for key in run.settings)

    @property
    def cluster_evaluations(self) -> bool:
        """Whether every run's last common evaluation tells clusters apart."""
        return self.evaluated is not None and all(
            self.evaluation(run, self.evaluated[1]).clusters for run in self.runs
        )

    def evaluation(self, run: Run, step: int) -> Evaluation:
        """A run's evaluation at a step at which it has one."""
        return next(e for e in run.evaluations if e.step == step)

    def curve(self, arm: Arm, read: Callable[[Step], float | None]) -> Curve | None:
        """A quantity of the steps over an arm's runs; None where no run has it."""
        steps = sorted({step.step for run in arm.runs for step in run.steps})
        place = {step: i for i, step in enumerate(steps)}
        values = np.full((len(arm.runs), len(steps)), math.nan)
        for row, run in zip(values, arm.runs, strict=True):
            for step in run.steps:
                row[place[step.step]] = _number(read(step))
        if not np.isfinite(values).any():
            return None
        smooth = np.stack([moving_mean(row, self.smoothing) for row in values])
        mean, low, high = mean_and_band(smooth)
        return Curve(np.array(steps, float), mean, low, high, mean_and_band(values)[0])

    def first(self, arm: Arm, read: Callable[[Step], float | None]) -> Estimate:
        """Mean over the first `window` steps of each run, over seeds."""
        return over_seeds([_mean([read(s) for s in run.steps[: self.window]]) for run in arm.runs])

    def last(self, arm: Arm, read: Callable[[Step], float | None]) -> Estimate:
        """Mean over the last `window` steps up to `last_step` of each run, over seeds."""
        return over_seeds([self._last(run, read) for run in arm.runs])

    def held_out(self, arm: Arm, step: int, cluster: str | None = None) -> Estimate:
        """Held-out reward at a step, of one cluster or of all, over seeds.

        The standard error is the larger of the one over seeds and std / sqrt(num_prompts) of one
        evaluation (for rewards of 0 and 1 the binomial one): seeds share the held-out prompts, so
        more seeds do not make these more representative.
        """
        found = [self.evaluation(run, step) for run in arm.runs]
        parts = found if cluster is None else [e.clusters.get(cluster) for e in found]
        estimate = over_seeds([_number(part.reward if part else None) for part in parts])
        variances = [_number(p.std) ** 2 / p.num_prompts for p in parts if p and p.num_prompts]
        return Estimate(estimate.mean, float(np.fmax(estimate.se, math.sqrt(_mean(variances)))))

    def outcome(self, run: Run, cluster: str | None = None) -> float:
        """What a run achieved: held-out reward where every run has it, else that of the last steps.

        With a cluster the same for that cluster alone.
        """
        if cluster is None:
            if self.evaluated:
                return _number(self.evaluation(run, self.evaluated[1]).reward)
            return self._last(run, lambda step: step.reward)
        if self.evaluated and self.cluster_evaluations:
            part = self.evaluation(run, self.evaluated[1]).clusters.get(cluster)
            return _number(part.reward if part else None)
        return self._last(run, of_cluster(cluster, "reward"))

    def achieved(self, arm: Arm, cluster: str | None = None) -> Estimate:
        """`outcome` over an arm's seeds, with the standard error of `held_out` where it is that."""
        if self.evaluated and (cluster is None or self.cluster_evaluations):
            return self.held_out(arm, self.evaluated[1], cluster)
        return over_seeds([self.outcome(run, cluster) for run in arm.runs])

    @property
    def ranked(self) -> list[Arm]:
        """Arms with an outcome from two seeds or more, the best first; empty for unlike rewards."""
        if not self.same_rewards:
            return []
        arms = [
            arm
            for arm in self.arms
            if sum(math.isfinite(self.outcome(run)) for run in arm.runs) > 1
        ]
        return sorted(arms, key=lambda arm: -self.achieved(arm).mean)

    def difference(self, a: Arm, b: Arm, cluster: str | None = None) -> Difference | None:
        """`outcome` of a minus b, an interval simultaneous over all pairs of ranked arms.

        None unless both have the outcome for two seeds.
        """
        outcomes = {
            arm.name: [self.outcome(run, cluster) for run in arm.runs] for arm in self.ranked
        }
        outcomes = {name: [x for x in xs if math.isfinite(x)] for name, xs in outcomes.items()}
        outcomes = {name: xs for name, xs in outcomes.items() if len(xs) > 1}
        if not {a.name, b.name} <= outcomes.keys():
            return None
        return tukey_difference(outcomes, a.name, b.name)

    def spread(self, arm: Arm) -> Spread | None:
        """How unequally the clusters fare at the end; None with fewer than two of them."""
        rewards = {c: self.achieved(arm, c) for c in self.clusters}
        means = {c: r.mean for c, r in rewards.items() if math.isfinite(r.mean)}
        if len(means) < 2:
            return None
        worst, best = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
        return Spread(
            worst=worst,
            reward=rewards[worst],
            gap=Estimate(
                means[best] - means[worst], math.hypot(rewards[best].se, rewards[worst].se)
            ),
            gini=_number(fairness(list(means.values()))["gini"]),
        )

    def _last(self, run: Run, read: Callable[[Step], float | None]) -> float:
        steps = [step for step in run.steps if step.step <= self.last_step]
        return _mean([read(step) for step in steps[-self.window :]])


@dataclass(frozen=True)
class Spread:
    """The worst cluster of an arm and its distance to the others, clusters averaged over seeds."""

    worst: str
    reward: Estimate
    gap: Estimate
    """Best cluster minus worst, their errors taken as independent."""
    gini: float


def of_cluster(cluster: str, name: str) -> Callable[[Step], float | None]:
    """Reads one number of one cluster from a step; None where the cluster had no rollout."""

    def read(step: Step) -> float | None:
        part = step.clusters.get(cluster)
        return getattr(part, name) if part else None

    return read


def over_seeds(values: Sequence[float]) -> Estimate:
    """Mean and sd (ddof 1) / sqrt(n) of the finite values; one value has no standard error."""
    x = np.array([v for v in values if math.isfinite(v)])
    if len(x) == 0:
        return Estimate(math.nan)
    if len(x) == 1:
        return Estimate(float(x[0]))
    return Estimate(float(x.mean()), float(x.std(ddof=1) / math.sqrt(len(x))))


def mean_change(before: Sequence[float], after: Sequence[float]) -> Difference | None:
    """Mean of after - before with Student's t over the seeds; None with fewer than two of them."""
    change = np.array(after, float) - np.array(before, float)
    change = change[np.isfinite(change)]
    if len(change) < 2:
        return None
    estimate = over_seeds(change.tolist())
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(change) - 1)) * estimate.se
    return Difference(estimate.mean, estimate.mean - reach, estimate.mean + reach)


def tukey_difference(outcomes: Mapping[str, Sequence[float]], a: str, b: str) -> Difference:
    """Mean of arm a minus mean of arm b with the Tukey-Kramer interval.

    It holds for all pairs of arms at once (a report looks at the best of them) and takes the seeds'
    variance to be the same in every arm, so that a few seeds each suffice to estimate it. Every
    arm has two outcomes or more.
    """
    groups = {name: np.array(xs, float) for name, xs in outcomes.items()}
    freedom = sum(len(x) - 1 for x in groups.values())
    variance = sum(float(((x - x.mean()) ** 2).sum()) for x in groups.values()) / freedom
    x, y = groups[a], groups[b]
    quantile = float(stats.studentized_range.ppf(CONFIDENCE, len(groups), freedom))
    reach = quantile * math.sqrt(variance / 2 * (1 / len(x) + 1 / len(y)))
    mean = float(x.mean() - y.mean())
    return Difference(mean, mean - reach, mean + reach)


def moving_mean(values: FloatArray, window: int) -> FloatArray:
    """Centred moving mean of [T] values that skips gaps and narrows at the ends.

    Nothing is drawn before the first or after the last finite value.
    """
    present = np.isfinite(values)
    if not present.any():
        return values
    kernel, half = np.ones(window), window // 2
    sums = np.convolve(np.where(present, values, 0.0), kernel)[half : half + len(values)]
    counts = np.convolve(present, kernel)[half : half + len(values)]
    where = np.flatnonzero(present)
    inside = (np.arange(len(values)) >= where[0]) & (np.arange(len(values)) <= where[-1])
    return np.where(inside & (counts > 0.5), sums / np.maximum(counts, 1), math.nan)


def mean_and_band(values: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Mean and band over the seeds of [S, T] values, gaps skipped.

    The band is the range for two seeds, mean +- 1.96 standard errors for more, NaN for one.
    """
    present = np.isfinite(values)
    n = present.sum(axis=0)
    filled = np.where(present, values, 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(n > 0, filled.sum(axis=0) / n, math.nan)
        squares = np.where(present, values - mean, 0.0) ** 2
        reach = 1.96 * np.sqrt(squares.sum(axis=0) / (n - 1) / n)
    least = np.where(present, values, math.inf).min(axis=0)
    most = np.where(present, values, -math.inf).max(axis=0)
    low = np.where(n > 2, mean - reach, np.where(n == 2, least, math.nan))
    high = np.where(n > 2, mean + reach, np.where(n == 2, most, math.nan))
    return mean, low, high


def _arms(runs: Sequence[Run]) -> tuple[Arm, ...]:
    """Group runs by estimator and history, and by any other setting that shapes training."""
    families: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        key = (run.settings["estimator.name"], run.settings["estimator.history"])
        families.setdefault(key, []).append(run)
    arms: list[Arm] = []
    for (estimator, history), family in families.items():
        base = {"cluster": estimator, "one": f"{estimator} (one history)"}.get(
            history, f"{estimator} ({history} clusters)"
        )
        differing = [key for key in differing_settings(family) if _shapes_training(key)]
        members: dict[tuple[str | None, ...], list[Run]] = {}
        for run in family:
            members.setdefault(tuple(run.settings.get(k) for k in differing), []).append(run)
        for values, same in members.items():
            traits = [
                f"{key.rpartition('.')[2]} {value or 'unset'}"
                for key, value in zip(differing, values, strict=True)
            ]
            arms.append(Arm(" · ".join([base, *traits]), tuple(same)))
    for arm in arms:
        for a, b in combinations(arm.runs, 2):
            if a.seeds == b.seeds:
                seed = a.settings.get("run.seed", "unset")
                raise RunFolderError(
                    f"{a.name} and {b.name} are both {arm.name} with run.seed {seed}; "
                    "the runs of an arm need different seeds"
                )
    return tuple(arms)


def differing_settings(runs: Sequence[Run]) -> list[str]:
    """Flat settings, seeds aside, on which the runs do not all agree."""
    keys = dict.fromkeys(key for run in runs for key in run.settings if not is_seed(key))
    return [key for key in keys if len({run.settings.get(key) for run in runs}) > 1]


def _shapes_training(key: str) -> bool:
    """Length and bookkeeping do not make another arm; all else does."""
    return not key.startswith("run.") or key == "run.prompts_per_step"


def _clusters(runs: Sequence[Run]) -> dict[str, ClusterInfo]:
    """Clusters of all runs, by falling mean share; a cluster only met in metrics comes last."""
    found: dict[str, list[ClusterInfo]] = {}
    for run in runs:
        for name, info in run.info.clusters.items():
            found.setdefault(name, []).append(info)
    for name in (name for run in runs for step in run.steps for name in step.clusters):
        found.setdefault(name, [])
    merged = {
        name: infos[0].model_copy(update={"share": sum(i.share for i in infos) / len(infos)})
        if infos
        else ClusterInfo()
        for name, infos in found.items()
    }
    return dict(sorted(merged.items(), key=lambda item: -item[1].share))


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _mean(values: Sequence[float | None]) -> float:
    """Mean of the finite values; NaN where there is none."""
    return over_seeds([_number(value) for value in values]).mean
