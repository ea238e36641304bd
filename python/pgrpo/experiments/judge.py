"""Two policies side by side: their completions of the same held-out prompts, judged pair by pair.

A judge sees each pair in both orders; one run's answer wins where both votes name it, and everything
else is a tie. What is generated, asked and scored is kept line by line (`pgrpo.runs.judgement`), so
that a judgement that was killed goes on, and nothing is paid for twice.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from pgrpo.clusters.membership import Membership
from pgrpo.config.sections import RewardConfig
from pgrpo.config.toml import flat, resolved_tree
from pgrpo.errors import ConfigError, PgrpoError, RunFolderError
from pgrpo.experiments.opinions import JudgeConfig, ask_all
from pgrpo.plugins.registry import load_registry
from pgrpo.report import Verdict
from pgrpo.report.judgement import render, verdict
from pgrpo.report.pairs import rates, share_by_person
from pgrpo.rewards.pairwise import PairJudge, Question, digest
from pgrpo.rollout.prompts import PromptBuilder
from pgrpo.rollout.seeds import derive_seed
from pgrpo.runs.config import Config
from pgrpo.runs.disk import locked, replace_file
from pgrpo.runs.folder import RunFolder
from pgrpo.runs.judgement import (
    CompletionRecord,
    ContestantRecord,
    JudgementRecord,
    OpinionRecord,
    PairRecord,
    ScoreRecord,
    Store,
    UsageRecord,
    Winner,
)
from pgrpo.runs.sinks import run_name
from pgrpo.train.build import Assembly
from pgrpo.train.checkpoint import Checkpoint, chosen_checkpoint
from pgrpo.train.evaluation import held_out, within_budget
from pgrpo.types import Dataset, Example, Group, Prompt, Rollout

_SCORED_AT_ONCE = 32
"""Prompts whose completions a reward gets in one call, and that a killed process scores again."""
_PAID = {"judge"}
"""Rewards that ask an endpoint themselves: held-out rewards of theirs are not asked for on the side."""
_Rewards: TypeAlias = list[list[float | None]]
"""Of each prompt its completions' [G], None where there is none."""


@dataclass(frozen=True)
class _Contestant:
    """One of the two policies."""

    record: ContestantRecord
    config: Config
    checkpoint: Checkpoint | None
    """None for the model that the run began with."""

    @property
    def origin(self) -> dict[str, Any]:
        """All that its completions depend on, besides prompt and seed."""
        weights = None
        if self.checkpoint is not None:
            # It lists the digests of all other files.
            manifest = (self.checkpoint.path / "manifest.json").read_bytes()
            weights = hashlib.sha256(manifest).hexdigest()
        return {
            "weights": weights,
            "seed": self.config.run.seed,
            "model": resolved_tree(self.config.model),
            "generation": resolved_tree(self.config.generation),
        }


def judge(
    run_a: Path,
    run_b: Path | None,
    settings: JudgeConfig,
    out: Path,
    *,
    best: bool = False,
    note: Callable[[str], None] = lambda _: None,
) -> tuple[JudgementRecord, Verdict]:
    """Judge two policies, and write `judge.json`, `pairs.jsonl` and `judge.html` into a folder.

    Args:
        run_a: folder of the first run.
        run_b: of the second; None for the model that the first run began with.
        settings: who judges what.
        out: the folder; what it holds already is taken from there.
        best: take the checkpoints of the best held-out reward in the place of the last ones.
        note: is told how far it is.

    Raises:
        RunFolderError: a folder holds no run, or `out` is in use or damaged.
        CheckpointError: a run has no such checkpoint.
        ConfigError: the runs have different data, or the settings do not fit them.
        PluginError: the judge is not there, cannot be read, or failed.
    """
    a, b = _contestants(run_a, run_b, settings, best)
    # What is wrong with a judge is told before anything is generated.
    pair_judge = None
    if settings.endpoint is not None:
        pair_judge = PairJudge(settings.endpoint, settings.rubric)
    if settings.reward is not None:
        load_registry().check("reward", settings.reward)
    with locked(out):
        pairs, examples, about, notes = _answered(a, b, settings, pair_judge, out, note)
        opinions = Store(out / "opinions.jsonl", OpinionRecord)
        if pair_judge is None:
            pairs = [_compared(pair) for pair in pairs]
            lacking = Counter("unreadable" for pair in pairs if pair.outcome is None)
        else:
            questions = [
                _questions(pair_judge, example, about.get(pair.cluster, ""), pair)
                for example, pair in zip(examples, pairs, strict=True)
            ]
            failed, said = ask_all(pair_judge, questions, settings, opinions, note)
            notes += said
            pairs = [
                _voted(pair, asked, opinions) for pair, asked in zip(pairs, questions, strict=True)
            ]
            lacking = Counter(_lack(asked, opinions, failed) for asked in questions)
        record = _judgement(a, b, settings, pairs, about, opinions, lacking, notes)
        lines = "".join(f"{pair.model_dump_json()}\n" for pair in pairs)
        replace_file(out / "pairs.jsonl", lines.encode())
        replace_file(out / "judge.json", f"{record.model_dump_json(indent=2)}\n".encode())
        criteria = settings.rubric.criteria if pair_judge else {}
        replace_file(out / "judge.html", render(record, pairs, criteria).encode())
    return record, verdict(record)


