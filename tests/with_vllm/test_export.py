"""Exported models in vLLM, by a process that has no pgrpo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Tree, write
from transformers import AutoModelForCausalLM, AutoTokenizer

from pgrpo.cli import main

PROMPT = "w1 w2 w5 says the user"

GENERATES = """
import json, sys
sys.modules["pgrpo"] = None
from vllm import LLM, SamplingParams
model = LLM(
    model=sys.argv[1], dtype="float32", max_model_len=128, enforce_eager=True, block_size=32,
    enable_chunked_prefill=False, max_num_batched_tokens=256, seed=0,
)
asked = SamplingParams(temperature=0.0, max_tokens=6, logprobs=0, ignore_eos=True)
(said,) = model.generate([sys.argv[2]], asked)
(completion,) = said.outputs
logprobs = [at[token].logprob for token, at in zip(completion.token_ids, completion.logprobs)]
print("SAID " + json.dumps([list(said.prompt_token_ids), list(completion.token_ids), logprobs]))
"""


@pytest.mark.parametrize("adapters", [False, True])
def test_vllm_loads_what_a_run_exports(tmp_path: Path, adapters: bool) -> None:
    changes: Tree = {
        "generation": {"group_size": 4},
        "run.num_steps": 2,
        "optimizer.learning_rate": 1e-2,
        **({"model.lora": {"rank": 4}} if adapters else {}),
    }
    config, run, out = write(tmp_path, changes), tmp_path / "run", tmp_path / "model"
    assert main(["train", str(config), "--out", str(run)]) == 0
    assert main(["export", str(run), "--out", str(out), *(["--merge"] if adapters else [])]) == 0
    # vLLM has plugins of its own, of which pgrpo is one.
    quiet = {
        "VLLM_PLUGINS": "",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", GENERATES, out, PROMPT],
        env={**os.environ, **quiet},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("SAID "))
    prompt, completion, logprobs = json.loads(line.removeprefix("SAID "))

    model: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(out)
    assert prompt == tokenizer(PROMPT).input_ids
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    assert logits.argmax(-1).tolist() == completion
    expected = logits.log_softmax(-1).max(-1).values
    torch.testing.assert_close(torch.tensor(logprobs), expected, atol=1e-4, rtol=0)
