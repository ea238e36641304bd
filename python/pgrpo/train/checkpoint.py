"""Checkpoints: everything a run needs to go on bit by bit, written whole or not at all.

`checkpoints/step-000040/` holds

    model/                 the weights (or adapters) and tokenizer, as transformers loads them
    optimizer/             AdamW's moments by parameter name, as torch.distributed.checkpoint lays
                           safetensors out: any number of processes reads what any number wrote
    state.json             step, number of updates, digest of the data, histories, clusterer; where
                           users are divided again, who belongs where, and what is known of each user
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
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError

from pgrpo.errors import CheckpointError, PgrpoError, RunFolderError
from pgrpo.runs.disk import disk_errors, flush
from pgrpo.runs.folder import RunFolder
from pgrpo.runs.terminal import held
from pgrpo.train.parallel import SINGLE, Ranks
from pgrpo.train.policy import Policy

if TYPE_CHECKING:
    from torch.distributed.checkpoint.api import CheckpointException

_NAME = re.compile(r"step-(\d{6,})")

_STATE = (
    "data", "normalizer", "histories", "people", "batch",
    "clusterer", "assignment_version", "assignment", "policy_version",
)  # fmt: skip
"""What a run that goes on reads of state.json, and cannot do without."""


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
        """Contents of state.json.

        Raises:
            CheckpointError: it lacks something, as one that an earlier version wrote may.
        """
        file = self.path / "state.json"
        state = cast(dict[str, Any], json.loads(file.read_text("utf-8")))
        missing = [repr(key) for key in _STATE if key not in state]
        if missing:
            raise CheckpointError(
                f"{file} lacks {', '.join(missing)}: an earlier version of pgrpo wrote it, and this "
                "one cannot go on from it"
            )
        return state

    def restore_optimizer(self, policy: Policy) -> None:
        """Put AdamW's moments back; the policy's model must come from this checkpoint's `model`. Of
        several processes each reads its part.

        Raises:
            CheckpointError: they are not those of the model's parameters.
        """
        # Here and below, for it takes a second that who only looks at checkpoints need not wait.
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
        from torch.distributed.checkpoint.state_dict_loader import load

        reader = HuggingFaceStorageReader(str(self.path / "optimizer"))
        saved: Any = reader.read_metadata().state_dict_metadata
        for parameter in policy.parameters.values():
            # AdamW keeps its step count on the CPU unless it is fused on a GPU.
            policy.optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                **{key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")},
            }
        tensors = _optimizer_tensors(policy)
        strangers = set(saved) ^ set(tensors) or {
            name for name, tensor in tensors.items() if saved[name].size != tensor.shape
        }
        if strangers:
            raise CheckpointError(
                f"checkpoint {self.path} does not fit the model: {min(strangers)} differs"
            )
        with held(), _quietly():
            try:
                load(tensors, storage_reader=reader)
            except CheckpointException as error:
                raise CheckpointError(
                    f"checkpoint {self.path} cannot be read: {_reason(error)}"
                ) from error


def save_checkpoint(
    folder: Path,
    step: int,
    policy: Policy,
    state: Mapping[str, Any],
    keep: int,
    best: int | None = None,
    ranks: Ranks = SINGLE,
) -> Checkpoint:
    """Write a checkpoint beside the others, then drop all but the newest `keep` and that of the step
    `best`.

    It is written under another name, flushed to the disk and renamed: a process that is killed in
    between leaves the earlier checkpoints as they were. Of several processes each writes its part of
    the moments, and one of them the rest.

    Raises:
        RunFolderError: the disk is full or refuses; what was there is untouched.
    """
    final, partial = folder / f"step-{step:06d}", folder / f".partial-{step:06d}"
    what = f"checkpoint of step {step} cannot be written in {folder}"

    def make_room() -> None:
        discard_partial(folder)
        with disk_errors(what):
            partial.mkdir(parents=True)

    def complete() -> None:
        with disk_errors(what):
            try:
                policy.model.save(partial / "model", weights)
            except SafetensorError as error:
                raise RunFolderError(f"{what}: {error}") from error
            (partial / "state.json").write_text(json.dumps({**state, "step": step}), "utf-8")
            _seal(partial, final)

    ranks.first(make_room)
    try:
        ranks.gather(lambda: _save_moments(policy, partial / "optimizer", what))
        weights = policy.model.weights(keep=ranks.leads)
        ranks.first(complete)
    except PgrpoError:
        if ranks.leads:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    ranks.first(lambda: _prune(folder, keep, best))
    return Checkpoint(final, step)


def _save_moments(policy: Policy, folder: Path, what: str) -> list[None]:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    # What interrupts torch here it takes for a failure of its own.
    with held(), disk_errors(what), _quietly():
        try:
            save(_optimizer_tensors(policy), storage_writer=writer)
        except CheckpointException as error:
            raise RunFolderError(f"{what}: {_reason(error)}") from error
    return []


def _reason(error: CheckpointException) -> BaseException:
    """Why torch failed to save or load; an interrupt that did not wait goes on as one."""
    reason, _ = error.failures[min(error.failures)]
    if isinstance(reason, KeyboardInterrupt):
        raise reason
    return reason


def _seal(partial: Path, final: Path) -> None:
    """List the files, have them survive a power cut, and give their folder its name."""
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    manifest = {path.relative_to(partial).as_posix(): _digest(path) for path in files}
    (partial / "manifest.json").write_text(json.dumps(manifest, indent=2), "utf-8")
    folders = [path for path in partial.rglob("*") if path.is_dir()]
    for path in [*files, partial / "manifest.json", *folders, partial]:
        flush(path)
    if final.exists():
        shutil.rmtree(final)
    os.rename(partial, final)
    flush(final.parent)


def _prune(folder: Path, keep: int, best: int | None) -> None:
    for old in list_checkpoints(folder)[:-keep]:
        if old.step != best:
            # Under another name, one that is half deleted is not taken for a checkpoint.
            os.rename(old.path, doomed := folder / f".partial-{old.path.name}")
            shutil.rmtree(doomed)


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
        listed = list(manifest.keys())
        for name in ("optimizer/", "state.json"):
            if not any(each.startswith(name) for each in listed):
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
        f"{name}/{key}": value
        for name, parameter in policy.parameters.items()
        for key, value in policy.optimizer.state[parameter].items()
    }


@contextmanager
def _quietly() -> Generator[None]:
    """Torch warns of every save and load by one process that it is one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
