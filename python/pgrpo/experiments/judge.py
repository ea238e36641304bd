"""Two policies side by side: their completions of the same held-out prompts, judged pair by pair.

A judge sees each pair in both orders; one run's answer wins where both votes name it, and everything
else is a tie. What is generated, asked and scored is kept line by line (`pgrpo.runs.judgement`), so
that a judgement that was killed goes on, and nothing is paid for twice. Two arms, folders of runs with
several seeds, are judged run by run, each against that of the same seed.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
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
from pgrpo.report.pairs import rates_over_seeds, share_by_person
from pgrpo.rewards.pairwise import PairJudge, Question, digest
from pgrpo.rollout.prompts import PromptBuilder
from pgrpo.rollout.seeds import derive_seed
from pgrpo.runs.config import Config
from pgrpo.runs.disk import disk_errors, locked, replace_file
from pgrpo.runs.folder import RunFolder
from pgrpo.runs.judgement import (
    CompletionRecord,
    ContestantRecord,
    JudgementRecord,
    MatchRecord,
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


@dataclass(frozen=True)
class _Match:
    """Two policies, and where their own judgement goes within that of all."""

    a: _Contestant
    b: _Contestant
    folder: str = ""


@dataclass(frozen=True)
class _Answers:
    """What two policies said, not yet judged."""

    pairs: list[PairRecord]
    """With what rewards say of them."""
    examples: list[Example]
    """Of each pair."""
    about: dict[str, str]
    """Cluster -> how its people differ from all."""
    notes: list[str]
    """What is to be told."""


def judge(
    run_a: Path,
    run_b: Path | None,
    settings: JudgeConfig,
    out: Path,
    *,
    best: bool = False,
    note: Callable[[str], None] = lambda _: None,
) -> tuple[JudgementRecord, Verdict]:
    """Judge two policies, or two arms, and write `judge.json`, `pairs.jsonl` and `judge.html` into a
    folder; of arms those of each pair of runs too, into `seed-K`.

    Args:
        run_a: folder of the first run, or of the first arm's runs. Runs of two arms are paired by their
            seeds; those of an arm that is judged against itself, as a control, each with the next one.
        run_b: of the second; None for the models that the first runs began with.
        settings: who judges what.
        out: the folder; what it holds already is taken from there.
        best: take the checkpoints of the best held-out reward in the place of the last ones.
        note: is told how far it is.

    Raises:
        RunFolderError: a folder holds no run, or `out` is in use or damaged.
        CheckpointError: a run has no such checkpoint.
        ConfigError: the runs have different data, seeds that cannot be paired, or the settings do not
            fit them.
        PluginError: the judge is not there, cannot be read, or failed.
    """
    matches, arms, notes = _matches(run_a, run_b, settings, best)
    # What is wrong with a judge is told before anything is generated.
    pair_judge = None
    if settings.endpoint is not None:
        pair_judge = PairJudge(settings.endpoint, settings.rubric)
    if settings.reward is not None:
        load_registry().check("reward", settings.reward)
    criteria = settings.rubric.criteria if pair_judge else {}
    with locked(out):
        found = [_answered(m.a, m.b, settings, pair_judge, out, note) for m in matches]
        for match, each in zip(matches, found, strict=True):
            runs = f"{matches[0].a.record.run} and {match.a.record.run}"
            _check_prompts(found[0].examples, each.examples, runs)
        pairs = [pair for each in found for pair in each.pairs]
        opinions = Store(out / "opinions.jsonl", OpinionRecord)
        if pair_judge is None:
            pairs = [_compared(pair) for pair in pairs]
            lacks = ["unreadable" if pair.outcome is None else "" for pair in pairs]
        else:
            questions = [
                _questions(pair_judge, example, each.about.get(pair.cluster, ""), pair)
                for each in found
                for example, pair in zip(each.examples, each.pairs, strict=True)
            ]
            # Of all seeds at once, so that a budget leaves each of them its part.
            failed, said = ask_all(pair_judge, questions, settings, opinions, note)
            notes += said
            pairs = [
                _voted(pair, asked, opinions) for pair, asked in zip(pairs, questions, strict=True)
            ]
            lacks = [_lack(asked, opinions, failed) for asked in questions]
        size = len(pairs) // len(matches)
        parts = [slice(start, start + size) for start in range(0, len(pairs), size)]
        own = [
            _judgement(
                (match.a.record, match.b.record),
                settings,
                [pairs[part]],
                each.about,
                opinions,
                lacks[part],
                each.notes if arms else [*each.notes, *notes],
            )
            for match, each, part in zip(matches, found, parts, strict=True)
        ]
        record = own[0]
        if arms is not None:
            for match, alone, part in zip(matches, own, parts, strict=True):
                _publish(alone, pairs[part], criteria, out / match.folder)
            about = found[0].about
            if any(
                [p.cluster for p in pairs[part]] != [p.cluster for p in pairs[:size]]
                for part in parts
            ):
                about = {}
                notes.append(
                    "The runs put people into different clusters, so that all numbers are of "
                    "everybody; each pair of runs has its own by cluster."
                )
            notes += dict.fromkeys(told for each in found for told in each.notes)
            by_seed = [pairs[part] for part in parts]
            record = _judgement(arms, settings, by_seed, about, opinions, lacks, notes)
            of_runs = [
                MatchRecord(folder=match.folder, a=alone.a, b=alone.b, overall=alone.overall)
                for match, alone in zip(matches, own, strict=True)
            ]
            record = record.model_copy(update={"matches": of_runs})
        _publish(record, pairs, criteria, out)
    return record, verdict(record)


def _publish(
    record: JudgementRecord,
    pairs: Sequence[PairRecord],
    criteria: Mapping[str, str],
    folder: Path,
) -> None:
    """Write what came of a judgement."""
    with disk_errors(f"{folder} cannot be written"):
        folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(f"{pair.model_dump_json()}\n" for pair in pairs)
    replace_file(folder / "pairs.jsonl", lines.encode())
    replace_file(folder / "judge.json", f"{record.model_dump_json(indent=2)}\n".encode())
    replace_file(folder / "judge.html", render(record, pairs, criteria).encode())


def _answered(
    a: _Contestant,
    b: _Contestant,
    settings: JudgeConfig,
    pair_judge: PairJudge | None,
    out: Path,
    note: Callable[[str], None],
) -> _Answers:
    """All pairs of two policies; what the folder has is not generated or scored again."""
    completions = Store(out / "completions.jsonl", CompletionRecord)
    rewards = Store(out / "rewards.jsonl", ScoreRecord)
    with Assembly(a.config, a.checkpoint, note) as parts:
        asked = held_out(parts.dataset, settings.num_prompts)
        if pair_judge is not None:
            # What the rubric lacks is told before anything is generated.
            for example in asked:
                pair_judge.question(example)
        with Assembly(b.config, b.checkpoint, note) as others:
            asked_b = held_out(others.dataset, settings.num_prompts)
            _check_prompts(asked, asked_b, f"{a.record.run} and {b.record.run}")
            # The first run says whose clusters count: the other one's people are not divided, unless
            # its prompts name the clusters that it was trained with.
            own = b.checkpoint is not None and b.config.model.names_cluster
            members = others.members if own else parts.members
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
    return _Answers(_pairs(said_a, said_b, scored), examples, about, notes)


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


def _matches(
    run_a: Path, run_b: Path | None, settings: JudgeConfig, best: bool
) -> tuple[list[_Match], tuple[ContestantRecord, ContestantRecord] | None, list[str]]:
    """The policies that are judged against each other, of which data, checkpoints and names were looked
    at; the arms that they are of, where folders hold several runs; and what is to be told."""
    runs_a, runs_b = _runs(run_a), None if run_b is None else _runs(run_b)
    if runs_a is None and runs_b is None:
        return [_Match(*_contestants(run_a, run_b, settings, best))], None, []
    if runs_a is None or (runs_b is None and run_b is not None):
        single = run_a if runs_a is None or run_b is None else run_b
        RunFolder(single).config()
        raise ConfigError(
            f"{single} is a run, and the other folder holds several; expected two runs, or two folders "
            "of runs"
        )
    is_control = run_b is not None and run_a.resolve() == run_b.resolve()
    seeds, notes = list(runs_a), list[str]()
    if is_control:
        both = list(zip(seeds[::2], seeds[1::2], strict=False))
        pairs = [(f"seed-{one}-{other}", runs_a[one], runs_a[other]) for one, other in both]
        left_out = seeds[2 * len(both) :]
        notes.append(
            "This is a control: of one arm, the run of one seed against that of the next. What differs "
            "is owed to seeds."
        )
    else:
        others = dict.fromkeys(seeds) if runs_b is None else runs_b
        shared = [seed for seed in seeds if seed in others]
        pairs = [(f"seed-{seed}", runs_a[seed], others[seed]) for seed in shared]
        left_out = sorted({*seeds} ^ {*others})
    if left_out:
        notes.append(f"Seeds that have nothing to be judged against: {_listed(left_out)}.")
    if len(pairs) < 2:
        raise ConfigError(
            f"the runs in {run_a} and {run_b or 'base'} make {len(pairs)} pairs by their seeds; "
            "expected two or more, for fewer tell nothing of seeds (an arm against itself wants four "
            "runs; two runs are judged by their own folders)"
        )
    matches = [_Match(*_contestants(a, b, settings, best), name) for name, a, b in pairs]
    for match in matches:
        _check_same_data(matches[0].a, match.a)
    name = run_a.resolve().name
    if is_control:
        names = [f"one seed of {name}", "another"]
    else:
        names = [name, run_b.resolve().name if run_b else matches[0].b.record.name]
    if names[0] == names[1]:
        names = [str(run_a), str(run_b)]
    for name, of_arm in zip(names, zip(*((m.a, m.b) for m in matches), strict=True), strict=True):
        steps = {contestant.record.step or 0 for contestant in of_arm}
        if len(steps) > 1 and not best:
            notes.append(f"The runs of {name} end at different steps: {_listed(sorted(steps))}.")
    records = [
        ContestantRecord(
            name=name, run=str(folder or run_a), step=None, best=best and folder is not None
        )
        for name, folder in zip(names, (run_a, run_b), strict=True)
    ]
    return matches, (records[0], records[1]), notes


def _runs(folder: Path) -> dict[int, Path] | None:
    """Seed -> the run in a folder of runs, by seed; None where the folder holds no runs, as that of a
    run does not."""
    found: dict[int, Path] = {}
    if RunFolder(folder).holds_run or not folder.is_dir():
        return None
    for path in sorted(folder.iterdir()):
        if RunFolder(path).holds_run:
            seed = RunFolder(path).config().run.seed
            if seed in found:
                raise ConfigError(
                    f"{found[seed]} and {path} are both of seed {seed}; expected a folder with one run "
                    "of each seed"
                )
            found[seed] = path
    return dict(sorted(found.items())) or None


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


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
    _check_same_data(a, b)
    return a, b


def _check_same_data(a: _Contestant, b: _Contestant) -> None:
    old, new = (dict(flat(resolved_tree(c.config.data))) for c in (a, b))
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            raise ConfigError(
                f"{a.record.run} has data.{key} = {old.get(key, 'none')} and {b.record.run} has "
                f"{new.get(key, 'none')}; expected runs of the same data set"
            )


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


def _check_prompts(a: Sequence[Example], b: Sequence[Example], runs: str) -> None:
    """Refuse runs that would be asked different things, as where one left out long prompts."""
    asked = [[(example.user, example.text) for example in examples] for examples in (a, b)]
    if asked[0] == asked[1]:
        return
    place = next(
        (i for i, (x, y) in enumerate(zip(*asked, strict=False)) if x != y), min(map(len, asked))
    )
    raise ConfigError(
        f"{runs} hold out different prompts: of {len(a)} and {len(b)}, number {place + 1} differs, "
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
    contestants: tuple[ContestantRecord, ContestantRecord],
    settings: JudgeConfig,
    matches: Sequence[Sequence[PairRecord]],
    about: Mapping[str, str],
    opinions: Store[OpinionRecord],
    lacks: Sequence[str],
    notes: Sequence[str],
) -> JudgementRecord:
    """All numbers of a judgement, of one pair of runs or of several with the same prompts.

    Args:
        contestants: the two policies, or the arms.
        settings: who judged what.
        matches: of each pair of runs its pairs of answers.
        about: the clusters that are told apart.
        opinions: all of the folder.
        lacks: of each pair of answers why it has no outcome, or nothing.
        notes: what else is to be told.
    """
    pairs = [pair for match in matches for pair in match]
    by_cluster = {
        cluster: [[pair for pair in match if pair.cluster == cluster] for match in matches]
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
    endpoint, reward, lacking = settings.endpoint, settings.reward, Counter(lacks)
    told = opinions.values()
    costs = [settings.cost(opinion) for opinion in told]
    paid = [cost for cost in costs if cost is not None]
    return JudgementRecord(
        a=contestants[0],
        b=contestants[1],
        judge=endpoint.model if endpoint else reward.name if reward else "",
        kind="endpoint" if endpoint else "reward",
        num_prompts=len(matches[0]) // max(1, settings.num_samples),
        num_samples=settings.num_samples,
        num_pairs=len(pairs),
        num_identical=sum(pair.a == pair.b for pair in pairs),
        num_unreadable=lacking["unreadable"],
        num_failed=lacking["failed"],
        num_unasked=lacking["unasked"],
        overall=rates_over_seeds(matches),
        clusters={cluster: rates_over_seeds(members) for cluster, members in by_cluster.items()},
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
