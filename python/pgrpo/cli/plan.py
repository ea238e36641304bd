"""`pgrpo plan`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

from typer import Option

from pgrpo.cli.arguments import AsJson, ConfigFile, Overrides, numbers
from pgrpo.runs.terminal import printable

if TYPE_CHECKING:
    from pgrpo.experiments.plan import Plan


def plan(
    config: ConfigFile,
    gpu: Annotated[str, Option("--gpu", metavar="NAME", help="h100, a100-80gb, l4, ...")],
    gpus: Annotated[int, Option("--gpus", min=1, metavar="N", help="how many, a rank on each")] = 1,
    efficiency: Annotated[
        float,
        Option(
            "--efficiency",
            min=0.01,
            max=1.0,
            help="share of the GPU's speed that matrix products reach",
        ),
    ] = 0.4,
    prompt_tokens: Annotated[
        str | None,
        Option("--prompt-tokens", metavar="N,...", help="prompt lengths; the longest is the run's"),
    ] = None,
    completion_tokens: Annotated[
        str | None, Option("--completion-tokens", metavar="N,...", help="completion lengths")
    ] = None,
    group_sizes: Annotated[
        str | None, Option("--group-sizes", metavar="N,...", help="completions of a prompt")
    ] = None,
    as_json: AsJson = False,
    overrides: Overrides = None,
) -> None:
    """What a run would hold and cost on GPUs, from its model's config alone, before they are bought."""
    lengths = [
        numbers(text, option) if text is not None else []
        for text, option in (
            (prompt_tokens, "--prompt-tokens"),
            (completion_tokens, "--completion-tokens"),
            (group_sizes, "--group-sizes"),
        )
    ]
    from pgrpo.runs.config import load_config

    # Not `arguments.load`, for the data need not be here.
    settings = load_config(config, overrides or ())
    from pgrpo.experiments.plan import known_device, plan

    found = plan(
        settings,
        known_device(gpu),
        gpus,
        efficiency=efficiency,
        prompt_tokens=lengths[0],
        completion_tokens=lengths[1],
        group_sizes=lengths[2],
    )
    if as_json:
        print(json.dumps(asdict(found), indent=2))
        return
    print(printable("\n".join(_lines(found))))


def _lines(found: Plan) -> list[str]:
    """The plan in words and tables; bytes in units of 10^9."""
    shape, setup, device, held = found.shape, found.setup, found.device, found.memory
    trained = "all" if shape.num_trained == shape.num_parameters else f"{shape.num_trained:,}"
    peak = device.fp32_flops if setup.precision == "fp32" else device.flops
    fits = "fits" if found.fits else "does not fit"
    rows = [
        ("weights", held.weights),
        ("gradients", held.gradients),
        ("AdamW's moments", held.moments),
        ("reference", held.reference),
        ("vLLM beside the update", held.engine),
        ("unsharded while in use", held.unsharded),
        ("activations", held.activations),
        ("logits", held.logits),
        ("gradients of a layer", held.backward),
        ("keys, values, generation", held.generation),
    ]
    on = (
        f"{found.num_devices} x {device.name} of {device.memory / 1e9:.0f} GB; matrix products at "
        f"{found.efficiency:.0%} of {peak / 1e12:.0f} TFLOP/s, which is assumed; {setup.precision}"
    )
    most = (
        f"  {'at most at a time':24} {found.peak_bytes / 1e9:8.2f}: {fits} into "
        f"{found.usable_bytes / 1e9:.0f}"
    )
    of = (
        f"its step, of {setup.prompts:,} prompts of {setup.prompt_tokens:,} tokens x "
        f"{setup.group_size} completions of {setup.completion_tokens:,} over all ranks; behind it "
        "the same without the shared prompt:"
    )
    columns = (
        f"  {'prompt':>8} {'completion':>10} {'G':>4} {'TFLOP':>10} {'s':>8} {'s unshared':>10} "
        f"{'times':>6} {'GB':>7}"
    )
    sizes = f"{shape.num_layers} layers, {shape.num_parameters:,} parameters"
    lines = [
        f"{found.model}: {sizes}, {trained} trained",
        on,
        "",
        "what the rank with most holds, in GB:",
        *(f"  {name:24} {size / 1e9:8.2f}" for name, size in rows if size),
        most,
        "",
        of,
        f"  {'':24} {'TFLOP':>10} {'GB':>9} {'s':>8}   {'TFLOP':>10} {'GB':>9} {'s':>8}",
    ]
    total = [0.0] * 6
    for ours, others in zip(found.parts, found.unshared_parts, strict=True):
        both = [
            value
            for part in (ours, others)
            for value in (part.flops / 1e12, part.num_bytes / 1e9, part.seconds)
        ]
        total = [a + b for a, b in zip(total, both, strict=True)]
        lines.append(_row(ours.name, both))
    lines += [
        _row("in all", total),
        "",
        "by lengths and group size, a step of the same number of prompts:",
        columns,
    ]
    lines += [
        f"  {case.prompt_tokens:8} {case.completion_tokens:10} {case.group_size:4} "
        f"{case.flops / 1e12:10.1f} {case.seconds:8.2f} {case.unshared_seconds:10.2f} "
        f"{case.unshared_seconds / case.seconds:6.2f} {case.peak_bytes / 1e9:7.1f}"
        + ("" if case.fits else " does not fit")
        for case in found.cases
    ]
    return lines + [f"note: {sentence}" for sentence in found.notes]


def _row(name: str, values: list[float]) -> str:
    flops, size, seconds, *unshared = values
    return (
        f"  {name:24} {flops:10.2f} {size:9.1f} {seconds:8.2f}   "
        f"{unshared[0]:10.2f} {unshared[1]:9.1f} {unshared[2]:8.2f}"
    )
