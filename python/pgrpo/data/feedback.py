"""What people said of answers, as material to train on: thumbs, ratings, preferences.

Three things can be asked, `task`:

- `rate`: what would this person say of this answer? A completion is one of the values there are, such
  as ` yes` and ` no`, or ` 1` to ` 5`.
- `choose`: which of several answers did this person like best? A completion is a letter.
- `write`: the answer itself, in free text; columns hold what the person liked and disliked here.

The person is known by what it said before: the prompt begins with its last `history` answers, in the
form of the question that follows. With `task = "choose"`:

    How do I reset my password?
    A: Click on "Forgot password" and follow the mail.
    B: No worries! Just click on "Forgot password" :)
    Best: B

    Where are my invoices?
    A: Oh, easy! Look under Billing :)
    B: Under Billing.
    Best:

With `task = "rate"` it is one answer, and behind it what was said of it: `Under Billing.: yes`.

What comes last of each person is held out, and words, features and popularity are counted in what
comes before alone.
"""

from __future__ import annotations

import string
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Literal, TypeAlias

import numpy as np
from pydantic import Field

from pgrpo.config import Section
from pgrpo.data.columns import Turns, in_words, split_by_time
from pgrpo.data.layouts import LAYOUTS, Layout, Said, layout_of
from pgrpo.data.rows import fail, files, read_rows
from pgrpo.data.table import check_rows
from pgrpo.errors import DataError
from pgrpo.types import Dataset, Example, FloatArray, Json

MAX_SCALE = 11
"""Most values that `task = "rate"` lets a completion take: from 0 to 10."""

MAX_ANSWERS = len(string.ascii_uppercase)
"""Most answers that `task = "choose"` shows, each by a letter."""

LENGTHS = (("brief", 0.0), ("medium", 1 / 3), ("long", 2 / 3))
"""An answer takes the last word whose quantile of the answers' lengths it exceeds."""

Task: TypeAlias = Literal["rate", "choose", "write"]


class FeedbackConfig(Section):
    """What people said of answers: thumbs, ratings or preferences, one's own or of published sets."""

    name: Literal["feedback"]
    path: str | list[str]
    """The file, or several; `*` stands for any part of a name. JSON lines (`.jsonl`, `.json`), CSV or
    Parquet by the end of the name; the first two may be compressed (`.gz`)."""
    layout: Literal[
        "auto",
        "thumbs",
        "preferences",
        "helpsteer",
        "prism",
        "community_alignment",
        "amazon",
        "goodreads",
    ] = "auto"
    """What the columns mean: `thumbs` are `prompt`, `completion`, `label` and `user`, `preferences`
    `prompt`, `chosen`, `rejected` and `user`, the others those of the sets' documentation; `auto`
    knows them by their names."""
    task: Literal["auto", "rate", "choose", "write"] = "auto"
    """What is asked: what the person says of an answer, which of several it likes best, or the answer
    itself; `auto` is `choose` where rows compare answers, else `rate`."""
    user_column: str | None = None
    """Column that tells people apart, where it is not the layout's own."""
    time_column: str | None = None
    """Column with the time, a number or an ISO date or time, where it is not the layout's own; rows
    without one stand in the order of the file."""
    history: int = Field(default=4, ge=0)
    """How much of what the person said before stands in the prompt."""
    evaluation_share: float = Field(default=0.2, ge=0, lt=1)
    """Share of what every person said, the latest, that is held out."""
    on_bad_row: Literal["fail", "skip"] = "fail"
    """Whether a row that cannot be used stops the run, or is left out and counted."""
    seed: int = Field(default=0, ge=0)
    """Seeds the order of answers to choose from."""

    def inactive(self) -> set[str]:
        no_people = {"user_column", "time_column"} if self.layout == "helpsteer" else set[str]()
        return no_people | (set() if self.task in ("auto", "choose") else {"seed"})


