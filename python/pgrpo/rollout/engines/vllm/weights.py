"""How weights get from the trainer into vLLM, over vLLM's weight-transfer API.

vLLM asks for two ends: one in its workers, that takes weights and puts them into its model, and one
in the trainer, that drives the exchange. Those of vLLM (`nccl`, `ipc`) need CUDA. The ones here,
its backend `pgrpo`, hand over references within a process (`direct`) or a safetensors file to
others (`file`), whatever the device.

vLLM's processes load this module as a plugin (entry point `vllm.general_plugins`), so it imports
little of pgrpo.
"""

# vLLM is not in every environment that checks these types.
# pyright: reportMissingImports=false, reportUntypedBaseClass=false

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    WeightSource,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import (
    WeightTransferEngineFactory,
    WeightTransferTrainerFactory,
)

from pgrpo.errors import EngineError, engine_errors

Transfer = Literal["direct", "file", "nccl", "ipc"]
"""`direct`: references, to vLLM in this process. `file`: a safetensors file that vLLM's processes
see, too. `nccl`, `ipc`: vLLM's own, between GPUs and within one."""


class SyncClient(Protocol):
    """vLLM's side of a transfer, as its `LLM` and each of its servers offer it. Any failure raises."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Prepare the workers; for nccl, returns once they have met the trainer."""
        ...

    def start_weight_update(self) -> None:
        """Begin."""
        ...

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Returns once all workers compute with the new weights."""
        ...

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """End; outputs carry this version from now on."""
        ...

    def world_size(self) -> int:
        """Workers behind this client."""
        ...


def register() -> None:
    """Make the backend `pgrpo` known to the vLLM of this process; again is harmless."""
    # vLLM raises a ValueError where the name is known.
    with contextlib.suppress(ValueError):
        WeightTransferEngineFactory.register_engine("pgrpo", _WorkerEngine)
    with contextlib.suppress(ValueError):
        WeightTransferTrainerFactory.register_engine("pgrpo", _TrainerEngine)


class WeightSender:
    """Sends a model's weights to vLLM.

    Args:
        transfer: how.
        model: a transformers model; its parameters are read anew by every `send`.
        clients: vLLM in this process, or one for each server.
        dtype: in which weights travel; None: as they are.
        folder: of the file, for `file`; None: a temporary one, in memory if there is room.

    Raises:
        EngineError: vLLM or a server of it refused.
    """

    def __init__(
        self,
        transfer: Transfer,
        model: nn.Module,
        clients: Sequence[SyncClient],
        *,
        dtype: torch.dtype | None = None,
        folder: Path | None = None,
    ) -> None:
        register()
        source = _Parameters(model, dtype)
        self._num_bytes = sum(p.numel() * (dtype or p.dtype).itemsize for p in model.parameters())
        self._clients = _Clients(clients)
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        if transfer == "file":
            self._folder = tempfile.TemporaryDirectory(
                prefix="pgrpo-weights-",
                dir=folder or _room(self._num_bytes),
                ignore_cleanup_errors=True,
            )
        try:
            with engine_errors("vLLM cannot be set up to receive weights"):
                self._engine: Any = WeightTransferTrainerFactory.trainer_init(
                    self._init_info(transfer), client=self._clients, source=source
                )
        except EngineError:
            self.close()
            raise

    def _init_info(self, transfer: Transfer) -> Any:
        if transfer in ("direct", "file"):
            return _PgrpoInit(rank=0, folder=self._folder and Path(self._folder.name))
        # Not run here: needs CUDA.
        if transfer == "ipc":
            from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

            return IPCTrainerInitInfo(rank=0, packed=True)
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
        from vllm.utils.network_utils import get_ip, get_open_port

        return NCCLTrainerInitInfo(
            rank=0,
            master_address=get_ip(),
            master_port=get_open_port(),
            world_size=1 + self._clients.world_size(),
        )

    def send(self, version: int | str) -> int:
        """Bring the weights, as they are now, to vLLM. Returns their bytes.

        After an error what vLLM computes is undefined until the next `send` succeeds.

        Args:
            version: vLLM's outputs name it in `weight_versions`.

        Raises:
            EngineError: they did not arrive.
        """
        self._clients.version = str(version)
        with engine_errors(f"weights of version {version} did not reach vLLM"):
            self._engine.send_weights()
        return self._num_bytes

    def close(self) -> None:
        """Leave the transfer and remove its file."""
        if hasattr(self, "_engine"):
            self._engine.shutdown()
        if self._folder is not None:
            self._folder.cleanup()


def _room(num_bytes: int) -> str | None:
    memory = Path("/dev/shm")  # noqa: S108
    # Containers often have 64 MB there.
    if memory.is_dir() and shutil.disk_usage(memory).free > 2 * num_bytes:
        return str(memory)
    return None


class _Clients:
    """All clients as one, with the version that vLLM's own trainer ends leave out."""

    def __init__(self, clients: Sequence[SyncClient]) -> None:
        self._clients = clients
        self.version: str | None = None

    def _each(self, call: Callable[[SyncClient, int], Any]) -> list[Any]:
        if len(self._clients) == 1:
            # In its own process vLLM is called by the thread that made it.
            return [call(self._clients[0], 0)]
        with ThreadPoolExecutor(len(self._clients)) as threads:
            return list(threads.map(call, self._clients, range(len(self._clients))))

    def world_size(self) -> int:
        return sum(self._each(lambda client, _: client.world_size()))

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        infos = [init_info] * len(self._clients)
        if "rank_offset" in init_info:
            # nccl: the workers of all servers form one group, one server's after another's.
            offset = init_info["rank_offset"]
            infos = []
            for client in self._clients:
                infos.append({**init_info, "rank_offset": offset})
                offset += client.world_size()
        self._each(lambda client, i: client.init_weight_transfer_engine(infos[i]))

    def start_weight_update(self) -> None:
        try:
            self._each(lambda client, _: client.start_weight_update())
        except Exception:
            # A trainer that failed or died in an update left them in it, and they refuse another.
            for client in self._clients:
                with contextlib.suppress(Exception):
                    client.finish_weight_update()
            self._each(lambda client, _: client.start_weight_update())

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._each(lambda client, _: client.update_weights(update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        version = self.version if weight_version is None else weight_version
        self._each(lambda client, _: client.finish_weight_update(version))


class _Parameters(WeightSource):
    """A transformers model's parameters under the names of its checkpoint, tied ones once."""

    def __init__(self, model: nn.Module, dtype: torch.dtype | None) -> None:
        self._model = model
        self._dtype = dtype

    def _named(self) -> dict[str, Tensor]:
        from transformers.core_model_loading import revert_weight_conversion

        named = {name: p.detach() for name, p in self._model.named_parameters()}
        # transformers fuses or renames some models' weights (experts) when it loads them.
        return revert_weight_conversion(cast(Any, self._model), named)

    def _wire(self, tensor: Tensor) -> torch.dtype:
        return self._dtype or tensor.dtype

    def metadata(self) -> list[Any]:
        return [ParamMeta(n, self._wire(t), tuple(t.shape)) for n, t in self._named().items()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._named().items():
            yield name, tensor.to(self._wire(tensor))


@dataclass
class _PgrpoInit(TrainerInitInfo):
    backend: ClassVar[str] = "pgrpo"

    folder: Path | None
    """Of the file; None: by reference."""


class _TrainerEngine(TrainerWeightTransferEngine):
    """The trainer's end of `pgrpo`. A file stays until the next, for a server that restarts."""

    init_info_cls = _PgrpoInit

    def __init__(self, *, folder: Path | None, **options: Any) -> None:
        super().__init__(**options)
        self._folder = folder
        self._num_sent = 0

    @classmethod
    def trainer_init(
        cls, init_info: _PgrpoInit, *, client: Any, source: Any = None
    ) -> _TrainerEngine:
        engine = cls(folder=init_info.folder, client=client, source=source)
        client.init_weight_transfer_engine({})
        return engine

    def send_weights(self) -> None:
        if self._folder is None:
            self._update({"tensors": self.source})
            return
        for old in self._folder.iterdir():
            old.unlink()
        self._num_sent += 1
        unfinished = self._folder / "unfinished"
        save_file({name: tensor.contiguous() for name, tensor in self.source}, unfinished)
        # A name of its own, so that who comes late finds no other weights than those it was told of.
        path = self._folder / f"{self._num_sent}.safetensors"
        os.replace(unfinished, path)
        self._update({"path": str(path)})

    def _update(self, update_info: dict[str, Any]) -> None:
        self.client.start_weight_update()
        self.client.update_weights(update_info)
        self.client.finish_weight_update()


@dataclass
class _NoInit(WeightTransferInitInfo):
    """Nothing to agree on."""


@dataclass
class _Update(WeightTransferUpdateInfo):
    """All weights: (name, tensor) pairs, or the path of a safetensors file."""

    tensors: Iterable[tuple[str, Tensor]] | None = None
    path: str | None = None


class _WorkerEngine(WeightTransferEngine):
    """The worker's end of `pgrpo`. An update is all weights, so it is finished as it arrives."""

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
            # Mapped, not read.
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
    """The way of vLLM itself, for kernels that keep weights in any form."""
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
    """Load into the model's own parameters, several times faster than layer by layer."""
    packed = [_PackedLayer(m) for m in model.modules() if _is_packed(m)]
    try:
        return model.load_weights(weights)
    finally:
        for layer in packed:
            layer.close()
        _pack_embeddings(model)


def _is_packed(layer: nn.Module) -> bool:
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
        """Where the weight came in part or not at all, the layer keeps its old one."""
        self._layer.weight = self._packed


def _pack_embeddings(model: nn.Module) -> None:
    """Renew the packed copies of embeddings and heads, tied ones of which vLLM forgets.

    On a CPU the head computes with a packed copy of its weight. A tied head's is never renewed by
    vLLM, since no weight of that name is loaded.
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
