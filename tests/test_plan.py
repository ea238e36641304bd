"""`pgrpo plan`: its counts beside torch's own, and what it says and refuses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SHAPE, grouped, tiny_model, write_config
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Qwen3Config

from pgrpo.cli import main
from pgrpo.config.sections import LoraConfig, LossConfig, ModelConfig, OptimizerConfig
from pgrpo.errors import ModelError
from pgrpo.experiments import cost
from pgrpo.experiments.cost import (
    DEVICES,
    Device,
    Kernels,
    Setup,
    backward,
    decode,
    forward,
    head_backward,
    head_forward,
    layer_activations,
    memory,
    passes,
    step,
)
from pgrpo.experiments.plan import setup_of
from pgrpo.model import attention
from pgrpo.model.attention import SharedPrefix
from pgrpo.model.language_model import LanguageModel
from pgrpo.model.shape import PUBLISHED, Shape, read_shape, shape_of
from pgrpo.rollout.engines.transformers import TransformersEngine
from pgrpo.rollout.settings import GenerationConfig
from pgrpo.runs.config import load_config
from pgrpo.train.packing import Pass, TrainedRollout, portions
from pgrpo.train.policy import Policy
from pgrpo.types import Example, Prompt, Rollout

Capture = pytest.CaptureFixture[str]


def flops(kernels: Sequence[Kernels]) -> float:
    return sum(each.flops for each in kernels)


def tiny_setup(prompts: int, group: int, prompt: int, completion: int, **others: Any) -> Setup:
    return Setup(
        prompts=prompts,
        group_size=group,
        prompt_tokens=prompt,
        completion_tokens=completion,
        precision="fp32",
        **others,
    )


def rollouts(setup: Setup) -> list[Rollout]:
    """Random ones of the setup's lengths."""
    numbers = np.random.default_rng(0)

    def words(n: int) -> tuple[int, ...]:
        return tuple(numbers.integers(3, 97, n).tolist())

    prompts = [
        Prompt(Example("", "u", {}), 0, words(setup.prompt_tokens)) for _ in range(setup.prompts)
    ]
    n = setup.completion_tokens
    return [
        Rollout(prompt, place, words(n), "", (-4.0,) * n, True)
        for place, prompt in enumerate(prompts)
        for _ in range(setup.group_size)
    ]


def counted(call: Any) -> float:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


LENGTHS = [(1, 1, 5, 1), (2, 3, 7, 4), (3, 2, 20, 2), (2, 4, 3, 9)]


@pytest.mark.parametrize("family", ["smollm2", "qwen3", "gemma", "gemma2"])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_flops_of_an_update_are_those_that_torch_counts(
    family: str, lengths: tuple[int, int, int, int]
) -> None:
    model, setup = tiny_model(family), tiny_setup(*lengths)
    shape = shape_of(model.model)
    policy = Policy(
        model,
        LossConfig(importance="off"),
        OptimizerConfig(),
        num_steps=1,
        temperature=1.0,
        max_new_tokens=9,
    )
    groups = grouped(rollouts(setup), np.linspace(1, 2, setup.prompts * setup.group_size))
    (work,) = passes(setup, setup.prompts)
    counts = (
        forward(shape, setup, work),
        head_forward(shape, setup, work.rows),
        backward(shape, setup, work),
        head_backward(shape, setup, work.rows),
    )
    assert counted(lambda: policy.update(groups, 0.0)) == sum(map(flops, counts))
    # Old log-probabilities cost a forward pass.
    assert counted(lambda: policy.logprobs(groups)) == sum(map(flops, counts[:2]))


@pytest.mark.parametrize("lengths", LENGTHS)
def test_flops_of_generation_are_those_that_torch_counts(
    lengths: tuple[int, int, int, int],
) -> None:
    model, setup = tiny_model("qwen3"), tiny_setup(*lengths)
    model.end_ids = frozenset()
    shape = shape_of(model.model)
    engine = TransformersEngine(
        GenerationConfig(group_size=setup.group_size, max_new_tokens=setup.completion_tokens), model
    )
    prompts = [each.prompt for each in rollouts(setup)[:: setup.group_size]]
    parts = {part.name: part.flops for part in step(shape, setup, DEVICES["l4"], 0.5)}
    assert (
        counted(lambda: list(engine.generate(prompts, setup.group_size, seed=0)))
        == parts["prefill"] + parts["decode"]
    )


