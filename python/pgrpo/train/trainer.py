"""The training loop, top to bottom.

dataset -> prompts -> engine -> rewards -> histories -> advantages (`collector`) -> update -> engine.
Data moves one way. With `clustering.recluster_every` users are divided again between two steps. With
`run.pipeline = "one_step_off"` the next step's batch is collected in a thread while this one's updates
the policy; weights move between the two, so a seeded run repeats in either pipeline.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version

import numpy as np
import torch

from pgrpo.clusters.division import Division, divide_again
from pgrpo.errors import PgrpoError, PluginError
from pgrpo.report import Verdict, write_report
from pgrpo.rollout.collector import Batch
from pgrpo.rollout.engines import SyncStats
from pgrpo.runs import metrics
from pgrpo.runs.config import Config
from pgrpo.runs.display import Display, Stopwatch
from pgrpo.runs.folder import RunFolder
from pgrpo.runs.records import ClusterInfo, RunInfo, SampleRecord, StepRecord
from pgrpo.runs.sinks import Sinks, open_sinks, require_trackers
from pgrpo.runs.terminal import held
from pgrpo.train.ability import measure_ability
from pgrpo.train.baselines import are_known, baselines
from pgrpo.train.build import Assembly
from pgrpo.train.checkpoint import discard_partial, latest_checkpoint, save_checkpoint
from pgrpo.train.evaluation import evaluate, held_out
from pgrpo.train.parallel import SINGLE, Ranks
from pgrpo.types import FloatArray


def train(config: Config, folder: RunFolder, display: Display, ranks: Ranks = SINGLE) -> Verdict:
    """Take all steps of a run that its folder does not hold yet, and write its report.

    Args:
        config: of the run.
        folder: the run's folder, locked; a checkpoint in it is gone on from.
        display: where progress goes.
        ranks: the processes of the run; one of them writes.

    Returns:
        What the report says first.
    """
    require_trackers(config.run.trackers)
    ranks.first(lambda: discard_partial(folder.checkpoints))
    checkpoint = ranks.first(lambda: latest_checkpoint(folder.checkpoints))
    with Assembly(config, checkpoint, display.note, ranks) as parts:
        trainer = Trainer(parts, folder, display)
        try:
            trainer.run()
        except PluginError as error:
            # The sentence of whoever wrote the plugin; they want to know the line as well.
            raise PluginError(f"{error} (see {folder.log})") from error
    return ranks.first(lambda: write_report([folder.path], folder.path / "report.html"))


class Trainer:
    """The steps of one run.

    Args:
        parts: of the run; all that can be wrong with them is found now, before the first step.
        folder: the run's folder, locked.
        display: where progress goes.
    """

    def __init__(self, parts: Assembly, folder: RunFolder, display: Display) -> None:
        self._watch, self._seconds_before = Stopwatch(), folder.info().seconds
        self._parts = parts
        self.config = config = parts.config
        self.ranks = parts.ranks
        self.folder = folder
        self.display = display
        self.dataset = parts.dataset
        self.members = parts.members
        self.new_people = parts.new_people
        if parts.other_data:
            display.note(f"warning: {parts.other_data}")
        self.registry = parts.registry
        self.held_out_scorer = parts.held_out_scorer
        self._builder = parts.builder
        self._held_out = (
            held_out(self.dataset, config.run.eval_prompts) if config.run.eval_every else []
        )
        self._meet_clusters()
        self.baselines = self._fit_baselines()
        self.policy = parts.policy
        self.engine = parts.engine
        self.collector = parts.collector
        self._batch: Batch | None = None  # collected, not yet learned from
        self._ahead: Future[Batch] | None = None  # the one after it, while it is collected
        self._synced_version: int | None = None
        self._sync_stats: SyncStats | None = None
        self.done = self.saved = 0
        self.policy_version = 0
        self._updating = False
        self._warned: set[str] = set()
        if parts.checkpoint is not None and parts.state is not None:
            self.done = self.saved = parts.checkpoint.step
            self.policy_version = int(parts.state["policy_version"])
            self._batch = self.collector.load_state_dict(parts.state, self.done)
            self.display.note(f"continuing after step {self.done}")
        self.ranks.first(lambda: folder.rewind(self.done))

    def run(self) -> None:
        """Take all remaining steps."""
        config, run = self.config, self.config.run
        self.ranks.first(self._begin)
        # OpenMP counts threads per thread, and vLLM's kernels take the count as they find it.
        threads = (torch.get_num_threads(),)
        with (
            self.ranks.alone(
                lambda: open_sinks(config, self.folder, self.display, self.done + 1)
            ) as sinks,
            ThreadPoolExecutor(1, "collector", torch.set_num_threads, threads) as self._thread,
        ):
            try:
                # A run that failed in an evaluation was saved before it.
                if not self.ranks.first(self._is_evaluated):
                    self._evaluate_if_due(self.done, sinks)
                if not self.done:
                    self._measure_ability(0)
                for step in range(self.done + 1, run.num_steps + 1):
                    self.ranks.heed()
                    self._take(step, sinks)
                    evaluated = self._evaluate_if_due(step, sinks)
                    due = step % run.checkpoint_every == 0 or step == run.num_steps
                    if due or (evaluated and self._best_step(step) == step):
                        self._save(step)
                self._measure_ability(run.num_steps)
            except BaseException as error:
                ended = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
                if self._updating or not isinstance(error, PgrpoError):
                    # Nobody waits for what is being collected: it is of no use after half an update,
                    # and whoever interrupts a run wants it to end.
                    self.collector.interrupt()
                in_order = isinstance(error, PgrpoError | KeyboardInterrupt) and not self._updating
                in_order = in_order and self.ranks.agrees(error)
                # Between updates nothing of the steps so far need be lost.
                if in_order and self.done > self.saved:
                    # A batch that is there must be in the histories, and one that failed must not.
                    folded = self.done + (self._unused_batch() is not None)
                    if self.collector.num_folded == folded:
                        self._save(self.done)
                # A disk that is full has been told of by the error itself.
                with suppress(PgrpoError):
                    if self.ranks.leads:
                        self._write_info(ended, error)
                raise
        self.ranks.first(lambda: self._write_info("finished"))
        self.display.note(f"done: {config.run.num_steps} steps in {self.folder.path}")

    def _begin(self) -> None:
        if not self.folder.holds_run or self.folder.config() != self.config:
            self.folder.create(self.config)
        self._write_info("running")

    def _is_evaluated(self) -> bool:
        return self.done in {record.step for record in self.folder.evaluations}

    def _take(self, step: int, sinks: Sinks) -> None:
        def log(record: StepRecord, samples: list[SampleRecord]) -> None:
            self.ranks.first(lambda: sinks.log(record, samples))

        record, samples = self.step(step, log)
        self.ranks.first(lambda: sinks.show(record, samples))

    def step(
        self, step: int, log: Callable[[StepRecord, list[SampleRecord]], None] | None = None
    ) -> tuple[StepRecord, list[SampleRecord]]:
        """Take one step: its record and samples, which `log` gets before an interrupt is heard."""
        self._divide_if_due(step - 1)
        batch = self._next_batch(step, watch := Stopwatch())
        # An interrupt waits until the update is whole: half of one could not be saved, and all steps
        # since the last checkpoint would be lost.
        with held():
            self._updating, self._batch = True, None
            outcome = self._learn(step, batch, watch)
            if log is not None:
                log(*outcome)
            self.done, self._updating = step, False
        return outcome

    def _learn(
        self, step: int, batch: Batch, watch: Stopwatch
    ) -> tuple[StepRecord, list[SampleRecord]]:
        config = self.config
        learning_rate = self.policy.learning_rate(step)
        stats = self.policy.update(batch.rewarded(), learning_rate)
        self.policy_version += stats.num_updates
        watch.lap("update")
        record = metrics.step_record(
            batch,
            config.estimator,
            self.new_people,
            loss=stats.loss,
            grad_norm=stats.grad_norm,
            learning_rate=learning_rate,
            kl=stats.kl if config.loss.kl_coef else None,
            clipped=stats.clipped,
            exact_entropy=stats.entropy if config.loss.entropy_coef else None,
            mismatch=asdict(stats.mismatch),
            policy_version=self.policy_version,
            sync=None if self._sync_stats is None else asdict(self._sync_stats),
            timing_s={**batch.timing_s, **watch.total()},
        )
        return record, metrics.sample_records(batch, config.run.samples_per_step)

    def _next_batch(self, step: int, watch: Stopwatch) -> Batch:
        """The step's batch; under `one_step_off` the next one's is then under way."""
        if self._ahead is not None:
            self._batch = self._ahead.result()
            self._ahead = None
            watch.lap("wait")
        elif self._batch is None:
            self._sync(watch)
            sampled = self.collector.sample(step)
            self.ranks.heed()
            with held():
                self._batch = self.collector.fold(sampled)
            watch.skip()
        if self.config.run.pipeline == "synchronous":
            self.engine.sleep()
        elif step < self.config.run.num_steps:
            self._sync(watch)
            self._ahead = self._thread.submit(self.collector.collect, step + 1)
        return self._batch

    def _divide_if_due(self, done: int) -> None:
        """Divide the users again, where as many steps have been taken since the last time."""
        clustering, people = self.config.clustering, self.collector.people
        before = self.members.division
        if people is None or not done or done % clustering.recluster_every or before.step == done:
            return

        def divide() -> Division:
            clusterer = self.registry.clusterer(clustering)
            return divide_again(before, clusterer, people.dataset(), done, soft=clustering.soft)

        division = self.ranks.first(divide)
        # An interrupt waits until users and histories fit together.
        with held():
            self.members.division = division
            self.collector.regroup()
        self._meet_clusters()
        moved, users = division.flows[-1]["num_moved"], len(division.cluster_of)
        self.display.note(f"divided {users:,} users again: {moved:,} have moved to another cluster")
        self.ranks.first(lambda: self._write_info("running"))

    def _meet_clusters(self) -> None:
        """Take the clusters as they are now: who they are, and which held-out prompts are theirs."""
        self.display.about = {name: about["about"] for name, about in self.members.about.items()}
        self.held_out_prompts = [self._builder.build(example) for example in self._held_out]

    def _sync(self, watch: Stopwatch | None = None) -> None:
        """Let the engine, which must be idle, have the newest weights."""
        if self._synced_version != self.policy_version:
            self._sync_stats, *_ = self.ranks.gather(
                lambda: [self.engine.sync(self.policy_version)]
            )
            self._synced_version = self.policy_version
        if watch is not None:
            watch.lap("sync")

    def _unused_batch(self) -> Batch | None:
        """What was collected and not learned from, once nothing is being collected any more; None too
        where collecting failed, which the collector's `num_folded` tells apart."""
        if self._ahead is None:
            return self._batch
        # What went wrong there is told when the batch is wanted.
        return None if self._ahead.exception() else self._ahead.result()

    def _evaluate_if_due(self, step: int, sinks: Sinks) -> bool:
        run = self.config.run
        if not run.eval_every or (step % run.eval_every and step != run.num_steps):
            return False
        self._unused_batch()  # waits until the engine is idle
        self._sync()
        self.display.note(f"evaluating on {len(self.held_out_prompts)} held-out prompts")
        prompts, scorer = self.held_out_prompts, self.held_out_scorer
        of = self.members.division.version
        outcome = evaluate(
            step, self.engine, prompts, scorer, self.config, self.ranks, assignment_version=of
        )
        self.ranks.first(lambda: sinks.evaluation(*outcome))
        return True

    def _measure_ability(self, step: int) -> None:
        """Log the general ability after a step, where it is wanted and the run does not have it yet."""

        def is_measured() -> bool:
            return any(record.step == step for record in self.folder.ability)

        if not self.config.run.ability or self.ranks.first(is_measured):
            return
        self.display.note("measuring general ability")
        record = measure_ability(self._parts, step)
        self.ranks.first(lambda: self.folder.ability.append(record))

    def _best_step(self, step: int) -> int | None:
        """The best step so far, where its checkpoint is kept."""
        if not self.config.run.keep_best:
            return None
        return self.ranks.first(lambda: self.folder.best_step(step))

    def _save(self, step: int) -> None:
        state = {
            **self.collector.state_dict(self._unused_batch()),
            "data": self._parts.data_digest,
            "clusterer": self.members.state_dict(),
            "assignment_version": self.members.division.version,
            "assignment": self.members.division.to_json() if self.collector.people else None,
            "policy_version": self.policy_version,
            "torch": torch.__version__,
        }
        # A checkpoint of steps that the logs have lost would be of no use.
        self.ranks.first(self.folder.flush_logs)
        keep, best = self.config.run.keep_checkpoints, self._best_step(step)
        save_checkpoint(self.folder.checkpoints, step, self.policy, state, keep, best, self.ranks)
        self.saved = step
        for warning in self.ranks.first(self._warnings):
            # Once a kind, whichever clusters and numbers it names.
            kind = re.sub(r"^clusters? .*?: |\d+", "", warning)
            if kind not in self._warned:
                self._warned.add(kind)
                self.display.note(f"warning: {warning}")

    def _warnings(self) -> list[str]:
        """What stands to be warned of, judged by all steps so far."""
        aggregation = self.config.loss.aggregation
        found = [
            f"{warning} (reward {reward})" if reward else warning
            for reward, diagnostics in self.collector.diagnostics().items()
            for warning in metrics.warnings(diagnostics, aggregation)
        ]
        return [*metrics.collapse(self.folder.metrics), *found]

    def _fit_baselines(self) -> dict[str, FloatArray]:
        """What rules get on the held-out prompts, [H] by name; empty where that is not known."""
        scored_by = self.config.evaluation or self.config.rewards
        if not self.held_out_prompts or not are_known(scored_by):
            return {}
        self.display.note("fitting baselines")
        found = baselines(self.dataset, self._held_out, self.members.histories("cluster", 0))
        if self.config.clustering.recluster_every:
            # It would be of clusters that are no more.
            found.pop("one rule per cluster", None)
        return {name: scored_by[0].weight * rewards for name, rewards in found.items()}

    def _cluster_info(self) -> dict[str, ClusterInfo]:
        """Who the clusters are, and what the baselines get on their held-out prompts."""
        names = np.array([str(prompt.cluster_id) for prompt in self.held_out_prompts])

        def means(cluster: str) -> dict[str, float]:
            own = names == cluster
            rules = self.baselines.items() if own.any() else ()
            return {rule: float(rewards[own].mean()) for rule, rewards in rules}

        return {
            cluster: ClusterInfo.model_validate({**about, "baselines": means(cluster)})
            for cluster, about in self.members.about.items()
        }

    def _chance(self) -> float | None:
        """Reward of guessing in training: that of the baseline where evaluation has the same reward,
        else 1 / choices, for one of them is worth 1; None where it is another in each cluster, or does
        not stay the same."""
        if any(section.clusters or section.shift for section in self.config.rewards):
            return None
        if "chance" in self.baselines and not self.config.evaluation:
            return float(self.baselines["chance"].mean())
        examples = held_out(self.dataset, 64) if len(self.dataset.evaluation) else []
        lengths = [len(e.choices) for e in examples if e.choices]
        return float(np.mean([1 / n for n in lengths])) if lengths else None

    def _write_info(self, status: str, error: BaseException | None = None) -> None:
        """run.json: what the report has to know besides the logs."""
        found = self.folder.info()
        info = RunInfo(
            status=status,
            error=self.folder.log_error(error) if error and status == "failed" else "",
            id=found.id or secrets.token_hex(6),
            started=found.started or datetime.now(timezone.utc).isoformat(timespec="seconds"),
            seconds=self._seconds_before + self._watch.total()["total"],
            processor=metrics.processor_name(),
            num_threads=torch.get_num_threads(),
            precision=self.policy.model.precision,
            versions={name: version(name) for name in ("pgrpo", "torch", "transformers", "numpy")},
            num_parameters=sum(p.numel() for p in self.policy.model.model.parameters()),
            num_trained_parameters=sum(p.numel() for p in self.policy.parameters.values()),
            num_train_examples=len(self.dataset.train),
            num_held_out_examples=len(self.dataset.evaluation),
            chance=self._chance(),
            reward_name=" + ".join(dict.fromkeys(section.name for section in self.config.rewards)),
            baselines={name: float(rewards.mean()) for name, rewards in self.baselines.items()},
            clusters=self._cluster_info(),
            flows=metrics.flow_records(self.members.division.flows),
            warnings=self._warnings(),
        )
        self.folder.write_info(info)
