"""Two policies judged pair by pair: by an endpoint that fails over real sockets, and by rewards."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from chat_server import Answer, Server, say
from conftest import (
    PEAK,
    WITH_PEAK,
    Tree,
    changed,
    contents,
    install_plugin,
    start,
    tiny_run,
    train,
    write_config,
)
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from test_report import parse

from pgrpo.cli import main
from pgrpo.config.sections import RewardConfig
from pgrpo.data.personas import (
    PersonasConfig,
    load_personas,
    persona_reward,
    persona_utility,
)
from pgrpo.errors import ConfigError
from pgrpo.experiments.judge import _check_prompts, _programmatic
from pgrpo.experiments.opinions import JudgeConfig
from pgrpo.report.judgement import render
from pgrpo.report.pairs import rates, rates_over_seeds, share_of, wilson
from pgrpo.rewards.pairwise import PairEndpoint, PairJudge, Rubric
from pgrpo.rewards.verdict import read_preference, read_verdict
from pgrpo.runs.config import parse_config
from pgrpo.runs.folder import RunFolder
from pgrpo.runs.judgement import JudgementRecord, OpinionRecord, PairRecord, ShareRecord, Store
from pgrpo.types import Example

Serve = Callable[..., Server]
Capture = pytest.CaptureFixture[str]

# --- what a reply says -----------------------------------------------------------------------

REPLIES: list[tuple[str, str | None]] = [
    ("A", "A"),
    ("Answer B.", "B"),
    ("**B**", "B"),
    ("tie", "tie"),
    ("It's a tie", "tie"),
    ('{"winner": "A"}', "A"),
    ('{"winner": "b"}', "B"),
    ('{"winner": "Answer A"}', "A"),
    ('{"reason": "B is longer, and A is better", "winner": "tie"}', "tie"),
    ('Here:\n```json\n{"verdict": {"winner": "B"}}\n```', "B"),
    ('{"reason": "it is', None),
    ('{"winner": "A", "reason": "it is', "A"),
    ('{"reason": "x", "winner": "B"', "B"),
    ('{"winner": "A or B"}', None),
    ('{"winner": 1}', None),
    ('[{"winner": "A"}, {"winner": "B"}]', None),
    ("Winner: **B**", "B"),
    ("The winner is Answer A.", "A"),
    ("The better answer is B", "B"),
    ("Winner: a tie", "tie"),
    ("Winner: A or B", None),
    ("Winner: A\nWinner: B", None),
    ("Verdict: A\nFinal verdict: B", "B"),
    ("Answer A: fine. Answer B: poor. Winner: A", "A"),
    ("Reasoning about A and B ... [[A]]", "A"),
    ("[[C]]", None),
    ("<winner>tie</winner>", "tie"),
    ("$\\boxed{B}$", "B"),
    ("<think>Winner: A</think>\nB", "B"),
    ("<think>Winner: A", None),
    ("Answer A is slightly better", "A"),
    ("Answer A is better than Answer B.", "A"),
    ("Answer A is not better", None),
    ("Answer A is better in style, Answer B is better in fit", None),
    ("I prefer Response B", "B"),
    ("Answer B wins", "B"),
    ("A good answer", None),
    ("The winner is a clear one", None),
    ('{"winner": "answer_a"}', "A"),
    ('{"winner": "Answer b"}', "B"),
    ('{"winner": "Response_B"}', "B"),
    ('{"winner": "A (slightly)"}', "A"),
    ('{"winner": ["A"]}', "A"),
    ('{"winner": ["A", "B"]}', None),
    ("<winner>answer_b</winner>", "B"),
    ("Winner: answer_a.", "A"),
    ("Answer: B", "B"),
    ("Final answer: B", "B"),
    ("Overall: **B**", "B"),
    # Several verdicts.
    ('{"winner": "A"}\n{"winner": "B"}', None),
    ('{"winner": "A"}\n{"winner": "answer_a"}', "A"),
    ('{"winner": "A", "winner": "B"}', None),
    ('{"winner": "A"}\nOn second thoughts: {"winner": "neither of them"}', None),
    ('{"winner": "A"}\nWinner: B is better', None),
    ('{"winner": "A", "preference": "unsure"}', None),
    ('{"better_quality": "A", "better_fit": "B", "winner": "B"}', "B"),
    ('{"quality_winner": "A", "fit": "B"}', None),
    ('{"better_quality": "A", "fit": "B"}', None),
    ('{"not_preferred": "A"}', None),
    ('{"quality": {"winner": "A"}, "overall": "B"}', "B"),
    ('{"quality": {"winner": "A"}, "fit": {"winner": "B"}}', None),
    ("Quality winner: A\nOverall: B", "B"),
    ('{"reason": one sentence, "winner": "A", "B" or "tie"}', None),
    ('{"reason": "one, "winner": "A", "B" or "tie"}\n{"winner": "B"}', None),
    # What takes back what it seems to say.
    ("A is worse", None),
    ("A is not better", None),
    ("A is better", "A"),
    ("Answer A is worse", None),
    ("Answer A is hardly better", None),
    ("Answer A is worse but better written", None),
    ("Answer A seems better at first, but B is better", None),
    ("Answer A is better. B is better for this person, though.", None),
    ("I do not prefer Answer A", None),
    ("Some prefer Answer A", None),
    ("Winner: A is worse", None),
    ("Verdict: A is not better", None),
    ("The winner is not A", None),
    ("Winner: not A", None),
    ("Not preferred: A", None),
    ("The second best answer is A", None),
    ("Answer A is better: B rambles", None),
    ("Verdict: A for style, B for fit", None),
    ("Verdict: both are fine, A is better", None),
    ("Verdict: tie, but A is slightly better", None),
    ("Winner: A, but only just", None),
    ("Winner: A?", None),
    ("A?", None),
    ("A+", None),
    ("Winner: A < B", None),
    ("[[A<B]]", None),
    ('{"winner": "A is worse"}', None),
    ('{"winner": "A is better"}', "A"),
    ('{"winner": "Neither"}', "tie"),
    # What gives a reason takes nothing back.
    ("Winner: A, since it is shorter", "A"),
    ("Winner: A - it is shorter", "A"),
    ("Verdict: B because it holds together", "B"),
    ("Verdict: Answer B is clearly the better one.", "B"),
    ("[[B]] It fits.", "B"),
    ("Verdict: a tie between A and B", "tie"),
    ("Winner: A\n\nB is good, too", "A"),
    ("7", None),
    ("great", None),
    ("", None),
]


@pytest.mark.parametrize(("reply", "side"), REPLIES)
def test_a_reply_names_one_side_or_is_unreadable(reply: str, side: str | None) -> None:
    assert read_preference(reply) == side


def test_what_a_cut_reply_says_in_words_may_have_gone_on() -> None:
    for reply in ("Answer A is better", "A", "Winner: A", '{"winner": "A'):
        assert read_preference(reply, cut=True) is None
    assert read_preference('{"winner": "A", "reason": "it', cut=True) == "A"
    assert read_preference("Winner: A\n\nIt is", cut=True) == "A"


def test_what_is_nested_too_deep_is_unreadable() -> None:
    # Some of these can just be parsed, and not be walked through any more.
    for depth in (*range(850, 1000), 3000, 100_000):
        for reply in ('{"winner": ' + "[" * depth, f'{{"x": {"[" * depth}{"]" * depth}}}'):
            assert read_preference(reply) is None
            assert read_verdict(reply, 0, 10) is None


@given(st.text("AB tie{}[]:\"'winerasw\n", max_size=60))
def test_any_reply_can_be_read(reply: str) -> None:
    assert read_preference(reply) in {"A", "B", "tie", None}


@pytest.mark.parametrize("part", ["A ", "winner ", "Answer A is ", "{", "[[", "final ", " ", "**"])
def test_a_reply_that_goes_on_and_on_is_read_at_once(part: str) -> None:
    begin = time.monotonic()
    read_preference(part * 9000)
    assert time.monotonic() - begin < 1.0  # squares of its length take minutes


# --- statistics ------------------------------------------------------------------------------


@given(st.integers(1, 500), st.data())
def test_wilson_intervals_are_those_of_scipy(trials: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, trials))
    found = wilson(successes, trials)
    expected = stats.binomtest(successes, trials).proportion_ci(method="wilsoncc")
    assert (found.share, found.low, found.high) == pytest.approx(
        (successes / trials, expected.low, expected.high), abs=1e-12
    )


def pair(outcome: str | None, user: str) -> PairRecord:
    return PairRecord.model_validate(
        {"prompt": "p", "user": user, "cluster": "0", "a": "x", "b": "y", "outcome": outcome}
    )


def test_where_everybody_has_one_pair_intervals_are_wilsons() -> None:
    outcomes = ["a"] * 12 + ["tie"] * 5 + ["b"] * 3 + [None] * 4
    found = rates([pair(outcome, f"u{i}") for i, outcome in enumerate(outcomes)])
    assert (found.num_pairs, found.num_people, found.wins, found.ties, found.losses) == (
        20,
        20,
        12,
        5,
        3,
    )
    assert (found.win, found.tie, found.loss) == (wilson(12, 20), wilson(5, 20), wilson(3, 20))
    assert found.decided == wilson(12, 15)
    assert found.winner == "a"  # .548 to .943
    nobody = rates([])
    assert nobody.win.share is None and nobody.winner == "level"


@pytest.mark.parametrize(("wins", "winner"), [(5, "level"), (6, "a")])
def test_who_wins_all_has_won_where_a_coin_would_not(wins: int, winner: str) -> None:
    """As the exact test has it: of five a coin takes all in one of sixteen, of six in one of 32."""
    assert (stats.binomtest(wins, wins).pvalue < 0.05) == (winner == "a")
    pairs = [pair("a", f"u{i}") for i in range(wins)]
    assert rates(pairs).winner == winner
    assert rates([pair("b", p.user) for p in pairs]).winner == winner.replace("a", "b")


def drawn(counts: np.ndarray) -> list[PairRecord]:
    """Pairs of people with so many wins, ties and losses [people, 3]."""
    return [
        pair(outcome, f"u{user}")
        for user, row in enumerate(counts)
        for outcome, number in zip(("a", "tie", "b"), row, strict=True)
        for _ in range(int(number))
    ]


def test_where_people_have_several_pairs_these_are_worth_fewer() -> None:
    rng = np.random.default_rng(3)
    tastes = rng.dirichlet([1, 0.5, 0.7], size=40)
    counts = np.array([rng.multinomial(6, taste) for taste in tastes])
    found = rates(drawn(counts))
    assert (found.num_people, found.num_pairs) == (40, 240)
    wins, ties, losses = counts.T.astype(float)
    z, t = stats.norm.ppf(0.975), stats.t.ppf(0.975, 39)
    for record, part in ((found.win, wins), (found.tie, ties), (found.loss, losses)):
        p = part.sum() / 240
        assert record.share == pytest.approx(p)
        # The jackknife over people, which for equal sizes is the same variance.
        left_out = np.array([(part.sum() - one) / 234 for one in part])
        variance = 39 / 40 * ((left_out - left_out.mean()) ** 2).sum()
        n = p * (1 - p) / variance * (z / t) ** 2
        assert 40 < n < 200 and record.trials == pytest.approx(n)
        # What the ends of such an interval are, by its definition.
        for end in (record.low, record.high):
            assert end is not None
            reach = z * np.sqrt(end * (1 - end) / n) + 0.5 / n
            assert abs(end - p) == pytest.approx(reach)
    decided = stats.bootstrap(
        (wins, losses),
        lambda a, b, axis=-1: a.sum(axis) / (a.sum(axis) + b.sum(axis)),
        paired=True,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert (found.decided.low, found.decided.high) == pytest.approx(
        (decided.low, decided.high), abs=0.03
    )


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_an_interval_holds_its_share(counts: list[tuple[int, int]]) -> None:
    wins, losses = np.array(counts, float).T
    found = share_of(wins, wins + losses)
    if found.share is None:
        assert not wins.any() and not losses.any()
        return
    assert found.low is not None and found.high is not None and found.trials is not None
    assert 0 <= found.low <= found.share <= found.high <= 1
    assert 1 <= found.trials <= (wins + losses).sum()
    other = share_of(losses, wins + losses)
    assert (other.low, other.high) == pytest.approx((1 - found.high, 1 - found.low))


@pytest.mark.parametrize(("people", "winner"), [(1, "level"), (5, "level"), (6, "a")])
def test_people_who_all_agree_are_as_many_trials_however_many_their_pairs(
    people: int, winner: str
) -> None:
    found = rates([pair("a", f"u{i % people}") for i in range(200)])
    assert found.winner == winner
    assert found.decided == wilson(people, people)


def excludes_a_half(found: ShareRecord) -> bool:
    assert found.low is not None and found.high is not None
    return not found.low <= 0.5 <= found.high


@pytest.mark.parametrize("people", [3, 6, 12, 30])
@pytest.mark.parametrize("alike", [0.0, 0.3, 1.0])
def test_level_policies_are_seldom_said_to_have_won(people: int, alike: float) -> None:
    """Where people have tastes of their own, a second pair of a person tells little after the first."""
    rng = np.random.default_rng([people, int(10 * alike)])
    won = naive = 0
    for _ in range(200):
        likes = rng.random(people) < 0.5
        own = rng.random((people, 20)) < np.where(likes, 0.5 + alike / 2, 0.5 - alike / 2)[:, None]
        wins = own.sum(1).astype(float)
        won += excludes_a_half(share_of(wins, np.full(people, 20.0)))
        naive += excludes_a_half(wilson(wins.sum(), 20 * people))
    assert won / 200 < 0.096  # 5 % and three standard errors
    assert alike == 0.0 or naive / 200 > 0.096  # what takes pairs for independent


def test_a_lead_beyond_noise_is_said() -> None:
    rng = np.random.default_rng(0)
    wins = rng.binomial(4, 0.7, size=60)
    assert rates(drawn(np.stack([wins, 0 * wins, 4 - wins], 1))).winner == "a"
    assert rates(drawn(np.stack([4 - wins, 0 * wins, wins], 1))).winner == "b"


# --- the question ----------------------------------------------------------------------------

EXAMPLE = Example("play {me} something", "u7", columns={"taste": "jazz", "cluster": "unread"})


def asked(rubric: Tree | None = None, example: Example = EXAMPLE, **endpoint: Any) -> Any:
    section = PairEndpoint.model_validate({"url": "http://127.0.0.1:9/v1", "model": "m"} | endpoint)
    judge = PairJudge(section, Rubric.model_validate(rubric or {}))
    return judge.question(example, "above average in likes War", "{b} one", "two {a}")


def test_a_judge_is_told_of_the_person_the_request_both_answers_and_the_criteria() -> None:
    text = asked().text
    assert "What is known of the person: above average in likes War\n" in text
    assert "<request>\nplay {me} something\n</request>" in text
    assert "<answer_a>\n{b} one\n</answer_a>" in text and "<answer_b>\ntwo {a}\n</answer_b>" in text
    for name, what in Rubric().criteria.items():
        assert f"- {name}: {what}" in text
    assert '{"reason": one sentence, "winner": "A", "B" or "tie"}' in text
    text = asked(
        {"person": "{user} of {cluster} hears {taste}", "criteria": {"x": "y {prompt}"}}
    ).text
    assert "person: u7 of above average in likes War hears jazz\n" in text
    assert "- x: y {prompt}" in text and "coherence" not in text


def test_questions_are_known_by_their_content_and_not_by_where_they_are_asked() -> None:
    key = asked().key
    assert asked(url="http://127.0.0.1:10/v1", retries=0, structured=False).key == key
    others = [
        asked(model="n"),
        asked(parameters={"temperature": 1.0}),
        asked({"criteria": {"x": "y"}}),
        asked({"reason": False}),
        asked(example=Example("play me nothing", "u7")),
        asked({"person": "{taste}"}),
    ]
    section = PairEndpoint(url="http://127.0.0.1:9/v1", model="m")
    judge = PairJudge(section, Rubric())
    about = "above average in likes War"
    others += [
        judge.question(EXAMPLE, about, "two {a}", "{b} one"),
        judge.question(EXAMPLE, about, "{b} one", "two"),
        judge.question(EXAMPLE, "", "{b} one", "two {a}"),
    ]
    assert len({key, *(question.key for question in others)}) == 1 + len(others)


# --- runs ------------------------------------------------------------------------------------

CHANGES: Tree = {"data.num_examples": 96, "run.num_steps": 2, "run.eval_prompts": 24}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return train(folder / "one", CHANGES), train(folder / "other", {**CHANGES, "run.seed": 1})


NUM_PROMPTS = 24


def answers(question: str) -> tuple[str, str]:
    found = re.search(
        r"<answer_a>\n(.*?)\n</answer_a>.*<answer_b>\n(.*?)\n</answer_b>", question, re.DOTALL
    )
    assert found
    return found[1], found[2]


def worth(text: str) -> int:
    """What a text is worth to the judge of these tests: few values, so that some tie."""
    return zlib.crc32(text.encode()) % 5


USAGE = {"prompt_tokens": 300, "completion_tokens": 20}


def fair(question: str, *_: Any) -> Answer:
    a, b = map(worth, answers(question))
    winner = "A" if a > b else "B" if b > a else "tie"
    return say(json.dumps({"reason": f"{a} to {b}", "winner": winner}), usage=USAGE)


def settings(server: Server | None = None, **changes: Any) -> Tree:
    endpoint = {
        "url": server.url if server else "http://127.0.0.1:9/v1",
        "model": "the judge",
        "pause_s": 0.01,
        "max_concurrency": 4,
    }
    tree = {"num_prompts": NUM_PROMPTS, "endpoint": endpoint}
    return changed(tree, {key.replace("__", "."): value for key, value in changes.items()})


def command(runs: tuple[Path, Path | str], out: Path, tree: Tree, *options: str) -> list[str]:
    out.parent.mkdir(parents=True, exist_ok=True)
    path = out.parent / f"{out.name}.toml"
    path.write_text(tomli_w.dumps(tree))
    return ["judge", *map(str, runs), "--judge", str(path), "--out", str(out), *options]


def judged(runs: tuple[Path, Path | str], out: Path, tree: Tree, *options: str) -> Tree:
    assert main(command(runs, out, tree, *options)) == 0
    return json.loads((out / "judge.json").read_text())


def pairs_of(out: Path) -> list[Tree]:
    return [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]


def columns_of(run: Path) -> dict[tuple[str, str], Any]:
    """User and prompt -> columns of a held-out example."""
    data = RunFolder(run).config().data
    assert isinstance(data, PersonasConfig)
    return {(e.user, e.text): e.columns for e in load_personas(data).evaluation}


def questions(server: Server) -> list[str]:
    return [body["messages"][0]["content"] for _, _, body in server.requests]


def results(out: Path) -> dict[str, bytes]:
    found = contents(out)
    return {name: found[name] for name in ("judge.json", "pairs.jsonl", "judge.html")}


def test_two_runs_by_an_endpoint(
    runs: tuple[Path, Path], tmp_path: Path, serve: Serve, capsys: Capture
) -> None:
    server, out = serve(fair), tmp_path / "out"
    record = judged(runs, out, settings(server))
    said = capsys.readouterr().out
    pairs = pairs_of(out)
    assert len(pairs) == NUM_PROMPTS == record["num_pairs"] == record["num_prompts"]
    for found in pairs:
        a, b = worth(found["a"]), worth(found["b"])
        outcome = "a" if a > b else "b" if b > a else "tie"
        assert found["outcome"] == outcome
        assert found["votes"] == ([] if found["a"] == found["b"] else [outcome, outcome])
    different = [found for found in pairs if found["a"] != found["b"]]
    assert len(different) > NUM_PROMPTS / 2
    # Each pair was asked for in both orders, and with a form.
    assert Counter(map(answers, questions(server))) == Counter(
        order for p in different for order in ((p["a"], p["b"]), (p["b"], p["a"]))
    )
    assert {body["response_format"]["type"] for *_, body in server.requests} == {"json_schema"}

    counts = Counter(found["outcome"] for found in pairs)
    overall = record["overall"]
    assert (overall["wins"], overall["ties"], overall["losses"]) == (
        counts["a"],
        counts["tie"],
        counts["b"],
    )
    assert sum(cluster["num_pairs"] for cluster in record["clusters"].values()) == NUM_PROMPTS
    for name, cluster in record["clusters"].items():
        own = Counter(found["outcome"] for found in pairs if found["cluster"] == name)
        assert (cluster["wins"], cluster["losses"]) == (own["a"], own["b"])
        assert record["about"][name] == RunFolder(runs[0]).info().clusters[name].about
    assert record["consistent"]["share"] == 1.0 and record["flipped"] == 0
    assert record["usage"] == {
        "requests": len(server.requests),
        "prompt_tokens": 300 * len(server.requests),
        "completion_tokens": 20 * len(server.requests),
        "cost": None,
        "priced_now": 0,
        "unpriced": len(server.requests),
    }
    # Decided pairs against the rewards that both runs were trained by.
    columns = columns_of(runs[0])
    agree: list[bool] = []
    for found in pairs:
        own = columns[found["user"], found["prompt"]]
        rewards = [persona_reward(own, found[side]) for side in ("a", "b")]
        assert found["held_out"] == pytest.approx(rewards)
        if found["outcome"] != "tie" and rewards[0] != rewards[1]:
            agree.append((rewards[0] > rewards[1]) == (found["outcome"] == "a"))
    assert record["num_compared"] == len(agree)
    assert record["agreement"]["share"] == pytest.approx(np.mean(agree))
    # Greedy completions are those of the run's last evaluation.
    logged = {
        (str(s.user), s.prompt): s.completion for s in RunFolder(runs[0]).held_out if s.step == 2
    }
    same = [p for p in pairs if (p["user"], p["prompt"]) in logged]
    assert same and all(logged[p["user"], p["prompt"]] == p["a"] for p in same)

    names = {"a": "one/run", "b": "other/run"}
    winner = overall["winner"]
    headline = f"{names[winner]} won against" if winner in names else "are level."
    page = (out / "judge.html").read_text()
    assert headline in said and headline in page and "Who won with whom" in page
    assert "default-src 'none'" in page  # and so it loads nothing
    # Once more, and nothing is asked or changed.
    before, earlier = len(server.requests), results(out)
    judged(runs, out, settings(server))
    assert len(server.requests) == before and results(out) == earlier
    capsys.readouterr()
    judged(runs, out, settings(server), "--json")
    assert json.loads(capsys.readouterr().out) == record | {"report": str(out / "judge.html")}


def test_a_judge_that_always_names_the_first_answer_tells_nothing(
    runs: tuple[Path, Path], tmp_path: Path, serve: Serve
) -> None:
    server = serve(lambda *_: say("[[A]]"))
    record = judged(runs, tmp_path / "out", settings(server))
    different = record["num_pairs"] - record["num_identical"]
    assert record["overall"]["ties"] == record["num_pairs"]
    assert record["overall"]["winner"] == "level" and record["overall"]["decided"]["share"] is None
    assert record["flipped"] == different and record["consistent"]["share"] == 0
    assert record["first"]["share"] == 1.0 and record["first"]["low"] > 0.5


def test_a_vote_and_a_tie_are_a_tie_but_no_contradiction(
    runs: tuple[Path, Path], tmp_path: Path, serve: Serve
) -> None:
    def answer(question: str, _: int) -> Answer:
        a, b = answers(question)
        return say("A" if a < b else "tie")

    record = judged(runs, tmp_path / "out", settings(serve(answer)))
    assert record["overall"]["ties"] == record["num_pairs"]
    assert record["flipped"] == 0 and record["consistent"]["share"] == 0
    assert record["first"]["share"] == 1.0


def test_samples_are_paired_one_by_one(
    runs: tuple[Path, Path], tmp_path: Path, serve: Serve
) -> None:
    record = judged(
        runs, tmp_path / "out", settings(serve(fair), num_samples=3, temperature=2.0, seed=4)
    )
    pairs = pairs_of(tmp_path / "out")
    assert record["num_pairs"] == 3 * NUM_PROMPTS == len(pairs)
    prompts = [found["prompt"] for found in pairs]
    assert prompts == [prompt for prompt in prompts[::3] for _ in range(3)]
    assert len({found["a"] for found in pairs[:30]}) > 10
    again = judged(
        runs, tmp_path / "again", settings(serve(fair), num_samples=3, temperature=2.0, seed=4)
    )
    assert again == record
    other = judged(
        runs, tmp_path / "other", settings(serve(fair), num_samples=3, temperature=2.0, seed=5)
    )
    assert other["num_pairs"] == 3 * NUM_PROMPTS
    assert [p["a"] for p in pairs_of(tmp_path / "other")] != [p["a"] for p in pairs]


def test_the_model_that_a_run_began_with(
    runs: tuple[Path, Path], tmp_path: Path, serve: Serve
) -> None:
    record = judged((runs[0], "base"), tmp_path / "out", settings(serve(fair)))
    assert record["b"] == {
        "name": "tiny before training",
        "run": str(runs[0]),
        "step": 0,
        "best": False,
    }
    assert record["a"]["step"] == 2
    # Those are the completions of the evaluation before the first step.
    logged = {
        (str(s.user), s.prompt): s.completion for s in RunFolder(runs[0]).held_out if s.step == 0
    }
    same = [p for p in pairs_of(tmp_path / "out") if (p["user"], p["prompt"]) in logged]
    assert same and all(logged[p["user"], p["prompt"]] == p["b"] for p in same)


def test_the_best_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Serve
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    install_plugin(tmp_path / "site", PEAK)
    peak = {**WITH_PEAK, "data.num_examples": 96}
    both = (
        train(tmp_path / "one", peak),
        train(tmp_path / "other", {**peak, "run.seed": 1, "run.eval_prompts": 12}),
    )
    server, out = serve(fair), tmp_path / "out"
    record = judged(both, out, settings(server), "--best")
    assert (record["a"]["step"], record["b"]["step"]) == (5, 5)
    assert record["a"]["best"] and record["b"]["best"]
    chosen_by = {(str(s.user), s.prompt) for run in both for s in RunFolder(run).held_out}
    met = sum((found["user"], found["prompt"]) in chosen_by for found in pairs_of(out))
    assert 12 <= met < record["num_prompts"]
    said = f"by prompts among which are {met} of the {record['num_prompts']} that are judged here"
    assert said in record["notes"][0] and said in (out / "judge.html").read_text()
    record = judged(both, out, settings(server))
    assert record["notes"] == [] and not record["a"]["best"]


FITS = """
from pgrpo.plugins import hookimpl

