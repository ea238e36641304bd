"""What a report compares: runs sorted into arms, their curves and outcomes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from pgrpo.errors import RunFolderError
from pgrpo.report.runs import LAST_STEPS, Run, is_seed
from pgrpo.report.statistics import (
    Difference,
    Estimate,
    mean,
    mean_and_band,
    mean_change,
    moving_mean,
    over_seeds,
    tukey_difference,
)
from pgrpo.runs.metrics import extremes, fairness
from pgrpo.runs.records import ClusterInfo
from pgrpo.types import FloatArray

EVALUATIONS = 100
"""Most evaluations of an arm that are drawn: each is a mark with an error bar."""

FLOWS = 5
"""Most divisions of a run whose flows are drawn or listed, the last ones, and most steps of divisions
that are marked in charts."""

EACH = 3
"""Clusters of each kind that are drawn, the largest, the smallest and the worst, where there are more
than all of these; a table has more of them."""

EACH_LISTED = 40
"""Clusters of each kind in that table."""

GAINS = (
    (("grpo", "cluster"), ("pgrpo", "one"), "having a history"),
    (("pgrpo", "one"), ("pgrpo", "cluster"), "whose history it is"),
    (("grpo", "cluster"), ("pgrpo", "cluster"), "both together"),
    (("pgrpo", "shuffled"), ("pgrpo", "cluster"), "clusters that are not of random users"),
    (("pgrpo", "cluster"), ("pgrpo", "user"), "a history for each person"),
    (("pgrpo", "cluster"), ("auto", "cluster"), "leaning on the group as well"),
)
"""Pairs of arms, by estimator and history, that differ in one respect, and the respect."""


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
    stride: int
    """Curves go over the steps that are multiples of it."""
    smoothing: int
    """Odd width, in steps of the curves, of the centred moving mean."""
    evaluated: tuple[int, int] | None
    """First and last step at which every run was evaluated; None if that was before step 1."""

    @classmethod
    def of(cls, runs: Sequence[Run]) -> Study:
        """Sort runs into arms and fix what they are compared on."""
        last_step = min(run.last_step for run in runs)
        shortest = min(int((run.steps.steps <= last_step).sum()) for run in runs)
        stride = runs[0].stride
        longest = max(int((run.steps.steps % stride == 0).sum()) for run in runs)
        evaluated = [set(run.evaluations.steps.astype(int).tolist()) for run in runs]
        common = set[int].intersection(*evaluated)
        return cls(
            arms=_arms(runs),
            clusters=_clusters(runs),
            last_step=last_step,
            window=max(1, min(LAST_STEPS, shortest // 2)),
            stride=stride,
            smoothing=min(51, 2 * (longest // 20) + 1),
            evaluated=(min(common), max(common)) if common and max(common) > 0 else None,
        )

    @property
    def runs(self) -> list[Run]:
        """Every run, arm by arm."""
        return [run for arm in self.arms for run in arm.runs]

    @property
    def minority(self) -> str | None:
        """The cluster with the smallest known share; None where another has as small a one."""
        known = [name for name, info in self.clusters.items() if info.share > 0]
        shares = [self.clusters[name].share for name in known]
        return known[-1] if len(known) > 1 and shares[-2] > shares[-1] + 1e-9 else None

    @property
    def chance(self) -> float | None:
        """Reward of guessing, where all runs agree on it."""
        values = {run.info.chance for run in self.runs}
        return values.pop() if len(values) == 1 else None

    @property
    def same_clusters(self) -> bool:
        """Whether a cluster of one run is the cluster of that name in every other."""
        if self.divisions and len(self.runs) > 1:
            return False
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
        if self.evaluated is None:
            return False
        last = self.evaluated[1]
        return all(
            any(
                math.isfinite(run.evaluations.at(last, f"clusters/{name}/num_prompts"))
                for name in run.evaluations.clusters
            )
            for run in self.runs
        )

    @property
    def divisions(self) -> list[int]:
        """The steps after which a run has divided its users again."""
        return sorted({flow.step for run in self.runs for flow in run.info.flows.values()})

    @property
    def num_drawn(self) -> int:
        """Most steps of a curve."""
        return max(int((run.steps.steps % self.stride == 0).sum()) for run in self.runs)

    def evaluations(self, arm: Arm) -> list[int]:
        """The steps at which every run of an arm was evaluated; of more than EVALUATIONS an even
        selection with the last one."""
        found = [set(run.evaluations.steps.astype(int).tolist()) for run in arm.runs]
        steps = sorted(set[int].intersection(*found))
        return steps[::-1][:: max(1, -(-len(steps) // EVALUATIONS))][::-1]

    @property
    def shown(self) -> list[str]:
        """The clusters that are drawn, by falling share."""
        return self._some(EACH)

    @property
    def listed(self) -> list[str]:
        """The clusters of the table, by falling share."""
        return self._some(EACH_LISTED)

    def _some(self, each: int) -> list[str]:
        """All clusters, or of more than 3 * each the largest, the smallest and those that ended worst,
        averaged over the arms."""
        sizes = {name: info.share for name, info in self.clusters.items()}
        return extremes(sizes, self._ends if len(sizes) > 3 * each else {}, each)

    @cached_property
    def _ends(self) -> dict[str, float]:
        """Cluster -> what was achieved there, averaged over the arms, where it is known."""
        ends = {c: mean([self.achieved(arm, c).mean for arm in self.arms]) for c in self.clusters}
        return {name: end for name, end in ends.items() if math.isfinite(end)}

    def curve(self, arm: Arm, path: str) -> Curve | None:
        """A number of the steps, by its path, over an arm's runs; None where no run has it."""
        steps = np.unique(np.concatenate([run.steps.steps for run in arm.runs]))
        values = np.full((len(arm.runs), len(steps)), math.nan)
        for row, run in zip(values, arm.runs, strict=True):
            row[np.searchsorted(steps, run.steps.steps)] = run.steps[path]
        drawn = self._even(steps)
        steps, values = steps[drawn], values[:, drawn]
        if not np.isfinite(values).any():
            return None
        smooth = np.stack([moving_mean(row, self.smoothing) for row in values])
        middle, low, high = mean_and_band(smooth)
        return Curve(steps, middle, low, high, mean_and_band(values)[0])

    def first(self, arm: Arm, path: str) -> Estimate:
        """Mean over the first `window` steps of each run, over seeds."""
        return over_seeds([mean(run.steps[path][: self.window]) for run in arm.runs])

    def last(self, arm: Arm, path: str) -> Estimate:
        """Mean over the last `window` steps up to `last_step` of each run, over seeds."""
        return over_seeds([self._last(run, path) for run in arm.runs])

    def throughout(self, arm: Arm, path: str) -> float:
        """Mean over the steps of each run, and over seeds."""
        means = [mean(run.steps[path][self._even(run.steps.steps)]) for run in arm.runs]
        return over_seeds(means).mean

    def until(self, arm: Arm, path: str, steps: Sequence[int]) -> list[float]:
        """Sum of a quantity over all steps up to each of `steps`, averaged over seeds. Steps that were
        not read count as the ones before them."""
        sums: list[FloatArray] = []
        for run in arm.runs:
            taken, values = run.steps.steps, run.steps[path]
            known = np.cumsum(np.diff(taken, prepend=0) * values)
            sums.append(np.interp(steps, [0.0, *taken], [0.0, *known]))
        return np.mean(sums, axis=0).tolist()

    def _even(self, steps: FloatArray) -> NDArray[np.bool_]:
        """Which of the steps that were read lie evenly: the ends of a run are read more closely. All of
        a run that is too short beside the others to have any."""
        even = steps % self.stride == 0
        return even if even.any() else np.ones_like(even)

    def held_out(self, arm: Arm, step: int, cluster: str | None = None) -> Estimate:
        """Held-out reward at a step, of one cluster or of all, over seeds.

        The standard error is the larger of the one over seeds and std / sqrt(num_prompts) of one
        evaluation (for rewards of 0 and 1 the binomial one): seeds share the held-out prompts, so
        more seeds do not make these more representative.
        """
        of = "" if cluster is None else f"clusters/{cluster}/"

        def read(name: str) -> FloatArray:
            return np.array([run.evaluations.at(step, of + name) for run in arm.runs])

        estimate = over_seeds(read("reward").tolist())
        with np.errstate(divide="ignore", invalid="ignore"):
            variance = mean(read("std") ** 2 / read("num_prompts"))
        return Estimate(estimate.mean, float(np.fmax(estimate.se, math.sqrt(variance))))

    def outcome(self, run: Run, cluster: str | None = None) -> float:
        """What a run achieved: held-out reward where every run has it, else that of the last steps.

        With a cluster the same for that cluster alone.
        """
        path = "reward" if cluster is None else f"clusters/{cluster}/reward"
        if self.evaluated and (cluster is None or self.cluster_evaluations):
            return run.evaluations.at(self.evaluated[1], path)
        return self._last(run, path)

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

    def arm_of(self, estimator: str, history: str) -> Arm | None:
        """The one arm with this estimator and history; None where there is none, or several. Where only
        some arms tell the model the cluster, those do not count."""
        plain = [
            arm
            for arm in self.arms
            if "{cluster}" not in arm.runs[0].settings.get("model.prompt_template", "")
        ]
        found = [
            arm
            for arm in plain or self.arms
            if arm.runs[0].settings["estimator.name"] == estimator
            and arm.runs[0].settings["estimator.history"] == history
        ]
        return found[0] if len(found) == 1 else None

    def paired(self, a: Arm, b: Arm) -> Paired:
        """`outcome` of b minus a, seed by seed, over the seeds that both have."""
        outcomes = [
            {run.settings.get("run.seed", ""): self.outcome(run) for run in arm.runs}
            for arm in (a, b)
        ]
        shared = [seed for seed in outcomes[0] if seed in outcomes[1]]
        before, after = ([outcome[seed] for seed in shared] for outcome in outcomes)
        change = np.array(after) - np.array(before)
        return Paired(change[np.isfinite(change)].tolist(), mean_change(before, after))

    @cached_property
    def gains(self) -> list[Gain]:
        """What a history gives and what clusters give, as far as there are arms to tell it; empty
        where rewards do not compare."""
        if not self.same_rewards:
            return []
        found = ((self.arm_of(*a), self.arm_of(*b), what) for a, b, what in GAINS)
        return [
            Gain(a, b, what, self.paired(a, b))
            for a, b, what in found
            if a and b and _differ_by_estimator(a, b)
        ]

    @cached_property
    def baselines(self) -> dict[str, float]:
        """Rule -> reward on the held-out prompts, of the rules that every run knows; by falling
        reward."""
        return _means([run.info.baselines for run in self.runs]) if self.evaluated else {}

    def baselines_of(self, cluster: str) -> dict[str, float]:
        """The same on the held-out prompts of one cluster."""
        infos = [run.info.clusters.get(cluster, ClusterInfo()) for run in self.runs]
        return _means([info.baselines for info in infos]) if self.cluster_evaluations else {}

    def spread(self, arm: Arm) -> Spread | None:
        """How unequally the clusters fare at the end; None with fewer than two of them."""
        rewards = {c: self.achieved(arm, c) for c in self.clusters}
        means = {c: r.mean for c, r in rewards.items() if math.isfinite(r.mean)}
        if len(means) < 2:
            return None
        worst, best = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
        gini = fairness(list(means.values())).gini
        return Spread(
            worst=worst,
            reward=rewards[worst],
            gap=Estimate(
                means[best] - means[worst], math.hypot(rewards[best].se, rewards[worst].se)
            ),
            gini=math.nan if gini is None else gini,
        )

    def _last(self, run: Run, path: str) -> float:
        return mean(run.steps[path][run.steps.steps <= self.last_step][-self.window :])


