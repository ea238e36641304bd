"""The trainer's end of the transfer of weights into vLLM, over vLLM's weight-transfer API.

vLLM asks for two ends: one in its workers, that takes weights and puts them into its model, and one
in the trainer, that drives the exchange. Those of vLLM (`nccl`, `ipc`) need CUDA. Ours, its backend
`pgrpo`, hands over references within a process (`direct`) or a safetensors file to others (`file`),
whatever the device; its end in the workers is `receiver`.
"""

# vLLM is not in every environment that checks these types.
# pyright: reportMissingImports=false, reportUntypedBaseClass=false

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    WeightSource,
)
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

from pgrpo.errors import EngineError, engine_errors
from pgrpo.model.language_model import whole_tensor
from pgrpo.rollout.engines.vllm.clients import AllClients, SyncClient

Transfer = Literal["direct", "file", "nccl", "ipc"]
"""`direct`: references, to vLLM in this process. `file`: a safetensors file that vLLM's processes can
read as well. `nccl`, `ipc`: vLLM's own, between GPUs and within one."""


class WeightSender:
    """Sends a model's weights to vLLM.

    Args:
        transfer: how they travel.
        model: a transformers model; its parameters are read anew by every `send`.
        clients: one for vLLM in this process, or one for each server.
        dtype: what weights are converted to before they travel; None leaves them as they are.
        folder: where `file` writes its file; None takes a temporary folder, in memory if there is room.

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
        # vLLM raises a ValueError where the name is known.
        with contextlib.suppress(ValueError):
            WeightTransferTrainerFactory.register_engine("pgrpo", _TrainerEngine)
        self._source = _Parameters(model, dtype)
        self._num_bytes = sum(p.numel() * (dtype or p.dtype).itemsize for p in model.parameters())
        self._clients = AllClients(clients)
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        if transfer == "file":
            self._folder = tempfile.TemporaryDirectory(
                prefix="pgrpo-weights-",
                dir=folder or _memory_folder(self._num_bytes),
                ignore_cleanup_errors=True,
            )
        try:
            with engine_errors("vLLM cannot be set up to receive weights"):
                self._engine: Any = WeightTransferTrainerFactory.trainer_init(
                    self._init_info(transfer), client=self._clients, source=self._source
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

    def gather(self) -> None:
        """Put together, for the next `send`, weights that are split over processes; the others call
        `take_part` meanwhile."""
        self._source.gather()

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


def take_part(model: nn.Module) -> None:
    """Give the process that sends them what this one has of the weights."""
    for _ in _Parameters(model, None):
        pass


def _memory_folder(num_bytes: int) -> str | None:
    """A folder whose files are kept in memory, if the system has one with room for so many bytes."""
    memory = Path("/dev/shm")  # noqa: S108
    # Containers often have 64 MB there.
    if memory.is_dir() and shutil.disk_usage(memory).free > 2 * num_bytes:
        return str(memory)
    return None


class _Parameters(WeightSource):
    """A transformers model's parameters under the names that its checkpoint has for them.

    Parameters that are tied to each other come once.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None) -> None:
        self._model = model
        self._dtype = dtype
        self._gathered: dict[str, Tensor] | None = None

    def gather(self) -> None:
        """Put all weights together, to be iterated over once."""
        self._gathered = {name: tensor.cpu() for name, tensor in self}

    def _named(self) -> dict[str, Tensor]:
        from transformers.core_model_loading import revert_weight_conversion

        named = {name: p.detach() for name, p in self._model.named_parameters()}
        # transformers fuses or renames some models' weights (experts) when it loads them.
        return revert_weight_conversion(cast(Any, self._model), named)

    def _sent_dtype(self, tensor: Tensor) -> torch.dtype:
        return self._dtype or tensor.dtype

    def metadata(self) -> list[Any]:
        return [ParamMeta(n, self._sent_dtype(t), tuple(t.shape)) for n, t in self._named().items()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        if self._gathered is not None:
            gathered, self._gathered = self._gathered, None
            yield from gathered.items()
            return
        for name, tensor in self._named().items():
            yield name, whole_tensor(tensor).to(self._sent_dtype(tensor))


@dataclass
class _PgrpoInit(TrainerInitInfo):
    """What the trainer's end of `pgrpo` is made from."""

    backend: ClassVar[str] = "pgrpo"

    folder: Path | None
    """Folder that the trainer writes its file into; None hands over references instead."""


class _TrainerEngine(TrainerWeightTransferEngine):
    """The trainer's end of `pgrpo`.

    The file of an update stays until the next one, for servers that restart and have to read it again.
    """

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
        # Each update has a file name of its own: a server that comes late for this one shall fail, and
        # not take the weights of the next for it.
        path = self._folder / f"{self._num_sent}.safetensors"
        os.replace(unfinished, path)
        self._update({"path": str(path)})

    def _update(self, update_info: dict[str, Any]) -> None:
        self.client.start_weight_update()
        self.client.update_weights(update_info)
        self.client.finish_weight_update()
