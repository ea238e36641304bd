"""What `pgrpo reproduce imbalance` and `pgrpo reproduce regimes` run, as data: where a history should
help, and where it should not.

`imbalance` trains with few prompts of one cluster, the smallest of the base's, and asks of that
cluster's held-out people, who are the same in all settings. A history normalises a cluster's
rewards; it does not make its prompts more frequent. `estimator.frequency_weight` weighs advantages
by q^-1/2 for a cluster of share q.

`regimes` has what theory tells apart (docs/estimators.md, "When it helps, and when it does not"). A
group normalised by its own spread is blind to the offset and scale of its user's rewards, so that
clusters on other scales are starved by rules that divide by the spread of a step's rewards
(`batch`, `lite`), and not by `grpo`. A history lags behind a judge that shifts, unless it forgets.
The regime in which groups mix clusters cannot be had in the trainer, where a group is one user's:
`benches/mixed_groups.py` has it.
"""

from __future__ import annotations

from pgrpo.experiments.design import CURVE, MARGIN, NO_CURVE, Claim, Reproduction, Setting

MINORITY = "4"
"""The smallest of the base's five clusters, which has 14 % of the prompts by itself."""
SHARES = (20, 8, 2)
"""Of the minority in training, in per cent."""
_WEIGHT = "estimator.frequency_weight=0.5"


def _of_share(percent: int, weighted: bool) -> Setting:
    share = f'clustering.prompt_shares={{"{MINORITY}"={percent / 100:g}}}'
    return Setting(
        f"share-{percent}-weighted" if weighted else f"share-{percent}",
        ("grpo", "pgrpo"),
        (*NO_CURVE, share, *([_WEIGHT] if weighted else [])),
    )


IMBALANCE = Reproduction(
    name="imbalance",
    about="a cluster that is 20, 8 or 2 % of the prompts in training, without and with weights of "
    "q^-1/2 for a cluster of share q (estimator.frequency_weight), judged by its own held-out people, "
    "and by all (ours)",
    axis="share of the minority",
    settings=tuple(
        _of_share(percent, weighted) for percent in SHARES for weighted in (False, True)
    ),
    claims=(
        *(
            Claim(
                (f"share-{percent}", "pgrpo"),
                (f"share-{percent}", "grpo"),
                f"the minority at {percent} %: a history in the place of the group",
                percent == min(SHARES),
                cluster=MINORITY,
            )
            for percent in SHARES
        ),
        *(
            Claim(
                (f"share-{percent}-weighted", arm),
                (f"share-{percent}", arm),
                f"the minority at {percent} %: what weights give it under {arm}",
                (percent, arm) == (min(SHARES), "pgrpo"),
                cluster=MINORITY,
            )
            for arm in ("pgrpo", "grpo")
            for percent in SHARES
        ),
        Claim(
            ("share-2-weighted", "pgrpo"),
            ("share-2-weighted", "grpo"),
            "the minority at 2 %, weighted: a history in the place of the group",
            cluster=MINORITY,
        ),
        *(
            Claim(
                ("share-20", arm),
                ("share-2", arm),
                f"the minority: what ten times the prompts give it under {arm}",
                cluster=MINORITY,
            )
            for arm in ("pgrpo", "grpo")
        ),
        Claim(
            ("share-2-weighted", "pgrpo"),
            ("share-8", "pgrpo"),
            "the minority: weights at 2 % reach four times the prompts",
            margin=MARGIN,
            cluster=MINORITY,
        ),
        *(
            Claim(
                (f"share-{percent}-weighted", "pgrpo"),
                (f"share-{percent}", "pgrpo"),
                f"everybody at {percent} %: weights cost no more than the margin",
                margin=MARGIN,
            )
            for percent in SHARES
        ),
        Claim(
            ("share-2", "pgrpo"),
            ("share-2", "grpo"),
            "everybody at 2 %: a history in the place of the group",
        ),
    ),
)

