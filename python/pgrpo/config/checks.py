"""What is wrong with plain values, told in one sentence: the key, the value and what was expected."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, cast

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from pgrpo.errors import ConfigError

SectionT = TypeVar("SectionT", bound=BaseModel)


def check(model: type[SectionT], tree: Mapping[str, Any], source: str) -> SectionT:
    """Validate plain values against a section.

    Args:
        model: the section's class.
        tree: what is to be checked.
        source: where the values come from, the beginning of a complaint.

    Raises:
        ConfigError: the first complaint; a misspelt key before all others, for it is the likeliest
            cause of a missing one.
    """
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        complaints = sorted(error.errors(), key=lambda e: e["type"] != "unknown_key")
        raise ConfigError(f"{source}: {_explain(complaints[0], tree)}") from None


def known_keys(model: type[BaseModel], values: Any) -> Any:
    """Refuse keys that a section does not have, with a suggestion; its `before` validator."""
    if isinstance(values, Mapping) and model.model_config.get("extra") == "forbid":
        for key in cast(Mapping[Any, Any], values):
            if key not in model.model_fields:
                hint = suggest(str(key), list(model.model_fields))
                raise PydanticCustomError(
                    "unknown_key", "{key}{hint}", {"key": str(key), "hint": hint}
                )
    return values


def suggest(word: str, known: Sequence[str]) -> str:
    """`; did you mean 'x'?` for the nearest known word, or the list of known words."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(sorted(known))}"


def api_key(variable: str) -> str | None:
    """The key in an environment variable, without space around it; None if there is none.

    Raises:
        ConfigError: it holds characters that a header cannot; libraries would quote them, and the key.
    """
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and (key.isprintable() or not key)):
        raise ConfigError(f"environment variable {variable} does not hold a key: odd characters")
    return key or None


def _explain(complaint: ErrorDetails, tree: Any) -> str:
    """One sentence for one of pydantic's complaints."""
    where = ".".join(map(str, _keys(complaint, tree))) or "the config"
    kind, message = complaint["type"], complaint["msg"].removeprefix("Value error, ")
    value, context = _short(complaint["input"]), complaint.get("ctx", {})
    match kind:
        case "unknown_key":
            return f"unknown key {message if where == 'the config' else f'{where}.{message}'}"
        case "missing":
            return f"{where} is missing"
        case "union_tag_not_found":
            return f"{where}.{context['discriminator'][1:-1]} is missing"
        case "union_tag_invalid":
            known = [tag.strip("'") for tag in context["expected_tags"].split(", ")]
            hint = suggest(context["tag"], known)
            return f"{where}.{context['discriminator'][1:-1]} is {context['tag']!r}{hint}"
        case "model_type" | "model_attributes_type":
            return f"{where} is {value}; expected a table"
        case "too_short":
            return f"{where} is {value}; expected at least one entry"
        case "value_error":
            return message if where == "the config" else f"{where}: {message}"
        case _:
            return f"{where} is {value}: {message[0].lower()}{message[1:]}"


def _keys(complaint: ErrorDetails, tree: Any) -> list[str | int]:
    """The keys that lead to what is complained of.

    Pydantic's location also names the members of a union that it tried and the tag of a section,
    which are no keys, though a key may be called the same: the keys are those parts of the location
    that lead through the tree to the very value complained of.
    """

    def lead(location: Sequence[str | int], node: Any) -> list[str | int] | None:
        if not location:
            return [] if node is complaint["input"] else None
        part, *rest = location
        try:
            keys = lead(rest, node[part])
        except (KeyError, IndexError, TypeError):
            keys = None
        return lead(rest, node) if keys is None else [part, *keys]

    location = complaint["loc"]
    end = -1 if complaint["type"] == "missing" else len(location)  # what is missing leads nowhere
    keys = lead(location[:end], tree)
    return [*(location[:end] if keys is None else keys), *location[end:]]


def _short(value: object) -> str:
    """A value as a message can hold it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
