"""The plain attention formula against torch's fused kernel, forward and backward, on this processor.

Shapes are those of one SmolLM2-135M layer: completions of 8 groups of 8 over prompts of 137 tokens.
The limits in `pgrpo/model/attention.py` come from here.

    python benches/attention.py
"""

from __future__ import annotations

import statistics
import time

import torch

from pgrpo.model import attention
from pgrpo.model.attention import AttentionOptions
from pgrpo.runs.metrics import processor_name

HEADS, KV_HEADS, HEAD_DIM, PROMPT = 9, 3, 64, 137
OPTIONS = AttentionOptions(scaling=HEAD_DIM**-0.5, window=None, softcap=None)


def seconds(rollouts: int, tokens: int, dtype: torch.dtype, limit: int) -> float:
    """Median time of one forward and backward pass with the plain formula up to `limit` scores."""
    shapes = [(HEADS, tokens), (KV_HEADS, PROMPT + tokens), (KV_HEADS, PROMPT + tokens)]
    q, k, v = (
        torch.randn(rollouts, heads, length, HEAD_DIM, dtype=dtype, requires_grad=True)
        for heads, length in shapes
    )
    mask = torch.ones(rollouts, 1, tokens, PROMPT + tokens, dtype=torch.bool).tril(PROMPT)
    times: list[float] = []
    attention._PLAIN_LIMIT = {dtype: limit}
    for _ in range(7):
        start = time.perf_counter()
        attention._attend(q, k, v, mask, OPTIONS).sum().backward()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main() -> None:
    """Print a line per precision and completion length."""
    print(processor_name(), torch.get_num_threads(), "threads")
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in (8, 32, 64, 128):
            plain, fused = (seconds(64, tokens, dtype, limit) for limit in (2**62, 0))
            scores = 64 * HEADS * tokens * (PROMPT + tokens)
            print(
                f"{dtype}: {tokens:4} tokens, 2^{scores.bit_length() - 1} scores: plain "
                f"{plain * 1e3:6.1f} ms, fused {fused * 1e3:6.1f} ms, ratio {plain / fused:.2f}"
            )


if __name__ == "__main__":
    main()
