r"""What a judge's reply says: the one number in it, on the judge's scale, or which of two answers is
better.

A reply may be the bare number, a sentence, JSON, or a verdict behind pages of reasoning, and the number
may stand on a scale of its own ("8 out of 10", "4/5", "70%", `{"score": 7, "max": 10}`). What is read
must be told apart from every other number of the reply by its form alone; of the forms below, the first
that occurs decides, and where it gives two different numbers, nothing is read:

1. named as the last word: `Final score: 7`, `Overall: 7/10`, `{"overall_score": 7}`;
2. named: `Score: 7`, `**Rating** = 7`, `<score>7</score>`, `[[7]]`, `\boxed{7}`, `{"score": 7}`;
3. on the judge's scale in so many words: `7/10` where the judge gives up to 10;
4. any other number.

Of two answers, A and B, the better one is read from the first of these forms that occurs:

1. named as the last word: `Final verdict: B`;
2. named: `{"winner": "A"}`, `Winner: **B**`, `[[A]]`, `<winner>tie</winner>`;
3. all that the reply says: `A`, `Answer B.`, `It's a tie`;
4. said: `Answer A is slightly better`, `I prefer Response B`, `Answer B wins`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, cast

# Bounded, for a reply of nothing but digits would take a time that grows with their square.
_NUMBER = r"[-+]?(?:\d[\d.,]{0,40}\d|\d{1,40}|\.\d{1,40})"

_FIGURE = re.compile(
    # Not inside a word ("GPT-4", "3rd"), a date or another number.
    rf"(?<![\w.,])(?<![a-z]-)(?<!\d/)(?P<number>{_NUMBER})"
    rf"(?:(?P<percent>\s*%)|\s*(?:/|out\s+of)\s*(?P<of>{_NUMBER})|(?!\s*(?:/|out\s+of)\s*\d))"
    r"(?![\d.,]{0,40}\w)(?!\s*/\s*\d)",
    re.IGNORECASE,
)

_NOUN = r"(?:scores?|ratings?|grades?|verdicts?|marks?)"
_LAST = rf"(?P<last>(?:final|overall)(?:[\s_-]*(?:{_NOUN}|judge?ment|answer))?)"
_SIGNS = r"[\s*_`\"'()\[\]]*"
_NAME = re.compile(
    rf"(?<![a-z])(?:{_LAST}|{_NOUN}){_SIGNS}(?::|=|\bis\b){_SIGNS}(?:\$*\\boxed\{{\s*)?\Z"
    rf"|<\w*?{_NOUN}>\s*\Z|\\boxed\{{\s*\Z|\[\[\s*\Z",
    re.IGNORECASE,
)
_KEY = re.compile(rf"(?:(?P<last>.*(?:final|overall).*)|.*(?:{_NOUN}|points|reward|value))")
_SCALE_KEYS = ("max", "maximum", "maxscore", "maxrating", "outof", "scale")

_BETWEEN = re.compile(r",?\s*(?:[-\u2013\u2014~]|to|or)\s*", re.IGNORECASE)
_END = re.compile(rf"(?P<number>{_NUMBER})(?P<scale>[\s./]*(?:/|out\b)[^a-z]*(?:of)?[\d\s.]*)?\Z")
_CLOSED = re.compile(r"</(?:think|thinking|thought|reasoning)>", re.IGNORECASE)
_OPENED = re.compile(r"<(?:think|thinking|thought|reasoning)>", re.IGNORECASE)

Side: TypeAlias = Literal["A", "B", "tie"]
"""Which of two answers is better, by what they are called."""

_ANSWER = r"(?:answer|response|option|reply|assistant|completion)"
# "A" is also an article, so that only capitals are answers, and "a tie" is read before them.
_TIE = r"(?:an?\s+)?(?P<tie>tie|draw|neither|both|equal(?:ly\s+good)?)"
_SIDE = (
    rf"(?i:{_TIE}|(?:{_ANSWER}[\s_*]*)?(?-i:(?P<side>[AB])))(?![\w'\u2019])"
    # "A or B" names neither.
    rf"(?!\s*(?:[,/&]|\bor\b|\band\b)\s*(?i:{_ANSWER}\s*)?[AB]\b)"
)
_WINNER = r"(?:winner|winning|verdict|preferred|preference|better|best|choice|judge?ment)"
_NAMED_SIDE = re.compile(
    rf"(?:(?<![a-zA-Z])(?i:(?P<last>(?:final|overall)[\s_-]*)?{_WINNER}(?:[\s_-]*{_ANSWER})?)"
    rf"{_SIGNS}(?i::|=|\bis\b){_SIGNS}"
    rf"|\[\[\s*|(?i:<\w*?{_WINNER}>)\s*|\\boxed\{{\s*(?:\\text\{{)?){_SIDE}"
)
_BARE_SIDE = re.compile(rf"[\W_]*(?:(?i:it\s*(?:'|\u2019|\s+i)s)\s+)?{_SIDE}[\W_]*")
_SAID_SIDE = re.compile(
    rf"(?i:\b{_ANSWER})\s+(?P<side>[AB])\s+(?i:wins\b"
    r"|(?:is|was|seems|appears)\s+(?:(?!not?\b|as\b|no\b)\w+\s+){0,3}?"
    r"(?:better|best|superior|stronger|preferable|preferred|winner)\b)"
    rf"|(?i:\bprefer\s+{_ANSWER})\s+(?P<liked>[AB])(?!\w)"
)
_SIDE_KEY = re.compile(rf"(?:(?P<last>.*(?:final|overall).*)|.*{_WINNER}.*)")


class _Figure(NamedTuple):
    """A number that somebody wrote."""

    form: int
    """Which of the forms above, 1 to 4."""
    value: float
    """On the judge's scale; NaN where it cannot be read or is one end of a range."""


