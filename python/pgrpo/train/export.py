"""A run's model for use elsewhere: weights, tokenizer, and a card that tells of them."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from pgrpo.config.toml import resolved_toml
from pgrpo.errors import ConfigError, RunFolderError
from pgrpo.model.gguf import HUB_NAME, model_folder
from pgrpo.runs.config import Config
from pgrpo.runs.disk import disk_errors
from pgrpo.runs.folder import RunFolder
from pgrpo.runs.records import ClusterInfo, EvaluationRecord, RunInfo
from pgrpo.train.build import Assembly
from pgrpo.train.checkpoint import Checkpoint, chosen_checkpoint

CARD = "README.md"
"""File of the model card, where hubs look for it."""


def export(path: Path, out: Path, *, merge: bool = False, best: bool = False) -> None:
    """Write the model of a run's last checkpoint as a folder that transformers loads on any machine,
    with a model card.

    Args:
        path: the run's folder.
        out: the folder to make, whole or not at all.
        merge: add adapters to the weights that they adapt; without it the folder has adapters alone,
            and whoever loads it fetches the base by its hub name.
        best: take the checkpoint of the best held-out reward in the place of the last.

    Raises:
        RunFolderError: it is no run folder, or `out` exists or cannot be written.
        CheckpointError: there is no such checkpoint, or it is damaged.
        ConfigError: adapters alone are wanted, and their base is on no hub.
    """
    run = RunFolder(path)
    config = run.config()
    checkpoint = chosen_checkpoint(run, best=best)
    if out.exists():
        raise RunFolderError(f"{out} exists already; expected a folder to be made")
    with disk_errors(f"{out} cannot be written"):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as made:
            partial = Path(made) / out.name
            _write_model(config, checkpoint, partial, merge)
            (partial / CARD).write_text(_card(run, config, checkpoint.step, merge), "utf-8")
            for file in partial.rglob("*"):
                # safetensors makes files that their owner alone may read; others may as umask says.
                file.chmod((0o777 if file.is_dir() else 0o666) & ~_umask())
            partial.rename(out)


def _write_model(config: Config, checkpoint: Checkpoint, folder: Path, merge: bool) -> None:
    if config.model.lora is not None and merge:
        with Assembly(config, checkpoint) as parts:
            adapted: Any = parts.model.model
            adapted.merge_and_unload().save_pretrained(str(folder))
            parts.model.tokenizer.save_pretrained(str(folder))
        return
    base = config.model.name
    if config.model.lora is not None and (base == "tiny" or Path(model_folder(base)).exists()):
        raise ConfigError(
            f"the run trained adapters to {base}, which whoever loads them cannot fetch by that name; "
            "expected --merge"
        )
    shutil.copytree(checkpoint.model, folder)
    adapters = folder / "adapter_config.json"
    if adapters.exists():
        told = json.loads(adapters.read_text("utf-8"))
        told |= {"base_model_name_or_path": base, "revision": config.model.revision}
        adapters.write_text(json.dumps(told, indent=2), "utf-8")


def _card(run: RunFolder, config: Config, step: int, merge: bool) -> str:
    info, base, estimator = run.info(), config.model.name, config.estimator
    on_hub = base != "tiny" and HUB_NAME.fullmatch(base) and not Path(base).exists()
    name = Path(base).name if Path(base).exists() else base
    learned_by = f"objective `{config.rule}`"
    if config.loss.takes_estimator:
        history = "" if estimator.history == "cluster" else f":{estimator.history}"
        learned_by = f"estimator `{estimator.name}{history}`"
    # Others have other folders, and need not know of these.
    told = re.sub(r'"(/[^"]*)"', lambda path: f'"{Path(path[1]).name}"', resolved_toml(config))
    trained = (
        f"Trained by pgrpo (P-GRPO, arXiv 2603.10009): {step} steps of "
        f"{config.run.prompts_per_step} prompts with {config.generation.group_size} completions, "
        f"{learned_by}, data set `{config.data.name}`, reward "
        f"`{info.reward_name}`."
    )
    lines = [
        "---",
        "library_name: transformers",
        "tags: [pgrpo, reinforcement-learning]",
        *([f"base_model: {base}"] if on_hub else []),
        "---",
        "",
        f"# {name}, trained for {len(info.clusters)} kinds of users",
        "",
        trained,
        *(["", "Adapters were added to the weights."] if config.model.lora and merge else []),
        "",
    ]
    evaluations = [record for record in run.evaluations if record.step <= step]
    if evaluations:
        lines += _table(info, evaluations[0], evaluations[-1])
    lines += [f"Warning: {warning}" for warning in info.warnings]
    return "\n".join([*lines, "", "## Config", "", "```toml", told.strip(), "```", ""])


def _table(info: RunInfo, before: EvaluationRecord, after: EvaluationRecord) -> list[str]:
    """What each cluster gets, beside what simple rules get."""
    head = ["cluster", "who", "people", "prompts", "before", "after", *info.baselines]
    rows = [head, ["---"] * len(head)]
    for name, values in after.clusters.items():
        who = info.clusters.get(name, ClusterInfo(num_users=0, share=0.0, about=""))
        was = before.clusters[name].reward if name in before.clusters else None
        rules = [_number(who.baselines.get(rule)) for rule in info.baselines]
        counts = [str(who.num_users), str(values.num_prompts)]
        rows.append([name, who.about, *counts, _number(was), _number(values.reward), *rules])
    rules = [_number(value) for value in info.baselines.values()]
    ends = [_number(before.reward), _number(after.reward)]
    rows.append(["all", "", "", str(after.num_prompts), *ends, *rules])
    how = "sampled" if after.num_samples else "greedy"
    said = f"Held-out reward of {how} completions, before training and after step {after.step}:"
    return [said, "", *(f"| {' | '.join(row)} |" for row in rows), ""]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _umask() -> int:
    # It can be asked for only by setting it.
    found = os.umask(0o022)
    os.umask(found)
    return found
