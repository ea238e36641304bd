"""What may be said about the runs, in words: never more than the numbers show."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pgrpo.report.statistics import Difference, Estimate, mean_change
from pgrpo.report.study import Arm, Study

NO_RANKING = "One seed supports no ranking"
WITHIN_NOISE = "difference within noise"


@dataclass(frozen=True)
class Verdict:
    """The outcome in one line, and the numbers behind it."""

    headline: str
    sentences: tuple[str, ...]
    lead: str = ""
    """What it means for the people, before all; empty where that cannot be told."""


def verdict(study: Study) -> Verdict:
    """Which arm ended higher, or how far a single arm came."""
    said = _single(study, study.arms[0]) if len(study.arms) == 1 else _several(study)
    unfinished = sum(run.info.status != "finished" for run in study.runs)
    notes: list[str] = []
    if unfinished:
        notes.append(f"{unfinished} of {plural(len(study.runs), 'run')} had not finished.")
    if len({run.last_step for run in study.runs}) > 1:
        notes.append(f"Runs differ in length; all are compared up to step {study.last_step}.")
    warned = sum(len(run.info.warnings) for run in study.runs)
    if warned:
        notes.append(f"{plural(warned, 'warning')}: see “Warnings” in the report.")
    more = [sentence for sentence in (_gains(study), _ability(study)) if sentence]
    return Verdict(said.headline, (*said.sentences, *more, *notes), _lead_sentence(study))


def _lead_sentence(study: Study) -> str:
    """How often people get what they would have chosen, by whom, and who is served worse than by
    guessing; for rewards that are shares of right answers."""
    if study.evaluated is None or "chance" not in study.baselines:
        return ""
    arms = {arm.name: study.held_out(arm, study.evaluated[1]).mean for arm in study.arms}
    best = sorted(arms.items(), key=lambda item: -item[1])
    if not all(0 <= reward <= 1 for reward in (*arms.values(), *study.baselines.values())):
        return ""
    rules = {name: study.baselines[name] for name in LEAD_RULES if name in study.baselines}
    said = [f"{name} gets {percent(reward)}" for name, reward in best[:3]]
    others = [
        f"{words} {percent(rules[name])}" for name, words in LEAD_RULES.items() if name in rules
    ]
    sentence = (
        f"Of the choices that people made and that were held out, {enumerate_words(said)} right; "
        f"{enumerate_words(others)}."
    )
    return " ".join([sentence, *_below_chance(study, [name for name, _ in best[:3]])])


LEAD_RULES = {
    "chance": "guessing",
    "one rule for all": "one rule for everybody",
    "one rule per person": "a rule for each person",
}
"""Baselines of the first sentence, in words."""


def _below_chance(study: Study, arms: Sequence[str]) -> list[str]:
    """A sentence on the people in clusters that are served worse than by guessing, by more than a
    standard error; none where clusters are not told apart."""
    if not study.cluster_evaluations:
        return []
    levels = {name: study.baselines_of(name) for name in study.clusters}
    known = [name for name in study.clusters if "chance" in levels[name]]
    if len(known) < 2:
        return []

    def share(worse: Callable[[str], bool]) -> float:
        return sum(study.clusters[name].share for name in known if worse(name))

    def served(arm: Arm) -> Callable[[str], bool]:
        def worse(name: str) -> bool:
            reward = study.achieved(arm, name)
            return reward.mean + np.nan_to_num(reward.se) < levels[name]["chance"]

        return worse

    rule = share(lambda name: levels[name].get("one rule for all", 1.0) < levels[name]["chance"])
    shares = {arm.name: share(served(arm)) for arm in study.arms if arm.name in arms}
    if not rule and not any(shares.values()):
        return ["No cluster is served worse than by guessing."]
    words = [f"{percent(part) if part else 'nobody'} by {name}" for name, part in shares.items()]
    words += [f"{percent(rule)} by one rule for everybody"] if rule else []
    return [f"Served worse than by guessing: {enumerate_words(words)}."]


def _gains(study: Study) -> str:
    """Which of the two, having a history or whose it is, a gain comes from."""
    parts = {gain.what: gain.paired.difference for gain in study.gains}
    found = {
        what: difference
        for what in ("having a history", "whose history it is")
        if (difference := parts.get(what)) is not None
    }
    if len(found) < 2:
        return ""
    words = [
        f"{what} gives {number(difference.mean, sign=True)}"
        + ("" if difference.clear else f" ({WITHIN_NOISE})")
        for what, difference in found.items()
    ]
    return f"Seed by seed, {enumerate_words(words)}."


def _ability(study: Study) -> str:
    """What became of general ability: of one run each part, of several how many lost some."""
    found = [run.ability for run in study.runs if run.ability]
    if not found:
        return ""
    if len(study.runs) == 1:
        return f"General ability, before and after: {', '.join(map(str, found[0]))}."
    lost = [change.name for parts in found for change in parts if change.verdict == "lost"]
    if not lost:
        return f"No loss of general ability is shown in {plural(len(found), 'run')}."
    num_lost = sum(any(change.verdict == "lost" for change in parts) for parts in found)
    words = [f"{name} in {lost.count(name)}" for name in dict.fromkeys(lost)]
    return (
        f"General ability was lost in {num_lost} of {plural(len(found), 'run')}: "
        f"{enumerate_words(words)}."
    )


def _single(study: Study, arm: Arm) -> Verdict:
    if study.evaluated and study.evaluated[0] < study.evaluated[1]:
        first, last = study.evaluated
        before, after = study.held_out(arm, first), study.held_out(arm, last)
        x, y = ([run.evaluations.at(step, "reward") for run in arm.runs] for step in (first, last))
        where = f"On held-out prompts, from step {first} to step {last}"
    elif study.last_step - min(run.steps.steps[0] for run in arm.runs) < 1:
        reward = value(study.last(arm, "reward"))
        return Verdict("One step says nothing about learning.", (f"Its mean reward is {reward}.",))
    else:
        before, after = (f(arm, "reward") for f in (study.first, study.last))
        seeds = [Arm(arm.name, (run,)) for run in arm.runs]
        x = [study.first(seed, "reward").mean for seed in seeds]
        y = [study.last(seed, "reward").mean for seed in seeds]
        steps = plural(study.window, "step")
        where = f"In training, from the first to the last {steps} up to step {study.last_step}"
    if not (math.isfinite(before.mean) and math.isfinite(after.mean)):
        return Verdict("No reward was recorded at both ends.", ())
    change = after.mean - before.mean
    numbers = f"{where}, reward went from {value(before)} to {value(after)}"
    difference = mean_change(x, y)
    if difference is None:
        return Verdict(
            f"{arm.name}: reward {number(before.mean)} → {number(after.mean)}, one seed.",
            (f"{numbers}, a change of {number(change, sign=True)}.", f"{NO_RANKING}."),
        )
    if difference.clear:
        headline = f"{arm.name}: reward {'rose' if change > 0 else 'fell'}."
    else:
        headline = f"{arm.name}: no change of reward beyond noise."
    return Verdict(
        headline,
        (
            f"{numbers} (mean ± standard error, {plural(len(arm.runs), 'seed')}).",
            f"The change is {_interval(difference)}.",
        ),
    )


def _several(study: Study) -> Verdict:
    achieved = {arm.name: study.achieved(arm) for arm in study.arms}
    by_reward = sorted(
        (arm for arm in study.arms if math.isfinite(achieved[arm.name].mean)),
        key=lambda arm: -achieved[arm.name].mean,
    )
    measured = [
        f"{arm.name} reached {value(achieved[arm.name])} ({plural(len(arm.runs), 'seed')})"
        for arm in by_reward
    ]
    if study.evaluated:
        where = f"On held-out prompts at step {study.evaluated[1]}"
    else:
        steps = plural(study.window, "step")
        where = f"In training reward over the last {steps} up to step {study.last_step}"
    numbers = (
        f"{where}, {enumerate_words(measured)} (mean ± standard error)."
        if measured
        else "No reward was recorded."
    )
    if not study.same_rewards:
        return Verdict(
            "The arms had different data or rewards, so their rewards do not compare.", (numbers,)
        )
    ranked = study.ranked
    if len(ranked) < 2:
        return Verdict(f"{NO_RANKING}.", (numbers,))
    sentences = [numbers, _lead(study, ranked, None)]
    unranked = [arm.name for arm in study.arms if arm not in ranked]
    if unranked:
        sentences.append(f"{NO_RANKING}: {enumerate_words(unranked)}.")
    if study.minority is not None and study.same_clusters:
        sentences.append(_minority(study, ranked, study.minority))
    return Verdict(_headline(study, ranked), tuple(sentences))


def _headline(study: Study, ranked: Sequence[Arm]) -> str:
    best = ranked[0].name
    beaten, tied = _beaten(study, ranked, None)
    if not beaten:
        return f"{_names([arm.name for arm in ranked])}: {WITHIN_NOISE}."
    if tied:
        return f"{best} ended higher than {_names(beaten)}; to {_names(tied)} {WITHIN_NOISE}."
    return f"{best} ended higher than {_names(beaten)}."


def _beaten(
    study: Study, ranked: Sequence[Arm], cluster: str | None
) -> tuple[list[str], list[str]]:
    """Names of the arms that the best one clearly leads, and of the others."""
    best, *others = ranked
    clear = {arm.name: study.difference(best, arm, cluster) for arm in others}
    beaten = [name for name, lead in clear.items() if lead and lead.clear and lead.mean > 0]
    return beaten, [name for name in clear if name not in beaten]


def _lead(study: Study, ranked: Sequence[Arm], cluster: str | None) -> str:
    """The best arm's lead: with its interval over one other arm, in words over several."""
    best, *others = ranked
    if len(others) > 1:
        beaten, _ = _beaten(study, ranked, cluster)
        if not beaten:
            return f"No lead of {best.name} is beyond noise."
        return f"The lead of {best.name} is beyond noise over {enumerate_words(beaten)}."
    difference = study.difference(best, others[0], cluster)
    if difference is None:
        return "Too few seeds have a value for an interval."
    noise = "" if difference.clear else f": {WITHIN_NOISE}"
    return f"{best.name} minus {others[0].name} is {_interval(difference)}{noise}."


