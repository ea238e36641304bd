"""`pgrpo plugins`."""

import json
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Context, Exit, Option

from pgrpo.cli.arguments import AsJson
from pgrpo.errors import ConfigError
from pgrpo.runs.terminal import printable

if TYPE_CHECKING:
    from pgrpo.plugins.registry import Kind, Plugin, Registry
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
    from pgrpo.train.conformance import Check, failed

    registry = load_registry()
    plugins, broken = registry.named(name)
    run = None if config is None else load_config(config)
    given: dict[str, Any] = {}
    for text in settings or ():
        apply_override(given, text)
    for key in given if plugins else ():
        if not any(plugin.takes(key) for plugin in plugins):
            raise ConfigError(f"--set {key}: {name} has no such setting; pgrpo plugins lists them")
    dataset = _dataset(registry, run)
    trials = [
        _try(plugin, where, own, dataset)
        for plugin in plugins
        for where, own in _tables(run, plugin, given)
    ]
    trials += [
        _Trial(one.kind, one.name, one.distribution, None, [Check("loading", "failed", one.error)])
        for one in broken
    ]
    if as_json:
        print(json.dumps([asdict(trial) for trial in trials], indent=2))
    for trial in () if as_json else trials:
        print(printable(trial.heading))
        for each in trial.checks:
            print(printable(f"  {each.outcome:<8} {each.name}: {each.reason}"))
        if trial.needs:
            print("           expected by --set KEY=VALUE, or in the file of --config:")
            print(printable(textwrap.indent(trial.needs, " " * 13)))
    if any(failed(trial.checks) for trial in trials):
        raise Exit(1)
    untried = [trial for trial in trials if trial.needs]
    if untried:
        complaints = [f"{trial.kind} {trial.name!r}: {trial.checks[0].reason}" for trial in untried]
        raise ConfigError(f"not tried for want of settings: {'; '.join(complaints)}")


@dataclass(frozen=True, slots=True)
class _Trial:
    """What came of a plugin with the settings of one table."""

    kind: "Kind | None"
    name: str | None
    """None, like its kind, where nothing of an entry point could be loaded."""
    distribution: str
    table: str | None
    """Which table of the config the settings are of, such as `rewards.0`, or None."""
    checks: "list[Check]"
    needs: str | None = None
    """Where it was not tried, for its settings are missing or wrong: the table that it would want, as
    TOML to be filled in."""

    @property
    def heading(self) -> str:
        """What it is, and whose."""
        what = "broken" if self.name is None else f"{self.kind} {self.name}"
        return f"{what} ({self.distribution})" + (f", {self.table}" if self.table else "")


def _try(
    plugin: "Plugin", table: str | None, settings: dict[str, Any], dataset: "Dataset | None"
) -> _Trial:
    """Try a plugin, if the settings are its own."""
    from pgrpo.train import conformance

    needs = None
    try:
        match plugin.kind:
            case "reward":
                checks = conformance.check_reward(plugin.name, settings, dataset)
            case "clusterer":
                checks = conformance.check_clusterer(plugin.name, settings, dataset)
            case "data set":
                checks = conformance.check_dataset(plugin.name, settings)
    except ConfigError as error:
        reason = str(error).removeprefix(f"{plugin.kind} {plugin.name!r}: ")
        checks = [conformance.Check("settings", "skipped", reason)]
        header = {"reward": "[[rewards]]", "clusterer": "[clustering]", "data set": "[data]"}
        lines = [f"{key} = ...  # {meaning}" for key, meaning in plugin.required.items()]
        needs = "\n".join([header[plugin.kind], f"name = {json.dumps(plugin.name)}", *lines])
    return _Trial(plugin.kind, plugin.name, plugin.distribution, table, checks, needs)


def _tables(
    run: "Config | None", plugin: "Plugin", given: dict[str, Any]
) -> list[tuple[str | None, dict[str, Any]]]:
    """Each table of a run that names a plugin, and its keys with those that are given instead; of equal
    ones the first. Where there is none, a table of what is given alone."""
    own = {key: value for key, value in given.items() if plugin.takes(key)}
    found: list[tuple[str | None, dict[str, Any]]] = []
    for where, section in [] if run is None else _places(run, plugin.kind):
        keys = section.model_dump(exclude_unset=True, exclude={"name"}) | own
        if section.name == plugin.name and keys not in [earlier for _, earlier in found]:
            found.append((where, keys))
    return found or [(None, own)]


def _places(run: "Config", kind: "Kind") -> "list[tuple[str, Any]]":
    """The tables of a run in which plugins of a kind are named, as its keys lead there."""
    match kind:
        case "reward":
            lists = {"rewards": run.rewards, "evaluation": run.evaluation}
            return [
                (f"{k}.{i}", each) for k, tables in lists.items() for i, each in enumerate(tables)
            ]
        case "clusterer":
            return [("clustering", run.clustering)]
        case "data set":
            return [("data", run.data)]


def _dataset(registry: "Registry", run: "Config | None") -> "Dataset | None":
    """The data set of a run."""
    from pgrpo.data import DataPluginConfig, load_dataset

    if run is None:
        return None
    if isinstance(run.data, DataPluginConfig):
        return registry.dataset(run.data)
    return load_dataset(run.data)
