"""The sections every run has, each a frozen table of the TOML file with its checks.

A section of a data set, a plugin or an engine stands beside what it configures.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from pgrpo.config.checks import known_keys
from pgrpo.normalizer import RULES, Options
from pgrpo.normalizer.options import meaning
from pgrpo.types import ClusterId


class Section(BaseModel):
    """A table of the TOML file: frozen, typed strictly, closed to unknown keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    def inactive(self) -> set[str]:
        """Fields that have no effect given the others; setting one of them is an error."""
        return set()

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, values: Any) -> Any:
        return known_keys(cls, values)

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
    resample: int = Field(default=0, ge=0)
    """How many times a step may draw other prompts in the place of those whose groups have no signal,
    which is DAPO's dynamic sampling ([how_it_works.md](how_it_works.md#groups-without-signal)). The
    step keeps its size."""
    seed: int = Field(default=0, ge=0)
    """Seeds sampling, shuffling and initialisation. Same seed, same machine: same run."""
    checkpoint_every: int = Field(default=50, ge=1)
    """Steps between checkpoints; the last step is always saved."""
    keep_checkpoints: int = Field(default=1, ge=1)
    """Complete checkpoints that are kept, the newest ones."""
    keep_best: bool = False
    """Keep that of the best held-out reward so far as well, the earlier of equal ones: whenever an
    evaluation after a step is the best, a checkpoint of that step is written."""
    eval_every: int = Field(default=0, ge=0)
    """Steps between held-out evaluations (also before the first and after the last step); 0: none."""
    eval_prompts: int = Field(default=200, ge=1)
    """Held-out prompts of one evaluation, always the same ones."""
    eval_samples: int = Field(default=0, ge=0)
    """Completions of each held-out prompt that an evaluation samples, by the same seeds every time; the
    prompt's reward is their mean. 0: one completion, of the likeliest tokens."""
    ability: bool = False
    """Measure before the first and after the last step what the model can do besides: the perplexity of
    English text, sums, formats and continents
    ([how_it_works.md](how_it_works.md#general-ability))."""
    samples_per_step: int = Field(default=4, ge=0)
    """Rollouts of each step written to samples.jsonl."""
    num_threads: int = Field(default=0, ge=0)
    """Processor threads of torch; 0: as many as it chooses. A tiny model is faster with one."""
    trackers: list[Literal["tensorboard", "wandb", "trackio", "mlflow"]] = ["tensorboard"]
    """Who is told of the run besides its folder: `tensorboard` as event files in it, `wandb`, `trackio`
    and `mlflow` where their environment variables say, and without them on this machine
    ([run_folder.md](run_folder.md#trackers))."""
    project: str = Field(default="pgrpo", min_length=1)
    """Project (or experiment) that `wandb`, `trackio` and `mlflow` file the run under."""
    pipeline: Literal["synchronous", "one_step_off"] = "synchronous"
    """`one_step_off` generates and scores the next step's rollouts while this one trains; they come
    from weights one update older, which `loss.importance` corrects for."""

    def inactive(self) -> set[str]:
        local = not set(self.trackers) - {"tensorboard"}
        return ({"project"} if local else set()) | (set() if self.eval_every else {"keep_best"})


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
    `tiny` (a small untrained transformer, over the data set's own words where it has a vocabulary, else
    over bytes)."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    chat: bool = False
    """Render prompts with the tokenizer's chat template instead of as plain text."""
    system_prompt: str | None = None
    """System turn of chats that have none; without it the template's own default applies."""
    prompt_template: str = "{prompt}"
    """What the model reads of a prompt, or of the first user turn of a chat: `{prompt}` is its text,
    and `{cluster}` the name of its user's cluster, by which a policy can tell clusters apart; with soft
    membership, of the one that the user belongs to most."""
    chat_template_kwargs: dict[str, Any] = {}
    """What the chat template is told besides, such as `enable_thinking = false` for Qwen3."""
    precision: Literal["auto", "fp32", "bf16", "autocast"] = "auto"
    """`autocast` keeps fp32 weights and computes in bf16; `bf16` holds the weights in bf16 too, which
    swallows small updates; `auto` is autocast where the processor is faster in bf16, else fp32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    lora: LoraConfig | None = None
    """Train adapters instead of all weights."""

    @field_validator("prompt_template")
    @classmethod
    def _check_template(cls, template: str) -> str:
        if template.count("{prompt}") != 1:
            raise ValueError(f"prompt_template is {template!r}; expected {{prompt}} in it, once")
        for place in re.findall(r"\{\w*\}", template):
            if place not in ("{prompt}", "{cluster}"):
                raise ValueError(
                    f"prompt_template is {template!r}, with {place}; expected {{prompt}}, {{cluster}}"
                )
        return template

    @property
    def names_cluster(self) -> bool:
        """Whether the model is told the cluster."""
        return "{cluster}" in self.prompt_template

    def inactive(self) -> set[str]:
        pinned = self.name == "tiny" or self.name.startswith("pypi:")
        return ({"revision"} if pinned else set()) | (
            set() if self.chat else {"system_prompt", "chat_template_kwargs"}
        )


class PluginSection(Section):
    """A table that names a plugin; keys beyond the ones here are the plugin's own settings."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=True)

    name: str
    """Name the plugin registered; `pgrpo plugins` lists them."""

    @property
    def options(self) -> dict[str, Any]:
        """The plugin's own settings, checked against its config class when the registry builds it."""
        return dict(self.model_extra or {})


