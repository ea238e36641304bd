"""Checkpoints: everything a run needs to go on bit by bit, written whole or not at all.

`checkpoints/step-000040/` holds

    model/                 the weights (or adapters) and tokenizer, as transformers loads them
    optimizer.safetensors  AdamW's moments by parameter name
    state.json             step, number of updates, histories, clusterer
    manifest.json          size and SHA-256 of every other file

Every random number of a run comes from a generator keyed by (seed, purpose, step), and the place in
the data follows from the step, so there is no further state to save.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pgrpo.errors import CheckpointError, RunFolderError
from pgrpo.runs.disk import disk_errors, flush
from pgrpo.runs.folder import RunFolder
from pgrpo.train.policy import Policy

_NAME = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    step: int

    @property
    def model(self) -> Path:
        """Folder with the weights or adapters."""
        return self.path / "model"

    def state(self) -> dict[str, Any]:
        """Contents of state.json."""
        return cast(dict[str, Any], json.loads((self.path / "state.json").read_text("utf-8")))

    def restore_optimizer(self, policy: Policy) -> None:
        """Put AdamW's moments back; the policy's model must come from this checkpoint's `model`."""
        tensors = load_file(self.path / "optimizer.safetensors")
        expected = {
            f"{n}/{k}" for n in policy.parameters for k in ("step", "exp_avg", "exp_avg_sq")
        }
        if set(tensors) != expected:
            stranger = min(set(tensors) ^ expected)
            raise CheckpointError(
                f"checkpoint {self.path} does not fit the model: {stranger} differs"
            )
        for name, parameter in policy.parameters.items():
            policy.optimizer.state[parameter] = {
                # AdamW keeps its step count on the CPU unless it is fused on a GPU.
                key: tensors[f"{name}/{key}"].to(parameter.device)
                for key in ("step", "exp_avg", "exp_avg_sq")
            }


def save_checkpoint(
    folder: Path,
    step: int,
    policy: Policy,
    state: Mapping[str, Any],
    keep: int,
    best: int | None = None,
) -> Checkpoint:
    """Write a checkpoint beside the others, then drop all but the newest `keep` and that of the step
    `best`.

    It is written under another name, flushed to the disk and renamed: a process that is killed in
    between leaves the earlier checkpoints as they were.

    Raises:
        RunFolderError: the disk is full or refuses; what was there is untouched.
    """
    final, partial = folder / f"step-{step:06d}", folder / f".partial-{step:06d}"
    what = f"checkpoint of step {step} cannot be written in {folder}"
    discard_partial(folder)
    try:
        with disk_errors(what):
            partial.mkdir(parents=True)
            policy.model.model.save_pretrained(str(partial / "model"))
            policy.model.tokenizer.save_pretrained(str(partial / "model"))
            save_file(_optimizer_tensors(policy), partial / "optimizer.safetensors")
            (partial / "state.json").write_text(json.dumps({**state, "step": step}), "utf-8")
            files = sorted(path for path in partial.rglob("*") if path.is_file())
            manifest = {path.relative_to(partial).as_posix(): _digest(path) for path in files}
            (partial / "manifest.json").write_text(json.dumps(manifest, indent=2), "utf-8")
            for path in [*files, partial / "manifest.json", partial / "model", partial]:
                flush(path)
            if final.exists():
                shutil.rmtree(final)
            os.rename(partial, final)
            flush(folder)
    except (RunFolderError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, SafetensorError):
            raise RunFolderError(f"{what}: {error}") from error
        raise
    for old in list_checkpoints(folder)[:-keep]:
        if old.step != best:
            # Under another name, one that is half deleted is not taken for a checkpoint.
            os.rename(old.path, doomed := folder / f".partial-{old.path.name}")
            shutil.rmtree(doomed)
    return Checkpoint(final, step)


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """Complete checkpoints, oldest first."""
    found = [
        Checkpoint(path, int(match[1]))
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := _NAME.fullmatch(path.name))
    ]
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def latest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint, verified against its manifest; None where there is none.

    Raises:
        CheckpointError: it is damaged; the sentence names the file and what to do.
    """
    checkpoints = list_checkpoints(folder)
    if not checkpoints:
        return None
    newest = checkpoints[-1]
    damage = _damage(newest.path)
    if damage:
        earlier = [str(c.step) for c in checkpoints[:-1]]
        advice = f"the one of step {earlier[-1]}" if earlier else "the beginning"
        raise CheckpointError(
            f"checkpoint {newest.path} is damaged: {damage}; move that folder away to go on from "
            f"{advice}"
        )
    return newest


def chosen_checkpoint(run: RunFolder, *, best: bool) -> Checkpoint:
    """A run's newest checkpoint, or that of its best held-out reward (`RunFolder.best_step`), verified.

    Raises:
        CheckpointError: it is not there, or damaged.
    """
    if not best:
        newest = latest_checkpoint(run.checkpoints)
        if newest is None:
            raise CheckpointError(f"{run.path} has no checkpoint yet")
        return newest
    checkpoints = {checkpoint.step: checkpoint for checkpoint in list_checkpoints(run.checkpoints)}
    # What was evaluated after the newest checkpoint will be evaluated again.
    step = run.best_step(max(checkpoints, default=0))
    if step is None:
        raise CheckpointError(f"{run.path} has no checkpoint of an evaluated step yet")
    if step not in checkpoints:
        raise CheckpointError(
            f"{run.path} has its best held-out reward after step {step}, and no checkpoint of that; "
            "run.keep_best = true keeps it"
        )
    damage = _damage(checkpoints[step].path)
    if damage:
        raise CheckpointError(f"checkpoint {checkpoints[step].path} is damaged: {damage}")
    return checkpoints[step]


def discard_partial(folder: Path) -> None:
    """Remove what a killed save left behind."""
    for path in folder.glob(".partial-*"):
        shutil.rmtree(path)


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        manifest: dict[str, Any] = json.loads((path / "manifest.json").read_text("utf-8"))
        for name in sorted({"optimizer.safetensors", "state.json"} - manifest.keys()):
            return f"manifest.json does not list {name}"
        for name, expected in manifest.items():
            if not (path / name).is_file():
                return f"{name} is missing"
            size = (path / name).stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} bytes, expected {expected['bytes']}"
            if _digest(path / name) != expected:
                return f"{name} does not match its checksum"
    except FileNotFoundError:
        return "manifest.json is missing"
    except (ValueError, AttributeError, TypeError, KeyError):
        return "manifest.json cannot be read"
    return None


def _digest(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _optimizer_tensors(policy: Policy) -> dict[str, torch.Tensor]:
    return {
        f"{name}/{key}": value.detach().cpu().contiguous()
        for name, parameter in policy.parameters.items()
        for key, value in policy.optimizer.state[parameter].items()
    }