def _answered(
    a: _Contestant,
    b: _Contestant,
    settings: JudgeConfig,
    pair_judge: PairJudge | None,
    out: Path,
    note: Callable[[str], None],
) -> tuple[list[PairRecord], list[Example], dict[str, str], list[str]]:
    """All pairs with what rewards say of them, not yet judged; the example of each; cluster -> how its
    people differ from all; and what is to be told."""
    completions = Store(out / "completions.jsonl", CompletionRecord)
    rewards = Store(out / "rewards.jsonl", ScoreRecord)
    with Assembly(a.config, a.checkpoint, note) as parts:
        asked = held_out(parts.dataset, settings.num_prompts)
        if pair_judge is not None:
            # What the rubric lacks is told before anything is generated.
            for example in asked:
                pair_judge.question(example)
        with Assembly(b.config, b.checkpoint, note) as others:
            _check_prompts(asked, held_out(others.dataset, settings.num_prompts))
            # The first run says whose clusters count: the other one's people are not divided, unless
            # its prompts name the clusters that it was trained with.
            members = others.members if b.config.model.names_cluster else parts.members
            said_b = _complete(others, b, asked, members, settings, completions, note)
        said_a = _complete(parts, a, asked, parts.members, settings, completions, note)
        # Both are scored as answers to the first run's prompts, which its own tokenizer made.
        said_b = [
            replace(group, rollouts=tuple(replace(r, prompt=own.prompt) for r in group.rollouts))
            for own, group in zip(said_a, said_b, strict=True)
        ]
        both, notes = (said_a, said_b), _selection(parts.dataset, asked, a, b)
        scored: dict[str, tuple[_Rewards, ...]] = {}
        if settings.reward is not None:
            by = [settings.reward]
            scored["rewards"] = tuple(_score(parts, by, said, rewards, note) for said in both)
        by = _programmatic(a.config, b.config, settings)
        try:
            if by:
                scored["held_out"] = tuple(_score(parts, by, said, rewards, note) for said in both)
        except RunFolderError:
            raise
        except PgrpoError as error:
            # It only tells of the judge; who won does not depend on it.
            notes.append(
                "How often the winner has the higher held-out reward is not known, for that reward "
                f"failed: {error}."
            )
        about = {name: who["about"] for name, who in parts.members.about.items()}
    examples = [group.prompt.example for group in said_a for _ in group.rollouts]
    return _pairs(said_a, said_b, scored), examples, about, notes


def _selection(
    dataset: Dataset, asked: Sequence[Example], a: _Contestant, b: _Contestant
) -> list[str]:
    """What is to be told of checkpoints that were chosen by the very prompts they are judged on."""
    chosen = [contestant for contestant in (a, b) if contestant.record.best]
    if not chosen:
        return []
    sizes = {contestant.config.run.eval_prompts for contestant in chosen}
    seen = {(e.user, e.text) for size in sizes for e in held_out(dataset, size)}
    met = sum((example.user, example.text) in seen for example in asked)
    names = " and ".join(contestant.record.name for contestant in chosen)
    said = (
        f"The checkpoint of {names} was chosen for its held-out reward, by prompts among which are "
        f"{met} of the {len(asked)} that are judged here: on these it looks better than on others."
    )
    return [said]


