"""Checkpoints are whole or not there, damage is found, and transformers reads what is in them."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    PEAK,
    WITH_PEAK,
    grouped,
    install_plugin,
    processes,
    tiny_model,
    trace,
    train,
    write_config,
)
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from pgrpo.cli import main
from pgrpo.config.sections import LossConfig, ModelConfig, OptimizerConfig
from pgrpo.data.personas import VOCABULARY
from pgrpo.errors import CheckpointError, RunFolderError
from pgrpo.model.language_model import load_language_model
from pgrpo.rollout.engines.transformers import TransformersEngine
from pgrpo.rollout.seeds import derive_seed
from pgrpo.rollout.settings import GenerationConfig
from pgrpo.runs.folder import RunFolder
from pgrpo.train.build import Assembly
from pgrpo.train.checkpoint import (
    discard_partial,
    latest_checkpoint,
    list_checkpoints,
    save_checkpoint,
)
from pgrpo.train.policy import Policy
from pgrpo.types import Example, Prompt, Rollout

PROMPTS = [Prompt(Example("", "u"), 0, ids) for ids in ((5, 9, 4, 33), (8, 7))]


def make_policy(family: str = "smollm2", steps: int = 1) -> tuple[Policy, list[Rollout]]:
    model = tiny_model(family)
    policy = Policy(
        model,
        LossConfig(importance="off"),
        OptimizerConfig(learning_rate=1e-2),
        num_steps=10,
        temperature=1.0,
        max_new_tokens=4,
    )
    engine = TransformersEngine(GenerationConfig(max_new_tokens=4), model)
    rollouts = [r for group in engine.generate(PROMPTS, 3, seed=0) for r in group.rollouts]
    for _ in range(steps):
        update(policy, rollouts)
    return policy, rollouts


def update(policy: Policy, rollouts: list[Rollout]) -> None:
    advantages = torch.linspace(-1, 1, len(rollouts)).double().numpy()
    policy.update(grouped(rollouts, advantages), 1e-2)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("run"), {"run.keep_checkpoints": 2})


@pytest.fixture
def checkpoints(run: Path, tmp_path: Path) -> Path:
    """A copy of the run's checkpoints, to be damaged."""
    return Path(shutil.copytree(run / "checkpoints", tmp_path / "checkpoints"))


def test_the_newest_are_kept(run: Path) -> None:
    assert [c.step for c in list_checkpoints(run / "checkpoints")] == [3, 4]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "step-000003",
        "step-000004",
    ]


def test_nothing_in_a_folder_that_holds_none(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "missing") is None


def evaluations(run: Path) -> dict[int, float]:
    lines = (run / "evaluations.jsonl").read_text("utf-8").splitlines()
    return {record["step"]: record["reward"] for record in map(json.loads, lines)}


