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

1. named as the last word: `Final verdict: B`, `Overall: B`;
2. named: `{"winner": "A"}`, `Winner: **B**`, `[[A]]`, `<winner>tie</winner>`;
3. all that the reply says: `A`, `Answer B.`, `It's a tie`, `Answer A is slightly better`, `B wins`.

A verdict that is misread counts for the wrong answer, and one that is not read is only lost. So a side
counts where what stands behind it ends the verdict or gives its reason: `Winner: A is worse` cannot be
read, nor `Winner: A or B`, nor two verdicts of one form that contradict each other, nor an opinion that
is one sentence of several.
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

_ANSWER = r"(?i:answer|response|option|reply|assistant|completion)"
_TIE = r"(?i:(?:an?\s+)?(?:tie|draw|neither|both|equal(?:ly\s+good)?))"
# "A" is also an article, so that only capitals are answers by themselves.
_ONE = rf"(?:{_ANSWER}[\s_*:]*[ABab]|[AB])"
_SIDE = rf"(?P<side>{_TIE}|{_ONE})(?![\w'\u2019])"
_IS_BETTER = (
    r"(?i:(?:is|was|seems)\s+(?:(?:the|a|bit|little|lot|much|far|somewhat|clearly|slightly|marginally"
    r"|significantly|definitely)\s+){0,3}(?:better|best|superior|stronger|preferable|preferred|winner)"
    rf"(?:\s+(?:{_ANSWER}|one))?)"
)
_WINS = rf"(?:\s+(?:(?i:wins)|{_IS_BETTER}(?:\s+than\s+{_ONE})?))"
# What follows a side that is meant; "A or B" names neither.
_MEANT = re.compile(
    rf"(?!{_SIGNS}(?:[,/&|]|(?i:or|and|nor)\b){_SIGNS}(?:{_ONE}|{_TIE})\b)"
    r"(?:\]\]|[ \t*_`\"'\u2019\u201d)\]]*(?:\Z|[\n.;:}]|!(?!=)|</|\s[-\u2013\u2014(]"
    r"|,(?!\s*(?i:but|though|although|however|yet|if|unless|except)\b)"
    rf"|\s+(?i:because|since|as|due|over|between|by)\b|{_WINS}\b))"
)
_WINNER = r"(?i:winner|winning|verdict|preferred|preference|better|best|choice|judge?ment)"
_SIDE_NAME = (
    rf"(?:(?P<last>(?i:final|overall)(?:[\s_-]*{_WINNER})?)|{_WINNER})(?:[\s_-]*{_ANSWER})?"
)
_SIDE_KEY = re.compile(_SIDE_NAME)
_NAMED_SIDE = re.compile(
    # "quality_winner" is that of a criterion.
    rf"(?:(?<![a-zA-Z])(?<![a-zA-Z][_-]){_SIDE_NAME}{_SIGNS}(?::|=|\b(?i:is)\b){_SIGNS}"
    rf"|\[\[\s*|<(?:(?i:final|overall)_)?{_WINNER}>\s*|\\boxed\{{\s*(?:\\text\{{)?){_SIDE}"
)
# "Not preferred: A", "the second best answer is A".
_UNNAMED = re.compile(
    r"(?i:\b(?:not|non|no|never|less|least|second|if|whether)|n['\u2019]t)\W+(?i:the\W+)?\Z"
)
_SIDE_FIRST = re.compile(rf"{_SIGNS}{_SIDE}")
_SIDE_ALONE = re.compile(
    rf"[\s*_`\"'\u2018\u201c()\[\].:#>-]*(?:(?i:it\s*(?:'|\u2019|\s+i)s|I\s+prefer)\s+)?"
    rf"{_SIDE}{_WINS}?[\s*_`\"'\u2019\u201d()\[\].,:;!]*"
)


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
    try:
        found = list(_figures(text, low, high))
    except RecursionError:  # JSON that is nested a thousand deep
        return None
    first = min((figure.form for figure in found), default=0)
    values = {figure.value for figure in found if figure.form == first}
    value = values.pop() if len(values) == 1 else math.nan
    return value if low <= value <= high else None


def read_preference(reply: str, *, cut: bool = False) -> Side | None:
    """Which of two answers, A and B, a reply calls the better one; None where it names none, or both.

    Args:
        reply: what the judge said.
        cut: whether a limit of tokens ended the reply: what stands at its end may then have gone on
            with an "or".
    """
    text = _conclusion(reply)
    if text is None:
        return None
    try:
        found = list(_sides(text, cut))
    except RecursionError:  # JSON that is nested a thousand deep
        return None
    first = min((form for form, _ in found), default=0)
    sides: set[Side | None] = {side for form, side in found if form == first}
    return sides.pop() if len(sides) == 1 else None


def _sides(text: str, cut: bool) -> Iterator[tuple[int, Side | None]]:
    """All verdicts of a text, each with its form as above; None for one that cannot be read."""
    rest, start = "", 0
    for value, brace, end in _objects(text):
        named = list(_sides_named_in(value))
        if named:
            yield from named
            rest, start = f"{rest}{text[start:brace]} ", end
    text = rest + text[start:]
    length = len(text.rstrip())
    for match in _NAMED_SIDE.finditer(text):
        if not _UNNAMED.search(text, max(0, match.start() - 32), match.start()):
            is_half = cut and match.end() >= length
            yield 1 if match["last"] else 2, None if is_half else _meant(match)
    alone = None if cut else _SIDE_ALONE.fullmatch(text)
    if alone is not None:
        yield 3, _side(alone)


def _sides_named_in(tree: Any) -> Iterator[tuple[int, Side | None]]:
    """Sides that stand under a name in a JSON value; None where something else does."""
    if isinstance(tree, Sequence) and not isinstance(tree, str):
        for entry in cast(Sequence[Any], tree):
            yield from _sides_named_in(entry)
    if not isinstance(tree, Mapping):
        return
    for key, value in cast(Mapping[str, Any], tree).items():
        name = _SIDE_KEY.fullmatch(key)
        if isinstance(value, Mapping | list):
            yield from _sides_named_in(value)
        elif name is not None:
            # Where there is but a letter, small ones are sides too.
            said = str(value).upper() if len(str(value)) == 1 else str(value)
            match = _SIDE_FIRST.match(said)
            yield 1 if name["last"] else 2, match and _meant(match)


def _meant(match: re.Match[str]) -> Side | None:
    """The side of a match; None where what follows may take it back."""
    return _side(match) if _MEANT.match(match.string, match.end()) else None


def _side(match: re.Match[str]) -> Side:
    if re.fullmatch(_TIE, match["side"]):
        return "tie"
    return "A" if match["side"][-1] in "Aa" else "B"


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
    """The JSON objects in a text: value, begin and end, none within another. One that has two values
    under one key is none."""
    decoder, start = json.JSONDecoder(object_pairs_hook=_unambiguous), 0
    for brace in re.finditer(r"\{", text):
        if brace.start() < start:
            continue
        try:
            value, start = decoder.raw_decode(text, brace.start())
        except (ValueError, RecursionError):
            continue
        yield value, brace.start(), start


def _unambiguous(entries: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(entries)
    if any(found[key] != value for key, value in entries):
        raise ValueError("two values under one key")
    return found


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
