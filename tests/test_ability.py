"""General ability: what is measured against transformers' own forward passes, what is said of it against
SciPy, and a run that has both of its ends."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Tree, tiny_run, trace, train
from scipy import stats
from test_ranks import train_on
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

from pgrpo.cli import main
from pgrpo.errors import ModelError
from pgrpo.report import write_report
from pgrpo.report.ability import Change, changes
from pgrpo.rollout.prompts import token_ids
from pgrpo.runs.config import parse_config
from pgrpo.runs.folder import RunFolder
from pgrpo.runs.records import AbilityPart, AbilityRecord
from pgrpo.train import ability
from pgrpo.train.ability import (
    FORMATS,
    Question,
    continents,
    descriptions,
    follows,
    language_reference,
    measure_ability,
    sums,
)
from pgrpo.train.build import Assembly
from pgrpo.types import Example

Capture = pytest.CaptureFixture[str]


@cache
def rows(folder: Path) -> Tree:
    """Settings of a data set without a vocabulary, for which the tiny model reads bytes."""
    path = folder / "rows.jsonl"
    lines = [{"prompt": f"Say {n}:", "user": f"u{n % 4}", "answer": str(n % 3)} for n in range(16)]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return {
        "data": {"name": "jsonl", "path": str(path), "evaluation_share": 0.25},
        "rewards": [{"name": "regex", "pattern": "[a-z]"}],
        "clustering": {"name": "single"},
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows")


SHORT: Tree = {"run.num_steps": 2, "run.eval_every": 0, "optimizer.learning_rate": 0.3}
FEW = {"WINDOWS": 3, "SUMS": 8, "COUNTRIES": 3}
"""Items where it does not matter how many there are."""


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, number in FEW.items():
        monkeypatch.setattr(ability, name, number)


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        for name, number in FEW.items():
            patch.setattr(ability, name, number)
        changes = {**rows(folder), **SHORT, "run.ability": True}
        return train(tmp_path_factory.mktemp("run"), changes)


def assembly(folder: Path, changes: Mapping[str, Any] | None = None) -> Assembly:
    """Parts whose model has weights large enough to prefer something, which sample in another way than
    ability is measured."""
    sampled = {"generation.temperature": 0.5, "generation.top_k": 3, "generation.max_new_tokens": 2}
    parts = Assembly(parse_config(tiny_run({**rows(folder), **sampled, **(changes or {})})))
    with torch.no_grad():
        for parameter in parts.model.model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.2)
    return parts


class Plain:
    """The same weights in transformers' own model and attention."""

    def __init__(self, parts: Assembly, folder: Path) -> None:
        self.tokenizer: Any = parts.model.tokenizer
        bare = parts.model.model
        if hasattr(bare, "merge_and_unload"):
            bare = bare.merge_and_unload()  # type: ignore[operator]
        bare.save_pretrained(str(folder))
        self._model: Any = AutoModelForCausalLM.from_pretrained(str(folder)).eval()

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    @torch.no_grad()
    def logprobs(self, ids: Sequence[int]) -> np.ndarray:
        """[T - 1] of all tokens behind the first."""
        logits = self._model(input_ids=torch.tensor([list(ids)])).logits[0, :-1].double()
        return logits.log_softmax(-1)[range(len(ids) - 1), list(ids[1:])].numpy()

    def likeliest(self, question: Question) -> int:
        scores: list[float] = []
        for answer in question.answers:
            whole, own = self.ids(question.text + answer), len(self.ids(answer))
            scores.append(float(self.logprobs(whole)[-own:].sum()))
        return int(np.argmax(scores))


def windows(ids: Sequence[int]) -> list[Sequence[int]]:
    """Twelve windows of 128 tokens, as far apart as whole windows allow."""
    number = len(ids) // 128
    starts = [128 * round(n * (number - 1) / 11) for n in range(12)]
    return [ids[start : start + 128] for start in starts]


