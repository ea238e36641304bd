r"""The update's share of the machine's own speed of matrix products, in the same precision.

SmolLM2-135M learns from 8 prompts x 8 completions of 8 tokens. An update's FLOPs are those of its
matrix products, forward and backward, as `pgrpo plan` counts them: attention over the whole square
and once (blocks leave out what causality hides, and the backward pass computes their scores again), no
norms, no softmax, no optimizer. The machine's
speed is that of one large product of square matrices, measured before and after each update on as many
threads.

    python benches/step.py --out benches/results/step.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import history
import torch
from plan import GROUP_SIZE, MODEL, Inner, Run, setup

from pgrpo.config.sections import ModelConfig
from pgrpo.experiments.cost import DEVICES, step
from pgrpo.model.language_model import load_language_model
from pgrpo.model.shape import shape_of
from pgrpo.runs.metrics import processor_name

PROMPTS, COMPLETION_TOKENS = 8, 8
PROMPT_TOKENS = 128, 256, 512
SIDE = 2048
"""Of the matrices whose product is the machine's speed."""


def own_speed(dtype: torch.dtype) -> float:
    """FLOP/s of a product of two square matrices."""
    left, right = (torch.randn(SIDE, SIDE).to(dtype) for _ in range(2))
    torch.mm(left, right)
    start = time.perf_counter()
    for _ in range(3):
        torch.mm(left, right)
    return 3 * 2.0 * SIDE**3 / (time.perf_counter() - start)


def measure(precision: str, prompt_tokens: int, repeats: int) -> dict[str, Any]:
    """The share of one precision and length of prompts: medians over updates."""
    model = load_language_model(ModelConfig.model_validate({"name": MODEL, "precision": precision}))
    point = prompt_tokens, COMPLETION_TOKENS
    wanted = setup(point, precision, PROMPTS)
    parts = step(shape_of(model.model), wanted, DEVICES["h100"], 1.0)
    flops = sum(part.flops for part in parts if part.name.startswith("update"))
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    run = Run(model, point, PROMPTS)
    run.update()
    shares: list[float] = []
    speeds: list[float] = []
    seconds: list[dict[str, float]] = []
    before = own_speed(dtype)
    for _ in range(repeats):
        inner = Inner(time.perf_counter)
        with run.timing(inner):
            start = time.perf_counter()
            run.update()
            took = time.perf_counter() - start
        after = own_speed(dtype)
        speeds.append((before + after) / 2)
        shares.append(flops / took / speeds[-1])
        forward = inner.seconds["hidden"] + inner.seconds["_chunk_logprobs"]
        optimizer = sum(inner.seconds[n] for n in ("zero_grad", "global_norm", "step"))
        seconds.append(
            {
                "update": took,
                "forward": forward,
                "backward": took - forward - optimizer,
                "optimizer": optimizer,
            }
        )
        before = after
    return {
        "precision": precision,
        "prompt_tokens": prompt_tokens,
        "flops": flops,
        "own_flops_per_second": statistics.median(speeds),
        "share": statistics.median(shares),
        "shares": shares,
        "seconds": {name: statistics.median(each[name] for each in seconds) for name in seconds[0]},
    }


def main() -> None:
    """Measure all, print and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", nargs="*", default=["fp32", "bf16", "autocast"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    points: list[dict[str, Any]] = []
    for precision in options.precision:
        for prompt_tokens in PROMPT_TOKENS:
            found = measure(precision, prompt_tokens, options.repeats)
            points.append(found)
            print(
                f"{precision}, prompts of {prompt_tokens} tokens x {GROUP_SIZE} completions: "
                f"{found['share']:.2f} of {found['own_flops_per_second'] / 1e9:,.0f} GFLOP/s; "
                + ", ".join(f"{name} {value:.2f} s" for name, value in found["seconds"].items()),
                flush=True,
            )
    result = {
        "bench": "step",
        "date": history.today(),
        "processor": processor_name(),
        "num_threads": torch.get_num_threads(),
        "points": points,
    }
    if options.out:
        ratios = {f"{p['precision']}, {p['prompt_tokens']} tokens": p["share"] for p in points}
        history.write(options.out, "step", result, ratios)


if __name__ == "__main__":
    main()
