"""Who judges, within which limits, and how a judge's opinions are had."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

import numpy as np
from pydantic import Field, model_validator

from pgrpo.config import Section
from pgrpo.config.checks import check
from pgrpo.config.sections import RewardConfig
from pgrpo.config.toml import read_toml
from pgrpo.errors import ConfigError, PluginError
from pgrpo.rewards.pairwise import PairEndpoint, PairJudge, Question, Rubric
from pgrpo.runs.judgement import OpinionRecord, Store
from pgrpo.runs.terminal import held, interrupt_waits

_GIVE_UP = 8
"""Questions in a row that a judge could not be asked: it is not there, and the others need not wait."""
_UNREADABLE_OF = 64
"""Fewer replies tell little of a share, as for rewards."""
_NOTE_EVERY_S = 5.0


class Prices(Section):
    """What tokens cost, in any currency."""

    prompt: float = Field(ge=0)
    """Of a million tokens of prompts."""
    completion: float = Field(ge=0)
    """Of a million tokens of completions, reasoning included."""


class JudgeConfig(Section):
    """Who judges what: the file that `pgrpo judge --judge` reads."""

    endpoint: PairEndpoint | None = None
    """A language model that compares two answers; this or `reward`."""
    reward: RewardConfig | None = None
    """A reward that scores each answer by itself: the higher one wins, and equal ones tie."""
    rubric: Rubric = Rubric()
    """By what the language model compares."""
    num_prompts: int = Field(default=200, ge=1)
    """Held-out prompts, spread evenly over them all; the same ones every time."""
    num_samples: int = Field(default=0, ge=0)
    """Completions of each prompt that each policy samples, the first of the one against the first of
    the other and so on; 0: one completion, of the likeliest tokens."""
    temperature: float | None = Field(default=None, gt=0)
    """Temperature of these samples; that of each run's training if none is told."""
    seed: int = Field(default=0, ge=0)
    """Seeds the samples."""
    prices: Prices | None = None
    """What tokens cost, for the cost to be told."""
    budget: float | None = Field(default=None, gt=0)
    """What the folder's opinions may cost in all, those of earlier calls included, each by the prices
    that were told when it was paid for. No question is asked that may lead beyond, by the dearest so
    far."""
    max_unreadable: float = Field(default=0.1, ge=0, le=1)
    """Largest share of replies (of the last 64 to this judgement's questions, those of earlier calls
    included) that may not say which answer is better. With more no further question is asked."""

    def inactive(self) -> set[str]:
        of_endpoints = {"rubric", "prices", "budget", "max_unreadable"}
        return (set() if self.num_samples else {"temperature", "seed"}) | (
            of_endpoints if self.endpoint is None else set()
        )

    @model_validator(mode="after")
    def _check_judge_and_budget(self) -> JudgeConfig:
        if (self.endpoint is None) == (self.reward is None):
            raise ValueError("expected [endpoint] or [reward], one of them")
        if self.budget is not None and self.prices is None:
            raise ValueError(
                "budget needs [prices]: what a question costs is not known without them"
            )
        if self.reward is not None and self.reward.batch == "step":
            raise ValueError(
                "reward.batch is 'step', so that what an answer is worth may depend on all others that "
                "are scored with it; expected 'group'"
            )
        if self.reward is not None and self.reward.clusters:
            raise ValueError(
                "reward.clusters names those that it scores; expected a reward for everybody's answers"
            )
        if self.reward is not None and self.reward.shift:
            raise ValueError("reward.shift is of training, and nothing is trained; expected none")
        return self

    def cost(self, opinion: OpinionRecord) -> float | None:
        """What an opinion cost: by the prices that were told when it was paid for or, where none were,
        by those of this file, if it is of the same judge; None where neither is known."""
        if opinion.cost is not None:
            return opinion.cost
        if self.endpoint is None or self.endpoint.model != opinion.model:
            return None
        return self.cost_now(opinion)

    def cost_now(self, opinion: OpinionRecord) -> float | None:
        """What an opinion would cost by the prices of this file."""
        prices, asked, said = self.prices, opinion.prompt_tokens, opinion.completion_tokens
        if prices is None or asked is None or said is None:
            return None
        return (asked * prices.prompt + said * prices.completion) / 1e6


def load_judge(path: Path) -> JudgeConfig:
    """Read the file that says who judges what.

    Raises:
        ConfigError: it is missing, no TOML, or describes no judge.
    """
    return check(JudgeConfig, read_toml(path), str(path))


def ask_all(
    judge: PairJudge,
    questions: Sequence[Sequence[Question]],
    settings: JudgeConfig,
    opinions: Store[OpinionRecord],
    note: Callable[[str], None],
) -> tuple[set[str], list[str]]:
    """Ask what is not known yet; returns keys of the questions that failed, and what is to be told.

    Pairs are asked for in an order that is drawn, so that those before the end of a budget are a fair
    sample of all; both orders of a pair come together.

    Raises:
        ConfigError: there is a budget, and opinions whose cost nobody told.
        PluginError: the judge is not there, or cannot be read.
        KeyboardInterrupt: after the questions that were under way; a second one does not wait.
    """
    order = np.random.default_rng(0).permutation(len(questions)).tolist()
    wanted = {q.key: q for place in order for q in questions[place] if q.key not in opinions}
    if not wanted:
        return set(), []
    known = sum(map(len, questions)) - len(wanted)
    note(f"asking {len(wanted)} questions" + (f"; {known} are answered" if known else ""))
    own = {question.key for pair in questions for question in pair}
    asking = _Asking(judge, settings, wanted.values(), own, opinions, note)
    with held():
        asyncio.run(asking.run())
    if asking.error is not None:
        raise asking.error
    notes: list[str] = []
    if asking.over_budget:
        notes.append(f"The budget of {settings.budget:g} ended the judgement early.")
    if asking.failures:
        first = next(iter(asking.failures.values()))
        notes.append(
            f"{len(asking.failures)} questions could not be asked, the first since: {first}."
        )
    return set(asking.failures), notes