@pytest.mark.parametrize("lora", [False, True])
def test_all_is_as_transformers_own_forward_has_it(
    lora: bool, folder: Path, tmp_path: Path
) -> None:
    adapters: Tree = {"model.lora": {"rank": 4, "alpha": 8}} if lora else {}
    parts = assembly(folder, adapters)
    found = measure_ability(parts)
    plain = Plain(parts, tmp_path)
    texts = [*windows(plain.ids(descriptions())), *windows(plain.ids(language_reference()))]
    expected = [-float(plain.logprobs(ids).mean()) for ids in texts]
    assert found.text is not None and found.perplexity is not None
    assert found.text.values == pytest.approx(expected, abs=2e-4)
    assert found.text.value == pytest.approx(np.mean(expected), abs=2e-4)
    assert found.text.standard_error == pytest.approx(stats.sem(expected), rel=1e-2)
    assert math.log(found.perplexity) == pytest.approx(np.mean(expected), abs=2e-4)
    for part, questions in ((found.arithmetic, sums()), (found.continents, continents())):
        assert part is not None and part.num_items == len(questions) == len(part.values)
        some = range(0, len(questions), 7)
        right = [float(plain.likeliest(questions[n]) == questions[n].right) for n in some]
        assert [part.values[n] for n in some] == right
        assert 0 < sum(right) < len(right), "always right or wrong would show nothing"
        assert part.value == np.mean(part.values)
    assert found.formats is not None and found.formats.num_items == len(FORMATS)


def test_a_beginning_that_the_tokenizer_sets_is_read(folder: Path, tmp_path: Path) -> None:
    parts = assembly(folder)
    tokenizer: Any = parts.model.tokenizer
    tokenizer.bos_token = "<eos>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        "<eos> $A", None, [("<eos>", 1)]
    )
    found = measure_ability(parts)
    plain = Plain(parts, tmp_path)
    first = windows(plain.ids(descriptions()))[0]
    assert found.text is not None
    # All 128 tokens are read, the first one behind the beginning.
    expected = -float(plain.logprobs([1, *first]).mean())
    assert found.text.values[0] == pytest.approx(expected, abs=2e-4)


def test_completions_are_greedy_and_as_long_as_a_format_needs(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def note(_: object, completion: str) -> bool:
        seen.append(completion)
        return len(seen) % 3 == 0

    monkeypatch.setattr(ability, "follows", note)
    parts = assembly(folder)
    tokenizer: Any = parts.model.tokenizer
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
    )
    found = measure_ability(parts)
    assert found.formats is not None and found.formats.value == pytest.approx(1 / 3)
    assert found.formats.values == [0.0, 0.0, 1.0] * 4
    plain = Plain(parts, tmp_path)
    for form, completion in zip(FORMATS, seen, strict=True):
        ids = plain.ids(f"<user>{form.instruction}<assistant>")
        for _ in range(24):
            with torch.no_grad():
                logits = plain._model(input_ids=torch.tensor([ids])).logits[0, -1]
            ids = [*ids, int(logits.argmax())]
            if ids[-1] == 1:
                break
        start = len(plain.ids(f"<user>{form.instruction}<assistant>"))
        assert completion == tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_what_cannot_be_expressed_is_left_out(folder: Path) -> None:
    # Words of a generated language say nothing of all this.
    parts = Assembly(parse_config(tiny_run()))
    found = measure_ability(parts)
    assert (found.text, found.arithmetic, found.formats, found.continents) == (None,) * 4
    assert found.perplexity is None
    # And a model of few positions has no place for the longer ones.
    parts = assembly(folder)
    whole = measure_ability(parts)
    parts.model.num_positions = 60
    found = measure_ability(parts)
    assert found.text is None and found.continents is None
    assert found.arithmetic is not None and found.arithmetic.num_items == 120
    assert found.formats is not None and 0 < found.formats.num_items < len(FORMATS)
    assert whole.formats is not None and found.formats.asked != whole.formats.asked


