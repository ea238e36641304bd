"""How much of a step's gradient is signal, by estimator and completions per prompt, on the panel.

A policy stands still, steps are drawn from it over and over, and the gradients they would give are
compared with that of the expected reward. A policy is a checkpoint of a run on the electricity panel,
or the model it began with. Of N training prompts x with choices k there are

    p_k = pi(k | x),   d_k = grad (z_k - z_0),   s_k = grad log p_k = d_k - sum_j p_j d_j,

z the logits and gradients those by all weights. Vectors of 135 million numbers are kept as count
sketches: signs drawn once for each weight, and sums over every WIDTH-th, which leaves inner products as
they are on average (Charikar, Chen and Farach-Colton 2002). A step draws PROMPTS of the prompts and G
completions of each, and asks the normalizer for advantages; its gradient is the mean of A s. Over many
steps, after some that fill the histories:

    signal to noise = |E g|^2 / tr Cov g
    cosine          = E [g . h / (|g| |h|)],   h = mean over x of sum_k p_k r_k s_k.

The first is blind to the length of the gradient, as Adam is; the second also sees where an estimator's
weights turn it away from the gradient of the expected reward, as `cosine_of_mean`, that of E g, does
without the noise. Histories have no lag, for the policy
stands still: that is the best case for them.

    pgrpo train examples/electricity.toml --out runs/gradient --set run.checkpoint_every=10 \
      --set run.keep_checkpoints=9
    python benches/gradient.py runs/gradient --out benches/results/gradient.json \
      --figure docs/images/gradient.svg
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track

from pgrpo import ClusterNormalizer
from pgrpo.model.attention import SharedPrefix
from pgrpo.report.figures import ARM_COLORS
from pgrpo.runs.folder import RunFolder
from pgrpo.train.build import Assembly
from pgrpo.train.checkpoint import list_checkpoints
from pgrpo.train.evaluation import choice_rewards
from pgrpo.types import FloatArray, Prompt, evenly

ARMS = ("grpo", "batch", "lite", "pgrpo:one", "pgrpo", "auto", "shrinkage")
GROUP_SIZES = (1, 2, 4, 8, 16)
PROMPTS = 32
WIDTH = 4096
FILLING = 100
"""Steps before the first that counts."""


@dataclass(frozen=True)
class Policy:
    """N prompts with C choices each, as a policy sees them."""

    probabilities: FloatArray
    """[N, C]"""
    rewards: FloatArray
    """[N, C]"""
    clusters: list[int]
    """[N]"""
    scores: NDArray[np.float32]
    """[N, C, WIDTH] sketches of grad log p."""

    @property
    def expected(self) -> FloatArray:
        """[WIDTH] gradient of the expected reward."""
        weights = self.probabilities * self.rewards / len(self.rewards)
        return np.einsum("nc,ncw->w", weights, self.scores.astype(np.float64))


def policy_of(parts: Assembly, num_prompts: int) -> Policy:
    """Gradients of the logits of each choice, for prompts spread evenly over those of training."""
    prompts = [parts.builder.build(e) for e in evenly(parts.dataset.train, num_prompts)]
    found = [_logits_and_differences(parts, prompt) for prompt in track(prompts, "gradients")]
    logits = np.array([each for each, _ in found])
    probabilities = np.exp(logits - logits.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    differences = np.array([each for _, each in found])
    means = np.einsum("nc,ncw->nw", probabilities.astype(np.float32), differences)
    rewards = choice_rewards(parts.tokenizer, prompts, parts.held_out_scorer)
    numbers = {name: place for place, name in enumerate(parts.members.about)}
    clusters = [numbers[str(prompt.cluster_id)] for prompt in prompts]
    return Policy(probabilities, np.array(rewards), clusters, differences - means[:, None])


def _logits_and_differences(
    parts: Assembly, prompt: Prompt
) -> tuple[FloatArray, NDArray[np.float32]]:
    """[C] and [C, WIDTH] of a prompt: z and the sketch of grad (z_k - z_0)."""
    model = parts.model
    groups = SharedPrefix([prompt.token_ids], [[()]], model.device)
    tokens = [choice[0] for choice in prompt.choices or ()]
    weights = [weight for weight in model.model.parameters() if weight.requires_grad]
    rows = model.hidden(groups)[groups.prompt_rows]
    permitted, column = model.permitted_logits(rows, [tokens])
    logits = permitted[0, [column[token] for token in tokens]]
    sketches = [torch.zeros(WIDTH)]
    for logit in logits[1:]:
        gradients = torch.autograd.grad(logit - logits[0], weights, retain_graph=True)
        sketches.append(_sketch(gradients))
    return logits.detach().double().numpy(), torch.stack(sketches).numpy()


_SIGNS: list[torch.Tensor] = []
"""Of every weight, drawn once."""


def _sketch(gradients: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """[WIDTH] sums of the gradients with their signs, over every WIDTH-th weight."""
    if not _SIGNS:
        generator = torch.Generator().manual_seed(0)
        for gradient in gradients:
            bits = torch.randint(0, 2, (gradient.numel(),), generator=generator, dtype=torch.int8)
            _SIGNS.append(2 * bits - 1)
    found = torch.zeros(WIDTH)
    for gradient, signs in zip(gradients, _SIGNS, strict=True):
        signed = gradient.flatten() * signs
        whole = signed.numel() // WIDTH * WIDTH
        found += signed[:whole].view(-1, WIDTH).sum(0)
        found[: signed.numel() - whole] += signed[whole:]
    return found


def measure(policy: Policy, arm: str, group_size: int, steps: int) -> dict[str, Any]:
    """Signal to noise and cosine of one arm; see the module."""
    num_prompts, num_choices = policy.rewards.shape
    estimator, _, history = arm.partition(":")
    normalizer = ClusterNormalizer(estimator=estimator)
    rng = np.random.default_rng(0)
    ends = policy.probabilities.cumsum(1)
    groups = np.repeat(np.arange(PROMPTS), group_size)
    weights = np.zeros((steps, num_prompts * num_choices), np.float32)
    clusters = np.zeros(num_prompts, np.int64) if history else np.array(policy.clusters)
    for step in range(-FILLING, steps):
        asked = np.repeat(rng.choice(num_prompts, PROMPTS, replace=False), group_size)
        drawn = rng.random(len(asked))[:, None] > ends[asked]
        said = np.minimum(drawn.sum(1), num_choices - 1)
        norms = (1 - policy.probabilities[asked, said]) ** 2
        rewards = policy.rewards[asked, said]
        columns = {"score_norms": norms} if estimator == "auto" else {}
        advantages = normalizer(rewards, clusters[asked], groups, **columns)
        if step >= 0:
            np.add.at(weights[step], asked * num_choices + said, advantages / len(asked))
    gradients = weights @ policy.scores.reshape(-1, WIDTH)
    mean = gradients.mean(0, dtype=np.float64)
    noise = float(gradients.var(0, ddof=1, dtype=np.float64).sum())
    signal = max(float(mean @ mean) - noise / steps, 0.0)
    expected = policy.expected
    lengths = np.linalg.norm(gradients, axis=1)
    cosines = (gradients @ expected)[lengths > 0] / lengths[lengths > 0]
    return {
        "signal_to_noise": signal / noise,
        # A step whose groups are all equal has no direction, and counts as 0.
        "cosine": float(cosines.sum() / np.linalg.norm(expected) / steps),
        "cosine_of_mean": float(mean @ expected / np.linalg.norm(mean) / np.linalg.norm(expected)),
    }


def policies(folder: Path, num_prompts: int) -> Iterator[tuple[int, Policy]]:
    """The model that a run began with, and its checkpoints, by their steps."""
    run = RunFolder(folder)
    for checkpoint in [None, *list_checkpoints(run.checkpoints)]:
        with Assembly(run.config(), checkpoint) as parts:
            yield checkpoint.step if checkpoint else 0, policy_of(parts, num_prompts)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Signal to noise over completions per prompt, a panel for each policy."""
    import matplotlib.pyplot as plt

    steps = list(dict.fromkeys(row["step"] for row in rows))
    figure, panels = plt.subplots(
        1,
        len(steps),
        figsize=(3 * len(steps), 3.5),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for panel, step in zip(panels[0], steps, strict=True):
        for arm, color in zip(ARMS, ARM_COLORS, strict=False):
            own = [row for row in rows if (row["step"], row["arm"]) == (step, arm)]
            sizes = [row["group_size"] for row in own]
            panel.plot(sizes, [r["signal_to_noise"] for r in own], "o-", color=color, label=arm)
        panel.set(title=f"after step {step}", xlabel="completions per prompt")
        panel.set_xscale("log", base=2)
        panel.set_xticks(GROUP_SIZES, map(str, GROUP_SIZES))
        panel.set_yscale("log")
    panels[0][0].set(ylabel=f"signal to noise of a step of {PROMPTS} prompts")
    panels[0][0].legend(fontsize=7)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a run on the panel, with its checkpoints")
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for step, policy in policies(options.run, options.prompts):
        reward = float((policy.probabilities * policy.rewards).sum(1).mean())
        print(f"after step {step}: expected reward {reward:.3f}; signal to noise (cosine)")
        print("| completions |", " | ".join(ARMS), "|")
        print("|---" * (1 + len(ARMS)) + "|")
        for group_size in GROUP_SIZES:
            of_arms = {
                arm: measure(policy, arm, group_size, options.steps)
                for arm in ARMS
                # A group of one tells these nothing.
                if group_size > 1 or arm not in ("grpo", "lite")
            }
            cells = (
                f"{found['signal_to_noise']:.3f} ({found['cosine']:.2f})"
                if (found := of_arms.get(arm))
                else "–"
                for arm in ARMS
            )
            print(f"| {group_size} |", " | ".join(cells), "|", flush=True)
            rows += [
                {"step": step, "arm": arm, "group_size": group_size, "reward": reward, **found}
                for arm, found in of_arms.items()
            ]
    if options.out:
        result = {"prompts": options.prompts, "steps": options.steps, "rows": rows}
        options.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    if options.figure:
        draw(rows, options.figure)


if __name__ == "__main__":
    main()
