"""The distribution pgrpo-style: built, installed, and found through its entry point."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from functools import partial
from typing import Any

import distributions
import pytest
import tomli_w
from conftest import write_config
from hypothesis import given
from hypothesis import strategies as st

from pgrpo.config.sections import RewardConfig
from pgrpo.config.toml import read_toml
from pgrpo.data.personas import GENRE_HINTS, GENRE_WORDS, PERSONAS, STYLE_HINTS, STYLE_WORDS
from pgrpo.errors import ConfigError, DataError
from pgrpo.plugins.registry import load_registry
from pgrpo.types import Example, Prompt, Rollout


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """What a user has after `pip install`, on this process's path too."""
    site = distributions.install(
        distributions.PLUGINS / "pgrpo-style", tmp_path_factory.mktemp("style")
    )
    with distributions.importable(site, "pgrpo_style"):
        yield site


@pytest.fixture(scope="module")
def measures(site):
    return importlib.import_module("pgrpo_style.measures")


def reward(**settings: Any) -> Any:
    return load_registry().reward(RewardConfig.model_validate(settings))


def rollout(completion: str, **columns: Any) -> Rollout:
    prompt = Prompt(Example("Say it.", "somebody", columns), 0, (1,))
    return Rollout(prompt, 0, (1,), completion, (0.0,), False)


def scores(scorer: Any, *completions: str, **columns: Any) -> list[Any]:
    return scorer([rollout(completion, **columns) for completion in completions])


TEXT = "It's late, isn't it? \u201cGo now!\u201d he said. The dog's bowl\nweighs 3.5 kg"
"""It's late isn't it | go now | he said | the dog's bowl weighs 3.5 kg: 14 words in 4 sentences and 2
lines; letters and digits 3+4+4+2 + 2+3 + 2+4 + 3+4+4+6+2+2 = 45; marks , ? " ! " . are 6."""


@pytest.mark.parametrize(
    ("measure", "expected"),
    [
        ("words_per_sentence", 14 / 4),
        ("words_per_line", 14 / 2),
        ("letters_per_word", 45 / 14),
        ("grade", 4.71 * 45 / 14 + 0.5 * 14 / 4 - 21.43),
        ("type_token_ratio", 1.0),
        ("contractions", 2 / 14),
        ("punctuation", 6 / 14),
        ("exclamations", 1 / 4),
    ],
)
def test_a_text_is_measured_as_by_hand(measures, measure, expected):
    assert measures.MEASURES[measure](measures.Text.of(TEXT)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("One", [""]),
        ("One. Two", [".", ""]),
        ("One.\nTwo!?", [".", "!?"]),
        ("... One (two!) three.", ["!", "."]),
        ("one.two", [""]),
    ],
)
def test_sentences_end_at_marks_before_white_space(measures, text, ends):
    assert list(measures.Text.of(text).ends) == ends


def test_owners_and_plurals_are_entries_but_no_contractions(measures):
    text = measures.Text.of("The band's riffs won't stop, they\u2019re loud and that's that.")
    assert measures.contractions(text) == 3 / 10
    assert measures.share(text, measures.lexicon(["Band", "riff"])) == 2 / 10


def test_a_style_is_the_mean_of_its_ramps(site):
    brisk = reward(
        name="style",
        style="brisk",
        styles={
            "brisk": {
                "words": ["go", "now"],
                "wants": {
                    "words_per_sentence": [10, 2],
                    "exclamations": [0, 1],
                    "markers": [0, 0.8],
                    "foreign_markers": [0.5, 0],
                },
            }
        },
    )
    # Four words in two sentences, one exclaimed, two words of the style's, one of poetic style alone.
    assert scores(brisk, "Go now! Tender horses.") == [(1 + 0.5 + 0.5 / 0.8 + 0.5) / 4]
    # Beyond the ends: 12 words in a sentence, all of them the style's.
    assert scores(brisk, "go " * 12) == [(0 + 0 + 1 + 1) / 4]


