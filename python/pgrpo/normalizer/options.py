"""What can be chosen of a normalizer: every option with its type, default and meaning, once.

Ranges are checked by the core, which knows the names of the estimators as well; `RULES` has what there
is to know of each. Signatures, sections of a run, tables of the documentation and the oracle of the
tests are made of these two.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, fields
from typing import Concatenate, ParamSpec, TypeVar

from pgrpo.normalizer import _core

P = ParamSpec("P")
SelfT = TypeVar("SelfT")
OptionsT = TypeVar("OptionsT", bound="Options")

RULES: Mapping[str, _core.Rule] = _core.RULES
"""Every estimator, by the name users write."""


@dataclass(frozen=True)
class Options:
    """What a normalizer can be told, checked.

    Args:
        estimator: the rule that turns rewards into advantages.
        ddof: standard deviations divide by count - ddof.
        eps: added to the standard deviation, never put under the root. Choose it small against the
            rewards' own spread: where sigma is not much larger, advantages shrink.
        order: `update_then_normalize` reads histories that hold the batch, so that |advantage| of
            `pgrpo` is at most sqrt(n_p - 1); `normalize_then_update` reads them as they were before:
            unbiased, but a young history can give advantages in the thousands.
        nan_policy: what to do about rewards that are NaN, None, infinite or from 1e140 on, which
            never enter a history or a mean: `raise` refuses the batch, `zero` gives them advantage
            0, `propagate` NaN.
        forgetting: rho; before a batch is merged into a cluster, all that was kept of that cluster
            counts rho times as much (n_p and the sums of squares; the mean stays), so that about its
            last 1 / (1 - rho) batches count. At 1 nothing is forgotten.
        prior_count: every history is read as if it held this many more rewards, of all clusters pooled
            (the variance between their means included); where a call names `parents`, of its parent's
            history, which is read so itself. Above 0 and with `forgetting` below 1, every call looks
            at all clusters.
        sigma_floor: standard deviations of histories are read as this at least, in units of the
            reward.
        clip: bound of |advantage|, applied last of all; None for none.
        min_count: a history of fewer rewards, `prior_count` included, gives advantage 0. The default
            makes a cluster without any give 0.
        frequency_weight: alpha; advantages are multiplied by q_p^-alpha, where q_p = n_p / sum of all
            n_p is the cluster's share of all rewards; 0.5 helps rare clusters. Other than 0, histories
            are read under every estimator and, with `forgetting` below 1, every call looks at all
            clusters.
        track_diagnostics: keep the sums that `diagnostics` reads beside the histories: of advantages
            and, where groups are given, of groups.
        track_delta: keep what was folded since the last `delta`; not with `forgetting` below 1, nor
            under `rae`.
        num_threads: threads that a batch of more than 262,144 rewards is worked on by.

    Raises:
        ConfigError: an option is unknown, of the wrong type or out of range.
    """

    estimator: str = "pgrpo"
    _: KW_ONLY
    ddof: int = 0
    eps: float = 1e-4
    order: str = "update_then_normalize"
    nan_policy: str = "raise"
    forgetting: float = 1.0
    prior_count: float = 0.0
    sigma_floor: float = 0.0
    clip: float | None = None
    min_count: float = 1.0
    frequency_weight: float = 0.0
    track_diagnostics: bool = False
    track_delta: bool = False
    num_threads: int = 1

    def __post_init__(self) -> None:
        _core.check(self)

    def __str__(self) -> str:
        """As arguments of a call; options left alone are left out."""
        chosen = {f.name: getattr(self, f.name) for f in fields(self)}
        arguments = [repr(chosen.pop("estimator"))]
        usual = {f.name: f.default for f in fields(self)}
        arguments += [f"{name}={v!r}" for name, v in chosen.items() if v != usual[name]]
        return ", ".join(arguments)


def made_of_options(
    options: Callable[P, OptionsT],
) -> Callable[[Callable[[SelfT, OptionsT], None]], Callable[Concatenate[SelfT, P], None]]:
    """Let a constructor take the options themselves: their names, defaults and documentation."""

    def decorate(
        start: Callable[[SelfT, OptionsT], None],
    ) -> Callable[Concatenate[SelfT, P], None]:
        def __init__(self: SelfT, *given: P.args, **named: P.kwargs) -> None:  # noqa: N807
            start(self, options(*given, **named))

        (own, _), taken = inspect.signature(start).parameters.values(), inspect.signature(options)
        parameters = [own, *taken.parameters.values()]
        __init__.__signature__ = taken.replace(parameters=parameters)  # type: ignore[attr-defined]
        __init__.__qualname__ = start.__qualname__
        rules = (f"    {rule.name}: {rule.formula}; {rule.source}." for rule in RULES.values())
        text = inspect.cleandoc(options.__doc__ or "")
        __init__.__doc__ = "\n".join([text, "", "Estimators:", *rules])
        return __init__

    return decorate


def expected(option: str) -> str:
    """What an option may be, as errors tell it: names, or a range."""
    found = _core.expected(option)
    if found is None:
        raise KeyError(option)
    return found


def meaning(option: str) -> str:
    """What an option does: its entry in the docstring of `Options`, as one line."""
    text = inspect.cleandoc(Options.__doc__ or "").partition("Raises:")[0]
    found = re.search(rf"^    {option}: (.*?)(?=^    \w+: |\Z)", text, re.DOTALL | re.MULTILINE)
    if not found:
        raise KeyError(option)
    words = " ".join(found[1].split())
    return words[0].upper() + words[1:]