def test_the_best_is_kept_besides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    install_plugin(tmp_path / "site", PEAK)
    run = train(tmp_path, WITH_PEAK)
    # The untrained model's reward, of which there is no checkpoint, is higher, and that of step 6 equal.
    rewards = evaluations(run)
    assert rewards == pytest.approx(dict(enumerate([0.9, 0.2, 0.1, 0.1, 0.2, 0.7, 0.7])))
    best = 5
    assert [c.step for c in list_checkpoints(run / "checkpoints")] == [best, 6]
    plain = train(tmp_path / "plain", {**WITH_PEAK, "run.keep_best": False})
    assert [c.step for c in list_checkpoints(plain / "checkpoints")] == [6]
    assert trace(run) == trace(plain), "keeping it changes nothing else"

    capsys.readouterr()
    for options, step in (([], 6), (["--best"], best)):
        assert main(["evaluate", str(run), "--prompts", "8", "--json", *options]) == 0
        [result] = json.loads(capsys.readouterr().out)
        assert (result["step"], result["reward"]) == (step, rewards[step])
        out = tmp_path / f"model-{step}"
        assert main(["export", str(run), "--out", str(out), *options]) == 0
        capsys.readouterr()
        saved = run / "checkpoints" / f"step-{step:06d}" / "model" / "model.safetensors"
        assert (out / "model.safetensors").read_bytes() == saved.read_bytes()
        assert f"before training and after step {step}:" in (out / "README.md").read_text()

    assert main(["evaluate", str(plain), "--best"]) == 2
    assert capsys.readouterr().err == (
        f"pgrpo: {plain} has its best held-out reward after step {best}, and no checkpoint of that; "
        "run.keep_best = true keeps it\n"
    )
    damaged = run / "checkpoints" / f"step-{best:06d}"
    cut(damaged / "state.json")
    assert main(["export", str(run), "--out", str(tmp_path / "other"), "--best"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"pgrpo: checkpoint {damaged} is damaged: state.json has ")


def test_there_is_no_best_without_evaluations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(tmp_path, {"run.eval_every": 0})
    capsys.readouterr()
    assert main(["evaluate", str(run), "--best"]) == 2
    assert capsys.readouterr().err == (f"pgrpo: {run} has no checkpoint of an evaluated step yet\n")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


FILES = [
    "model/model.safetensors",
    "model/config.json",
    "model/tokenizer.json",
    "optimizer/shard-00001-model-00001-of-00001.safetensors",
    "state.json",
]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut, r"has (\d+) bytes, expected (\d+)"),
        (empty, r"has 0 bytes, expected \d+"),
        (flip, "does not match its checksum"),
        (Path.unlink, "is missing"),
    ],
)
def test_damage_is_found_and_named(
    checkpoints: Path, name: str, damage: Callable[[Path], None], words: str
) -> None:
    damage(checkpoints / "step-000004" / name)
    with pytest.raises(CheckpointError) as caught:
        latest_checkpoint(checkpoints)
    assert re.fullmatch(
        rf"checkpoint {checkpoints}/step-000004 is damaged: {name} {words}; move that folder away "
        "to go on from the one of step 3",
        str(caught.value),
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "manifest.json is missing"),
        ("", "manifest.json cannot be read"),
        ('{"state.json": {"bytes"', "manifest.json cannot be read"),
        ("[]", "manifest.json cannot be read"),
        ('{"state.json": 3, "optimizer/x": 3}', "manifest.json cannot be read"),
        ("\udcff", "manifest.json cannot be read"),
        ("{}", "manifest.json does not list optimizer/"),
    ],
)
def test_a_damaged_manifest_is_found(checkpoints: Path, text: str | None, words: str) -> None:
    manifest = checkpoints / "step-000004" / "manifest.json"
    if text is None:
        manifest.unlink()
    else:
        manifest.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=words):
        latest_checkpoint(checkpoints)


def test_the_advice_works(run: Path, tmp_path: Path) -> None:
    """Moving the damaged one away goes on from the one before, to the same end."""
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    info = json.loads((copy / "run.json").read_text("utf-8"))
    (copy / "run.json").write_text(json.dumps({**info, "status": "running"}), "utf-8")
    cut(copy / "checkpoints" / "step-000004" / "state.json")
    assert main(["train", "--resume", str(copy)]) == 2
    (copy / "checkpoints" / "step-000004").rename(tmp_path / "away")
    assert main(["train", "--resume", str(copy)]) == 0
    assert trace(copy) == trace(run)


def test_all_damaged_means_from_the_beginning(checkpoints: Path) -> None:
    shutil.rmtree(checkpoints / "step-000003")
    flip(checkpoints / "step-000004" / "state.json")
    with pytest.raises(CheckpointError, match="move that folder away to go on from the beginning"):
        latest_checkpoint(checkpoints)


def test_a_checkpoint_of_an_earlier_version_is_refused_by_what_it_lacks(
    run: Path, checkpoints: Path
) -> None:
    """As they were before users could be divided again."""
    earlier = list_checkpoints(checkpoints)[-1]
    file = earlier.path / "state.json"
    state = json.loads(file.read_text("utf-8"))
    for key in ("people", "assignment_version", "assignment"):
        del state[key]
    file.write_text(json.dumps(state), "utf-8")
    with pytest.raises(CheckpointError) as caught:
        assert Assembly(RunFolder(run).config(), earlier).members
    assert str(caught.value) == (
        f"{file} lacks 'people', 'assignment_version', 'assignment': an earlier version of pgrpo "
        "wrote it, and this one cannot go on from it"
    )