class Counted:
    fits = 0

    def fit(self, users, features, examples):
        Counted.fits += 1

    def assign(self, users, features):
        return ["cluster"] * len(users)

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass

@hookimpl
def pgrpo_register_clusterers(register):
    register("counted", Counted)
"""


@pytest.mark.parametrize("base", [True, False])
def test_nobody_is_divided_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Serve, base: bool
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    install_plugin(tmp_path / "site", FITS)
    run = train(tmp_path / "one", {**CHANGES, "clustering": {"name": "counted"}})
    import my_plugin  # pyright: ignore[reportMissingImports]

    before = my_plugin.Counted.fits
    other = "base" if base else train(tmp_path / "other", {**CHANGES, "run.seed": 1})
    record = judged((run, other), tmp_path / "out", settings(serve(fair)))
    assert list(record["clusters"]) == ["cluster"]
    assert my_plugin.Counted.fits == before


# --- an endpoint that fails ------------------------------------------------------------------


def faulty(question: str, times: int) -> Answer:
    """Fails for a first time in one of six ways, by the question."""
    status, headers, text = fair(question)
    match zlib.crc32(question.encode()) % 7:
        case 0 if times == 0:
            return 429, {"Retry-After": "0"}, "slow down"
        case 1 if times == 0:
            return 500, {}, "oops"
        case 2 if times == 0:
            return status, {"Content-Length": str(len(text.encode()))}, text[: len(text) // 2]
        case 3 if times == 0:
            return 503, {"Retry-After": "Fri, 27 Nov 2026 00:00:00 GMT"}, "later"
        case 4 if times == 0:
            time.sleep(3)  # longer than request_timeout_s
        case _:
            pass
    return status, headers, text


@pytest.fixture(scope="module")
def undisturbed(
    runs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """What a judgement by a faultless endpoint comes to."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    server = Server(fair)
    try:
        judged(runs, out, settings(server))
    finally:
        server.close()
    return results(out)