def test_a_genre_wants_enough_words_of_its_own_and_no_bare_list(site):
    jazz = reward(name="genre", genre="jazz", enough=2, max_share=0.5)
    assert scores(
        jazz,
        "I heard a saxophone and a trumpet last night",  # d 2, s 2/9
        "I heard one saxophone",  # d 1, s 1/4
        "saxophone saxophones saxophone trumpet",  # d 2, s 1
        "a saxophone, a trumpet and a heavy riff",  # d 2, o 2, s 2/8
        "I heard a banjo",  # d 0
    ) == [1.0, 0.5, 0.5, 0.5, 0.0]


PERSONA_TEXTS = {
    "formal": [
        "Furthermore, one should sincerely appreciate the distinguished saxophone ensemble performing.",
        "Regarding the concert, we respectfully recommend that all guests arrive accordingly early.",
    ],
    "slang": [
        "Yo, that banger's sick! We're gonna vibe all night, bruh!",
        "Dude, it's lit! Don't sleep on this, it's lowkey dope!",
    ],
    "poetic": [
        "A silver river sleeps\nbeneath the tender dawn,\nmy heart a drifting ember.",
        "Whisper, moonlit meadow,\nof sorrow and of rain,\nand golden petals falling.",
    ],
    "dry": [
        "The song is roughly three minutes long. It is adequate.",
        "The list contains ten tracks. The sound is average. The price is standard.",
    ],
}


def test_each_style_is_found_best_where_it_was_meant(site):
    scorers = {style: reward(name="style", style=style) for style in STYLE_WORDS}
    for meant, texts in PERSONA_TEXTS.items():
        for text in texts:
            by_style = {style: scores(scorer, text)[0] for style, scorer in scorers.items()}
            assert max(by_style, key=by_style.__getitem__) == meant, (text, by_style)


def test_the_words_of_the_personas_are_known(site):
    rewards = importlib.import_module("pgrpo_style.rewards")
    hints = {
        word for table in (STYLE_HINTS, GENRE_HINTS) for word in " ".join(table.values()).split()
    }
    for table, lexicons in ((STYLE_WORDS, rewards.STYLE_WORDS), (GENRE_WORDS, rewards.GENRE_WORDS)):
        for name, words in table.items():
            assert set(words.split()) <= set(lexicons[name].split())
    for lexicons in (rewards.STYLE_WORDS, rewards.GENRE_WORDS):
        listed = [word for words in lexicons.values() for word in words.split()]
        assert len(listed) == len(set(listed))
        assert not hints & set(listed)  # else a completion would earn by repeating its prompt


def test_the_wish_of_each_persona_is_read_from_its_column(site):
    style, genre = (reward(name=name, column="persona") for name in ("style", "genre"))
    text = "Sincerely, a banjo, a riff and a heavy growl of synth."
    for name, who in PERSONAS.items():
        told = scores(reward(name="style", style=who.style), text)
        assert scores(style, text, persona=name) == told
        told = scores(reward(name="genre", genre=who.genre), text)
        assert scores(genre, text, persona=name) == told
    by_genre = [scores(genre, text, persona=f"x-{name}")[0] for name in GENRE_WORDS]
    # Five words are of genres: no jazz, three of metal, one of folk, one of techno, where 3 are enough.
    assert by_genre == [0, 1 * 3 / 5, 1 / 3 * 1 / 5, 1 / 3 * 1 / 5]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({}, r"column 'persona' is None, expected the name of a style; the example has no columns"),
        ({"persona": 3, "words": 6}, "column 'persona' is 3, .* the example has persona, words"),
        (
            {"persona": "gothic-jazz"},
            "is 'gothic-jazz', which names no style; expected one of formal",
        ),
        ({"persona": "formal-dry"}, "is 'formal-dry', which names dry and formal"),
    ],
)
def test_a_column_without_one_style_is_an_error(site, columns: Mapping[str, Any], words: str):
    with pytest.raises(DataError, match=words):
        scores(reward(name="style", column="persona"), "Yes.", **columns)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "style"}, "neither of style and column is given; expected one of them"),
        ({"name": "genre", "genre": "jazz", "column": "c"}, "both of genre and column is given"),
        ({"name": "style", "style": "formul"}, "style is 'formul'; did you mean 'formal'?"),
        ({"name": "genre", "genre": "polka", "genres": {"polka": []}}, "genres.polka is empty"),
        (
            {"name": "style", "style": "x", "styles": {"x": {"wants": {"grade": [1, 1]}}}},
            r"wants.grade is \[1, 1\]; expected two values",
        ),
        (
            {"name": "style", "style": "x", "styles": {"x": {"wants": {"markers": [0, 1]}}}},
            "wants.markers is given, but words is empty",
        ),
        ({"name": "style", "style": "x", "styles": {"x": {"wants": {"length": [0, 1]}}}}, "length"),
    ],
)
def test_wrong_settings_are_refused(site, settings: Mapping[str, Any], words: str):
    with pytest.raises(ConfigError, match=words):
        reward(**settings)


