"""Talking to what a run has trained, as one of its users."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np

from pgrpo.errors import ConfigError
from pgrpo.rollout.seeds import derive_seed
from pgrpo.runs.folder import RunFolder
from pgrpo.train.build import Assembly
from pgrpo.train.checkpoint import chosen_checkpoint
from pgrpo.types import ClusterId, Example, Rollout


@dataclass(frozen=True, slots=True)
class Reply:
    """What the model said to a prompt."""

    prompt: str
    completion: str
    reward: float | None
    """None where there is none; a prompt that somebody typed has none, for rewards read columns."""


class Talk:
    """A conversation with the model of a checkpoint; `talk` begins one.

    Args:
        parts: of the run, with weights in the engine.
        step: of the checkpoint.
        users: as whom prompts are asked; those that are typed, as the first.
        greedy: take the likeliest tokens in the place of sampling.

    Attributes:
        examples: prompts of these users that were held out, or else those that were trained on.
        held_out: whether they were held out.
    """

    def __init__(self, parts: Assembly, step: int, users: list[str], greedy: bool) -> None:
        self.step, self.user = step, users[0]
        self.cluster: ClusterId = parts.members.cluster(users[0])
        self._parts, self._greedy = parts, greedy
        known = set(users)
        self.examples = [e for e in parts.dataset.evaluation if e.user in known]
        self.held_out = bool(self.examples)
        if not self.held_out:
            self.examples = [e for e in parts.dataset.train if e.user in known]
        if not self.examples:
            raise ConfigError(f"there is no prompt of user {self.user!r} to be asked")
        self._turns: tuple[tuple[str, str], ...] = ()
        self._numbers = count()

    def example(self, place: int) -> Reply:
        """Ask one of `examples`, and score what comes.

        Raises:
            PgrpoError: the prompt cannot be asked, or a reward failed.
        """
        example = self.examples[place % len(self.examples)]
        rollout = self._sample(example)
        scored = self._parts.held_out_scorer.score([self._group])
        reward = scored[0].rewards[0]
        return Reply(
            example.text, rollout.completion, float(reward) if np.isfinite(reward) else None
        )

    def say(self, text: str) -> Reply:
        """Ask what somebody typed: after all that was said so far if the run's prompts are chats."""
        turns = (*self._turns, ("user", text)) if self._parts.config.model.chat else ()
        completion = self._sample(Example(text, self.user, turns=turns)).completion
        if turns:
            self._turns = (*turns, ("assistant", completion))
        return Reply(text, completion, None)

    def _sample(self, example: Example) -> Rollout:
        prompt = self._parts.builder.build(example)
        seed = derive_seed(self._parts.config.run.seed, "chat", next(self._numbers))
        (self._group,) = self._parts.engine.generate([prompt], 1, seed=seed, greedy=self._greedy)
        return self._group.rollouts[0]


@contextmanager
def talk(
    folder: Path,
    *,
    user: str | None = None,
    cluster: str | None = None,
    greedy: bool = False,
    best: bool = False,
) -> Generator[Talk]:
    """Begin a conversation with a run's model.

    Args:
        folder: of the run.
        user: as whom to ask.
        cluster: as whose people to ask, where it is not one user.
        greedy: take the likeliest tokens in the place of sampling as in training.
        best: take the checkpoint of the best held-out reward in the place of the last.

    Raises:
        RunFolderError: it is no run folder.
        CheckpointError: there is no such checkpoint in it.
        ConfigError: there is no such user or cluster, or both were named, or none; or they have no
            prompts.
    """
    run = RunFolder(folder)
    config = run.config()
    checkpoint = chosen_checkpoint(run, best=best)
    with Assembly(config, checkpoint) as parts:
        users = _users(parts, user, cluster)
        parts.engine.sync(int(checkpoint.state()["policy_version"]))
        yield Talk(parts, checkpoint.step, users, greedy)


def _users(parts: Assembly, user: str | None, cluster: str | None) -> list[str]:
    known = list(parts.dataset.users)
    if (user is None) == (cluster is None):
        raise ConfigError("chat needs --user ID or --cluster ID, one of them")
    if user is not None:
        if user not in parts.dataset.users:
            some = ", ".join(known[:5])
            raise ConfigError(f"there is no user {user!r} among {len(known)}, such as {some}")
        return [user]
    members = [one for one in known if str(parts.members.cluster(one)) == cluster]
    if not members:
        raise ConfigError(
            f"there is no cluster {cluster!r}; expected one of {', '.join(parts.members.about)}"
        )
    return members