def test_a_model_that_fell_apart_is_told(folder: Path, few: None) -> None:
    parts = assembly(folder)
    with torch.no_grad():
        parts.model.head.weight[5] = math.nan
    with pytest.raises(ModelError, match="not finite"):
        measure_ability(parts)


def test_sums_are_right_and_their_places_say_nothing() -> None:
    questions = sums()
    assert len({q.text for q in questions}) == 120
    for question in questions:
        asked = question.text.splitlines()[-1]
        match = re.fullmatch(r"(\d\d) ([+-]) (\d\d) =", asked)
        assert match is not None
        a, b = int(match[1]), int(match[3])
        answers = [int(answer) for answer in question.answers]
        assert answers[question.right] == (a + b if match[2] == "+" else a - b)
        assert all(10 <= n <= 99 for n in answers) and answers == sorted(set(answers))
        examples = question.text.splitlines()[:-1]
        assert all(eval(e.replace("=", "==")) for e in examples)
        assert not any(e.startswith(asked) for e in examples)
    places = Counter((q.right, "-" in q.text.splitlines()[-1]) for q in questions)
    assert set(places.values()) == {15}


def test_countries_lie_where_they_do() -> None:
    questions = continents()
    lies = {
        q.text.splitlines()[-1].removesuffix(" is a country in"): q.answers[q.right].strip()
        for q in questions
    }
    assert len(lies) == 96 and set(Counter(lies.values()).values()) == {24}
    known = {"Angola": "Africa", "Chad": "Africa", "Egypt": "Africa", "Spain": "Europe"}
    known |= {"Poland": "Europe", "Turkey": "Europe", "Cuba": "America", "Peru": "America"}
    assert {name: lies[name] for name in known} == known
    for question in questions:
        *examples, asked = question.text.splitlines()
        assert len(examples) == 4 and not any(e.startswith(asked) for e in examples)


def test_texts_are_prose() -> None:
    for text in (descriptions(), language_reference()):
        assert len(text) > 12 * 500, "enough for twelve windows of any tokenizer"
        letters = sum(c.isalpha() or c == " " for c in text)
        assert letters > 0.9 * len(text)
    assert "*****" not in language_reference() and "::=" not in descriptions()


FOLLOWED = (
    (["Paris", "Paris.", " Paris\n\nIt is in France."], ["It is Paris.", "", "75", "New York"]),
    (
        ["red, green, blue", "Red, green, and dark blue.", "red,green,blue"],
        ["red, green", "1. Red\n2. Blue", "red green blue", "The colours are red, green, blue"],
    ),
    (["HELLO", "HELLO!"], ["Hello", "HELLO is hello", "12", ""]),
    (["apple", "an apple."], ["Apple", "APPLE", "7"]),
    (
        ['{"name": "Jo"}', '```json\n{"name": 1}\n```', '{\n "name": null\n}'],
        ['{"age": 1}', '["name"]', '{"name": "Jo"', "name", "[" * 5000],
    ),
    (["7", "7.", "8"], ["3 + 4 = 7", "seven", "7 apples"]),
    (["yes", "Yes.", "NO!"], ["Yes, it is.", "maybe", ""]),
    (["- cat\n- dog", "-cat\n-dog"], ["cat\ndog", "- cat", "- cat\n- dog\n- cow", "--\n--"]),
    (["1. Rome\n2. Oslo", "1) Rome\n2) Oslo"], ["1. Rome", "Rome\nOslo", "2. Rome\n1. Oslo"]),
    (["How are you?", "Who?"], ["How are you", "?", "How are you? Fine."]),
    (
        ['"Good morning"', "“Good morning!”"],
        ["Good morning", '"Good morning', '"good" morning', ""],
    ),
    (["1 2 3 4 5", "1 2"], ["12345", "1, 2, 3", "one two", "1"]),
)


