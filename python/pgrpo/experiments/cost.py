"""What a run holds and what its step costs, by arithmetic: nothing is read, and nothing is run.

Memory follows from what transformers keep for the backward pass, kernel by kernel as eager PyTorch runs
them. Time is a roofline (Williams et al. 2009, Commun. ACM 52(4)), kernel kind by kernel kind: each
takes as long as its arithmetic or its memory traffic, whichever is longer, and they follow each other.
FLOPs are counted as torch counts them: two for a multiplication with its addition, matrix products
only, attention over the whole square, masked or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Literal

from pgrpo.model.attention import BLOCK_ROWS, BLOCK_SCORES
from pgrpo.model.shape import Shape


@dataclass(frozen=True, slots=True)
class Device:
    """What one rank computes on."""

    name: str
    flops: float
    """Dense matrix products in bf16, FLOP/s."""
    fp32_flops: float
    """The same in fp32."""
    memory: float
    """In bytes."""
    bandwidth: float
    """Of the memory, in bytes/s."""
    link: float
    """To each of the other devices of its node, in bytes/s and direction."""
    source: str
    """Where the figures are from."""
    launch_s: float = 4e-6
    """Seconds that Python and PyTorch take to start an operator. The default is a rough figure: eager
    layers of transformers then take .7 ms however small they are."""
    attention: float = 0.5
    """What attention's products reach of the speed of the others; the default is about what
    FlashAttention-2 does beside cuBLAS (Dao 2023, arXiv 2307.08691)."""
    draw_s: float = 3e-9
    """Seconds per logit that drawing a token takes the processor, to which the transformers engine
    moves them; the default was measured on one thread of an AMD EPYC (benches/plan.py)."""
    measured: bool = False
    """Whether the figures are what is reached, not what the manufacturer says is possible."""
    waits: bool = False
    """Whether a kernel is started when the one before is through, as on a CPU; on a GPU kernels are
    started meanwhile."""


_NVIDIA = "NVIDIA's data sheet"
# The data sheets give Tensor Core figures with 2:4 sparsity, except that of the A100 and the white
# paper on the RTX 4090, which give both; dense ones are half. Links are NVLink, of which the sheets add
# both directions, or 16 lanes of PCIe 4.
DEVICES = {
    device.name: device
    for device in (
        Device("a100-40gb", 312e12, 19.5e12, 40e9, 1.555e12, 300e9, f"{_NVIDIA} A100 40GB SXM"),
        Device("a100-80gb", 312e12, 19.5e12, 80e9, 2.039e12, 300e9, f"{_NVIDIA} A100 80GB SXM"),
        Device("h100", 989.5e12, 67e12, 80e9, 3.35e12, 450e9, f"{_NVIDIA} H100 SXM"),
        Device("h200", 989.5e12, 67e12, 141e9, 4.8e12, 450e9, f"{_NVIDIA} H200 SXM"),
        Device("b200", 2.25e15, 75e12, 180e9, 8e12, 900e9, f"{_NVIDIA} HGX B200"),
        Device("l4", 121e12, 30.3e12, 24e9, 0.3e12, 32e9, f"{_NVIDIA} L4"),
        Device("l40s", 362e12, 91.6e12, 48e9, 0.864e12, 32e9, f"{_NVIDIA} L40S"),
        Device(
            "rtx-4090",
            165.2e12,
            82.6e12,
            24e9,
            1.008e12,
            32e9,
            "NVIDIA's white paper on the Ada architecture, appendix A, fp32 accumulation",
        ),
    )
}
"""Graphics processors by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What of a run's config memory and time depend on."""

    prompts: int
    """Of a step, over all ranks."""
    group_size: int
    prompt_tokens: int
    completion_tokens: int
    """That are trained, which are those that are generated."""
    options: int | None = None
    """Tokens that may be chosen where completions come from a list; None: the whole vocabulary."""
    token_budget: int = 16384
    epochs: int = 1
    minibatches: int = 1
    recomputed: bool = True
    """Whether old log-probabilities are the trainer's, not those that the engine reported."""
    preferences: bool = False
    """Whether log-probabilities are read before every update instead, for the pairs of DPO."""
    reference: Literal["none", "weights", "adapters"] = "none"
    """What a KL penalty or DPO compares with: other weights, or these without their adapters."""
    precision: str = "autocast"
    """fp32, autocast or bf16."""
    gradient_checkpointing: bool = False
    ranks: int = 1
    replicate: int = 1
    """Copies of the weights, as in `[parallel]`."""
    engine: Literal["transformers", "vllm", "servers"] = "transformers"
    engine_ranks: int = 1
    """Devices that hold one copy of vLLM's weights together."""
    engine_bytes: float = 0
    """Of keys and values of vLLM in this process."""
    engine_sleeps: bool = False
    """Whether vLLM gives its memory to the update."""
    plain_limit: float = 0
    """Attention of up to so many scores a layer is matrix products; of more, a kernel makes them in
    tiles."""
    chunk_logits: int = 2**24
    """Logits that are held at a time."""

    @property
    def own_prompts(self) -> int:
        """Of the rank that has most."""
        return ceil(self.prompts / self.ranks)

    @property
    def shards(self) -> int:
        """Ranks that hold one copy of the weights together."""
        return self.ranks // self.replicate

    @property
    def updates(self) -> int:
        """Optimizer steps of one step."""
        return self.epochs * self.minibatches

    @property
    def weight_bytes(self) -> int:
        """Of a weight, its gradient and each of its moments."""
        return 2 if self.precision == "bf16" else 4

    @property
    def compute_bytes(self) -> int:
        """Of what matrices read and write."""
        return 4 if self.precision == "fp32" else 2

    @property
    def stream_bytes(self) -> int:
        """Of the residual stream."""
        return 2 if self.precision == "bf16" else 4


