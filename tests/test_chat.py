"""`pgrpo chat`: asking a run's model as one of its users."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import train

from pgrpo.cli import main
from pgrpo.errors import ConfigError
from pgrpo.rewards.builtin import persona
from pgrpo.train.chat import Talk, talk
from pgrpo.types import Prompt, Rollout

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("run"), {"run.keep_best": True})


def chat(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture, typed: str, *words: str | Path
) -> list[str]:
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    assert main(["chat", *map(str, words)]) == 0
    return capsys.readouterr().out.splitlines()


def test_prompts_of_a_user_are_asked_and_scored(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    with talk(run, cluster="0", greedy=True) as talking:
        assert talking.held_out and {e.user for e in talking.examples} != {talking.user}
        example = talking.examples[1]
        reply = talking.example(1)
        assert talking.example(1 + len(talking.examples)) == reply
        rollout = Rollout(Prompt(example, 0, (1,)), 0, (1,), reply.completion, (0.0,), False)
        assert reply.prompt == example.text and reply.reward == persona([rollout])[0]
    said = chat(monkeypatch, capsys, "\n\n", run, "--user", example.user, "--greedy")
    assert (
        said[0].startswith("the model after step ") and f"asked as user {example.user}. " in said[0]
    )
    assert example.text in said
    assert f"> {reply.completion.strip()}   [reward {reply.reward:g}]" in said
    assert chat(monkeypatch, capsys, "\n\n", run, "--user", example.user, "--greedy") == said


def test_what_is_typed_is_asked_as_it_stands(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    words = (run, "--cluster", "1", "--best")
    said = chat(monkeypatch, capsys, "write about\\nfilms\n\nwrite\n", *words)
    assert len([line for line in said if line.startswith("> ")]) == 3
    assert "write about" not in said, "what one has typed is not said again"
    # A prompt that is no prompt is told, and the next one is asked.
    long = "word " * 5000
    assert len(chat(monkeypatch, capsys, f"{long}\nwrite\n", *words)) == 2


def test_typed_text_takes_no_prompts_place(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    with talk(run, cluster="0", greedy=True) as talking:
        first, second = (example.text for example in talking.examples[:2])
    said = chat(monkeypatch, capsys, "\nwrite\n\n", run, "--cluster", "0", "--greedy")
    assert [line for line in said[1:] if not line.startswith("> ")] == [first, second]


def test_a_user_without_prompts_is_told(run: Path) -> None:
    with talk(run, cluster="0") as talking:
        parts = talking._parts  # pyright: ignore[reportPrivateUsage]
        vars(parts)["dataset"] = replace(parts.dataset, train=[], evaluation=[])
        with pytest.raises(ConfigError, match=f"there is no prompt of user {talking.user!r}"):
            Talk(parts, 1, [talking.user], greedy=False)


def test_who_is_not_there_is_told(run: Path, capsys: Capture) -> None:
    for words, message in (
        ((), "chat needs --user ID or --cluster ID, one of them"),
        (("--user", "a", "--cluster", "b"), "chat needs --user ID or --cluster ID, one of them"),
        (("--user", "nobody"), "there is no user 'nobody' among "),
        (("--cluster", "9"), "there is no cluster '9'; expected one of "),
    ):
        assert main(["chat", str(run), *words]) == 2
        assert message in capsys.readouterr().err
