"""Language models: loading, precision, and the two halves of a forward pass.

A `LanguageModel` is used in two halves so that no [prompt tokens, vocab] logits ever exist: `hidden`
runs the decoder over packed groups, `logits` applies the head to the few rows that are asked for.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from pgrpo.config.sections import ModelConfig
from pgrpo.errors import ModelError
from pgrpo.model.attention import ATTENTION, PrefixCache, SharedPrefix
from pgrpo.model.gguf import model_folder
from pgrpo.model.operators import replace_norms
from pgrpo.model.tokenizer import model_errors, pretrained_tokenizer, tiny_tokenizer

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_STORED = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
"""Names of dtypes in safetensors."""


class LanguageModel:
    """A causal language model with its tokenizer, on its device, in its precision."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, precision: str
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.precision = precision
        # peft puts its adapters inside the layers, so the bare model runs with them.
        whole: Any = model
        bare = whole.get_base_model() if hasattr(whole, "get_base_model") else whole
        self.bare: Any = bare
        replace_norms(bare)
        self.decoder: Any = bare.get_decoder()
        self._shards: list[Any] = []
        self._device: torch.device | None = None
        self._run: Any = self.decoder
        self.head: Any = bare.get_output_embeddings()
        config: Any = bare.config.get_text_config()
        if not getattr(bare, "_supports_attention_backend", False):
            raise ModelError(f"{type(bare).__name__} does not let its attention be replaced")
        kinds: list[str] = getattr(config, "layer_types", None) or []
        for kind in kinds:
            # Anything else (convolution, recurrence, chunks) would mix the packed prompts.
            if kind not in ("full_attention", "sliding_attention"):
                raise ModelError(f"{type(bare).__name__} has {kind} layers, which cannot be packed")
        for name in ("logit_scale", "logits_scaling"):
            if getattr(config, name, 1.0) not in (None, 1.0):
                raise ModelError(
                    f"{type(bare).__name__} scales its logits ({name}), which is unknown here"
                )
        self.num_positions: int | None = getattr(config, "max_position_embeddings", None)
        self._softcap: float | None = getattr(config, "final_logit_softcapping", None)
        # Each of them lacks, in some model, the token that another one ends its turns with.
        told_by = (bare.generation_config, bare.config, config, tokenizer)
        self.end_ids = frozenset(
            end for each in told_by for end in _end_ids(each) if end < self.vocab_size
        )

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._device or self.model.device

    @property
    def vocab_size(self) -> int:
        """Rows of the head."""
        return int(self.head.weight.shape[0])

    def shard(self, mesh: DeviceMesh, *, offload: bool = False) -> None:
        """Split the weights over the processes of a mesh (FSDP2): layer by layer, and the rest in one.

        Each process copies its part of them, to the mesh's kind of device and into the precision. What
        a file holds is not in memory before, so no process ever has all of it there. Gradients are
        added up over the processes, not averaged.

        Args:
            mesh: [replicate, shard].
            offload: keep them in the memory of the processors while they are not used.
        """
        # Here, for it takes a second that a run of one process need not wait.
        from torch.distributed.fsdp import (
            CPUOffloadPolicy,
            OffloadPolicy,
            fully_shard,
            register_fsdp_forward_method,
        )

        bare = self.bare
        blocks: set[str] = set(bare._no_split_modules or ())
        layers = [module for module in bare.modules() if type(module).__name__ in blocks]
        self._shards = [*layers, bare]
        self._device = torch.device(mesh.device_type)
        policy = CPUOffloadPolicy() if offload else OffloadPolicy()
        for module in self._shards:
            fully_shard(module, mesh=mesh, offload_policy=policy)
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
        dtype = _dtype(self.precision)
        if any(_is_narrower(parameter.dtype, dtype) for parameter in self.model.parameters()):
            placed: Any = self.model
            placed.to(dtype=dtype)
        decoder = self.decoder

        def decode(**inputs: Any) -> Any:
            return decoder(**inputs)

        # The model's own `forward` would make logits of every token, so its decoder is called alone;
        # FSDP brings the weights outside the layers, the head's too, for this method as for `forward`.
        bare.decode = decode
        register_fsdp_forward_method(bare, "decode")
        self._run = bare.decode

    @contextmanager
    def whole(self) -> Generator[None]:
        """Meanwhile every process has all weights, and may compute without the others, as many passes
        as it likes; without gradients."""
        for module in self._shards:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        try:
            yield
        finally:
            for module in self._shards:
                module.set_reshard_after_forward(module is not self.bare, recurse=False)
                module.reshard()

    @contextmanager
    def in_step(self) -> Generator[None]:
        """Meanwhile all processes make the same passes at the same time, without gradients; no process
        keeps what it has got of the others' weights for them."""
        try:
            yield
        finally:
            for module in self._shards:
                module.reshard()

    def save(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write weights (or adapters) and tokenizer as transformers (or peft) loads them.

        Args:
            folder: to write.
            weights: what `LanguageModel.weights` put together.
        """
        self.model.save_pretrained(str(folder), state_dict=weights)
        self.tokenizer.save_pretrained(str(folder))

    def weights(self, *, keep: bool = True) -> dict[str, Tensor]:
        """What a checkpoint holds, by name, put together on the CPU: all weights, or those of adapters
        by their names in peft. Processes that they are split over all ask for them at the same time.

        Args:
            keep: whether this process wants them; without it the dictionary is empty.
        """
        kept: dict[str, Tensor] = {}
        met: set[int] = set()
        state: dict[str, Tensor] = self.model.state_dict(keep_vars=True)
        for name, tensor in state.items():
            # Of weights that are tied to each other the first stands for all.
            if id(tensor) not in met and (self.model is self.bare or tensor.requires_grad):
                met.add(id(tensor))
                whole = whole_tensor(tensor)
                if keep:
                    kept[name] = whole.cpu()
        return kept

    def adapters_disabled(self) -> AbstractContextManager[Any]:
        """The model as it was before its adapters."""
        model: Any = self.model
        return model.disable_adapter()

    def autocast(self) -> AbstractContextManager[Any]:
        """bf16 computation where the precision asks for it. Entered once around a whole pass, so
        that each weight is converted once."""
        if self.precision != "autocast":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def hidden(self, groups: SharedPrefix) -> Tensor:
        """Decoder over packed groups: [T, hidden]."""
        return self._decode(groups.input_ids, groups.position_ids, groups)

    def prefill(self, cache: PrefixCache) -> Tensor:
        """Decoder over the prompts, filling the cache: [B, hidden] at each prompt's last token."""
        groups = cache.prefill
        rows = self._decode(groups.input_ids, groups.position_ids, cache)
        return rows[groups.prompt_rows]

    def extend(self, cache: PrefixCache, tokens: Tensor) -> Tensor:
        """Decoder over one more token of each completion: [N] -> [N, hidden]."""
        rows = self._decode(tokens[None], cache.position_ids(), cache)
        cache.next_token()
        return rows

    def logits(self, hidden: Tensor, permitted: Tensor | None = None) -> Tensor:
        """[R, hidden] -> [R, V] in fp32 or better; [R, U] over the U ids of `permitted` if given."""
        if permitted is None:
            logits: Tensor = self.head(hidden)
        else:
            weight: Tensor = self.head.weight[permitted]
            bias: Tensor | None = getattr(self.head, "bias", None)
            logits = torch.nn.functional.linear(
                hidden, weight, None if bias is None else bias[permitted]
            )
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self._softcap is not None:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return logits

    def permitted_logits(
        self, hidden: Tensor, permitted: Sequence[Sequence[int]]
    ) -> tuple[Tensor, dict[int, int]]:
        """Logits where only some tokens may come next.

        Args:
            hidden: [R, hidden].
            permitted: of each row, the ids that may come next.

        Returns:
            [R, U] over all ids that some row permits, -inf where the row itself does not; and the
            column of each id, ascending.
        """
        union = sorted({token for tokens in permitted for token in tokens})
        column = {token: i for i, token in enumerate(union)}
        forbidden = torch.ones(len(permitted), len(union), dtype=torch.bool)
        for row, tokens in enumerate(permitted):
            forbidden[row, [column[token] for token in tokens]] = False
        logits = self.logits(hidden, torch.tensor(union, device=hidden.device))
        return logits.masked_fill(forbidden.to(logits.device), -torch.inf), column

    def _decode(self, ids: Tensor, positions: Tensor, groups: SharedPrefix | PrefixCache) -> Tensor:
        out = self._run(input_ids=ids, position_ids=positions, use_cache=False, groups=groups)
        return out.last_hidden_state[0]


def whole_tensor(tensor: Tensor) -> Tensor:
    """A weight without its history; one that is split over processes, which all have to ask for, is put
    together."""
    whole: Any = tensor.detach()
    return whole.full_tensor() if hasattr(whole, "full_tensor") else whole


def _end_ids(told_by: Any) -> set[int]:
    """The end tokens that a config or a tokenizer names: none, one or several."""
    ends = getattr(told_by, "eos_token_id", None)
    return {ends} if isinstance(ends, int) else set(ends or ())


def load_language_model(
    config: ModelConfig,
    *,
    vocabulary: Sequence[str] = (),
    seed: int = 0,
    weights: Path | None = None,
    mesh: DeviceMesh | None = None,
    offload: bool = False,
) -> LanguageModel:
    """Load the model a config names, or make the `tiny` one.

    Args:
        config: the `[model]` section.
        vocabulary: words of the data set, for `name = "tiny"`.
        seed: initialises the tiny model and new adapters.
        weights: a folder of a checkpoint that takes the place of the original weights (or holds the
            adapters to them).
        mesh: the processes that the weights are split over, [replicate, shard], all of which load the
            model at the same time; None leaves them whole.
        offload: see `LanguageModel.shard`.

    Raises:
        ModelError: there is no such model, or it cannot be used here.
    """
    precision = resolve_precision(config.precision)
    dtype = _dtype(precision)
    torch.manual_seed(seed)
    source = model_folder(config.name) if config.name != "tiny" else "tiny"
    full_weights = weights if weights is not None and config.lora is None else None
    if config.name == "tiny" and full_weights is None:
        model, tokenizer = _tiny(vocabulary)
        model = cast(Any, model).to(dtype=dtype)
    else:
        folder = str(full_weights or source)
        revision = config.revision if full_weights is None else None
        model, tokenizer = _pretrained(folder, revision, dtype, is_split=mesh is not None)
    if config.lora is not None:
        with _widened(model, dtype):
            model = _with_adapters(model, config, weights)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if config.lora is not None:
            model.enable_input_require_grads()
    # Only gradient checkpointing needs training mode: dropout would make the trained probabilities
    # differ from the sampled ones.
    model.train(config.gradient_checkpointing)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if mesh is not None:
        loaded = LanguageModel(model, tokenizer, precision)
        loaded.shard(mesh, offload=offload)
        return loaded
    placed: Any = model
    return LanguageModel(placed.to(device_type()), tokenizer, precision)


def device_type() -> str:
    """The kind of device that models compute on."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def resolve_precision(precision: str) -> str:
    """`auto` as what is fast and learns on this processor: autocast where bf16 has fast units, else
    fp32, for emulated bf16 takes 2.5 times as long."""
    if precision != "auto":
        return precision
    if torch.cuda.is_available():
        return "autocast" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "autocast" if _cpu_has_bf16() else "fp32"


def declared_positions(config: ModelConfig) -> int | None:
    """Longest sequence the model is made for, by its config alone; None where that does not tell.

    Raises:
        ModelError: there is no such model.
    """
    folder = model_folder(config.name)
    with model_errors(folder):
        found: Any = AutoConfig.from_pretrained(folder, revision=config.revision)
    return getattr(found.get_text_config(), "max_position_embeddings", None)


def _cpu_has_bf16() -> bool:
    try:
        told = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return has_fast_bf16(told)


def has_fast_bf16(cpuinfo: str) -> bool:
    """Whether products of matrices in bf16 are faster than in fp32 on a processor: with AMX, with
    AVX512-BF16 of AMD, or with the bf16 of ARM. AVX512-BF16 of Intel is not enough: on an Emerald
    Rapids whose hypervisor hides AMX, it is half as fast as fp32 (150 and 290 GFLOP/s on two cores).

    Args:
        cpuinfo: what Linux tells of it, in /proc/cpuinfo.
    """
    words = set(cpuinfo.split())
    return bool(words & {"amx_bf16", "bf16"}) or (
        "avx512_bf16" in words and "GenuineIntel" not in words
    )


def _dtype(precision: str) -> torch.dtype:
    """What weights are held in."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def _is_narrower(dtype: torch.dtype, than: torch.dtype) -> bool:
    """Whether it is one of floating-point numbers, all of which the other holds as they are."""
    return dtype.is_floating_point and dtype != than and torch.promote_types(dtype, than) == than


def _pretrained(
    folder: str, revision: str | None, dtype: torch.dtype, *, is_split: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The model and tokenizer of a folder or hub name, with weights of a dtype.

    Weights that are to be split stay in their files, which are mapped into memory, and of the dtype
    that they have there, where that is a narrower one: who reads a part of a weight loads that part.
    So it is with safetensors in the model's own layout; other weights are converted as a whole.
    """
    extra: dict[str, Any] = {} if revision is None else {"revision": revision}
    tokenizer = pretrained_tokenizer(folder, revision)
    with model_errors(folder):
        stored = _stored_dtype(folder, extra) if is_split else None
        is_narrower = stored is not None and _is_narrower(stored, dtype)
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=stored if is_narrower else dtype,
            attn_implementation=ATTENTION,
            **extra,
        )
    if is_narrower:
        _widen_buffers(model, dtype)
    return model, tokenizer


def _stored_dtype(folder: str, extra: dict[str, Any]) -> torch.dtype | None:
    """The narrowest dtype that holds all that is in a model's safetensors as it is; None without such
    files, or where they hold something else than floating-point numbers."""
    files: list[str] = []
    with suppress(OSError):
        files = [str(cached_file(folder, SAFE_WEIGHTS_NAME, **extra))]
    if not files:
        with suppress(OSError):
            index = str(cached_file(folder, SAFE_WEIGHTS_INDEX_NAME, **extra))
            names = set(json.loads(Path(index).read_text("utf-8"))["weight_map"].values())
            files = [str(cached_file(folder, name, **extra)) for name in sorted(names)]
    found: torch.dtype | None = None
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is no mapping
                dtype = _STORED.get(tensors.get_slice(name).get_dtype())
                if dtype is None:
                    return None
                found = dtype if found is None else torch.promote_types(found, dtype)
    return found


def _widen_buffers(model: Any, dtype: torch.dtype) -> None:
    """Compute anew, in a wider dtype, what a model holds besides its weights and computed in a narrow
    one, such as the factor of Gemma's embeddings."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if _is_narrower(buffer.dtype, dtype):
                wide = buffer.to(dtype)
                # By this mark transformers knows what it need not compute: what came out of a file.
                wide._is_hf_initialized = getattr(buffer, "_is_hf_initialized", False)
                setattr(module, name, wide)
                module._is_hf_initialized = False
    model.initialize_weights()


@contextmanager
def _widened(model: PreTrainedModel, dtype: torch.dtype) -> Generator[None]:
    """Meanwhile weights of a narrower dtype seem to be of this one, without content or memory. What is
    put beside them, as adapters are, takes their dtype and never reads them."""
    narrow = [(p, p.data) for p in model.parameters() if _is_narrower(p.dtype, dtype)]
    for parameter, data in narrow:
        parameter.data = torch.zeros((), dtype=dtype).expand(data.shape)
    try:
        yield
    finally:
        for parameter, data in narrow:
            parameter.data = data


def _tiny(vocabulary: Sequence[str]) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """An untrained two-layer Llama over whole words, or over bytes, of which a text has many more."""
    tokenizer = tiny_tokenizer(vocabulary)
    make: Any = LlamaForCausalLM._from_config  # pyright: ignore[reportPrivateUsage]  # the only
    # constructor that takes an attention implementation
    model = make(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256 if vocabulary else 4096,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
            tie_word_embeddings=False,
        ),
        attn_implementation=ATTENTION,
    )
    return model, tokenizer


def _with_adapters(model: PreTrainedModel, config: ModelConfig, weights: Path | None) -> Any:
    import peft

    assert config.lora is not None
    try:
        if weights is not None:
            return peft.PeftModel.from_pretrained(model, str(weights), is_trainable=True)
        return peft.get_peft_model(
            model,
            peft.LoraConfig(
                r=config.lora.rank,
                lora_alpha=config.lora.alpha,
                target_modules=config.lora.targets,
                lora_dropout=0.0,
                task_type="CAUSAL_LM",
            ),
        )
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"model.lora does not fit the model: {reason}") from error
