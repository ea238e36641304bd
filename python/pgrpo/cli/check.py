"""`pgrpo check`."""

from typing import Annotated

from typer import Option

from pgrpo.cli.arguments import AsJson, ConfigFile, Overrides, load
from pgrpo.runs.terminal import printable


def check(
    config: ConfigFile,
    baselines: Annotated[
        bool, Option("--baselines", help="fit the rules that runs are compared with; half a minute")
    ] = False,
    as_json: AsJson = False,
    overrides: Overrides = None,
) -> None:
    """What a run would begin with, and what looks wrong about it, without weights."""
    settings = load(config, overrides)
    from pgrpo.train.check import check

    found = check(settings, with_baselines=baselines)
    if as_json:
        print(found.model_dump_json(indent=2))
        return
    seen = f"each seen {found.epochs:.2g} times"
    lines = [
        f"{found.num_train:,} prompts to train on, {seen}, and {found.num_held_out:,} held out",
        f"{len(found.clusters):,} clusters:",
    ]
    for name, about in list(found.clusters.items())[:12]:
        who = f": {about['about']}" if about["about"] else ""
        lines.append(f"  {name}, {about['num_users']:,} people ({100 * about['share']:.0f} %){who}")
    if len(found.clusters) > 12:
        lines.append(f"  and {len(found.clusters) - 12:,} more, smaller ones")
    limit = settings.generation.max_prompt_tokens
    lines.append(f"prompts of up to {found.longest_prompt:,} tokens, of at most {limit:,}; some:")
    for prompt in found.prompts:
        lines += [
            "",
            f"  person {prompt.user}, cluster {prompt.cluster}, {prompt.num_tokens} tokens",
        ]
        lines += [f"  | {line}" for line in prompt.text.splitlines()]
        for completion, reward in prompt.rewards.items():
            shown = "no reward" if reward is None else f"reward {reward:g}"
            lines.append(f"  {completion!r}: {shown}")
    lines.append("")
    if found.baselines:
        rules = ", ".join(f"{rule} {reward:.3f}" for rule, reward in found.baselines.items())
        lines.append(f"simple rules get on held-out prompts: {rules}")
    if found.num_parameters:
        lines.append(f"{found.num_parameters:,} parameters")
    if found.memory_bytes:
        lines.append(
            f"{found.memory_bytes / 2**30:.1f} GiB for weights, gradients and AdamW's moments; "
            "activations and the engine come on top"
        )
    lines += [f"note: {sentence}" for sentence in found.notes]
    lines += [f"suspicious: {sentence}" for sentence in found.suspicious]
    if not found.suspicious:
        lines.append("nothing suspicious")
    print(printable("\n".join(lines)))
