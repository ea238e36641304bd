"""What a reproduction consists of: settings with their arms, and claims about cells of that grid."""

from __future__ import annotations

from dataclasses import dataclass

Cell = tuple[str, str]
"""Setting and arm."""


@dataclass(frozen=True)
class HeldOut:
    """The prompts that a policy is measured with: all that are held out, as they are, or other ones."""

    candidates: int | None = None
    """MovieLens films to choose from; None stands for as many as in training."""
    num_prompts: int | None = None
    """So many, spread evenly over the evaluation period; None stands for all."""


@dataclass(frozen=True)
class Setting:
    """One command of `pgrpo compare`: a change of the base config, and arms that run under it."""

    name: str
    """Of its folder and rows."""
    arms: tuple[str, ...]
    """As `pgrpo compare --estimators` takes them."""
    overrides: tuple[str, ...] = ()
    """As `--set` takes them."""
    no_signal: tuple[str, ...] = ()
    """Arms that cannot learn anything here; their rows have no figure."""
    measured_with: HeldOut = HeldOut()
    """Settings that differ in this alone are trained once."""


@dataclass(frozen=True)
class Claim:
    """That one cell gets more than another, or with a margin, hardly less."""

    after: Cell
    before: Cell
    what: str
    """The respect in which the two differ. Of one cell against itself one seed is compared with the
    next: a control that should be level."""
    primary: bool = False
    margin: float | None = None
    """The loss from which on `before` counts as not reached."""
    cluster: str | None = None
    """Whose prompts are asked of: the people of one of the base's clusters; None stands for all."""


@dataclass(frozen=True)
class Reproduction:
    """A grid of runs, and what is asked of it."""

    name: str
    about: str
    """What it shows, and of which figure of the paper."""
    axis: str
    """What the settings vary."""
    settings: tuple[Setting, ...]
    claims: tuple[Claim, ...]
    base: str = "electricity.toml"
    """Config beside this module that the settings change, unless another one is asked for."""


MARGIN = 0.02
"""Held-out reward that a cheaper arm may lose and still be said to reach a dearer one: a judgement, on
the panel one choice in fifty."""

CURVE = ("run.eval_every=10", "run.eval_prompts=200")
"""Overrides for evaluations along a run that make a curve; its last policy is measured anyway."""
NO_CURVE = ("run.eval_every=50", "run.eval_prompts=100")
"""And for no more of them than a look."""
