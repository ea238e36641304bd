"""What stands in the columns of a row: who, when, how much, and what was asked."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from typing import Any, TypeAlias, TypeVar, cast

from pgrpo.errors import DataError

Turns: TypeAlias = tuple[tuple[str, str], ...]
"""Role and content of each turn of a chat."""


def value_in(place: str, column: str, row: Mapping[str, Any]) -> Any:
    """The value of a column.

    Raises:
        DataError: there is no such column, or it has no value here.
    """
    if column not in row:
        raise DataError(f"{place}: no column {column!r}; found {', '.join(row)}")
    if row[column] is None:
        raise DataError(f"{place}: column {column} has no value")
    return row[column]


def user_in(place: str, column: str, row: Mapping[str, Any]) -> str:
    """The name of the user in a column, which may be a whole number.

    Raises:
        DataError: there is no such column, or it holds no name.
    """
    user = value_in(place, column, row)
    if isinstance(user, float) and user.is_integer():
        # Whole numbers beside gaps become such in pandas.
        user = int(user)
    if isinstance(user, bool) or not isinstance(user, str | int) or user == "":
        raise DataError(f"{place}: column {column} is {user!r}; expected a text or whole number")
    return str(user)


def number_in(place: str, column: str, row: Mapping[str, Any]) -> float:
    """The finite number in a column, which in CSV is a text.

    Raises:
        DataError: there is no such column, or it holds none.
    """
    value = value_in(place, column, row)
    number = value
    if isinstance(number, str):
        with suppress(ValueError):
            number = float(number)
    if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
        raise DataError(f"{place}: column {column} is {value!r}; expected a finite number")
    return float(number)


def time_in(place: str, column: str, row: Mapping[str, Any]) -> float:
    """When something was, by a column with a number, a date or time as ISO 8601 has them, or one such
    as `Fri Aug 25 13:55:02 -0700 2017`; without a zone it is UTC. Numbers are taken as they are, texts
    become seconds since 1970.

    Raises:
        DataError: there is no such column, or it holds no time.
    """
    value = value_in(place, column, row)
    if not isinstance(value, str):
        return number_in(place, column, row)
    try:
        float(value)
    except ValueError:
        pass
    else:
        return number_in(place, column, row)
    try:
        # Python reads the Z of Zulu time only from 3.11 on.
        moment = datetime.fromisoformat(re.sub(r"[zZ]$", "+00:00", value.strip()))
    except ValueError:
        with suppress(ValueError):
            return datetime.strptime(value, "%a %b %d %H:%M:%S %z %Y").timestamp()
        raise DataError(
            f"{place}: column {column} is {value!r}; expected a number, or a date or time as ISO 8601 "
            "has them, such as 2026-11-26 or 2026-11-26T12:30:00"
        ) from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()


def turns_of(value: object) -> Turns:
    """Role and content of each turn; empty where it is no chat."""
    turns: list[tuple[str, str]] = []
    for turn in cast(list[object], value) if isinstance(value, list) else []:
        if not isinstance(turn, Mapping):
            return ()
        role, content = (cast(Mapping[str, object], turn).get(key) for key in ("role", "content"))
        if not isinstance(role, str) or not isinstance(content, str):
            return ()
        turns.append((role, content))
    return tuple(turns)


def in_words(turns: Sequence[tuple[str, str]]) -> str:
    """A chat as a text, a line for each turn."""
    return "\n".join(f"{role}: {content}" for role, content in turns)


def prompt_in(place: str, column: str, row: Mapping[str, Any]) -> tuple[str, Turns]:
    """The prompt in a column: its text, and its turns if it is a chat.

    Raises:
        DataError: there is no such column, or it holds no prompt.
    """
    prompt = value_in(place, column, row)
    turns = turns_of(prompt)
    text = in_words(turns) if turns and turns[-1][0] != "assistant" else prompt
    if not isinstance(text, str) or not text:
        raise DataError(
            f"{place}: column {column} is {prompt!r:.100}; expected a text, or turns of a chat with "
            "role and content, of which the last is not the assistant's"
        )
    return text, turns


HeldOutT = TypeVar("HeldOutT")


def split_by_time(
    entries: Sequence[HeldOutT],
    share: float,
    user_of: Callable[[HeldOutT], str],
    time_of: Callable[[HeldOutT], float],
) -> tuple[list[HeldOutT], list[HeldOutT]]:
    """Every user's entries without its latest ones, and those, each in the order they came in.

    Of n entries of a user, round(share n) are held out, and never all of them. Of entries of one time
    those that come later are the later ones.
    """
    places: dict[str, list[int]] = {}
    for place, entry in enumerate(entries):
        places.setdefault(user_of(entry), []).append(place)
    held_out: set[int] = set()
    for own in places.values():
        own.sort(key=lambda place: time_of(entries[place]))
        number = min(round(share * len(own)), len(own) - 1)
        held_out.update(own[len(own) - number :])
    early = [entry for place, entry in enumerate(entries) if place not in held_out]
    return early, [entry for place, entry in enumerate(entries) if place in held_out]
