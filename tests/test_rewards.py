"""The built-in rewards; the judge talks to a real HTTP server on this machine."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from pgrpo.config.sections import RewardConfig
from pgrpo.errors import ConfigError, PluginError
from pgrpo.plugins.registry import load_registry
from pgrpo.rewards.scorer import Scorer
from pgrpo.types import Example, Group, Prompt, Rollout

REGISTRY = load_registry()


def rollout(completion: str, text: str = "Why?", **columns: Any) -> Rollout:
    prompt = Prompt(Example(text, user="u7", columns=columns), 0, (1,))
    return Rollout(prompt, 0, (1,), completion, (0.0,), False)


def build(**settings: object):
    return REGISTRY.reward(RewardConfig.model_validate(settings))


LABELS = ["A", "B", "C", "D"]
FACTS = ["famous Comedy", "obscure Drama", "Drama", "famous Comedy"]
TITLES = ["Toy Story (1995)", "Plan B (1999)", "A Bug's Life (1998)", "The Shining (1980)"]


@pytest.mark.parametrize(
    ("completion", "options", "named"),
    [
        (" B", FACTS, "B"),
        ("B", FACTS, "B"),
        ("b", FACTS, "B"),
        ("**B**", FACTS, "B"),
        ("(B)\n", FACTS, "B"),
        ("The answer is B.", FACTS, "B"),
        ("I think it is B, because I like it.", FACTS, "B"),
        ("A", FACTS, "A"),
        ("A is best", FACTS, "A"),
        ("A.", FACTS, "A"),
        ("Answer: A, a film.", FACTS, "A"),
        ("A film worth seeing", FACTS, None),
        ("A good film is B", FACTS, "B"),
        ("B. obscure Drama", FACTS, "B"),
        ("A: famous Comedy", FACTS, "A"),
        ("famous comedy", FACTS, None),  # A and D look alike
        ("obscure drama", FACTS, "B"),
        ("Drama!", FACTS, "C"),
        ("obscure Drama, or Drama", FACTS, None),
        ("B. famous Comedy", FACTS, None),  # says two things
        ("A or B", FACTS, None),
        ("A or B? obscure Drama", FACTS, None),
        ("A B", FACTS, None),
        ("A and C", FACTS, None),
        ("Neither", FACTS, None),
        ("Because", FACTS, None),
        ("", FACTS, None),
        ("C'est la vie", FACTS, None),
        ("Plan B (1999)", TITLES, "B"),
        ("I would watch plan b (1999).", TITLES, "B"),
        ("A Bug's Life (1998)", TITLES, "C"),
        ("C. A Bug's Life (1998)", TITLES, "C"),
        ("Toy Story (1995) and The Shining (1980)", TITLES, None),
        ("A Toy Story (1995)", TITLES, "A"),
    ],
)
def test_choice_understands_exactly_one_option(completion, options, named):
    choice = build(name="choice")
    for label, text in zip(LABELS, options, strict=True):
        columns: Any = {"labels": LABELS, "options": options}
        as_label = rollout(completion, answer=f" {label}", **columns)
        assert choice([as_label]) == [float(label == named)]
        # Where the answer is a text, any option that reads the same is right.
        right = completion.strip() == text
        if named is not None:
            right |= options[LABELS.index(named)] == text
        assert choice([rollout(completion, answer=f" {text}", **columns)]) == [float(right)]


def test_choice_without_labels_compares():
    choice = build(name="choice")
    assert choice([rollout(" yes ", answer="yes"), rollout("yes!", answer="yes")]) == [1.0, 0.0]
    with pytest.raises(PluginError, match="no column 'answer'; it has other"):
        score(RewardConfig(name="choice"), rollout("yes", other=1))


def test_choice_scores_the_movielens_columns_of_every_answer_style(tmp_path):
    from pgrpo.data.movielens import MovieLensConfig, load_movielens

    rng = np.random.default_rng(0)
    ratings = [
        f"{user}::{film}::{rng.integers(3, 6)}::{1000 + 60 * order}"
        for user in range(1, 13)
        for order, film in enumerate(rng.permutation(np.arange(1, 61))[:30])
    ]
    films = [
        f"{film}::Film {film} (1990)::{'Drama|War'[: 5 + 4 * (film % 2)]}" for film in range(1, 61)
    ]
    (tmp_path / "ratings.dat").write_text("\n".join(ratings))
    (tmp_path / "movies.dat").write_text("\n".join(films))
    choice = build(name="choice")
    for answer in ("label", "text", "free"):
        config = MovieLensConfig(
            name="movielens", path=str(tmp_path), answer=answer, template="titles"
        )
        for example in load_movielens(config).train[:20]:
            columns: Any = example.columns
            label = columns["labels"][columns["position"]]
            said = [*(example.choices or ()), f"It is {label}."]
            said += [f"I choose {option}" for option in columns["options"]]
            prompt = Prompt(example, 0, (1,))
            scores: Any = choice([Rollout(prompt, 0, (1,), text, (0.0,), False) for text in said])
            num_ways = 2 if example.choices is None else 3
            assert sum(scores) == num_ways


def test_exact_match():
    completions = [rollout(text, answer="Yes", other=" 7 ") for text in ("Yes", " Yes\n", "yes")]
    assert build(name="exact_match")(completions) == [1.0, 1.0, 0.0]
    assert build(name="exact_match", strip=False)(completions) == [1.0, 0.0, 0.0]
    assert build(name="exact_match", casefold=True)(completions) == [1.0, 1.0, 1.0]
    assert build(name="exact_match", column="other")([rollout("7", other=7)]) == [1.0]


def test_regex():
    regex = build(name="regex", pattern=r"^\d+$", reward=-0.5)
    assert regex([rollout("42"), rollout("42 or so")]) == [-0.5, 0.0]
    with pytest.raises(ConfigError, match="no regular expression"):
        build(name="regex", pattern="(")


def test_persona_rewards_each_example_by_its_own_columns():
    from pgrpo.data.personas import PersonasConfig, load_personas, persona_reward

    example = load_personas(PersonasConfig(name="personas", num_examples=8)).train[0]
    completions = ["", example.text, "entirely different words"]
    prompt = Prompt(example, 0, (1,))
    rollouts = [Rollout(prompt, 0, (1,), text, (0.0,), False) for text in completions]
    expected = [persona_reward(example.columns, text) for text in completions]
    assert build(name="persona")(rollouts) == expected


# --- the judge -------------------------------------------------------------------------------

Answer = tuple[int, dict[str, str], str]


class Server:
    """Answers chat requests by a function of the question and of how often it has been asked."""

    def __init__(self, answer: Callable[[str, int], Answer]) -> None:
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.most_at_once = self.at_once = self.num_connections = 0
        lock = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"  # which keeps connections open

            def setup(handler) -> None:
                super().setup()
                with lock:
                    self.num_connections += 1

            def finish(handler) -> None:
                super().finish()
                with lock:
                    self.num_connections -= 1

            def do_POST(handler) -> None:
                body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
                question = body["messages"][0]["content"]
                with lock:
                    self.at_once += 1
                    self.most_at_once = max(self.most_at_once, self.at_once)
                    times = sum(r[2]["messages"][0]["content"] == question for r in self.requests)
                    self.requests.append((handler.path, dict(handler.headers), body))
                status, headers, text = answer(question, times)
                with lock:
                    self.at_once -= 1
                handler.send_response(status)
                for name, value in headers.items():
                    handler.send_header(name, value)
                handler.send_header("Content-Length", str(len(text.encode())))
                handler.end_headers()
                handler.wfile.write(text.encode())

            def log_message(handler, *_: Any, **__: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def say(text: str) -> Answer:
    return 200, {}, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    servers: list[Server] = []

    def start(answer: Callable[[str, int], Answer]) -> Server:
        servers.append(Server(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def judge_section(url: str, **settings: object) -> RewardConfig:
    defaults = {"template": "Rate {completion}", "model": "m", "pause_s": 0.01, "retries": 2}
    return RewardConfig.model_validate({"name": "judge", "url": url, **defaults, **settings})


def score(section: RewardConfig, *rollouts: Rollout) -> list[float]:
    with Scorer([(section, REGISTRY.reward(section))]) as scorer:
        (group,) = scorer.score([Group.sampled(rollouts)])
        return group.rewards.tolist()


def test_the_judge_is_asked_the_filled_template_and_answers_a_number(serve, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "sk-secret")
    server = serve(lambda question, _: say(f" Score: {len(question) % 10}/10.\n"))
    section = judge_section(
        server.url,
        template='{prompt}|{completion}|{user}|{taste}|{"json"}',
        api_key_env="SOME_KEY",
        parameters={"temperature": 0.5},
    )
    texts = [" {taste}", "{completion}"]
    rollouts = [rollout(text, text="{user} says {", taste="jazz") for text in texts]
    questions = [f'{{user}} says {{|{text}|u7|jazz|{{"json"}}' for text in texts]
    assert score(section, *rollouts) == [float(len(question) % 10) for question in questions]
    assert sorted(r[2]["messages"][0]["content"] for r in server.requests) == sorted(questions)
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer sk-secret"
    assert body["model"] == "m" and body["temperature"] == 0.5


def test_a_busy_server_is_asked_again(serve):
    def answer(question: str, times: int) -> Answer:
        if times < 2:
            return (429, {"Retry-After": "0"}, "busy") if times == 0 else (503, {}, "down")
        return say("7")

    server = serve(answer)
    assert score(judge_section(server.url), rollout("x"), rollout("y")) == [7.0, 7.0]
    assert len(server.requests) == 6


def test_pauses_grow_and_retry_after_is_kept(serve):
    times: list[float] = []

    def answer(question: str, count: int) -> Answer:
        times.append(time.monotonic())
        headers = {"Retry-After": "1"} if count == 2 else {}
        return (429, headers, "busy") if count < 3 else say("3")

    server = serve(answer)
    assert score(judge_section(server.url, retries=3, pause_s=0.1), rollout("x")) == [3.0]
    pauses = np.diff(times)
    assert pauses[0] >= 0.1 and pauses[1] >= 0.2 and pauses[2] >= 1.0


def test_concurrency_is_bounded(serve):
    def answer(question: str, times: int) -> Answer:
        time.sleep(0.05)
        return say("1")

    server = serve(answer)
    rollouts = [rollout(str(i)) for i in range(12)]
    assert score(judge_section(server.url, max_concurrency=3), *rollouts) == [1.0] * 12
    assert 2 <= server.most_at_once <= 3


def test_connections_are_kept_between_calls_and_closed_with_the_scorer(serve):
    server = serve(lambda *_: say("1"))
    section = judge_section(server.url, max_concurrency=2)
    judge = REGISTRY.reward(section)
    for _ in range(2):  # two event loops, one after the other
        with Scorer([(section, judge)]) as scorer:
            for _ in range(3):
                (group,) = scorer.score([Group.sampled([rollout("x"), rollout("y")])])
                assert group.rewards.tolist() == [1.0, 1.0]
            assert 1 <= server.num_connections <= 2
        deadline = time.monotonic() + 5
        while server.num_connections and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server.num_connections == 0


@pytest.mark.parametrize(
    ("reply", "reward"),
    [
        ("7", 7.0),
        ("7/10", 7.0),
        ("7.5 / 10", 7.5),
        ("I give it a 7.", 7.0),
        ("10/10", 10.0),
        ("-1", None),
        ("11", None),
        ("between 3 and 4", None),
        ("7/100", None),
        ("great", None),
        ("", None),
        ("GPT4 says nothing", None),
        ("1e5", None),
        ("nan", None),
    ],
)
def test_a_reply_holds_one_number_in_range_or_is_refused(serve, reply, reward):
    section = judge_section(serve(lambda *_: say(reply)).url)
    if reward is not None:
        assert score(section, rollout("x")) == [reward]
        return
    with pytest.raises(PluginError, match=r"'judge' failed .*expected one number from 0 to 10"):
        score(section, rollout("x"))


def test_one_garbage_reply_leaves_the_others_their_verdicts(serve):
    server = serve(lambda question, _: say("dunno" if "odd" in question else "2"))
    rollouts = [rollout("even"), rollout("odd"), rollout("even")]
    section = judge_section(server.url, on_error="no_reward")
    np.testing.assert_array_equal(score(section, *rollouts), [2.0, np.nan, 2.0])
    with pytest.raises(PluginError, match="completion 'odd': judge replied 'dunno'"):
        score(judge_section(server.url), *rollouts)


@pytest.mark.parametrize(
    "body", ["<html>", "[]", '{"choices": []}', '{"choices": [{"text": "7"}]}']
)
def test_an_answer_that_is_no_chat_completion_is_refused(serve, body):
    server = serve(lambda *_: (200, {}, body))
    with pytest.raises(PluginError, match="no chat completion"):
        score(judge_section(server.url), rollout("x"))


def test_an_unreachable_judge_is_named(serve):
    server = serve(lambda *_: say("7"))
    server.close()
    with pytest.raises(
        PluginError, match=rf"{server.url}.* cannot be reached: Connect.*3 attempts"
    ):
        score(judge_section(server.url), rollout("x"))


def everything_an_error_says(error: BaseException | None) -> str:
    said = ""
    while error is not None:
        said += f"{error} {error!r} {error.args} "
        error = error.__cause__ or error.__context__
    return said


@pytest.mark.parametrize("status", [200, 401, 429, 500])
def test_the_key_never_appears_in_errors(serve, monkeypatch, status):
    monkeypatch.setenv("SOME_KEY", "sk-secret")
    cut = "key" + "." * 192 + "sk-secret"
    for body in ("Incorrect API key: sk-secret", say("your key is sk-secret")[2], cut):
        server = serve(lambda *_, body=body: (status, {}, body))
        with pytest.raises(PluginError) as caught:
            score(judge_section(server.url, api_key_env="SOME_KEY"), rollout("x"))
        assert "sk-" not in everything_an_error_says(caught.value)
        assert "key" in str(caught.value)
        assert len(server.requests) == (1 if status in (200, 401) else 3)


def test_a_judge_is_checked_before_the_run(monkeypatch):
    url = "http://127.0.0.1:9/v1"
    monkeypatch.delenv("SOME_KEY", raising=False)
    with pytest.raises(ConfigError, match="SOME_KEY, named by api_key_env, is not set"):
        REGISTRY.reward(judge_section(url, api_key_env="SOME_KEY"))
    monkeypatch.setenv("SOME_KEY", "sk-\nsecret")
    with pytest.raises(ConfigError, match="SOME_KEY does not hold a key") as caught:
        REGISTRY.reward(judge_section(url, api_key_env="SOME_KEY"))
    assert "secret" not in str(caught.value)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"url": "localhost:8000"}, "http://"),
        ({"url": "http://me:sk-secret@host/v1"}, "api_key_env"),
        ({"template": "Rate {prompt}"}, r"\{completion\}"),
        ({"low": 5.0, "high": 5.0}, "expected low < high"),
        ({"max_concurrency": 0}, "max_concurrency"),
    ]
    for settings, complaint in cases:
        with pytest.raises(ConfigError, match=complaint) as caught:
            REGISTRY.reward(judge_section(**{"url": url, **settings}))
        assert "sk-secret" not in str(caught.value)


def test_an_unknown_word_in_the_template_is_named():
    section = judge_section("http://127.0.0.1:9/v1", template="{completion} {tast}")
    with pytest.raises(
        PluginError, match=r"template names \{tast\}.* completion, prompt, taste, user"
    ):
        score(section, rollout("x", taste="jazz"))