def _contestants(
    run_a: Path, run_b: Path | None, settings: JudgeConfig, best: bool
) -> tuple[_Contestant, _Contestant]:
    """The two policies, of which data, checkpoints and names were looked at."""

    def sampled(config: Config) -> Config:
        if settings.temperature is None:
            return config
        changed = config.generation.model_copy(update={"temperature": settings.temperature})
        return config.model_copy(update={"generation": changed})

    def of_run(folder: Path, name: str) -> _Contestant:
        run = RunFolder(folder)
        config = run.config()
        checkpoint = chosen_checkpoint(run, best=best)
        record = ContestantRecord(name=name, run=str(folder), step=checkpoint.step, best=best)
        return _Contestant(record, sampled(config), checkpoint)

    if run_b is None:
        a = of_run(run_a, run_name(run_a))
        name = f"{a.config.model.name} before training"
        return a, _Contestant(ContestantRecord(name=name, run=str(run_a), step=0), a.config, None)
    names = [run_name(run_a), run_name(run_b)]
    if names[0] == names[1]:
        names = [str(run_a), str(run_b)]
    if run_a.resolve() == run_b.resolve():
        raise ConfigError(f"both runs are {run_a}; expected two different ones")
    a, b = of_run(run_a, names[0]), of_run(run_b, names[1])
    old, new = (dict(flat(resolved_tree(c.config.data))) for c in (a, b))
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            raise ConfigError(
                f"{run_a} has data.{key} = {old.get(key, 'none')} and {run_b} has "
                f"{new.get(key, 'none')}; expected runs of the same data set"
            )
    return a, b


def _complete(
    parts: Assembly,
    contestant: _Contestant,
    examples: Sequence[Example],
    members: Membership,
    settings: JudgeConfig,
    store: Store[CompletionRecord],
    note: Callable[[str], None],
) -> list[Group]:
    """A policy's completions of the examples, in their order; only what is missing is generated."""
    config = contestant.config
    builder = PromptBuilder(parts.tokenizer, config.model, config.generation, members)
    prompts = [builder.build(example) for example in examples]
    size, greedy = max(1, settings.num_samples), not settings.num_samples
    seed, origin = derive_seed(settings.seed, "judge"), contestant.origin
    keys = [
        digest(
            {
                **origin,
                "prompt": prompt.token_ids,
                "choices": prompt.choices,
                # By these a sample's random numbers are drawn.
                "sampled": None if greedy else [settings.num_samples, seed, place],
            }
        )
        for place, prompt in enumerate(prompts)
    ]
    saved = contestant.checkpoint and contestant.checkpoint.state()
    version = int(saved["policy_version"]) if saved else 0
    missing = sum(key not in store for key in keys)
    if missing:
        note(f"generating {contestant.record.name}: {missing} of {len(prompts)} prompts")
        parts.engine.sync(version)
    budget = parts.config.optimizer.token_budget
    costs = [size * len(prompt.token_ids) for prompt in prompts]
    for start, end in within_budget(costs, budget):
        if all(key in store for key in keys[start:end]):
            continue
        for group in parts.engine.generate(
            prompts[start:end], size, seed=seed, first=start, greedy=greedy
        ):
            if keys[group.group_id] not in store:
                store.append(_completions(keys[group.group_id], group))
    return [
        _group(place, prompt, store[key], version)
        for place, (prompt, key) in enumerate(zip(prompts, keys, strict=True))
    ]


def _completions(key: str, group: Group) -> CompletionRecord:
    return CompletionRecord(
        key=key,
        completions=[rollout.completion for rollout in group.rollouts],
        token_ids=[list(rollout.completion_ids) for rollout in group.rollouts],
        truncated=[rollout.truncated for rollout in group.rollouts],
    )


def _group(place: int, prompt: Prompt, record: CompletionRecord, version: int) -> Group:
    """The completions as rewards get them; of their log-probabilities nothing was kept."""
    return Group.sampled(
        [
            Rollout(prompt, place, tuple(ids), text, (math.nan,) * len(ids), truncated, version)
            for text, ids, truncated in zip(
                record.completions, record.token_ids, record.truncated, strict=True
            )
        ]
    )


