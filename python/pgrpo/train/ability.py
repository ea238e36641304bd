"""General ability: what a model can do besides what it is trained for, measured in seconds.

A run that rewards preferences should keep what its model could do before. Four parts ask for that, made
of what Python and the packages that training needs bring along: nothing is downloaded. They are small:
they show that something was lost, and rank no models. Texts may change with the version of Python,
scikit-learn or plotly, so each part has a digest of what was asked.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import takewhile
from pathlib import Path
from pydoc_data.topics import topics
from time import perf_counter
from typing import Any, TypeAlias, cast

import numpy as np

from pgrpo.errors import ModelError
from pgrpo.rewards.pairwise import digest
from pgrpo.rollout.engines.transformers import TransformersEngine
from pgrpo.rollout.prompts import token_ids
from pgrpo.rollout.settings import GenerationConfig
from pgrpo.runs.folder import RunFolder
from pgrpo.runs.records import AbilityPart, AbilityRecord, perplexity
from pgrpo.train.build import Assembly
from pgrpo.train.checkpoint import chosen_checkpoint
from pgrpo.train.policy import Policy
from pgrpo.types import Example, FloatArray, Group, Prompt, Rollout, evenly

Ids: TypeAlias = tuple[int, ...]

WINDOWS, WINDOW = 12, 128
"""Windows of each of two texts, and tokens of a window: 3,072 tokens in all."""

SUMS = 60
"""Additions, and as many subtractions."""

COUNTRIES = 24
"""Countries of each continent: those of the Americas, without the one that is the example."""

PASS = 2048
"""Most tokens of a pass: longer ones take twice the time on a CPU, for memory that they touch."""

FORMAT_TOKENS = 24
"""Longest completion where a format is asked for."""


@dataclass(frozen=True, slots=True)
class Question:
    """A question with several answers, one of which is right; the model reads `text` + answer."""

    text: str
    answers: tuple[str, ...]
    right: int
    """Place of the right answer."""


@dataclass(frozen=True, slots=True)
class Format:
    """An instruction, and whether an answer has the form that it asks for."""

    instruction: str
    is_followed: Callable[[str], bool]


@dataclass(frozen=True, slots=True)
class _Item:
    """What is read of the model: log-probabilities of completions of one prompt."""

    prompt: Ids
    completions: tuple[Ids, ...]
    right: int = 0


def measure_ability(parts: Assembly, step: int | None = None) -> AbilityRecord:
    """Measure the model of a run as it is now.

    Log-probabilities are those at temperature 1 over the whole vocabulary, whatever the run samples
    with. Completions are greedy and come from the policy's own weights, also where vLLM generates the
    run's. Questions are plain text behind examples, for chat models too; instructions go through the
    tokenizer's chat template where it has one, without the run's system prompt.

    An item is left out where the tokenizer cannot express it (it has an unknown token, or two answers
    become equal) or it is longer than the model's positions. A part without any item is None: with
    `model.name = "tiny"` over a data set's words all are.

    Several processes share the work: all make this call at the same time, and get the same record.

    Args:
        parts: of the run; neither its optimizer nor its engine is made of them.
        step: taken before it; by default that of the checkpoint which the parts go on from.

    Raises:
        ModelError: a log-probability is not finite.
    """
    began = perf_counter()
    if step is None:
        step = 0 if parts.checkpoint is None else parts.checkpoint.step
    reader = _Reader(parts)
    windows = [*reader.windows(descriptions()), *reader.windows(language_reference())]
    arithmetic, geography = reader.items(sums()), reader.items(continents())
    read = iter(reader.logprobs([*windows, *arithmetic, *geography]))

    def answered(items: Sequence[_Item]) -> list[float]:
        # The likeliest answer is the one whose tokens' log-probabilities sum to most.
        return [float(np.argmax([each.sum() for each in next(read)]) == i.right) for i in items]

    nats = [round(-float(next(read)[0].mean()), 4) for _ in windows]
    text = _part(windows, nats)
    return AbilityRecord(
        step=step,
        text=text,
        perplexity=None if text is None else perplexity(text),
        arithmetic=_part(arithmetic, answered(arithmetic)),
        continents=_part(geography, answered(geography)),
        formats=reader.formats(),
        seconds=perf_counter() - began,
    )


def ability_of_run(folder: Path, *, best: bool = False) -> AbilityRecord:
    """Measure the last checkpoint of a run, or that of its best held-out reward.

    Raises:
        RunFolderError: it is no run folder.
        CheckpointError: there is no such checkpoint in it, or it is damaged.
    """
    run = RunFolder(folder)
    config = run.config()
    with Assembly(config, chosen_checkpoint(run, best=best)) as parts:
        return measure_ability(parts)


class _Reader:
    """A run's model, asked with texts."""

    def __init__(self, parts: Assembly) -> None:
        self._parts = parts
        self._model = parts.model
        self._tokenizer: Any = self._model.tokenizer
        # A token that every text begins with, such as Gemma's <bos>.
        first = self._tokenizer("a").input_ids[:1]
        self._lead: Ids = tuple(first) if first == [self._tokenizer.bos_token_id] else ()

    def windows(self, text: str) -> list[_Item]:
        """WINDOWS windows of a text, spread evenly over it; all tokens but the first are read."""
        ids = self._ids(text)
        starts = range(0, len(ids) - WINDOW + 1, WINDOW)
        found: list[_Item] = []
        for start in evenly(starts, WINDOWS):
            window = (*self._lead, *ids[start : start + WINDOW])
            found.append(_Item(window[:1], (window[1:],)))
        return [item for item in found if self._can_read(item)]

    def items(self, questions: Sequence[Question]) -> list[_Item]:
        """Questions as tokens. What all answers begin with belongs to the prompt: it adds the same to
        each of them."""
        found: list[_Item] = []
        for question in questions:
            whole = [(*self._lead, *self._ids(question.text + a)) for a in question.answers]
            shared = sum(
                1 for _ in takewhile(lambda ids: len(set(ids)) == 1, zip(*whole, strict=False))
            )
            ends = tuple(ids[shared:] for ids in whole)
            found.append(_Item(whole[0][:shared], ends, question.right))
        return [item for item in found if self._can_read(item)]

    def logprobs(self, items: Sequence[_Item]) -> list[list[FloatArray]]:
        """Of each item, one array [T] for each of its completions, in nats."""
        parts = self._parts
        config = parts.config
        policy = Policy(
            self._model,
            config.resolved_loss(),
            config.optimizer.model_copy(update={"token_budget": PASS}),
            num_steps=1,
            temperature=1.0,
            max_new_tokens=WINDOW,
            ranks=parts.ranks,
        )
        groups = [
            Group.sampled(
                [
                    Rollout(_prompt(item.prompt), n, ids, "", (), truncated=False)
                    for ids in item.completions
                ]
            )
            for n, item in enumerate(items)
        ]
        found = policy.logprobs(groups)
        if not all(np.isfinite(logs).all() for of_item in found for logs in of_item):
            raise ModelError("a log-probability of the model is not finite; expected finite ones")
        return found

    def formats(self) -> AbilityPart | None:
        """Share of FORMATS that greedy completions follow."""
        asked: list[_Item] = []
        wanted: list[Format] = []
        for each in FORMATS:
            item = _Item(self._instruction(each.instruction), ())
            if self._can_read(item, FORMAT_TOKENS):
                asked.append(item)
                wanted.append(each)
        answers = self._completions([item.prompt for item in asked])
        followed = [
            float(follows(form, answer)) for form, answer in zip(wanted, answers, strict=True)
        ]
        return _part(asked, followed)

    def _completions(self, prompts: Sequence[Ids]) -> list[str]:
        ranks = self._parts.ranks
        engine = TransformersEngine(GenerationConfig(max_new_tokens=FORMAT_TOKENS), self._model)
        own = ranks.share([len(ids) for ids in prompts])

        def complete() -> list[str]:
            mine = [_prompt(ids) for ids in prompts[own.start : own.stop]]
            groups = engine.generate(mine, 1, seed=0, greedy=True)
            return [group.rollouts[0].completion for group in groups]

        return ranks.gather(complete)

    def _instruction(self, text: str) -> Ids:
        is_chat = bool(self._tokenizer.chat_template)
        source = self._parts.config.model.model_copy(
            update={"chat": is_chat, "system_prompt": None, "prompt_template": "{prompt}"}
        )
        example = Example(text if is_chat else f"Instruction: {text}\nAnswer:", "")
        return token_ids(example, self._tokenizer, source)

    def _ids(self, text: str) -> Ids:
        # A text longer than the model's positions is cut before the model reads it.
        found = self._tokenizer(text, add_special_tokens=False, verbose=False)
        return tuple(found.input_ids)

    def _can_read(self, item: _Item, num_new: int = 0) -> bool:
        """Whether the tokenizer can express it, and the model has as many positions."""
        unknown, positions = self._tokenizer.unk_token_id, self._model.num_positions
        length = len(item.prompt) + max(map(len, item.completions), default=num_new)
        return (
            bool(item.prompt)
            and all(item.completions)
            and not any(unknown in ids for ids in (item.prompt, *item.completions))
            and (positions is None or length <= positions)
        )


