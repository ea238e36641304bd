"""Finds the installed rewards, clusterers and data sets, and builds the ones a config names.

Everything that can be wrong with a plugin before it is called is found here, at load, and is an error
of that plugin alone: whoever asks for what another one brings does not meet it. pluggy stays inside
this module.
"""

from __future__ import annotations

import inspect
import logging
import os
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, Literal, cast

import pluggy
from pydantic.fields import FieldInfo

from pgrpo.config import Section
from pgrpo.config.checks import check, suggest
from pgrpo.config.sections import ClusteringConfig, PluginSection, RewardConfig
from pgrpo.data import BUILT_IN, DataPluginConfig
from pgrpo.errors import ConfigError, PgrpoError, PluginError
from pgrpo.plugins import hookspecs
from pgrpo.plugins.hookspecs import Clusterer, DatasetLoader, Reward
from pgrpo.types import Dataset

_log = logging.getLogger("pgrpo")

Kind = Literal["reward", "clusterer", "data set"]

LOAD_PLUGINS = "PGRPO_LOAD_PLUGINS"
"""The environment variable that limits what is loaded beside the built-in plugins."""

_HOOKS: dict[Kind, str] = {
    "reward": "pgrpo_register_rewards",
    "clusterer": "pgrpo_register_clusterers",
    "data set": "pgrpo_register_datasets",
}

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
    entry_point: str
    """Name of the entry point by which it came."""
    thing: Any = field(repr=False)
    """The registered function or class."""

    @property
    def config_class(self) -> type[Section] | None:
        """Class of the plugin's settings, or None where it takes none."""
        return getattr(self.thing, "Config", None)

    def takes(self, setting: str) -> bool:
        """Whether a table that names it may have such a key."""
        taken = set(_SECTIONS[self.kind].model_fields)
        if self.config_class is None:
            return setting in taken
        anything = self.config_class.model_config.get("extra") == "allow"
        return anything or setting in taken | self.config_class.model_fields.keys()

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
                    "Required." if info.is_required() else _default(info),
                ]
            ).strip()
            for name, info in fields.items()
            if name not in _TOLD
        }

    @property
    def required(self) -> dict[str, str]:
        """Those of its settings that only a table can tell, and what they mean."""
        fields = self.config_class.model_fields if self.config_class else {}
        by_the_run = {"seed"} if self.kind == "reward" else set[str]()
        return {
            name: meaning
            for name, meaning in self.settings.items()
            if fields[name].is_required() and name not in by_the_run
        }


def _default(info: FieldInfo) -> str:
    # What a factory makes may differ from time to time, and may depend on other settings.
    return "Optional." if info.default_factory else f"Default: {info.get_default()!r}."


@dataclass(frozen=True, slots=True)
class Broken:
    """What is installed and cannot be used."""

    distribution: str
    """Who brought it, as of a `Plugin`."""
    entry_point: str
    """Name of the entry point by which it came."""
    error: str
    """One sentence."""
    kind: Kind | None = None
    """What it is, where the plugin works but for one name; None where nothing of the entry point is
    there."""
    name: str | None = None
    """That name, or None."""

    @property
    def owner(self) -> str:
        """Where it comes from."""
        return f"{self.distribution}, entry point {self.entry_point!r}"