def load_feedback(config: FeedbackConfig) -> Dataset:
    """Read what was said; examples are in the order of the file, those of a conversation together. Of
    what a person said of one answer several times, the last counts.

    `columns` of an example: `answer` (the right completion; with `write` the best text there is),
    `options`, `labels`, `position` (of the answer among them), `values` (what each is worth: with
    `choose` the person's own values, with `rate` 1 minus the distance from what it said, as a share
    of the scale), `attributes` (what baselines are fitted to) and `popularity`; with `write` `liked`
    and `disliked` instead, both lists of texts. Columns of the file that no layout reads are there
    too. People have as features the mean and the deviation of their values, the logarithm of their
    number, and how far their values rise with the logarithm of an answer's length.

    Raises:
        DataError: a file is missing, unreadable or empty, a row is not of the layout, or nothing is
            left to be asked.
    """
    notes: list[str] = []
    layout, said = _read(config, notes)
    task: Task = layout.task if config.task == "auto" else config.task
    notes.insert(0, f"{len(said):,} rows are read as {layout.name}, task {task}")
    values = [value for one in said for value in one.values]
    middle = (min(values) + max(values)) / 2
    # A question goes to one side as a whole, whatever is asked of it.
    parts = split_by_time(
        _questions(config, task, said, middle, notes),
        config.evaluation_share,
        lambda one: one.source.user,
        lambda one: one.source.time,
    )
    early, late = (_each_answer(part, said) if task == "rate" else part for part in parts)
    asking = _Asking(config, task, early, middle)
    return Dataset(
        train=asking.of(early),
        evaluation=asking.of(late),
        users=_features(early),
        feature_names=("mean value", "std value", "log number", "likes length"),
        notes=tuple(notes),
    )


def check_feedback(config: FeedbackConfig) -> None:
    """Read the rows up to the first that can be used, or must be; raises as `load_feedback`."""
    next(_rows(config, lambda _: None), None)


def _read(config: FeedbackConfig, notes: list[str]) -> tuple[Layout, list[Said]]:
    left_out: list[DataError] = []
    rows = list(_rows(config, left_out.append))
    path = config.path if isinstance(config.path, str) else ", ".join(config.path)
    check_rows(path, len(rows), left_out, notes)
    said = [one for _, parts in rows for one in parts]
    if not said:
        raise DataError(f"{path} has {len(rows):,} rows, and in none of them was anything said")
    return rows[0][0], said


def _rows(
    config: FeedbackConfig, leave_out: Callable[[DataError], None]
) -> Iterator[tuple[Layout, list[Said]]]:
    """What each row says that can be used; `leave_out` is told of the others, unless they must be."""
    columns = {"user": config.user_column, "time": config.time_column}
    layout = None if config.layout == "auto" else LAYOUTS[config.layout]
    refuse = fail if config.on_bad_row == "fail" else leave_out
    for file in files("feedback", config.path):
        for place, row in read_rows(file, refuse):
            try:
                layout = layout or layout_of(place, row)
                said = list(layout.read(place, row, columns))
            except DataError as complaint:
                refuse(complaint)
            else:
                yield layout, said


def _questions(
    config: FeedbackConfig, task: Task, said: Sequence[Said], middle: float, notes: list[str]
) -> list[Said]:
    """All that a person said of one prompt in one, with the turns that came before it; those of a
    conversation stand together, in its order. What nothing can be asked of is left out."""
    together: dict[tuple[str, str], dict[int, list[Said]]] = {}
    for one in said:
        thread = together.setdefault((one.source.user, one.thread), {})
        thread.setdefault(one.turn, []).append(one)
    questions: list[Said] = []
    for thread in together.values():
        before: Turns = ()
        for _, parts in sorted(thread.items()):
            one = _merged(parts)
            own = _turns(one)
            questions.append(replace(one, turns=(*before, *own)) if before else one)
            before = (*before, *own, ("assistant", _best(one)))
    if task == "rate":
        return questions
    what = "answers of different worth" if task == "choose" else "an answer that was liked"
    kept = [
        one
        for one in questions
        if len(set(one.values)) > 1 or (task == "write" and one.values[0] > middle)
    ]
    if len(kept) < len(questions):
        number = f"{len(questions) - len(kept):,} of {len(questions):,} prompts"
        notes.append(f"left out {number}, which have not {what}")
    if not kept:
        raise DataError(f"{config.path} has no prompt with {what}; another data.task may suit it")
    many = sum(len(one.answers) > MAX_ANSWERS for one in kept)
    if task == "choose" and many:
        notes.append(
            f"{many:,} of {len(kept):,} prompts have more than {MAX_ANSWERS} answers: the best and the "
            f"first {MAX_ANSWERS - 1} others are shown"
        )
        kept = [_with_few_answers(one) for one in kept]
    return kept


