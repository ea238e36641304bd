"""Attention of the update in blocks against torch's fused kernel, on this processor.

Shapes are those of one SmolLM2-135M layer: groups of 8 completions behind their prompts, forward and
backward. The limits in `pgrpo/model/attention.py` come from here.

    python benches/attention.py
"""

from __future__ import annotations

import statistics
import time

import torch

from pgrpo.model import attention
from pgrpo.model.attention import AttentionOptions, SharedPrefix
from pgrpo.runs.metrics import processor_name

HEADS, KV_HEADS, HEAD_DIM, GROUP_SIZE = 9, 3, 64, 8
OPTIONS = AttentionOptions(scaling=HEAD_DIM**-0.5, window=None, softcap=None)
POINTS = ((8, 128, 7), (8, 512, 7), (8, 137, 31), (8, 137, 63), (4, 137, 255))
"""(prompts, their tokens, tokens of completions)."""


def seconds(point: tuple[int, int, int], dtype: torch.dtype, limit: int) -> float:
    """Median time of one forward and backward pass, in blocks up to `limit` scores."""
    prompts, length, own = point
    layout = SharedPrefix(
        [[0] * length] * prompts, [[[0] * own] * GROUP_SIZE] * prompts, torch.device("cpu")
    )
    tokens = layout.input_ids.shape[1]
    q, k, v = (
        torch.randn(tokens, heads, HEAD_DIM, dtype=dtype, requires_grad=True)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    gradient = torch.randn(tokens, HEADS, HEAD_DIM, dtype=dtype)
    times: list[float] = []
    attention.PLAIN_LIMIT = {dtype: limit}
    for _ in range(7):
        start = time.perf_counter()
        layout.attend(0, q, k, v, OPTIONS).backward(gradient)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main() -> None:
    """Print a line per precision and shape."""
    print(processor_name(), torch.get_num_threads(), "threads")
    for dtype in (torch.float32, torch.bfloat16):
        for point in POINTS:
            blocks, fused = (seconds(point, dtype, limit) for limit in (2**62, 0))
            prompts, length, own = point
            both = length**2, GROUP_SIZE * own * (length + own)
            scores = ", ".join(f"2^{(prompts * HEADS * n).bit_length() - 1}" for n in both)
            print(
                f"{dtype}: {prompts} x {length} tokens x 8 completions of {own}, scores {scores}: "
                f"blocks {blocks * 1e3:6.1f} ms, fused {fused * 1e3:6.1f} ms, "
                f"ratio {blocks / fused:.2f}"
            )


if __name__ == "__main__":
    main()
