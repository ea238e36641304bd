"""Seven generated personas: a linguistic style and a music genre each, on their own reward scales.

A prompt is five words: two that hint at the style, two that hint at the genre (one in ten hints is
somebody else's) and a topic. A good completion has many different words of the persona's style and
of its genre. Raw rewards of different personas cannot be compared, so what was achieved is told by
the utility u in [0, 1]:

    reward = offset_p + scale_p * (u + shift_x)        shift_x ~ N(0, SHIFT^2), fixed per prompt

The scales differ twentyfold. An estimator with one history for everybody therefore hears the
smallest persona, which also has the smallest scale, hardly at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import Field

from pgrpo.config import Section
from pgrpo.errors import DataError
from pgrpo.types import Dataset, Example, FloatArray, Json

STYLE_WORDS = {
    "formal": "therefore moreover regarding sincerely hence accordingly respectfully furthermore",
    "slang": "dope lit vibes chill bruh lowkey sick banger",
    "poetic": "moonlit silver sorrow river tender ember dawn yearning",
    "dry": "exactly merely roughly average standard adequate measured plain",
}
GENRE_WORDS = {
    "jazz": "swing saxophone brushes bebop trumpet improvised ballad walking",
    "metal": "riff distortion growl thunder shred blast doom heavy",
    "folk": "banjo fiddle acoustic harvest meadow strum campfire harmony",
    "techno": "synth bassline strobe warehouse loop kick pulse modular",
}
STYLE_HINTS = {
    "formal": "kindly please would might",
    "slang": "yo gimme gotta hey",
    "poetic": "sing whisper dream oh",
    "dry": "list state give name",
}
GENRE_HINTS = {
    "jazz": "club trio midnight quartet",
    "metal": "mosh leather stadium rage",
    "folk": "village porch tale trail",
    "techno": "rave laser decks basement",
}
NEUTRAL_WORDS = (
    "the a and with of to in it is that this some very more one two song music time thing way day"
)
TOPICS = "opener encore chorus intro mood playlist concert memory"

HINT_RATE = 0.9
"""Share of hints that are the persona's own; a prompt alone identifies it imperfectly."""
SHIFT = 0.03
"""Standard deviation of the per-prompt shift, in utility units. Completions spread by 0.1 or more,
so between-prompt variance (the ICC) stays below 1/G for the usual group sizes."""
PROMPTS_PER_USER = 8
COUNTED_WORDS = 40
"""Words a user wrote, and songs heard, on which the features are counted."""
OWN_SHARE = 0.7
"""Share of a user's counted words and songs that are of the persona's style and genre."""


@dataclass(frozen=True, slots=True)
class Persona:
    """Somebody's style, taste and way of giving marks."""

    name: str
    style: str
    genre: str
    share: float
    """Relative frequency among the personas that are not the minority."""
    offset: float
    """Raw reward of a useless completion."""
    scale: float
    """Raw reward between a useless completion and a perfect one."""


PERSONAS = {
    persona.name: persona
    for persona in (
        Persona("formal-jazz", "formal", "jazz", 0.30, 0.0, 1.0),
        Persona("slang-metal", "slang", "metal", 0.20, 0.5, 0.8),
        Persona("poetic-folk", "poetic", "folk", 0.16, -0.5, 0.6),
        Persona("formal-metal", "formal", "metal", 0.13, 1.0, 0.4),
        Persona("slang-folk", "slang", "folk", 0.11, -1.0, 0.2),
        Persona("poetic-jazz", "poetic", "jazz", 0.10, 0.2, 0.1),
        Persona("dry-techno", "dry", "techno", 0.0, -0.3, 0.05),
    )
}
"""The last one is the minority; its share is `minority_share`. Nobody else has its style or genre,
so what it likes is learned from its own rewards or not at all."""

VOCABULARY = tuple(
    sorted(
        {
            word
            for words in (
                *STYLE_WORDS.values(),
                *GENRE_WORDS.values(),
                *STYLE_HINTS.values(),
                *GENRE_HINTS.values(),
                NEUTRAL_WORDS,
                TOPICS,
            )
            for word in words.split()
        }
    )
)


CHOICES = tuple(
    word for words in (*STYLE_WORDS.values(), *GENRE_WORDS.values()) for word in words.split()
)
"""What a completion of one word is chosen from."""