def _check_prompts(a: Sequence[Example], b: Sequence[Example]) -> None:
    """Refuse policies that would be asked different things, as where one left out long prompts."""
    asked = [[(example.user, example.text) for example in examples] for examples in (a, b)]
    if asked[0] == asked[1]:
        return
    place = next(
        (i for i, (x, y) in enumerate(zip(*asked, strict=False)) if x != y), min(map(len, asked))
    )
    raise ConfigError(
        f"the runs hold out different prompts: of {len(a)} and {len(b)}, number {place + 1} differs, "
        "as where generation.long_prompts = 'drop' leaves out other ones"
    )


def _programmatic(a: Config, b: Config, settings: JudgeConfig) -> list[RewardConfig]:
    """The held-out rewards of both runs; none where they differ, ask a judge, score whole steps, or
    judge here."""
    found = [
        # Held-out completions are scored without it.
        [each.model_copy(update={"shift": None}) for each in config.evaluation or config.rewards]
        for config in (a, b)
    ]
    trees = [[resolved_tree(section) for section in sections] for sections in found]
    judging = [resolved_tree(settings.reward)] if settings.reward else None
    usable = trees[0] == trees[1] and trees[0] != judging
    return found[0] if usable and not any(map(_is_no_measure, found[0])) else []


def _is_no_measure(section: RewardConfig) -> bool:
    """Whether it costs money, or what it gives one answer may depend on all others."""
    return section.name in _PAID or section.batch == "step"


def _score(
    parts: Assembly,
    sections: Sequence[RewardConfig],
    groups: Sequence[Group],
    store: Store[ScoreRecord],
    note: Callable[[str], None],
) -> _Rewards:
    """Rewards [G] of each group, None where there is none; only what is missing is scored."""
    rules = [resolved_tree(section) for section in sections]

    def key(rollout: Rollout) -> str:
        prompt = rollout.prompt
        asked = {
            "prompt": prompt.example.text,
            "user": prompt.example.user,
            "columns": prompt.example.columns,
            "cluster": str(prompt.cluster_id),
        }
        return digest({"rewards": rules, "asked": asked, "completion": rollout.completion})

    missing = [g for g in groups if any(key(rollout) not in store for rollout in g.rollouts)]
    if missing:
        note(f"scoring {len(missing)} prompts by {', '.join(s.name for s in sections)}")
        scorer = parts.scorer_of(sections)
        for start in range(0, len(missing), _SCORED_AT_ONCE):
            for group in scorer.score(missing[start : start + _SCORED_AT_ONCE]):
                for rollout, reward in zip(group.rollouts, group.rewards.tolist(), strict=True):
                    if key(rollout) not in store:
                        value = reward if math.isfinite(reward) else None
                        store.append(ScoreRecord(key=key(rollout), reward=value))
    return [[store[key(rollout)].reward for rollout in group.rollouts] for group in groups]


def _pairs(
    a: Sequence[Group],
    b: Sequence[Group],
    scored: Mapping[str, Sequence[_Rewards]],
) -> list[PairRecord]:
    """All pairs, prompt by prompt, not yet judged."""
    pairs: list[PairRecord] = []
    for place, (one, other) in enumerate(zip(a, b, strict=True)):
        example = one.prompt.example
        for i, (x, y) in enumerate(zip(one.rollouts, other.rollouts, strict=True)):
            known = {name: [values[place][i] for values in both] for name, both in scored.items()}
            pairs.append(
                PairRecord(
                    prompt=example.text,
                    user=example.user,
                    cluster=str(one.prompt.cluster_id),
                    a=x.completion,
                    b=y.completion,
                    rewards=known.get("rewards", []),
                    held_out=known.get("held_out", []),
                )
            )
    return pairs


def _compared(pair: PairRecord) -> PairRecord:
    """A pair judged by its rewards."""
    a, b = pair.rewards
    outcome: Winner | None = None
    if a is not None and b is not None:
        outcome = "a" if a > b else "b" if b > a else "tie"
    return pair.model_copy(update={"outcome": outcome})


def _questions(judge: PairJudge, example: Example, about: str, pair: PairRecord) -> list[Question]:
    """Both orders of a pair; none for equal texts, which tie."""
    if pair.a == pair.b:
        return []
    return [
        judge.question(example, about, *order) for order in ((pair.a, pair.b), (pair.b, pair.a))
    ]


