"""The records of a run: what is written of each step, evaluation, sample and of the run itself.

Every log, tracker and display gets these objects, and the report reads them back. The docstrings
below are the tables of docs/run_folder.md. Rewards are raw and in units of the reward; what has no
value is None, `null` in the files, which hold no NaN. All fields but `step` have a default, so that a
file in which a name is missing, as in those of earlier versions, can still be read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from types import NoneType
from typing import Annotated, TypeAlias, cast, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

MAX_WAYS = 512
"""Ways of a record of people's moves: some 20 kB."""

MAX_CLUSTERS = 64
"""Clusters of one record of a step; a line then stays below some 16 kB however many there are."""


class Record(BaseModel):
    """A JSON object of a run folder: frozen, typed strictly; names that are not known are ignored."""

    model_config = ConfigDict(
        frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class HistoryRecord(Record):
    """A cluster's history of one of several rewards, after the step."""

    count: float | None = None
    """as a cluster's"""
    mean: float | None = None
    """of this reward alone, without its weight"""
    std: float | None = None
    """likewise"""


class ClusterRecord(Record):
    """One cluster in one step.

    `count`, `mean`, `std`, `scale_ratio` and `bias` tell of the cluster's own history, which is kept
    under every estimator, so that arms can be compared. Whether advantages are read from it depends
    on the estimator: `grpo`, `dr_grpo`, `rloo` and `batch` read no history, `history = "user"` and the
    control arms `"one"` and `"shuffled"` read others, `combine = "normalize_then_sum"` one of each
    reward, and `prior_count` and `sigma_floor` change how it is read. With
    `generation.overlong_buffer` a history is of rewards less penalties, and so are the two terms of
    Corollary 3.1; `reward` stays raw.
    """

    reward: float | None = None
    """mean raw reward of its rollouts in this step; `null` if there were none"""
    num_rollouts: int = 0
    """its rewarded rollouts in this step; with `clustering.soft` those of users who belong to it
    most"""
    count: float | None = None
    """of its history after the step: finite rewards seen since the start. With `estimator.forgetting`
    below 1 they are weighted, and this is what is left of the count; with `clustering.soft` each counts
    as much as its user belongs to the cluster"""
    mean: float | None = None
    """of its history after the step, weighted alike"""
    std: float | None = None
    """of its history after the step, dividing by count - `estimator.ddof`, weighted alike"""
    advantage: float | None = None
    """mean advantage of its rollouts in this step"""
    scale_ratio: float | None = None
    """first term of Corollary 3.1, mean over its groups in this step: (s_G + eps) / (std + eps), by its
    own history after the step or, with `order = "normalize_then_update"`, before it, and then `null`
    while there is none; without `prior_count` and `sigma_floor`. See
    [estimators.md](estimators.md#corollary-31-reading-a-run)"""
    bias: float | None = None
    """second term, (m_G - mean) / (std + eps), likewise"""
    rewards: dict[str, HistoryRecord] = {}
    """reward -> the names below, of its history of that reward alone, where `estimator.combine` is
    `normalize_then_sum` and `estimator.history` is `cluster`"""


class RewardRecord(Record):
    """One of several rewards in one step."""

    reward: float | None = None
    """mean of what it gave, raw and without its weight"""
    num_rollouts: int = 0
    """rollouts that got it"""


class FairnessRecord(Record):
    """Spread over the clusters with a rewarded rollout in this step, also those that are not listed.
    Compare clusters this way only where their rewards are on one scale."""

    worst: float | None = None
    """smallest mean reward of a cluster"""
    gap: float | None = None
    """largest minus smallest"""
    gini: float | None = None
    """sum_ij abs(v_i - v_j) / (2 K^2 mean); `null` when a mean is negative or all are 0"""


class TimingRecord(Record):
    """Seconds of one step. Evaluations, checkpoints and divisions of the users are not in it."""

    generate: float | None = None
    """prompts made ready and completions sampled; groups are scored meanwhile. With `run.resample`
    until the last are sampled, so that it holds all scoring but theirs"""
    reward: float | None = None
    """from then on until all rewards, histories and advantages are there"""
    wait: float | None = None
    """with `run.pipeline = "one_step_off"`, where the first two overlap with the previous step: what
    the step still waited for them; `null` otherwise"""
    sync: float | None = None
    """weights to the engine, and the probe"""
    update: float | None = None
    """all forward and backward passes, optimizer"""
    total: float | None = None
    """the whole step"""


class MismatchRecord(Record):
    """How far the engine's log-probabilities are from the trainer's, over the trained tokens as
    `clipped` counts them, once each, with d = old_logprob - rollout_logprob. Under
    `loss.old_logprobs = "rollout"` the policy's at the token's first pass take the place of the old
    ones, which the updates of earlier minibatches may have moved."""

    kl: float | None = None
    """mean of exp(d) - d - 1, the k3 estimate of KL(rollout || old) per token. e^20 stands for a larger
    exp(d)"""
    mean: float | None = None
    """mean absolute value of d"""
    max: float | None = None
    """largest absolute value of d"""
    weight: float | None = None
    """mean importance weight; 1 without a correction"""
    masked: float | None = None
    """share of the tokens whose weight is 0 (`loss.mask_below`, `loss.mask_above`)"""
    truncated: float | None = None
    """share of the tokens whose ratio, their own or their completion's, is above
    `loss.importance_cap`; 0 without a correction"""


class SyncRecord(Record):
    """The last handing over of weights to the engine."""

    num_bytes: int | None = None
    """weights or adapters that were moved"""
    transfer_s: float | None = None
    """seconds until the engine had them in use"""
    probe_error: float | None = None
    """mean absolute difference between the engine's and the trainer's log-probabilities of a few
    tokens; `null` where it was not looked at (`generation.vllm.probe_every`)"""


class StepRecord(Record):
    """A line of metrics.jsonl: one step."""

    step: int
    """1, 2, ..., `run.num_steps`"""
    reward: float | None = None
    """mean raw reward of the step's rewarded rollouts"""
    rewards: dict[str, RewardRecord] = {}
    """reward -> the names below, where there are several; the second of a name is `NAME 2`"""
    loss: float | None = None
    """the loss that was minimised, a mean over the step's optimizer updates. With one update per step
    and `loss.old_logprobs = "recomputed"` the probability ratio is 1, so this is minus the weighted
    mean advantage, times the importance weights (plus the KL penalty): it tells nothing about
    progress. Under `loss.objective = "dpo"` that of the pairs, log 2 at the start, under `"sft"` the
    cross-entropy"""
    grad_norm: float | None = None
    """global L2 norm of the gradient before it is scaled down to `optimizer.max_grad_norm`; mean over
    updates"""
    learning_rate: float | None = None
    """of this step"""
    num_rollouts: int | None = None
    """rollouts generated"""
    num_unrewarded: int | None = None
    """of these, how many got no reward; they are left out of the update"""
    num_unseen: int | None = None
    """of the rollouts, how many are of people whom the saved clusters (`clustering.name = "saved"`) do
    not know; `null` with other clusterers"""
    num_replaced: int | None = None
    """groups that had no signal and gave their place to others (`run.resample`). Their rollouts are in
    all numbers of this line but those that the update tells"""
    completion_tokens: float | None = None
    """mean length of a completion in tokens, forced ones and the end token included"""
    truncated: float | None = None
    """share of the rollouts that `generation.max_new_tokens` ended; 0 for completions from a list"""
    overlong: float | None = None
    """mean penalty of a rollout for its length, which is not in `reward`; `null` without
    `generation.overlong_buffer`"""
    equal_groups: float | None = None
    """share of the groups whose rewards, less penalties, are all equal, in which `grpo` has no signal;
    1 at group size 1. With `combine = "normalize_then_sum"` those of each `[[rewards]]`, not their
    sum"""
    entropy: float | None = None
    """estimate of the policy's entropy per token: minus the log-probability a token was sampled with,
    mean over a completion, then over completions. Forced tokens count with 0"""
    exact_entropy: float | None = None
    """mean entropy in nats of the distributions that trained tokens were chosen from, at the
    temperature and over permitted tokens, computed from all logits; `null` without
    `loss.entropy_coef`"""
    kl: float | None = None
    """mean k3 estimate of KL(policy || reference) per trained token; `null` without `loss.kl_coef`"""
    clipped: float | None = None
    """share of the trained tokens at which the clipped term replaced the other (with `loss.clipping =
    "cispo"`, whose ratio was out of range); 0 with one update per step and `loss.old_logprobs =
    "recomputed"`. Rollouts with an advantage of exactly 0 do not count, unless there is a KL penalty or
    an entropy bonus"""
    mismatch: MismatchRecord = MismatchRecord()
    """how far the engine's log-probabilities are from the trainer's: the names below"""
    policy_version: int | None = None
    """optimizer updates so far"""
    assignment_version: int = 0
    """how many times the users had been divided again when the step's prompts were made
    (`clustering.recluster_every`)"""
    rollout_version: int | None = None
    """optimizer updates that the weights which generated the rollouts had seen; with
    `run.pipeline = "one_step_off"` those before the previous step's"""
    sync: SyncRecord | None = None
    """the last handing over of weights to the engine: the names below; `null` with the transformers
    engine, which shares them"""
    peak_memory_bytes: int | None = None
    """most memory the process has held so far; in `compare` all arms share one process, so a later arm
    starts at what the earlier ones reached. `null` on Windows"""
    num_clusters: int | None = None
    """clusters that have a history. Where they are more than `clusters` lists, the others are left out
    of this line"""
    clusters: dict[str, ClusterRecord] = {}
    """cluster -> the names below, of clusters that have a history; ids are strings here. All of them up
    to 64; of more, the eight largest, the eight smallest and the eight worst (by `count` and `mean`)
    and, as far as 64 reach, those with rollouts in this step, the lowest `reward` first"""
    fairness: FairnessRecord = FairnessRecord()
    """spread between the clusters: the names below"""
    timing_s: TimingRecord = TimingRecord()
    """seconds: the names below"""


class ClusterEvaluation(Record):
    """One cluster's share of an evaluation."""

    reward: float | None = None
    """mean of the prompts' rewards; `null` where no prompt got one"""
    std: float | None = None
    """standard deviation of the prompts' rewards (dividing by their number)"""
    best: float | None = None
    """mean over the prompts of the best reward among a prompt's samples; `null` without samples"""
    num_prompts: int = 0
    """prompts that got a reward"""


class EvaluationRecord(Record):
    """A line of evaluations.jsonl: what completions of held-out prompts get. A prompt's reward is that
    of its greedy completion or, with `run.eval_samples`, the mean over its samples that got one."""

    step: int
    """steps taken before it; 0 is the untrained model"""
    reward: float | None = None
    """mean of the prompts' rewards"""
    std: float | None = None
    """standard deviation of the prompts' rewards (dividing by their number); `std / sqrt(num_prompts)`
    is the standard error, over prompts: more samples of each make these no more representative"""
    best: float | None = None
    """mean over the prompts of the best reward among a prompt's samples (for rewards of 0 and 1 pass@k,
    with k = `num_samples`); `null` without samples"""
    num_prompts: int = 0
    """prompts that got a reward"""
    num_samples: int = 0
    """sampled completions of each prompt; 0: one greedy completion"""
    assignment_version: int = 0
    """how many times the users had been divided again by then; `clusters` are those of that division"""
    clusters: dict[str, ClusterEvaluation] = {}
    """cluster -> `reward`, `std`, `best`, `num_prompts`"""


class AbilityPart(Record):
    """One part of a measurement of general ability."""

    value: float
    """mean over the items"""
    standard_error: float | None = None
    """of the mean, over items: their standard deviation (dividing by their number - 1) /
    sqrt(`num_items`); `null` with one item"""
    num_items: int = 0
    """items that the tokenizer can express"""
    values: list[float] = []
    """of each item: nats a token of a window, else 1 (right, or followed) or 0"""
    asked: str = ""
    """digest of all items as tokens: parts with different ones are not compared"""


def perplexity(text: AbilityPart) -> float:
    """E to the power of a text's nats a token; e^20 stands for more, where a model fell apart."""
    return math.exp(min(text.value, 20.0))


class AbilityRecord(Record):
    """A line of ability.jsonl: what the model can do besides what it is trained for. A part is `null`
    where the tokenizer can express none of its items."""

    step: int
    """steps taken before it; 0 is the untrained model"""
    text: AbilityPart | None = None
    """nats a token of English text, by windows of 128 tokens: the names below"""
    perplexity: float | None = None
    """e to the power of these nats; e^20 stands for more"""
    arithmetic: AbilityPart | None = None
    """share of sums whose right answer of four is the likeliest; chance .25"""
    formats: AbilityPart | None = None
    """share of instructions whose form a greedy completion of up to 24 tokens has"""
    continents: AbilityPart | None = None
    """share of countries whose continent of four is the likeliest; chance .25"""
    seconds: float | None = None
    """that it took"""


def _writable(text: str) -> str:
    """Text that UTF-8 can hold: half a surrogate pair, which JSON can smuggle in, becomes a `?`."""
    return text.encode("utf-8", "replace").decode("utf-8")


Text: TypeAlias = Annotated[str, AfterValidator(_writable)]
"""What people or models wrote."""


class SampleRecord(Record):
    """A line of samples.jsonl or held_out.jsonl: one completion."""

    step: int
    """as in metrics.jsonl; of a held-out completion as in evaluations.jsonl"""
    prompt: Text
    """the example's text, before a chat template"""
    completion: Text
    """the text, without special tokens"""
    reward: float | None = None
    """raw; `null` where there is none"""
    advantage: float | None = None
    """what the update used; 0 for a rollout without a reward, `null` for a held-out completion. Under
    `loss.objective = "dpo"` the pairs of its group that it wins less those that it loses, under `"sft"`
    its reward where that is positive, else 0"""
    scores: dict[str, float | None] = {}
    """reward -> what it gave, raw and without its weight, where there are several; `null` where that is
    nothing"""
    cluster_id: int | Text | None = None
    """as it is, a number or a string"""
    user: int | Text | None = None
    """whose prompt it was"""
    assignment_version: int = 0
    """as in metrics.jsonl, or in evaluations.jsonl: by which division `cluster_id` is the user's"""


class ClusterInfo(Record):
    """Who a cluster is."""

    num_users: int = 0
    """its users"""
    share: float = 0.0
    """of all users"""
    about: str = ""
    """how its users' features differ from everybody's"""
    baselines: dict[str, float] = {}
    """rule -> its mean reward on the cluster's held-out prompts of an evaluation"""


class FlowRecord(Record):
    """Where people went when they were divided again."""

    step: int = 0
    """steps taken before"""
    num_moved: int = 0
    """users whose cluster has another name than before"""
    users: dict[str, dict[str, int]] = {}
    """cluster before -> cluster after -> users who went that way, or stayed. Of more than 512 ways the
    512 that most users took"""


class RunInfo(Record):
    """run.json: the run, the machine and the clusters."""

    status: str = "running"
    """`running`, `finished`, `interrupted` or `failed`; a run that was killed stays at `running`"""
    error: str = ""
    """what ended a run that failed, in a sentence; `log.txt` has the traceback"""
    id: str = ""
    """drawn at the first start; by it trackers know a resumed run again"""
    started: str = ""
    """time of the first start, UTC"""
    seconds: float = 0.0
    """wall time from the loading of the model on, evaluations and checkpoints included; all starts
    added up. Of a process that was killed only what had passed when this file was last written"""
    processor: str = ""
    """as the system names it"""
    num_threads: int | None = None
    """torch's threads"""
    precision: str = ""
    """what `auto` came out as"""
    versions: dict[str, str] = {}
    """of pgrpo, torch, transformers and numpy"""
    num_parameters: int | None = None
    """of the model with its adapters"""
    num_trained_parameters: int | None = None
    """of these, those that are trained"""
    num_train_examples: int | None = None
    """training examples of the data set"""
    num_held_out_examples: int | None = None
    """and those held out"""
    chance: float | None = None
    """reward of guessing: that of the baseline where there is one, else, if one of the choices is worth
    1, the mean of 1 / choices over up to 64 held-out examples; `null` without choices"""
    reward_name: str = "reward"
    """names of the rewards, joined by ` + `"""
    baselines: dict[str, float] = {}
    """rule -> its mean reward on the held-out prompts of an evaluation: `chance`, `most popular` and
    logits fitted to the choices of the training period, `one rule for all`, `one rule per cluster` and
    `one rule per person`. Empty where `choice` is not the only reward of an evaluation, or examples do
    not say what there was to choose from"""
    clusters: dict[str, ClusterInfo] = {}
    """cluster -> `num_users`, its users; `share`, of all users; `about`, how its users' features differ
    from everybody's; `baselines`, as above, on its own held-out prompts. With
    `clustering.recluster_every` they are the clusters of the last division"""
    flows: dict[str, FlowRecord] = {}
    """assignment version -> how people moved when it came to be (`clustering.recluster_every`):
    `step`, steps taken before; `num_moved`, users whose cluster has another name than before; `users`,
    cluster before -> cluster after -> users who went that way, or stayed. Of more than 512 ways the 512
    that most users took"""
    warnings: list[str] = Field(default=[])
    """what the histories tell that may go wrong, a sentence each, as of the end of the run or of its
    last start ([estimators.md](estimators.md#diagnostics-and-warnings))"""


def parts(record: Record, path: str = "") -> Iterator[tuple[str, Record]]:
    """A record and all records within it, by their paths: ``, `mismatch`, `clusters/0`."""
    yield path, record
    for name in _record_names(type(record)):
        value = getattr(record, name)
        below = f"{path}/{name}" if path else name
        if isinstance(value, dict):
            for key, entry in cast(dict[str, Record], value).items():
                yield from parts(entry, f"{below}/{key}")
        elif value is not None:
            yield from parts(value, below)


@cache
def _record_names(record: type[Record]) -> tuple[str, ...]:
    """The fields of a record that are records, or hold some by a name."""
    return tuple(
        name
        for name, field in record.model_fields.items()
        for kind in (get_args(field.annotation) or [field.annotation])
        if isinstance(kind, type) and issubclass(kind, Record)
    )


@cache
def number_names(record: type[Record]) -> tuple[str, ...]:
    """The fields of a record that are numbers, its step aside."""
    return tuple(
        name
        for name, field in record.model_fields.items()
        if name != "step" and {*(get_args(field.annotation) or [field.annotation])} <= _NUMBERS
    )


_NUMBERS = {int, float, NoneType}


def numbers(record: Record, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a record but its step, by its path: `reward`, `clusters/0/reward`."""
    for path, part in parts(record):
        for name in number_names(type(part)):
            value = getattr(part, name)
            if value is not None:
                yield f"{prefix}{path}/{name}" if path else prefix + name, value