@dataclass(frozen=True, slots=True)
class Packed:
    """The tokens of one pass. Scores are pairs of a query's and a key's token, of one head."""

    prompt_tokens: int
    own_tokens: int
    """Of completions."""
    rows: int
    """Whose logits are computed."""
    prompt_scores: int
    own_scores: int
    copied: int
    """Tokens that completions attend to, whose keys and values each has copies of."""

    @property
    def tokens(self) -> int:
        """All of them."""
        return self.prompt_tokens + self.own_tokens


def packed(setup: Setup, groups: int, rollouts: int, *, shared: bool = True) -> Packed:
    """A pass of so many groups of so many rollouts each.

    The last token of a completion is not computed, for nothing follows it, and with a shared prompt
    that prompt's last row gives the first token of all its completions. Without sharing every rollout
    is a sequence by itself.
    """
    prompt, own = setup.prompt_tokens, setup.completion_tokens - 1
    n = groups * rollouts
    if not shared:
        return Packed(n * (prompt + own), 0, n * (1 + own), n * (prompt + own) ** 2, 0, 0)
    return Packed(
        prompt_tokens=groups * prompt,
        own_tokens=n * own,
        rows=groups + n * own,
        prompt_scores=groups * prompt**2,
        own_scores=n * own * (prompt + own),
        copied=n * (prompt + own) if own else 0,
    )


