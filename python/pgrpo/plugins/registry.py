"""Finds the installed rewards, clusterers and data sets, and builds the ones a config names.

Everything that can be wrong with a plugin before it is called is found here, at load. pluggy stays
inside this module.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, Literal, cast

import pluggy

from pgrpo.config import Section
from pgrpo.config.checks import check, suggest
from pgrpo.config.sections import ClusteringConfig, PluginSection, RewardConfig
from pgrpo.data import BUILT_IN, DataPluginConfig
from pgrpo.errors import ConfigError, PgrpoError, PluginError
from pgrpo.plugins import hookspecs
from pgrpo.plugins.hookspecs import Clusterer, DatasetLoader, Reward
from pgrpo.types import Dataset

Kind = Literal["reward", "clusterer", "data set"]

_TOLD = {"timeout_s"}
"""Settings of a reward's section that its plugin is told, where its `Config` has such a field."""

_SECTIONS: dict[Kind, type[PluginSection]] = {
    "reward": RewardConfig,
    "clusterer": ClusteringConfig,
    "data set": DataPluginConfig,
}

_TAKEN: dict[Kind, tuple[str, ...]] = {"data set": tuple(BUILT_IN)}
"""Names that are no plugin's."""


@dataclass(frozen=True, slots=True)
class Plugin:
    """What somebody registered, not yet built."""

    name: str
    """What a config calls it."""
    kind: Kind
    """What it is."""
    distribution: str
    """Who brought it: name and version of the installed distribution."""
    thing: Any = field(repr=False)
    """The registered function or class."""

    @property
    def config_class(self) -> type[Section] | None:
        """Class of the plugin's settings, or None where it takes none."""
        return getattr(self.thing, "Config", None)

    @property
    def doc(self) -> str:
        """First line of the docstring."""
        return (inspect.getdoc(self.thing) or "").partition("\n")[0]

    @property
    def settings(self) -> dict[str, str]:
        """Setting -> what it means and its default."""
        fields = self.config_class.model_fields if self.config_class else {}
        return {
            name: " ".join(
                [
                    " ".join((info.description or "").split()),
                    "Required." if info.is_required() else f"Default: {info.get_default()!r}.",
                ]
            ).strip()
            for name, info in fields.items()
            if name not in _TOLD
        }


@dataclass(frozen=True, slots=True)
class Registry:
    """The rewards, clusterers and data sets of this environment, by name; of data sets, those that
    plugins bring."""

    rewards: Mapping[str, Plugin]
    clusterers: Mapping[str, Plugin]
    datasets: Mapping[str, Plugin]

    def reward(self, section: RewardConfig, seed: int = 0) -> Reward:
        """Build the reward a config section names.

        Raises:
            PluginError: no such reward is installed, or its constructor failed.
            ConfigError: the section's settings are not the plugin's.
        """
        return cast(Reward, _build(self.rewards, "reward", section, seed))

    def clusterer(self, section: ClusteringConfig) -> Clusterer:
        """Build the clusterer a config section names; raises as `reward` does.

        The run's seed does not reach it: runs under several seeds are only comparable cluster by
        cluster if their clusters are the same.
        """
        return cast(Clusterer, _build(self.clusterers, "clusterer", section, None))

    def check(self, kind: Kind, section: PluginSection) -> None:
        """See that a config section names a plugin and has its settings, without building it; raises as
        `reward` does for these."""
        kinds = {"reward": self.rewards, "clusterer": self.clusterers, "data set": self.datasets}
        # A run gives rewards its seed.
        _configured(kinds[kind], kind, section, 0 if kind == "reward" else None)

    def dataset_loader(self, section: DataPluginConfig) -> DatasetLoader:
        """Build what loads the data set a config section names; raises as `reward` does."""
        return cast(DatasetLoader, _build(self.datasets, "data set", section, None))

    def dataset(self, section: DataPluginConfig) -> Dataset:
        """Load the data set a config section names.

        Raises:
            PluginError: as `reward`; or it failed, gave something else, or nothing to train on.
            ConfigError: the section's settings are not the plugin's.
        """
        load = self.dataset_loader(section)
        owner = f"data set {section.name!r} of {self.datasets[section.name].distribution}"
        try:
            dataset = cast(object, load())
        except PgrpoError:
            raise
        except Exception as error:
            raise PluginError(f"{owner} failed: {type(error).__name__}: {error}") from error
        if not isinstance(dataset, Dataset):
            kind = type(dataset).__name__
            raise PluginError(f"{owner} gave a {kind}; expected a pgrpo.types.Dataset")
        if not len(dataset.train):
            raise PluginError(f"{owner} gave no examples to train on")
        return dataset

    def listing(self) -> list[Plugin]:
        """All plugins, rewards first, each kind by name."""
        kinds = (self.rewards, self.clusterers, self.datasets)
        return [plugins[name] for plugins in kinds for name in sorted(plugins)]


