"""The reward that a language model gives, asked over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from pydantic import Field, model_validator

from pgrpo.errors import UnreadableError
from pgrpo.rewards.chat import Chat, Endpoint, Reply, fill, words_of
from pgrpo.rewards.verdict import read_verdict
from pgrpo.types import Rollout


class Judge:
    """A language model's verdict, through an OpenAI-compatible chat endpoint.

    The reward is the one number in the model's reply: "7", "Score: 7" at the end of some reasoning, or
    `{"score": 7}`. On a scale that the reply states it is brought to the judge's: "4/5" and "80%" count
    as 8 where `high` is 10. A reply with several numbers, none of them called the score, or with a
    number out of range is unreadable, which `max_unreadable` limits. Busy and failing servers (429,
    5xx, no connection) are asked again, after pauses that double and fit `timeout_s`. A rollout whose
    verdict cannot be had fails by itself; the others keep theirs.
    """

    class Config(Endpoint):
        """Whom to ask, and how."""

        template: str
        """The question; {prompt}, {completion}, {user} and names of columns are filled in. It
        should ask for a number from `low` to `high`, alone or behind the word Score."""
        low: float = 0.0
        """Smallest number the model may give."""
        high: float = 10.0
        """Largest number the model may give."""
        parameters: dict[str, Any] = Field({"temperature": 0.0, "max_tokens": 16})
        """Further fields of the request. A judge that reasons first needs a larger `max_tokens`."""
        # Told, not set: it is a setting of every reward.
        timeout_s: float = 60.0

        @model_validator(mode="after")
        def _check_template_and_range(self) -> Judge.Config:
            if "{completion}" not in self.template:
                raise ValueError(
                    "template does not contain {completion}, so nothing would be judged"
                )
            if not self.low < self.high:
                raise ValueError(
                    f"low is {self.low:g} and high is {self.high:g}; expected low < high"
                )
            return self

    def __init__(self, config: Config) -> None:
        self._config = config
        self._chat = Chat(config)

    async def __call__(self, rollouts: Sequence[Rollout]) -> list[float | Exception]:
        # What is late fails a moment before all of the call would.
        timeout_s = self._config.timeout_s
        deadline = asyncio.get_running_loop().time() + 0.9 * timeout_s

        async def judge(rollout: Rollout) -> float | Exception:
            try:
                words = {**words_of(rollout.prompt.example), "completion": rollout.completion}
                question = fill(self._config.template, words, "template")
                reply = await self._chat.ask(
                    question, timeout_s=timeout_s, fields={}, deadline=deadline
                )
                return self._read(reply)
            except Exception as error:  # one rollout's failure leaves the others their verdicts
                return error

        return await asyncio.gather(*map(judge, rollouts))

    def _read(self, reply: Reply) -> float:
        low, high = self._config.low, self._config.high
        verdict = read_verdict(reply.text, low, high, cut=reply.cut)
        if verdict is None:
            end = ", which max_tokens ended" if reply.cut else ""
            raise UnreadableError(
                f"judge replied {self._chat.quote(reply.text)}{end}; expected one number from {low:g} "
                f"to {high:g}"
            )
        return verdict
