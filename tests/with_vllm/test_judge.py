"""`pgrpo judge` with a language model of vLLM's own server as the judge."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import tomli_w
from conftest import Tree, train
from models import SMOLLM2
from serving import START_S

from pgrpo.cli import main
from pgrpo.model.gguf import model_folder

NUM_PROMPTS = 6


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server of SmolLM2-135M-Instruct."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log.txt"
    # What `vllm serve` runs; the command itself is missing from builds for a CPU.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", model_folder(SMOLLM2), "--served-model-name", "smollm2"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--max-model-len", "2048", "--enforce-eager", "--no-enable-chunked-prefill"]
    command += ["--max-num-batched-tokens", "4096", "--kv-cache-memory-bytes", str(2**29)]
    with open(log, "wb") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=file,
            env={**os.environ, "VLLM_PLUGINS": "", "VLLM_NO_USAGE_STATS": "1"},
        )
    address = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + START_S
    try:
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            try:
                if httpx.get(f"{address}/health", timeout=5).is_success:
                    break
            except httpx.TransportError:
                time.sleep(0.5)
        yield f"{address}/v1"
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return train(folder / "one"), train(folder / "other", {"run.seed": 1})


def judged(runs: tuple[Path, Path], out: Path, url: str, **rubric: bool) -> Tree:
    structured = rubric.pop("structured")
    tree: Tree = {
        "num_prompts": NUM_PROMPTS,
        "max_unreadable": 1.0,
        "endpoint": {
            "url": url,
            "model": "smollm2",
            "structured": structured,
            # Beside other work on few cores it may take longer for twelve questions at once than 30 s.
            "request_timeout_s": 200.0,
            "parameters": {"temperature": 0.0, "max_tokens": 48},
        },
        "rubric": {"person": "{persona}", **rubric},
        "prices": {"prompt": 0.1, "completion": 0.4},
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    path = out.with_suffix(".toml")
    path.write_text(tomli_w.dumps(tree))
    assert main(["judge", *map(str, runs), "--judge", str(path), "--out", str(out)]) == 0
    return json.loads((out / "judge.json").read_text())


def opinions(out: Path) -> list[Tree]:
    return [json.loads(line) for line in (out / "opinions.jsonl").read_text().splitlines()]


def test_a_form_is_kept_to(runs: tuple[Path, Path], tmp_path: Path, url: str) -> None:
    out = tmp_path / "out"
    record = judged(runs, out, url, structured=True, reason=False)
    said = opinions(out)
    # Even a model of this size, which would not keep to it by itself.
    assert {tuple(json.loads(one["reply"])) for one in said} == {("winner",)}
    assert all(one["side"] == json.loads(one["reply"])["winner"] for one in said)
    assert len(said) == 2 * (record["num_pairs"] - record["num_identical"]) > 0
    assert record["num_unreadable"] == record["num_failed"] == 0
    assert record["overall"]["num_pairs"] == NUM_PROMPTS
    used = record["usage"]
    assert used["prompt_tokens"] > 100 * len(said) and used["completion_tokens"] >= 5 * len(said)
    cost = (0.1 * used["prompt_tokens"] + 0.4 * used["completion_tokens"]) / 1e6
    assert used["cost"] == pytest.approx(cost)


def test_without_a_form_replies_are_read_as_they_are(
    runs: tuple[Path, Path], tmp_path: Path, url: str
) -> None:
    out = tmp_path / "out"
    record = judged(runs, out, url, structured=False, reason=True)
    said = opinions(out)
    assert said and all(one["reply"] for one in said)
    unread = sum(one["side"] is None for one in said)
    assert (unread > 0) == (record["num_unreadable"] > 0)
    assert record["overall"]["num_pairs"] + record["num_unreadable"] == NUM_PROMPTS


def test_what_the_server_refuses_for_its_length_is_told(
    runs: tuple[Path, Path], tmp_path: Path, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tree: Tree = {
        "num_prompts": 6,
        "endpoint": {"url": url, "model": "smollm2", "parameters": {"max_tokens": 4000}},
    }
    path = tmp_path / "judge.toml"
    path.write_text(tomli_w.dumps(tree))
    arguments = [*map(str, runs), "--judge", str(path), "--out", str(tmp_path / "out")]
    assert main(["judge", *arguments]) == 2
    assert "answered 400" in capsys.readouterr().err
