"""What `candidates` runs, as data: Figure 3 of P-GRPO (arXiv 2603.10009), trained with 4 films to
choose from and measured with 4 to 20.

Every arm is trained once for a seed. The settings change nothing of that: each stands for the number
of films that the same policy is then measured with (MEASURED_AT), on the same held-out interactions
(`pgrpo.train.evaluation.groups_with`), so that arms are compared by interaction and seed. Questions
were written before any run.
"""

from __future__ import annotations

from collections.abc import Mapping

from pgrpo.experiments.reproductions import Claim, Reproduction, Setting

BASE = "movielens-100k-candidates.toml"
"""The base that settings change, packaged beside this module."""
TRAINED_WITH = 4
"""Films to choose from in training."""
MEASURED_AT: Mapping[str, int] = {f"films-{number}": number for number in (4, 8, 12, 16, 20)}
"""Setting -> films to choose from where its policies are measured."""

_ARMS = ("grpo", "pgrpo", "pgrpo:one", "auto")
_MOST = f"films-{max(MEASURED_AT.values())}"
_FEWEST = f"films-{TRAINED_WITH}"

CANDIDATES = Reproduction(
    name="candidates",
    about="more films to choose from than in training (Figure 3 of the paper): trained with 4, drawn "
    "by their popularity, and the same policies measured with 4 to 20",
    axis="films to choose from",
    settings=tuple(Setting(name, _ARMS) for name in MEASURED_AT),
    claims=(
        Claim(
            (_MOST, "pgrpo"), (_MOST, "grpo"), "a history, with five times the films", primary=True
        ),
        Claim((_FEWEST, "pgrpo"), (_FEWEST, "grpo"), "a history, with as many films", primary=True),
        *(
            Claim((name, "pgrpo"), (name, "grpo"), f"a history, with {number} films")
            for name, number in MEASURED_AT.items()
            if name not in (_MOST, _FEWEST)
        ),
        *(
            Claim((name, after), (name, before), f"{what}, with {MEASURED_AT[name]} films")
            for name in (_FEWEST, _MOST)
            for after, before, what in (
                ("pgrpo", "pgrpo:one", "clusters, against one history for all"),
                ("auto", "grpo", "auto against the group"),
                ("auto", "pgrpo", "auto against the history"),
            )
        ),
    ),
)
