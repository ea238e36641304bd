"""Groups whose completions are rewarded by users of different clusters, in seconds (regime R3).

Where many people rate completions of one prompt, a group mixes clusters. Those whose rewards are
generous then look right and the others wrong, and a group's mean passes that on to the policy. The
trainer cannot ask this: there a prompt is one user's, and so is a group. So it is asked of the
bandit of `bandit.py`, whose clusters, 70, 20 and 10 % of the users, have offsets of 2, .5 and -1
between their rewards, while those of good and bad candidates differ by a tenth of that or so:

- `mixed`: each completion of a group has a user of its own.
- `mixed, prompts differ`: prompts differ as well in how much reward they allow, about ten times as
  much as candidates do.
- `one user`: the same rewards, and a group is one user's. Here offsets cancel out within groups, as
  in the trainer.

The figure is the final held-out score of each seed's worst cluster, 0 for choice at random and 1
for the best choice. A question is a difference of two figures by seed, judged by Student's interval
over the seeds.

    python benches/mixed_groups.py --out benches/results/mixed_groups.json \
      --figure docs/images/mixed_groups.svg
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from bandit import OFFSETS, train

from pgrpo.experiments.design import Claim
from pgrpo.report.figures import ARM_COLORS
from pgrpo.report.statistics import mean_change

SETTINGS = {
    "mixed": OFFSETS,
    "mixed, prompts differ": replace(OFFSETS, tau=1.0),
    "one user": replace(OFFSETS, groups_mix_clusters=False),
}
ARMS = "grpo", "batch", "lite", "pgrpo", "two_way", "auto"

CLAIMS = (
    Claim(("mixed", "pgrpo"), ("mixed", "grpo"), "a cluster's history against a mixed group", True),
    Claim(("mixed", "batch"), ("mixed", "grpo"), "the step's rewards against a mixed group"),
    Claim(("mixed", "lite"), ("mixed", "grpo"), "the step's spread with a mixed group's mean"),
    Claim(("mixed", "two_way"), ("mixed", "pgrpo"), "taking out prompts as well as clusters"),
    Claim(("mixed", "auto"), ("mixed", "pgrpo"), "auto against the history"),
    Claim(
        ("mixed, prompts differ", "pgrpo"),
        ("mixed, prompts differ", "grpo"),
        "a cluster's history against a mixed group, where prompts differ",
    ),
    Claim(
        ("mixed, prompts differ", "two_way"),
        ("mixed, prompts differ", "pgrpo"),
        "taking out prompts as well as clusters, where prompts differ",
    ),
    Claim(
        ("mixed, prompts differ", "auto"),
        ("mixed, prompts differ", "pgrpo"),
        "auto against the history, where prompts differ",
    ),
    Claim(("one user", "pgrpo"), ("one user", "grpo"), "a history where groups do not mix"),
    Claim(("one user", "grpo"), ("mixed", "grpo"), "what mixing takes from grpo"),
    Claim(("one user", "pgrpo"), ("mixed", "pgrpo"), "what mixing takes from pgrpo"),
)


def measure(num_seeds: int) -> dict[str, Any]:
    """Figures of all settings and arms by seed, and what becomes of the questions."""
    worst: dict[tuple[str, str], list[float]] = {}
    rows: list[dict[str, Any]] = []
    for name, bandit in SETTINGS.items():
        for arm in ARMS:
            run = train(replace(bandit, num_seeds=num_seeds), arm)
            worst[name, arm] = run.worst_of_seeds.tolist()
            rows.append(
                {
                    "setting": name,
                    "arm": arm,
                    "worst": run.worst,
                    "worst_of_seeds": worst[name, arm],
                    "clusters": run.final.mean(axis=0).tolist(),
                }
            )
    claims: list[dict[str, Any]] = []
    for claim in CLAIMS:
        found = mean_change(worst[claim.before], worst[claim.after])
        claims.append(
            {
                **{key: getattr(claim, key) for key in ("what", "after", "before", "primary")},
                **(vars(found) if found else {}),
                "verdict": found.outcome if found else "not known",
            }
        )
    return {"num_seeds": num_seeds, "rows": rows, "claims": claims}


def draw(result: dict[str, Any], path: Path) -> None:
    """The worst cluster's score of each arm, a dot a seed and a line for their mean."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        1, len(SETTINGS), figsize=(12, 3.5), sharey=True, layout="constrained"
    )
    for panel, setting in zip(panels, SETTINGS, strict=True):
        rows = [row for row in result["rows"] if row["setting"] == setting]
        for place, (row, color) in enumerate(zip(rows, ARM_COLORS, strict=False)):
            scores = row["worst_of_seeds"]
            panel.plot([place] * len(scores), scores, "o", color=color, alpha=0.6)
            panel.hlines(row["worst"], place - 0.35, place + 0.35, color=color)
        panel.set(title=setting)
        panel.set_xticks(range(len(rows)), [row["arm"] for row in rows])
        panel.axhline(0, color="k", linewidth=0.5)
    panels[0].set(ylabel="final score of the worst cluster")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    result = measure(options.seeds)
    print("| worst cluster |", " | ".join(ARMS), "|")
    print("|---" * (1 + len(ARMS)) + "|")
    for setting in SETTINGS:
        figures = [row["worst"] for row in result["rows"] if row["setting"] == setting]
        print(f"| {setting} |", " | ".join(f"{figure:.2f}" for figure in figures), "|")
    print()
    for claim in result["claims"]:
        print(
            f"{'* ' if claim['primary'] else ''}{claim['what']}: {claim['verdict']}, "
            f"{claim['mean']:+.2f} ({claim['low']:+.2f} to {claim['high']:+.2f})"
        )
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    if options.figure:
        draw(result, options.figure)


if __name__ == "__main__":
    main()
