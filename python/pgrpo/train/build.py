"""A run put together: every part of it is made here, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from pgrpo.clusters.division import Division, divide
from pgrpo.clusters.membership import Membership
from pgrpo.clusters.saved import other_data
from pgrpo.config.sections import RewardConfig
from pgrpo.data import DataPluginConfig, load_dataset
from pgrpo.errors import CheckpointError, ConfigError, DataError
from pgrpo.model.language_model import LanguageModel, load_language_model
from pgrpo.model.tokenizer import load_tokenizer
from pgrpo.on_ray import connected
from pgrpo.plugins.hookspecs import Reward
from pgrpo.plugins.registry import Registry, load_registry
from pgrpo.rewards.on_ray import RewardOnRay
from pgrpo.rewards.pairwise import digest
from pgrpo.rewards.scorer import Scorer
from pgrpo.rollout.collector import Collector
from pgrpo.rollout.engines import Engine, make_engine
from pgrpo.rollout.order import PromptOrder
from pgrpo.rollout.prompts import PromptBuilder, require_template, token_ids
from pgrpo.rollout.seeds import derive_seed
from pgrpo.runs.config import Config
from pgrpo.train.checkpoint import Checkpoint
from pgrpo.train.parallel import SINGLE, Ranks
from pgrpo.train.policy import Policy
from pgrpo.types import Dataset, Example

_NUM_DIGESTED = 500
"""So many that a change of the words is found, and so few that large data take no time."""


class Assembly:
    """The parts of a run, each made when it is first asked for.

    It is a context manager: whatever was made by then is closed at its end, the latest first.

    Args:
        config: of the run.
        checkpoint: what the parts go on from; without one they begin anew.
        note: is told what takes long.
        ranks: the processes of the run.
    """

    def __init__(
        self,
        config: Config,
        checkpoint: Checkpoint | None = None,
        note: Callable[[str], None] = lambda _: None,
        ranks: Ranks = SINGLE,
    ) -> None:
        self.ranks = ranks
        self.config = config
        self.checkpoint = checkpoint
        self.state: dict[str, Any] | None = checkpoint and checkpoint.state()
        self._note = note
        self._open = ExitStack()
        if config.run.num_threads:
            torch.set_num_threads(config.run.num_threads)

    def __enter__(self) -> Assembly:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    @cached_property
    def registry(self) -> Registry:
        """The plugins that are installed."""
        return load_registry()

    @cached_property
    def dataset(self) -> Dataset:
        """What prompts are made of; without those that are too long, where they are to be dropped.

        Raises:
            CheckpointError: a run goes on from a checkpoint, or is measured, and its data have changed.
        """
        if self.state and self.state["data"] != self.data_digest:
            raise CheckpointError(
                f"the data set {self.config.data.name} gives other prompts, choices or columns than "
                "those the run was trained with; expected the same. Put back the files it is made of, "
                "or begin another run on them"
            )
        dataset = self.without_long_prompts(self._loaded)
        for note in dataset.notes:
            self._note(note)
        return dataset

    def without_long_prompts(self, dataset: Dataset) -> Dataset:
        """A data set without prompts that are too long, where they are to be dropped.

        Raises:
            DataError: none to train on is left.
            ModelError: prompts are to be chats, and the model has no template.
        """
        if self.config.generation.long_prompts == "fail":
            return dataset
        self._note("counting the tokens of all prompts")
        return _without_long_prompts(dataset, self.fits, self.config)

    def fits(self, example: Example) -> bool:
        """Whether its prompt has no more tokens than `generation.max_prompt_tokens`.

        Raises:
            ModelError: prompts are to be chats, and the model has no template.
        """
        require_template(self.tokenizer, self.config.model)
        ids = token_ids(example, self.tokenizer, self.config.model)
        return len(ids) <= self.config.generation.max_prompt_tokens

    @cached_property
    def _loaded(self) -> Dataset:
        data = self.config.data
        self._note(f"loading data set {data.name}")
        of_plugin = isinstance(data, DataPluginConfig)
        return self.registry.dataset(data) if of_plugin else load_dataset(data)

    @cached_property
    def data_digest(self) -> str:
        """SHA-256 of the data, by which a checkpoint tells whether they are still the same: of how many
        examples there are to train on and held out, and of `_NUM_DIGESTED` of each, evenly spaced."""

        def told(examples: Sequence[Example]) -> list[Any]:
            apart = -(-len(examples) // _NUM_DIGESTED) or 1
            return [len(examples)] + [
                [each.user, each.text, each.choices, each.turns, each.columns]
                for each in examples[::apart]
            ]

        return digest([told(self._loaded.train), told(self._loaded.evaluation)])

    @cached_property
    def members(self) -> Membership:
        """Every user's cluster. One process fits, and tells the others what it has found."""
        section, dataset = self.config.clustering, self.dataset
        saved = self.state and self.state["clusterer"]
        if self.state and self.state["assignment"] is not None:
            # Whom users were divided by then is not known any more.
            return Membership(Division.from_json(self.state["clusterer"], self.state["assignment"]))

        def fit() -> Division:
            clusterer = self.registry.clusterer(section)
            return divide(clusterer, dataset, saved, soft=section.soft)

        return Membership(self.ranks.first(fit))

    @cached_property
    def order(self) -> PromptOrder:
        """The training examples of each step."""
        shares = self.config.clustering.prompt_shares
        return PromptOrder(self.config.run, self.dataset, self.members, shares)

    @cached_property
    def new_people(self) -> frozenset[str] | None:
        """Users whom saved clusters do not know; None where clusters are not saved ones."""
        if self.config.clustering.name != "saved":
            return None
        known = self.members.state_dict()["assignment"]
        assert isinstance(known, dict)
        return frozenset(user for user in self.dataset.users if user not in known)

    @cached_property
    def other_data(self) -> str | None:
        """What is to be known of saved clusters that were found in other data; None where there are
        none such."""
        if self.config.clustering.name != "saved":
            return None
        return other_data(self.members.state_dict(), self.config.data.model_dump(mode="json"))

    @cached_property
    def scorer(self) -> Scorer:
        """Rewards of training."""
        return self.scorer_of(self.config.rewards)

    @cached_property
    def held_out_scorer(self) -> Scorer:
        """Rewards of held-out completions: those of training, unless the config has others."""
        return self.scorer_of(self.config.evaluation) if self.config.evaluation else self.scorer

    @cached_property
    def model(self) -> LanguageModel:
        """The model that is trained."""
        self._note(f"loading model {self.config.model.name}")
        return self._load_model(self.checkpoint)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The model's; without its weights, where they were not asked for yet."""
        if "model" in vars(self):
            return self.model.tokenizer
        return load_tokenizer(self.config.model, self._loaded.vocabulary)

    @cached_property
    def builder(self) -> PromptBuilder:
        """Makes prompts of examples."""
        config = self.config
        return PromptBuilder(self.tokenizer, config.model, config.generation, self.members)

    @cached_property
    def policy(self) -> Policy:
        """The model under its optimizer."""
        config = self.config
        policy = Policy(
            self.model,
            config.resolved_loss(),
            config.optimizer,
            num_steps=config.run.num_steps,
            temperature=config.generation.temperature,
            max_new_tokens=config.generation.max_new_tokens,
            reference=self._load_reference(),
            ranks=self.ranks,
        )
        if self.checkpoint is not None:
            self.checkpoint.restore_optimizer(policy)
        return policy

    @cached_property
    def engine(self) -> Engine:
        """Generates; it has no weights before its first `sync`."""
        config = self.config
        engine = make_engine(
            config.generation,
            self.model,
            config.model,
            self.ranks,
            may_sleep=config.run.pipeline == "synchronous",
        )
        return self._open.enter_context(closing(engine))

    @cached_property
    def collector(self) -> Collector:
        """Makes each step's batch."""
        config = self.config
        return Collector(
            config.run,
            config.clustering,
            config.estimator,
            config.loss,
            config.generation,
            self.dataset,
            self.order,
            self.members,
            self.builder,
            self.engine,
            self.scorer,
            self.ranks.beside(),
        )

    def scorer_of(self, sections: Sequence[RewardConfig]) -> Scorer:
        """Any rewards, as these parts of a run would use them.

        Raises:
            ConfigError: there is no such cluster as one is for, or none is for a cluster.
            PluginError: one cannot be built.
        """
        _check_clusters(sections, self.members.about)
        rewards = [(section, self._reward(section)) for section in sections]
        return self._open.enter_context(Scorer(rewards))

    def _reward(self, section: RewardConfig) -> Reward:
        seed = self.config.run.seed
        if section.workers == "threads":
            return self.registry.reward(section, seed)
        self._note(f"starting reward {section.name} on Ray")
        self._open.enter_context(connected(None))
        return self._open.enter_context(closing(RewardOnRay(section, seed)))

    def _load_model(self, checkpoint: Checkpoint | None) -> LanguageModel:
        return load_language_model(
            self.config.model,
            vocabulary=self._loaded.vocabulary,
            seed=derive_seed(self.config.run.seed, "weights"),
            weights=checkpoint.model if checkpoint else None,
            mesh=self.ranks.mesh,
            offload=self.config.parallel.offload,
        )

    def _load_reference(self) -> LanguageModel | None:
        """The untrained model, where the loss needs it beside the trained one."""
        if not self.config.loss.has_reference or self.config.model.lora:
            return None
        reference = self._load_model(None)
        reference.model.requires_grad_(False)
        return reference


