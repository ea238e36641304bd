"""The reward that a language model gives, asked over HTTP."""

from __future__ import annotations

import asyncio
import importlib.util
import random
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from pgrpo.config import Section
from pgrpo.config.checks import api_key
from pgrpo.errors import ConfigError, DataError, PluginError, UnreadableError
from pgrpo.rewards.verdict import read_verdict
from pgrpo.types import Json, Rollout

if TYPE_CHECKING:
    import httpx

_JITTER = random.Random()
"""Draws how much longer a pause is, so that requests which failed together do not come back together.
Its own, unseeded: when a question is asked again changes no reward, and a seeded run's numbers are
those of others."""


class _TryAgain(PluginError):  # noqa: N818 - no error in the end, if the server recovers
    """The server could not be reached, is busy or failed; it may answer later."""

    def __init__(self, complaint: str, retry_after_s: float | None = None) -> None:
        super().__init__(complaint)
        self.retry_after_s = retry_after_s
        """The pause that the server asks for, if it does."""


class _Session(NamedTuple):
    """What all calls in one event loop share."""

    client: httpx.AsyncClient
    """Connections, which are kept: making a client takes 50 ms."""
    slots: asyncio.Semaphore
    """As many as requests may be under way."""
    end: asyncio.Task[None]
    """Closes the connections; asyncio keeps a task only while somebody else does."""