@pytest.mark.parametrize("family", ["smollm2", "gemma2"])
def test_flops_without_the_shared_prompt_are_those_of_sequences(family: str) -> None:
    setup = tiny_setup(2, 3, 7, 4)
    model = tiny_model(family)
    shape = shape_of(model.model)
    # Each completion a group of its own, its prompt before it: a sequence by itself.
    whole = [(*each.prompt.token_ids, *each.completion_ids[:-1]) for each in rollouts(setup)]
    layout = SharedPrefix(whole, [[] for _ in whole], model.device)
    (work,) = passes(setup, setup.prompts, shared=False)
    assert counted(lambda: model.hidden(layout)) == flops(forward(shape, setup, work))


@given(
    st.integers(1, 6),
    st.integers(1, 9),
    st.integers(1, 60),
    st.integers(1, 40),
    st.integers(1, 300),
)
@settings(deadline=None)
def test_passes_are_those_of_the_trainer(
    prompts: int, group: int, prompt: int, completion: int, budget: int
) -> None:
    setup = tiny_setup(prompts, group, prompt, completion, token_budget=budget)
    own = rollouts(setup)
    groups = [
        [TrainedRollout(each) for each in own[n : n + group]] for n in range(0, len(own), group)
    ]
    made = sorted(
        (
            sum(prompt + sum(completion - 1 for _ in part) for part in portion)
            for portion in portions(groups, budget)
        ),
        reverse=True,
    )
    assert sorted((w.tokens for w in passes(setup, prompts)), reverse=True) == made


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 200), st.integers(1, 50), st.booleans())
@settings(deadline=None)
def test_a_shared_prompt_never_costs_more(
    prompts: int, group: int, prompt: int, completion: int, penalised: bool
) -> None:
    setup = tiny_setup(
        prompts, group, prompt, completion, reference="weights" if penalised else "none"
    )
    shared, unshared = (step(QWEN, setup, DEVICES["h100"], 0.4, shared=e) for e in (True, False))
    for ours, others in zip(shared, unshared, strict=True):
        assert ours.name == others.name
        assert ours.flops <= others.flops


def test_dpo_reads_the_policy_before_every_update_and_the_reference_once(tmp_path: Path) -> None:
    flops: list[float] = []
    for loss in ({"objective": "dpo"}, {"kl_coef": 0.1}):
        setup = setup_of(
            load_config(write_config(tmp_path, {"loss": loss, "optimizer.epochs": 3})), 1
        )
        assert setup.reference == "weights"
        parts = {part.name: part.flops for part in step(QWEN, setup, DEVICES["h100"], 0.4)}
        flops.append(parts["log-probabilities"])
    # Three times and once; with the KL penalty the old ones once, and the reference's.
    assert flops[0] / 4 == flops[1] / 2


def read(name: str, **others: Any) -> Shape:
    return read_shape(ModelConfig.model_validate({"name": name, **others}))


QWEN = read("Qwen/Qwen3-1.7B")
QWEN_SIZE = 1_720_574_976


@pytest.mark.parametrize(
    ("name", "published"),
    [
        # As the model cards and files on the hub have it.
        ("google/gemma-2b", 2_506_172_416),
        ("Qwen/Qwen3-1.7B", QWEN_SIZE),
        ("Qwen3-8B", 8_190_735_360),
    ],
)
def test_the_paper_s_models_have_their_published_sizes(name: str, published: int) -> None:
    shape = read(name)
    assert shape.num_parameters == shape.num_trained == published


def test_a_folder_s_config_is_enough(tmp_path: Path) -> None:
    config = Qwen3Config(**SHAPE, tie_word_embeddings=True)
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = read(str(tmp_path))
    assert shape.num_parameters == sum(p.numel() for p in model.parameters())
    # Each layer's, and the rest, as the names of weights tell.
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    first = sum(size for name, size in sizes.items() if ".layers.0." in name)
    assert shape.layer_parameters == first
    assert shape.root_parameters == shape.num_parameters - SHAPE["num_hidden_layers"] * first
    products = [size for name, size in sizes.items() if name.endswith("_proj.weight")]
    assert shape.matrices == sum(products)


