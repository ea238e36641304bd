"""Held-out evaluation: greedy or sampled completions of examples that training never saw."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from pgrpo.config.checks import check
from pgrpo.data import DataConfig
from pgrpo.data.movielens import MovieLensConfig, load_movielens, with_candidates
from pgrpo.errors import ConfigError, DataError, PluginError
from pgrpo.model.attention import PrefixCache
from pgrpo.model.language_model import LanguageModel
from pgrpo.rewards.scorer import Scorer
from pgrpo.rollout.engines import Engine
from pgrpo.rollout.seeds import derive_seed
from pgrpo.runs.config import Config
from pgrpo.runs.folder import RunFolder
from pgrpo.runs.metrics import one_of_each, sample_record
from pgrpo.runs.records import ClusterEvaluation, EvaluationRecord, SampleRecord
from pgrpo.train.build import Assembly
from pgrpo.train.checkpoint import chosen_checkpoint
from pgrpo.train.parallel import SINGLE, Ranks
from pgrpo.types import Dataset, Example, FloatArray, Group, Prompt, Rollout, evenly

SAMPLES = 24
"""Held-out completions of an evaluation that are logged."""


def held_out(dataset: Dataset, num_prompts: int) -> list[Example]:
    """Held-out examples spread evenly over the evaluation period; the same ones every time.

    Raises:
        DataError: nothing is held out.
    """
    if not len(dataset.evaluation):
        raise DataError(
            "the data set holds out no examples to evaluate on; give it some "
            "(data.evaluation_path), or set run.eval_every = 0"
        )
    return evenly(dataset.evaluation, num_prompts)


def within_budget(costs: Sequence[int], budget: int) -> Iterator[tuple[int, int]]:
    """Begin and end of as few runs of neighbours as a budget allows; what alone costs more has a run of
    its own."""
    start = 0
    while start < len(costs):
        end, used = start, 0
        while end < len(costs) and (end == start or used + costs[end] <= budget):
            used += costs[end]
            end += 1
        yield start, end
        start = end


def evaluate(
    step: int,
    engine: Engine,
    prompts: Sequence[Prompt],
    scorer: Scorer,
    config: Config,
    ranks: Ranks = SINGLE,
    *,
    assignment_version: int = 0,
) -> tuple[EvaluationRecord, list[SampleRecord]]:
    """Mean reward of the prompts, of all and per cluster: of each its greedy completion's, or the mean
    over its `run.eval_samples` samples. And some completions, of the same prompts every time and of
    every cluster as many, as far as SAMPLES reach; of a prompt with samples the first.

    Args:
        step: taken before it.
        engine: generates with the policy's current weights.
        prompts: held-out prompts.
        scorer: gives each completion its reward.
        config: of the run.
        ranks: the processes that share the work; each evaluates some prompts, and gets all.
        assignment_version: of the division that the prompts' clusters are of.
    """
    scored = held_out_groups(engine, prompts, scorer, config, ranks)
    ranks.gather(partial(_require_reward, scored))
    record = _record(step, scored, config.run.eval_samples, assignment_version)
    shown = one_of_each(scored, lambda group: group.prompt.cluster_id)[:SAMPLES]
    return record, [sample_record(step, assignment_version, group) for group in shown]


def _record(
    step: int, groups: Sequence[Group], samples: int, assignment_version: int
) -> EvaluationRecord:
    """What rewarded completions of held-out prompts come to, of all and per cluster."""
    values = np.array([group.rewards for group in groups])
    places: dict[str, list[int]] = {}
    for place, group in enumerate(groups):
        places.setdefault(str(group.prompt.cluster_id), []).append(place)

    def summary(rewards: FloatArray) -> ClusterEvaluation:
        chosen = rewards[np.isfinite(rewards).any(1)]
        if not len(chosen):
            return ClusterEvaluation()
        means = np.nanmean(chosen, 1)
        return ClusterEvaluation(
            reward=float(means.mean()),
            std=float(means.std()),
            best=float(np.nanmax(chosen, 1).mean()) if samples else None,
            num_prompts=len(chosen),
        )

    return EvaluationRecord(
        step=step,
        num_samples=samples,
        assignment_version=assignment_version,
        **vars(summary(values)),
        clusters={name: summary(values[where]) for name, where in sorted(places.items())},
    )


def held_out_groups(
    engine: Engine,
    prompts: Sequence[Prompt],
    scorer: Scorer,
    config: Config,
    ranks: Ranks = SINGLE,
) -> list[Group]:
    """The rewarded completions of each prompt: the greedy one, or `run.eval_samples` samples.

    A call of the engine gets `optimizer.token_budget` prompt tokens at most, a prompt counted once for
    each of its completions: sampling takes no more memory than greedy decoding. For the arguments see
    `evaluate`.
    """
    samples, budget = config.run.eval_samples, config.optimizer.token_budget
    size, seed = max(samples, 1), derive_seed(config.run.seed, "evaluation")
    costs = [size * len(prompt.token_ids) for prompt in prompts]

    def part(start: int, end: int) -> list[Group]:
        own = ranks.share(costs[start:end])
        first, last = start + own.start, start + own.stop
        return scorer.score(
            engine.generate(prompts[first:last], size, seed=seed, first=first, greedy=not samples)
        )

    scored: list[Group] = []
    # All processes make as many calls, for weights may have to be brought together in each.
    for start, end in within_budget(costs, budget):
        scored += ranks.gather(partial(part, start, end))
    return scored


@torch.no_grad()
def choice_probabilities(
    model: LanguageModel, prompts: Sequence[Prompt], token_budget: int
) -> list[FloatArray]:
    """Of each prompt [C], how probable the model finds each of its choices at temperature 1.

    Args:
        model: the policy's.
        prompts: their choices are of one token each.
        token_budget: prompt tokens of one pass.
    """
    found: list[FloatArray] = []
    for start, end in within_budget([len(prompt.token_ids) for prompt in prompts], token_budget):
        some = prompts[start:end]
        first = [[choice[0] for choice in prompt.choices or ()] for prompt in some]
        with model.whole(), model.autocast():
            cache = PrefixCache([prompt.token_ids for prompt in some], 1, 1, model.device)
            logits, column = model.permitted_logits(model.prefill(cache), first)
        probabilities = logits.double().softmax(-1).cpu().numpy()
        found += [
            row[[column[token] for token in tokens]]
            for row, tokens in zip(probabilities, first, strict=True)
        ]
    return found


def choice_rewards(
    tokenizer: PreTrainedTokenizerFast, prompts: Sequence[Prompt], scorer: Scorer
) -> list[FloatArray]:
    """Of each prompt [C], the reward of each choice; NaN where there is none."""

    def group(place: int, prompt: Prompt) -> Group:
        choices = prompt.choices or ()
        texts = tokenizer.batch_decode(
            [list(choice) for choice in choices], skip_special_tokens=True
        )
        return Group.sampled(
            [
                Rollout(prompt, place, choice, text, (0.0,) * len(choice), truncated=False)
                for choice, text in zip(choices, texts, strict=True)
            ]
        )

    groups = scorer.score(group(place, prompt) for place, prompt in enumerate(prompts))
    return [scored.rewards for scored in groups]


def _require_reward(groups: Sequence[Group]) -> list[None]:
    if not any(np.isfinite(group.rewards).any() for group in groups):
        raise PluginError("no held-out completion got a reward")
    return []


def held_out_with(
    parts: Assembly, candidates: Sequence[int], num_prompts: int
) -> Iterator[list[Example]]:
    """Held-out examples with each number of MovieLens candidates: the same interactions in the same
    order, so that rewards can be compared place by place.

    A longer list of films holds those of a shorter one. Where prompts that are too long are left out,
    so is an interaction whose prompt is too long with one of these numbers, or with the one that was
    trained with. Examples are made of one number at a time, all of the same ratings in memory.

    Args:
        parts: of a run, of which neither weights nor clusters are needed.
        candidates: films to choose from.
        num_prompts: interactions, spread evenly over the evaluation period.

    Raises:
        ConfigError: the data set has no candidates, or other interactions with another number of them.
        DataError: there are too few films, or no interaction is held out that fits.
    """
    data, generation = parts.config.data, parts.config.generation
    varied = [data_with_candidates(data, count).candidates for count in candidates]
    assert isinstance(data, MovieLensConfig)
    loaded = load_movielens(data)
    sets = [with_candidates(loaded, count).evaluation for count in varied]
    places: Sequence[int] = range(len(loaded.evaluation))
    if generation.long_prompts == "drop":
        asked = (loaded.evaluation, *sets)
        places = [place for place in places if all(parts.fits(each[place]) for each in asked)]
        if not places:
            raise DataError(
                f"all {len(loaded.evaluation)} held-out prompts with {max(varied)} candidates are "
                f"longer than generation.max_prompt_tokens = {generation.max_prompt_tokens}"
            )
    chosen = evenly(places, num_prompts)
    for examples in sets:
        yield [examples[place] for place in chosen]


def groups_with(
    parts: Assembly, candidates: Sequence[int], num_prompts: int
) -> Iterator[list[Group]]:
    """What a policy answers with each number of MovieLens candidates, rewarded: `held_out_groups` of
    `held_out_with`, one number at a time. The engine was synced by then."""
    for examples in held_out_with(parts, candidates, num_prompts):
        prompts = [parts.builder.build(example) for example in examples]
        yield held_out_groups(parts.engine, prompts, parts.held_out_scorer, parts.config)


def evaluate_run(
    folder: Path, candidates: Sequence[int] | None, num_prompts: int, *, best: bool = False
) -> list[dict[str, Any]]:
    """Evaluate a run's last checkpoint, once for each number of MovieLens candidates.

    Args:
        folder: of the run.
        candidates: films to choose from; None stands for what was trained with.
        num_prompts: held-out prompts, the same interactions for every number of candidates.
        best: take the checkpoint of the best held-out reward in the place of the last.

    Returns:
        One record for each entry of `candidates`: those of `evaluate`, with `candidates`, `step` and
        `standard_error`.

    Raises:
        RunFolderError: it is no run folder.
        CheckpointError: there is no such checkpoint in it, or it is damaged.
        ConfigError: candidates are asked for of a data set that has none.
    """
    run = RunFolder(folder)
    config = run.config()
    checkpoint = chosen_checkpoint(run, best=best)
    counts = [getattr(config.data, "candidates", None)] if candidates is None else candidates
    results: list[dict[str, Any]] = []
    with Assembly(config, checkpoint) as parts:
        parts.engine.sync(int(checkpoint.state()["policy_version"]))
        if candidates is None:
            prompts = [parts.builder.build(e) for e in held_out(parts.dataset, num_prompts)]
            found = iter([held_out_groups(parts.engine, prompts, parts.held_out_scorer, config)])
        else:
            found = groups_with(parts, candidates, num_prompts)
        for count, groups in zip(counts, found, strict=True):
            _require_reward(groups)
            version = parts.members.division.version
            result = _record(checkpoint.step, groups, config.run.eval_samples, version).model_dump()
            error = result["std"] / result["num_prompts"] ** 0.5
            results.append({"candidates": count, "standard_error": error, **result})
    return results


def data_with_candidates(data: DataConfig, count: int) -> MovieLensConfig:
    """The section `[data]` with another number of MovieLens candidates.

    Raises:
        ConfigError: the data set has none, or other choices with another number, or there cannot be so
            many.
    """
    if not isinstance(data, MovieLensConfig):
        raise ConfigError(f"data set {data.name!r} has no candidates to vary")
    if data.task == "rated":
        raise ConfigError(
            "data.task is 'rated', where another number of candidates makes other choices, of other "
            "ratings; expected 'next'"
        )
    tree = {**data.model_dump(), "candidates": count}
    return check(MovieLensConfig, tree, "--candidates")
