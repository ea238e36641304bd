"""The built-in rewards, registered as anybody's are."""

from __future__ import annotations

import asyncio
import importlib.util
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from pgrpo.config import Section
from pgrpo.config.checks import api_key
from pgrpo.data.personas import persona_reward, persona_utility
from pgrpo.errors import ConfigError, DataError, PluginError
from pgrpo.plugins.hookspecs import hookimpl
from pgrpo.types import Json, Rollout

if TYPE_CHECKING:
    import httpx


@hookimpl
def pgrpo_register_rewards(register: Callable[[str, Any], None]) -> None:
    """Offer what is built in."""
    register("choice", choice)
    register("exact_match", ExactMatch)
    register("regex", Regex)
    register("persona", persona)
    register("persona_utility", utility)
    register("judge", Judge)


def _column(rollout: Rollout, name: str) -> Json:
    columns = rollout.prompt.example.columns
    if columns.get(name) is None:
        raise DataError(f"the example has no column {name!r}; it has {', '.join(sorted(columns))}")
    return columns[name]


def choice(rollouts: Sequence[Rollout]) -> list[float]:
    """1.0 if the completion names the option in column `answer`, else 0.0.

    A completion names an option by being its label or text, or by mentioning its label ("The answer
    is B.") or its text in a sentence. `labels` and `options` are columns of equal length. A
    completion that names two labels, or a label and another option's text, names none.
    """
    return [float(_is_right_choice(rollout)) for rollout in rollouts]


def _is_right_choice(rollout: Rollout) -> bool:
    said, answer = rollout.completion.strip(), str(_column(rollout, "answer")).strip()
    if said == answer:
        return True
    columns = rollout.prompt.example.columns
    labels = [str(label).strip() for label in _listed(columns.get("labels"))]
    options = [str(option).strip() for option in _listed(columns.get("options"))]
    right = {i for names in (labels, options) for i, name in enumerate(names) if name == answer}
    named = _options_named(said, labels, options)
    return named is not None and named in right


def _listed(column: Json) -> Sequence[Json]:
    return [] if column is None or isinstance(column, str) else cast(Sequence[Json], column)


def _options_named(said: str, labels: list[str], options: list[str]) -> int | None:
    """Index of the one option a text names, or None."""
    bare = said.strip(" \t\n.,:;!?()[]*\"'").casefold()
    for index, label in enumerate(labels):
        if bare == label.casefold():
            return index

    # The longest text goes first and is taken out, so that "Drama" is not found in "popular Drama"
    # and the "B" of the film "Plan B" is no label.
    by_text: set[int] = set()
    rest = said
    for text in sorted({option.casefold() for option in options if option}, key=len, reverse=True):
        pattern = re.compile(rf"(?<!\w){re.escape(text)}(?!\w)", re.IGNORECASE)
        if pattern.search(rest):
            rest = pattern.sub(";", rest)
            by_text |= {i for i, option in enumerate(options) if option.casefold() == text}
    by_label = {i for i, label in enumerate(labels) if _mentions(rest, label, labels)}

    named = by_label & by_text if by_label and by_text else by_label | by_text
    return named.pop() if len(named) == 1 and len(by_label) <= 1 else None


def _mentions(text: str, label: str, labels: Sequence[str]) -> bool:
    if not label:
        return False
    pattern = rf"(?<![\w'\u2019]){re.escape(label)}(?![\w'\u2019])"
    if label in ("A", "I"):
        # These are words too: "A film" and "I think" mean no label, "A is best" and "A or B" do.
        verbs = "|".join(["is", "or", "and", *map(re.escape, labels)])
        pattern += rf"(?!\s+(?!(?:{verbs})\b)\w)"
    return re.search(pattern, text) is not None