def _prompt(ids: Ids) -> Prompt:
    return Prompt(Example("", ""), 0, ids)


def _part(items: Sequence[_Item], values: Sequence[float]) -> AbilityPart | None:
    if not items:
        return None
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return AbilityPart(
        value=float(np.mean(values)),
        standard_error=None if deviation is None else deviation / math.sqrt(len(values)),
        num_items=len(items),
        values=list(values),
        asked=digest([[item.prompt, item.completions] for item in items]),
    )


# Texts.


def descriptions() -> str:
    """What scikit-learn says of its data sets, paragraphs of prose alone."""
    folder = files("sklearn") / "datasets" / "descr"
    pages = sorted((f for f in folder.iterdir() if f.name.endswith(".rst")), key=lambda f: f.name)
    return "\n\n".join(p for page in pages for p in _prose(page.read_text(encoding="utf-8")))


def language_reference() -> str:
    """The reference of Python's language as `help()` has it, paragraphs of prose alone."""
    return "\n\n".join(p for name in sorted(topics) for p in _prose(topics[name]))


def _prose(page: str) -> Iterator[str]:
    """Paragraphs that are no headings, tables, lists or code, each on one line."""
    for paragraph in re.split(r"\n\s*\n", page):
        text = " ".join(paragraph.split())
        letters = sum(c.isalpha() or c == " " for c in text)
        if paragraph[:1].isalpha() and text[-1] in ".:" and letters > 0.9 * len(text) > 90:
            yield text