def persona_utility(columns: Mapping[str, Json], completion: str) -> float:
    """Say how good a completion is for its persona, on a scale all personas share: u in [0, 1].

    Of the first W = `words` words, W - W//2 should be different words of the persona's style and
    W//2 of its genre (never more than the 8 there are); u is the mean of the two shares reached. A
    single word is the better the later it stands among the 8 of its genre, place / 8, and a word of
    the style is worth half of that.

    Raises:
        DataError: `columns` are not those of a personas example.
    """
    persona = _persona(columns)
    num_words = columns.get("words")
    if not isinstance(num_words, int) or num_words < 1:
        raise DataError(f"column words is {num_words!r}; expected a number from 1 upwards")
    said = set(completion.split()[:num_words])
    if num_words == 1:
        return _appeal(persona, *said) if said else 0.0
    style, genre = set(STYLE_WORDS[persona.style].split()), set(GENRE_WORDS[persona.genre].split())
    wanted_style = min(num_words - num_words // 2, len(style))
    wanted_genre = min(num_words // 2, len(genre))
    return (
        min(1.0, len(said & style) / wanted_style) + min(1.0, len(said & genre) / wanted_genre)
    ) / 2


def persona_reward(columns: Mapping[str, Json], completion: str) -> float:
    """Give the raw reward of one completion: offset_p + scale_p * (u + shift_x).

    Raises:
        DataError: `columns` are not those of a personas example.
    """
    persona, shift = _persona(columns), columns.get("shift")
    if not isinstance(shift, float):
        raise DataError(f"column shift is {shift!r}; expected a number")
    return persona.offset + persona.scale * (persona_utility(columns, completion) + shift)


def _appeal(persona: Persona, word: str) -> float:
    """Utility of a completion of one word."""
    for words, worth in ((GENRE_WORDS[persona.genre], 1.0), (STYLE_WORDS[persona.style], 0.5)):
        if word in words.split():
            return worth * (1 + words.split().index(word)) / len(words.split())
    return 0.0


def _persona(columns: Mapping[str, Json]) -> Persona:
    name = columns.get("persona")
    if not isinstance(name, str) or name not in PERSONAS:
        raise DataError(f"column persona is {name!r}; expected one of {', '.join(PERSONAS)}")
    return PERSONAS[name]


class PersonasConfig(Section):
    """Seven generated personas: a linguistic style and a music genre each, on reward scales of their
    own."""

    name: Literal["personas"]
    words: int = Field(default=6, ge=1)
    """Words of a completion; a single one is chosen from the words of all styles and genres."""
    minority_share: float = Field(default=0.04, gt=0, lt=1)
    """Share of the prompts that come from the smallest persona."""
    num_examples: int = Field(default=4096, ge=1)
    """Training prompts; a quarter as many are held out."""
    seed: int = Field(default=0, ge=0)
    """Seeds the prompts."""


def load_personas(config: PersonasConfig) -> Dataset:
    """Generate the users and their prompts. Held-out prompts are new ones of the same users.

    `columns` of an example: `persona` (the truth, for the reward and for checks; clusterers do not
    see it), `words` and `shift`. Features are counts of words written per style and of songs heard
    per genre, both noisy.
    """
    rng = np.random.default_rng(config.seed)
    num_users = max(len(PERSONAS), config.num_examples // PROMPTS_PER_USER)
    personas = _assign(num_users, config.minority_share, rng)
    num_held_out = max(1, config.num_examples // 4)
    examples = [
        _example(personas[index % num_users], f"user-{index % num_users}", config.words, rng)
        for index in range(config.num_examples + num_held_out)
    ]
    writes, hears = (f"writes {x}" for x in STYLE_WORDS), (f"hears {x}" for x in GENRE_WORDS)
    return Dataset(
        train=examples[: config.num_examples],
        evaluation=examples[config.num_examples :],
        users={f"user-{index}": _features(who, rng) for index, who in enumerate(personas)},
        feature_names=(*writes, *hears),
        vocabulary=VOCABULARY,
    )


def _assign(num_users: int, minority_share: float, rng: np.random.Generator) -> list[Persona]:
    """Each user's persona: one user each, the others by shares, in random order."""
    *others, minority = PERSONAS.values()
    total = sum(persona.share for persona in others)
    shares = [(1 - minority_share) * persona.share / total for persona in others]
    bounds = np.round(np.cumsum([*shares, minority_share]) * (num_users - len(PERSONAS)))
    counts = 1 + np.diff(bounds, prepend=0).astype(int)
    everybody = [who for who, n in zip([*others, minority], counts, strict=True) for _ in range(n)]
    return [everybody[index] for index in rng.permutation(len(everybody))]


def _example(persona: Persona, user: str, num_words: int, rng: np.random.Generator) -> Example:
    hints = [
        _hint(table, own, rng)
        for table, own in ((STYLE_HINTS, persona.style), (GENRE_HINTS, persona.genre))
        for _ in range(2)
    ]
    return Example(
        text=" ".join([*hints, str(rng.choice(TOPICS.split()))]),
        user=user,
        columns={
            "persona": persona.name,
            "words": num_words,
            "shift": float(rng.normal(0.0, SHIFT)),
        },
        choices=CHOICES if num_words == 1 else None,
    )


def _hint(table: Mapping[str, str], own: str, rng: np.random.Generator) -> str:
    others = [kind for kind in table if kind != own]
    kind = own if rng.random() < HINT_RATE else str(rng.choice(others))
    return str(rng.choice(table[kind].split()))


def _features(persona: Persona, rng: np.random.Generator) -> FloatArray:
    """[8] counts: words written per style, songs heard per genre."""
    halves: list[FloatArray] = []
    for kinds, own in ((list(STYLE_WORDS), persona.style), (list(GENRE_WORDS), persona.genre)):
        shares = np.full(len(kinds), (1 - OWN_SHARE) / len(kinds))
        shares[kinds.index(own)] += OWN_SHARE
        halves.append(rng.multinomial(COUNTED_WORDS, shares).astype(np.float64))
    return np.concatenate(halves)
