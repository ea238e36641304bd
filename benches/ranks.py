r"""The same run on 1, 2 and 4 processes: traces and histories beside each other.

torchrun starts the processes of two runs in float32: the tiny model on the personas, whose five groups
a step no number of processes shares evenly, and SmolLM2-135M on the electricity panel. What is told of
a step is the difference from one process: of the loss in units of the largest loss of the run, for some
losses are nothing but rounding, and of the gradient norm in units of itself.

    OMP_NUM_THREADS=1 python benches/ranks.py --out benches/results/ranks.json \
      --figure docs/images/ranks.svg
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import history

from pgrpo.report.figures import ARM_COLORS
from pgrpo.runs.folder import RunFolder
from pgrpo.runs.metrics import processor_name
from pgrpo.train.checkpoint import latest_checkpoint

SIZES = 1, 2, 4
FLOOR = 1e-9
"""Where differences of zero are drawn, which a logarithmic axis has no place for."""
TINY = """
run = { num_steps = 24, prompts_per_step = 5, eval_every = 0 }
model = { name = "tiny", precision = "fp32" }
data = { name = "personas" }
clustering = { name = "column", column = "persona" }
rewards = [{ name = "persona" }]
generation = { group_size = 4 }
"""
SMOLLM2 = (
    *("run.num_steps=8", "run.prompts_per_step=8", "run.eval_every=0", "model.precision=fp32"),
    *("generation.group_size=4", "optimizer.warmup_steps=2"),
)


def train(size: int, config: Path, changes: tuple[str, ...], folder: Path) -> dict[str, Any]:
    """The traces of a run, and the histories that it ends with."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(size)] if size > 1 else []
    options = [argument for change in changes for argument in ("--set", change)]
    start = time.monotonic()
    subprocess.run(
        [
            *(sys.executable, *launcher, "-m", "pgrpo", "train", str(config), "--out", str(folder)),
            *(*options, "--quiet"),
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    seconds = time.monotonic() - start
    saved = latest_checkpoint(RunFolder(folder).checkpoints)
    assert saved is not None
    metrics = RunFolder(folder).metrics
    return {
        "processes": size,
        "seconds": round(seconds, 1),
        "reward": [record.reward for record in metrics],
        "loss": [record.loss for record in metrics],
        "grad_norm": [record.grad_norm for record in metrics],
        "normalizer": saved.state()["normalizer"],
    }


def compare(runs: list[dict[str, Any]]) -> None:
    """Put beside the traces of each run how far they are from those of one process."""
    one = runs[0]
    normalizer = one["normalizer"]
    largest = max(map(abs, one["loss"]))
    for run in runs:
        run["rewards_equal"] = run["reward"] == one["reward"]
        run["histories_equal"] = run.pop("normalizer") == normalizer
        run["loss_error"] = [
            abs(mine - theirs) / largest
            for mine, theirs in zip(run["loss"], one["loss"], strict=True)
        ]
        run["grad_norm_error"] = [
            abs(mine - theirs) / theirs
            for mine, theirs in zip(run["grad_norm"], one["grad_norm"], strict=True)
        ]


def draw(result: dict[str, Any], path: Path) -> None:
    """All traces, and below them their differences from one process."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(3, 2, figsize=(11, 8), sharex="col", layout="constrained")
    for (rewards, norms, errors), (name, runs) in zip(
        panels.T, result["runs"].items(), strict=True
    ):
        for run, color, width in zip(runs, ARM_COLORS, (7.0, 3.5, 1.0), strict=False):
            size = run["processes"]
            label = f"{size} {'process' if size == 1 else 'processes'}"
            steps = range(1, len(run["reward"]) + 1)
            # The later a run the thinner, for all of them lie on each other.
            rewards.plot(steps, run["reward"], color=color, linewidth=width, label=label)
            norms.plot(steps, run["grad_norm"], color=color, linewidth=width, label=label)
            if size > 1:
                for key, words, style in (
                    ("loss_error", "loss", "o-"),
                    ("grad_norm_error", "gradient norm", "x--"),
                ):
                    found = [max(error, FLOOR) for error in run[key]]
                    errors.plot(steps, found, style, color=color, label=f"{words}, {label}")
        rewards.set(title=f"{name}: reward")
        norms.set(title="gradient norm", yscale="log")
        errors.set(title=f"difference from one process (at {FLOOR:g}: none)", xlabel="step")
        errors.set(yscale="log", ylim=(FLOOR / 2, 3e-5))
        errors.axhline(1e-5, color="k", linewidth=1, label="1e-5")
        for axes in (rewards, norms, errors):
            axes.grid(alpha=0.3)
            axes.legend(fontsize="x-small", ncols=2)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Run all, print, write and draw them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    runs: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        tiny = Path(scratch) / "tiny.toml"
        tiny.write_text(TINY, "utf-8")
        electricity = history.ROOT / "examples" / "electricity.toml"
        for name, config, changes in (
            ("tiny model", tiny, ()),
            ("SmolLM2-135M", electricity, SMOLLM2),
        ):
            runs[name] = [
                train(size, config, changes, Path(scratch) / f"{config.stem}-{size}")
                for size in SIZES
            ]
            compare(runs[name])
            for run in runs[name]:
                print(
                    f"{name}, {run['processes']}: {run['seconds']} s; rewards equal: "
                    f"{run['rewards_equal']}; histories equal: {run['histories_equal']}; loss off by "
                    f"{max(run['loss_error']):.1e}, gradient norm by {max(run['grad_norm_error']):.1e}",
                    flush=True,
                )
    result = {"date": history.today(), "processor": processor_name(), "runs": runs}
    ratios = {
        f"seconds of {name}, {run['processes']} processes against one": run["seconds"]
        / runs[name][0]["seconds"]
        for name in runs
        for run in runs[name][1:]
    }
    if options.out:
        history.write(options.out, "ranks", result, ratios)
    if options.figure:
        draw(result, options.figure)


if __name__ == "__main__":
    main()