def test_what_recovers_changes_nothing(
    runs: tuple[Path, Path], tmp_path: Path, serve: Serve, undisturbed: dict[str, bytes]
) -> None:
    server = serve(faulty)
    judged(
        runs,
        tmp_path / "out",
        settings(server, endpoint__request_timeout_s=1.0, endpoint__max_concurrency=16),
    )
    assert results(tmp_path / "out") == undisturbed
    asked = Counter(questions(server))
    kinds = {zlib.crc32(question.encode()) % 7 for question in asked}
    assert {0, 1, 2, 3, 4} <= kinds
    for question, times in asked.items():
        assert times == (2 if zlib.crc32(question.encode()) % 7 < 5 else 1)


@pytest.mark.parametrize("form", [lambda reply: reply, lambda reply: f"Winner: {reply['winner']}"])
def test_a_server_that_refuses_the_form_is_asked_without(
    runs: tuple[Path, Path],
    tmp_path: Path,
    serve: Serve,
    undisturbed: dict[str, bytes],
    form: Callable[[Tree], Any],
) -> None:
    def answer(question: str, _: int) -> Answer:
        reply = form(json.loads(json.loads(fair(question)[2])["choices"][0]["message"]["content"]))
        return say(reply if isinstance(reply, str) else json.dumps(reply), usage=USAGE)

    server = serve(answer, refuses="response_format")
    record = judged(runs, tmp_path / "out", settings(server))
    assert 1 <= server.num_refused <= 4  # as many as were asked before the first was refused
    assert not any("response_format" in body for *_, body in server.requests)
    assert record == json.loads(undisturbed["judge.json"])
    server = serve(answer, refuses="response_format")
    judged(runs, tmp_path / "plain", settings(server, endpoint__structured=False))
    assert server.num_refused == 0


