"""What a run would begin with, what looks wrong about it, and what its rewards think of texts: found
without weights, in seconds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel
from safetensors import safe_open

from pgrpo.errors import DataError, PgrpoError
from pgrpo.model.gguf import model_folder
from pgrpo.rewards.scorer import Scorer
from pgrpo.rollout.prompts import PromptBuilder
from pgrpo.runs.config import Config
from pgrpo.train.baselines import are_known, baselines
from pgrpo.train.build import Assembly
from pgrpo.train.evaluation import held_out
from pgrpo.types import Example, FloatArray, Group, Prompt, Rollout, evenly

SHOWN = 3
"""Prompts that are shown, of different clusters as far as there are any, and scored."""

LONGEST = 200
"""Longest texts, in characters, whose tokens are counted; of the others as many, spread evenly."""

MADE_UP = ("I do not know.", "yes")
"""Completions of a prompt without choices, beside its column `answer` and the end of its own text."""


class ShownPrompt(BaseModel):
    """A prompt as the model gets it, and what rewards think of completions."""

    user: str
    cluster: str
    num_tokens: int
    text: str
    rewards: dict[str, float | None]
    """Completion -> its reward; None for none. Empty where a reward failed."""


class Findings(BaseModel):
    """What was found."""

    num_train: int
    num_held_out: int
    epochs: float
    """How often the run sees each training example."""
    clusters: dict[str, dict[str, Any]]
    """Name -> `num_users`, `share` of all users, `about`."""
    longest_prompt: int
    """In tokens, of those that were counted."""
    prompts: list[ShownPrompt]
    baselines: dict[str, float]
    """Rule -> its mean reward on the held-out prompts; as in run.json. Empty where they were not asked
    for."""
    num_parameters: int | None
    """Of the model's files; None where they are not here, or made at the start."""
    memory_bytes: int | None
    """Of weights, gradients and AdamW's moments; activations and the engine come on top."""
    notes: list[str]
    """How the data was read, such as what was left out; a sentence each."""
    suspicious: list[str]
    """A sentence each."""


def check(config: Config, *, with_baselines: bool = False) -> Findings:
    """Everything of a run but its weights.

    Args:
        config: of the run.
        with_baselines: fit the rules that a run is compared with, which takes up to half a minute.

    Raises:
        PgrpoError: whatever would stop the run at its start.
    """
    suspicious: list[str] = []
    with Assembly(config) as parts:
        dataset, members = parts.dataset, parts.members
        held = held_out(dataset, config.run.eval_prompts) if config.run.eval_every else []
        limit = config.generation.max_prompt_tokens
        unlimited = config.generation.model_copy(update={"max_prompt_tokens": 1 << 40})
        builder = PromptBuilder(parts.tokenizer, config.model, unlimited, members)
        prompts = [builder.build(example) for example in _counted(dataset.train)]
        lengths = [len(prompt.token_ids) for prompt in prompts]
        if max(lengths) > limit:
            suspicious.append(
                f"{sum(n > limit for n in lengths)} of {len(lengths)} prompts are longer than "
                f"generation.max_prompt_tokens = {limit}, up to {max(lengths)} tokens: the first of "
                "them stops the run, unless generation.long_prompts is 'drop'"
            )
        shown = _of_different_clusters(prompts)
        rewards, said = _scored(shown, parts.scorer)
        suspicious += said
        found: dict[str, float] = {}
        scored_by = config.evaluation or config.rewards
        if with_baselines and held and are_known(scored_by):
            rules = baselines(dataset, held, members.histories("cluster", 0))
            found = {rule: scored_by[0].weight * float(r.mean()) for rule, r in rules.items()}
        suspicious += _of_clusters(members.about) + _of_answers(dataset.train)
        suspicious += [parts.other_data] if parts.other_data else []
        num_parameters = _num_parameters(config)
        return Findings(
            num_train=len(dataset.train),
            num_held_out=len(dataset.evaluation),
            epochs=config.run.num_steps * config.run.prompts_per_step / len(dataset.train),
            clusters={name: dict(about) for name, about in members.about.items()},
            longest_prompt=max(lengths),
            prompts=[
                ShownPrompt(
                    user=prompt.example.user,
                    cluster=str(prompt.cluster_id),
                    num_tokens=len(prompt.token_ids),
                    text=str(parts.tokenizer.decode(list(prompt.token_ids))),
                    rewards=scores,
                )
                for prompt, scores in zip(shown, rewards, strict=True)
            ],
            baselines=found,
            num_parameters=num_parameters,
            memory_bytes=None if num_parameters is None else _memory(config, num_parameters),
            notes=[
                *dataset.notes,
                *_of_new(parts.new_people, len(dataset.users)),
                *parts.order.notes(config.run.num_steps),
            ],
            suspicious=suspicious,
        )


def _counted(examples: Sequence[Example]) -> list[Example]:
    """The longest, and some of the others: all would take minutes where there are many."""
    by_length = sorted(examples, key=lambda example: -len(example.text))
    longest, rest = by_length[:LONGEST], by_length[LONGEST:]
    return longest + evenly(rest, LONGEST)


