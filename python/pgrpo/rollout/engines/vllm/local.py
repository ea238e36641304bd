# pyright: reportMissingImports=false
"""vLLM in the trainer's process."""

from __future__ import annotations

import gc
import os
import tempfile
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pgrpo.errors import EngineError, engine_errors
from pgrpo.rollout.engines.vllm.backend import Completion, Request
from pgrpo.rollout.engines.vllm.launch import (
    LORA_NAME,
    engine_arguments,
    engine_precision,
    folder_of,
    save_adapter,
    save_config,
)

if TYPE_CHECKING:
    from pgrpo.config.sections import ModelConfig
    from pgrpo.model.language_model import LanguageModel
    from pgrpo.rollout.engines import Peers
    from pgrpo.rollout.settings import GenerationConfig


class Local:
    """The backend protocol over `vllm.LLM`.

    Args:
        config: the section `[generation]`.
        model: the policy's model.
        source: the section `[model]`, where it came from.
        peers: the processes of the run, each of which has a vLLM of its own.
        may_sleep: nobody generates while the policy is updated.

    Raises:
        EngineError: vLLM is not installed, or does not start with this model and these settings.
    """

    capacity = 4096
    """Practically everything: vLLM queues what it is given, and works only while it is waited for."""

    def __init__(
        self,
        config: GenerationConfig,
        model: LanguageModel,
        source: ModelConfig,
        peers: Peers,
        *,
        may_sleep: bool,
    ) -> None:
        self._options = config.vllm
        self._model = model
        self._peers = peers
        self._is_alone = peers.size == 1
        self._folder = tempfile.TemporaryDirectory(prefix="pgrpo-vllm-")
        self._has_adapters = source.lora is not None
        self._lora: Any = None
        self._finished: deque[tuple[int, list[Completion]]] = deque()
        self._open: set[str] = set()
        self._interrupted = False
        self._on_gpu = model.device.type == "cuda"
        self._may_sleep = self._on_gpu and self._options.sleep and may_sleep
        self._asleep = False
        if self._options.tensor_parallel_size == 1:
            # Within one process weights can be handed over as references.
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        try:
            import vllm

            from pgrpo.rollout.engines.vllm.receiver import register
            from pgrpo.rollout.engines.vllm.sender import WeightSender
        except ImportError as error:
            raise EngineError(
                f"generation.engine = 'vllm' needs vLLM, which cannot be imported ({error}); install "
                "it with pip install 'pgrpo[vllm]'"
            ) from error
        self._vllm: Any = vllm
        register()
        arguments = engine_arguments(
            config,
            source,
            engine_precision(self._options, model.precision),
            model.num_positions,
            save_config(model, Path(self._folder.name), with_tokenizer=bool(config.stop)),
            on_cpu=not self._on_gpu,
        )
        set_num_threads = torch.set_num_threads
        try:
            with engine_errors("vLLM does not start"):
                self._llm: Any = vllm.LLM(
                    **{
                        "weight_transfer_config": {"backend": "pgrpo"},
                        "enable_sleep_mode": self._may_sleep,
                        "disable_log_stats": True,
                        # torch.distributed is there already, and vLLM must take it as it is.
                        "distributed_executor_backend": (
                            None if self._is_alone else "external_launcher"
                        ),
                        **arguments,
                    }
                )
        finally:
            # On a CPU vLLM makes this do nothing.
            torch.set_num_threads = set_num_threads
        self._engine: Any = self._llm.llm_engine
        # Adapters are loaded by name; their base comes from where the trainer's came from.
        self._sender: Any = None
        if not self._has_adapters:
            self._sender = WeightSender(
                "direct" if self._options.tensor_parallel_size == 1 else "file",
                model.bare,
                [_Client(self._llm)],
                dtype=self._engine.model_config.dtype,
                folder=folder_of(self._options),
            )

    def submit(self, key: int, request: Request) -> None:
        """See `Backend.submit`."""
        parameters = self._vllm.SamplingParams(
            **request.sampling,
            output_kind=self._vllm.sampling_params.RequestOutputKind.FINAL_ONLY,
        )
        with engine_errors("vLLM refuses a request"):
            self._open.add(str(key))
            self._engine.add_request(
                str(key),
                {"prompt_token_ids": list(request.token_ids)},
                parameters,
                lora_request=self._lora,
            )

    def next(self) -> tuple[int, list[Completion]]:
        """See `Backend.next`."""
        deadline = time.monotonic() + self._options.timeout_s
        while not self._finished:
            if self._interrupted:
                raise EngineError("the requests were interrupted")
            with engine_errors("vLLM failed"):
                outputs = self._engine.step()
            self._finished += [
                (int(output.request_id), [_completion(sample) for sample in output.outputs])
                for output in outputs
                if output.finished
            ]
            if not self._finished and time.monotonic() > deadline:
                raise EngineError(
                    f"vLLM finished no request within timeout_s = {self._options.timeout_s:g}"
                )
        key, completions = self._finished.popleft()
        self._open.discard(str(key))
        return key, completions

    def interrupt(self) -> None:
        """See `Backend.interrupt`. vLLM is no other thread's to call, so it ends between its steps."""
        self._interrupted = True

    def abandon(self) -> None:
        """See `Backend.abandon`."""
        self._finished.clear()
        # Where vLLM has failed it does so here again, and the first failure says more.
        with suppress(Exception):
            self._engine.abort_request([*self._open])
        self._open.clear()

    def send_weights(self, version: int) -> int:
        """See `Backend.send_weights`."""
        # An error of one process is told before the weights, which all put together.
        self._peers.gather(self._wake)
        with engine_errors(f"vLLM does not take over the weights of version {version}"):
            if self._has_adapters:
                num_bytes = self._load_adapter(version)
            else:
                num_bytes = self._sender.send(version)
            if self._asleep:
                self._llm.wake_up(tags=["kv_cache", "scheduling"])
                self._asleep = False
            # Nothing else resets it, and what it holds was computed with other weights.
            if not self._llm.reset_prefix_cache():
                raise EngineError(
                    "vLLM's prefix cache cannot be reset: some of its blocks are still in use"
                )
        return num_bytes

    def _wake(self) -> list[None]:
        if self._asleep:
            with engine_errors("vLLM does not wake up"):
                self._llm.wake_up(tags=["weights"])
        return []

    def _load_adapter(self, version: int) -> int:
        folder = Path(self._folder.name) / "adapter"
        num_bytes = save_adapter(self._model, self._model.weights(), folder)
        make_request: Any = self._vllm.lora.request.LoRARequest
        if not self._engine.add_lora(make_request(LORA_NAME, 1, str(folder), load_inplace=True)):
            raise EngineError(f"vLLM does not load the adapters in {folder}")
        # In a request, load_inplace would have them read again with every token.
        self._lora = make_request(LORA_NAME, 1, str(folder))
        self._llm.update_weight_version(str(version))
        return num_bytes

    # Not run here: needs CUDA. On a CPU vLLM cannot sleep.
    def sleep(self) -> None:
        """See `Backend.sleep`."""
        if self._may_sleep and not self._asleep:
            with engine_errors("vLLM does not sleep"):
                # Level 2 forgets the weights, which come again; a base below adapters does not.
                self._llm.sleep(level=1 if self._has_adapters else 2)
            self._asleep = True

    def close(self) -> None:
        """See `Backend.close`."""
        if self._sender is not None:
            self._sender.close()
        client = self._engine.engine_core
        if self._is_alone:
            client.shutdown()
        else:
            # With itself vLLM shuts down torch.distributed, also when it is freed; the processes of the
            # run still need it.
            client._finalizer.detach()
        del client, self._llm, self._engine, self._sender
        # They hold each other, and the memory of weights, keys and values.
        gc.collect()
        self._folder.cleanup()


class _Client:
    """`SyncClient` over `vllm.LLM`."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._llm.init_weight_transfer_engine({"init_info": init_info})

    def start_weight_update(self) -> None:
        self._llm.start_weight_update()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._llm.update_weights({"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._llm.finish_weight_update(weight_version)

    def world_size(self) -> int:
        return int(self._llm.get_world_size())


def _completion(sample: Any) -> Completion:
    versions = {span.version for span in sample.weight_versions or ()}
    return Completion(
        token_ids=tuple(sample.token_ids),
        logprobs=tuple(
            {token: entry.logprob for token, entry in position.items()}
            for position in sample.logprobs or ()
        ),
        finish_reason=sample.finish_reason,
        version="+".join(sorted(versions)) or None,
    )