@dataclass(frozen=True)
class Spread:
    """The worst cluster of an arm and its distance to the others, clusters averaged over seeds."""

    worst: str
    reward: Estimate
    gap: Estimate
    """Best cluster minus worst, their errors taken as independent."""
    gini: float


@dataclass(frozen=True)
class Paired:
    """Differences between two arms, seed by seed."""

    each: list[float]
    """[S] of the seeds that both arms have."""
    difference: Difference | None
    """Their mean with Student's interval; None for fewer than two."""


@dataclass(frozen=True)
class Gain:
    """What one arm has over another that differs from it in one respect."""

    before: Arm
    after: Arm
    what: str
    """The respect."""
    paired: Paired


def _means(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means of what all mappings know, by falling value."""
    known = [name for name in found[0] if all(name in one for one in found)]
    means = {name: mean([one[name] for one in found]) for name in known}
    return dict(sorted(means.items(), key=lambda item: -item[1]))


def _arms(runs: Sequence[Run]) -> tuple[Arm, ...]:
    """Group runs by estimator and history, and by any other setting that shapes training."""
    families: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        key = (run.settings["estimator.name"], run.settings["estimator.history"])
        families.setdefault(key, []).append(run)
    arms: list[Arm] = []
    for (estimator, history), family in families.items():
        base = {
            "cluster": estimator,
            "user": f"{estimator} (a history each)",
            "one": f"{estimator} (one history)",
        }.get(history, f"{estimator} ({history} clusters)")
        differing = [key for key in differing_settings(family) if shapes_training(key)]
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


def _differ_by_estimator(a: Arm, b: Arm) -> bool:
    """Whether all that sets two arms apart, length and sampling aside, is the estimator: what
    an arm gains that has another learning rate too is not owed to its history."""
    keys = differing_settings([*a.runs, *b.runs])
    return all(key.startswith(("estimator.", "run.")) for key in keys)


_SHAPING = frozenset({"run.prompts_per_step", "run.resample", "run.pipeline"})


def shapes_training(key: str) -> bool:
    """Length and bookkeeping do not make another arm; all else does."""
    return not key.startswith("run.") or key in _SHAPING


def _clusters(runs: Sequence[Run]) -> dict[str, ClusterInfo]:
    """Clusters of all runs, by falling mean share; a cluster only met in metrics comes last."""
    found: dict[str, list[ClusterInfo]] = {}
    for run in runs:
        for name, info in run.info.clusters.items():
            found.setdefault(name, []).append(info)
    for name in (name for run in runs for name in run.steps.clusters):
        found.setdefault(name, [])
    merged = {
        name: infos[0].model_copy(update={"share": sum(i.share for i in infos) / len(infos)})
        if infos
        else ClusterInfo()
        for name, infos in found.items()
    }
    return dict(sorted(merged.items(), key=lambda item: -item[1].share))