def test_unreadable_replies_are_counted_and_not_paid_for_again(
    runs: tuple[Path, Path], tmp_path: Path, serve: Serve, capsys: Capture
) -> None:
    def answer(question: str, _: int) -> Answer:
        return (
            say("dunno", usage=USAGE) if zlib.crc32(question.encode()) % 4 == 0 else fair(question)
        )

    server, out = serve(answer), tmp_path / "out"
    many = settings(server, max_unreadable=0.02)
    assert main(command(runs, out, many)) == 2
    said = capsys.readouterr().err
    assert "'dunno'" in said and "2 of the last" in said and "max_unreadable = 0.02" in said
    assert "the same command goes on" in said
    record = judged(runs, out, settings(server, max_unreadable=1.0))
    assert max(Counter(questions(server)).values()) == 1
    pairs = pairs_of(out)
    unreadable = [p for p in pairs if p["outcome"] is None]
    assert record["num_unreadable"] == len(unreadable) > 0
    assert all("dunno" in p["replies"] and None in p["votes"] for p in unreadable)
    assert record["overall"]["num_pairs"] == NUM_PROMPTS - len(unreadable)
    assert f"{len(unreadable)} have no verdict" in capsys.readouterr().out


def test_a_judgement_that_goes_on_has_not_forgotten_what_could_not_be_read(
    runs: tuple[Path, Path], tmp_path: Path, serve: Serve, capsys: Capture
) -> None:
    server, out = serve(lambda *_: say("dunno", usage=USAGE)), tmp_path / "out"
    tree = settings(server, endpoint__max_concurrency=1)
    assert main(command(runs, out, tree)) == 2
    assert len(server.requests) == 7  # more than a tenth of 64
    capsys.readouterr()
    assert main(command(runs, out, tree)) == 2
    assert "7 of the last 7 replies could not be read" in capsys.readouterr().err
    assert len(server.requests) == 7
    # Other questions have other answers.
    judged(runs, out, settings(serve(fair), rubric={"criteria": {"fit": "It suits the person."}}))