def read_verdict(reply: str, low: float, high: float, *, cut: bool = False) -> float | None:
    """The number that a reply gives, from `low` to `high`; None where it gives none, or several.

    A number v on a scale that is stated, and is not up to `high`, counts v * high / (end of the scale).

    Args:
        reply: what the judge said.
        low: smallest number it may give.
        high: largest.
        cut: whether a limit of tokens ended the reply, so that a number at its end may be half of one.
    """
    text = _conclusion(reply)
    if text is None or (cut and _may_be_half(text, high)):
        return None
    found = list(_figures(text, low, high))
    first = min((figure.form for figure in found), default=0)
    values = {figure.value for figure in found if figure.form == first}
    value = values.pop() if len(values) == 1 else math.nan
    return value if low <= value <= high else None


def read_preference(reply: str, *, cut: bool = False) -> Side | None:
    """Which of two answers, A and B, a reply calls the better one; None where it names none, or both.

    Args:
        reply: what the judge said.
        cut: whether a limit of tokens ended the reply: what it says in so many words may then have
            gone on with a "but".
    """
    text = _conclusion(reply)
    if text is None:
        return None
    found = list(_sides(text, cut))
    first = min((form for form, _ in found), default=0)
    sides: set[Side] = {side for form, side in found if form == first}
    return sides.pop() if len(sides) == 1 else None


def _sides(text: str, cut: bool) -> Iterator[tuple[int, Side]]:
    """All verdicts of a text, each with its form as above."""
    rest, start = "", 0
    for value, brace, end in _objects(text):
        named = list(_sides_named_in(value))
        if named:
            yield from named
            rest, start = f"{rest}{text[start:brace]} ", end
    text = rest + text[start:]
    for match in _NAMED_SIDE.finditer(text):
        yield 1 if match["last"] else 2, _side(match)
    bare = _BARE_SIDE.fullmatch(text)
    if bare is not None:
        yield 3, _side(bare)
    for match in () if cut else _SAID_SIDE.finditer(text):
        yield 4, "A" if "A" in (match["side"], match["liked"]) else "B"


def _sides_named_in(tree: Any) -> Iterator[tuple[int, Side]]:
    """Sides that stand under a name in a JSON value."""
    if isinstance(tree, Sequence) and not isinstance(tree, str):
        for entry in cast(Sequence[Any], tree):
            yield from _sides_named_in(entry)
    if not isinstance(tree, Mapping):
        return
    for key, value in cast(Mapping[str, Any], tree).items():
        name = _SIDE_KEY.fullmatch(key.lower())
        if isinstance(value, Mapping | list):
            yield from _sides_named_in(value)
        elif name is not None and isinstance(value, str):
            # Where there is but a name, small letters are one too.
            said = value.strip().upper() if len(value.strip()) == 1 else value
            match = _BARE_SIDE.fullmatch(said)
            if match is not None:
                yield 1 if name["last"] else 2, _side(match)


def _side(match: re.Match[str]) -> Side:
    if match["tie"]:
        return "tie"
    return "A" if match["side"] == "A" else "B"


def _conclusion(reply: str) -> str | None:
    """What stands behind the reasoning; the reasoning where nothing does, None where it has no end."""
    reasoning, *rest = _CLOSED.split(reply)
    if rest:
        text = rest[-1] if rest[-1].strip() else _OPENED.sub(" ", " ".join([reasoning, *rest]))
    else:
        text = reply
    return None if _OPENED.search(text) else text