def _voted(
    pair: PairRecord, asked: Sequence[Question], opinions: Store[OpinionRecord]
) -> PairRecord:
    """A pair judged by the opinions on it: somebody wins where both orders say so."""
    if not asked:
        return pair.model_copy(update={"outcome": "tie"})
    found = [opinions.get(question.key) for question in asked]
    votes: list[Winner | None] = [_vote(found[0], "a", "b"), _vote(found[1], "b", "a")]
    replies = ["" if said is None else said.reply for said in found]
    return pair.model_copy(
        update={
            "outcome": _outcome(*votes),
            "votes": votes if any(found) else [],
            "replies": replies if any(found) else [],
        }
    )


def _vote(opinion: OpinionRecord | None, first: Winner, second: Winner) -> Winner | None:
    """Whose answer an opinion names, by whose was shown first and whose second."""
    match opinion and opinion.side:
        case "A":
            return first
        case "B":
            return second
        case "tie":
            return "tie"
        case _:
            return None


def _outcome(first: Winner | None, second: Winner | None) -> Winner | None:
    """What two votes come to."""
    if first is None or second is None:
        return None
    return first if first == second else "tie"


def _lack(
    asked: Sequence[Question], opinions: Store[OpinionRecord], failed: Collection[str]
) -> str:
    """Why a pair has no outcome; empty where it has one."""
    found = [opinions.get(question.key) for question in asked]
    if any(opinion is not None and opinion.side is None for opinion in found):
        return "unreadable"
    if any(question.key in failed for question in asked):
        return "failed"
    return "unasked" if None in found else ""


def _judgement(
    a: _Contestant,
    b: _Contestant,
    settings: JudgeConfig,
    pairs: Sequence[PairRecord],
    about: Mapping[str, str],
    opinions: Store[OpinionRecord],
    lacking: Mapping[str, int],
    notes: Sequence[str],
) -> JudgementRecord:
    """All numbers of a judgement."""
    by_cluster = {
        cluster: [pair for pair in pairs if pair.cluster == cluster]
        for cluster in about
        if any(pair.cluster == cluster for pair in pairs)
    }
    both = [pair for pair in pairs if len(pair.votes) == 2 and None not in pair.votes]
    named_first = [
        (pair.user, (vote == "a") == (place == 0))
        for pair in both
        for place, vote in enumerate(pair.votes)
        if vote != "tie"
    ]
    agreeing = [
        (pair.user, (pair.outcome == "a") == (difference > 0))
        for pair in pairs
        if pair.outcome in ("a", "b") and (difference := _lead(pair.held_out))
    ]
    endpoint, reward = settings.endpoint, settings.reward
    told = opinions.values()
    costs = [settings.cost(opinion) for opinion in told]
    paid = [cost for cost in costs if cost is not None]
    return JudgementRecord(
        a=a.record,
        b=b.record,
        judge=endpoint.model if endpoint else reward.name if reward else "",
        kind="endpoint" if endpoint else "reward",
        num_prompts=len(pairs) // max(1, settings.num_samples),
        num_samples=settings.num_samples,
        num_pairs=len(pairs),
        num_identical=sum(pair.a == pair.b for pair in pairs),
        num_unreadable=lacking.get("unreadable", 0),
        num_failed=lacking.get("failed", 0),
        num_unasked=lacking.get("unasked", 0),
        overall=rates(pairs),
        clusters={cluster: rates(members) for cluster, members in by_cluster.items()},
        about={cluster: about[cluster] for cluster in by_cluster},
        consistent=share_by_person([(pair.user, len({*pair.votes}) == 1) for pair in both]),
        flipped=sum({*pair.votes} == {"a", "b"} for pair in both),
        first=share_by_person(named_first),
        agreement=share_by_person(agreeing),
        num_compared=len(agreeing),
        usage=UsageRecord(
            requests=len(told),
            prompt_tokens=sum(opinion.prompt_tokens or 0 for opinion in told),
            completion_tokens=sum(opinion.completion_tokens or 0 for opinion in told),
            cost=sum(paid) if paid else None,
            priced_now=len(paid) - sum(opinion.cost is not None for opinion in told),
            unpriced=len(told) - len(paid),
        ),
        notes=list(notes),
    )


def _lead(rewards: Sequence[float | None]) -> float:
    """By how much the first reward is the higher one; 0 where they are equal or one is missing."""
    if not rewards or rewards[0] is None or rewards[1] is None:
        return 0.0
    return rewards[0] - rewards[1]