def test_questions_that_cannot_be_asked_leave_the_others_their_answers(
    runs: tuple[Path, Path], tmp_path: Path, serve: Serve, undisturbed: dict[str, bytes]
) -> None:
    ill = True

    def answer(question: str, _: int) -> Answer:
        bad = ill and zlib.crc32(question.encode()) % 6 == 0
        return (400, {}, "context too long") if bad else fair(question)

    server, out = serve(answer), tmp_path / "out"
    record = judged(runs, out, settings(server, endpoint__max_concurrency=1))
    assert record["num_failed"] == sum(p["outcome"] is None for p in pairs_of(out)) > 0
    assert "context too long" in record["notes"][0]
    answered = len(server.requests)
    ill = False
    judged(runs, out, settings(server, endpoint__max_concurrency=1))
    assert results(out) == undisturbed
    # Only what had failed was asked again.
    assert len(server.requests) - answered == int(record["notes"][0].split()[0])


def test_a_judge_that_is_not_there_is_given_up(
    runs: tuple[Path, Path],
    tmp_path: Path,
    serve: Serve,
    capsys: Capture,
    undisturbed: dict[str, bytes],
) -> None:
    server, out = serve(lambda *_: (500, {}, "out of order")), tmp_path / "out"
    tree = settings(server, endpoint__retries=1, endpoint__max_concurrency=2)
    assert main(command(runs, out, tree)) == 2
    said = capsys.readouterr().err
    assert (
        "out of order" in said and "(2 attempts)" in said and "goes on with what is saved" in said
    )
    assert len(server.requests) <= 2 * (8 + 1)
    assert not (out / "judge.json").exists()
    judged(runs, out, settings(serve(fair)))
    assert results(out) == undisturbed


def test_requests_keep_to_a_rate(runs: tuple[Path, Path], tmp_path: Path, serve: Serve) -> None:
    begun: list[float] = []

    def answer(question: str, times: int) -> Answer:
        begun.append(time.monotonic())
        return (429, {"Retry-After": "0"}, "") if not times else fair(question)

    judged(
        runs,
        tmp_path / "out",
        settings(serve(answer), num_prompts=4, endpoint__max_per_second=20.0),
    )
    assert len(begun) > 8  # repetitions count as well
    # 50 ms apart when they are sent; the first may be late.
    assert begun[-1] - begun[0] >= 0.5 * 0.05 * (len(begun) - 1)


def test_waiting_for_a_turn_takes_no_time_from_a_question(
    runs: tuple[Path, Path], tmp_path: Path, serve: Serve
) -> None:
    """All but a few questions have their turn later than one of them may take."""
    server = serve(lambda question, times: fair(question) if times else (503, {}, "later"))
    record = judged(
        runs,
        tmp_path / "out",
        settings(
            server,
            num_prompts=6,
            endpoint__max_per_second=5.0,
            endpoint__timeout_s=1.5,
            endpoint__max_concurrency=16,
        ),
    )
    different = record["num_pairs"] - record["num_identical"]
    assert different >= 5, "the last turn is after more than 1.5 s"
    assert record["num_failed"] == 0 and len(server.requests) == 2 * 2 * different


def test_an_answer_that_is_nested_too_deep_is_one_that_was_not_had(
    runs: tuple[Path, Path], tmp_path: Path, serve: Serve
) -> None:
    def answer(question: str, _: int) -> Answer:
        deep = zlib.crc32(question.encode()) % 6 == 0
        return (200, {}, '{"choices": ' + "[" * 200_000) if deep else fair(question)

    server, out = serve(answer), tmp_path / "out"
    record = judged(runs, out, settings(server))
    assert record["num_failed"] > 0 and record["overall"]["num_pairs"] > 0
    assert "no chat completion" in record["notes"][0]


# --- killed and continued --------------------------------------------------------------------


def test_a_killed_judgement_goes_on_and_pays_nothing_twice(
    runs: tuple[Path, Path], tmp_path: Path, serve: Serve, undisturbed: dict[str, bytes]
) -> None:
    """SIGKILL while a question is under way: that one, which nobody got an answer to, is asked again."""
    victims: dict[int, Any] = {}
    out = tmp_path / "out"

    def answer(question: str, times: int) -> Answer:
        number = len(server.requests)
        if number in victims and victims[number] is None:
            victims[number] = question
            os.kill(process.pid, signal.SIGKILL)
            time.sleep(0.2)  # it is dead before it is answered
        return fair(question)

    server = serve(answer)
    tree = settings(server, endpoint__max_concurrency=1)
    for number in (1, 7, 20):
        victims[number] = None
        process = start(*command(runs, out, tree))
        process.join()
        assert process.exitcode == -signal.SIGKILL
    # As if it had died in the middle of a line.
    lines = (out / "opinions.jsonl").read_bytes()
    with open(out / "opinions.jsonl", "ab") as file:
        file.write(lines.splitlines()[-1][:25])
    judged(runs, out, tree)
    again = {question: n for question, n in Counter(questions(server)).items() if n > 1}
    assert again == {question: 1 + n for question, n in Counter(victims.values()).items()}
    assert results(out) == undisturbed


@pytest.mark.parametrize("kill_at", [2, 6, 11, 16, 23, 31, 47, 60])
def test_killed_at_any_moment_it_comes_to_the_same(
    runs: tuple[Path, Path],
    tmp_path: Path,
    serve: Serve,
    undisturbed: dict[str, bytes],
    kill_at: int,
) -> None:
    """Before its n-th operation on a file of the folder."""
    server, out = serve(fair), tmp_path / "out"
    arguments = command(runs, out, settings(server))
    process = start(*arguments, kill_at=kill_at, folder=out)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert main(arguments) == 0
    assert results(out) == undisturbed
    # What was under way, or answered and not yet written.
    assert sum(times - 1 for times in Counter(questions(server)).values()) <= 4


def test_ctrl_c_waits_for_what_is_under_way(
    runs: tuple[Path, Path],
    tmp_path: Path,
    serve: Serve,
    capsys: Capture,
    undisturbed: dict[str, bytes],
) -> None:
    number = itertools.count(1)

    def answer(question: str, _: int) -> Answer:
        if next(number) == 9:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
        return fair(question)

    server, out = serve(answer), tmp_path / "out"
    assert main(command(runs, out, settings(server))) == 130
    assert f"interrupted; the same command goes on with what is saved in {out}" in (
        capsys.readouterr().err
    )
    assert 9 <= len(server.requests) < 20
    assert len((out / "opinions.jsonl").read_text().splitlines()) == len(server.requests)
    judged(runs, out, settings(server))
    assert max(Counter(questions(server)).values()) == 1
    assert results(out) == undisturbed


def test_a_folder_is_one_judgements(
    runs: tuple[Path, Path], tmp_path: Path, capsys: Capture
) -> None:
    from filelock import FileLock

    out = tmp_path / "out"
    out.mkdir()
    with FileLock(out / ".lock"):
        assert main(command(runs, out, settings())) == 2
    assert f"{out} is in use by another process" in capsys.readouterr().err


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "opinions.jsonl"
    path.write_text('{"key": "k", "model": "m", "reply": "A", "side": "A"}\n{"key": 3}\n')
    with pytest.raises(Exception, match=r"opinions.jsonl line 2 is damaged"):
        Store(path, OpinionRecord)


# --- money -----------------------------------------------------------------------------------

PRICES = {"prompt": 10.0, "completion": 50.0}
EACH = (300 * 10 + 20 * 50) / 1e6