def _minority(study: Study, ranked: Sequence[Arm], cluster: str) -> str:
    values = [f"{arm.name} {value(study.achieved(arm, cluster))}" for arm in ranked]
    size = f"share {percent(study.clusters[cluster].share)}"
    if study.evaluated and study.cluster_evaluations:
        table = ranked[0].runs[0].evaluations
        prompts = table.at(study.evaluated[1], f"clusters/{cluster}/num_prompts")
        size += f", {plural(int(np.nan_to_num(prompts)), 'held-out prompt')}"
    lead = _lead(study, ranked, cluster)
    return f"In the smallest cluster, “{isolated(cluster)}” ({size}): {enumerate_words(values)}. {lead}"


def _interval(difference: Difference) -> str:
    return f"{number(difference.mean, sign=True)} (95 % interval {interval(difference)})"


def _names(names: Sequence[str]) -> str:
    """The names, or their number where they would not fit a headline."""
    return enumerate_words(names) if len(names) <= 3 else f"{len(names)} arms"


def interval(difference: Difference) -> str:
    """`low to high`, signed."""
    return f"{number(difference.low, sign=True)} to {number(difference.high, sign=True)}"


def number(x: float, sign: bool = False) -> str:
    """Three decimals, fewer for large numbers, scientific for tiny ones; a dash for NaN."""
    if not math.isfinite(x):
        return "–"
    if abs(x) < 1e-12:
        # What is left where two equal numbers were subtracted.
        x = 0.0
    if x != 0 and (abs(x) < 1e-3 or abs(x) >= 1e6):
        text = f"{abs(x):.1e}"
    else:
        text = f"{abs(x):,.{3 if abs(x) < 10 else 1 if abs(x) < 1000 else 0}f}"
    minus = "−" if x < 0 and text.strip("0.") else ""
    return (minus or ("+" if sign and x > 0 else "")) + text


def value(estimate: Estimate) -> str:
    """A mean, with its standard error where it is known."""
    if not math.isfinite(estimate.se):
        return number(estimate.mean)
    return f"{number(estimate.mean)} ± {number(estimate.se)}"


def percent(share: float) -> str:
    """A share as a percentage, with a decimal below ten."""
    return "–" if not math.isfinite(share) else f"{100 * share:.{0 if share >= 0.0995 else 1}f} %"


def isolated(name: str) -> str:
    """A name that may run from right to left, kept from turning the text around it."""
    return f"\u2068{name}\u2069"


def plural(n: int, noun: str) -> str:
    """`1 seed`, `3 seeds`."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def enumerate_words(words: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
