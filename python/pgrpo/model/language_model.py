"""Language models: loading, precision, and the two halves of a forward pass.

A `LanguageModel` is used in two halves so that no [prompt tokens, vocab] logits ever exist: `hidden`
runs the decoder over packed groups, `logits` applies the head to the few rows that are asked for.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from pgrpo.config.sections import ModelConfig
from pgrpo.errors import ModelError
from pgrpo.model.attention import ATTENTION, PrefixCache, SharedPrefix
from pgrpo.model.gguf import model_folder
from pgrpo.model.operators import replace_norms
from pgrpo.model.tokenizer import model_errors, pretrained_tokenizer, tiny_tokenizer

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


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
        """Where the weights are."""
        return self.model.device

    @property
    def vocab_size(self) -> int:
        """Rows of the head."""
        return int(self.head.weight.shape[0])

    def shard(self, mesh: DeviceMesh) -> None:
        """Split the weights over the processes of a mesh (FSDP2): layer by layer, and the rest in one.

        Gradients are added up over the processes, not averaged.

        Args:
            mesh: [replicate, shard].
        """
        # Here, for it takes a second that a run of one process need not wait.
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        bare = self.bare
        blocks: set[str] = set(bare._no_split_modules or ())
        layers = [module for module in bare.modules() if type(module).__name__ in blocks]
        self._shards = [*layers, bare]
        for module in self._shards:
            fully_shard(module, mesh=mesh)
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
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

    def save(self, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
        """Write weights (or adapters) and tokenizer as transformers (or peft) loads them.

        Args:
            folder: to write.
            weights: where they are split over processes, what `full_weights` put together.
        """
        # peft takes None for no weights.
        given: dict[str, Any] = {} if weights is None else {"state_dict": weights}
        self.model.save_pretrained(str(folder), **given)
        self.tokenizer.save_pretrained(str(folder))

    def full_weights(self) -> dict[str, Tensor] | None:
        """The weights that a checkpoint holds, by name, put together on the first process; None where
        they are whole as they are. The others get an empty dictionary."""
        if not self._shards:
            return None
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(
            full_state_dict=True, cpu_offload=True, ignore_frozen_params=self.model is not self.bare
        )
        state: Any = get_model_state_dict(cast(Any, self.model), options=options)
        return state

    def adapters(self) -> dict[str, Tensor]:
        """The trained weights of adapters by their names in peft, put together on every process."""
        named = self.model.named_parameters()
        return {name: whole_tensor(p).cpu() for name, p in named if p.requires_grad}

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
        cache.length += 1
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
) -> LanguageModel:
    """Load the model a config names, or make the `tiny` one.

    Args:
        config: the `[model]` section.
        vocabulary: words of the data set, for `name = "tiny"`.
        seed: initialises the tiny model and new adapters.
        weights: a folder of a checkpoint that takes the place of the original weights (or holds the
            adapters to them).

    Raises:
        ModelError: there is no such model, or it cannot be used here.
    """
    precision = resolve_precision(config.precision)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(seed)
    source = model_folder(config.name) if config.name != "tiny" else "tiny"
    full_weights = weights if weights is not None and config.lora is None else None
    if config.name == "tiny" and full_weights is None:
        model, tokenizer = _tiny(vocabulary)
        model = cast(Any, model).to(dtype=dtype)
    else:
        folder = str(full_weights or source)
        model, tokenizer = _pretrained(
            folder, config.revision if full_weights is None else None, dtype
        )
    if config.lora is not None:
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
    placed: Any = model
    return LanguageModel(placed.to(device), tokenizer, precision)


def resolve_precision(precision: str) -> str:
    """`auto` as what is fast and learns on this processor: autocast where bf16 has units of its own,
    fp32 where bf16 is emulated (2.5 times slower there), as it is without AVX512-BF16 or AMX."""
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
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16", " bf16"))


def _pretrained(
    folder: str, revision: str | None, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    extra: dict[str, Any] = {} if revision is None else {"revision": revision}
    tokenizer = pretrained_tokenizer(folder, revision)
    with model_errors(folder):
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation=ATTENTION, **extra
        )
    return cast(PreTrainedModel, model), tokenizer


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
