"""The config of a run: all sections together, read from TOML and checked before anything is loaded.

Unknown keys, wrong types, values out of range and settings that would have no effect in the chosen
mode are refused with one sentence that names the key; `pgrpo.config.toml.resolved_toml` writes the
tree back, complete and rerunnable.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from pydantic import Field, model_validator

from pgrpo.config import Section
from pgrpo.config.checks import check
from pgrpo.config.sections import (
    ClusteringConfig,
    EstimatorConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RewardConfig,
    RunConfig,
)
from pgrpo.config.toml import Tree, read_toml
from pgrpo.data import DataConfig, DataPluginConfig
from pgrpo.data.rows import matching
from pgrpo.errors import ConfigError
from pgrpo.normalizer import RULES
from pgrpo.rollout.people import NOT_OF_PEOPLE
from pgrpo.rollout.settings import GenerationConfig


class Config(Section):
    """A whole run."""

    run: RunConfig = RunConfig()
    model: ModelConfig
    data: DataConfig
    clustering: ClusteringConfig
    rewards: list[RewardConfig] = Field(min_length=1)
    evaluation: list[RewardConfig] = Field(default=[])
    """Rewards that score held-out completions, where they are not those of training."""
    generation: GenerationConfig = GenerationConfig()
    estimator: EstimatorConfig = EstimatorConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    parallel: ParallelConfig = ParallelConfig()

    def inactive(self) -> set[str]:
        return set() if self.loss.takes_estimator else {"estimator"}

    @property
    def rule(self) -> str:
        """What it learns by: the estimator's name, or the objective where that takes no estimator."""
        return self.estimator.name if self.loss.takes_estimator else self.loss.objective

    def resolved_loss(self) -> LossConfig:
        """`[loss]` with `importance = "auto"` as what it stands for with this sampling."""
        if self.loss.importance != "auto":
            return self.loss
        differs = self.generation.engine == "vllm" or self.generation.truncates
        is_corrected = differs and self.loss.old_logprobs == "recomputed"
        return self.loss.model_copy(update={"importance": "token" if is_corrected else "off"})

    def check_processes(self, size: int) -> None:
        """Refuse what so many processes cannot do.

        Raises:
            ConfigError: each would have a vLLM of its own, over several GPUs, or a single one would
                offload.
        """
        if self.parallel.offload and size == 1:
            raise ConfigError(
                "parallel.offload moves the parts of a model that several processes hold; there is one "
                "process"
            )
        vllm = self.generation.vllm
        within = self.generation.engine == "vllm" and not vllm.servers
        if within and size > 1 and vllm.tensor_parallel_size > 1:
            raise ConfigError(
                f"generation.vllm.tensor_parallel_size is {vllm.tensor_parallel_size}, and each of "
                f"{size} processes has a vLLM of its own; expected 1, or servers"
            )

    @model_validator(mode="after")
    def _check_across_sections(self) -> Config:
        groups, batches = self.run.prompts_per_step, self.optimizer.minibatches
        if batches > groups:
            raise ValueError(
                f"optimizer.minibatches is {batches}, more than the {groups} prompts of a step"
            )
        if self.run.pipeline == "one_step_off":
            if self.generation.engine == "transformers":
                raise ValueError(
                    "run.pipeline = 'one_step_off' needs an engine with weights of its own; "
                    "generation.engine must be 'vllm'"
                )
            if self.loss.importance == "off" and self.loss.old_logprobs == "recomputed":
                raise ValueError(
                    "run.pipeline = 'one_step_off' trains on rollouts of older weights; "
                    "loss.importance must not be 'off'"
                )
        if (
            (self.clustering.name, self.clustering.options.get("unseen")) == ("saved", "pooled")
            and self.loss.takes_estimator
            and self.estimator.history == "cluster"
            and "prior_count" not in self.estimator.inactive()
            and not self.estimator.prior_count
        ):
            raise ValueError(
                "clustering.unseen = 'pooled' has new people begin with the history of all clusters "
                "pooled, which estimator.prior_count weighs; it is 0, expected more"
            )
        for section in self.evaluation:
            if section.shift:
                raise ValueError(
                    f"evaluation reward {section.name!r} has a shift, which is of training alone; "
                    "expected none"
                )
        for section in self.rewards:
            if section.shift and section.shift.after >= self.run.num_steps:
                raise ValueError(
                    f"reward {section.name!r} shifts after step {section.shift.after} of "
                    f"{self.run.num_steps}; expected an earlier one"
                )
        if self.estimator.combine == "normalize_then_sum" and len(self.rewards) < 2:
            raise ValueError(
                "estimator.combine is 'normalize_then_sum', and there is one reward; expected at least "
                "two [[rewards]]"
            )
        if self.estimator.combine == "normalize_then_sum" and self.generation.overlong_buffer:
            raise ValueError(
                "generation.overlong_buffer takes a penalty off the sum of the rewards, which is not "
                "normalised with estimator.combine = 'normalize_then_sum'; expected 0"
            )
        if self.model.names_cluster and self.generation.long_prompts == "drop":
            raise ValueError(
                "generation.long_prompts = 'drop' counts tokens before there are clusters, which "
                "model.prompt_template names; expected 'fail'"
            )
        if self.clustering.soft:
            self._check_soft()
        if self.clustering.recluster_every:
            self._check_recluster()
        takes_estimator = self.loss.takes_estimator
        compares_within_groups = (
            RULES[self.rule].zero_alone if takes_estimator else self.rule == "dpo"
        )
        if self.run.resample and takes_estimator and not compares_within_groups:
            raise ValueError(
                f"run.resample has no effect under estimator {self.rule!r}, by which groups "
                "of equal rewards have a signal; expected 0"
            )
        if self.generation.group_size == 1 and compares_within_groups:
            raise ValueError(
                f"{'estimator' if takes_estimator else 'objective'} {self.rule!r} learns nothing from "
                "groups of one; generation.group_size must be at least 2"
            )
        return self

    def _check_soft(self) -> None:
        """Refuse what has no meaning where users belong to several clusters."""
        name = self.estimator.name
        if self.estimator.history == "user":
            raise ValueError(
                "estimator.history is 'user', where a person borrows from one cluster, and with "
                "clustering.soft = true belongs to several; expected false"
            )
        if self.estimator.frequency_weight and not RULES[name].reads_histories:
            raise ValueError(
                f"estimator.frequency_weight reads shares of clusters, of which estimator {name!r} is "
                "told nothing with clustering.soft = true; expected 0"
            )
        for section in self.rewards:
            if section.clusters:
                raise ValueError(
                    f"reward {section.name!r} is for some clusters, and with clustering.soft = true a "
                    "history would mix its rewards with those of others; expected no clusters"
                )

    def _check_recluster(self) -> None:
        """Refuse what cannot go on where users are divided again."""
        every = f"clustering.recluster_every is {self.clustering.recluster_every}"
        estimator = self.estimator
        if self.clustering.name == "saved":
            raise ValueError(
                f"{every}, and people of clustering.name = 'saved' stay in the clusters that were "
                "saved; expected 0"
            )
        if estimator.name in NOT_OF_PEOPLE:
            raise ValueError(
                f"{every}, and estimator {estimator.name!r} keeps sums that cannot be told apart by "
                "users; expected 0"
            )
        if estimator.forgetting < 1:
            raise ValueError(
                f"{every}, and with estimator.forgetting = {estimator.forgetting:g} what is left of a "
                "reward depends on whose came after it; expected 1"
            )
        if estimator.history == "user" and estimator.prior_count:
            raise ValueError(
                f"{every}, and with estimator.history = 'user' people borrow from clusters that others "
                "have been in; expected estimator.prior_count = 0"
            )
        if self.run.pipeline == "one_step_off":
            raise ValueError(
                f"{every}, and with run.pipeline = 'one_step_off' the next step's rollouts are made "
                "by the clusters before; expected 'synchronous'"
            )
        for section in self.rewards:
            if section.shift:
                raise ValueError(
                    f"{every}, and reward {section.name!r} shifts, so that people's rewards tell when "
                    "they were asked; expected no shift"
                )
        for section in (*self.rewards, *self.evaluation):
            if section.clusters:
                raise ValueError(
                    f"{every}, and reward {section.name!r} is for some clusters, whose people change; "
                    "expected no clusters"
                )


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file, apply `section.key=value` overrides, and check the whole.

    A value is read as TOML (`8`, `true`, `[1, 2]`) and otherwise taken as a string. Relative
    data paths and the relative folder of a model or a reward model are taken relative to the config
    file when they exist there, else to the working folder; the config holds where they are.

    Raises:
        ConfigError: the file is missing, is not TOML, or does not describe a run.
    """
    path = Path(path)
    tree = read_toml(path, overrides)
    for table, keys in _tables_with_paths(tree):
        for key in keys if isinstance(table, dict) else ():
            value = cast(Tree, table).get(key)
            if isinstance(value, str):
                cast(Tree, table)[key] = _place(value, path.parent)
            elif isinstance(value, list):
                named = cast(list[Any], value)
                cast(Tree, table)[key] = [
                    _place(each, path.parent) if isinstance(each, str) else each for each in named
                ]
    return parse_config(tree, source=str(path))


def _tables_with_paths(tree: Tree) -> Iterator[tuple[Any, Sequence[str]]]:
    """Tables in which something may lie beside the config file, and the keys that tell where."""
    yield tree.get("data"), ("path", "evaluation_path")
    yield tree.get("model"), ("name",)
    clustering: Any = tree.get("clustering")
    if isinstance(clustering, dict) and cast(Tree, clustering).get("name") == "saved":
        yield clustering, ("path",)
    for name in ("rewards", "evaluation"):
        tables: Any = tree.get(name)
        for table in cast(list[Any], tables) if isinstance(tables, list) else ():
            if isinstance(table, dict) and cast(Tree, table).get("name") == "reward_model":
                yield table, ("model",)


def _place(value: str, folder: Path) -> str:
    """Where a path or pattern leads, seen from a folder or from the working folder; the value as it is
    where it leads nowhere, or is none."""
    if value in ("", "tiny"):
        return value
    for place in (folder / value, Path(value)):
        if place.exists() or matching(str(place)):
            return str(place.resolve())
    return value


def parse_config(tree: Mapping[str, Any], source: str = "config") -> Config:
    """Check a tree of plain values and make the config of it.

    Raises:
        ConfigError: names the key, the value and what was expected, with a suggestion for a
            misspelt key or name of a data set.
    """
    config = check(Config, tree, source)
    if isinstance(config.data, DataPluginConfig):
        _check_data_plugin(config.data, source)
    return config


def _check_data_plugin(section: DataPluginConfig, source: str) -> None:
    # Here, for it takes a second, which runs on data sets of our own save.
    from pgrpo.plugins.registry import load_registry

    registry = load_registry()
    if section.name not in registry.datasets:
        hint = registry.hint("data set", section.name)
        raise ConfigError(f"{source}: data.name is {section.name!r}{hint}")
    registry.dataset_loader(section)
