"""Completions chosen from a list: which tokens may come next."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

Choices = tuple[tuple[int, ...], ...]


def permitted(choices: Choices, prefix: Sequence[int]) -> tuple[int, ...]:
    """Tokens that may follow `prefix`, ascending; empty when `prefix` is one of the choices."""
    return _next_tokens(choices)[tuple(prefix)]


def branches(choices: Choices, completion: Sequence[int]) -> list[tuple[int, ...]]:
    """The permitted tokens at every position of a completion up to the last real choice.

    Behind the last position with more than one permitted token everything is forced: it has
    probability 1 and no gradient, so neither generation nor training computes it.
    """
    steps = [permitted(choices, completion[:t]) for t in range(len(completion))]
    while steps and len(steps[-1]) == 1:
        steps.pop()
    return steps


def forced_tail(choices: Choices, prefix: Sequence[int]) -> tuple[int, ...]:
    """The tokens that must follow `prefix` until the next real choice or the end."""
    tail: tuple[int, ...] = ()
    while len(following := permitted(choices, (*prefix, *tail))) == 1:
        tail += following
    return tail


@lru_cache(maxsize=4096)
def _next_tokens(choices: Choices) -> dict[tuple[int, ...], tuple[int, ...]]:
    """Every prefix of a choice with the tokens that may follow it."""
    following: dict[tuple[int, ...], set[int]] = {}
    for choice in choices:
        for t, token in enumerate(choice):
            following.setdefault(choice[:t], set()).add(token)
        following.setdefault(choice, set())
    return {prefix: tuple(sorted(tokens)) for prefix, tokens in following.items()}
