"""Small real models for the tests: tiny configurations of families people train."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from pgrpo.attention import ATTENTION
from pgrpo.models import LanguageModel

# Tiny tensors gain nothing from threads, and lose much when the machine is shared.
torch.set_num_threads(1)

VOCAB = 97
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}
FAMILIES = {
    # SmolLM2 is a Llama with tied embeddings.
    "smollm2": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
    "gemma": (GemmaConfig, GemmaForCausalLM, {}),
    # Sliding windows in every other layer, capped scores and capped logits.
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, {"sliding_window": 4}),
}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, VOCAB)}}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def tiny_model(family: str, seed: int = 0, precision: str = "fp32") -> LanguageModel:
    config_class, model_class, extra = FAMILIES[family]
    torch.manual_seed(seed)
    config = config_class(**SHAPE, **extra)
    model: PreTrainedModel = model_class._from_config(config, attn_implementation=ATTENTION)
    # The usual initialisation is so small that all logits are nearly equal; errors would hide.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4)
    return LanguageModel(model.eval(), tiny_tokenizer(), precision)


@pytest.fixture(params=list(FAMILIES))
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return tiny_model(request.param)