_WORTH = ((10, [0]), (1, [1, 2]), (0.1, [3, 4]))
_REWARDS = ",".join(f'{{name="choice",weight={w:g},clusters={those}}}' for w, those in _WORTH)
_SCALES = (f"rewards=[{_REWARDS}]", 'evaluation=[{name="choice"}]')
"""Right answers of the largest cluster are worth 10, of the next two 1, of the two smallest 0.1, as
where a judge, a checker and a click share one run; held-out answers are on one scale."""

SHIFTS = {
    "shift-offset": "rewards.0.shift={after=20,offset=-2.0}",
    "shift-scale": "rewards.0.shift={after=20,scale=10.0}",
}
"""After step 20 of 50 the judge takes off what two right answers are worth, or gives ten times the
marks: about half of the sum of all learning rates is still to come then. Held-out answers stay on the
scale of the beginning."""
FORGETTING = (0.99, 0.9)


def _forgetting(shift: str, factor: float) -> str:
    return f"{shift}-forgetting-{factor:g}"


REGIMES = Reproduction(
    name="regimes",
    about="where a history helps and where it does not: one user's group against rules that read the "
    "whole step, rewards of clusters on three scales, and a judge that shifts, against histories that "
    "forget (ours)",
    axis="regime",
    settings=(
        Setting("one-user", ("grpo", "batch", "lite", "pgrpo", "auto"), NO_CURVE),
        Setting(
            "scales",
            ("grpo", "batch", "lite", "pgrpo:one", "pgrpo", "auto"),
            (*NO_CURVE, *_SCALES),
        ),
        *(
            setting
            for shift, override in SHIFTS.items()
            for setting in (
                Setting(shift, ("grpo", "pgrpo", "auto"), (*CURVE, override)),
                *(
                    Setting(
                        _forgetting(shift, factor),
                        ("pgrpo",),
                        (*CURVE, override, f"estimator.forgetting={factor:g}"),
                    )
                    for factor in FORGETTING
                ),
            )
        ),
    ),
    claims=(
        Claim(
            ("scales", "pgrpo"),
            ("scales", "batch"),
            "three scales: a cluster's history against the step's rewards",
            True,
        ),
        Claim(
            (_forgetting("shift-offset", 0.9), "pgrpo"),
            ("shift-offset", "pgrpo"),
            "a judge that becomes stricter: forgetting by .9 a step",
            True,
        ),
        *(
            Claim(
                ("one-user", after),
                ("one-user", before),
                f"one user's group: {after} against {before}",
            )
            for after, before in (
                ("pgrpo", "grpo"),
                ("pgrpo", "batch"),
                ("pgrpo", "lite"),
                ("lite", "grpo"),
                ("auto", "grpo"),
                ("auto", "pgrpo"),
            )
        ),
        *(
            Claim(("scales", after), ("scales", before), f"three scales: {after} against {before}")
            for after, before in (
                ("pgrpo", "grpo"),
                ("pgrpo", "lite"),
                ("pgrpo", "pgrpo:one"),
                ("grpo", "batch"),
                ("grpo", "lite"),
                ("auto", "grpo"),
                ("auto", "pgrpo"),
            )
        ),
        *(
            Claim(
                ("scales", "pgrpo"),
                ("scales", "batch"),
                f"three scales, cluster {cluster} (right answers worth {worth}): pgrpo against batch",
                cluster=cluster,
            )
            for cluster, worth in (("0", "10"), ("3", "0.1"), ("4", "0.1"))
        ),
        *(
            claim
            for shift in SHIFTS
            for claim in (
                Claim(
                    (shift, "pgrpo"), (shift, "grpo"), f"{shift}: a history that forgets nothing"
                ),
                Claim((shift, "auto"), (shift, "grpo"), f"{shift}: auto against the group"),
                *(
                    Claim(
                        (_forgetting(shift, factor), "pgrpo"),
                        (shift, "pgrpo"),
                        f"{shift}: forgetting by {factor:g} a step against nothing",
                    )
                    for factor in FORGETTING
                    if (shift, factor) != ("shift-offset", 0.9)  # asked for above
                ),
                Claim(
                    (_forgetting(shift, 0.9), "pgrpo"),
                    (shift, "grpo"),
                    f"{shift}: a history that forgets by .9 reaches the group",
                    margin=MARGIN,
                ),
            )
        ),
    ),
)