# Questions.


def sums() -> list[Question]:
    """Additions and subtractions of two numbers of two digits.

    Of the four answers, which are equally far apart, the right one is as often the smallest, the
    second, the third and the largest, and all have two digits: neither size nor length tells it.
    """
    questions: list[Question] = []
    numbers = range(10, 100)
    for sign in ("+", "-"):
        pairs = [(a, b, a + b if sign == "+" else a - b) for a in numbers for b in numbers]
        # Answers up to thirty away still have two digits.
        fitting = [pair for pair in pairs if 40 <= pair[2] < 70]
        for n, (a, b, result) in enumerate(evenly(fitting, SUMS)):
            place, apart = n % 4, (1, 2, 10)[n % 3]
            answers = tuple(f" {result + apart * (k - place)}" for k in range(4))
            text = f"20 + 15 = 35\n84 - 62 = 22\n{a} {sign} {b} ="
            questions.append(Question(text, answers, place))
    return questions


def continents() -> list[Question]:
    """On which of four continents a country lies: the countries of plotly's `gapminder`, of each
    continent as many, behind one example of each. Oceania has only two there."""
    path = files("plotly") / "package_data" / "datasets" / "gapminder.csv.gz"
    rows = csv.DictReader(io.StringIO(gzip.decompress(path.read_bytes()).decode("utf-8")))
    countries: dict[str, list[str]] = {}
    for name, continent in dict.fromkeys((row["country"], row["continent"]) for row in rows):
        countries.setdefault(continent.replace("Americas", "America"), []).append(name)
    names = [name for name in sorted(countries) if len(countries[name]) > COUNTRIES]
    examples = "".join(_lies(countries[name][0]) + f" {name}.\n" for name in names)
    answers = tuple(f" {name}" for name in names)
    return [
        Question(examples + _lies(country), answers, place)
        for place, name in enumerate(names)
        for country in evenly(countries[name][1:], COUNTRIES)
    ]


def _lies(country: str) -> str:
    return f"{country} is a country in"


# Formats.


def follows(wanted: Format, completion: str) -> bool:
    """Whether a completion has the format; judged is what stands before its first empty line, for a
    model that was not taught to end goes on behind it."""
    return wanted.is_followed(re.split(r"\n\s*\n", completion.strip())[0])


def _like(pattern: str) -> Callable[[str], bool]:
    return lambda answer: re.fullmatch(pattern, answer) is not None


def _has_name(answer: str) -> bool:
    """Whether it is a JSON object with the key `name`, fenced or not."""
    try:
        found = json.loads(re.sub(r"^```\w*|```$", "", answer))
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and "name" in cast(dict[str, Any], found)


_FEW_WORDS = r"\w+( \w+){0,2}"

FORMATS = (
    Format("What is the capital of France? Answer with one word.", _like(r"[^\W\d_]+\.?")),
    Format(
        "Name three colours, separated by commas.",
        _like(rf"{_FEW_WORDS}(, ?{_FEW_WORDS}){{2}}\.?"),
    ),
    Format("Write the word hello in capital letters.", str.isupper),
    Format("Name a fruit in lower case letters.", str.islower),
    Format('Give a JSON object with the one key "name".', _has_name),
    Format("What is 3 plus 4? Answer with a number only.", _like(r"\d+\.?")),
    Format("Is the sun hot? Answer with yes or no.", _like(r"(?i)(yes|no)[.!]?")),
    Format(
        "Name two animals, each on its own line behind a dash.", _like(r"- ?[^\s-].*\n- ?[^\s-].*")
    ),
    Format("Write a numbered list of two cities.", _like(r"1[.)] \S.*\n2[.)] \S.*")),
    Format("Ask a question.", _like(r".+\?")),
    Format("Say good morning, in quotation marks.", _like(r"([\"'“«]).+[\"'”»]")),
    Format("Count from one to five in digits, separated by spaces.", _like(r"\d+( \d+)+")),
)
"""What is asked for; every answer that has the form counts, right or wrong."""
