"""What `candidates` runs, as data: Figure 3 of P-GRPO (arXiv 2603.10009), trained with 4 films to
choose from and measured with 4 to 20.

Every arm is trained once for a seed. The settings change nothing of that: each stands for the number
of films that the same policy is then measured with, on the same held-out interactions, so that arms are
compared by interaction and seed. Questions were written before any run.

All of the evaluation period with all five numbers are 518,000 tokens of prompts, where a training is
31,000: it would take longer than the run. NUM_PROMPTS of them take a third.
"""

from __future__ import annotations

from pgrpo.experiments.design import Claim, HeldOut, Reproduction, Setting

_FILMS = (4, 8, 12, 16, 20)
"""The first as in training."""
NUM_PROMPTS = 500
"""Held-out interactions that policies are measured with, spread evenly over the evaluation period."""
_ARMS = ("grpo", "pgrpo", "pgrpo:one", "auto")
_FEWEST, _MOST = f"films-{min(_FILMS)}", f"films-{max(_FILMS)}"

CANDIDATES = Reproduction(
    name="candidates",
    about="more films to choose from than in training (Figure 3 of the paper): trained with 4, drawn "
    "by their popularity, and the same policies measured with 4 to 20",
    axis="films to choose from",
    base="movielens-100k-candidates.toml",
    settings=tuple(
        Setting(f"films-{films}", _ARMS, measured_with=HeldOut(films, NUM_PROMPTS))
        for films in _FILMS
    ),
    claims=(
        Claim(
            (_MOST, "pgrpo"), (_MOST, "grpo"), "a history, with five times the films", primary=True
        ),
        Claim((_FEWEST, "pgrpo"), (_FEWEST, "grpo"), "a history, with as many films", primary=True),
        *(
            Claim(
                (f"films-{films}", "pgrpo"),
                (f"films-{films}", "grpo"),
                f"a history, with {films} films",
            )
            for films in _FILMS[1:-1]
        ),
        *(
            Claim(
                (f"films-{films}", after), (f"films-{films}", before), f"{what}, with {films} films"
            )
            for films in (_FILMS[0], _FILMS[-1])
            for after, before, what in (
                ("pgrpo", "pgrpo:one", "clusters, against one history for all"),
                ("auto", "grpo", "auto against the group"),
                ("auto", "pgrpo", "auto against the history"),
            )
        ),
    ),
)
