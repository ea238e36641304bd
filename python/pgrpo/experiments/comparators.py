"""What `pgrpo reproduce comparators` and `pgrpo reproduce rates` run, as data: other objectives on the
same rollouts, each at a learning rate of its own.

Losses have gradients of other sizes and, after Adam's scaling, still other best rates. `rates` trains
every arm at every rate and measures on a third split, which the base leaves in training and where what
the base holds out is not read. RATES has what was chosen so, and `comparators` asks its questions of
what the base holds out. Questions were written before any run.

Every arm takes as many steps, with as many rollouts, as the others; minutes are in the tables.
"""

from __future__ import annotations

from collections.abc import Mapping

from pgrpo.experiments.design import NO_CURVE, Cell, Claim, Reproduction, Setting

_FAMILIES: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "base": (
        # Groups, the step, one history for all; EBPO's baseline is the group's mean, drawn towards one
        # history (arXiv 2602.05165); DPO (2305.18290), and right answers as examples (2304.06767).
        ("grpo", "batch", "pgrpo:one", "pgrpo", "shrinkage:one", "dpo", "sft"),
        (),
    ),
    # DPO given a preference group is what is left of GDPO (arXiv 2412.20299) where groups are known.
    "named": (("dpo", "pgrpo"), ('model.prompt_template="[{cluster}] {prompt}"',)),
    # As in SPO (arXiv 2509.13232), the baseline is a running mean that had not seen the answer when it
    # is taken off, here of each person, and nothing is divided by a spread of that history.
    "single-stream": (
        ("pgrpo:user",),
        (
            'estimator.order="normalize_then_update"',
            "estimator.forgetting=0.9",
            "estimator.prior_count=8.0",
            "estimator.sigma_floor=1.0",
        ),
    ),
}
"""Name -> arms, and what they have in common; rewards of 0 and 1 deviate by half at most, so that a
floor of 1 takes the place of every spread."""

TRIED = (1e-5, 3e-5, 1e-4)
"""Learning rates; the middle one is the base's, with which its recipe was found."""

RATES: Mapping[Cell, float] = {}
"""Family and arm -> the rate that `rates` found best, where that is not the base's. Empty until it was
run: then all arms have the rate that was chosen by `pgrpo`."""

_THIRD_SPLIT = "data.unused_choices=3"


def _at(family: str, rate: float) -> str:
    return f"{family}-{rate:.0e}"


def _arm(family: str, arm: str) -> str:
    rate = RATES.get((family, arm))
    return arm if rate is None else f"{arm}@optimizer.learning_rate={rate:g}"


def _cell(family: str, arm: str) -> Cell:
    return family, _arm(family, arm)


RATE_GRID = Reproduction(
    name="rates",
    about="every arm of comparators at three learning rates, on a third split that leaves the base's "
    "held-out choices unread: each arm is given the same tries, and its best rate is the one that "
    "comparators takes (ours)",
    axis="objective and learning rate",
    settings=tuple(
        Setting(
            _at(family, rate),
            arms,
            (*NO_CURVE, *overrides, _THIRD_SPLIT, f"optimizer.learning_rate={rate:g}"),
        )
        for family, (arms, overrides) in _FAMILIES.items()
        for rate in TRIED
    ),
    claims=tuple(
        Claim(
            (_at(family, rate), arm),
            (_at(family, TRIED[1]), arm),
            f"{family} {arm}: a rate of {rate:.0e} against {TRIED[1]:.0e}",
        )
        for family, (arms, _) in _FAMILIES.items()
        for arm in arms
        for rate in (TRIED[0], TRIED[2])
    ),
)

COMPARATORS = Reproduction(
    name="comparators",
    about="other objectives on the same rollouts, each at its own learning rate: one objective for all "
    "(grpo, batch, one history, EBPO's baseline), DPO with and without the cluster in the prompt, "
    "right answers as examples, and a running mean for each person as in SPO",
    axis="objective",
    settings=tuple(
        Setting(family, tuple(_arm(family, arm) for arm in arms), (*NO_CURVE, *overrides))
        for family, (arms, overrides) in _FAMILIES.items()
    ),
    claims=(
        *(
            Claim(_cell("base", "pgrpo"), _cell(*other), f"a history, against {what}", primary)
            for other, what, primary in (
                (("named", "dpo"), "DPO that is told the cluster", True),
                (("base", "sft"), "right answers as examples", True),
                (("base", "dpo"), "DPO", False),
                (("base", "batch"), "the step's rewards", False),
                (("base", "pgrpo:one"), "one history for all", False),
                (("base", "shrinkage:one"), "groups drawn towards one history", False),
                (("single-stream", "pgrpo:user"), "a running mean for each person", False),
            )
        ),
        Claim(_cell("named", "pgrpo"), _cell("base", "pgrpo"), "what naming the cluster gives it"),
        Claim(_cell("named", "dpo"), _cell("base", "dpo"), "what naming the cluster gives DPO"),
        *(
            Claim(_cell("base", arm), _cell("base", "grpo"), f"{arm} against the group")
            for arm in ("dpo", "sft", "batch", "shrinkage:one")
        ),
        Claim(
            _cell("named", "pgrpo"),
            _cell("named", "dpo"),
            "both told the cluster: a history against DPO",
        ),
    ),
)
