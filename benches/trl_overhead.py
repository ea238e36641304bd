"""What pgrpo adds to a step of TRL's trainer: the time spent in its own lines, within TRL's step.

SmolLM2-135M, as in step_vs_trl.py. Every call that pgrpo overrides is timed twice, around pgrpo's
override and around TRL's method within it; the difference is what pgrpo adds. The step is TRL's, from
`on_step_begin` to `on_step_end`. With --clusters many histories are there beforehand.

    python benches/trl_overhead.py --out benches/results/trl_overhead.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from step_vs_trl import MODEL, make_prompts, reward
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

import pgrpo
from pgrpo.integrations.trl import personalize
from pgrpo.model.gguf import model_folder
from pgrpo.runs.metrics import processor_name

TIMED = ("_calculate_rewards", "_generate_and_score_completions", "log")


class Clock(TrainerCallback):
    """Seconds of TRL's steps, of pgrpo's overrides and of TRL's methods within them."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.outside = self.inside = 0.0
        self._start = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps.append(time.perf_counter() - self._start)


def distinct(completions: list[str], **_: Any) -> list[float]:
    """The reward of step_vs_trl.py, as TRL calls it."""
    return reward(completions)


def timed(base: type[Any], clock: Clock, attribute: str) -> type[Any]:
    """A class whose calls of TIMED add their seconds to the clock's attribute."""

    def wrap(name: str) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return getattr(super(made, self), name)(*args, **kwargs)
            finally:
                clock.__dict__[attribute] += time.perf_counter() - start

        return call

    made = type(f"Timed{base.__name__}", (base,), {name: wrap(name) for name in TIMED})
    return made


def main() -> None:
    """Train some steps, print the share, and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--clusters", type=int, default=1000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    prompts = make_prompts(8, 137)
    folder = model_folder(MODEL)
    clock = Clock()
    normalizer = pgrpo.ClusterNormalizer("pgrpo")
    normalizer.update(
        np.random.default_rng(0).normal(size=options.clusters), range(options.clusters)
    )
    rows = [{"prompt": p, "cluster_id": i % options.clusters} for i, p in enumerate(prompts)]
    trainer = timed(personalize(timed(GRPOTrainer, clock, "inside")), clock, "outside")(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype="float32"),
        processing_class=AutoTokenizer.from_pretrained(folder, padding_side="left"),
        reward_funcs=distinct,
        train_dataset=Dataset.from_list(rows),
        normalizer=normalizer,
        callbacks=[clock],
        args=GRPOConfig(
            output_dir=tempfile.mkdtemp(),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            per_device_train_batch_size=64,
            num_generations=8,
            max_completion_length=8,
            max_steps=options.steps,
        ),
    )
    trainer.train()
    # _calculate_rewards is called within _generate_and_score_completions, so both sums hold it twice.
    added = (clock.outside - clock.inside) / len(clock.steps)
    step = statistics.median(clock.steps)
    result = {
        "processor": processor_name(),
        "clusters": options.clusters,
        "step_s": step,
        "added_s": added,
        "added_share": added / step,
        "steps": len(clock.steps),
    }
    print(json.dumps(result, indent=2))
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
