"""The loops that pgrpo is switched on in, each behind the same four methods.

A new integration is one class here and its line in `FRAMEWORKS`; `test_conformance.py` does the rest.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Protocol
from zlib import crc32

import torch

from pgrpo import ClusterNormalizer

SIZE = 4
"""Rollouts of a group."""

Rewards = Sequence[Sequence[float | None]]
"""[N, R], None for those that are missing; groups of `SIZE` one after another."""


class Framework(Protocol):
    """A real loop around a normalizer, seen from outside."""

    repeats: ClassVar[bool] = False
    """Whether a resumed run may begin with the batch that the one before it ended in."""
    evaluates: ClassVar[bool] = True
    """Whether it computes advantages in evaluation as well."""
    several: ClassVar[bool] = True
    """Whether it has several rewards of a rollout."""
    by_group: ClassVar[bool] = False
    """Whether each group is a call of the normalizer, not each batch."""

    def advantages(
        self, rewards: Rewards, clusters: Sequence[int | str], training: bool = True
    ) -> list[float]:
        """[N] what the loop would weigh its rollouts by."""
        ...

    def save(self, folder: Path) -> None:
        """Write a checkpoint, as the framework does."""
        ...

    def load(self, folder: Path) -> None:
        """Go on from it."""
        ...


class TorchLoop(Framework):
    """A loop of one's own, with `pgrpo.integrations.torch`."""

    def __init__(self, normalizer: ClusterNormalizer, folder: Path) -> None:
        self.normalizer = normalizer

    def advantages(
        self, rewards: Rewards, clusters: Sequence[int | str], training: bool = True
    ) -> list[float]:
        from pgrpo.integrations.torch import advantages

        values = torch.tensor([[math.nan if r is None else r for r in row] for row in rewards])
        rows = values.reshape(-1, SIZE, values.shape[-1])
        if not self.normalizer.options.reward_weights:
            rows = rows[..., 0]
        ids = [list(clusters[i : i + SIZE]) for i in range(0, len(clusters), SIZE)]
        return advantages(self.normalizer, rows, ids, training=training).flatten().tolist()

    def save(self, folder: Path) -> None:
        torch.save({"histories": self.normalizer.state_dict()}, folder / "own.pt")

    def load(self, folder: Path) -> None:
        self.normalizer.load_state_dict(torch.load(folder / "own.pt")["histories"])


class Trl(Framework):
    """TRL's GRPOTrainer on a tiny model; completions are real, rewards are those of the test."""

    repeats: ClassVar[bool] = True

    def __init__(self, normalizer: ClusterNormalizer, folder: Path) -> None:
        import tiny_trl

        weights = list(normalizer.options.reward_weights or [1.0])
        names = normalizer.options.names() or ["reward"]
        self.given: list[list[float | None]] = []

        def reward(index: int) -> Callable[..., list[float | None]]:
            def score(completions: Any, **_: Any) -> list[float | None]:
                return [row[index] for row in self.given]

            score.__name__ = names[index]
            return score

        self.trainer = tiny_trl.trainer(
            folder,
            normalizer,
            [reward(index) for index in range(len(weights))],
            reward_weights=weights,
            multi_objective_aggregation=normalizer.options.combine,
            per_device_train_batch_size=SIZE,
            generation_batch_size=16 * SIZE,
        )
        self.trainer.create_optimizer_and_scheduler(1)

    def advantages(
        self, rewards: Rewards, clusters: Sequence[int | str], training: bool = True
    ) -> list[float]:
        self.given = [list(row) for row in rewards]
        # Other rewards are those of other prompts.
        first = crc32(repr(self.given).encode()) % 1000
        rows = [
            {"prompt": f"w{(first + i // SIZE) // 30} w{(first + i // SIZE) % 30}", "cluster_id": c}
            for i, c in enumerate(clusters)
        ]
        self.trainer.model.train(training)
        found = self.trainer._generate_and_score_completions(rows)["advantages"].tolist()
        logged = list(self.trainer._logs["advantages"])[-len(found) :]
        assert torch.allclose(torch.tensor(logged), torch.tensor(found))
        return found

    def save(self, folder: Path) -> None:
        self.trainer._save_optimizer_and_scheduler(str(folder))

    def load(self, folder: Path) -> None:
        self.trainer._load_optimizer_and_scheduler(str(folder))


