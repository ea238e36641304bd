"""The sizes of a language model, by its config alone: no weights are read, and none are made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from pgrpo.config.sections import ModelConfig
from pgrpo.errors import ModelError
from pgrpo.model.attention import ATTENTION
from pgrpo.model.gguf import model_folder
from pgrpo.model.language_model import load_language_model
from pgrpo.model.tokenizer import model_errors


@dataclass(frozen=True, slots=True)
class Shape:
    """What memory and arithmetic of a decoder follow from. Numbers are of elements.

    Matrices are the weights of the decoder's linear layers, through which every token passes; the
    embedding and the head are none of them.
    """

    num_layers: int
    hidden: int
    """Width of the residual stream."""
    intermediate: int
    """Width within the feed-forward network."""
    num_heads: int
    """Of queries."""
    query: int
    """Width of all heads of queries."""
    key: int
    """Width of all heads of keys, and of values."""
    normed: int
    """Elements of the residual stream that one layer normalises of each token."""
    heads_normed: int
    """The same of queries and keys."""
    vocab: int
    """Rows of the head."""
    num_parameters: int
    """Of the whole model, tied ones once, with adapters."""
    num_trained: int
    """Of those, that have gradients."""
    layer_parameters: int
    """Of the largest layer."""
    root_parameters: int
    """Outside the layers: embedding, head, last norm."""
    matrices: int
    trained_matrices: int
    matrix_inputs: int
    """Elements that the matrices read of each token."""
    matrix_outputs: int
    """Elements that the matrices write for each token."""
    adapter_inputs: int
    """Elements that adapters read of each token, each in a copy of its own; 0 without adapters."""
    head_trained: bool
    embedding_trained: bool
    capped: bool
    """Whether attention's scores are soft-capped."""


_QWEN3 = {
    "model_type": "qwen3",
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
    "max_position_embeddings": 40_960,
}

