"""The folder of a judgement: what was generated, asked and scored, line by line, and what came of it.

`completions.jsonl`, `opinions.jsonl` and `rewards.jsonl` only grow. Each line says by a key of its
content what it belongs to, so that whatever is there is not generated, asked or paid again; a last
line without its newline is what a killed process left, and is dropped. `pairs.jsonl`, `judge.json` and
`judge.html` are made anew, whole, by every judgement.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Generic, Literal, TypeAlias, TypeVar

from pydantic import Field

from pgrpo.runs.disk import disk_errors
from pgrpo.runs.log import parse
from pgrpo.runs.records import Record, Text
from pgrpo.runs.terminal import held

Winner: TypeAlias = Literal["a", "b", "tie"]
"""Whose answer is the better one: that of the first run, of the second, or neither's."""


class KeyedRecord(Record):
    """A line that is looked up by what it belongs to."""

    key: str
    """SHA-256 of all that decides the content"""


class CompletionRecord(KeyedRecord):
    """A line of completions.jsonl: a policy's completions of one prompt."""

    completions: list[Text]
    """the texts, without special tokens"""
    token_ids: list[list[int]]
    """of each of them"""
    truncated: list[bool]
    """whether `max_new_tokens` ended it"""


class OpinionRecord(KeyedRecord):
    """A line of opinions.jsonl: a judge's reply to two answers in one order."""

    model: Text
    """who judged"""
    side: Literal["A", "B", "tie"] | None = None
    """the better one, A being shown first; `null` where the reply does not say"""
    reply: Text
    """what the judge said"""
    prompt_tokens: int | None = None
    """as the server counts them"""
    completion_tokens: int | None = None
    """likewise"""
    cost: float | None = None
    """by the prices that the judge's file told then; `null` where it told none"""


class ScoreRecord(KeyedRecord):
    """A line of rewards.jsonl: what one completion is worth."""

    reward: float | None = None
    """raw; `null` where there is none"""


class PairRecord(Record):
    """A line of pairs.jsonl: two answers to one prompt."""

    prompt: Text
    """the example's text, before a chat template"""
    user: Text
    """whose prompt it was"""
    cluster: Text
    """the person's, in the first run"""
    a: Text
    """answer of the first run"""
    b: Text
    """answer of the second run"""
    outcome: Winner | None = None
    """whose is better; `null` where that is not known"""
    votes: list[Winner | None] = Field(default=[])
    """what the judge said where `a` was shown first, and where `b` was; empty where it was not asked"""
    replies: list[Text] = Field(default=[])
    """its words, in the same order"""
    rewards: list[float | None] = Field(default=[])
    """of `a` and `b`, by the reward that judges"""
    held_out: list[float | None] = Field(default=[])
    """held-out reward of `a` and `b`, where it does not ask a judge itself"""


class ShareRecord(Record):
    """A share with its 95 % interval; all `null` where there is nothing to take it of."""

    share: float | None = None
    low: float | None = None
    high: float | None = None
    trials: float | None = None
    """independent trials that it is worth: fewer than there are pairs where people have several; `null`
    over several seeds"""


class RatesRecord(Record):
    """How often the first run's answer was the better one."""

    num_pairs: int
    """pairs with an outcome"""
    num_people: int
    """whose prompts they answer"""
    wins: int
    """of the first run"""
    ties: int
    losses: int
    win: ShareRecord
    """share of the pairs"""
    tie: ShareRecord
    loss: ShareRecord
    decided: ShareRecord
    """wins as a share of wins and losses"""
    winner: Literal["a", "b", "level"]
    """who won, where the interval of `decided` excludes a half"""


class ContestantRecord(Record):
    """One of the two policies, or of the two arms with a run for each seed."""

    name: str
    run: str
    """its folder"""
    step: int | None
    """of its checkpoint; 0 for the model that the run began with, `null` for an arm"""
    best: bool = False
    """whether that checkpoint was chosen for its held-out reward"""