@dataclass(frozen=True, slots=True)
class Registry:
    """The rewards, clusterers and data sets of this environment, by name; of data sets, those that
    plugins bring."""

    rewards: Mapping[str, Plugin]
    clusterers: Mapping[str, Plugin]
    datasets: Mapping[str, Plugin]
    broken: Sequence[Broken] = ()
    """What should be there and is not."""
    left_out: Sequence[str] = ()
    """Distributions of which the environment variable leaves an entry point out."""

    def reward(self, section: RewardConfig, seed: int = 0) -> Reward:
        """Build the reward a config section names.

        Raises:
            PluginError: no such reward is installed, or its constructor failed.
            ConfigError: the section's settings are not the plugin's.
        """
        return cast(Reward, self._build("reward", section, seed))

    def clusterer(self, section: ClusteringConfig) -> Clusterer:
        """Build the clusterer a config section names; raises as `reward` does.

        The run's seed does not reach it: runs under several seeds are only comparable cluster by
        cluster if their clusters are the same.
        """
        return cast(Clusterer, self._build("clusterer", section, None))

    def check(self, kind: Kind, section: PluginSection) -> None:
        """See that a config section names a plugin and has its settings, without building it; raises as
        `reward` does for these."""
        # A run gives rewards its seed.
        self._configured(kind, section, 0 if kind == "reward" else None)

    def dataset_loader(self, section: DataPluginConfig) -> DatasetLoader:
        """Build what loads the data set a config section names; raises as `reward` does."""
        return cast(DatasetLoader, self._build("data set", section, None))

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
        return [plugins[name] for plugins in self._kinds.values() for name in sorted(plugins)]

    def named(self, name: str) -> tuple[list[Plugin], list[Broken]]:
        """What is called so, of whatever kind, and all that a distribution of that name brings; and
        what of both cannot be used.

        Raises:
            PluginError: there is none of it.
        """

        def is_meant(one: Plugin | Broken) -> bool:
            return name == one.name or canonical(name) == _project(one.distribution)

        found = list(filter(is_meant, self.listing())), list(filter(is_meant, self.broken))
        if not any(found):
            raise PluginError(f"there is no plugin {name!r}{self.hint(None, name)}")
        return found

    def hint(self, kind: Kind | None, name: str) -> str:
        """What may be behind a name that is not there, as the end of a sentence: a misspelt word, or a
        plugin that would have brought it and is broken. Without a kind the name may be anybody's, or a
        distribution's."""
        clashes = [one.error for one in self.broken if (one.kind, one.name) == (kind, name)]
        if clashes:
            return f"; {clashes[0]}"
        broken = [f"plugin {b.owner} is broken: {b.error}" for b in self.broken if b.name is None]
        if self.left_out:
            broken.append(f"{LOAD_PLUGINS} leaves out {', '.join(self.left_out)}")
        if kind is None:
            known = {
                word for one in self.listing() for word in (one.name, _project(one.distribution))
            }
        else:
            known = {*self._kinds[kind], *_TAKEN.get(kind, ())}
        return "".join([suggest(name, sorted(known)), *(f"; {sentence}" for sentence in broken)])

    @property
    def _kinds(self) -> dict[Kind, Mapping[str, Plugin]]:
        return {"reward": self.rewards, "clusterer": self.clusterers, "data set": self.datasets}

    def _configured(
        self, kind: Kind, section: PluginSection, seed: int | None
    ) -> tuple[Plugin, list[Section]]:
        """The plugin a section names, and what it is built with: its settings, if it has any."""
        plugin = self._kinds[kind].get(section.name)
        if plugin is None:
            raise PluginError(f"there is no {kind} {section.name!r}{self.hint(kind, section.name)}")
        options, config_class, arguments = section.options, plugin.config_class, list[Section]()
        if config_class is None and options:
            raise ConfigError(
                f"{kind} {section.name!r} takes no settings, but got {min(options)!r}"
            )
        if config_class is not None:
            if "seed" in config_class.model_fields and seed is not None:
                options.setdefault("seed", seed)
            options |= {
                name: getattr(section, name) for name in _TOLD & config_class.model_fields.keys()
            }
            arguments.append(check(config_class, options, f"{kind} {section.name!r}"))
        return plugin, arguments

    def _build(self, kind: Kind, section: PluginSection, seed: int | None) -> object:
        plugin, arguments = self._configured(kind, section, seed)
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


def load_registry() -> Registry:
    """Load the plugins of the entry-point group `pgrpo`.

    An entry point brings all that it registers or, where anything is wrong with it, nothing, and is
    kept as broken. A name that several register belongs to pgrpo itself if it is one of them, and else
    to nobody, for it could not be said which was meant. The environment variable PGRPO_LOAD_PLUGINS
    names, with commas between, the distributions or entry points that are loaded beside the built-in
    ones.

    Raises:
        ConfigError: the variable names what is not installed.
    """
    found: list[Plugin] = []
    broken: list[Broken] = []
    chosen, left_out = _chosen()
    for entry_point in chosen:
        try:
            # What a module says when it is imported must not get among what a command prints as JSON.
            with redirect_stdout(sys.stderr):
                found += _brought(entry_point)
        except (Exception, SystemExit) as error:
            owner = _distribution(entry_point)
            _log.debug("where the error of %s comes from:", owner, exc_info=True)
            reason = str(error)
            if not isinstance(error, PgrpoError):
                reason = f"{type(error).__name__}: {error}"
            broken.append(Broken(owner, entry_point.name, " ".join(reason.split())))
    kept = _without_clashes(found, broken)
    return Registry(kept["reward"], kept["clusterer"], kept["data set"], broken, left_out)


