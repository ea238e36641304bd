"""TOML in and out: files, `section.key=value` overrides, and sections as plain values."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import tomli_w
from pydantic import BaseModel

from pgrpo.config.sections import Section
from pgrpo.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Tree = dict[str, Any]
"""Tables of a TOML file as plain values."""


def read_toml(path: Path, overrides: Sequence[str] = ()) -> Tree:
    """Read a TOML file and apply `section.key=value` overrides.

    Raises:
        ConfigError: the file is missing or is not TOML, or an override is none.
    """
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"config file {path} does not exist") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder; a config is a TOML file") from None
    except OSError as error:
        raise ConfigError(f"config file {path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    for override in overrides:
        apply_override(tree, override)
    return tree


def apply_override(tree: Tree, override: str) -> None:
    """Set `section.key=value` in a config tree, in place; `rewards.0.weight=2` indexes a list."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"override {override!r} is not of the form section.key=value")
    try:
        value: Any = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    *parents, last = key.strip().split(".")
    node: Any = tree
    for depth, part in enumerate(parents):
        if isinstance(node, dict):
            node = cast(Tree, node).setdefault(part, {})
        elif isinstance(node, list):
            entries = cast(list[Any], node)
            if not part.isdigit() or int(part) >= len(entries):
                raise ConfigError(f"override {override!r}: there is no entry {part!r}")
            node = entries[int(part)]
        if not isinstance(node, dict | list):
            where = ".".join(parents[: depth + 1])
            raise ConfigError(f"override {override!r}: {where} is a value, not a section")
    if not isinstance(node, dict):
        raise ConfigError(f"override {override!r} must end in the name of a setting")
    cast(Tree, node)[last] = value


def resolved_tree(config: BaseModel, *, defaults: bool = True) -> Tree:
    """The config as plain values, complete but for settings that have no effect; or without those that
    are at their defaults."""

    def dump(section: BaseModel) -> Tree:
        idle: set[str] = section.inactive() if isinstance(section, Section) else set()
        fields = type(section).model_fields
        keys = [*fields, *(section.model_extra or {})]
        values = {key: getattr(section, key) for key in keys if key not in idle}
        if not defaults:
            usual = {
                key: field.get_default(call_default_factory=True) for key, field in fields.items()
            }
            values = {key: x for key, x in values.items() if key not in usual or x != usual[key]}
        return {key: plain(value) for key, value in values.items() if value is not None}

    def plain(value: Any) -> Any:
        if isinstance(value, BaseModel):
            return dump(value)
        if isinstance(value, list):
            return [plain(entry) for entry in cast(list[Any], value)]
        if isinstance(value, dict):
            return {key: plain(entry) for key, entry in cast(Tree, value).items()}
        return value

    return dump(config)


def resolved_toml(config: BaseModel) -> str:
    """`resolved_tree` as a TOML file that `load_config` reads back to an equal config."""
    return tomli_w.dumps(resolved_tree(config))


def flat(node: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Leaves of a TOML tree as text with their dotted keys, `generation.group_size` -> `8`; lists of
    plain values are leaves."""
    if isinstance(node, dict):
        children = list(cast(Tree, node).items())
    elif isinstance(node, list) and any(isinstance(x, dict) for x in cast(list[Any], node)):
        children = [(str(i), child) for i, child in enumerate(cast(list[Any], node))]
    else:
        return [(prefix, node if isinstance(node, str) else json.dumps(node, default=str))]
    return [leaf for key, child in children for leaf in flat(child, f"{prefix}.{key}".lstrip("."))]
