"""`pgrpo plugins`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Context, Exit, Option

from pgrpo.cli.arguments import AsJson
from pgrpo.errors import ConfigError, PluginError
from pgrpo.runs.terminal import printable

if TYPE_CHECKING:
    from pgrpo.plugins.registry import Plugin, Registry
    from pgrpo.runs.config import Config
    from pgrpo.train.conformance import Check
    from pgrpo.types import Dataset


def plugins(context: Context, as_json: AsJson = False) -> None:
    """List the installed rewards, clusterers and data sets; try one, or begin one."""
    if context.invoked_subcommand is not None:
        if as_json:
            raise ConfigError("--json stands before a command of plugins; expected it behind")
        return
    from pgrpo.plugins.registry import LOAD_PLUGINS, load_registry

    registry = load_registry()
    if as_json:
        shown = ("kind", "name", "distribution", "entry_point", "doc", "settings")
        found: list[dict[str, Any]] = [
            {**{key: getattr(one, key) for key in shown}, "error": None}
            for one in registry.listing()
        ]
        found += [{**asdict(one), "doc": "", "settings": {}} for one in registry.broken]
        print(json.dumps(found, indent=2))
        return
    for plugin in registry.listing():
        print(f"{plugin.kind} {plugin.name} ({plugin.distribution}): {plugin.doc}")
        for name, text in plugin.settings.items():
            print(f"    {name}: {text}")
    for one in registry.broken:
        print(printable(f"broken: {one.owner}: {one.error}"))
    for distribution in registry.left_out:
        print(f"left out by {LOAD_PLUGINS}: {distribution}")


def new(
    name: Annotated[str, Argument(metavar="NAME", help="of the distribution")],
    out: Annotated[
        Path | None, Option(metavar="DIR", help="folder to write it into; else NAME")
    ] = None,
) -> None:
    """Write a distribution with a reward, a clusterer and a data set, to go on from."""
    from pgrpo.plugins.new import write_distribution
    from pgrpo.runs.disk import disk_errors

    folder = out or Path(name)
    with disk_errors(f"{folder} cannot be written"):
        files = write_distribution(name, folder)
    print(
        f"wrote {', '.join(path.name for path in files)} to {folder}; README.md says how to go on"
    )


def check(
    name: Annotated[
        str, Argument(metavar="NAME", help="of a plugin; or of a distribution, for all of its own")
    ],
    config: Annotated[
        Path | None,
        Option(metavar="FILE", help="TOML file of a run: tried with its settings, on its data"),
    ] = None,
    settings: Annotated[
        list[str] | None,
        Option("--set", metavar="KEY=VALUE", help="a setting of the plugin; may be repeated"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Try installed plugins as a run uses them; exit code 1 where one does not bear it."""
    from pgrpo.config.toml import apply_override
    from pgrpo.plugins.registry import load_registry
    from pgrpo.runs.config import load_config
    from pgrpo.train import conformance

    registry = load_registry()
    named = _named(registry, name)
    run = None if config is None else load_config(config)
    given: dict[str, Any] = {}
    for text in settings or ():
        apply_override(given, text)
    for key in given:
        if not any(plugin.takes(key) for plugin in named):
            raise ConfigError(f"--set {key}: {name} has no such setting; pgrpo plugins lists them")
    dataset = _dataset(registry, run)
    found: list[tuple[Plugin, list[Check]]] = []
    for plugin in named:
        own = {**_section(run, plugin), **{k: v for k, v in given.items() if plugin.takes(k)}}
        match plugin.kind:
            case "reward":
                checks = conformance.check_reward(plugin.name, own, dataset)
            case "clusterer":
                checks = conformance.check_clusterer(plugin.name, own, dataset)
            case "data set":
                checks = conformance.check_dataset(plugin.name, own)
        found.append((plugin, checks))
    if as_json:
        shown = ("kind", "name", "distribution")
        trees = [
            {**{key: getattr(one, key) for key in shown}, "checks": [asdict(c) for c in checks]}
            for one, checks in found
        ]
        print(json.dumps(trees, indent=2))
    for plugin, checks in () if as_json else found:
        print(f"{plugin.kind} {plugin.name} ({plugin.distribution})")
        for each in checks:
            print(printable(f"  {each.outcome:<8} {each.name}: {each.reason}"))
    if any(conformance.failed(checks) for _, checks in found):
        raise Exit(1)


def _named(registry: "Registry", name: str) -> "list[Plugin]":
    """The plugins of a name, of whatever kind, or those of a distribution."""
    from pgrpo.config.checks import suggest
    from pgrpo.plugins.registry import canonical

    def of(distribution: str) -> bool:
        return canonical(distribution.partition(" ")[0]) == canonical(name)

    listing = registry.listing()
    named = [plugin for plugin in listing if plugin.name == name]
    if not named:
        for one in registry.broken:
            if one.name == name or of(one.distribution):
                raise PluginError(f"plugin {one.owner} is broken: {one.error}")
        named = [plugin for plugin in listing if of(plugin.distribution)]
    if not named:
        known = {plugin.name for plugin in listing}
        raise PluginError(f"there is no plugin {name!r}{suggest(name, sorted(known))}")
    return named


def _section(run: "Config | None", plugin: "Plugin") -> dict[str, Any]:
    """The keys of the table of a run that names a plugin; none where it is not used there."""
    if run is None:
        return {}
    sections = {
        "reward": [*run.rewards, *run.evaluation],
        "clusterer": [run.clustering],
        "data set": [run.data],
    }
    for section in sections[plugin.kind]:
        if section.name == plugin.name:
            return section.model_dump(exclude_unset=True, exclude={"name"})
    return {}


def _dataset(registry: "Registry", run: "Config | None") -> "Dataset | None":
    """The data set of a run."""
    from pgrpo.data import DataPluginConfig, load_dataset

    if run is None:
        return None
    if isinstance(run.data, DataPluginConfig):
        return registry.dataset(run.data)
    return load_dataset(run.data)
