"""How near histories come to the person whose rewards they normalise, on the panel's real choices.

A policy that does not learn answers the training prompts of `examples/electricity.toml` as a run would
meet them, and its rewards of 0 and 1 are folded into histories: of K clusters, or of each person with
its cluster's as parent. At every step, mean and standard deviation are read for the persons of the step
as `pgrpo` reads them, the step's own rewards included, and compared with what is true of the person
under this policy: the mean p of its rewards over all its training situations, and sqrt(p (1 - p)).

The root mean square of these errors, over all rewards of all runs:

    python benches/hierarchy.py
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from pgrpo import ClusterNormalizer
from pgrpo.clusters.kmeans import KMeans
from pgrpo.data.panel import PanelConfig, load_panel
from pgrpo.runs.config import load_config
from pgrpo.train.baselines import baselines
from pgrpo.types import FloatArray

Numbers = NDArray[np.int64]

CONFIG = Path(__file__).parents[1] / "examples" / "electricity.toml"
STEPS, PROMPTS, GROUP = 50, 32, 2
"""Those of the example."""
CLUSTERS = 5, 16, 64, 361
PRIORS = 0.0, 4.0, 16.0, 64.0
GREED = 0.7
"""How often the policy takes the option that its rule likes best, and else any."""


def read(normalizer: ClusterNormalizer, keys: Numbers, parents: Numbers | None) -> FloatArray:
    """[2, N] mean and standard deviation that advantages of these keys are made with."""
    parents = None if parents is None else np.tile(parents, 2)
    zero, one = np.split(
        normalizer.normalize(np.repeat([0.0, 1.0], len(keys)), np.tile(keys, 2), parents=parents), 2
    )
    scale = one - zero
    return np.stack([-zero / scale, 1 / scale - normalizer.options.eps])


def errors(
    probability: FloatArray,
    person: Numbers,
    cluster: Numbers,
    per_person: bool,
    prior: float,
    seeds: int,
) -> FloatArray:
    """[2] root mean square error of the mean and of the standard deviation.

    Args:
        probability: [E] that the policy is right, by example.
        person: [E] whose example it is, counted from 0.
        cluster: [E] the cluster of that person.
        per_person: whether persons have the histories, or clusters.
        prior: `prior_count`.
        seeds: number of runs.
    """
    true_mean = np.bincount(person, probability) / np.bincount(person)
    truth = np.stack([true_mean, np.sqrt(true_mean * (1 - true_mean))])
    squares: list[FloatArray] = []
    for seed in range(seeds):
        random = np.random.default_rng(seed)
        places = random.permutation(len(person))[: STEPS * PROMPTS].repeat(GROUP)
        rewards = (random.random(len(places)) < probability[places]).astype(np.float64)
        normalizer = ClusterNormalizer(prior_count=prior)
        for step in range(STEPS):
            now = slice(step * PROMPTS * GROUP, (step + 1) * PROMPTS * GROUP)
            keys, parents = cluster[places[now]], None
            if per_person:
                keys, parents = person[places[now]], keys if prior else None
            normalizer.update(rewards[now], keys, parents=parents)
            found = read(normalizer, keys, parents)
            squares.append((found - truth[:, person[places[now]]]) ** 2)
    return np.sqrt(np.concatenate(squares, axis=1).mean(axis=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=20, help="runs of each kind")
    seeds = parser.parse_args().seeds
    dataset = load_panel(cast(PanelConfig, load_config(CONFIG).data))
    users = list(dataset.users)
    features = np.array(list(dataset.users.values()))
    person = np.array([users.index(example.user) for example in dataset.train])
    clusters: dict[int, Numbers] = {}
    for num in CLUSTERS:
        found = range(len(users))
        if num < len(users):
            kmeans = KMeans(KMeans.Config(num_clusters=num, n_init=10, seed=0))
            kmeans.fit(users, features, dataset.train)
            found = cast("list[int]", kmeans.assign(users, features))
        clusters[num] = np.array(found)[person]
    rules = baselines(dataset, dataset.train, dict.fromkeys(users, 0))
    for name in ("one rule for all", "chance"):
        probability = GREED * rules[name] + (1 - GREED) * rules["chance"]
        print(f"\n{name}: mean, standard deviation; prior_count in the head\n")
        print("| histories |", " | ".join(f"{prior:g}" for prior in PRIORS), "|")
        print("|---" * (1 + len(PRIORS)) + "|")
        for per_person in (False, True):
            for num, cluster in clusters.items():
                rows = [
                    errors(probability, person, cluster, per_person, prior, seeds)
                    for prior in PRIORS
                ]
                kind = f"persons in {num} clusters" if per_person else f"{num} clusters"
                cells = (f"{mean:.3f}, {std:.3f}" for mean, std in rows)
                print(f"| {kind} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