class _Asking:
    """Asks what is not known yet, several questions at once.

    Args:
        judge: whom.
        settings: limits.
        questions: what.
        own: keys of these questions and of those that are answered already.
        opinions: where answers are kept.
        note: is told how far it is.

    Attributes:
        failures: key of a question that could not be asked -> why.
        error: what ends all.
    """

    def __init__(
        self,
        judge: PairJudge,
        settings: JudgeConfig,
        questions: Iterable[Question],
        own: Collection[str],
        opinions: Store[OpinionRecord],
        note: Callable[[str], None],
    ) -> None:
        self.failures: dict[str, str] = {}
        self.error: PluginError | None = None
        self._judge, self._settings, self._opinions, self._note = judge, settings, opinions, note
        assert settings.endpoint is not None
        self._endpoint = settings.endpoint
        self._pending = deque(questions)
        self._total = len(self._pending)
        told = opinions.values()
        costs = [settings.cost(opinion) for opinion in told]
        if settings.budget is not None and None in costs:
            raise ConfigError(
                f"{costs.count(None)} of {len(costs)} opinions in the folder tell no cost: they are of "
                "another judge whose prices were not told, or tell no tokens, so that a budget cannot "
                "be kept; expected another folder, or no budget"
            )
        self._spent = sum(cost or 0.0 for cost in costs)
        # Of the same judge, for another one's questions and prices tell nothing of the next.
        alike = [opinion for opinion in told if opinion.model == self._endpoint.model]
        self._dearest = max((settings.cost_now(opinion) or 0.0 for opinion in alike), default=0.0)
        self._under_way = self._failed_in_a_row = self._answered = 0
        # A judgement that goes on stops where it would have stopped.
        self._last = [opinion for opinion in told if opinion.key in own][-_UNREADABLE_OF:]
        self._interrupted = False
        self._said = time.monotonic()
        self._check_readable()

    async def run(self) -> None:
        """Ask all, or until something stops it; questions under way are waited for."""
        if self._settings.budget is not None and not self._dearest:
            # What a question costs is not known before the first is answered.
            while not self._answered and not self._stops():
                await self._ask_next()
        await asyncio.gather(*(self._work() for _ in range(self._endpoint.max_concurrency)))

    @property
    def over_budget(self) -> bool:
        """Whether nothing but the budget left questions unasked."""
        return bool(self._pending) and self.error is None and not self._interrupted

    async def _work(self) -> None:
        while not self._stops():
            await self._ask_next()

    def _stops(self) -> bool:
        if interrupt_waits() and not self._interrupted:
            self._interrupted = True
            under_way = self._under_way
            self._note(f"waiting for {under_way} questions under way; a second interrupt does not")
        budget = self._settings.budget
        reach = self._spent + (self._under_way + 1) * self._dearest
        # Who finds no room ends; those whose question is under way see whether it left some.
        has_room = budget is None or reach <= budget
        return not self._pending or not has_room or self._interrupted or self.error is not None

    async def _ask_next(self) -> None:
        question = self._pending.popleft()
        self._under_way += 1
        try:
            await self._ask(question)
        finally:
            self._under_way -= 1

    async def _ask(self, question: Question) -> None:
        try:
            opinion = await self._judge.ask(question)
        except PluginError as error:
            self.failures[question.key] = str(error)
            self._failed_in_a_row += 1
            if self._failed_in_a_row >= _GIVE_UP and self.error is None:
                self.error = PluginError(f"{error}; the same command goes on with what is saved")
            return
        self._failed_in_a_row = 0
        record = OpinionRecord(key=question.key, model=self._endpoint.model, **opinion._asdict())
        cost = self._settings.cost_now(record)
        record = record.model_copy(update={"cost": cost})
        self._opinions.append(record)
        self._spent += cost or 0.0
        self._dearest = max(self._dearest, cost or 0.0)
        self._answered += 1
        if self._settings.budget is not None and cost is None and self.error is None:
            self.error = PluginError(
                "the judge's answers tell no usage, so that a budget cannot be kept; remove budget"
            )
        self._last = [*self._last, record][-_UNREADABLE_OF:]
        self._check_readable()
        self._tell()

    def _check_readable(self) -> None:
        limit = self._settings.max_unreadable
        unreadable = [opinion.reply for opinion in self._last if opinion.side is None]
        if len(unreadable) > limit * _UNREADABLE_OF and self.error is None:
            self.error = PluginError(
                f"judge replied {unreadable[-1][:200]!r}; expected which of two answers is better "
                f"({len(unreadable)} of the last {len(self._last)} replies could not be read, which is "
                f"too many for max_unreadable = {limit:g}); with a larger one the same command goes "
                "on, and another rubric or model is asked anew"
            )

    def _tell(self) -> None:
        now = time.monotonic()
        if now - self._said < _NOTE_EVERY_S and self._answered < self._total:
            return
        self._said = now
        cost = f", cost {self._spent:.4g}" if self._settings.prices else ""
        failed = f", {len(self.failures)} failed" if self.failures else ""
        self._note(f"asked {self._answered} of {self._total} questions{cost}{failed}")
