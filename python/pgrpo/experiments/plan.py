"""What a run would hold and cost on so many devices, from its config: `pgrpo plan`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

from pgrpo.errors import ConfigError
from pgrpo.experiments.cost import DEVICES, Device, Memory, Part, Setup, memory, step
from pgrpo.model.shape import Shape, read_shape
from pgrpo.runs.config import Config

USABLE = 0.9
"""Share of a device's memory that a run may take: CUDA's context, buffers of NCCL and what the
allocator cannot use take the rest. A rule of thumb, not measured."""

NODE = 8
"""Devices whose links to each other have the speed that `Device.link` tells."""


@dataclass(frozen=True, slots=True)
class Case:
    """A step with other lengths or another group size."""

    prompt_tokens: int
    completion_tokens: int
    group_size: int
    flops: float
    num_bytes: float
    seconds: float
    unshared_flops: float
    """Where each completion has its prompt computed for itself."""
    unshared_seconds: float
    peak_bytes: float
    fits: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """What one of the ranks holds, that which has most, and what its step costs."""

    model: str
    shape: Shape
    device: Device
    num_devices: int
    efficiency: float
    setup: Setup
    memory: Memory
    peak_bytes: float
    usable_bytes: float
    fits: bool
    parts: list[Part]
    unshared_parts: list[Part]
    cases: list[Case]
    notes: list[str]


def known_device(name: str) -> Device:
    """The device of a name.

    Raises:
        ConfigError: there is none.
    """
    if name.lower() not in DEVICES:
        raise ConfigError(f"there is no GPU {name!r} here; expected {', '.join(sorted(DEVICES))}")
    return DEVICES[name.lower()]


def setup_of(config: Config, num_devices: int) -> Setup:
    """What of a config memory and time depend on: prompts as long as they may be, completions too.

    Raises:
        ConfigError: the processes cannot hold as many copies of the weights as the config says, or
            each would have a vLLM over several GPUs, or weights would lie elsewhere than on GPUs.
    """
    config.check_processes(num_devices)
    if config.parallel.offload:
        raise ConfigError("parallel.offload is not counted here; expected false")
    copies = config.parallel.replicate
    if num_devices % copies:
        raise ConfigError(
            f"parallel.replicate is {copies}, and there are {num_devices} GPUs; expected a multiple "
            "of it"
        )
    generation, loss, vllm = config.generation, config.loss, config.generation.vllm
    adapters = config.model.lora is not None
    precision = config.model.precision
    return Setup(
        prompts=config.run.prompts_per_step,
        group_size=generation.group_size,
        prompt_tokens=generation.max_prompt_tokens,
        completion_tokens=generation.max_new_tokens,
        token_budget=config.optimizer.token_budget,
        epochs=config.optimizer.epochs,
        minibatches=config.optimizer.minibatches,
        recomputed=loss.old_logprobs == "recomputed",
        preferences=loss.objective == "dpo",
        reference="none" if not loss.has_reference else "adapters" if adapters else "weights",
        # All devices that are known here compute in bf16.
        precision="autocast" if precision == "auto" else precision,
        gradient_checkpointing=config.model.gradient_checkpointing,
        ranks=num_devices,
        replicate=copies,
        engine="servers" if vllm.servers else generation.engine,
        engine_ranks=vllm.tensor_parallel_size,
        engine_bytes=vllm.kv_cache_gib * 2**30 / vllm.tensor_parallel_size,
        engine_sleeps=vllm.sleep and config.run.pipeline == "synchronous",
    )


def plan(
    config: Config,
    device: Device,
    num_devices: int,
    *,
    efficiency: float = 0.4,
    prompt_tokens: Sequence[int] = (),
    completion_tokens: Sequence[int] = (),
    group_sizes: Sequence[int] = (),
) -> Plan:
    """Count what a run would hold and cost.

    Args:
        config: of the run.
        device: what each rank computes on.
        num_devices: how many there are, a rank on each.
        efficiency: share of the device's speed that matrix products reach.
        prompt_tokens: lengths to count, of which the longest is the run's; without any, that of the
            config, a half and a quarter.
        completion_tokens: the same of completions.
        group_sizes: the same of groups; without any, the config's alone.

    Raises:
        ConfigError: the processes cannot do what the config says, or a length is below 1.
        ModelError: the model's config cannot be had, or it is of a kind that is not known here.
    """
    wanted = setup_of(config, num_devices)
    for name, values in (
        ("prompt", prompt_tokens),
        ("completion", completion_tokens),
        ("group", group_sizes),
    ):
        if any(value < 1 for value in values):
            raise ConfigError(f"a length of a {name} is {min(values)}; expected at least 1")
    prompts = sorted(prompt_tokens) or _parts(wanted.prompt_tokens)
    completions = sorted(completion_tokens) or _parts(wanted.completion_tokens)
    groups = sorted(group_sizes) or [wanted.group_size]
    wanted = replace(
        wanted,
        prompt_tokens=prompts[-1],
        completion_tokens=completions[-1],
        group_size=groups[-1],
    )
    shape = read_shape(config.model)
    usable = USABLE * device.memory

    def case(prompt: int, completion: int, group: int) -> Case:
        of = replace(wanted, prompt_tokens=prompt, completion_tokens=completion, group_size=group)
        shared, unshared = (
            step(shape, of, device, efficiency, shared=each) for each in (True, False)
        )
        peak = memory(shape, of).peak
        return Case(
            prompt,
            completion,
            group,
            flops=sum(part.flops for part in shared),
            num_bytes=sum(part.num_bytes for part in shared),
            seconds=sum(part.seconds for part in shared),
            unshared_flops=sum(part.flops for part in unshared),
            unshared_seconds=sum(part.seconds for part in unshared),
            peak_bytes=peak,
            fits=peak <= usable,
        )

    held = memory(shape, wanted)
    return Plan(
        model=config.model.name,
        shape=shape,
        device=device,
        num_devices=num_devices,
        efficiency=efficiency,
        setup=wanted,
        memory=held,
        peak_bytes=held.peak,
        usable_bytes=usable,
        fits=held.peak <= usable,
        parts=step(shape, wanted, device, efficiency),
        unshared_parts=step(shape, wanted, device, efficiency, shared=False),
        cases=[case(*each) for each in product(prompts, completions, groups)],
        notes=_notes(shape, wanted, held.peak <= usable),
    )


def _parts(longest: int) -> list[int]:
    return sorted({max(1, longest // part) for part in (4, 2, 1)})


def _notes(shape: Shape, setup: Setup, fits: bool) -> list[str]:
    """What the figures leave out, and what would take less; a sentence each."""
    notes: list[str] = []
    if not fits:
        less: list[str] = []
        if not setup.gradient_checkpointing:
            less.append("model.gradient_checkpointing = true")
        if setup.token_budget > setup.prompt_tokens + setup.completion_tokens:
            less.append("a smaller optimizer.token_budget")
        less.append("more GPUs" if setup.replicate == 1 else "a smaller parallel.replicate")
        if shape.num_trained == shape.num_parameters:
            less.append("model.lora")
        notes.append(f"less memory is taken with {', '.join(less)}")
    if setup.ranks > setup.prompts:
        notes.append(
            f"a step has {setup.prompts} prompts for {setup.ranks} GPUs: "
            f"{setup.ranks - setup.prompts} of them have nothing to compute"
        )
    if setup.ranks > NODE:
        notes.append(
            f"more than {NODE} GPUs are on several nodes, whose links are slower than is counted here"
        )
    if setup.engine == "servers":
        notes.append(
            "generation is counted as if these GPUs did it; servers have GPUs of their own"
        )
    return notes
