"""What a finished run's last policy, and simple rules, get on held-out prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from time import perf_counter

import numpy as np

from pgrpo.experiments.design import HeldOut
from pgrpo.experiments.grid import Plan
from pgrpo.rewards.pairwise import digest
from pgrpo.runs.config import Config
from pgrpo.runs.folder import RunFolder
from pgrpo.runs.records import AbilityRecord
from pgrpo.runs.reproduction import FigureRecord
from pgrpo.train.ability import measure_ability
from pgrpo.train.baselines import Rules, are_known
from pgrpo.train.build import Assembly
from pgrpo.train.checkpoint import chosen_checkpoint
from pgrpo.train.evaluation import (
    choice_probabilities,
    choice_rewards,
    held_out,
    held_out_groups,
    held_out_with,
)
from pgrpo.types import Example, FloatArray, Prompt


def measure(
    folder: RunFolder,
    plans: Sequence[Plan],
    wanted: Collection[str],
    before: AbilityRecord | None,
    note: Callable[[str], None],
) -> Iterator[FigureRecord]:
    """Measure the last checkpoint of a run, once for each figure that is wanted.

    Where the rewards of all choices are known and each is a single token, both the likeliest one's
    reward and the exact mean come of one pass over the prompts; otherwise completions are generated.

    Args:
        folder: of the run.
        plans: that come to this run, the first one's folder being its own.
        wanted: keys of those that are not measured yet.
        before: general ability of the model that the run began with; measured here if it is not known.
        note: is told what is done.

    Raises:
        RunFolderError, CheckpointError: the folder is damaged.
        PgrpoError: what would stop an evaluation of the run.
    """
    config, info = folder.config(), folder.info()
    checkpoint = chosen_checkpoint(folder, best=False)
    began = perf_counter()
    if before is None:
        note("measuring the general ability that runs begin with")
        with Assembly(config, note=note) as untrained:
            before = measure_ability(untrained)
    with Assembly(config, checkpoint, note) as parts:
        ability = [before, measure_ability(parts)]
        known = are_known(config.evaluation or config.rewards) and not config.run.eval_samples
        keys = {plan.measured_with: plan.key for plan in plans}
        for held, examples in _asked(parts, list(keys)):
            if (key := keys[held]) not in wanted:
                continue
            among = "" if held.candidates is None else f" of {held.candidates} films each"
            note(f"measuring {plans[0].folder} on {len(examples):,} held-out prompts{among}")
            prompts = [parts.builder.build(example) for example in examples]
            expected: list[FloatArray] = []
            if known and all(map(_is_labelled, prompts)):
                budget = config.optimizer.token_budget
                shares = choice_probabilities(parts.model, prompts, budget)
                of_choices = choice_rewards(parts.tokenizer, prompts, parts.held_out_scorer)
                likeliest = [int(each.argmax()) for each in shares]
                said = [p.choices[k] for p, k in zip(prompts, likeliest, strict=True) if p.choices]
                rewards = [r[[k]] for r, k in zip(of_choices, likeliest, strict=True)]
                expected = [p @ r for p, r in zip(shares, of_choices, strict=True)]
            else:
                parts.engine.sync(int(checkpoint.state()["policy_version"]))
                groups = held_out_groups(parts.engine, prompts, parts.held_out_scorer, config)
                said = [group.rollouts[0].completion_ids for group in groups]
                rewards = [group.rewards for group in groups]
            yield FigureRecord(
                key=key,
                run=plans[0].folder,
                users=[example.user for example in examples],
                prompts=digest([[example.user, example.text] for example in examples]),
                rewards=[_mean(each) for each in rewards],
                # To five digits, for files of many runs are kept.
                expected=[
                    None if mean is None else round(mean, 5) for mean in map(_mean, expected)
                ],
                commonest=max(Counter(said).values()) / len(said),
                steps=checkpoint.step,
                rollouts=sum(record.num_rollouts or 0 for record in folder.metrics),
                seconds=info.seconds,
                measuring_s=perf_counter() - began,
                ability=ability,
                curve={
                    record.step: record.reward
                    for record in folder.evaluations
                    if record.reward is not None
                },
                settings=plans[0].settings,
                versions=info.versions,
                precision=info.precision,
            )
            began = perf_counter()


def rules(config: Config, measured: Collection[HeldOut]) -> dict[HeldOut, dict[str, float]]:
    """Mean reward of simple rules (`pgrpo.train.baselines`) on the prompts that policies are measured
    with, by the rule's name; none where the rewards of choices are not known.

    The logits are fitted, like the policy, to choices among as many films as in training. No weights
    are loaded.
    """
    if not are_known(config.evaluation or config.rewards):
        return {}
    with Assembly(config) as parts:
        fitted = Rules(parts.dataset, parts.members.histories("cluster", 0))
        return {
            held: {name: float(each.mean()) for name, each in fitted.rewards(examples).items()}
            for held, examples in _asked(parts, measured)
        }


def _asked(
    parts: Assembly, measured: Collection[HeldOut]
) -> Iterator[tuple[HeldOut, Sequence[Example]]]:
    """The held-out examples of each. All numbers of films are asked for together, and whether or not
    they are still wanted: with all the same interactions."""
    everything = len(parts.dataset.evaluation)
    for held in measured:
        if held.candidates is None:
            yield held, held_out(parts.dataset, held.num_prompts or everything)
    for number in dict.fromkeys(held.num_prompts for held in measured):
        films = {
            held: held.candidates
            for held in measured
            if held.candidates is not None and held.num_prompts == number
        }
        if films:
            sets = held_out_with(parts, list(films.values()), number or everything)
            yield from zip(films, sets, strict=True)


def _is_labelled(prompt: Prompt) -> bool:
    """Whether its completion is one of some single tokens."""
    return prompt.choices is not None and all(len(choice) == 1 for choice in prompt.choices)


def _mean(values: FloatArray) -> float | None:
    """Of the finite ones; None where there is none."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else None
