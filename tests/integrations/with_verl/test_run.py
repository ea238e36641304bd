"""`python -m verl.trainer.main_ppo`, as a user calls it, from a data set to a checkpoint on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pgrpo.integrations.saved import read_histories

HERE = Path(__file__).parent
WORDS = 40
CLUSTERS = ["c0", "c1", "c2", "c0", "c0", "c1", "c2", "c0"]
"""Of the rows of the data set: two batches of four are an epoch."""
SAMPLES = 4
STEPS = 4

REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info, **_):
    if extra_info["index"] == 6:
        return float("nan")
    scale = 10.0 if extra_info["user"] == "c1" else 1.0
    return scale * sum(int(word[1:]) % 2 == 0 for word in solution_str.split())
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model of two layers, its tokenizer, a data set and a reward function."""
    torch.manual_seed(0)
    names = ["<pad>", "<eos>", *(f"w{i}" for i in range(WORDS))]
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(names),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=1,
        )
    ).save_pretrained(tmp_path / "model")
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(tmp_path / "model")
    Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"w{i} w{i % 7}"}],
                "data_source": "words",
                "reward_model": {"style": "rule", "ground_truth": ""},
                "extra_info": {"index": i, "user": cluster},
                "cluster_id": cluster,
            }
            for i, cluster in enumerate(CLUSTERS)
        ]
    ).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "reward.py").write_text(REWARD)
    return tmp_path


def run(folder: Path, *overrides: str) -> list[dict[str, Any]]:
    """What a run logs of its steps."""
    settings = {
        "algorithm.adv_estimator": "pgrpo",
        "trainer.v1.trainer_mode": "pgrpo_sync",
        "data.train_files": folder / "rows.parquet",
        "data.val_files": folder / "rows.parquet",
        "data.train_batch_size": 4,
        "data.max_prompt_length": 8,
        "data.max_response_length": 4,
        "data.dataloader_num_workers": 0,
        "reward.num_workers": 1,
        "reward.custom_reward_function.path": folder / "reward.py",
        "actor_rollout_ref.model.path": folder / "model",
        "actor_rollout_ref.model.use_remove_padding": False,
        "actor_rollout_ref.model.enable_gradient_checkpointing": False,
        "+actor_rollout_ref.model.override_config.attn_implementation": "eager",
        "actor_rollout_ref.actor.strategy": "fsdp2",
        "actor_rollout_ref.actor.fsdp_config.dtype": "float32",
        "actor_rollout_ref.actor.fsdp_config.use_torch_compile": False,
        "actor_rollout_ref.actor.use_torch_compile": False,
        "actor_rollout_ref.actor.optim.lr": 0.01,
        "actor_rollout_ref.actor.ppo_mini_batch_size": 4,
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": 4,
        "actor_rollout_ref.rollout.name": "cpu",
        "actor_rollout_ref.rollout.n": SAMPLES,
        "actor_rollout_ref.rollout.load_format": "auto",
        "actor_rollout_ref.rollout.agent.num_workers": 1,
        "actor_rollout_ref.rollout.tensor_model_parallel_size": 1,
        "actor_rollout_ref.rollout.n_gpus_per_node": 1,
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu": 4,
        "transfer_queue.backend.SimpleStorage.num_data_storage_units": 1,
        "ray_kwargs.ray_init.num_cpus": 8,
        "+ray_kwargs.ray_init.num_gpus": 1,
        "+ray_kwargs.ray_init.include_dashboard": False,
        "+ray_kwargs.ray_init.object_store_memory": 200 * 2**20,
        "trainer.logger": "[file]",
        "trainer.device": "cpu",
        "trainer.nnodes": 1,
        "trainer.n_gpus_per_node": 1,
        "trainer.val_before_train": True,
        "trainer.test_freq": 2,
        "trainer.save_freq": 2,
        "trainer.total_epochs": 10,
        "trainer.total_training_steps": STEPS,
        "trainer.default_local_dir": folder / "checkpoints",
    }
    environment = {
        **os.environ,
        "PYTHONPATH": str(HERE),
        "VERL_USE_EXTERNAL_MODULES": "cpu_verl",
        "VERL_ENGINE_DEVICE": "cuda",  # that of verl's FSDP engine, which runs on a CPU as well
        "VERL_FILE_LOGGER_PATH": str(folder / "log.jsonl"),
    }
    command = [sys.executable, "-m", "verl.trainer.main_ppo"]
    done = subprocess.run(
        [*command, *(f"{name}={value}" for name, value in settings.items()), *overrides],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def counts(logged: list[dict[str, Any]]) -> dict[str, int]:
    """Rewards in the histories, after the last step."""
    last: dict[str, float] = logged[-1]["data"]
    return {
        name.split("/")[1]: int(value)
        for name, value in last.items()
        if name.endswith("/history_count")
    }


def test_a_run_learns_with_histories_and_goes_on_where_it_was_stopped(folder: Path) -> None:
    logged = run(folder, "+algorithm.pgrpo.min_count=8")
    assert [line["step"] for line in logged] == list(range(STEPS + 1))
    assert all(line["data"]["actor/grad_norm"] > 0 for line in logged[1:])
    # Two epochs of training and none of the three validations; the seventh row has no reward.
    rows = Counter(CLUSTERS[:6] + CLUSTERS[7:])
    expected = {name: 2 * SAMPLES * count for name, count in rows.items()}
    assert counts(logged) == expected
    whole = read_histories(folder / "checkpoints" / "global_step_4").snapshot()
    assert {name: history.count for name, history in whole.items()} == expected
    assert logged[-1]["data"]["clusters/c1/history_mean"] == whole["c1"].mean
    half = read_histories(folder / "checkpoints" / "global_step_2").state_dict()

    # As a job leaves it that is killed before its fourth step is saved.
    (folder / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("2")
    again = run(folder, "+algorithm.pgrpo={min_count: 8, cluster_key: extra_info.user}")
    assert [line["step"] for line in again] == [2, 3, 4]
    assert read_histories(folder / "checkpoints" / "global_step_2").state_dict() == half
    assert counts(again) == expected