def test_adapters_alone_are_trained() -> None:
    shape = read("Qwen3-1.7B", lora=LoraConfig(rank=4, targets=["q_proj"]))
    # 28 layers, from 2,048 to 4 and from there to 2,048.
    assert shape.num_trained == 28 * 4 * (2048 + 2048)
    assert shape.num_parameters == QWEN_SIZE + shape.num_trained
    assert not shape.head_trained
    # They need not be on all layers.
    one = read("Qwen3-1.7B", lora=LoraConfig(rank=4, targets=["layers.0.self_attn.q_proj"]))
    assert one.num_trained == 4 * (2048 + 2048)


def saved_bytes(model: LanguageModel, setup: Setup) -> int:
    """What autograd keeps of a pass, weights aside."""
    weights = {p.untyped_storage().data_ptr() for p in model.model.parameters()}
    kept: dict[int, int] = {}
    alive: list[Any] = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)
        return x

    own = rollouts(setup)
    groups = [
        [TrainedRollout(each) for each in own[n : n + setup.group_size]]
        for n in range(0, len(own), setup.group_size)
    ]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), model.autocast():
        alive.append(model.hidden(Pass(groups, model).layout))
    return sum(kept.values())


@pytest.mark.parametrize("family", ["smollm2", "qwen3"])
@pytest.mark.parametrize("precision", ["fp32", "autocast"])
@pytest.mark.parametrize("lengths", [(4, 4, 64, 4), (2, 4, 16, 16)])
@pytest.mark.parametrize("attends", ["in one block", "in blocks", "by a kernel"])
def test_a_layer_keeps_as_many_bytes_as_torch_saves(
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    precision: str,
    lengths: tuple[int, int, int, int],
    attends: str,
) -> None:
    limit = 2.0**40 if attends != "by a kernel" else 0.0
    monkeypatch.setattr(attention, "PLAIN_LIMIT", dict.fromkeys(attention.PLAIN_LIMIT, limit))
    if attends == "in blocks":
        for module in (attention, cost):
            monkeypatch.setattr(module, "BLOCK_ROWS", 3)
            monkeypatch.setattr(module, "BLOCK_SCORES", 100)
    setup = replace(tiny_setup(*lengths), precision=precision, plain_limit=limit)
    (work,) = passes(setup, setup.prompts)
    saved: list[int] = []
    # Two models of different depth: the difference is layers alone.
    for num_layers in (1, 3):
        monkeypatch.setitem(SHAPE, "num_hidden_layers", num_layers)
        model = tiny_model(family, precision=precision)
        saved.append(saved_bytes(model, setup))
    shape = shape_of(model.model)
    converted = 2 * shape.matrices / shape.num_layers if precision == "autocast" else 0
    measured = (saved[1] - saved[0]) / 2 - converted
    assert layer_activations(shape, setup, work) == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("shards", [2, 8])
def test_ranks_divide_what_they_hold(shards: int) -> None:
    one = tiny_setup(64, 4, 512, 64)
    alone = memory(QWEN, one)
    together = memory(QWEN, replace(one, ranks=shards))
    copies = memory(QWEN, replace(one, ranks=2 * shards, replicate=2))
    for name in ("weights", "gradients", "moments"):
        assert getattr(together, name) == getattr(alone, name) / shards
        assert getattr(copies, name) == getattr(together, name)
    # 4 bytes of a weight, its gradient and each moment.
    assert alone.weights == alone.gradients == alone.moments / 2 == 4 * QWEN_SIZE
    assert alone.unsharded == 0 < together.unsharded < 8 * QWEN_SIZE


