"""The reward that a language model gives, asked over HTTP."""

from __future__ import annotations

import asyncio
import importlib.util
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    stop_after_attempt,
    wait_exponential,
)

from pgrpo.config import Section
from pgrpo.config.checks import api_key
from pgrpo.errors import ConfigError, DataError, PluginError
from pgrpo.types import Json, Rollout

if TYPE_CHECKING:
    import httpx

_LONGEST_RETRY_AFTER_S = 30.0


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

    The reward is the one number in the model's reply; "7/10" counts as 7 where `high` is 10. Busy
    and failing servers (429, 5xx, no connection) are asked again, after pauses that double. A
    rollout whose verdict cannot be had fails by itself; the others keep theirs.
    """

    class Config(Section):
        """Whom to ask, and how."""

        url: str
        """Base address of the endpoint, such as http://localhost:8000/v1."""
        model: str
        """Name of the model there."""
        template: str
        """The question; {prompt}, {completion}, {user} and names of columns are filled in. It
        should ask for nothing but a number from `low` to `high`."""
        low: float = 0.0
        """Smallest number the model may give."""
        high: float = 10.0
        """Largest number the model may give."""
        api_key_env: str | None = None
        """Environment variable that holds the API key, where one is needed."""
        parameters: dict[str, Any] = Field({"temperature": 0.0, "max_tokens": 16})
        """Further fields of the request."""
        max_concurrency: int = Field(16, ge=1)
        """Most requests under way at once."""
        request_timeout_s: float = Field(30.0, gt=0)
        """Seconds one request may take; timeout_s bounds the whole batch."""
        retries: int = Field(4, ge=0)
        """Times a request is repeated."""
        pause_s: float = Field(0.5, ge=0)
        """Pause before the first repetition, unless the server's Retry-After (up to 30 s) tells."""

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
        session = self._session()

        async def judge(rollout: Rollout) -> float | Exception:
            async with session.slots:
                try:
                    return self._parse(await self._ask(session.client, rollout))
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

    async def _ask(self, client: httpx.AsyncClient, rollout: Rollout) -> str:
        """The model's reply, asked for again where that may help."""
        config = self._config
        question = {"role": "user", "content": _fill(config.template, rollout)}
        body = {**config.parameters, "model": config.model, "messages": [question]}
        doubled = wait_exponential(config.pause_s)

        def pause_s(state: RetryCallState) -> float:
            failure = state.outcome and state.outcome.exception()
            asked_for = failure.retry_after_s if isinstance(failure, _TryAgain) else None
            return doubled(state) if asked_for is None else asked_for

        def give_up(state: RetryCallState) -> str:
            failure = state.outcome and state.outcome.exception()
            raise PluginError(f"{failure} ({state.attempt_number} attempts)")

        retrying = AsyncRetrying(
            retry=retry_if_exception_type(_TryAgain),
            stop=stop_after_attempt(config.retries + 1),
            wait=pause_s,
            retry_error_callback=give_up,
        )
        return await retrying(self._ask_once, client, body)

    async def _ask_once(self, client: httpx.AsyncClient, body: Mapping[str, Any]) -> str:
        import httpx

        address = f"{self._config.url}/chat/completions"
        try:
            response = await client.post(address, json=body)
        except httpx.RequestError as error:
            said = f"{type(error).__name__}: {error}"
            raise _TryAgain(f"judge at {address} cannot be reached: {said}") from None
        if response.is_success:
            return self._reply(response)
        said = self._quote(response.text)
        complaint = f"judge at {address} answered {response.status_code}: {said}"
        if response.status_code != 429 and response.status_code < 500:
            raise PluginError(complaint)
        pause = response.headers.get("Retry-After", "")
        asked_for = min(_LONGEST_RETRY_AFTER_S, float(pause)) if pause.isdecimal() else None
        raise _TryAgain(complaint, asked_for)

    def _reply(self, response: httpx.Response) -> str:
        try:
            content = response.json()["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError):
            content = None
        if not isinstance(content, str):
            raise PluginError(f"judge's answer is no chat completion: {self._quote(response.text)}")
        return content

    def _parse(self, reply: str) -> float:
        low, high = self._config.low, self._config.high
        text = re.sub(rf"(?<=\d)\s*/\s*{re.escape(f'{high:g}')}(?![\d.]*\d)", "", reply)
        numbers = re.findall(r"(?<![\w.])[-+]?(?:\d+\.?\d*|\.\d+)(?!\w)", text)
        if len(numbers) == 1 and low <= float(numbers[0]) <= high:
            return float(numbers[0])
        raise PluginError(
            f"judge replied {self._quote(reply)}; expected one number from {low:g} to {high:g}"
        )

    def _quote(self, text: str) -> str:
        # Servers quote the key they refuse; it is hidden first, lest half of it survive the cut.
        return repr((text.replace(self._key, "[API key]") if self._key else text)[:200])


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