def test_a_budget_ends_a_judgement_and_a_larger_one_goes_on(
    runs: tuple[Path, Path], tmp_path: Path, serve: Serve, capsys: Capture
) -> None:
    server, out = serve(fair), tmp_path / "out"
    part = settings(server, prices=PRICES, budget=EACH * 20.5)
    record = judged(runs, out, part)
    assert len(server.requests) == 20
    assert record["usage"]["cost"] == pytest.approx(20 * EACH)
    assert "budget of" in record["notes"][0] and "budget of" in capsys.readouterr().out
    assert record["num_unasked"] > 0
    # Both orders of a pair are asked for together.
    assert record["overall"]["num_pairs"] == 10 + record["num_identical"]
    judged(runs, out, part)
    assert len(server.requests) == 20
    record = judged(runs, out, settings(server, prices=PRICES, budget=1.0))
    assert max(Counter(questions(server)).values()) == 1
    assert record["num_unasked"] == 0 and record["notes"] == []
    assert record["usage"]["cost"] == pytest.approx(EACH * len(server.requests))


def test_a_cost_is_that_of_the_time_when_it_was_paid(
    runs: tuple[Path, Path], tmp_path: Path, serve: Serve
) -> None:
    server, out = serve(fair), tmp_path / "out"
    judged(runs, out, settings(server, num_prompts=4, prices=PRICES))
    first = len(server.requests)
    # Twice the price, and what was paid stays what it was.
    double = {name: 2 * price for name, price in PRICES.items()}
    record = judged(runs, out, settings(server, num_prompts=8, prices=double))
    second = len(server.requests) - first
    assert record["usage"]["cost"] == pytest.approx(EACH * (first + 2 * second))
    assert (record["usage"]["priced_now"], record["usage"]["unpriced"]) == (0, 0)
    # The next question costs what it costs now, not what the dearest did.
    ten = {name: 10 * price for name, price in PRICES.items()}
    spent = EACH * (first + 2 * second)
    tree = settings(server, num_prompts=16, prices=ten, budget=spent + 25 * EACH)
    record = judged(runs, out, tree)
    assert len(server.requests) == first + second + 2
    assert record["usage"]["cost"] <= spent + 25 * EACH


def test_what_was_paid_without_prices_counts_by_those_that_are_told_later(
    runs: tuple[Path, Path], tmp_path: Path, serve: Serve, capsys: Capture
) -> None:
    server, out = serve(fair), tmp_path / "out"
    judged(runs, out, settings(server, num_prompts=4))
    first = len(server.requests)
    priced = settings(server, prices=PRICES, budget=EACH * (first + 4.5))
    usage = judged(runs, out, priced)["usage"]
    assert len(server.requests) == first + 4
    assert usage["cost"] == pytest.approx(EACH * (first + 4))
    assert (usage["priced_now"], usage["unpriced"]) == (first, 0)
    assert f"{first} without any, by the prices of the last call" in (
        (out / "judge.html").read_text()
    )
    # Another judge's cannot be told by these.
    other = settings(server, endpoint__model="another", num_prompts=4, prices=PRICES)
    usage = judged(runs, out, other)["usage"]
    assert (usage["priced_now"], usage["unpriced"]) == (0, first)
    capsys.readouterr()
    assert main(command(runs, out, {**other, "budget": 1.0, "num_prompts": 8})) == 2
    assert f"{first} of {len(server.requests)} opinions in the folder tell no cost" in (
        capsys.readouterr().err
    )


def test_a_budget_needs_to_be_told_what_was_used(
    runs: tuple[Path, Path], tmp_path: Path, serve: Serve, capsys: Capture
) -> None:
    server = serve(lambda *_: say("A"))
    tree = settings(server, prices=PRICES, budget=1.0)
    assert main(command(runs, tmp_path / "out", tree)) == 2
    assert "tell no usage" in capsys.readouterr().err
    assert len(server.requests) == 1


# --- a reward as a judge ---------------------------------------------------------------------

COUNTING = """
from pgrpo.plugins import hookimpl

said = []

def longest(rollouts):
    said.extend(rollout.completion for rollout in rollouts)
    return [None if "dope" in r.completion else float(len(r.completion)) for r in rollouts]

@hookimpl
def pgrpo_register_rewards(register):
    register("longest", longest)
"""