def test_what_a_killed_save_left_is_no_checkpoint(checkpoints: Path) -> None:
    shutil.copytree(checkpoints / "step-000004", checkpoints / ".partial-000005")
    found = latest_checkpoint(checkpoints)
    assert found is not None
    assert found.step == 4
    discard_partial(checkpoints)
    assert [c.step for c in list_checkpoints(checkpoints)] == [3, 4]
    assert not list(checkpoints.glob(".partial*"))


def test_the_optimizer_comes_back_bit_by_bit(tmp_path: Path) -> None:
    policy, rollouts = make_policy(steps=2)
    checkpoint = save_checkpoint(tmp_path, 2, policy, {}, keep=1)
    restored, _ = make_policy(steps=0)
    restored.model.model.load_state_dict(policy.model.model.state_dict())
    checkpoint.restore_optimizer(restored)
    for either in (policy, restored):
        update(either, rollouts)
    for name, parameter in policy.parameters.items():
        assert torch.equal(parameter, restored.parameters[name])
        for key, moment in policy.optimizer.state[parameter].items():
            assert torch.equal(moment, restored.optimizer.state[restored.parameters[name]][key])


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path, 1, make_policy("smollm2")[0], {}, keep=1)
    with pytest.raises(CheckpointError, match="does not fit the model: .* differs"):
        checkpoint.restore_optimizer(make_policy("qwen3", steps=0)[0])


def test_transformers_loads_the_model_and_computes_the_same(model, tmp_path: Path) -> None:
    policy = Policy(
        model,
        LossConfig(importance="off"),
        OptimizerConfig(),
        num_steps=1,
        temperature=1.0,
        max_new_tokens=4,
    )
    engine = TransformersEngine(GenerationConfig(max_new_tokens=4), model)
    rollouts = [r for group in engine.generate(PROMPTS, 3, seed=0) for r in group.rollouts]
    update(policy, rollouts)
    folder = save_checkpoint(tmp_path, 1, policy, {"x": 1}, keep=1).model
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, tensor in model.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    for rollout, logprobs in zip(
        rollouts, itertools.chain(*policy.logprobs(grouped(rollouts))), strict=True
    ):
        prompt, completion = rollout.prompt.token_ids, rollout.completion_ids
        with torch.no_grad():
            logits = loaded(torch.tensor([[*prompt, *completion]])).logits[0]
        expected = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        got = expected[range(len(completion)), list(completion)]
        torch.testing.assert_close(torch.from_numpy(logprobs).float(), got, rtol=1e-4, atol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("w5 w9 unheard").input_ids == [5, 9, 2]


def test_adapters_are_saved_as_peft_loads_them(tmp_path: Path) -> None:
    run = train(tmp_path, {"model.lora": {"rank": 2}})
    folder = run / "checkpoints" / "step-000004" / "model"
    base = load_language_model(
        ModelConfig(name="tiny"), vocabulary=VOCABULARY, seed=derive_seed(0, "weights")
    )
    base.model.set_attn_implementation("sdpa")  # ours takes packed groups only
    tokens = torch.tensor([[5, 9, 4, 33]])
    before = base.model(tokens).logits
    adapted = PeftModel.from_pretrained(base.model, str(folder))
    assert adapted.peft_config["default"].to_dict()["r"] == 2
    assert not torch.allclose(adapted(tokens).logits, before, atol=1e-3)
    with adapted.disable_adapter():
        assert torch.equal(adapted(tokens).logits, before)


# A disk that is full.


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk with room for one checkpoint of the tiny run, not for two."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1700k", "tmpfs", str(folder)]
    if os.name != "posix" or os.geteuid() or subprocess.run(command, check=False).returncode:
        pytest.skip("only an administrator can make a small disk")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_costs_nothing(
    small_disk: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = small_disk / "run"
    assert main(["train", str(write_config(tmp_path)), "--out", str(folder)]) == 2
    assert capsys.readouterr().err == (
        f"pgrpo: checkpoint of step 2 cannot be written in {folder}/checkpoints: the disk is full\n"
    )
    assert [c.step for c in list_checkpoints(folder / "checkpoints")] == [1]
    assert not list((folder / "checkpoints").glob(".partial*"))
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert main(["train", "--resume", str(folder)]) == 0
    assert trace(folder) == trace(run)


@pytest.mark.parametrize("room", [0, 1, 2, 3, 5, 8, 300])
def test_a_disk_that_is_full_sooner_or_later(
    small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], room: int
) -> None:
    """At some point something does not fit: config, logs, TensorBoard's events, report."""
    filler = os.open(small_disk / "filler", os.O_CREAT | os.O_WRONLY)
    with pytest.raises(OSError, match="No space left"):
        while True:
            os.write(filler, bytes(4096))
    os.ftruncate(filler, os.fstat(filler).st_size - room * 4096)
    os.close(filler)
    folder = small_disk / "run"
    changes = {"run.trackers": ["tensorboard"], "run.checkpoint_every": 10}
    assert main(["train", str(write_config(tmp_path, changes)), "--out", str(folder)]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"pgrpo: .*: the disk is full\n", error), error


