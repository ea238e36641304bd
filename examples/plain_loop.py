"""P-GRPO in a training loop of one's own: PyTorch and seventy lines.

A tiny transformer answers with one word. Each of three kinds of users likes other words, and marks
answers on a scale of its own: what delights one of them is a tenth of a point to another.

    python examples/plain_loop.py                                   # on this machine
    torchrun --nproc-per-node 2 examples/plain_loop.py              # the same on two ranks
    python examples/plain_loop.py --estimator grpo                  # the rule of GRPO instead
"""

import argparse
import gc
import os

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

import pgrpo
from pgrpo.integrations.torch import advantages

KINDS = {"critic": (1.0, 0.5), "fan": (10.0, 6.0), "bot": (0.1, 0.0)}  # scale and offset of marks
WORDS, PROMPTS, GROUP = 30, 8, 4

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--estimator", default="pgrpo")
parser.add_argument("--steps", type=int, default=150)
chosen = parser.parse_args()
if ranked := "RANK" in os.environ:
    dist.init_process_group("gloo")
rank = dist.get_rank() if ranked else 0

torch.manual_seed(0)  # the same weights on every rank
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
policy = LlamaForCausalLM(LlamaConfig(vocab_size=WORDS + 3, num_attention_heads=4, **sizes))
model = torch.nn.parallel.DistributedDataParallel(policy) if ranked else policy
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
normalizer = pgrpo.ClusterNormalizer(chosen.estimator)
draw = torch.Generator().manual_seed(rank)  # other prompts and answers on every rank
seen: dict[str, list[float]] = {kind: [] for kind in KINDS}

for step in range(1, chosen.steps + 1):
    kinds = torch.randint(len(KINDS), (PROMPTS,), generator=draw)
    topics = torch.randint(WORDS, (PROMPTS,), generator=draw)
    prompts = torch.stack([WORDS + kinds, topics], 1).repeat_interleave(GROUP, 0)  # [P G, 2]
    logits = model(input_ids=prompts).logits[:, -1, :WORDS]
    words = torch.multinomial(logits.detach().softmax(-1), 1, generator=draw)[:, 0]

    # A kind likes the words that its number divides into; how much, it says on its own scale.
    liked = (words % 3 == prompts[:, 0] - WORDS).float().reshape(PROMPTS, GROUP)
    scale, offset = torch.tensor(list(KINDS.values()))[kinds].T
    rewards = offset[:, None] + scale[:, None] * liked  # [P, G]

    clusters = [list(KINDS)[kind] for kind in kinds]
    weights = advantages(normalizer, rewards, clusters)  # [P, G], of all ranks' histories
    loss = (weights.flatten() * cross_entropy(logits, words, reduction="none")).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    for kind, share in zip(clusters, liked.mean(1).tolist(), strict=True):
        seen[kind].append(share)
    if step % 30 == 0 and rank == 0:
        recent = (f"{kind} {sum(found[-50:]) / 50:.2f}" for kind, found in seen.items())
        print(f"step {step}, liked by kind: {', '.join(recent)}")

if rank == 0:
    checkpoint = {"model": policy.state_dict(), "histories": normalizer.state_dict()}
    torch.save(checkpoint, "plain_loop.pt")
    for kind, history in normalizer.snapshot().items():
        print(f"{kind}: {history.count:.0f} rewards, {history.mean:.2f} ± {history.std:.2f}")
if ranked:
    # The threads of gloo must have ended before Python does, and the model's cycles keep them.
    del model
    gc.collect()
    dist.destroy_process_group()