class Judge:
    """A language model's verdict, through an OpenAI-compatible chat endpoint.

    The reward is the one number in the model's reply: "7", "Score: 7" at the end of some reasoning, or
    `{"score": 7}`. On a scale that the reply states it is brought to the judge's: "4/5" and "80%" count
    as 8 where `high` is 10. A reply with several numbers, none of them called the score, or with a
    number out of range is unreadable, which `max_unreadable` limits. Busy and failing servers (429,
    5xx, no connection) are asked again, after pauses that double and fit `timeout_s`. A rollout whose
    verdict cannot be had fails by itself; the others keep theirs.
    """

    class Config(Section):
        """Whom to ask, and how."""

        url: str
        """Base address of the endpoint, such as http://localhost:8000/v1."""
        model: str
        """Name of the model there."""
        template: str
        """The question; {prompt}, {completion}, {user} and names of columns are filled in. It
        should ask for a number from `low` to `high`, alone or behind the word Score."""
        low: float = 0.0
        """Smallest number the model may give."""
        high: float = 10.0
        """Largest number the model may give."""
        api_key_env: str | None = None
        """Environment variable that holds the API key, where one is needed."""
        parameters: dict[str, Any] = Field({"temperature": 0.0, "max_tokens": 16})
        """Further fields of the request. A judge that reasons first needs a larger `max_tokens`."""
        max_concurrency: int = Field(16, ge=1)
        """Most requests under way at once."""
        request_timeout_s: float = Field(30.0, gt=0)
        """Seconds one request may take; timeout_s bounds the whole batch."""
        retries: int = Field(4, ge=0)
        """Times a request is repeated."""
        pause_s: float = Field(0.5, ge=0)
        """Pause before the first repetition, unless the server's Retry-After tells. Pauses are longer
        by up to a half, at random, and never take more than half of what `timeout_s` leaves."""
        # Told, not set: it is a setting of every reward.
        timeout_s: float = 60.0

        @field_validator("url")
        @classmethod
        def _is_address(cls, url: str) -> str:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError("expected an address that begins with http:// or https://")
            if parts.username is not None:
                raise ValueError("credentials belong into the variable that api_key_env names")
            return url.rstrip("/")

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
        if importlib.util.find_spec("httpx") is None:
            raise PluginError("the judge needs httpx: pip install 'pgrpo[judge]'")
        self._config = config
        self._key = _read_key(config.api_key_env)
        self._sessions: dict[asyncio.AbstractEventLoop, _Session] = {}

    async def __call__(self, rollouts: Sequence[Rollout]) -> list[float | Exception]:
        # What is late fails a moment before all of the call would.
        deadline = asyncio.get_running_loop().time() + 0.9 * self._config.timeout_s
        session = self._session()

        async def judge(rollout: Rollout) -> float | Exception:
            async with session.slots:
                try:
                    return self._read(await self._ask(session.client, rollout, deadline))
                except Exception as error:  # one rollout's failure leaves the others their verdicts
                    return error

        return await asyncio.gather(*map(judge, rollouts))

    def _session(self) -> _Session:
        """That of this event loop."""
        import httpx

        loop, config = asyncio.get_running_loop(), self._config
        if loop not in self._sessions:
            headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
            client = httpx.AsyncClient(headers=headers, timeout=config.request_timeout_s)

            async def close_at_the_end() -> None:
                try:
                    # Whoever ends an event loop cancels what is still running in it.
                    await asyncio.Event().wait()
                finally:
                    del self._sessions[loop]
                    await client.aclose()

            self._sessions[loop] = _Session(
                client,
                asyncio.Semaphore(config.max_concurrency),
                loop.create_task(close_at_the_end()),
            )
        return self._sessions[loop]

    async def _ask(
        self, client: httpx.AsyncClient, rollout: Rollout, deadline: float
    ) -> Mapping[str, Any]:
        """The model's reply, asked for again where that may help and time is left."""
        config, clock = self._config, asyncio.get_running_loop().time
        question = {"role": "user", "content": _fill(config.template, rollout)}
        body = {**config.parameters, "model": config.model, "messages": [question]}
        failure, attempts = "", 0
        while clock() < deadline and attempts <= config.retries:
            attempts += 1
            left_s = deadline - clock()
            try:
                # httpx's own limit is one of silence: a server may keep it by a byte now and then.
                return await asyncio.wait_for(
                    self._ask_once(client, body), min(config.request_timeout_s, left_s)
                )
            except asyncio.TimeoutError:
                failure, pause_s = f"judge at {config.url} did not answer in time", 0.0
            except _TryAgain as error:
                failure, pause_s = str(error), error.retry_after_s
            if pause_s is None:
                pause_s = config.pause_s * 2 ** (attempts - 1)
            if attempts <= config.retries:
                pause_s *= _JITTER.uniform(1.0, 1.5)
                await asyncio.sleep(max(0.0, min(pause_s, (deadline - clock()) / 2)))
        if not attempts:
            raise PluginError(
                f"timeout_s = {config.timeout_s:g} was over before the judge could be asked; it leaves "
                f"no time for so many questions at {config.max_concurrency} at once"
            )
        raise PluginError(f"{failure} ({attempts} attempts)")

    async def _ask_once(
        self, client: httpx.AsyncClient, body: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """The first of the reply's choices."""
        import httpx

        address = f"{self._config.url}/chat/completions"
        try:
            response = await client.post(address, json=body)
        except httpx.RequestError as error:
            said = f"{type(error).__name__}: {error}"
            raise _TryAgain(f"judge at {address} cannot be reached: {said}") from None
        said = self._quote(response.text)
        if response.is_success:
            choice: Any = None
            try:
                choice = response.json()["choices"][0]
                is_chat = isinstance(choice["message"], dict)
            except (ValueError, LookupError, TypeError):
                is_chat = False
            if not is_chat:
                raise PluginError(f"judge's answer is no chat completion: {said}")
            return choice
        complaint = f"judge at {address} answered {response.status_code}: {said}"
        if response.status_code != 429 and response.status_code < 500:
            raise PluginError(complaint)
        pause = response.headers.get("Retry-After", "")
        raise _TryAgain(complaint, float(pause) if pause.isdecimal() else None)

    def _read(self, choice: Mapping[str, Any]) -> float:
        low, high = self._config.low, self._config.high
        message, cut = choice["message"], choice.get("finish_reason") == "length"
        said = _text(message.get("content"))
        if not said.strip() and not cut:
            # Servers that part the reasoning from the reply, and took all of it for reasoning.
            said = _text(message.get("reasoning_content")) or _text(message.get("reasoning"))
        verdict = read_verdict(said, low, high, cut=cut)
        if verdict is None:
            end = ", which max_tokens ended" if cut else ""
            raise UnreadableError(
                f"judge replied {self._quote(said)}{end}; expected one number from {low:g} to {high:g}"
            )
        return verdict

    def _quote(self, text: str) -> str:
        # Servers quote the key they refuse; it is hidden first, lest half of it survive the cut.
        text = text.replace(self._key, "[API key]") if self._key else text
        return repr(text if len(text) <= 200 else f"{text[:100]} ... {text[-100:]}")


def _text(content: Any) -> str:
    """A message's content: a text, nothing, or parts of which some are texts."""
    if isinstance(content, list):
        parts = cast(list[Any], content)
        return "".join(str(part.get("text") or "") for part in parts if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def _read_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = api_key(variable)
    if key is None:
        raise ConfigError(f"environment variable {variable}, named by api_key_env, is not set")
    return key


def _fill(template: str, rollout: Rollout) -> str:
    """In one pass, so that braces inside a prompt or completion stay what they are."""
    example = rollout.prompt.example
    words: Mapping[str, Json] = {
        **example.columns,
        "prompt": example.text,
        "completion": rollout.completion,
        "user": example.user,
    }

    def word(match: re.Match[str]) -> str:
        if match[1] not in words:
            known = ", ".join(sorted(words))
            raise DataError(f"template names {match[0]}, the example has only: {known}")
        return str(words[match[1]])

    return re.sub(r"\{(\w+)\}", word, template)
