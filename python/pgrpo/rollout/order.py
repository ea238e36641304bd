"""Which training examples a step takes: a matter of the seed and the step, and of nothing else."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from pgrpo.clusters.membership import Membership
from pgrpo.config.sections import RunConfig
from pgrpo.errors import ConfigError
from pgrpo.rollout.seeds import derive_seed
from pgrpo.types import Dataset, Example

Places = NDArray[np.int64]


class PromptOrder:
    """The examples of every step.

    Steps take consecutive places of a shuffle of all training examples, another one in each epoch.

    With `prompt_shares` each place of a step is of cluster k with probability q_k, whatever came
    before, and takes the next example of a shuffle of the cluster's own, another one whenever all had
    their turn. So of two examples of a cluster neither comes more than once oftener than the other. q_k
    is the share of a cluster that is named; what these leave is the others', by how many examples they
    have. Draws by different shares are made of the same random numbers.

    Every process of a run comes to the same examples, and so does a run that goes on.

    Args:
        run: the seed, and the number of examples of a step.
        dataset: whose training examples they are.
        members: whose example is of which cluster.
        prompt_shares: `clustering.prompt_shares`.

    Raises:
        ConfigError: there is no such cluster, it has no training example, or all are named and their
            shares do not come to 1.
    """

    def __init__(
        self,
        run: RunConfig,
        dataset: Dataset,
        members: Membership,
        prompt_shares: Mapping[str, float] | None,
    ) -> None:
        self._seed, self._size, self._train = run.seed, run.prompts_per_step, dataset.train
        self._pools: dict[str, Places] = {"": np.arange(len(dataset.train))}
        self._shares = np.ones(1)
        if prompt_shares:
            clusters = np.array([str(members.cluster(e.user)) for e in dataset.train])
            pools = {name: np.flatnonzero(clusters == name) for name in members.about}
            self._pools, self._shares = pools, _all_shares(pools, prompt_shares)
        self._named = list(prompt_shares or ())
        self._shuffles: dict[str, tuple[int, list[int]]] = {}
        self._step, self._turns = 1, np.zeros(len(self._pools), np.int64)

    def examples(self, step: int) -> list[Example]:
        """The step's own."""
        return [self._train[place] for place in self._places(step)]

    def others(self, step: int, num: int) -> list[Example]:
        """So many that may stand in for some of the step's, the first ones the same however many are
        asked for.

        They come from a shuffle of the step's own, by the same shares, over again where they are too
        few. Its own examples are not among them, unless a pool has no others.
        """
        if not num:
            return []
        random = np.random.default_rng(derive_seed(self._seed, "resample", step))
        shuffled = random.permutation(len(self._train))
        fresh = ~np.isin(shuffled, self._places(step))
        found = np.zeros(num, np.int64)
        drawn = self._drawn(random, num)
        for number, pool in enumerate(self._pools.values()):
            where, own = drawn == number, np.isin(shuffled, pool)
            if where.any():
                left = shuffled[own & fresh] if (own & fresh).any() else shuffled[own]
                found[where] = np.resize(left, where.sum())
        return [self._train[place] for place in found.tolist()]

    def notes(self, num_steps: int) -> list[str]:
        """How often a run of so many steps meets the prompts of each cluster whose share is named; a
        sentence each."""
        shares = dict(zip(self._pools, self._shares.tolist(), strict=True))
        met = {name: shares[name] * num_steps * self._size for name in self._named}
        return [
            f"cluster {name} has {len(self._pools[name]):,} prompts to train on, and a share of "
            f"{shares[name]:.3g} of those of all steps, which is {count:,.0f} on average"
            for name, count in met.items()
        ]

    def _places(self, step: int) -> list[int]:
        names, drawn = list(self._pools), self._clusters(step)
        turns = self._before(step).tolist()
        places: list[int] = []
        for number in drawn.tolist():
            places.append(self._place(names[number], turns[number]))
            turns[number] += 1
        return places

    def _clusters(self, step: int) -> Places:
        """[P] number of the pool that each place of a step is drawn from."""
        random = np.random.default_rng(derive_seed(self._seed, "clusters", step))
        return self._drawn(random, self._size)

    def _drawn(self, random: np.random.Generator, num: int) -> Places:
        return random.choice(len(self._shares), num, p=self._shares)

    def _before(self, step: int) -> Places:
        """[K] examples of each pool that the steps before took."""
        if len(self._pools) == 1:
            return np.array([(step - 1) * self._size])
        if step < self._step:
            self._step, self._turns = 1, np.zeros(len(self._pools), np.int64)
        for earlier in range(self._step, step):
            self._turns += np.bincount(self._clusters(earlier), minlength=len(self._pools))
        self._step = step
        return self._turns

    def _place(self, name: str, turn: int) -> int:
        """Place among all training examples of the pool's one that comes after so many turns."""
        pool = self._pools[name]
        epoch, place = divmod(turn, len(pool))
        if self._shuffles.get(name, (-1,))[0] != epoch:
            purpose = f"shuffle {name}" if name else "shuffle"
            random = np.random.default_rng(derive_seed(self._seed, purpose, epoch))
            self._shuffles[name] = epoch, random.permutation(pool).tolist()
        return self._shuffles[name][1][place]


def _all_shares(pools: Mapping[str, Places], named: Mapping[str, float]) -> NDArray[np.float64]:
    """[K] share of each cluster: the one that is named, or its part of what these leave."""
    for name, share in named.items():
        if name not in pools:
            raise ConfigError(
                f"clustering.prompt_shares names cluster {name!r}, which there is not; expected some "
                f"of {', '.join(pools)}"
            )
        if share and not len(pools[name]):
            raise ConfigError(
                f"clustering.prompt_shares.{name} is {share:g}, and cluster {name!r} has no prompt to "
                "train on; expected 0"
            )
    left = 1 - sum(named.values())
    sizes = {name: len(pool) for name, pool in pools.items() if name not in named}
    total = sum(sizes.values())
    if not total and abs(left) > 1e-9:
        raise ConfigError(
            f"clustering.prompt_shares come to {1 - left:g} together, and no cluster with prompts is "
            "left for the rest; expected 1"
        )
    rest = {name: max(left, 0.0) * size / total if total else 0.0 for name, size in sizes.items()}
    shares = np.array([named.get(name, rest.get(name, 0.0)) for name in pools])
    return shares / shares.sum()