def passes(setup: Setup, groups: int, *, shared: bool = True) -> list[Packed]:
    """The passes over so many groups, the largest first, as `train.packing.passes` makes them."""
    own, prompt, size = setup.completion_tokens, setup.prompt_tokens, setup.group_size
    if not shared:
        most = max(1, setup.token_budget // (prompt + own))
        return [packed(setup, 1, part, shared=False) for part in _parts(groups * size, most)]
    most = setup.token_budget // (prompt + size * own)
    if most:
        return [packed(setup, part, size) for part in _parts(groups, most)]
    # A group that does not fit is split, and its prompt computed in each part.
    most = max(1, (setup.token_budget - prompt) // own)
    return groups * [packed(setup, 1, part) for part in _parts(size, most)]


def _parts(total: int, most: int) -> list[int]:
    full, rest = divmod(total, most)
    return [most] * full + [rest] * bool(rest)


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that one rank holds."""

    weights: float
    """Its part of them."""
    gradients: float
    """All of them, from the end of an update's backward pass to the beginning of the next update."""
    accumulated: float
    """Gradients that earlier passes of an update have left when the activations of another are kept."""
    moments: float
    reference: float
    engine: float
    """Of vLLM in this process, unless it sleeps during the update."""
    unsharded: float
    """Weights and gradients of a layer and of the root group, put together while they are used."""
    activations: float
    """Of the largest pass, kept for its backward pass; under autocast also the weights in bf16."""
    logits: float
    """With what the loss makes of them, and their gradient."""
    backward: float
    """Gradients of the activations and weights of a layer, before they are added up."""
    generation: float
    """The prompts' pass, keys, values and logits of the transformers engine, and all weights where they
    are sharded; or what vLLM has while it is awake, where it sleeps else."""

    @property
    def held(self) -> float:
        """At all times."""
        return self.weights + self.moments + self.reference + self.engine

    @property
    def peak(self) -> float:
        """At most: in the update, at its logits or at its last layer, or in generation."""
        backward = self.activations + self.accumulated + max(self.logits, self.backward)
        update = self.unsharded + max(backward, self.gradients)
        return self.held + max(update, self.gradients + self.generation)


def _in_blocks(shape: Shape, setup: Setup, scores: float) -> bool:
    """Whether attention is matrix products and a softmax between them; no kernel caps scores."""
    return shape.capped or scores * shape.num_heads <= setup.plain_limit


def _scores_kept(shape: Shape, scores: float, rows: int) -> float:
    """Of attention in blocks: all where they are one block, else none, for they are computed again."""
    alone = scores * shape.num_heads <= BLOCK_SCORES and rows <= BLOCK_ROWS
    return scores * shape.num_heads * alone


def layer_activations(shape: Shape, setup: Setup, work: Packed) -> float:
    """Bytes that one layer keeps of a pass for the backward pass.

    A norm keeps its input, and its output where matrices read it; the feed-forward network its gate
    before and after the activation, the other branch and the product; attention its queries, keys and
    values, and where a kernel makes the scores in tiles its output, a mask as numbers, and a copy of
    their prompt's keys and values for each completion.
    """
    a = setup.compute_bytes
    per_token = float(setup.stream_bytes * (shape.normed + shape.heads_normed))
    if setup.precision == "autocast":
        # Each of the five matrices that read a norm has a copy of its own in bf16.
        per_token += 10.0 * shape.hidden
    else:
        per_token += a * shape.normed
    per_token += a * (shape.query + 4 * shape.intermediate)
    # Adapters are in fp32, and so are the copies that they read.
    per_token += 4.0 * bool(a == 2) * shape.adapter_inputs / shape.num_layers
    attended = float(work.tokens * shape.query + 2 * shape.key * work.prompt_tokens)
    if _in_blocks(shape, setup, work.prompt_scores):
        attended += _scores_kept(shape, work.prompt_scores, setup.prompt_tokens)
    else:
        attended += work.prompt_tokens * shape.query
    if _in_blocks(shape, setup, work.own_scores):
        attended += _scores_kept(shape, work.own_scores, setup.completion_tokens - 1)
        attended += 2 * shape.key * work.own_tokens
    else:
        attended += work.own_tokens * shape.query + work.own_scores + 2 * shape.key * work.copied
    return work.tokens * per_token + a * attended


def memory(shape: Shape, setup: Setup) -> Memory:
    """What the rank with most holds.

    FSDP2 divides weights, gradients and moments among the ranks of a copy; a layer and the root group
    (embedding, head, last norm) are whole while they are used. Activations are each rank's own.
    """
    w, a, ranks = setup.weight_bytes, setup.compute_bytes, setup.shards
    # Frozen weights beside adapters, which are in fp32.
    frozen = shape.num_parameters - shape.num_trained
    t = 4 if frozen else w
    weights = (frozen * w + shape.num_trained * t) / ranks
    trained_share = shape.num_trained / shape.num_parameters
    groups = ceil(setup.own_prompts / setup.minibatches)
    work, *others = passes(setup, groups)
    layer = layer_activations(shape, setup, work)
    stream = work.tokens * shape.hidden * setup.stream_bytes
    converted = 2.0 * shape.matrices if setup.precision == "autocast" else 0.0
    if setup.gradient_checkpointing:
        # The weights in bf16 last as long as the pass, a layer's activations until the next one's.
        kept = shape.num_layers * stream + max(layer, converted)
    else:
        kept = shape.num_layers * layer + converted
    # The last norm, the decoder's output and its gradient.
    kept += 3 * stream + work.tokens * shape.hidden * a
    rows = min(work.rows, max(1, setup.chunk_logits // shape.vocab))
    width = shape.vocab if setup.options is None else setup.options
    head_gradient = shape.vocab * shape.hidden * w * shape.head_trained
    unsharded = 0.0
    if ranks > 1:
        whole = shape.layer_parameters + shape.root_parameters
        unsharded = whole * w * (1 + trained_share)
    prompts, n = setup.own_prompts, setup.own_prompts * setup.group_size
    cached = prompts * setup.prompt_tokens + n * setup.completion_tokens
    generation = 2.0 * shape.key * shape.num_layers * cached * a + 24.0 * n * width
    # All prompts are one pass, of which a layer's feed-forward network is the widest place.
    widest = 3.0 * shape.intermediate * a + 2.0 * shape.hidden * setup.stream_bytes
    generation += prompts * setup.prompt_tokens * widest
    generation += (shape.num_parameters * w - weights) if ranks > 1 else 0.0
    if setup.precision == "autocast":
        generation += 2.0 * shape.matrices
    engine = shape.num_parameters * a / setup.engine_ranks + setup.engine_bytes
    if setup.engine != "transformers":
        generation = engine if setup.engine == "vllm" and setup.engine_sleeps else 0.0
    gradients = shape.num_trained * t / ranks
    return Memory(
        weights=weights,
        gradients=gradients,
        accumulated=gradients if others else 0.0,
        moments=2 * shape.num_trained * t / ranks,
        reference=shape.num_parameters * w / ranks if setup.reference == "weights" else 0.0,
        engine=engine if setup.engine == "vllm" and not setup.engine_sleeps else 0.0,
        unsharded=unsharded,
        activations=kept,
        logits=4.0 * 4 * rows * width + head_gradient,
        backward=work.tokens * (2 * shape.intermediate * a + 2 * shape.hidden * setup.stream_bytes),
        generation=generation,
    )


@dataclass(frozen=True, slots=True)
class Kernels:
    """Kernels of one kind, which take as long as their arithmetic or their memory traffic."""

    flops: float
    num_bytes: float
    attends: bool = False
    """Whether they are attention's products."""
    launches: float = 0
    """Operators that start them, and those that are told beside them."""
    received: float = 0
    """Bytes from other ranks."""
    drawn: float = 0
    """Logits that tokens are drawn from."""

    def times(self, number: float) -> Kernels:
        """So many times the same."""
        return replace(
            self,
            flops=number * self.flops,
            num_bytes=number * self.num_bytes,
            launches=number * self.launches,
        )

    def seconds(self, setup: Setup, device: Device, efficiency: float) -> float:
        """How long they take, where matrix products reach this share of the device's speed."""
        peak = device.fp32_flops if setup.precision == "fp32" else device.flops
        reached = peak * (1 if device.measured else efficiency)
        if self.attends:
            reached *= device.attention
        took = max(self.flops / reached, self.num_bytes / device.bandwidth)
        if self.received:
            took += self.received / device.link
        return took + self.drawn * device.draw_s


def _launches(shape: Shape) -> int:
    """Operators that the forward pass of a layer starts, views among them, counted in transformers
    5.23: 159 to 175 in Llama and Gemma, 173 to 191 in Qwen3, by precision, and some ten fewer where a
    token is added to each completion."""
    return 180 if shape.heads_normed else 163


def forward(shape: Shape, setup: Setup, work: Packed) -> list[Kernels]:
    """The decoder over a pass."""
    a, s, tokens = setup.compute_bytes, setup.stream_bytes, work.tokens
    scores, heads = work.prompt_scores + work.own_scores, shape.num_heads
    both = (work.prompt_scores, work.own_scores)
    plain = sum(found for found in both if _in_blocks(shape, setup, found))
    layers = shape.num_layers
    # Every kernel reads and writes its operands: seven times in a norm, in fp32; five in the gated
    # activation; ten in the rotary embedding; six in two residual sums; some eight where attention
    # sorts tokens into sequences and back; six for scores that are written down.
    elementwise = tokens * (
        28.0 * (shape.normed + shape.heads_normed)
        + 5.0 * a * shape.intermediate
        + (10.0 * s + 4.0 * a) * (shape.query + shape.key)
        + 6.0 * s * shape.hidden
        + 4.0 * a * shape.query
    )
    if setup.precision == "autocast":
        elementwise += tokens * 6.0 * 5 * shape.hidden
    copied = 0 if _in_blocks(shape, setup, work.own_scores) else work.copied
    elementwise += a * (4.0 * shape.key * copied + 6.0 * heads * plain)
    converted = 6.0 * shape.matrices if setup.precision == "autocast" else 0.0
    return [
        Kernels(
            2.0 * tokens * shape.matrices,
            a * (shape.matrices + tokens * (shape.matrix_inputs + shape.matrix_outputs)),
        ),
        Kernels(
            4.0 * shape.query * scores * layers,
            a * layers * (2.0 * tokens * shape.query + 2.0 * shape.key * tokens),
            attends=True,
        ),
        Kernels(0, layers * elementwise + converted, launches=layers * _launches(shape)),
    ]


def backward(shape: Shape, setup: Setup, work: Packed) -> list[Kernels]:
    """The gradients of `forward`: of what went in, and of the weights that are trained."""
    matrices, attention, elementwise = forward(shape, setup, work)
    trained = shape.trained_matrices / shape.matrices
    w = setup.weight_bytes
    # A weight's gradient is written, and read and added to what there is.
    added = 4.0 * w * shape.trained_matrices
    if shape.embedding_trained:
        added += 4.0 * w * shape.vocab * shape.hidden
    found = [
        Kernels(matrices.flops * (1 + trained), matrices.num_bytes * (1 + trained)),
        Kernels(2 * attention.flops, 2 * attention.num_bytes, attends=True),
        # 234 to 292 operators a layer, counted as in `_launches`.
        Kernels(0, 2 * elementwise.num_bytes + added, launches=1.5 * elementwise.launches),
    ]
    return [*found, *forward(shape, setup, work)] if setup.gradient_checkpointing else found


def head_forward(shape: Shape, setup: Setup, rows: int) -> list[Kernels]:
    """Logits of so many rows, and the log-probabilities read there: nine times over the logits."""
    width = shape.vocab if setup.options is None else setup.options
    chunks = ceil(rows * shape.vocab / setup.chunk_logits)
    weights = width * shape.hidden * setup.compute_bytes * chunks
    converted = 6.0 * shape.vocab * shape.hidden if setup.precision == "autocast" else 0.0
    return [
        Kernels(2.0 * rows * shape.hidden * width, weights + 4.0 * rows * width),
        Kernels(0, 9 * 4.0 * rows * width + converted),
    ]


def head_backward(shape: Shape, setup: Setup, rows: int) -> list[Kernels]:
    """The gradients of `head_forward`: twelve times over the logits."""
    width = shape.vocab if setup.options is None else setup.options
    chunks = ceil(rows * shape.vocab / setup.chunk_logits)
    products, _ = head_forward(shape, setup, rows)
    both = 1 + shape.head_trained
    added = 4.0 * setup.weight_bytes * shape.vocab * shape.hidden * chunks * shape.head_trained
    return [
        Kernels(both * products.flops, both * products.num_bytes),
        Kernels(0, 12 * 4.0 * rows * width + added),
    ]


def decode(shape: Shape, setup: Setup, *, shared: bool = True) -> list[Kernels]:
    """All tokens of a rank's completions after their first, one by one, and the logits of all."""
    prompts, size = setup.own_prompts, setup.group_size
    n, steps, a = prompts * size, setup.completion_tokens - 1, setup.compute_bytes
    width = shape.vocab if setup.options is None else setup.options
    # Completions have (steps + 1) / 2 tokens of their own on the mean step.
    own = n * steps * (steps + 1) // 2
    # vLLM keeps one copy of a prompt's keys and values, which each of its completions reads.
    once = shared and setup.engine == "transformers"
    read = (prompts if once else n) * setup.prompt_tokens * steps + own
    one = forward(shape, setup, Packed(0, n, 0, 0, 0, 0))
    found = [part.times(steps) for part in (one[0], one[2])]
    scores = n * setup.prompt_tokens * steps + own
    if setup.precision == "autocast":
        # The weights are converted once, with the prompts.
        read_once = 6.0 * steps * shape.matrices
        found[1] = replace(found[1], num_bytes=found[1].num_bytes - read_once)
    if setup.engine != "transformers":
        # vLLM starts all operators of a token at once, as a CUDA graph.
        found[1] = replace(found[1], launches=0)
    score_bytes = 6.0 * a * shape.num_layers * shape.num_heads * scores
    if setup.engine != "transformers":
        score_bytes = 0.0
    return [
        *found,
        Kernels(
            4.0 * shape.query * scores * shape.num_layers,
            a * shape.num_layers * 2.0 * shape.key * read,
            attends=True,
        ),
        # Scores are put together, masked, normalised and converted, also on a GPU.
        Kernels(0, score_bytes),
        Kernels(
            2.0 * n * shape.hidden * width * (steps + 1),
            (steps + 1) * width * shape.hidden * a,
        ),
    ]


def sampling(shape: Shape, setup: Setup) -> Kernels:
    """The tokens of all completions of a rank, drawn from their logits."""
    rows = setup.own_prompts * setup.group_size * setup.completion_tokens
    drawn = float(rows * (shape.vocab if setup.options is None else setup.options))
    if setup.engine == "transformers":
        return Kernels(0, 0, drawn=drawn)
    # vLLM does it where the logits are: it divides, normalises and draws.
    return Kernels(0, 24.0 * drawn)


@dataclass(frozen=True, slots=True)
class Part:
    """What one part of a step costs one rank."""

    name: str
    flops: float
    num_bytes: float
    seconds: float


def step(
    shape: Shape, setup: Setup, device: Device, efficiency: float, *, shared: bool = True
) -> list[Part]:
    """A step of the rank that has most, part by part.

    Args:
        shape: of the model.
        setup: of the run.
        device: of every rank.
        efficiency: share of the device's speed that matrix products reach.
        shared: whether each prompt is computed once for all its completions, as here; without, what
            others compute, in passes of as many tokens.
    """

    def part(name: str, kernels: Sequence[Kernels]) -> Part:
        busy = sum(k.seconds(setup, device, efficiency) for k in kernels)
        started = sum(k.launches for k in kernels) * device.launch_s
        return Part(
            name,
            sum(k.flops for k in kernels),
            sum(k.num_bytes for k in kernels),
            busy + started if device.waits else max(busy, started),
        )

    groups = setup.own_prompts
    copies = 1 if shared else setup.group_size
    prompts = Packed(
        copies * groups * setup.prompt_tokens, 0, 0, copies * groups * setup.prompt_tokens**2, 0, 0
    )
    parts = [
        part("prefill", forward(shape, setup, prompts)),
        part("decode", decode(shape, setup, shared=shared)),
        part("sampling", [sampling(shape, setup)]),
    ]
    whole = [
        kernels
        for work in passes(setup, groups, shared=shared)
        for kernels in (*forward(shape, setup, work), *head_forward(shape, setup, work.rows))
    ]
    times = setup.epochs if setup.preferences else int(setup.recomputed and setup.updates > 1)
    times += setup.reference != "none"
    if times:
        parts.append(part("log-probabilities", whole * times))
    works = setup.updates * passes(setup, ceil(groups / setup.minibatches), shared=shared)
    parts += [
        part(
            "update, forward",
            [
                kernels
                for work in works
                for kernels in (
                    *forward(shape, setup, work),
                    *head_forward(shape, setup, work.rows),
                )
            ],
        ),
        part(
            "update, backward",
            [
                kernels
                for work in works
                for kernels in (
                    *backward(shape, setup, work),
                    *head_backward(shape, setup, work.rows),
                )
            ],
        ),
    ]
    # AdamW reads weight, gradient and two moments and writes three of them; before it, gradients are
    # set to 0, measured, and scaled.
    trained = shape.num_trained / setup.shards * (4 if setup.precision != "bf16" else 2)
    parts.append(part("optimizer", [Kernels(0, 11.0 * trained * setup.updates)]))
    if setup.engine != "transformers":
        # Read and written; of adapters, which are in fp32, their base is there already.
        if shape.num_trained < shape.num_parameters:
            moved = 2.0 * shape.num_trained * 4
        else:
            moved = 2.0 * shape.num_parameters * setup.compute_bytes
        parts.append(part("weights to the engine", [Kernels(0, moved)]))
    if setup.ranks > 1:
        parts.append(part("between ranks", [_between_ranks(shape, setup, times, len(works))]))
    return parts


def _between_ranks(shape: Shape, setup: Setup, times: int, num_passes: int) -> Kernels:
    """What a rank receives in a step: all weights in generation or when they go to vLLM (of adapters
    themselves alone), before each kind of log-probabilities, and twice in each pass of an update, whose
    gradients are added up; over copies of the weights again, in a ring. Nothing of it is hidden behind
    computation here, as FSDP2 does in part."""
    others = 1 - 1 / setup.shards
    w = setup.weight_bytes
    adapters = shape.num_trained < shape.num_parameters
    t = 4 if adapters else w
    whole = others * shape.num_parameters * w * (times + 2 * num_passes)
    # All ranks put the weights together, one after another, whoever sends them to vLLM.
    if adapters and setup.engine != "transformers":
        whole += others * shape.num_trained * t
    else:
        whole += others * shape.num_parameters * w
    summed = others * shape.num_trained * t * num_passes
    copied = 2 * (1 - 1 / setup.replicate) * shape.num_trained * t / setup.shards * num_passes
    return Kernels(0, 0, received=whole + summed + copied)