def _may_be_half(text: str, high: float) -> bool:
    """Whether more digits, or a scale, may have stood behind the end of a text."""
    end = _END.search(text)
    if end is None:
        return False
    return end["scale"] is not None or not abs(_number(end["number"])) * 10 > high


def _figures(text: str, low: float, high: float) -> Iterator[_Figure]:
    """All numbers of a text."""
    text = _without_the_scale(text, low, high)
    rest, start = "", 0
    for value, brace, end in _objects(text):
        named = list(_named_in(value, low, high))
        if named:
            yield from named
            rest, start = f"{rest}{text[start:brace]} ", end
    yield from _figures_of_words(rest + text[start:], high)


def _objects(text: str) -> Iterator[tuple[Any, int, int]]:
    """The JSON objects in a text: value, begin and end, none within another."""
    start = 0
    for brace in re.finditer(r"\{", text):
        if brace.start() < start:
            continue
        try:
            value, start = json.JSONDecoder().raw_decode(text, brace.start())
        except (ValueError, RecursionError):
            # The latter of what is nested a thousand deep.
            continue
        yield value, brace.start(), start


def _figures_of_words(text: str, high: float) -> Iterator[_Figure]:
    matches = list(_FIGURE.finditer(text))
    forms: list[int] = []
    for match in matches:
        named = _NAME.search(text, max(0, match.start() - 64), match.start())
        of = _number(match["of"]) if match["of"] else None
        forms.append((1 if named["last"] else 2) if named else 3 if of == high else 4)
    values = [_on_scale(match["number"], _end_of_scale(match), high) for match in matches]
    for left in range(len(matches) - 1):
        if _BETWEEN.fullmatch(text, matches[left].end(), matches[left + 1].start()):
            # "7-8/10" says neither.
            forms[left] = forms[left + 1] = min(forms[left : left + 2])
            values[left] = values[left + 1] = math.nan
    yield from map(_Figure, forms, values)


def _end_of_scale(match: re.Match[str]) -> float | None:
    if match["percent"]:
        return 100.0
    return _number(match["of"]) if match["of"] else None


def _named_in(tree: Any, low: float, high: float) -> Iterator[_Figure]:
    """Numbers of a JSON value that stand under a name."""
    if isinstance(tree, Sequence) and not isinstance(tree, str):
        for entry in cast(Sequence[Any], tree):
            yield from _named_in(entry, low, high)
    if not isinstance(tree, Mapping):
        return
    entries = {
        re.sub("[^a-z]", "", str(key).lower()): value
        for key, value in cast(Mapping[str, Any], tree).items()
    }
    ends = [entries[key] for key in _SCALE_KEYS if _is_number(entries.get(key))]
    for key, value in entries.items():
        name = _KEY.fullmatch(key)
        if isinstance(value, Mapping | list):
            yield from _named_in(value, low, high)
        elif name is None or key in _SCALE_KEYS or key.startswith(("min", "max")):
            continue
        elif _is_number(value):
            form = 1 if name["last"] else 2
            yield _Figure(form, _on_scale(str(value), ends[0] if ends else None, high))
        elif isinstance(value, str):
            text = _without_the_scale(value, low, high)
            for figure in _figures_of_words(text, high):
                yield _Figure(1 if name["last"] else 2, figure.value)


def _without_the_scale(text: str, low: float, high: float) -> str:
    """A text without what only repeats the judge's scale: `from 0 to 10`, `(1-10)`, `(out of 10)`."""
    lows = "|".join({re.escape(f"{end:g}") for end in (low, 0.0, 1.0) if end < high})
    top = re.escape(f"{high:g}")
    # Not an end of something longer, such as 10-10.5 or 2020-10.
    pattern = (
        rf"(?<![\w.,/-])(?:{lows})\s*(?:[-\u2013\u2014]|to|and)\s*{top}(?![\w%/]|\s*/|[.,]\d)"
        rf"|\(\s*(?:/|out\s+of)\s*{top}\s*\)"
    )
    return re.sub(pattern, " ", text, flags=re.IGNORECASE)


def _on_scale(number: str, end: float | None, high: float) -> float:
    value = _number(number)
    if end is None or end == high:
        return value
    return value * high / end if 0 <= value <= end and end > 0 and high > 0 else math.nan


def _number(text: str) -> float:
    """NaN for what is none, such as 1.2.3, or may be read in two ways, such as 7,5."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