@pytest.mark.parametrize(
    ("form", "good", "bad"),
    [(f, good, bad) for f, (good, bad) in zip(FORMATS, FOLLOWED, strict=True)],
    ids=[f.instruction for f in FORMATS],
)
def test_formats(form: ability.Format, good: list[str], bad: list[str]) -> None:
    assert [answer for answer in good if not follows(form, answer)] == []
    assert [answer for answer in bad if follows(form, answer)] == []


def part(values: Sequence[float] | np.ndarray, asked: str = "same") -> AbilityPart:
    return AbilityPart(
        value=float(np.mean(values)),
        num_items=len(values),
        values=np.asarray(values, float).tolist(),
        asked=asked,
    )


def test_lost_is_what_two_paired_standard_errors_say() -> None:
    rng = np.random.default_rng(3)
    met: set[str] = set()
    for shift in np.linspace(-0.5, 0.5, 41):
        before = rng.normal(3, 1, 24)
        after = before + shift + rng.normal(0, 0.5, 24)
        right = (rng.random(60) < 0.5).astype(float)
        now = np.where(rng.random(60) < 0.2 + abs(shift), float(shift > 0), right)
        text, arithmetic = changes(
            AbilityRecord(step=0, text=part(before), arithmetic=part(right)),
            AbilityRecord(step=9, text=part(after), arithmetic=part(now)),
        )
        for change, t in (
            (text, stats.ttest_rel(after, before).statistic),
            (arithmetic, stats.ttest_rel(right, now).statistic),
        ):
            assert change.verdict == ("lost" if t > 2 else "no loss shown")
            met.add(f"{change.name} {change.verdict}")
    assert len(met) == 4


def test_only_what_asked_the_same_is_compared() -> None:
    x, y = part([1, 0, 1]), part([0, 0, 0], "other")
    of = [AbilityRecord(step=0, formats=x), AbilityRecord(step=1, formats=y, continents=x)]
    assert changes(*of) == [Change("formats", "2/3", "0/3", "not compared")]
    # All of them lost is a loss too, whose differences have no spread.
    ones = AbilityRecord(step=0, formats=part([1, 1, 1]))
    (change,) = changes(ones, AbilityRecord(step=1, formats=part([0, 0, 0])))
    assert change.verdict == "lost"


def records(run: Path) -> list[AbilityRecord]:
    return [record.model_copy(update={"seconds": None}) for record in RunFolder(run).ability]


def test_a_run_measures_both_of_its_ends_and_trains_as_without(
    run: Path, folder: Path, tmp_path: Path
) -> None:
    before, after = records(run)
    assert (before.step, after.step) == (0, 2)
    assert before.text and after.text and before.text.values != after.text.values
    assert trace_of(run) == trace_of(train(tmp_path, {**rows(folder), **SHORT}))


def trace_of(run: Path) -> Tree:
    if not (run / "evaluations.jsonl").exists():
        (run / "evaluations.jsonl").touch()
    return trace(run)


def test_a_run_that_goes_on_keeps_what_it_measured_first(
    run: Path, folder: Path, tmp_path: Path, few: None
) -> None:
    own = train(tmp_path, {**rows(folder), **SHORT, "run.ability": True})
    assert records(own) == records(run)
    # Killed after its last step and before it was measured.
    lines = (own / "ability.jsonl").read_text("utf-8").splitlines(keepends=True)
    (own / "ability.jsonl").write_text(lines[0] + lines[1][:40], encoding="utf-8")
    info = RunFolder(own).info()
    RunFolder(own).write_info(info.model_copy(update={"status": "running"}))
    assert main(["train", "--resume", str(own)]) == 0
    assert records(own) == records(run)
    assert main(["train", "--resume", str(own), "--set", "run.num_steps=3"]) == 0
    assert [record.step for record in records(own)] == [0, 2, 3]
    assert records(own)[:2] == records(run)