def _of_different_clusters(prompts: Sequence[Prompt]) -> list[Prompt]:
    first = {prompt.cluster_id: prompt for prompt in reversed(prompts)}
    others = [prompt for prompt in prompts if prompt is not first[prompt.cluster_id]]
    return [*first.values(), *others][:SHOWN]


def _scored(
    prompts: Sequence[Prompt], scorer: Scorer
) -> tuple[list[dict[str, float | None]], list[str]]:
    """The rewards of made-up completions of each prompt, and what is suspicious about them."""
    groups: list[Group] = []
    for place, prompt in enumerate(prompts):
        answer = prompt.example.columns.get("answer")
        own = [answer] if isinstance(answer, str) else []
        copied = prompt.example.text[-100:]
        texts = prompt.example.choices or list(dict.fromkeys([*MADE_UP, *own, copied]))
        groups.append(_group(prompt, place, texts))
    try:
        scored = scorer.score(groups)
    except PgrpoError as error:
        return [{} for _ in prompts], [f"made-up completions cannot be scored: {error}"]
    rewards = [
        dict(zip([r.completion for r in group.rollouts], _plain(group.rewards), strict=True))
        for group in scored
    ]
    if len({value for scores in rewards for value in scores.values()}) == 1:
        said = "all made-up completions get the same reward"
        return rewards, [f"{said}: where it is constant, there is nothing to learn"]
    return rewards, []


def _group(prompt: Prompt, place: int, texts: Sequence[str]) -> Group:
    """Completions that nobody sampled."""
    return Group.sampled([Rollout(prompt, place, (0,), text, (0.0,), False) for text in texts])


class Scores(BaseModel):
    """What the rewards of a run think of a text."""

    text: str
    reward: float | None
    """The weighted sum; None where there is none."""
    rewards: dict[str, float | None]
    """Each reward by itself, unweighted, by the name that records have for it."""


def score(
    config: Config, texts: Sequence[str], user: str | None = None
) -> tuple[str, list[Scores]]:
    """Let the rewards of a run score completions of one prompt.

    Args:
        config: of the run.
        texts: completions, at least one.
        user: whose first prompt they answer; None for the first prompt to train on.

    Returns:
        The text of the prompt, and what each completion gets.

    Raises:
        DataError: the data set has no prompt of that user.
        PgrpoError: whatever would stop the run at its start, or a reward failed.
    """
    with Assembly(config) as parts:
        own = (e for e in parts.dataset.train if user is None or e.user == user)
        example = next(own, None)
        if example is None:
            raise DataError(f"there is no prompt of user {user!r} to train on")
        prompt = Prompt(example, parts.members.cluster(example.user), (0,))
        group = _group(prompt, 0, texts)
        (scored,) = parts.scorer.score([group])
    each = {name: _plain(scores) for name, scores in scored.scores.items()}
    return example.text, [
        Scores(text=text, reward=total, rewards={name: own[n] for name, own in each.items()})
        for n, (text, total) in enumerate(zip(texts, _plain(scored.rewards), strict=True))
    ]


def _plain(rewards: FloatArray) -> list[float | None]:
    return [float(reward) if np.isfinite(reward) else None for reward in rewards]


def _of_clusters(about: Any) -> list[str]:
    sizes = {name: cluster["num_users"] for name, cluster in about.items()}
    if len(sizes) == 1 and sum(sizes.values()) > 1:
        return ["all people are in one cluster: there is one history for everybody"]
    alone = sum(size == 1 for size in sizes.values())
    if alone:
        said = f"{alone} of {len(sizes)} clusters hold one person"
        return [
            f"{said}: their histories stay short (shrinkage borrows from all, docs/estimators.md)"
        ]
    return []


def _of_new(new: Collection[str] | None, num_users: int) -> list[str]:
    if not new:
        return []
    share = f"{len(new):,} of {num_users:,} people"
    return [f"{share} are in none of the saved clusters (clustering.unseen)"]


def _of_answers(examples: Sequence[Example]) -> list[str]:
    """Answers that no completion can name."""
    missing = asked = 0
    texts: Counter[str] = Counter()
    for example in examples:
        texts[example.text] += 1
        answer, choices = example.columns.get("answer"), example.choices
        if isinstance(answer, str) and choices:
            asked += 1
            listed: Any = example.columns.get("options") or []
            missing += answer.strip() not in {str(text).strip() for text in (*choices, *listed)}
    said: list[str] = []
    if missing:
        said.append(f"the answer of {missing} of {asked} examples is none of their choices")
    if len(texts) == 1 < len(examples):
        said.append("all prompts are equal")
    return said


def _num_parameters(config: Config) -> int | None:
    """Of the files in the model's folder, by their headers."""
    folder = Path(model_folder(config.model.name)) if config.model.name != "tiny" else None
    if folder is None or not folder.is_dir():
        return None
    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="np") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is no dictionary
                total += int(np.prod(tensors.get_slice(name).get_shape()))
    return total or None


def _memory(config: Config, num_parameters: int) -> int | None:
    """Bytes of weights, and of gradients and two moments of the trained ones, each in the precision of
    the weights. None with adapters, whose number follows from the model's layers."""
    if config.model.lora is not None:
        return None
    return num_parameters * 4 * (2 if config.model.precision == "bf16" else 4)