def _merged(parts: Sequence[Said]) -> Said:
    """All that a person said of one prompt; of what it said of one answer several times, the last."""
    values: dict[str, float] = {}
    makers: dict[str, str] = {}
    for part in sorted(parts, key=lambda part: part.source.time):
        for place, (answer, value) in enumerate(zip(part.answers, part.values, strict=True)):
            values[answer] = value
            makers[answer] = part.makers[place] if part.makers else ""
    last = max(part.source.time for part in parts)
    return replace(
        parts[0],
        source=replace(parts[0].source, time=last),
        answers=tuple(values),
        values=tuple(values.values()),
        makers=tuple(makers.values()) if any(makers.values()) else (),
    )


def _each_answer(questions: Sequence[Said], said: Sequence[Said]) -> list[Said]:
    """The answers of questions one by one, each with what was said of it last."""
    rows: dict[tuple[str, str, int, str], Said] = {}
    for one in sorted(said, key=lambda one: one.source.time):
        for answer in one.answers:
            rows[one.source.user, one.thread, one.turn, answer] = one
    return [
        replace(
            rows[one.source.user, one.thread, one.turn, answer],
            answers=(answer,),
            values=(value,),
            makers=(),
            turns=one.turns,
        )
        for one in questions
        for answer, value in zip(one.answers, one.values, strict=True)
    ]


def _with_few_answers(one: Said) -> Said:
    best = int(np.argmax(one.values))
    others = [place for place in range(len(one.answers)) if place != best]
    kept = sorted([best, *others[: MAX_ANSWERS - 1]])
    return replace(
        one,
        answers=tuple(one.answers[place] for place in kept),
        values=tuple(one.values[place] for place in kept),
        makers=tuple(one.makers[place] for place in kept) if one.makers else (),
    )


def _best(one: Said) -> str:
    return one.answers[int(np.argmax(one.values))]


def _features(early: Sequence[Said]) -> dict[str, FloatArray]:
    """Each person's features [F]."""
    users: dict[str, list[tuple[float, float]]] = {}
    for one in early:
        users.setdefault(one.source.user, []).extend(
            (value, float(np.log1p(len(answer.split()))))
            for answer, value in zip(one.answers, one.values, strict=True)
        )
    features: dict[str, FloatArray] = {}
    for user, own in users.items():
        values, lengths = np.array(own).T
        rise = float(np.mean((values - values.mean()) * (lengths - lengths.mean())))
        features[user] = np.array([values.mean(), values.std(), np.log1p(len(values)), rise])
    return features


