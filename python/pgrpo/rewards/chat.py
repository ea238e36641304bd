"""A language model behind an OpenAI-compatible chat endpoint: the one way in which rewards and
comparisons ask one."""

from __future__ import annotations

import asyncio
import importlib.util
import math
import random
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from pgrpo.config import Section
from pgrpo.config.checks import api_key
from pgrpo.errors import ConfigError, DataError, PluginError
from pgrpo.types import Example, Json

if TYPE_CHECKING:
    import httpx

_JITTER = random.Random()
"""Draws how much longer a pause is, so that requests which failed together do not come back together.
Its own, unseeded: when a question is asked again changes no reward, and a seeded run's numbers are
those of others."""


class Endpoint(Section):
    """Whom to ask, and how."""

    url: str
    """Base address of the endpoint, such as http://localhost:8000/v1."""
    model: str
    """Name of the model there."""
    api_key_env: str | None = None
    """Environment variable that holds the API key, where one is needed."""
    parameters: dict[str, Any] = Field(default={})
    """Further fields of the request."""
    max_concurrency: int = Field(default=16, ge=1)
    """Most requests under way at once."""
    max_per_second: float | None = Field(default=None, gt=0)
    """Most requests begun in a second, repetitions included; without it as many as come."""
    request_timeout_s: float = Field(default=30.0, gt=0)
    """Seconds one request may take; timeout_s bounds it with all its repetitions."""
    retries: int = Field(default=4, ge=0)
    """Times a request is repeated."""
    pause_s: float = Field(default=0.5, ge=0)
    """Pause before the first repetition, unless the server's Retry-After tells. Pauses are longer
    by up to a half, at random, and never take more than half of what `timeout_s` leaves."""

    @field_validator("url")
    @classmethod
    def _is_address(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("expected an address that begins with http:// or https://")
        if parts.username is not None:
            raise ValueError("credentials belong into the variable that api_key_env names")
        return url.rstrip("/")


class Reply(NamedTuple):
    """What the model said."""

    text: str
    cut: bool
    """Whether a limit of tokens ended it."""
    prompt_tokens: int | None
    """As the server counts them; None where it tells no number."""
    completion_tokens: int | None
    """Likewise, reasoning included."""


class RefusedError(PluginError):
    """The server understood the request and will not answer it (4xx but 429, and 501)."""


class _TryAgain(PluginError):  # noqa: N818 - no error in the end, if the server recovers
    """The server could not be reached, is busy or failed; it may answer later."""

    def __init__(self, complaint: str, retry_after_s: float | None = None) -> None:
        super().__init__(complaint)
        self.retry_after_s = retry_after_s
        """The pause that the server asks for, if it does."""


class _Session:
    """What all calls in one event loop share.

    Args:
        client: connections, which are kept: making a client takes 50 ms.
        config: how many requests may be under way, and begin in a second.
        end: closes the connections; asyncio keeps a task only while somebody else does.
    """

    def __init__(
        self, client: httpx.AsyncClient, config: Endpoint, end: asyncio.Task[None]
    ) -> None:
        self.client = client
        self.slots = asyncio.Semaphore(config.max_concurrency)
        self._gap_s = 1 / config.max_per_second if config.max_per_second else 0.0
        self._next = 0.0
        self._end = end

    async def turn(self, deadline: float) -> bool:
        """Wait until the next request may begin; False, and at once, where that is not before the
        deadline."""
        now = asyncio.get_running_loop().time()
        # Who asks takes a place at once, so that those who wait come one after the other.
        place = max(now, self._next)
        if place >= deadline:
            return False
        self._next = place + self._gap_s
        if place > now:
            await asyncio.sleep(place - now)
        return True


class Chat:
    """Asks a chat endpoint single questions.

    Busy and failing servers (429, 5xx, no connection) are asked again, after pauses that double and
    fit the time there is. It may be used in several event loops, also at once.

    Raises:
        PluginError: httpx is not installed.
        ConfigError: the variable that should hold the API key does not.
    """

    def __init__(self, config: Endpoint) -> None:
        if importlib.util.find_spec("httpx") is None:
            raise PluginError("the judge needs httpx: pip install 'pgrpo[judge]'")
        self._config = config
        self._key = _read_key(config.api_key_env)
        self._sessions: dict[asyncio.AbstractEventLoop, _Session] = {}

    async def ask(
        self,
        question: str,
        *,
        timeout_s: float,
        fields: Mapping[str, Any],
        deadline: float = math.inf,
    ) -> Reply:
        """The model's reply to one question, asked for again where that may help and time is left.

        Args:
            question: of the user's turn, the only one.
            timeout_s: how long requests and the pauses between them may take. Waiting for one of the
                `max_concurrency` places or for the turn that `max_per_second` gives is not counted:
                meanwhile nobody was asked.
            fields: further fields of the request, besides the endpoint's parameters.
            deadline: until when there may be an answer all the same, by the event loop's clock.

        Raises:
            RefusedError: the server will not answer this.
            PluginError: it did not answer in time, or with no chat completion.
        """
        session = self._session()
        async with session.slots:
            return await self._ask(session, question, timeout_s, deadline, fields)

    def quote(self, text: str) -> str:
        """A text of the server's for a message, long ones without their middle."""
        # Servers quote the key they refuse; it is hidden first, lest half of it survive the cut.
        text = text.replace(self._key, "[API key]") if self._key else text
        return repr(text if len(text) <= 200 else f"{text[:100]} ... {text[-100:]}")

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

            end = loop.create_task(close_at_the_end())
            self._sessions[loop] = _Session(client, config, end)
        return self._sessions[loop]

    async def _ask(
        self,
        session: _Session,
        question: str,
        timeout_s: float,
        deadline: float,
        fields: Mapping[str, Any],
    ) -> Reply:
        config, clock = self._config, asyncio.get_running_loop().time
        messages = [{"role": "user", "content": question}]
        body = {**config.parameters, **fields, "model": config.model, "messages": messages}
        failure, attempts, left_s = "", 0, timeout_s
        while left_s > 0 and attempts <= config.retries and await session.turn(deadline):
            attempts += 1
            begin = clock()
            left_s = min(left_s, deadline - begin)
            try:
                # httpx's own limit is one of silence: a server may keep it by a byte now and then.
                return await asyncio.wait_for(
                    self._ask_once(session.client, body), min(config.request_timeout_s, left_s)
                )
            except asyncio.TimeoutError:
                failure, pause_s = f"judge at {config.url} did not answer in time", 0.0
            except _TryAgain as error:
                failure, pause_s = str(error), error.retry_after_s
            if pause_s is None:
                pause_s = config.pause_s * 2 ** (attempts - 1)
            if attempts <= config.retries:
                pause_s *= _JITTER.uniform(1.0, 1.5)
                await asyncio.sleep(max(0.0, min(pause_s, (begin + left_s - clock()) / 2)))
            left_s -= clock() - begin
        if not attempts:
            rate = config.max_per_second
            raise PluginError(
                f"timeout_s = {timeout_s:g} was over before the judge could be asked; it leaves "
                f"no time for so many questions at {config.max_concurrency} at once"
                + (f" and max_per_second = {rate:g}" if rate else "")
            )
        raise PluginError(f"{failure} ({attempts} attempts)")

    async def _ask_once(self, client: httpx.AsyncClient, body: Mapping[str, Any]) -> Reply:
        """The first of the answer's choices."""
        import httpx

        address = f"{self._config.url}/chat/completions"
        try:
            response = await client.post(address, json=body)
        except httpx.RequestError as error:
            said = f"{type(error).__name__}: {error}"
            raise _TryAgain(f"judge at {address} cannot be reached: {said}") from None
        said = self.quote(response.text)
        if response.is_success:
            answer: Any = None
            try:
                answer = response.json()
                is_chat = isinstance(answer["choices"][0]["message"], dict)
            except (ValueError, LookupError, TypeError, RecursionError):
                # The last of what is nested a thousand deep.
                is_chat = False
            if not is_chat:
                raise PluginError(f"judge's answer is no chat completion: {said}")
            return _reply(answer)
        complaint = f"judge at {address} answered {response.status_code}: {said}"
        if response.status_code == 501 or (
            response.status_code != 429 and response.status_code < 500
        ):
            raise RefusedError(complaint)
        pause = response.headers.get("Retry-After", "")
        raise _TryAgain(complaint, float(pause) if pause.isdecimal() else None)


def fill(template: str, words: Mapping[str, Json], what: str) -> str:
    """A template with its words filled in, in one pass, so that braces inside what is filled in stay
    what they are.

    Args:
        template: a text with {word} in it.
        words: what may stand in the braces.
        what: names the template in an error.

    Raises:
        DataError: it names a word that there is not.
    """

    def word(match: re.Match[str]) -> str:
        if match[1] not in words:
            known = ", ".join(sorted(words))
            raise DataError(f"{what} names {match[0]}, the example has only: {known}")
        return str(words[match[1]])

    return re.sub(r"\{(\w+)\}", word, template)


def words_of(example: Example) -> dict[str, Json]:
    """What a template may name of an example: its columns, `prompt` and `user`."""
    return {**example.columns, "prompt": example.text, "user": example.user}


def _reply(answer: Mapping[str, Any]) -> Reply:
    choice = answer["choices"][0]
    message, cut = choice["message"], choice.get("finish_reason") == "length"
    said = _text(message.get("content"))
    if not said.strip() and not cut:
        # Servers that part the reasoning from the reply, and took all of it for reasoning.
        said = _text(message.get("reasoning_content")) or _text(message.get("reasoning"))
    usage: Any = answer.get("usage")

    def tokens(name: str) -> int | None:
        number = cast(Any, usage).get(name) if isinstance(usage, Mapping) else None
        # Who says more than a float can count says nothing.
        return number if type(number) is int and 0 <= number < 2**53 else None

    return Reply(said, cut, tokens("prompt_tokens"), tokens("completion_tokens"))


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