class UsageRecord(Record):
    """What the folder's opinions took, those of earlier calls and other judges included."""

    requests: int
    """questions that were answered"""
    prompt_tokens: int
    completion_tokens: int
    cost: float | None = None
    """what they cost, each by the prices that were told when it was paid for; `null` where none ever
    were"""
    priced_now: int = 0
    """of them were paid for without prices, and cost what the same tokens do by the last call's"""
    unpriced: int = 0
    """of them are not in `cost`: no price of that judge was told, or it did not tell its tokens"""


class MatchRecord(Record):
    """Two runs of two arms."""

    folder: str
    """of their own judgement, within that of all"""
    a: ContestantRecord
    b: ContestantRecord
    overall: RatesRecord
    """of these two policies alone"""


class JudgementRecord(Record):
    """judge.json."""

    a: ContestantRecord
    b: ContestantRecord
    judge: str
    """model or reward"""
    kind: Literal["endpoint", "reward"]
    num_prompts: int
    """that each policy answered"""
    num_samples: int
    """completions of a prompt; 0: one, of the likeliest tokens"""
    num_pairs: int
    """all of them"""
    num_identical: int
    """pairs of equal texts: ties that nobody was asked for"""
    num_unreadable: int
    """pairs without an outcome since a reply does not say, or a reward gave nothing"""
    num_failed: int
    """pairs without an outcome since the judge could not be had; the same command asks again"""
    num_unasked: int
    """pairs that the budget left no room for"""
    overall: RatesRecord
    clusters: dict[str, RatesRecord]
    """the largest first"""
    about: dict[str, str]
    """cluster -> how its people differ from all"""
    consistent: ShareRecord
    """pairs with the same vote in both orders, as a share of those that were asked for"""
    flipped: int
    """pairs whose votes name different runs, which is one place twice"""
    first: ShareRecord
    """votes for the answer shown first, as a share of votes for either; a half where order does not
    count"""
    agreement: ShareRecord
    """pairs whose winner has the higher held-out reward too, as a share of decided pairs whose held-out
    rewards differ"""
    num_compared: int
    """pairs that `agreement` is a share of"""
    usage: UsageRecord
    matches: list[MatchRecord] = Field(default=[])
    """pairs of runs that the numbers are of, where there are several; rates then know of seeds"""
    notes: list[str] = Field(default=[])
    """what else is to be known of how it was judged"""


KeyedT = TypeVar("KeyedT", bound=KeyedRecord)


class Store(Generic[KeyedT]):
    """Lines of one file by their keys, in memory as well.

    Raises:
        RunFolderError: a line is damaged, or the disk refuses.
    """

    def __init__(self, path: Path, record: type[KeyedT]) -> None:
        self._path = path
        self._records: dict[str, KeyedT] = {}
        with disk_errors(f"{path} cannot be used"):
            content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        # What a process was killed in the middle of writing, or is writing now, if this one only reads.
        self._torn_at = len(whole) if len(whole) < len(content) else None
        for number, line in enumerate(whole.splitlines(), 1):
            found = parse(record, line, f"{path} line {number}")
            self._records[found.key] = found

    def __contains__(self, key: str) -> bool:
        return key in self._records

    def __getitem__(self, key: str) -> KeyedT:
        return self._records[key]

    def get(self, key: str) -> KeyedT | None:
        """The line of a key, if there is one."""
        return self._records.get(key)

    def values(self) -> list[KeyedT]:
        """All lines."""
        return list(self._records.values())

    def append(self, record: KeyedT) -> None:
        """Add a line, at once: a process that is killed afterwards has it on the disk.

        Raises:
            RunFolderError: the disk refuses.
        """
        line = f"{record.model_dump_json()}\n".encode()
        with held(), disk_errors(f"{self._path} cannot be written"):
            if self._torn_at is not None:
                os.truncate(self._path, self._torn_at)
                self._torn_at = None
            with open(self._path, "ab") as file:
                file.write(line)
            self._records[record.key] = record