class ExactMatch:
    """1.0 if the completion equals a column of the example, else 0.0."""

    class Config(Section):
        """Which column, and how strictly."""

        column: str = "answer"
        """Column that holds the expected completion."""
        strip: bool = True
        """Ignore white space around both."""
        casefold: bool = False
        """Ignore upper and lower case."""

    def __init__(self, config: Config) -> None:
        self._config = config

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float]:
        column, normal = self._config.column, self._normal
        return [float(normal(r.completion) == normal(str(_column(r, column)))) for r in rollouts]

    def _normal(self, text: str) -> str:
        text = text.strip() if self._config.strip else text
        return text.casefold() if self._config.casefold else text


class Regex:
    """`reward` where the completion contains a match of `pattern`, else 0.0."""

    class Config(Section):
        """What to look for, and what it is worth."""

        pattern: str
        """Regular expression, as Python's `re` reads it; `^` and `$` tie it to the ends. It is not
        interrupted by timeout_s, so keep nested repetition out of it."""
        reward: float = 1.0
        """Reward of a match."""

        @field_validator("pattern")
        @classmethod
        def _compiles(cls, pattern: str) -> str:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
            return pattern

    def __init__(self, config: Config) -> None:
        self._pattern, self._reward = re.compile(config.pattern), config.reward

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float]:
        return [self._reward if self._pattern.search(r.completion) else 0.0 for r in rollouts]


def persona(rollouts: Sequence[Rollout]) -> list[float]:
    """How well the completion suits the persona of the example (data set `personas`)."""
    return [persona_reward(r.prompt.example.columns, r.completion) for r in rollouts]


def utility(rollouts: Sequence[Rollout]) -> list[float]:
    """The same on one scale from 0 to 1 for every persona, for evaluation (data set `personas`)."""
    return [persona_utility(r.prompt.example.columns, r.completion) for r in rollouts]


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
        self._session: tuple[asyncio.AbstractEventLoop, httpx.AsyncClient, asyncio.Semaphore] | None
        self._session = None

    async def __call__(self, rollouts: Sequence[Rollout]) -> list[float | Exception]:
        client, slots = self._open_session()

        async def judge(rollout: Rollout) -> float | Exception:
            async with slots:
                try:
                    return self._parse(await self._ask(client, rollout))
                except Exception as error:  # one rollout's failure leaves the others their verdicts
                    return error

        return await asyncio.gather(*map(judge, rollouts))

    def _open_session(self) -> tuple[httpx.AsyncClient, asyncio.Semaphore]:
        """Connections and places of all calls in this event loop; making a client takes 50 ms."""
        import httpx

        loop, config = asyncio.get_running_loop(), self._config
        if self._session is None or self._session[0] is not loop:
            headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
            client = httpx.AsyncClient(headers=headers, timeout=config.request_timeout_s)
            self._session = loop, client, asyncio.Semaphore(config.max_concurrency)
        return self._session[1:]

    async def _ask(self, client: httpx.AsyncClient, rollout: Rollout) -> str:
        """The model's reply."""
        import httpx

        config = self._config
        question = {"role": "user", "content": _fill(config.template, rollout)}
        body = {**config.parameters, "model": config.model, "messages": [question]}
        address, complaint = f"{config.url}/chat/completions", ""
        for attempt in range(config.retries + 1):
            pause_s = config.pause_s * 2**attempt
            try:
                response = await client.post(address, json=body)
            except httpx.RequestError as error:
                complaint = f"judge at {address} cannot be reached: {type(error).__name__}: {error}"
            else:
                if response.is_success:
                    return self._reply(response)
                said = self._quote(response.text)
                complaint = f"judge at {address} answered {response.status_code}: {said}"
                if response.status_code != 429 and response.status_code < 500:
                    raise PluginError(complaint)
                asked_for = response.headers.get("Retry-After", "")
                pause_s = min(30.0, float(asked_for)) if asked_for.isdecimal() else pause_s
            if attempt < config.retries:
                await asyncio.sleep(pause_s)
        raise PluginError(f"{complaint} ({config.retries + 1} attempts)")

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