def test_a_reward_judges_without_an_endpoint(runs: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    tree = {"num_prompts": NUM_PROMPTS, "reward": {"name": "persona_utility"}}
    record = judged(runs, out, tree)
    columns = columns_of(runs[0])
    for found in pairs_of(out):
        own = columns[found["user"], found["prompt"]]
        a, b = (persona_utility(own, found[side]) for side in ("a", "b"))
        assert found["rewards"] == [a, b]
        assert found["outcome"] == ("a" if a > b else "b" if b > a else "tie")
        assert found["votes"] == []
    assert record["kind"] == "reward" and record["consistent"]["share"] is None
    # Utility and reward order answers to one prompt alike.
    assert record["agreement"]["share"] == 1.0
    assert "there is no order" in (out / "judge.html").read_text()


def test_a_plugin_judges_and_is_called_once_for_each_answer(
    runs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    install_plugin(tmp_path / "site", COUNTING)
    out = tmp_path / "out"
    record = judged(runs, out, {"num_prompts": NUM_PROMPTS, "reward": {"name": "longest"}})
    import my_plugin  # pyright: ignore[reportMissingImports]

    pairs = pairs_of(out)
    assert Counter(my_plugin.said) == Counter(p[side] for p in pairs for side in ("a", "b"))
    none = [p for p in pairs if "dope" in p["a"] + p["b"]]
    assert record["num_unreadable"] == len(none) == sum(p["outcome"] is None for p in pairs)
    for found in pairs:
        more = len(found["a"]) - len(found["b"])
        expected = None if found in none else "a" if more > 0 else "b" if more < 0 else "tie"
        assert found["outcome"] == expected
    before = len(my_plugin.said)
    assert judged(runs, out, {"num_prompts": NUM_PROMPTS, "reward": {"name": "longest"}}) == record
    assert len(my_plugin.said) == before


FAILING = """
from pgrpo.plugins import hookimpl

broken = False

def steady(rollouts):
    if broken:
        raise RuntimeError("out of order")
    return [float(len(rollout.completion)) for rollout in rollouts]

@hookimpl
def pgrpo_register_rewards(register):
    register("steady", steady)
"""


def test_a_held_out_reward_that_fails_leaves_the_judgement_its_outcome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Serve, capsys: Capture
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    install_plugin(tmp_path / "site", FAILING)
    scored = {**CHANGES, "evaluation": [{"name": "steady"}]}
    both = (
        train(tmp_path / "one", scored),
        train(tmp_path / "other", {**scored, "run.seed": 1}),
    )
    import my_plugin  # pyright: ignore[reportMissingImports]

    server, out = serve(fair), tmp_path / "out"
    my_plugin.broken = True
    capsys.readouterr()
    record = judged(both, out, settings(server))
    assert record["overall"]["num_pairs"] == NUM_PROMPTS and record["num_compared"] == 0
    assert "that reward failed" in record["notes"][0] and "out of order" in record["notes"][0]
    assert "out of order" in capsys.readouterr().out
    assert "out of order" in (out / "judge.html").read_text()
    asked = len(server.requests)
    # Mended, it is asked for again, and the judge is not.
    my_plugin.broken = False
    record = judged(both, out, settings(server))
    assert record["notes"] == [] and record["num_compared"] > 0
    assert len(server.requests) == asked


def test_a_judge_that_shifted_in_training_measures_answers_as_it_was() -> None:
    shifted = [{"name": "persona", "shift": {"after": 2, "scale": 10.0}}]
    a, b = (
        parse_config(tiny_run({"rewards": rewards})) for rewards in ([{"name": "persona"}], shifted)
    )
    judge = JudgeConfig(reward=RewardConfig(name="persona_utility"))
    assert _programmatic(a, b, judge) == _programmatic(b, a, judge) == a.rewards
    other = parse_config(tiny_run({"rewards": [{"name": "persona", "weight": 2.0}]}))
    assert _programmatic(other, b, judge) == []


# --- arms with several seeds -----------------------------------------------------------------


def played(skill: np.ndarray, people: np.ndarray, ties: float, rng: Any) -> list[list[PairRecord]]:
    """Of each seed its pairs: the first run wins one that is decided with chance skill [seeds, pairs]."""
    drawn = np.where(rng.random(skill.shape) < skill, "a", "b")
    drawn = np.where(rng.random(skill.shape) < ties, "tie", drawn)
    return [[pair(str(o), f"u{u}") for o, u in zip(row, people, strict=True)] for row in drawn]


def test_of_one_seed_rates_are_those_of_its_pairs() -> None:
    (match,) = played(np.full((1, 30), 0.6), np.arange(30) // 2, 0.2, np.random.default_rng(0))
    assert rates_over_seeds([match]) == rates(match)


def test_intervals_over_seeds_are_the_farthest_of_three() -> None:
    """Each made otherwise: people's by `rates`, Student's by scipy, the bootstrap draw by draw."""
    rng = np.random.default_rng(1)
    people = np.arange(40) // 2
    skill = 0.6 + rng.normal(0, 0.08, (4, 1)) + rng.normal(0, 0.1, 20)[people]
    matches = played(skill, people, 0.25, rng)
    found, pooled = rates_over_seeds(matches), rates([p for match in matches for p in match])
    outcomes = np.array([[p.outcome for p in match] for match in matches])
    for name, wins, counted in (
        ("win", outcomes == "a", np.ones(outcomes.shape, bool)),
        ("loss", outcomes == "b", np.ones(outcomes.shape, bool)),
        ("decided", outcomes == "a", outcomes != "tie"),
    ):
        share, alone = getattr(found, name), getattr(pooled, name)
        assert share.share == alone.share == pytest.approx(wins.sum() / counted.sum())
        of_seeds = wins.sum(1) / counted.sum(1)
        student = stats.t.interval(0.95, 3, of_seeds.mean(), stats.sem(of_seeds))
        draws: list[float] = []
        for _ in range(4000):
            seeds = rng.integers(4, size=4)
            where = np.concatenate([np.flatnonzero(people == u) for u in rng.integers(20, size=20)])
            drawn = np.ix_(seeds, where)
            draws.append(wins[drawn].sum() / counted[drawn].sum())
        low, high = np.quantile(draws, [0.025, 0.975])
        assert share.low == pytest.approx(min(student[0], low, alone.low), abs=0.012)
        assert share.high == pytest.approx(max(student[1], high, alone.high), abs=0.012)
        assert share.trials is None


def mirrored(matches: list[list[PairRecord]]) -> list[list[PairRecord]]:
    other = {"a": "b", "b": "a", "tie": "tie"}
    return [[pair(other[p.outcome or "tie"], p.user) for p in match] for match in matches]


def test_the_other_way_round_it_is_the_other_outcome() -> None:
    rng = np.random.default_rng(2)
    matches = played(np.full((5, 60), 0.75), np.arange(60), 0.2, rng)
    found, other = rates_over_seeds(matches), rates_over_seeds(mirrored(matches))
    assert (found.winner, other.winner) == ("a", "b")
    assert found.decided.low is not None and other.decided.high is not None
    assert other.decided.high == pytest.approx(1 - found.decided.low, abs=0.01)


@pytest.mark.parametrize("what", ["seeds", "people", "pairs"])
def test_level_arms_are_seldom_said_to_have_won_over_seeds(what: str) -> None:
    """Whatever it is that pairs of runs differ by; two runs of one seed each are no two arms."""
    rng = np.random.default_rng(3)
    people = np.arange(60) // 2
    won = naive = 0
    for _ in range(150):
        skill = np.full((4, 60), 0.5)
        if what == "seeds":
            skill += rng.choice([-0.25, 0.25], (4, 1))
        if what == "people":
            skill += rng.choice([-0.4, 0.4], 30)[people]
        matches = played(skill, people, 0.2, rng)
        won += rates_over_seeds(matches).winner != "level"
        naive += rates([p for match in matches for p in match]).winner != "level"
    assert won / 150 < 0.103  # 5 % and three standard errors
    assert what != "seeds" or naive / 150 > 0.3, "that of people alone is certain of what seeds do"


def test_a_few_people_who_agree_with_every_seed_are_a_few_people() -> None:
    matches = [[pair("a", f"u{u}") for u in range(3)] for _ in range(5)]
    found = rates_over_seeds(matches)
    assert found.decided.share == 1.0 and found.winner == "level"
    # Nothing is known of seeds where one alone has decided pairs.
    matches = [[pair("a", f"u{u}") for u in range(40)], [pair("tie", f"u{u}") for u in range(40)]]
    found = rates_over_seeds(matches)
    assert (found.decided.low, found.decided.high, found.winner) == (0.0, 1.0, "level")


@pytest.fixture(scope="module")
def arms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two arms as `pgrpo compare` leaves them, one of which has a seed more."""
    out = tmp_path_factory.mktemp("arms")
    config = write_config(out, CHANGES)
    for names, seeds in (("pgrpo,grpo", "0,1,2"), ("pgrpo", "3")):
        command = ["compare", str(config), "--estimators", names, "--seeds", seeds, "--out"]
        assert main([*command, str(out / "runs")]) == 0
    return {name: out / "runs" / name for name in ("pgrpo", "grpo")}


BY_REWARD: Tree = {"num_prompts": NUM_PROMPTS, "reward": {"name": "persona_utility"}}


def test_arms_are_judged_seed_by_seed(
    arms: dict[str, Path], tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "out"
    record = judged((arms["pgrpo"], arms["grpo"]), out, BY_REWARD)
    said = capsys.readouterr().out
    assert (record["a"]["name"], record["b"]["name"]) == ("pgrpo", "grpo")
    assert [match["folder"] for match in record["matches"]] == ["seed-0", "seed-1", "seed-2"]
    assert "Seeds that have nothing to be judged against: 3." in record["notes"]
    every: list[list[Tree]] = []
    for match in record["matches"]:
        folder = match["folder"]
        # Each is what judging these two runs alone comes to.
        both = (arms["pgrpo"] / folder, arms["grpo"] / folder)
        alone = judged(both, tmp_path / folder, BY_REWARD)
        assert json.loads((out / folder / "judge.json").read_text()) == alone
        assert pairs_of(out / folder) == pairs_of(tmp_path / folder)
        assert (match["a"], match["overall"]) == (alone["a"], alone["overall"])
        assert (out / folder / "judge.html").exists()
        every.append(pairs_of(out / folder))
    assert pairs_of(out) == [found for pairs in every for found in pairs]
    assert record["num_prompts"] == NUM_PROMPTS and record["num_pairs"] == 3 * NUM_PROMPTS
    as_records = [[PairRecord.model_validate(found) for found in pairs] for pairs in every]
    assert record["overall"] == rates_over_seeds(as_records).model_dump()
    assert record["clusters"]
    for name, found in record["clusters"].items():
        own = [[p for p in pairs if p.cluster == name] for pairs in as_records]
        assert found == rates_over_seeds(own).model_dump()
    page = (out / "judge.html").read_text()
    assert "Each pair of runs" in page and "3 pairs of runs" in page
    assert "Of 3 pairs of runs by themselves" in said and said.count("\n") > 3
    # Once more, and all is there.
    before = contents(out)
    judged((arms["pgrpo"], arms["grpo"]), out, BY_REWARD)
    after = contents(out)
    assert {k: v for k, v in after.items() if k != ".lock"} == {
        k: v for k, v in before.items() if k != ".lock"
    }


def test_an_arm_against_itself_is_a_control(arms: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    record = judged((arms["pgrpo"], arms["pgrpo"]), out, BY_REWARD)
    assert [match["folder"] for match in record["matches"]] == ["seed-0-1", "seed-2-3"]
    names = [(match["a"]["name"], match["b"]["name"]) for match in record["matches"]]
    assert names == [("pgrpo/seed-0", "pgrpo/seed-1"), ("pgrpo/seed-2", "pgrpo/seed-3")]
    assert record["overall"]["winner"] == "level"
    assert "This is a control" in record["notes"][0]
    assert "one seed of pgrpo and another are level." in (out / "judge.html").read_text()


def test_an_arm_against_what_it_began_with(arms: dict[str, Path], tmp_path: Path) -> None:
    record = judged((arms["grpo"], "base"), tmp_path / "out", BY_REWARD)
    assert record["b"]["name"] == "tiny before training"
    assert [match["b"]["step"] for match in record["matches"]] == [0, 0, 0]


def test_a_budget_is_that_of_all_seeds_and_leaves_each_a_part(
    arms: dict[str, Path], tmp_path: Path, serve: Serve
) -> None:
    server, out = serve(fair), tmp_path / "out"
    both = (arms["pgrpo"], arms["grpo"])
    record = judged(both, out, settings(server, prices=PRICES, budget=EACH * 40.5))
    assert len(server.requests) == 40
    assert record["usage"]["cost"] == pytest.approx(40 * EACH)
    told = [sum(bool(found["votes"]) for found in pairs_of(out / f"seed-{k}")) for k in range(3)]
    assert sum(told) == 20 and min(told) >= 2
    record = judged(both, out, settings(server))
    assert record["num_unasked"] == 0
    assert max(Counter(questions(server)).values()) == 1, "seeds share what was answered"


def test_runs_that_divide_people_otherwise_have_no_clusters_in_common(tmp_path: Path) -> None:
    for seed in (0, 1):
        for arm in ("one", "other"):
            changes = {**CHANGES, "run.seed": seed, "clustering.num_clusters": 2 + seed}
            changes["estimator.name"] = {"one": "pgrpo", "other": "grpo"}[arm]
            path = write_config(tmp_path / f"{arm}-{seed}", changes)
            command = ["train", str(path), "--out", str(tmp_path / arm / f"seed-{seed}")]
            assert main(command) == 0
    record = judged((tmp_path / "one", tmp_path / "other"), tmp_path / "out", BY_REWARD)
    assert record["clusters"] == {} and "different clusters" in record["notes"][0]
    assert record["overall"]["num_pairs"] == 2 * NUM_PROMPTS


def test_runs_that_hold_out_different_prompts_are_refused() -> None:
    examples = [Example(f"question {k}", f"u{k}") for k in range(4)]
    _check_prompts(examples, list(examples), "one and other")
    shorter = [examples[0], *examples[2:]]
    with pytest.raises(
        ConfigError, match="one and other hold out .*: of 4 and 3, number 2 differs"
    ):
        _check_prompts(examples, shorter, "one and other")
    with pytest.raises(ConfigError, match="of 4 and 3, number 4 differs"):
        _check_prompts(examples, examples[:3], "one and other")


def test_arms_that_cannot_be_judged(arms: dict[str, Path], tmp_path: Path, capsys: Capture) -> None:
    def refused(*both: Path) -> str:
        capsys.readouterr()
        assert main(command((both[0], both[1]), tmp_path / "out", BY_REWARD)) == 2
        return capsys.readouterr().err

    pgrpo, grpo = arms["pgrpo"], arms["grpo"]
    said = refused(pgrpo, grpo / "seed-0")
    assert f"{grpo / 'seed-0'} is a run, and the other folder holds several" in said
    assert f"{pgrpo / 'seed-0'} is a run" in refused(pgrpo / "seed-0", grpo)
    assert "is not a run folder" in refused(pgrpo, tmp_path)
    assert "make 1 pairs by their seeds; expected two or more" in refused(grpo, grpo)
    twice = tmp_path / "twice"
    shutil.copytree(grpo, twice)
    shutil.copytree(grpo / "seed-1", twice / "again")
    assert "are both of seed 1; expected a folder with one run of each" in refused(pgrpo, twice)
    assert not (tmp_path / "out").exists()


# --- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({}, "expected [endpoint] or [reward], one of them"),
        (settings(reward={"name": "persona"}), "expected [endpoint] or [reward], one of them"),
        (settings(endpoint__url="localhost"), "endpoint.url: expected an address that begins with"),
        (settings(endpoint__modle="x"), "unknown key endpoint.modle; did you mean 'model'?"),
        (settings(temperature=1.0), "temperature has no effect here"),
        (settings(budget=1.0), "budget needs [prices]"),
        (settings(rubric={"template": "{prompt} {a}"}), "template does not contain {b}"),
        (settings(rubric={"template": "{a} {b}"}), "template does not contain {prompt}"),
        (
            settings(rubric={"template": "{prompt} {a} {b} {tast}"}),
            "rubric.template names {tast}, the example has only:",
        ),
        (
            settings(rubric={"template": "{prompt} {a} {b}", "criteria": {"x": "y"}}),
            "rubric: criteria has no effect here",
        ),
        (
            settings(rubric={"template": "{prompt} {a} {b}", "person": "{user}"}),
            "rubric: person has no effect here",
        ),
        (
            settings(rubric={"person": "{tast}"}),
            "rubric.person names {tast}, the example has only:",
        ),
        (
            settings(endpoint__parameters={"response_format": {}}),
            "parameters has a response_format of its own",
        ),
        ({"reward": {"name": "persona"}, "rubric": {}}, "rubric has no effect here"),
        ({"reward": {"name": "personna"}}, "there is no reward 'personna'; did you mean"),
        ({"reward": {"name": "persona", "batch": "step"}}, "reward.batch is 'step'"),
        ({"reward": {"name": "persona", "clusters": [0]}}, "reward.clusters names those that it"),
        (
            {"reward": {"name": "persona", "shift": {"after": 1, "offset": 1.0}}},
            "reward.shift is of training, and nothing is trained; expected none",
        ),
        (
            settings(endpoint__api_key_env="NO_SUCH_KEY"),
            "NO_SUCH_KEY, named by api_key_env, is not",
        ),
    ],
)
def test_a_file_that_describes_no_judge(
    runs: tuple[Path, Path], tmp_path: Path, capsys: Capture, tree: Tree, words: str
) -> None:
    assert main(command(runs, tmp_path / "out", tree)) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
    assert not (tmp_path / "out" / "completions.jsonl").exists(), (
        "it is told before anything is done"
    )


def test_runs_that_cannot_be_compared(
    runs: tuple[Path, Path], tmp_path: Path, capsys: Capture
) -> None:
    def refused(*both: Path) -> str:
        capsys.readouterr()
        assert main(command((both[0], both[1]), tmp_path / "out", settings())) == 2
        return capsys.readouterr().err

    strange = train(tmp_path / "strange", {**CHANGES, "data.num_examples": 88})
    said = refused(runs[0], strange)
    assert f"{runs[0]} has data.num_examples = 96 and {strange} has 88" in said
    assert "both runs are" in refused(runs[0], runs[0])
    assert "is not a run folder" in refused(runs[0], tmp_path)
    assert not (tmp_path / "out").exists()


def test_the_page_shows_what_others_wrote_as_text(
    runs: tuple[Path, Path], tmp_path: Path, serve: Serve
) -> None:
    nasty = "<script>alert(1)</script>"

    def answer(question: str, _: int) -> Answer:
        a, b = answers(question)
        return say(json.dumps({"reason": nasty, "winner": "A" if a > b else "B"}))

    judged(runs, tmp_path / "out", settings(serve(answer), endpoint__model=nasty))
    page = (tmp_path / "out" / "judge.html").read_text()
    assert nasty not in page and "&lt;script&gt;alert(1)" in page


def test_a_cluster_that_is_called_everybody_is_another_row_than_all_of_them(
    runs: tuple[Path, Path], tmp_path: Path
) -> None:
    tree = {"num_prompts": NUM_PROMPTS, "reward": {"name": "persona_utility"}}
    found = judged(runs, tmp_path / "out", tree)
    found["clusters"]["everybody"] = found["clusters"].pop("0")
    record = JudgementRecord.model_validate(found)
    (tmp_path / "judge.html").write_text(render(record, [], {}), "utf-8")
    rows = {row[0]: row[2] for row in parse(tmp_path / "judge.html").rows if len(row) == 9}
    assert rows["all: everybody"] == str(record.overall.num_pairs)
    assert rows["everybody"] == str(record.clusters["everybody"].num_pairs)


def test_the_sections_of_the_file_are_documented() -> None:
    page = (Path(__file__).parents[1] / "docs" / "judge.md").read_text()
    own = JudgeConfig.model_fields.keys() | PairEndpoint.model_fields.keys()
    own |= Rubric.model_fields.keys() | {"prompt", "completion"}
    assert not {name for name in own if f"`{name}`" not in page}
    (shown,) = re.findall(r"^```toml\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert (
        shown in (Path(__file__).parents[1] / "examples" / "judges" / "endpoint.toml").read_text()
    )