def _save_under_a_limit(folder: Path) -> None:
    import resource

    policy, rollouts = make_policy()
    save_checkpoint(folder, 1, policy, {}, keep=1)
    update(policy, rollouts)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        save_checkpoint(folder, 2, policy, {}, keep=1)
    except RunFolderError as error:
        (folder / "said").write_text(str(error), "utf-8")


@pytest.mark.skipif(os.name != "posix", reason="there are no such limits")
def test_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    """safetensors reports the system's refusals in an error of its own."""
    process = processes.Process(target=_save_under_a_limit, args=(tmp_path,))
    process.start()
    process.join()
    said = (tmp_path / "said").read_text("utf-8")
    assert said.startswith(f"checkpoint of step 2 cannot be written in {tmp_path}: ")
    assert "File too large" in said
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1
    assert not list(tmp_path.glob(".partial*"))


def test_a_run_goes_on_and_is_measured_with_its_own_data_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"prompt": f"number {k} more", "user": f"u{k % 4}", "answer": "a", "choices": ["a", "b"]}
        for k in range(40)
    ]
    path = tmp_path / "rows.jsonl"

    def write(change: Callable[[dict[str, Any]], dict[str, Any]] = lambda row: row) -> None:
        path.write_text("".join(json.dumps(change(row)) + "\n" for row in rows), "utf-8")

    write()
    run = train(
        tmp_path,
        {
            "data": {
                "name": "jsonl",
                "path": str(path),
                "evaluation_share": 0.25,
                "choices_column": "choices",
            },
            "rewards": [{"name": "choice"}],
            "clustering": {"name": "random", "num_clusters": 2},
            "run.checkpoint_every": 1,
            "run.keep_checkpoints": 2,
        },
    )
    whole = trace(run)
    shutil.rmtree(run / "checkpoints" / "step-000004")
    info = run / "run.json"
    info.write_text(info.read_text("utf-8").replace('"finished"', '"running"'), "utf-8")
    for command in (["evaluate", str(run)], ["train", "--resume", str(run)]):
        for change in (
            lambda row: {**row, "prompt": " ".join(reversed(row["prompt"].split()))},
            lambda row: {**row, "answer": "b"},
            lambda row: {**row, "choices": ["b", "a"]},
        ):
            write(change)
            capsys.readouterr()
            assert main(command) == 2
            assert "data set jsonl gives other prompts, choices" in capsys.readouterr().err
        write()
        assert main(command) == 0
    assert trace(run) == whole, "nothing was lost"
