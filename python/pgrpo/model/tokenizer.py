"""Tokenizers, which need no weights."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, cast

from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from pgrpo.config.sections import ModelConfig
from pgrpo.errors import ModelError
from pgrpo.model.gguf import model_folder


def load_tokenizer(config: ModelConfig, vocabulary: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """The tokenizer of the model that a config names, or of the `tiny` one.

    Args:
        config: the `[model]` section.
        vocabulary: words of the data set, for `name = "tiny"`; without them it reads bytes.

    Raises:
        ModelError: there is no such model, or it cannot be used here.
    """
    if config.name == "tiny":
        return tiny_tokenizer(vocabulary)
    return pretrained_tokenizer(model_folder(config.name), config.revision)


def pretrained_tokenizer(folder: str, revision: str | None) -> PreTrainedTokenizerFast:
    """The tokenizer in a folder, or of a hub name.

    Raises:
        ModelError: there is none, or it cannot be used here.
    """
    extra: dict[str, Any] = {} if revision is None else {"revision": revision}
    with model_errors(folder):
        AutoConfig.from_pretrained(folder, **extra)
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", **extra)
    return cast(PreTrainedTokenizerFast, tokenizer)


def tiny_tokenizer(vocabulary: Sequence[str]) -> PreTrainedTokenizerFast:
    """Whole words, each a token, after `<pad>`, `<eos>` and `<unk>`; without words, bytes of UTF-8."""
    specials = ["<pad>", "<eos>", "<unk>"]
    words = vocabulary or sorted(pre_tokenizers.ByteLevel.alphabet())
    places = {word: place for place, word in enumerate([*specials, *words])}
    if vocabulary:
        core = Tokenizer(models.WordLevel(places, unk_token="<unk>"))
        core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        core = Tokenizer(models.BPE(places, [], unk_token="<unk>"))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


@contextmanager
def model_errors(folder: str) -> Generator[None]:
    """What transformers says of a model that it cannot load, as one sentence.

    Raises:
        ModelError: it said something.
    """
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"model {folder!r} cannot be loaded: {said[0]}") from error