PUBLISHED: dict[str, dict[str, Any]] = {
    "gemma-2b": {
        "model_type": "gemma",
        "hidden_size": 2048,
        "intermediate_size": 16_384,
        "num_hidden_layers": 18,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "vocab_size": 256_000,
        "max_position_embeddings": 8192,
    },
    "qwen3-1.7b": {
        **_QWEN3,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "qwen3-8b": {
        **_QWEN3,
        "hidden_size": 4096,
        "intermediate_size": 12_288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
}
"""The models of the P-GRPO paper (arXiv 2603.10009) by the last part of their hub names, in lower case:
the sizes that config.json has on the hub (google/gemma-2b, Qwen/Qwen3-1.7B, Qwen/Qwen3-8B), so that
they can be planned for where nothing can be downloaded."""


def read_shape(config: ModelConfig, vocabulary: Sequence[str] = ()) -> Shape:
    """The shape of the model that a config names; of a folder, config.json is enough, and of those in
    `PUBLISHED` the name.

    Args:
        config: the section `[model]`.
        vocabulary: words of the data set, for `name = "tiny"`.

    Raises:
        ModelError: there is no such model, or it is of a kind that is not known here.
    """
    if config.name == "tiny":
        # Its config is made with it, in a moment.
        return shape_of(load_language_model(config, vocabulary=vocabulary).model)
    known = PUBLISHED.get(config.name.rpartition("/")[2].lower())
    if known is not None and not Path(config.name).exists():
        folder = config.name
        found: Any = AutoConfig.for_model(**known)
    else:
        folder = model_folder(config.name)
        extra: dict[str, Any] = {} if config.revision is None else {"revision": config.revision}
        with model_errors(folder):
            found = AutoConfig.from_pretrained(folder, **extra)
    # Tensors on the device `meta` have a shape and no memory.
    with model_errors(folder), torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(found, attn_implementation=ATTENTION)
        if config.lora is not None:
            import peft

            model = peft.get_peft_model(
                model,
                peft.LoraConfig(
                    r=config.lora.rank,
                    target_modules=config.lora.targets,
                    task_type="CAUSAL_LM",
                ),
            )
    return shape_of(model)


def shape_of(model: Any) -> Shape:
    """The shape of a model of transformers, with adapters of peft or without.

    Raises:
        ModelError: its layers do not multiply by matrices alone, as mixtures of experts, or differ
            from each other, or compress keys and values, or its config lacks a size.
    """
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    name = type(bare).__name__
    config: Any = bare.config.get_text_config()
    head, embedding = bare.get_output_embeddings(), bare.get_input_embeddings()
    blocks: set[str] = set(bare._no_split_modules or ())
    layers = [module for module in bare.modules() if type(module).__name__ in blocks]
    if not layers:
        raise ModelError(f"{name} does not tell which of its modules are layers")
    for layer in layers:
        for weight, parameter in layer.named_parameters():
            if parameter.ndim > 2:
                raise ModelError(
                    f"{name} has weights of {parameter.ndim} axes ({weight}), whose cost is not "
                    "known here"
                )
    if getattr(config, "kv_lora_rank", None) is not None:
        raise ModelError(
            f"{name} compresses keys and values (kv_lora_rank is {config.kv_lora_rank}), and the cost "
            "of that is not known here"
        )
    for size in ("num_key_value_heads", "intermediate_size"):
        # Some configs have a list, a number for each layer.
        if not isinstance(getattr(config, size, None), int):
            raise ModelError(
                f"the config of {name} has no single {size}, without which its cost is not known here"
            )
    if any(_weights(layer) != _weights(layers[0]) for layer in layers):
        raise ModelError(
            f"{name} has layers whose weights differ in shape, and the cost of such is not known here"
        )
    linear = [m for layer in layers for m in layer.modules() if isinstance(m, nn.Linear)]
    if not linear:
        raise ModelError(
            f"{name} has no torch.nn.Linear in its layers, and the cost of others is not known here"
        )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    query = config.num_attention_heads * head_dim
    key = config.num_key_value_heads * head_dim
    norms = {
        name.rpartition(".")[2]: module.weight.numel()
        for name, module in layers[0].named_modules()
        if type(module).__name__.endswith("Norm")
    }
    # Their norms have the width of a single head.
    heads_normed = sum(
        width for name, width in (("q_norm", query), ("k_norm", key)) if name in norms
    )
    adapters = [
        module
        for layer in layers
        for name, module in layer.named_modules()
        if ".lora_A" in name and isinstance(module, nn.Linear)
    ]
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    parameters = list(model.parameters())
    num_parameters = sum(p.numel() for p in parameters)
    return Shape(
        num_layers=len(layers),
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        num_heads=config.num_attention_heads,
        query=query,
        key=key,
        normed=sum(n for name, n in norms.items() if name not in ("q_norm", "k_norm")),
        heads_normed=heads_normed,
        vocab=head.weight.shape[0],
        num_parameters=num_parameters,
        num_trained=sum(p.numel() for p in parameters if p.requires_grad),
        layer_parameters=max(sizes),
        root_parameters=num_parameters - sum(sizes),
        matrices=sum(m.weight.numel() for m in linear),
        trained_matrices=sum(m.weight.numel() for m in linear if m.weight.requires_grad),
        matrix_inputs=sum(m.in_features for m in linear),
        matrix_outputs=sum(m.out_features for m in linear),
        adapter_inputs=sum(m.in_features for m in adapters),
        head_trained=bool(head.weight.requires_grad),
        embedding_trained=bool(embedding.weight.requires_grad),
        capped=getattr(config, "attn_logit_softcapping", None) is not None,
    )


def _weights(layer: nn.Module) -> dict[str, torch.Size]:
    """Shapes of a layer's own weights; adapters, which need not be on all layers, are none of them."""
    return {
        name.replace(".base_layer.", "."): parameter.shape
        for name, parameter in layer.named_parameters()
        if ".lora_" not in name
    }
