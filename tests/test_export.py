"""Models that a run hands on: loaded by transformers and peft without pgrpo, on any machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import train
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pgrpo.cli import main
from pgrpo.runs.folder import RunFolder
from pgrpo.train.build import Assembly
from pgrpo.train.checkpoint import latest_checkpoint

Capture = pytest.CaptureFixture[str]

LOADS = """
import sys
sys.modules["pgrpo"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer("the night is long", return_tensors="pt").input_ids
torch.save((ids, model(ids).logits), sys.argv[2])
"""


def logits_elsewhere(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """What a process without pgrpo makes of a folder."""
    out = folder.with_suffix(".pt")
    subprocess.run([sys.executable, "-c", LOADS, folder, out], check=True)
    return torch.load(out)


def adapted(run: Path) -> dict[str, torch.Tensor]:
    """The weights that adapters are part of, by their definition: W + alpha / r * B A."""
    config = RunFolder(run).config()
    assert config.model.lora is not None
    scale = config.model.lora.alpha / config.model.lora.rank
    checkpoint = latest_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    adapters = load_file(checkpoint.model / "adapter_model.safetensors")
    with Assembly(
        config.model_copy(update={"model": config.model.model_copy(update={"lora": None})})
    ) as parts:
        base = dict(parts.model.model.named_parameters())
    found: dict[str, torch.Tensor] = {}
    for name in adapters:
        if name.endswith("lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            product = adapters[name.replace("lora_A", "lora_B")] @ adapters[name]
            assert product.abs().max() > 0
            found[f"{module}.weight"] = base[f"{module}.weight"].detach() + scale * product
    return found


@pytest.mark.parametrize("lora", [False, True])
def test_an_exported_model_is_the_runs(tmp_path: Path, capsys: Capture, lora: bool) -> None:
    changes = {"model.lora": {"rank": 2}, "optimizer.learning_rate": 0.1} if lora else {}
    run, out = train(tmp_path, changes), tmp_path / "model"
    assert main(["export", str(run), "--out", str(out), *(["--merge"] if lora else [])]) == 0
    assert capsys.readouterr().out.endswith(
        f"{out} holds the model; {out / 'README.md'} tells of it\n"
    )
    ids, found = logits_elsewhere(out)
    if lora:
        weights = load_file(out / "model.safetensors")
        for name, expected in adapted(run).items():
            torch.testing.assert_close(weights[name], expected, rtol=1e-5, atol=1e-6)
    else:
        checkpoint = latest_checkpoint(run / "checkpoints")
        assert checkpoint is not None
        policy = AutoModelForCausalLM.from_pretrained(checkpoint.model)
        torch.testing.assert_close(found, policy(ids).logits.detach())
    assert "adapter_config.json" not in {path.name for path in out.iterdir()}
    umask = os.umask(0o022)
    os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in out.rglob("*") if path.is_file()} == {
        0o666 & ~umask
    }
    card = (out / "README.md").read_text("utf-8")
    last = json.loads((run / "evaluations.jsonl").read_text().splitlines()[-1])
    for name, values in last["clusters"].items():
        assert f"| {name} | " in card and f" {values['reward']:.3f} |" in card
    assert f"| all |  |  | {last['num_prompts']} |" in card and "```toml" in card
    assert str(tmp_path) not in card

    assert main(["export", str(run), "--out", str(out)]) == 2
    assert f"{out} exists already; expected a folder to be made" in capsys.readouterr().err


def test_what_cannot_be_loaded_elsewhere_is_refused(tmp_path: Path, capsys: Capture) -> None:
    run = train(tmp_path, {"model.lora": {"rank": 2}})
    assert main(["export", str(run), "--out", str(tmp_path / "model")]) == 2
    assert "adapters to tiny, which whoever loads them cannot fetch" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run.toml"]
    assert main(["export", str(tmp_path), "--out", str(tmp_path / "model")]) == 2
    assert "is not a run folder" in capsys.readouterr().err