def load_registry() -> Registry:
    """Load every plugin of the entry-point group `pgrpo`.

    Raises:
        PluginError: a plugin cannot be imported, implements an unknown hook, registers nothing or
            something unusable, or takes a name that another distribution has taken.
    """
    manager = pluggy.PluginManager("pgrpo")
    manager.add_hookspecs(hookspecs)
    entry_points = metadata.entry_points(group="pgrpo")
    for entry_point in sorted(entry_points, key=lambda e: (_distribution(e), e.name)):
        owner = f"{_distribution(entry_point)}, entry point {entry_point.name!r}"
        try:
            plugin = entry_point.load()
            manager.register(plugin, name=owner)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise PluginError(
                f"plugin {entry_point.value} ({owner}) failed to load: {reason}"
            ) from error
        if not manager.get_hookcallers(plugin):
            raise PluginError(
                f"plugin {entry_point.value} ({owner}) has no hook marked with "
                "pgrpo.plugins.hookimpl"
            )
    try:
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        owner = manager.get_name(error.plugin)
        known = [name for name in vars(hookspecs) if name.startswith("pgrpo_register_")]
        raise PluginError(f"{owner}: {error}; known hooks: {', '.join(known)}") from error

    rewards = _collect("reward", manager.hook.pgrpo_register_rewards.get_hookimpls())
    clusterers = _collect("clusterer", manager.hook.pgrpo_register_clusterers.get_hookimpls())
    datasets = _collect("data set", manager.hook.pgrpo_register_datasets.get_hookimpls())
    return Registry(rewards, clusterers, datasets)


def _distribution(entry_point: metadata.EntryPoint) -> str:
    dist = entry_point.dist
    return f"{dist.name} {dist.version}" if dist else "an unknown distribution"


def _collect(kind: Kind, hookimpls: Iterable[pluggy.HookImpl]) -> dict[str, Plugin]:
    """Call each implementation by itself, so that every registration is known by its owner."""
    found: dict[str, Plugin] = {}
    for hookimpl in hookimpls:
        owner = hookimpl.plugin_name.partition(",")[0]

        def register(name: str, thing: Any, owner: str = owner) -> None:
            plugin = Plugin(name, kind, owner, thing)
            complaint = _complaint(plugin)
            if complaint:
                raise PluginError(f"{kind} {name!r} of {owner} {complaint}")
            if name in _TAKEN.get(kind, ()):
                raise PluginError(f"{kind} {name!r} of {owner} has a name that pgrpo itself uses")
            if name in found:
                raise PluginError(
                    f"{kind} {name!r} is registered by both {found[name].distribution} and {owner}"
                )
            found[name] = plugin

        try:
            hookimpl.function(register)
        except PluginError:
            raise
        except Exception as error:
            raise PluginError(
                f"{hookimpl.plugin_name}: its hook pgrpo_register_{kind.replace(' ', '')}s raised "
                f"{type(error).__name__}: {error}"
            ) from error
    return found


def _complaint(plugin: Plugin) -> str | None:
    """What makes a registration unusable, or None."""
    if not isinstance(cast(object, plugin.name), str) or not plugin.name:
        return "needs a name that is a string, not empty"
    if plugin.kind == "clusterer":
        parts = ("fit", "assign", "state_dict", "load_state_dict")
        lacks = [part for part in parts if not callable(getattr(plugin.thing, part, None))]
        if not inspect.isclass(plugin.thing) or lacks:
            return f"must be a class with {', '.join(parts)}"
    elif not callable(plugin.thing):
        return f"is a {type(plugin.thing).__name__}; a {plugin.kind} is a function or a class"
    elif inspect.isclass(plugin.thing) and "__call__" not in dir(plugin.thing):
        return "is a class whose instances cannot be called"
    config_class = plugin.config_class
    if config_class is None:
        return None
    if not inspect.isclass(plugin.thing):
        return "has a Config but is no class that could be built with it"
    if not (
        inspect.isclass(cast(object, config_class))
        and issubclass(cast(type, config_class), Section)
    ):
        return "has a Config that is no subclass of pgrpo.config.Section"
    section = _SECTIONS[plugin.kind].model_fields.keys() - _TOLD
    taken = sorted(config_class.model_fields.keys() & section)
    if taken:
        return f"has a setting {taken[0]!r}, which every {plugin.kind} section has already"
    return None


def _configured(
    plugins: Mapping[str, Plugin], kind: Kind, section: PluginSection, seed: int | None
) -> tuple[Plugin, list[Section]]:
    """The plugin a section names, and what it is built with: its settings, if it has any."""
    plugin = plugins.get(section.name)
    if plugin is None:
        raise PluginError(
            f"there is no {kind} {section.name!r}"
            f"{suggest(section.name, [*plugins, *_TAKEN.get(kind, ())])}"
        )
    options, config_class, arguments = section.options, plugin.config_class, list[Section]()
    if config_class is None and options:
        raise ConfigError(f"{kind} {section.name!r} takes no settings, but got {min(options)!r}")
    if config_class is not None:
        if "seed" in config_class.model_fields and seed is not None:
            options.setdefault("seed", seed)
        options |= {
            name: getattr(section, name) for name in _TOLD & config_class.model_fields.keys()
        }
        arguments.append(check(config_class, options, f"{kind} {section.name!r}"))
    return plugin, arguments


def _build(
    plugins: Mapping[str, Plugin], kind: Kind, section: PluginSection, seed: int | None
) -> object:
    plugin, arguments = _configured(plugins, kind, section, seed)
    if not inspect.isclass(plugin.thing):
        return plugin.thing
    try:
        return plugin.thing(*arguments)
    except PgrpoError:
        raise
    except Exception as error:
        raise PluginError(
            f"{kind} {section.name!r} of {plugin.distribution} could not be built: "
            f"{type(error).__name__}: {error}"
        ) from error