def test_gradients_are_beside_activations_only_after_an_earlier_pass() -> None:
    once = replace(tiny_setup(64, 4, 512, 64), token_budget=10**9)
    (work,) = passes(once, once.prompts)
    twice = replace(once, token_budget=work.tokens // 2)
    alone, second = memory(QWEN, once), memory(QWEN, twice)
    assert (alone.accumulated, second.accumulated) == (0, alone.gradients)
    # Of one pass activations make room for gradients, layer by layer.
    assert alone.peak == alone.held + alone.activations + max(alone.logits, alone.backward)
    assert second.peak == pytest.approx(
        second.held + second.gradients + second.activations + max(second.logits, second.backward)
    )
    small = replace(once, prompts=1, group_size=1, prompt_tokens=2, completion_tokens=2)
    assert memory(QWEN, small).peak >= memory(QWEN, small).held + alone.gradients


@pytest.mark.parametrize("engine", ["transformers", "vllm", "servers"])
def test_what_ranks_send_each_other(engine: str) -> None:
    # A step of one pass, after whose update the weights are put together once for generation.
    whole = replace(tiny_setup(2, 1, 8, 2, engine=engine), precision="bf16")
    device = Device("x", 1e30, 1e30, 1e30, bandwidth=1.0, link=1.0, source="", launch_s=0.0)
    adapted = read("Qwen3-1.7B", lora=LoraConfig(rank=4, targets=["q_proj"]))
    adapters = 4 * adapted.num_trained
    everything = 2 * adapted.num_parameters
    for shape, generated, trained in (
        # 2 bytes of each weight; 4 of an adapter's, and of those that vLLM gets no others.
        (QWEN, 2 * QWEN_SIZE, 2 * QWEN_SIZE),
        (adapted, everything if engine == "transformers" else adapters, adapters),
    ):
        parts = {
            part.name: part.seconds for part in step(shape, replace(whole, ranks=2), device, 1.0)
        }
        passed = 2 * shape.num_parameters
        # Half of all weights is there, before generation and twice in the update; half of gradients.
        assert parts["between ranks"] == pytest.approx((generated + 2 * passed + trained) / 2)
        # Read and written.
        assert parts.get("weights to the engine", 0) == pytest.approx(
            0 if engine == "transformers" else 2 * generated
        )


def test_checkpointing_keeps_less_and_computes_more() -> None:
    setup = tiny_setup(64, 4, 512, 64)
    less = replace(setup, gradient_checkpointing=True)
    assert memory(QWEN, less).activations < memory(QWEN, setup).activations / 5
    (*_, work) = passes(setup, setup.prompts)
    again = flops(backward(QWEN, less, work)) - flops(backward(QWEN, setup, work))
    assert again == flops(forward(QWEN, setup, work))


def test_time_is_the_longer_of_arithmetic_and_traffic() -> None:
    setup = tiny_setup(1, 1, 1, 1)
    device = Device("x", 9.0, 4.0, 1.0, bandwidth=10.0, link=5.0, source="", launch_s=100.0)
    assert Kernels(8.0, 10.0).seconds(setup, device, 0.5) == 4.0
    assert Kernels(8.0, 50.0).seconds(setup, device, 0.5) == 5.0
    assert Kernels(8.0, 10.0, received=10.0).seconds(setup, device, 1.0) == 4.0
    # A CPU starts an operator when the one before is through.
    started = sum(k.launches for k in decode(QWEN, replace(setup, completion_tokens=2)))
    assert started > 0
    waiting, going_on = (
        {
            part.name: part.seconds
            for part in step(
                QWEN, replace(setup, completion_tokens=2), replace(device, waits=waits), 1.0
            )
        }["decode"]
        for waits in (True, False)
    )
    other = {
        part.name: part.seconds
        for part in step(
            QWEN, replace(setup, completion_tokens=2), replace(device, launch_s=0.0), 1.0
        )
    }["decode"]
    assert waiting == pytest.approx(other + 100.0 * started)
    assert going_on == max(other, 100.0 * started)


# The command.


def planned(capsys: Capture, *arguments: object) -> Any:
    capsys.readouterr()
    assert main(["plan", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_plan_of_a_run(tmp_path: Path, capsys: Capture) -> None:
    config = write_config(
        tmp_path,
        {
            "model": {"name": "Qwen/Qwen3-8B", "gradient_checkpointing": True},
            "run.prompts_per_step": 64,
            "generation": {"group_size": 2, "max_prompt_tokens": 512, "max_new_tokens": 64},
            "loss": {"kl_coef": 0.1},
        },
    )
    found = planned(capsys, config, "--gpus", 8, "--gpu", "H100")
    assert found["device"]["name"] == "h100"
    # Four bytes each; weights in fp32 are what learns.
    assert found["memory"]["weights"] == found["memory"]["reference"] == 8_190_735_360 * 4 / 8
    assert found["fits"] == (found["peak_bytes"] <= found["usable_bytes"]) is True
    assert found["setup"]["precision"] == "autocast"
    assert [case["prompt_tokens"] for case in found["cases"]] == [128] * 3 + [256] * 3 + [512] * 3
    last = found["cases"][-1]
    assert last["flops"] == sum(part["flops"] for part in found["parts"])
    assert last["unshared_flops"] > last["flops"]

    assert main(["plan", str(config), "--gpus", "1", "--gpu", "l4"]) == 0
    said = capsys.readouterr().out
    assert "does not fit into 22" in said
    assert "note: less memory is taken with a smaller optimizer.token_budget, more GPUs" in said


def test_lengths_that_are_given_are_planned_for(tmp_path: Path, capsys: Capture) -> None:
    config = write_config(tmp_path, {"model": {"name": "gemma-2b"}})
    found = planned(
        capsys,
        *(config, "--gpu", "b200", "--prompt-tokens", "100,10", "--completion-tokens", "7"),
        *("--group-sizes", "2,4", "--set", "run.prompts_per_step=3"),
    )
    assert [[c["prompt_tokens"], c["group_size"]] for c in found["cases"]] == [
        [10, 2],
        [10, 4],
        [100, 2],
        [100, 4],
    ]
    assert found["setup"]["prompt_tokens"] == 100
    assert found["setup"]["group_size"] == 4
    assert found["setup"]["prompts"] == 3


def test_what_runs_say_of_memory_and_time_is_read(tmp_path: Path) -> None:
    settings = {
        "generation.engine": "vllm",
        "generation.vllm": {
            "kv_cache_gib": 3.0,
            "tensor_parallel_size": 2,
            "servers": ["http://localhost:8000"],
        },
        "model.precision": "bf16",
        "model.lora": {},
        "loss": {"old_logprobs": "rollout", "kl_coef": 0.1},
        "optimizer": {"token_budget": 99, "epochs": 2, "minibatches": 3},
        "parallel": {"replicate": 2},
    }
    wanted = Setup(
        prompts=4,
        group_size=2,
        prompt_tokens=2048,
        completion_tokens=3,
        token_budget=99,
        epochs=2,
        minibatches=3,
        recomputed=False,
        reference="adapters",
        precision="bf16",
        ranks=4,
        replicate=2,
        engine="servers",
        engine_ranks=2,
        engine_bytes=1.5 * 2**30,
        engine_sleeps=True,
    )
    assert setup_of(load_config(write_config(tmp_path, settings)), 4) == wanted
    settings["generation.vllm"] = {"kv_cache_gib": 3.0}
    within = replace(wanted, engine="vllm", engine_ranks=1, engine_bytes=3 * 2**30)
    assert setup_of(load_config(write_config(tmp_path, settings)), 4) == within


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu", "h1000"], "there is no GPU 'h1000' here; expected a100-40gb, a100-80gb, b200, "),
        (["--gpus", "2"], "Missing option '--gpu'"),
        (["--gpu", "h100", "--gpus", "0"], "Invalid value for '--gpus': "),
        (
            ["--gpu", "h100", "--prompt-tokens", "x"],
            "--prompt-tokens is 'x'; expected whole numbers",
        ),
        (
            ["--gpu", "h100", "--group-sizes", "4,0"],
            "a length of a group is 0; expected at least 1",
        ),
        (
            ["--gpu", "h100", "--gpus", "2", "--set", "parallel.offload=true"],
            "parallel.offload is not counted here; expected false",
        ),
        (
            ["--gpu", "h100", "--gpus", "3", "--set", "parallel.replicate=2"],
            "parallel.replicate is 2, and there are 3 GPUs; expected a multiple of it",
        ),
        (
            [
                *("--gpu", "h100", "--gpus", "2", "--set", "generation.engine=vllm"),
                *("--set", "generation.vllm.tensor_parallel_size=2"),
            ],
            "generation.vllm.tensor_parallel_size is 2, and each of 2 processes has a vLLM of its own",
        ),
        (
            ["--gpu", "h100", "--set", "model.name=./none"],
            "./none does not exist; expected a folder",
        ),
    ],
)
def test_what_cannot_be_planned(
    tmp_path: Path, capsys: Capture, arguments: list[str], words: str
) -> None:
    assert main(["plan", str(write_config(tmp_path)), *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


SIZES = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "vocab_size": 16,
    "moe_intermediate_size": 8,
    "intermediate_size": 8,
}
EXPERTS = {**SIZES, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
LATENT = {"kv_lora_rank": 4, "q_lora_rank": 4, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4}
UNKNOWN_EXPERTS = "has weights of 3 axes (mlp.experts.gate_up_proj), whose cost is not known here"
GPT2 = {"n_embd": 8, "n_layer": 2, "n_head": 2, "vocab_size": 16}


@pytest.mark.parametrize(
    ("family", "sizes", "words"),
    [
        ("qwen3_moe", {**SIZES, "num_experts": 4}, f"Qwen3MoeForCausalLM {UNKNOWN_EXPERTS}"),
        # A dense layer first.
        (
            "qwen3_moe",
            {**SIZES, "num_experts": 4, "mlp_only_layers": [0]},
            f"Qwen3MoeForCausalLM {UNKNOWN_EXPERTS}",
        ),
        (
            "glm4_moe",
            {**EXPERTS, "first_k_dense_replace": 1},
            f"Glm4MoeForCausalLM {UNKNOWN_EXPERTS}",
        ),
        (
            "deepseek_v3",
            {**EXPERTS, **LATENT, "first_k_dense_replace": 1},
            f"DeepseekV3ForCausalLM {UNKNOWN_EXPERTS}",
        ),
        # Dense layers alone.
        (
            "deepseek_v3",
            {**EXPERTS, **LATENT, "first_k_dense_replace": 2},
            "DeepseekV3ForCausalLM compresses keys and values (kv_lora_rank is 4), and the cost of "
            "that is not known here",
        ),
        (
            "mamba",
            SIZES,
            "MambaForCausalLM has weights of 3 axes (mixer.conv1d.weight), whose cost is not known",
        ),
        (
            "gpt2",
            GPT2,
            "the config of GPT2LMHeadModel has no single num_key_value_heads, without which its cost "
            "is not known here",
        ),
        (
            "gpt_neox",
            {key: size for key, size in SIZES.items() if key != "num_key_value_heads"},
            "the config of GPTNeoXForCausalLM has no single num_key_value_heads",
        ),
        (
            "opt",
            {
                "hidden_size": 8,
                "word_embed_proj_dim": 8,
                "ffn_dim": 8,
                "vocab_size": 16,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "num_hidden_layers": 2,
            },
            "the config of OPTForCausalLM has no single intermediate_size",
        ),
        # Its products are modules of its own.
        (
            "gpt2",
            {**GPT2, "num_key_value_heads": 2, "intermediate_size": 32},
            "GPT2LMHeadModel has no torch.nn.Linear in its layers, and the cost of others is not known",
        ),
    ],
)
def test_models_whose_cost_is_not_known_are_refused(
    tmp_path: Path, capsys: Capture, family: str, sizes: dict[str, Any], words: str
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": family, **sizes}))
    config = write_config(tmp_path, {"model": {"name": str(tmp_path / "model")}})
    capsys.readouterr()
    assert main(["plan", str(config), "--gpu", "h100"]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_layers_that_differ_are_refused() -> None:
    model = AutoModelForCausalLM.from_config(Qwen3Config(**SHAPE))
    layer = model.model.layers[1]
    layer.mlp.down_proj = torch.nn.Linear(2 * SHAPE["intermediate_size"], SHAPE["hidden_size"])
    words = (
        "^Qwen3ForCausalLM has layers whose weights differ in shape, and the cost of such is not"
    )
    with pytest.raises(ModelError, match=words):
        shape_of(model)


def test_published_models_are_read_where_there_is_no_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert {read(name).num_layers for name in PUBLISHED} == {18, 28, 36}
    # A folder of that name goes first.
    Qwen3Config(**SHAPE).save_pretrained(tmp_path / "qwen3-8b")
    assert read(str(tmp_path / "qwen3-8b")).hidden == SHAPE["hidden_size"]