class ClusteringConfig(PluginSection):
    """Who belongs together."""

    soft: bool = False
    """Let users belong to several clusters, where the clusterer has `memberships`: a reward enters each
    cluster's history with the user's weight there, and its advantage is the weighted mean of what they
    make of it ([how_it_works.md](how_it_works.md#soft-membership))."""
    recluster_every: int = Field(default=0, ge=0)
    """Steps after which the users are divided again, by what the run knows of them by then, and again
    after as many; histories go with their people
    ([how_it_works.md](how_it_works.md#re-clustering)). 0: never."""
    recluster_from: Literal["rewards", "behaviour"] = "rewards"
    """What is known of a user then, beside the data set's features: mean and spread of each reward so
    far; or how long completions are, and what they get, all of them and those that take the first,
    second, ... of the choices."""
    prompt_shares: dict[str, Annotated[float, Field(ge=0, le=1)]] | None = Field(
        default=None, min_length=1
    )
    """How often a training prompt is of which cluster, such as `{ "4" = 0.02 }`: so many of the prompts
    of all steps, on average. What the clusters named here leave is the others', by how many prompts
    they have; without it every prompt comes equally often. Who is held out stays as it is
    ([how_it_works.md](how_it_works.md#shares-of-clusters-in-training))."""

    @model_validator(mode="after")
    def _check_shares(self) -> ClusteringConfig:
        total = sum((self.prompt_shares or {}).values())
        if total > 1 + 1e-9:
            raise ValueError(f"prompt_shares come to {total:g} together; expected at most 1")
        if self.prompt_shares and self.recluster_every:
            raise ValueError(
                f"prompt_shares are of clusters, whose people change with recluster_every = "
                f"{self.recluster_every}; expected 0"
            )
        return self

    def inactive(self) -> set[str]:
        return set() if self.recluster_every else {"recluster_from"}


class ShiftConfig(Section):
    """A reward that changes while a run goes on, as where a judge becomes stricter, or uses another
    scale."""

    after: int = Field(ge=1)
    """Steps with the reward r as it is; in all later ones it is scale * r + offset."""
    scale: float = 1.0
    """Factor from then on; with -1 what was good is bad."""
    offset: float = 0.0
    """What is added from then on."""

    @model_validator(mode="after")
    def _check_change(self) -> ShiftConfig:
        if (self.scale, self.offset) == (1.0, 0.0):
            raise ValueError("a scale of 1 and an offset of 0 change nothing; expected others")
        return self