class _Asking:
    """Makes examples, by what the training period tells.

    Args:
        config: of the data set.
        task: what is asked.
        early: what was said in the training period.
        middle: of the scale; what is worth more is liked.
    """

    def __init__(
        self, config: FeedbackConfig, task: Task, early: Sequence[Said], middle: float
    ) -> None:
        self._config = config
        self._middle = middle
        self._task = task
        self._past: defaultdict[str, list[Said]] = defaultdict(list)
        for one in sorted(early, key=lambda one: one.source.time):
            self._past[one.source.user].append(one)
        self._place = {
            id(one): place for own in self._past.values() for place, one in enumerate(own)
        }
        lengths = [len(answer.split()) for one in early for answer in one.answers]
        self._edges = np.quantile(lengths, [share for _, share in LENGTHS[1:]])
        values = Counter(value for one in early for value in one.values)
        self._scale = sorted(values)
        if task == "rate" and not 2 <= len(values) <= MAX_SCALE:
            raise DataError(
                f"{len(values)} different values stand in what {config.path} has to train on; expected "
                f"2 to {MAX_SCALE} with data.task = 'rate'"
            )
        self._share_of = {value: number / values.total() for value, number in values.items()}
        taken: Counter[str] = Counter()
        offered: Counter[str] = Counter()
        for one in early:
            taken[self._length(_best(one))] += 1
            offered.update(self._length(answer) for answer in one.answers)
        # Once more is counted in which it was taken half of the time, so that rare words say little.
        self._taken = {
            word: (taken[word] + 0.5) / (offered[word] + 1) for word, _ in LENGTHS
        }  # fmt: skip

    def of(self, asked: Sequence[Said]) -> list[Example]:
        """An example of each."""
        makers = {"rate": self._rate, "choose": self._choose, "write": self._write}
        return [makers[self._task](one) for one in asked]

    def _before(self, one: Said) -> list[Said]:
        """What the person said last before that, in the training period, of other prompts."""
        own = self._past[one.source.user]
        end = self._place.get(id(one), len(own))
        question = (one.thread, one.turn)
        others = (this for this in reversed(own[:end]) if (this.thread, this.turn) != question)
        return list(islice(others, self._config.history))[::-1]

    def _text(self, one: Said, asked: Callable[[Said], str], told: Callable[[Said], str]) -> str:
        """The question, after what the person said before: the same question with its answer."""
        before = [f"{asked(this)}{told(this)}" for this in self._before(one)]
        return "\n\n".join([*before, asked(one)])

    def _rate(self, one: Said) -> Example:
        values = self._scale
        words = ["no", "yes"] if values == [0.0, 1.0] else [f"{value:g}" for value in values]
        width = values[-1] - values[0]

        def asked(this: Said) -> str:
            # A small model, untrained, finds the pattern best where what was said stands right behind
            # what it was said of, not on a line of its own.
            return f"{_words(this)}\n{this.answers[0]}:"

        def word(this: Said) -> str:
            # What is met for the first time among what is held out counts as what is nearest.
            nearest = min(values, key=lambda value: abs(value - this.values[0]))
            return words[values.index(nearest)]

        return Example(
            text=self._text(one, asked, lambda this: f" {word(this)}"),
            user=one.source.user,
            columns={
                **one.source.about,
                "answer": f" {word(one)}",
                "options": words,
                "labels": words,
                "position": words.index(word(one)),
                "values": [1 - abs(value - one.values[0]) / width for value in values],
                # A rule may find that long answers are liked, and by whom.
                "attributes": [[text, f"{text} {self._length(one.answers[0])}"] for text in words],
                "popularity": [self._share_of[value] for value in values],
            },
            choices=tuple(f" {text}" for text in words),
        )

    def _choose(self, one: Said) -> Example:
        order = self._order(one)
        labels = list(string.ascii_uppercase[: len(order)])
        position = int(np.argmax([one.values[place] for place in order]))

        def asked(this: Said) -> str:
            lines = [
                f"{label}: {this.answers[place]}"
                for label, place in zip(string.ascii_uppercase, self._order(this), strict=False)
            ]
            return "\n".join([_words(this), *lines, "Best:"])

        def letter(this: Said) -> str:
            return string.ascii_uppercase[self._order(this).index(int(np.argmax(this.values)))]

        lengths = [self._length(one.answers[place]) for place in order]
        makers = [[one.makers[place]] if one.makers else [] for place in order]
        return Example(
            text=self._text(one, asked, lambda this: f" {letter(this)}"),
            user=one.source.user,
            columns={
                **one.source.about,
                "answer": f" {labels[position]}",
                "options": [one.answers[place] for place in order],
                "labels": labels,
                "position": position,
                "values": [one.values[place] for place in order],
                "attributes": [
                    [length, *maker] for length, maker in zip(lengths, makers, strict=True)
                ],
                "popularity": [self._taken[length] for length in lengths],
            },
            choices=tuple(f" {label}" for label in labels),
        )

    def _order(self, one: Said) -> list[int]:
        """How answers stand in the prompt: not by their worth; by names, so that a question looks the
        same whatever else the file holds."""
        names = (one.source.user, one.thread, str(one.turn))
        seeds = (self._config.seed, *(zlib.crc32(name.encode()) for name in names))
        return np.random.default_rng(seeds).permutation(len(one.answers)).tolist()

    def _write(self, one: Said) -> Example:
        turns: Turns = ()
        if one.turns:
            told = [(*_turns(this), ("assistant", _best(this))) for this in self._before(one)]
            earlier = (turn for this in told for turn in this if turn[0] != "system")
            turns = (*earlier, *one.turns)
        liked: list[Json] = []
        disliked: list[Json] = []
        for answer, value in zip(one.answers, one.values, strict=True):
            good = value == max(one.values) or value > self._middle
            (liked if good else disliked).append(answer)
        return Example(
            text=self._text(one, _words, lambda this: f"\n{_best(this)}"),
            user=one.source.user,
            columns={
                **one.source.about,
                "answer": _best(one),
                "liked": liked,
                "disliked": disliked,
            },
            turns=turns,
        )

    def _length(self, answer: str) -> str:
        return LENGTHS[int(np.searchsorted(self._edges, len(answer.split())))][0]


def _turns(one: Said) -> Turns:
    return one.turns or (("user", one.prompt),)


def _words(one: Said) -> str:
    return in_words(one.turns) if one.turns else one.prompt