def _without_long_prompts(
    dataset: Dataset, fits: Callable[[Example], bool], config: Config
) -> Dataset:
    limit = config.generation.max_prompt_tokens
    train = [example for example in dataset.train if fits(example)]
    evaluation = [example for example in dataset.evaluation if fits(example)]
    if not train:
        raise DataError(
            f"all {len(dataset.train)} prompts to train on are longer than "
            f"generation.max_prompt_tokens = {limit}"
        )
    dropped = len(dataset.train) - len(train), len(dataset.evaluation) - len(evaluation)
    note = (
        f"prompts of more than {limit:,} tokens were left out: {dropped[0]:,} of "
        f"{len(dataset.train):,} to train on, {dropped[1]:,} of {len(dataset.evaluation):,} held out"
    )
    notes = (*dataset.notes, note) if any(dropped) else dataset.notes
    met = {example.user for example in (*train, *evaluation)}
    return replace(
        dataset,
        train=train,
        evaluation=evaluation,
        users={user: features for user, features in dataset.users.items() if user in met},
        observed=[example for example in dataset.observed if example.user in met],
        notes=notes,
    )


def _check_clusters(sections: Sequence[RewardConfig], clusters: Collection[str]) -> None:
    """Refuse rewards for clusters that there are not, and clusters that no reward is for."""
    unscored = set(clusters)
    for section in sections:
        for named in map(str, section.clusters):
            if named not in clusters:
                raise ConfigError(
                    f"reward {section.name!r} is for cluster {named!r}, which there is not; expected "
                    f"some of {', '.join(clusters)}"
                )
        unscored -= set(map(str, section.clusters)) or unscored
    if unscored:
        raise ConfigError(
            f"no reward is for cluster {', '.join(sorted(unscored))}; expected one for each of "
            f"{', '.join(clusters)}"
        )
