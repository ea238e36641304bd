"""A model that several processes load, each its part of it: the same weights as one process has of it
whole, and never all of them in memory."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, SHAPE, processes, tiny_tokenizer
from transformers import AutoModelForCausalLM

from pgrpo.config.sections import ModelConfig, ParallelConfig
from pgrpo.model.language_model import (
    LanguageModel,
    _pretrained,
    has_fast_bf16,
    load_language_model,
    whole_tensor,
)
from pgrpo.train.parallel import connect


def model_folder(
    folder: Path, family: str = "smollm2", dtype: torch.dtype = torch.bfloat16, **saved: Any
) -> str:
    """A model with random weights, as transformers saves it."""
    config_class, model_class, extra = FAMILIES[family]
    torch.manual_seed(0)
    # Neither 48 nor 97 rows are shared evenly by five processes.
    model = model_class(config_class(**SHAPE, **extra)).to(dtype)
    model.save_pretrained(folder, **saved)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def everything(model: LanguageModel) -> dict[str, torch.Tensor]:
    """All that the model computes with."""
    whole = {name: whole_tensor(p) for name, p in model.model.named_parameters()}
    return whole | {name: b.clone() for name, b in model.model.named_buffers()}


def _load_in_child(config: ModelConfig, given: dict[str, Any], environment: dict[str, str]) -> None:
    os.environ |= environment
    torch.set_num_threads(1)
    with connect(ParallelConfig(timeout_s=60)) as ranks:
        model = load_language_model(config, mesh=ranks.mesh, **given)
        weights: list[Any] = list(model.model.parameters())
        found = {
            "all": everything(model),
            "saved": model.weights(keep=ranks.leads),
            "part": sum(w.to_local().numel() for w in weights) / sum(w.numel() for w in weights),
            "mapped": mapped_files(),
        }
        ranks.gather(list)
    torch.save(found, f"{environment['FOUND']}-{environment['RANK']}.pt")
    sys.exit(0)


def mapped_files() -> list[str]:
    """The model files that are mapped into this process."""
    if sys.platform != "linux":
        return []
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sorted({line.split()[-1] for line in lines if line.endswith(".safetensors")})


def load_on(size: int, folder: Path, config: ModelConfig, **given: Any) -> list[dict[str, Any]]:
    """What each of so many processes has of a model that all of them load."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    started = []
    for rank in range(size):
        environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        environment["FOUND"] = str(folder / "found")
        started.append(processes.Process(target=_load_in_child, args=(config, given, environment)))
        started[-1].start()
    for process in started:
        process.join(120)
    assert [process.exitcode for process in started] == [0] * size
    return [torch.load(folder / f"found-{rank}.pt") for rank in range(size)]


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # How the file is written, and the section [model].
    "wider than the file": ({}, {"precision": "autocast"}),
    "of several files": ({"max_shard_size": "20KB"}, {"precision": "fp32"}),
    "a buffer that is computed": ({"family": "gemma"}, {"precision": "fp32"}),
    "as the file": ({"dtype": torch.float32}, {"precision": "fp32"}),
    "bf16 as the file": ({"family": "qwen3"}, {"precision": "bf16"}),
    "narrower than the file": ({"dtype": torch.float32}, {"precision": "bf16"}),
    "half precision": ({"dtype": torch.float16}, {"precision": "fp32"}),
    "half precision as bf16": ({"dtype": torch.float16}, {"precision": "bf16"}),
    "new adapters": ({}, {"precision": "autocast", "lora": {"rank": 2}}),
    "new adapters to bf16": ({}, {"precision": "bf16", "lora": {"rank": 2}}),
}


@pytest.mark.parametrize("case", list(CASES))
def test_parts_are_those_of_the_whole(tmp_path: Path, case: str) -> None:
    saved, section = CASES[case]
    section = {"name": model_folder(tmp_path / "model", **saved), **section}
    config = ModelConfig.model_validate(section)
    expected = load_language_model(config, seed=3)
    size = 5 if case == "wider than the file" else 2
    found = load_on(size, tmp_path, config, seed=3)
    for each in found:
        assert_equal(each["all"], everything(expected))
        assert each["part"] <= 1.3 / size, "each process holds its part, one more row at most"
        assert each["mapped"] == []
    assert_equal(found[0]["saved"], expected.weights())
    assert [each["saved"] for each in found[1:]] == [{}] * (size - 1)


def test_adapters_of_a_checkpoint_are_put_beside_parts(tmp_path: Path) -> None:
    section = {"name": model_folder(tmp_path / "model"), "lora": {"rank": 2}}
    config = ModelConfig.model_validate({**section, "precision": "fp32"})
    trained = load_language_model(config)
    for parameter in trained.model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    trained.save(tmp_path / "saved", trained.weights())
    for each in load_on(2, tmp_path, config, weights=tmp_path / "saved"):
        assert_equal(each["all"], everything(trained))


def test_what_is_put_together_loads_as_the_model(tmp_path: Path) -> None:
    """Tied weights once, under the name that transformers looks for."""
    name = model_folder(tmp_path / "model")
    config = ModelConfig.model_validate({"name": name, "precision": "fp32"})
    (found, _) = load_on(2, tmp_path, config)
    model = load_language_model(config)
    model.save(tmp_path / "saved", found["saved"])
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    expected: Any = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    assert_equal(dict(loaded.named_parameters()), dict(expected.named_parameters()))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.skipif(sys.platform != "linux", reason="what a process has mapped is read from /proc")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_before_it_is_split_a_model_is_in_its_files(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = model_folder(tmp_path / "model", dtype=dtype, max_shard_size="20KB")
    model, _ = _pretrained(folder, None, torch.float32, is_split=True)
    ranges = [
        tuple(int(end, 16) for end in line.split()[0].split("-"))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(".safetensors")
    ]
    for name, parameter in model.named_parameters():
        assert any(start <= parameter.data_ptr() < end for start, end in ranges), name


@pytest.mark.parametrize(
    ("vendor", "flags", "fast"),
    [
        ("GenuineIntel", "avx512f avx512_bf16 amx_bf16 amx_tile", True),
        ("GenuineIntel", "avx512f avx512_bf16 avx512_fp16", False),
        ("AuthenticAMD", "avx512f avx512_bf16", True),
        ("AuthenticAMD", "avx2", False),
        ("0x41", "asimd bf16", True),
        ("0x41", "asimd", False),
    ],
)
def test_where_bf16_is_fast(vendor: str, flags: str, fast: bool) -> None:
    told = f"processor\t: 0\nvendor_id\t: {vendor}\nmodel name\t: Some CPU\nflags\t\t: {flags}\n"
    assert has_fast_bf16(told) == fast
