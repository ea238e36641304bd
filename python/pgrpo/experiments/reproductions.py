"""What `pgrpo reproduce` runs, as data: settings with their arms, and what is asked of them.

Claims, margins and which of them count were written before the runs of `pgrpo reproduce`, and are not
changed after; what was known of some cells by then is in docs/paper.md. A claim compares two cells,
each (setting, arm); `primary` ones are what a reproduction was made to tell, all others are looks.
"""

from __future__ import annotations

from collections.abc import Mapping

from pgrpo.experiments.candidates import CANDIDATES
from pgrpo.experiments.comparators import COMPARATORS, RATE_GRID
from pgrpo.experiments.design import CURVE, MARGIN, NO_CURVE, Claim, Reproduction, Setting
from pgrpo.experiments.regimes import IMBALANCE, REGIMES

CURVES = Reproduction(
    name="curves",
    about="held-out reward over steps and rollouts (Figure 2 of the paper), with control arms: one "
    "history for all, clusters of random users, and grpo with more exploration or more steps",
    axis="setting",
    settings=(
        Setting(
            "base",
            ("grpo", "pgrpo:one", "pgrpo", "pgrpo:shuffled", "auto", "shrinkage"),
            CURVE,
        ),
        Setting("temperature-2", ("grpo",), (*CURVE, "generation.temperature=2.0")),
        Setting(
            "long",
            ("grpo",),
            (*CURVE, "run.num_steps=130", "run.checkpoint_every=130"),
        ),
    ),
    claims=(
        Claim(("base", "pgrpo"), ("base", "grpo"), "a history in the place of the group", True),
        Claim(("base", "pgrpo"), ("base", "pgrpo:one"), "clusters, against one history for all"),
        Claim(("base", "pgrpo"), ("base", "pgrpo:shuffled"), "whose history it is"),
        Claim(("base", "pgrpo:one"), ("base", "grpo"), "having a history at all"),
        Claim(("base", "auto"), ("base", "grpo"), "auto against the group"),
        Claim(("base", "auto"), ("base", "pgrpo"), "auto against the history"),
        Claim(("base", "shrinkage"), ("base", "grpo"), "shrinkage against the group"),
        Claim(
            ("base", "pgrpo"),
            ("temperature-2", "grpo"),
            "a history reaches the group at temperature 2",
            margin=MARGIN,
        ),
        Claim(
            ("base", "pgrpo"),
            ("long", "grpo"),
            "a history reaches the group with 130 steps",
            margin=MARGIN,
        ),
    ),
)

GRANULARITY = Reproduction(
    name="granularity",
    about="how many clusters (Figure 4a of the paper): one history for all, K-Means with 2, 5, 16 and "
    "64 clusters, and a history for each person, with and without borrowing from the cluster's",
    axis="histories",
    settings=(
        # The control arm reads one history, and the clusters of K-5 are still told apart.
        Setting("K-1", ("pgrpo:one",), (*NO_CURVE, "clustering.num_clusters=5")),
        *(
            Setting(f"K-{k}", ("pgrpo",), (*NO_CURVE, f"clustering.num_clusters={k}"))
            for k in (2, 5, 16, 64)
        ),
        Setting(
            "person-borrowing",
            ("pgrpo:user",),
            (*NO_CURVE, "clustering.num_clusters=5", "estimator.prior_count=8.0"),
        ),
        Setting(
            "person-alone",
            ("pgrpo:user",),
            (*NO_CURVE, "clustering.num_clusters=5", "estimator.prior_count=0.0"),
        ),
    ),
    claims=(
        Claim(("K-5", "pgrpo"), ("K-1", "pgrpo:one"), "5 clusters against one history", True),
        Claim(("K-2", "pgrpo"), ("K-1", "pgrpo:one"), "2 clusters against one history"),
        Claim(("K-16", "pgrpo"), ("K-5", "pgrpo"), "16 clusters against 5"),
        Claim(("K-64", "pgrpo"), ("K-5", "pgrpo"), "64 clusters against 5"),
        Claim(("person-alone", "pgrpo:user"), ("K-5", "pgrpo"), "persons against 5 clusters"),
        Claim(
            ("person-borrowing", "pgrpo:user"),
            ("person-alone", "pgrpo:user"),
            "a person's history that borrows from the cluster's, against one that does not",
        ),
    ),
)

