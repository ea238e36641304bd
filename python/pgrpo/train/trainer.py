"""The training loop, top to bottom.

dataset -> prompts -> engine -> rewards -> histories -> advantages (`collector`) -> update -> engine.
Data moves one way. With `run.pipeline = "one_step_off"` the next step's batch is collected in a
thread while this one's updates the policy; weights move between the two, so a seeded run repeats in
either pipeline.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from pgrpo.clusters.builtin import cluster_users, describe
from pgrpo.data import load_dataset
from pgrpo.errors import PgrpoError
from pgrpo.model.language_model import LanguageModel, load_language_model
from pgrpo.plugins.registry import Registry, load_registry
from pgrpo.report import Verdict, write_report
from pgrpo.rewards.scorer import Scorer
from pgrpo.rollout.collector import Batch, Collector
from pgrpo.rollout.engines import Engine, SyncStats, make_engine
from pgrpo.rollout.prompts import PromptBuilder
from pgrpo.rollout.seeds import derive_seed
from pgrpo.runs import metrics
from pgrpo.runs.config import Config
from pgrpo.runs.display import Display, Stopwatch
from pgrpo.runs.folder import RunFolder
from pgrpo.train.checkpoint import Checkpoint, discard_partial, latest_checkpoint, save_checkpoint
from pgrpo.train.evaluation import evaluate, held_out
from pgrpo.train.policy import Policy
from pgrpo.types import ClusterId


class Trainer:
    """One run: everything loaded and checked, then stepped through.

    Args:
        config: of the run.
        folder: the run's folder, locked.
        display: where progress goes.
    """

    def __init__(self, config: Config, folder: RunFolder, display: Display) -> None:
        self.config = config
        self.folder = folder
        self.display = display
        if config.run.num_threads:
            torch.set_num_threads(config.run.num_threads)
        discard_partial(folder.checkpoints)
        checkpoint = latest_checkpoint(folder.checkpoints)
        registry = load_registry()
        display.note(f"loading data set {config.data.name}")
        self.dataset = load_dataset(config.data)
        self.clusters = self._cluster(registry, checkpoint)
        self.scorer = _scorer(registry, config.rewards, config.run.seed)
        self.held_out_scorer = (
            _scorer(registry, config.evaluation, config.run.seed)
            if config.evaluation
            else self.scorer
        )
        display.note(f"loading model {config.model.name}")
        self.model = self._load_model(checkpoint)
        self.builder = PromptBuilder(
            self.model.tokenizer, config.model, config.generation, self.clusters
        )
        # Built now, so that what is wrong with them is told before the first step.
        examples = held_out(self.dataset, config.run.eval_prompts) if config.run.eval_every else []
        self.held_out_prompts = [self.builder.build(example) for example in examples]
        self.policy = Policy(
            self.model,
            config.resolved_loss(),
            config.optimizer,
            num_steps=config.run.num_steps,
            temperature=config.generation.temperature,
            max_new_tokens=config.generation.max_new_tokens,
            reference=self._load_reference(),
        )
        self.engine: Engine = make_engine(
            config.generation,
            self.model,
            config.model,
            may_sleep=config.run.pipeline == "synchronous",
        )
        self.collector = Collector(
            config.run,
            config.estimator,
            config.generation.group_size,
            self.dataset,
            self.clusters,
            self.builder,
            self.engine,
            self.scorer,
        )
        # OpenMP counts threads per thread, and vLLM's kernels take the count as they find it.
        self._thread = ThreadPoolExecutor(
            1, "collector", torch.set_num_threads, (torch.get_num_threads(),)
        )
        self._batch: Batch | None = None  # collected, not yet learned from
        self._ahead: Future[Batch] | None = None  # the one after it, while it is collected
        self._synced_version: int | None = None
        self._sync_stats: SyncStats | None = None
        self.done = 0
        self.saved = 0
        self.policy_version = 0
        self._updating = False
        self._warned: set[str] = set()
        if checkpoint is not None:
            self._restore(checkpoint)
        folder.rewind(self.done)

    def run(self) -> Verdict:
        """Take all remaining steps and write the report; returns what it says first."""
        config, run = self.config, self.config.run
        if not self.folder.holds_run:
            self.folder.create(config)
        self._write_info("running")
        tensorboard = (
            metrics.EventFile(self.folder.path / "tensorboard", self.done + 1)
            if run.tensorboard
            else None
        )
        with self.scorer, self.held_out_scorer, closing(self.engine), self._thread:
            try:
                # A run that failed in an evaluation was saved before it.
                evaluated = {r["step"] for r in self.folder.records("evaluations.jsonl")}
                if self.done not in evaluated:
                    self._evaluate_if_due(self.done, tensorboard)
                for step in range(self.done + 1, run.num_steps + 1):
                    record, samples = self.step(step)
                    self.folder.append("metrics.jsonl", record)
                    self.folder.append("samples.jsonl", *samples)
                    if tensorboard is not None:
                        tensorboard.write(record, step)
                    self.display.step(record, samples[0] if samples else None)
                    self.done, self._updating = step, False
                    self._evaluate_if_due(step, tensorboard)
                    if step % run.checkpoint_every == 0 or step == run.num_steps:
                        self._save(step)
            except (PgrpoError, KeyboardInterrupt):
                # Between updates all is in order, and nothing of the steps so far need be lost.
                if not self._updating and self.done > self.saved:
                    folded = self.done + (self._unused_batch() is not None)
                    if self.collector.num_folded == folded:
                        self._save(self.done)
                raise
        self._write_info("finished")
        self.display.note(f"done: {config.run.num_steps} steps in {self.folder.path}")
        return write_report([self.folder.path], self.folder.path / "report.html")

    def step(self, step: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Take one step: its metrics and samples."""
        config, watch = self.config, Stopwatch()
        batch = self._next_batch(step, watch)
        rollouts, rewards, advantages = batch.rollouts, batch.rewards, batch.advantages
        rewarded = [i for i, reward in enumerate(rewards) if np.isfinite(reward)]
        self._updating, self._batch = True, None
        learning_rate = self.policy.learning_rate(step)
        stats = self.policy.update(
            [rollouts[i] for i in rewarded], advantages[rewarded], learning_rate
        )
        self.policy_version += stats.num_updates
        watch.lap("update")

        clusters = metrics.cluster_records(
            rollouts,
            rewards,
            advantages,
            batch.after,
            batch.before if config.estimator.order == "normalize_then_update" else batch.after,
            eps=config.estimator.eps,
            ddof=config.estimator.ddof,
        )
        record: dict[str, Any] = {
            "step": step,
            "reward": float(rewards[rewarded].mean()),
            "loss": stats.loss,
            "grad_norm": stats.grad_norm,
            "learning_rate": learning_rate,
            "num_rollouts": len(rollouts),
            "num_unrewarded": len(rollouts) - len(rewarded),
            "completion_tokens": float(np.mean([len(r.completion_ids) for r in rollouts])),
            "truncated": float(np.mean([r.truncated for r in rollouts])),
            "equal_groups": metrics.equal_groups(rollouts, rewards),
            "entropy": -float(np.mean([np.mean(r.rollout_logprobs) for r in rollouts])),
            "kl": stats.kl if config.loss.kl_coef else None,
            "clipped": stats.clipped,
            "mismatch": asdict(stats.mismatch),
            "policy_version": self.policy_version,
            "rollout_version": min(r.policy_version for r in rollouts),
            "sync": None if self._sync_stats is None else asdict(self._sync_stats),
            "peak_memory_bytes": metrics.peak_memory_bytes(),
            "clusters": clusters,
            "fairness": metrics.fairness(
                [c["reward"] for c in clusters.values() if c["reward"] is not None]
            ),
            "timing_s": {**batch.timing_s, **watch.total()},
        }
        return record, self._samples(batch)

    def _next_batch(self, step: int, watch: Stopwatch) -> Batch:
        """The step's batch; under `one_step_off` the next one's is then under way."""
        if self._ahead is not None:
            self._batch = self._ahead.result()
            self._ahead = None
            watch.lap("wait")
        elif self._batch is None:
            self._sync(watch)
            self._batch = self.collector.collect(step)
            watch.skip()
        if self.config.run.pipeline == "synchronous":
            self.engine.sleep()
        elif step < self.config.run.num_steps:
            self._sync(watch)
            self._ahead = self._thread.submit(self.collector.collect, step + 1)
        return self._batch

    def _sync(self, watch: Stopwatch | None = None) -> None:
        """Let the engine, which must be idle, have the newest weights."""
        if self._synced_version != self.policy_version:
            self._sync_stats = self.engine.sync(self.policy_version)
            self._synced_version = self.policy_version
        if watch is not None:
            watch.lap("sync")

    def _unused_batch(self) -> Batch | None:
        """What was collected and not learned from, once nothing is being collected any more."""
        if self._ahead is None:
            return self._batch
        # What went wrong there is told when the batch is wanted.
        return None if self._ahead.exception() else self._ahead.result()

    def _samples(self, batch: Batch) -> list[dict[str, Any]]:
        """Rollouts for samples.jsonl, spread over the step's groups."""
        rollouts, rewards, advantages = batch.rollouts, batch.rewards, batch.advantages
        wanted = min(self.config.run.samples_per_step, len(rollouts))
        chosen = np.linspace(0, len(rollouts) - 1, wanted).round().astype(int).tolist()
        return [
            {
                "step": batch.step,
                "prompt": rollouts[i].prompt.example.text,
                "completion": rollouts[i].completion,
                "reward": float(rewards[i]) if np.isfinite(rewards[i]) else None,
                "advantage": float(advantages[i]),
                "cluster_id": rollouts[i].prompt.cluster_id,
                "user": rollouts[i].prompt.example.user,
            }
            for i in chosen
        ]

    def _evaluate_if_due(self, step: int, tensorboard: metrics.EventFile | None) -> None:
        run = self.config.run
        if not run.eval_every or (step % run.eval_every and step != run.num_steps):
            return
        self._unused_batch()  # waits until the engine is idle
        self._sync()
        self.display.note(f"evaluating on {len(self.held_out_prompts)} held-out prompts")
        result = evaluate(
            self.engine,
            self.held_out_prompts,
            self.held_out_scorer,
            self.config.optimizer.token_budget,
        )
        record = {"step": step, **result}
        self.folder.append("evaluations.jsonl", record)
        if tensorboard is not None:
            tensorboard.write(result, step, prefix="held_out/")
        self.display.evaluation(record)

    def _cluster(self, registry: Registry, checkpoint: Checkpoint | None) -> dict[str, ClusterId]:
        """Fit the clusterer (or restore it) and assign every user: user -> cluster."""
        dataset = self.dataset
        self.clusterer = registry.clusterer(self.config.clustering)
        state = checkpoint.state()["clusterer"] if checkpoint else None
        clusters = cluster_users(self.clusterer, dataset, state)
        features = np.array(list(dataset.users.values())).reshape(len(clusters), -1)
        self.about = {
            str(cluster): dict(text)
            for cluster, text in describe(
                features, list(clusters.values()), dataset.feature_names
            ).items()
        }
        self.display.about = {cluster: str(text["about"]) for cluster, text in self.about.items()}
        return clusters

    def _load_model(self, checkpoint: Checkpoint | None) -> LanguageModel:
        return load_language_model(
            self.config.model,
            vocabulary=self.dataset.vocabulary,
            seed=derive_seed(self.config.run.seed, "weights"),
            weights=checkpoint.model if checkpoint else None,
        )

    def _load_reference(self) -> LanguageModel | None:
        """The untrained model, where the loss needs it beside the trained one."""
        if not self.config.loss.kl_coef or self.config.model.lora:
            return None
        reference = self._load_model(None)
        reference.model.requires_grad_(False)
        return reference

    def _save(self, step: int) -> None:
        state = {
            **self.collector.state_dict(self._unused_batch()),
            "clusterer": self.clusterer.state_dict(),
            "policy_version": self.policy_version,
            "torch": torch.__version__,
        }
        save_checkpoint(
            self.folder.checkpoints, step, self.policy, state, self.config.run.keep_checkpoints
        )
        self.saved = step
        for warning in self._warnings():
            # Once a kind, whichever clusters and numbers it names.
            kind = re.sub(r"^clusters? .*?: |\d+", "", warning)
            if kind not in self._warned:
                self._warned.add(kind)
                self.display.note(f"warning: {warning}")

    def _warnings(self) -> list[str]:
        """What stands to be warned of, judged by all steps so far."""
        return metrics.warnings(
            self.collector.normalizer.diagnostics(), self.config.loss.aggregation
        )

    def _restore(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state()
        checkpoint.restore_optimizer(self.policy)
        self._batch = self.collector.load_state_dict(state, checkpoint.step)
        self.policy_version = int(state["policy_version"])
        self.done = self.saved = checkpoint.step
        self.display.note(f"continuing after step {self.done}")

    def _write_info(self, status: str) -> None:
        """run.json: what the report has to know besides the logs."""
        examples = held_out(self.dataset, 64) if len(self.dataset.evaluation) else []
        lengths = [len(e.choices) for e in examples if e.choices]
        info = {
            "status": status,
            "started": self.folder.info().get("started")
            or datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "processor": metrics.processor_name(),
            "num_threads": torch.get_num_threads(),
            "precision": self.model.precision,
            "versions": {
                name: version(name) for name in ("pgrpo", "torch", "transformers", "numpy")
            },
            "num_parameters": sum(p.numel() for p in self.model.model.parameters()),
            "num_trained_parameters": sum(p.numel() for p in self.policy.parameters.values()),
            "num_train_examples": len(self.dataset.train),
            "num_held_out_examples": len(self.dataset.evaluation),
            "chance": float(np.mean([1 / n for n in lengths])) if lengths else None,
            "reward_name": " + ".join(section.name for section in self.config.rewards),
            "clusters": self.about,
            "warnings": self._warnings(),
        }
        self.folder.write_info(info)


def _scorer(registry: Registry, sections: Sequence[Any], seed: int) -> Scorer:
    return Scorer([(section, registry.reward(section, seed)) for section in sections])