@pytest.fixture(scope="module")
def scorers(site):
    """Every style and every genre, built once."""
    names = (("style", STYLE_WORDS), ("genre", GENRE_WORDS))
    return [reward(**{"name": name, name: wish}) for name, wishes in names for wish in wishes]


@given(text=st.text(max_size=60) | st.text(alphabet="aeby '!.\n", max_size=60))
def test_every_text_has_a_score_from_0_to_1_if_it_has_a_word(scorers, text):
    has_word = any(letter.isalnum() for letter in text)
    for scorer in scorers:
        (score,) = scores(scorer, text)
        assert (score is not None) == has_word
        assert score is None or 0 <= score <= 1


def test_what_the_readme_shows_can_be_set(site):
    distributions.check_readme("pgrpo-style")


@pytest.mark.assets
def test_both_are_found_and_conform_in_an_environment_of_their_own(tmp_path):
    source = distributions.PLUGINS / "pgrpo-style"
    pgrpo = partial(distributions.run, "pgrpo", distributions.fresh(source, tmp_path))
    listed = {
        (plugin["kind"], plugin["name"]): plugin
        for plugin in json.loads(pgrpo("plugins", "--json"))
    }
    for name in ("style", "genre"):
        assert listed["reward", name]["distribution"] == "pgrpo-style 0.1.0"
        assert set(listed["reward", name]["settings"]) >= {name, "column"}
    checked = json.loads(
        pgrpo("plugins", "check", "pgrpo-style", "--set", "column=persona", "--json")
    )
    assert [one["name"] for one in checked] == ["genre", "style"]


def test_personas_who_are_answered_in_sentences_are_a_base(site, tmp_path):
    """The config that comes with the distribution, shorter and with a tiny model."""
    tree = read_toml(distributions.PLUGINS / "pgrpo-style" / "personas.toml")
    tree["run"] |= {"num_steps": 2, "prompts_per_step": 4, "eval_every": 2, "checkpoint_every": 2}
    tree["data"] |= {"num_examples": 64}
    tree["model"] = {"name": "tiny", "precision": "fp32"}
    config, out = tmp_path / "config.toml", tmp_path / "out"
    config.write_text(tomli_w.dumps(tree), "utf-8")
    command = ["reproduce", "rollouts", "--on", str(config), "--out", str(out), "--seeds", "0"]
    command += ["--settings", "steps-1,steps-2", "--arms", "pgrpo,grpo", "--quiet"]
    distributions.pgrpo_with(site, *command)
    rows = json.loads((out / "table.json").read_text())
    figures = [row["figure"] for row in rows]
    assert figures.count(None) == 1, "one completion alone tells grpo nothing"
    assert all(0 <= figure <= 2 for figure in figures if figure is not None)


def test_they_train_the_personas(site, tmp_path):
    config = write_config(
        tmp_path,
        {
            "rewards": [
                {"name": "style", "column": "persona"},
                {"name": "genre", "column": "persona", "enough": 1, "max_share": 1.0},
            ],
            "evaluation": [{"name": "genre", "column": "persona", "enough": 1}],
        },
    )
    run = tmp_path / "run"
    distributions.pgrpo_with(site, "train", str(config), "--out", str(run))
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert samples
    # A completion without a word, whose first token was the end, has no reward.
    for sample in samples:
        assert (sample["reward"] is None) == (not sample["completion"].strip()), sample