class RewardConfig(PluginSection):
    """One reward; the raw reward of a rollout is the weighted sum over all of them."""

    weight: float = Field(default=1.0, allow_inf_nan=False)
    """Factor of this reward in the sum."""
    clusters: list[ClusterId] = []
    """The clusters whose rollouts it scores, where some are judged and others click; all if none is
    named. It is not called for others, and adds nothing to theirs."""
    shift: ShiftConfig | None = None
    """How it changes after so many steps of training, such as `{ after = 25, offset = -2.0 }`; held-out
    completions get what the reward gives."""
    timeout_s: float = Field(default=60.0, gt=0)
    """Seconds one call may take."""
    on_error: Literal["fail", "retry", "no_reward"] = "fail"
    """When a call raises, hangs or returns nonsense: stop the run, try again (three attempts
    in all, with growing pauses), or go on with these rollouts unrewarded."""
    max_unreadable: float = Field(default=0.1, ge=0, le=1)
    """Largest share of a step's answers (with fewer than 64, of the last 64) that may be unreadable, as
    where a judge's reply gives no verdict: those rollouts go without this reward, and the first is
    logged. With more the run stops. Under `on_error = "no_reward"` there is no such limit."""
    batch: Literal["group", "step"] = "group"
    """What one call gets: the rollouts of a group, as soon as they are generated, or those of the
    whole step at once."""
    num_workers: int = Field(default=4, ge=1)
    """Most calls for single groups under way at once: threads for a plain function, tasks of one event
    loop for an async one, processes on Ray."""
    workers: Literal["threads", "ray"] = "threads"
    """What answers calls: this process, or processes of a Ray cluster, each with a reward of its own,
    on whichever machines have a place for them."""
    num_gpus: float = Field(default=0.0, ge=0)
    """GPUs of each process on Ray; a half where two share one."""

    def inactive(self) -> set[str]:
        return ({"max_unreadable"} if self.on_error == "no_reward" else set()) | (
            {"num_gpus"} if self.workers == "threads" else set()
        )


def reward_names(sections: Sequence[RewardConfig]) -> list[str]:
    """What the rewards are called: as their plugins, and `judge 2` the second of a name."""
    names: list[str] = []
    for section in sections:
        times = 1 + sum(earlier.name == section.name for earlier in sections[: len(names)])
        names.append(section.name if times == 1 else f"{section.name} {times}")
    return names


def _option(name: str) -> Any:
    """A field that is an option of the normalizer: default and meaning are the option's."""
    return Field(default=getattr(Options, name), description=meaning(name))


class EstimatorConfig(Section):
    """The rule that turns rewards into advantages (docs/estimators.md). All fields but `name` and
    `history` are arguments of `pgrpo.ClusterNormalizer`."""

    name: str = Options.estimator
    """`pgrpo` normalises by the cluster's reward history, `grpo` by the group, `auto` by what of both
    varies least, ..."""
    history: Literal["cluster", "user", "one", "shuffled"] = "cluster"
    """Which rollouts share a history: their cluster's, their user's, everybody's, or those of clusters
    of the same sizes made of shuffled users; the last two are control arms. A user's history borrows
    `prior_count` rewards from its cluster's, and that one as many from all."""
    combine: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    """How several `[[rewards]]` make one advantage: of their weighted sum, by one history per cluster;
    or as the weighted sum of the advantages of each, by one history per cluster and reward, so that
    none drowns another by its spread. A rollout that lacks one of them has no reward in the first case,
    and the sum of those it has in the second."""
    ddof: int = _option("ddof")
    eps: float = _option("eps")
    order: str = _option("order")
    forgetting: float = _option("forgetting")
    prior_count: float = _option("prior_count")
    sigma_floor: float = _option("sigma_floor")
    min_count: float = _option("min_count")
    clip: float | None = _option("clip")
    frequency_weight: float = _option("frequency_weight")

    @field_validator("*")
    @classmethod
    def _check_option(cls, value: Any, info: ValidationInfo) -> Any:
        if info.field_name not in ("history", "combine"):
            option = "estimator" if info.field_name == "name" else str(info.field_name)
            Options(**{option: value})
        return value

    def inactive(self) -> set[str]:
        rule = RULES[self.name]
        # A cluster that is all there is has share 1.
        alone = self.history == "one"
        weight = 0.0 if alone else self.frequency_weight
        idle = {"frequency_weight"} if alone else set[str]()
        if not (rule.reads_histories or weight):
            idle.add("history")
        return idle | set(rule.without_effect(weight))