def _without_clashes(found: list[Plugin], broken: list[Broken]) -> dict[Kind, dict[str, Plugin]]:
    """The plugins whose names are theirs alone; the others become broken ones."""
    kept: dict[Kind, dict[str, Plugin]] = {kind: {} for kind in _HOOKS}
    for kind, names in kept.items():
        claims: dict[str, list[Plugin]] = {}
        for plugin in found:
            if plugin.kind == kind:
                claims.setdefault(plugin.name, []).append(plugin)
        for name, claimants in claims.items():
            losers = claimants
            own = [plugin for plugin in claimants if _is_own(plugin.distribution)]
            if own or name in _TAKEN.get(kind, ()):
                error = f"{kind} {name!r} has a name that pgrpo itself uses"
                losers = [plugin for plugin in claimants if plugin not in own]
                names.update((name, plugin) for plugin in own)
            elif len(claimants) > 1:
                everybody = " and ".join(plugin.distribution for plugin in claimants)
                error = (
                    f"{kind} {name!r} is registered by both {everybody}, so neither is taken; expected "
                    f"one: uninstall the other, or leave it out of {LOAD_PLUGINS}"
                )
            else:
                names[name] = claimants[0]
                continue
            broken += [Broken(p.distribution, p.entry_point, error, kind, name) for p in losers]
    return kept


def _chosen() -> tuple[list[metadata.EntryPoint], list[str]]:
    """The entry points to load, and the distributions of those that are left out."""
    installed = sorted(
        metadata.entry_points(group="pgrpo"), key=lambda each: (_distribution(each), each.name)
    )
    text = os.environ.get(LOAD_PLUGINS)
    if text is None:
        return installed, []
    wanted = [word.strip() for word in text.split(",") if word.strip()]
    known = {name for each in installed for name in _names(each)}
    for word in wanted:
        if canonical(word) not in known:
            raise ConfigError(
                f"{LOAD_PLUGINS} names {word!r}, which brings no plugin{suggest(word, list(known))}"
            )
    asked = set(map(canonical, wanted))
    chosen: list[metadata.EntryPoint] = []
    left_out: list[str] = []
    for each in installed:
        owner = _distribution(each)
        if _is_own(owner) or asked & _names(each):
            chosen.append(each)
        elif owner not in left_out:
            left_out.append(owner)
    return chosen, left_out


def _names(entry_point: metadata.EntryPoint) -> set[str]:
    """What the environment variable may call an entry point: itself, or its distribution."""
    return {canonical(entry_point.name), _project(_distribution(entry_point))}


def canonical(name: str) -> str:
    """The name of a distribution as installers compare it: `My_Plugin` is `my-plugin`."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _distribution(entry_point: metadata.EntryPoint) -> str:
    dist = entry_point.dist
    return f"{dist.name} {dist.version}" if dist else "an unknown distribution"


def _project(distribution: str) -> str:
    """The name of a distribution without its version, as installers compare it."""
    return canonical(distribution.partition(" ")[0])


def _is_own(distribution: str) -> bool:
    return _project(distribution) == "pgrpo"


def _brought(entry_point: metadata.EntryPoint) -> list[Plugin]:
    """All that an entry point registers; raises whatever is wrong with it."""
    module = entry_point.load()
    _check_version(getattr(module, "PGRPO_HOOKS", hookspecs.VERSION))
    # One for each entry point, so that what is wrong with one concerns no other.
    manager = pluggy.PluginManager("pgrpo")
    manager.add_hookspecs(hookspecs)
    manager.register(module, name=entry_point.value)
    if not manager.get_hookcallers(module):
        raise PluginError(
            f"{entry_point.value} has no hook marked with pgrpo.plugins.hookimpl; "
            f"hooks are {', '.join(_HOOKS.values())}"
        )
    try:
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise PluginError(f"{error}; hooks are {', '.join(_HOOKS.values())}") from error

    found: list[Plugin] = []
    for kind, hook in _HOOKS.items():

        def register(name: str, thing: Any, kind: Kind = kind) -> None:
            plugin = Plugin(name, kind, _distribution(entry_point), entry_point.name, thing)
            complaint = _complaint(plugin)
            if complaint:
                raise PluginError(f"{kind} {name!r} of {plugin.distribution} {complaint}")
            found.append(plugin)

        for hookimpl in getattr(manager.hook, hook).get_hookimpls():
            try:
                hookimpl.function(register)
            except PluginError:
                raise
            except Exception as error:
                raise PluginError(
                    f"its hook {hook} raised {type(error).__name__}: {error}"
                ) from error
    return found


def _check_version(written_for: object) -> None:
    """Refuse a plugin that was written for hooks of another version, before it is asked for any."""
    if type(written_for) is not int or written_for < 1:
        raise PluginError(f"PGRPO_HOOKS is {written_for!r}; expected a whole number from 1 upwards")
    if written_for > hookspecs.VERSION:
        raise PluginError(
            f"it was written for version {written_for} of the hooks, and pgrpo "
            f"{metadata.version('pgrpo')} knows version {hookspecs.VERSION}; a newer pgrpo is needed"
        )


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