def test_one_line_of_the_report(run: Path, tmp_path: Path) -> None:
    found = changes(*records(run))
    assert [change.name for change in found] == [
        "perplexity",
        "arithmetic",
        "formats",
        "continents",
    ]
    line = f"General ability, before and after: {', '.join(map(str, found))}."
    assert line in write_report([run], tmp_path / "report.html").sentences
    page = (tmp_path / "report.html").read_text("utf-8")
    assert line in page and "General ability</h2>" in page
    assert found[0].verdict == "lost", "at this learning rate the model forgets"
    assert re.search(r"perplexity [\d,]+\.\d → [\d,]+\.\d \(lost\), arithmetic 0\.\d{3} → ", line)


def test_several_runs_say_how_many_lost_some(run: Path, tmp_path: Path) -> None:
    before, after = RunFolder(run).ability
    folders: list[Path] = []
    for seed, last in enumerate((after, replace_step(before, 2))):
        copy = tmp_path / f"seed-{seed}"
        copy.mkdir()
        for name in ("metrics.jsonl", "run.json", "config.toml"):
            text = (run / name).read_text("utf-8").replace("seed = 0", f"seed = {seed}")
            (copy / name).write_text(text, encoding="utf-8")
        RunFolder(copy).ability.append(before, last)
        folders.append(copy)
    said = write_report(folders, tmp_path / "both.html").sentences
    assert any(
        s.startswith("General ability was lost in 1 of 2 runs: perplexity in 1") for s in said
    )
    said = write_report(folders[1:], tmp_path / "one.html").sentences
    assert any("(lost)" not in s and "(no loss shown)" in s for s in said)


def replace_step(record: AbilityRecord, step: int) -> AbilityRecord:
    return record.model_copy(update={"step": step})


def test_evaluate_measures_a_checkpoint(run: Path, few: None, capsys: Capture) -> None:
    assert main(["evaluate", str(run), "--ability", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert {**said, "seconds": None} == records(run)[1].model_dump()
    assert main(["evaluate", str(run), "--ability"]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("general ability after step 2, ")
    for line, change in zip(lines, changes(*records(run)), strict=True):
        assert line.startswith(f"  {change.name} {change.after} (")
        assert line.endswith(f"; before {change.before}: {change.verdict}")
    assert main(["evaluate", str(run), "--ability", "--candidates", "2"]) == 2
    assert "--candidates varies held-out prompts" in capsys.readouterr().err


def test_instructions_are_asked_without_the_system_prompt_of_the_run(
    folder: Path, few: None
) -> None:
    template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    own = {"model.chat": True, "model.system_prompt": "Answer in one letter."}
    found: list[str | None] = []
    for settings in ({}, own):
        parts = assembly(folder)
        parts.model.tokenizer.chat_template = template
        model = parts.config.model.model_copy(
            update={key.partition(".")[2]: value for key, value in settings.items()}
        )
        parts.config = parts.config.model_copy(update={"model": model})
        if settings:
            ids = token_ids(Example("Hi", ""), parts.model.tokenizer, model)
            assert str(parts.model.tokenizer.decode(list(ids))).startswith("[system]Answer")
        formats = measure_ability(parts).formats
        found.append(formats and formats.asked)
    assert found[0] == found[1] is not None


def test_processes_that_share_a_model_share_the_work(folder: Path, tmp_path: Path) -> None:
    changes = {**rows(folder), **SHORT, "run.num_steps": 1, "run.ability": True}
    several = records(train_on(2, tmp_path / "several", changes))
    for found, expected in zip(several, records(train(tmp_path / "one", changes)), strict=True):
        assert found.step == expected.step
        for name in ("text", "arithmetic", "formats", "continents"):
            mine, theirs = getattr(found, name), getattr(expected, name)
            assert mine.asked == theirs.asked
            assert mine.values == pytest.approx(theirs.values, abs=1e-3)