RANDOM = Reproduction(
    name="random",
    about="which clusters (Figure 4b of the paper): K-Means and latent classes, each against random "
    "clusters of the same sizes, drawn anew for every seed (the arm pgrpo:shuffled)",
    axis="clusters",
    settings=(
        Setting(
            "kmeans",
            ("pgrpo", "pgrpo:shuffled"),
            (*NO_CURVE, 'clustering={name="kmeans",num_clusters=5}'),
        ),
        Setting(
            "latent-class",
            ("pgrpo", "pgrpo:shuffled"),
            (*NO_CURVE, 'clustering={name="latent_class",num_clusters=5}'),
        ),
    ),
    claims=(
        Claim(("kmeans", "pgrpo"), ("kmeans", "pgrpo:shuffled"), "K-Means against chance", True),
        Claim(
            ("latent-class", "pgrpo"),
            ("latent-class", "pgrpo:shuffled"),
            "latent classes against chance",
            True,
        ),
        Claim(("latent-class", "pgrpo"), ("kmeans", "pgrpo"), "latent classes against K-Means"),
    ),
)

JUDGE = Reproduction(
    name="judge",
    about="how often which answer is the better one, for the people of each cluster (Figure 5 of the "
    "paper), where the held-out reward judges; and one seed of pgrpo against another, a control that "
    "should be level",
    axis="setting",
    settings=(Setting("base", ("grpo", "pgrpo:one", "pgrpo"), NO_CURVE),),
    claims=(
        Claim(("base", "pgrpo"), ("base", "grpo"), "a history in the place of the group", True),
        Claim(
            ("base", "pgrpo"), ("base", "pgrpo:one"), "clusters, against one history for all", True
        ),
        Claim(("base", "pgrpo"), ("base", "pgrpo"), "one seed against another, as a control"),
    ),
)

GROUP_SIZES = (1, 2, 4, 8, 16)
ROLLOUTS_A_STEP = 64
_RULES = ("grpo", "rloo", "pgrpo", "auto")
_ALONE = ("pgrpo",)
"""Of these, what is run at one completion per prompt: grpo and rloo have no signal then, and auto is
pgrpo by its own rule."""
_CONTROLS = ("pgrpo:one", "pgrpo:shuffled")


def _of_group_size(family: str, size: int, *overrides: str, controls: bool = False) -> Setting:
    return Setting(
        f"{family}-{size}",
        (*(_ALONE if size == 1 else _RULES), *(_CONTROLS if controls else ())),
        (*NO_CURVE, f"generation.group_size={size}", *overrides),
        no_signal=("grpo", "rloo") if size == 1 else (),
    )


ROLLOUTS = Reproduction(
    name="rollouts",
    about="completions per prompt, at equal steps (steps-G) and at equal rollouts a step, fewer "
    "prompts for more completions (rollouts-G); at one completion grpo and rloo have no signal and "
    "auto is pgrpo (ours)",
    axis="completions per prompt",
    settings=(
        *(_of_group_size("steps", size, controls=size in (1, 2, 8)) for size in GROUP_SIZES),
        *(
            _of_group_size("rollouts", size, f"run.prompts_per_step={ROLLOUTS_A_STEP // size}")
            for size in GROUP_SIZES
        ),
    ),
    claims=(
        # Where more completions do nothing for grpo, to reach it with 8 says nothing of whoever does.
        Claim(
            ("steps-8", "grpo"), ("steps-2", "grpo"), "what 8 completions give grpo over 2", True
        ),
        *(
            Claim(
                (f"steps-{size}", arm),
                ("steps-8", "grpo"),
                f"{arm} with {size} completions reaches grpo with 8",
                arm == "pgrpo",
                MARGIN,
            )
            for size, arm in (
                (2, "pgrpo"),
                (1, "pgrpo"),
                (2, "auto"),
                (2, "grpo"),
                (2, "pgrpo:one"),
                (1, "pgrpo:one"),
            )
        ),
        *(
            Claim(
                (f"rollouts-{size}", "pgrpo"),
                ("rollouts-8", "grpo"),
                f"64 rollouts a step: pgrpo with {size} of each prompt against grpo with 8",
            )
            for size in (1, 2)
        ),
        *(
            Claim(
                (f"{family}-{size}", arm),
                (f"{family}-{size}", "grpo"),
                f"{arm} against grpo at {size} completions, equal {family}",
            )
            for family in ("steps", "rollouts")
            for size in GROUP_SIZES
            # With 2, both families are the same runs.
            if size > 2 or (size == 2 and family == "steps")
            for arm in ("pgrpo", "auto")
        ),
        *(
            Claim(
                (f"steps-{size}", "pgrpo"),
                (f"steps-{size}", "pgrpo:shuffled"),
                f"whose history it is, at {size} completions",
            )
            for size in (1, 2, 8)
        ),
    ),
)

REPRODUCTIONS: Mapping[str, Reproduction] = {
    found.name: found
    for found in (
        *(CURVES, CANDIDATES, GRANULARITY, RANDOM, JUDGE),
        *(ROLLOUTS, IMBALANCE, REGIMES, COMPARATORS, RATE_GRID),
    )
}