class ParallelConfig(Section):
    """How the processes that torchrun starts hold the weights; one process alone holds all of them."""

    replicate: int = Field(default=1, ge=1)
    """How many copies of weights, gradients and moments there are. The processes of one copy hold a
    part of it each (FSDP2); several copies (HSDP) move less between nodes and take more memory."""
    offload: bool = False
    """Keep weights, gradients and moments in the memory of the processors, where the optimizer steps,
    and bring each layer to the GPU while it is used, which takes less of the GPUs' memory and time to
    move them in every pass."""
    timeout_s: float = Field(default=1800.0, gt=0)
    """Seconds that a process waits for what the others tell before it gives up: longer than a step's
    slowest reward."""


class LossConfig(Section):
    """What is minimised."""

    objective: Literal["policy_gradient", "dpo", "sft"] = "policy_gradient"
    """The clipped policy gradient of an estimator's advantages; or what to compare it with, without an
    estimator: DPO of the pairs of each group, or the cross-entropy of completions with a positive
    reward ([how_it_works.md](how_it_works.md#dpo-and-sft))."""
    beta: float = Field(default=0.1, gt=0)
    """How far DPO lets the policy go from the reference: the larger, the less."""
    aggregation: Literal["dapo", "dr_grpo", "grpo"] = "dapo"
    """Mean over the step's tokens, sum over tokens divided by a constant length, or mean over
    rollouts of each one's token mean."""
    ratio: Literal["token", "sequence"] = "token"
    """What the clipped ratio is taken over: each token, or the whole completion as in GSPO, with the
    geometric mean of its tokens' ratios, which stays so near 1 that the clip range has to be about a
    thousand times smaller (GSPO: `clip_low = 3e-4`, `clip_high = 4e-4`)."""
    clipping: Literal["ppo", "cispo"] = "ppo"
    """`ppo` drops the gradient where the ratio has left the clip range in the direction of the
    advantage; `cispo` drops none, and weighs that of the log-probability by the clipped ratio."""
    clip_low: float = Field(default=0.2, gt=0, le=1)
    """The probability ratio is clipped below at 1 - clip_low; with 1 it is not."""
    clip_high: float = Field(default=0.2, gt=0)
    """The probability ratio is clipped above at 1 + clip_high."""
    mask_truncated: bool = False
    """Leave completions that `generation.max_new_tokens` cut off out of the update, as if they were not
    there: no gradient, no count in the denominators. Their rewards are in the histories, and in the
    advantages of the others."""
    entropy_coef: float = Field(default=0.0, ge=0)
    """Weight of a bonus for the entropy, in nats, of the distribution each trained token was chosen
    from, at the temperature and over permitted tokens; computed exactly, of all logits."""
    kl_coef: float = Field(default=0.0, ge=0)
    """Weight of the k3 estimate of KL(policy || reference); no reference is held when 0."""
    old_logprobs: Literal["recomputed", "rollout"] = "recomputed"
    """What the clipped ratio compares with: log-probabilities of the trainer before the step, or those
    that the engine reported, which saves a pass where a step has several updates."""
    importance: Literal["auto", "off", "token", "sequence"] = "auto"
    """Correct for rollouts that come from other probabilities than the trainer's, by the ratio
    p_old / p_rollout of each token or of the whole completion; `auto` is token with the vLLM engine
    and with `top_k`, `top_p` or `min_p`, and else off."""
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

    @property
    def takes_estimator(self) -> bool:
        """Whether it is the loss of an estimator's advantages."""
        return self.objective == "policy_gradient"

    @property
    def has_reference(self) -> bool:
        """Whether it compares the policy with the model that training began with."""
        return self.kl_coef > 0 or self.objective == "dpo"

    def inactive(self) -> set[str]:
        if not self.takes_estimator:
            own = "beta" if self.objective == "dpo" else "aggregation"
            return set(LossConfig.model_fields) - {"objective", "mask_truncated", own}
        correction = {"importance_cap", "mask_below", "mask_above"}
        if self.old_logprobs == "rollout":
            return {"beta", "importance", *correction}
        return {"beta", *correction} if self.importance == "off" else {"beta"}


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