class Verl(Framework):
    """verl's trainer on a local Ray, from its queue to its queue."""

    evaluates = False
    several = False

    def __init__(self, normalizer: ClusterNormalizer, folder: Path) -> None:
        from with_verl import real_verl

        self.real = real_verl
        self.trainer = real_verl.trainer(folder, normalizer)

    def advantages(
        self, rewards: Rewards, clusters: Sequence[int | str], training: bool = True
    ) -> list[float]:
        batch = self.real.put([row[0] for row in rewards], clusters, SIZE)
        self.trainer._compute_advantage(batch, {})
        return [row[0] for row in self.real.taken(batch)]

    def save(self, folder: Path) -> None:
        self.trainer.config.trainer.default_local_dir = str(folder)
        self.trainer.global_steps = 1
        self.trainer._save_checkpoint()

    def load(self, folder: Path) -> None:
        self.trainer.config.trainer.default_local_dir = str(folder)
        self.trainer._load_checkpoint()


class Torchrl(Framework):
    """torchrl's transform; a rollout is a trajectory of one step."""

    evaluates = False
    several = False
    by_group = True

    def __init__(self, normalizer: ClusterNormalizer, folder: Path) -> None:
        from pgrpo.integrations.torchrl import ClusterAdvantage

        self.transform: Any = ClusterAdvantage(normalizer, SIZE, prompt_key="group")
        self.groups = 0

    def advantages(
        self, rewards: Rewards, clusters: Sequence[int | str], training: bool = True
    ) -> list[float]:
        tensordict: Any = import_module("tensordict")

        found: list[float] = []
        for place, (reward, cluster) in enumerate(zip(rewards, clusters, strict=True)):
            value = math.nan if reward[0] is None else reward[0]
            step = tensordict.TensorDict(
                {
                    "group": torch.tensor([self.groups + place // SIZE]),
                    "cluster_id": tensordict.NonTensorData(cluster, batch_size=[1]),
                    "next": tensordict.TensorDict(
                        {"reward": torch.tensor([[value]]), "done": torch.tensor([[True]])}, [1]
                    ),
                },
                [1],
            )
            if (out := self.transform.inv(step)) is not None:
                found += out["advantage"].flatten().tolist()
        self.groups += len(rewards) // SIZE
        return found

    def save(self, folder: Path) -> None:
        torch.save(self.transform.state_dict(), folder / "transform.pt")

    def load(self, folder: Path) -> None:
        self.transform.load_state_dict(torch.load(folder / "transform.pt"))


class Swift(Framework):
    """swift's GRPO trainer on a tiny model; completions are real, rewards are those of the test."""

    repeats: ClassVar[bool] = True

    def __init__(self, normalizer: ClusterNormalizer, folder: Path) -> None:
        from with_swift import real_swift

        names = normalizer.options.names() or ["reward"]
        self.given = real_swift.Given(names)
        self.trainer = real_swift.trainer(
            folder,
            normalizer,
            reward_funcs=names,
            reward_weights=list(normalizer.options.reward_weights or [1.0]),
            scale_rewards="gdpo" if normalizer.options.combine == "normalize_then_sum" else "group",
            per_device_train_batch_size=SIZE,
            steps_per_generation=1,
        )
        self.trainer.create_optimizer_and_scheduler(1)

    def advantages(
        self, rewards: Rewards, clusters: Sequence[int | str], training: bool = True
    ) -> list[float]:
        self.given.rows = [list(row) for row in rewards]
        # Other rewards are those of other prompts.
        first = crc32(repr(self.given.rows).encode()) % 1000
        words = [
            f"w{(first + i // SIZE) // 30} w{(first + i // SIZE) % 30}" for i in range(len(rewards))
        ]
        rows = [
            {"messages": [{"role": "user", "content": text}], "cluster_id": cluster}
            for text, cluster in zip(words, clusters, strict=True)
        ]
        self.trainer.model.train(training)
        (micro_batch,) = self.trainer._generate_and_score_completions(rows)
        batch = micro_batch["grpo_batch"]
        found: list[float] = []
        for row, mask in zip(batch.advantages, batch.completion_mask, strict=True):
            (of_all_tokens,) = set(row[mask.bool()].tolist())
            found.append(of_all_tokens)
        logged = list(self.trainer._logs["advantages"])[-len(found) :]
        assert logged == found[-len(logged) :]
        return found

    def save(self, folder: Path) -> None:
        self.trainer._save_optimizer_and_scheduler(str(folder))

    def load(self, folder: Path) -> None:
        self.trainer._load_optimizer_and_scheduler(str(folder))


class Art(Framework):
    """ART's local backend, with trajectories of one token and without the process that trains."""

    evaluates = False
    several = False

    def __init__(self, normalizer: ClusterNormalizer, folder: Path) -> None:
        from with_art import real_art

        from pgrpo.integrations.art import personalize

        self.groups = real_art.groups
        kind = personalize(real_art.LocalBackend)
        self.loop = real_art.Loop(folder, kind, normalizer=normalizer)

    def advantages(
        self, rewards: Rewards, clusters: Sequence[int | str], training: bool = True
    ) -> list[float]:
        # What has no advantage is not trained on.
        found = self.loop.advantages(self.groups([row[0] for row in rewards], clusters, SIZE))
        return [found.get(number, 0.0) for number in range(len(rewards))]

    def save(self, folder: Path) -> None:
        self.loop.save(folder)

    def load(self, folder: Path) -> None:
        self.loop.load(folder)


class Areal(Framework):
    """AReaL's FSDP actor on a tiny model."""

    evaluates = False
    several = False

    def __init__(self, normalizer: ClusterNormalizer, folder: Path) -> None:
        from with_areal import real_areal

        self.real = real_areal
        self.actor = real_areal.actor(folder, normalizer)

    def advantages(
        self, rewards: Rewards, clusters: Sequence[int | str], training: bool = True
    ) -> list[float]:
        batch = self.real.groups([row[0] for row in rewards], clusters, SIZE)
        return self.real.advantages(self.actor, batch)

    def save(self, folder: Path) -> None:
        self.actor.save(self.real.meta(folder))
        (folder / "version").write_text(str(self.actor.get_version()))

    def load(self, folder: Path) -> None:
        self.actor.load(self.real.meta(folder))
        self.actor.set_version(int((folder / "version").read_text()))


class Openrlhf(Framework):
    """OpenRLHF's trainer, from its generator's samples to its experiences; its policy has no weights."""

    evaluates = False
    several = False

    def __init__(self, normalizer: ClusterNormalizer, folder: Path) -> None:
        from with_openrlhf import real_openrlhf

        self.real = real_openrlhf
        self.trainer = real_openrlhf.trainer(folder, normalizer)

    def advantages(
        self, rewards: Rewards, clusters: Sequence[int | str], training: bool = True
    ) -> list[float]:
        labels = [{"cluster_id": cluster} for cluster in clusters]
        samples = self.real.samples(self.trainer, [row[0] for row in rewards], labels, SIZE)
        return self.real.advantages(self.trainer.experience_maker.make_experience_batch(samples))

    def save(self, folder: Path) -> None:
        self.trainer.args.ckpt.path = str(folder)
        self.real.begin(self.trainer)
        self.real.save(self.trainer, 1)

    def load(self, folder: Path) -> None:
        self.trainer.args.ckpt.path, self.trainer.args.ckpt.load_enable = str(folder), True
        self.real.begin(self.trainer)


class Skyrl(Framework):
    """SkyRL's trainer, from rows of its data set to its batches; its workers have no weights."""

    evaluates = False
    several = False

    def __init__(self, normalizer: ClusterNormalizer, folder: Path) -> None:
        from with_skyrl import real_skyrl

        self.real = real_skyrl
        self.trainer = real_skyrl.trainer(folder)
        self.trainer.histories.normalizer = normalizer

    def advantages(
        self, rewards: Rewards, clusters: Sequence[int | str], training: bool = True
    ) -> list[float]:
        self.real.give(self.trainer, clusters[::SIZE])
        rows = range(len(clusters) // SIZE)
        return self.real.advantages(
            self.real.computed(self.trainer, [row[0] for row in rewards], rows)
        )

    def save(self, folder: Path) -> None:
        self.trainer.cfg.trainer.ckpt_path = str(folder)
        self.trainer.global_step = 1
        self.trainer.save_checkpoints()

    def load(self, folder: Path) -> None:
        self.trainer.cfg.trainer.ckpt_path = str(folder)
        self.trainer.load_checkpoints()


FRAMEWORKS: dict[str, Callable[[ClusterNormalizer, Path], Framework]] = {
    "torch": TorchLoop,
    "trl": Trl,
    "verl": Verl,
    "torchrl": Torchrl,
    "swift": Swift,
    "art": Art,
    "areal": Areal,
    "openrlhf": Openrlhf,
    "skyrl": Skyrl,
}
"""By the name of the integration."""

CHOSEN = os.environ.get("PGRPO_FRAMEWORK", "")
"""The one framework whose environment this is; by default those that the development tools bring."""

HERE = [CHOSEN] if CHOSEN else ["torch", "trl"]

MIXED = CHOSEN != "skyrl"
"""Whether rollouts of a group may be of several clusters; SkyRL has clusters of rows, and groups as well."""
