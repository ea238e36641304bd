"""vLLM's end of our weight transfer: takes weights and puts them into vLLM's model.

vLLM's processes load this module as a plugin (entry point `vllm.general_plugins`), so it imports
nothing else of pgrpo. The trainer's end is `sender`.
"""

# vLLM is not in every environment that checks these types.
# pyright: reportMissingImports=false, reportUntypedBaseClass=false

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory


def register() -> None:
    """Make the backend `pgrpo` known to the vLLM of this process; again is harmless."""
    # vLLM raises a ValueError where the name is known.
    with contextlib.suppress(ValueError):
        WeightTransferEngineFactory.register_engine("pgrpo", _WorkerEngine)


@dataclass
class _NoInit(WeightTransferInitInfo):
    """What both ends agree on before the first update: nothing."""


@dataclass
class _Update(WeightTransferUpdateInfo):
    """All weights of the model, in one of two forms."""

    tensors: Iterable[tuple[str, Tensor]] | None = None
    """Names and references to the trainer's own tensors, where vLLM runs in its process."""
    path: str | None = None
    """Path of a safetensors file that the trainer has written."""


class _WorkerEngine(WeightTransferEngine):
    """vLLM's end, one in each of its workers. An update is all weights, and vLLM's model computes with
    them as soon as they are received: there is nothing to start, finish or shut down."""

    init_info_cls = _NoInit
    update_info_cls = _Update

    def init_transfer_engine(self, init_info: _NoInit) -> None:
        pass

    def start_weight_update(self) -> None:
        pass

    def finish_weight_update(self) -> None:
        pass

    def shutdown(self) -> None:
        pass

    @torch.no_grad()
    def receive_weights(self, update_info: _Update) -> None:
        weights: Iterable[tuple[str, Tensor]]
        if update_info.tensors is not None:
            weights = update_info.tensors
        elif update_info.path is not None and Path(update_info.path).is_file():
            # The file is mapped into memory, and read when it is copied into the model.
            weights = load_file(update_info.path).items()
        else:
            raise ValueError(
                f"no weights at {update_info.path}; expected a file that the trainer wrote, in a "
                "folder that it shares with vLLM"
            )
        if self.device.type == "cpu" and all(_is_plain(layer) for layer in self.model.modules()):
            loaded = _load_in_place(self.model, weights)
        else:
            loaded = _load_layerwise(self.model, self.model_config, weights)
        missing = {name for name, _ in self.model.named_parameters()} - loaded
        if missing:
            raise ValueError(
                f"vLLM's {type(self.model).__name__} has {min(missing)!r} and "
                f"{len(missing) - 1} more weights that the trainer's model does not have"
            )


def _load_layerwise(
    model: Any, model_config: Any, weights: Iterable[tuple[str, Tensor]]
) -> set[str]:
    """Load as vLLM itself does, layer by layer, for kernels that keep weights in any form.

    Returns:
        Names of the parameters that were loaded.
    """
    from vllm.model_executor.model_loader.reload import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
    )

    initialize_layerwise_reload(model)
    try:
        return model.load_weights(weights)
    finally:
        # Also after an error: it puts back what was not loaded.
        finalize_layerwise_reload(model, model_config)
        _pack_embeddings(model)


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer's kernels use its weights as they were loaded, or packed by `cpu_linear`."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    method = getattr(layer, "quant_method", None)
    plain = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)
    return not isinstance(method, QuantizeMethodBase) or type(method) in plain


def _load_in_place(model: Any, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
    """Load into the model's own parameters, several times faster than layer by layer.

    Returns:
        Names of the parameters that were loaded.
    """
    packed = [_PackedLayer(m) for m in model.modules() if _is_packed(m)]
    try:
        return model.load_weights(weights)
    finally:
        for layer in packed:
            layer.close()
        _pack_embeddings(model)


def _is_packed(layer: nn.Module) -> bool:
    """Whether a layer keeps its weight in packed form only."""
    weight = getattr(layer, "weight", None)
    return hasattr(layer, "cpu_linear") and isinstance(weight, Tensor) and weight.numel() == 0


class _PackedLayer:
    """A layer that keeps its weight in packed form only, while it is loaded.

    Its parameter is replaced by one without memory, whose loader fills a buffer and packs it when
    it is full: seldom is there more than one buffer.
    """

    def __init__(self, layer: Any) -> None:
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
        from vllm.model_executor.model_loader.reload.meta import to_meta_tensor
        from vllm.model_executor.model_loader.reload.sanitize import restore_layer_refs

        self._layer = layer
        self._packed = layer.weight
        self._shape: Any = restore_layer_refs(
            get_layerwise_info(layer).restore_metadata[0]["weight"], layer
        )
        self._missing = self._shape.numel()
        self._buffer: Any = None
        stand_in: Any = to_meta_tensor(self._shape)
        stand_in.weight_loader = self._load
        layer.weight = stand_in

    def _load(self, _: Tensor, *args: Any, **options: Any) -> None:
        from vllm.model_executor.model_loader.reload.meta import (
            CopyCounter,
            materialize_meta_tensor,
        )

        if self._buffer is None:
            self._buffer = materialize_meta_tensor(self._shape)
        with CopyCounter() as counter:
            self._shape.weight_loader(self._buffer, *args, **options)
        self._missing -= counter.copied_numel
        if self._missing <= 0:
            self._layer.weight = self._buffer
            self._layer.quant_method.process_weights_after_loading(self._layer)
            self._packed, self._buffer = self._layer.weight, None

    def close(self) -> None:
        """Give the layer its newest whole weight: where one came in part or not at all, the old one."""
        self._layer.weight = self._packed


def _pack_embeddings(model: nn.Module) -> None:
    """Renew the packed copies of embeddings and heads.

    On a CPU the head computes with a packed copy of its weight. vLLM renews it when a weight of that
    name is loaded, which for a head that is tied to the embedding never happens.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    packed: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding) and hasattr(module, "cpu_linear"):
            layer: Any = module
            first = packed.setdefault(id(layer.weight), layer)
            if first is layer:
                layer.quant_method.process_weights_after_loading(layer)
            else:
                layer.cpu_linear = first.cpu_linear
