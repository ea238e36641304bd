"""Sections that tell what was run: samples, settings, environment."""

from __future__ import annotations

from collections.abc import Sequence

from pgrpo.report import figures
from pgrpo.report.blocks import Block, Cell, Folded, Section, Table, folded, section
from pgrpo.report.context import Context
from pgrpo.report.runs import Run
from pgrpo.report.study import Arm, differing_settings
from pgrpo.report.verdict import number, plural
from pgrpo.runs.metrics import one_of_each
from pgrpo.runs.records import SampleRecord

SAMPLES_PER_STEP = 4
"""Rows of the samples table per arm and step: enough for an impression."""

SAMPLE_ROWS = 24
"""Rows of the samples table, unless there are more arms than half of that."""


def samples(page: Context) -> Section | None:
    """A few rollouts of each arm's first seed, from its first and last step with samples."""
    rows: list[list[Cell | str]] = []
    per_step = min(SAMPLES_PER_STEP, max(1, SAMPLE_ROWS // (2 * len(page.study.arms))))
    for arm in page.study.arms:
        run = next((run for run in arm.runs if run.samples), None)
        if run is None:
            continue
        for step in dict.fromkeys((run.samples[0].step, run.samples[-1].step)):
            chosen = [sample for sample in run.samples if sample.step == step]
            chosen = one_of_each(chosen, lambda sample: sample.cluster_id)
            rows += [_sample(page, arm, sample) for sample in chosen[:per_step]]
    if not rows:
        return None
    header = ["Arm", "Step", "Cluster, user", "Prompt", "Completion", "Reward", "Advantage"]
    return section(
        "Samples",
        [Table(header, rows, {1: "n", 3: "text", 4: "text", 5: "n", 6: "n"})],
        f"At most {plural(per_step, 'logged rollout')} of the first and of the last step of one "
        "seed of each arm, of every cluster in turn: an impression, not a measurement. Long texts open "
        "on a click.",
    )


def held_out_samples(page: Context) -> Section | None:
    """The same held-out prompts, answered by each arm's first seed."""
    found: dict[tuple[str, str, str], dict[str, SampleRecord]] = {}
    for arm in page.study.arms:
        run = next((run for run in arm.runs if run.held_out), None)
        for sample in run.held_out if run else ():
            asked = (str(sample.cluster_id), str(sample.user), sample.prompt)
            found.setdefault(asked, {})[arm.name] = sample
    if not found:
        return None
    asked = one_of_each(list(found), lambda key: key[0])[:SAMPLE_ROWS]
    rows: list[list[Cell | str]] = []
    for key in asked:
        cluster, user, prompt = key
        row: list[Cell | str] = [
            Cell(figures.shorten(cluster, 18), page.cluster_colors.get(cluster, ""), small=[user]),
            folded(prompt, 160),
        ]
        for arm in page.study.arms:
            said = found[key].get(arm.name)
            if said is None:
                row.append("–")
                continue
            cell = folded(said.completion, 120)
            reward = "–" if said.reward is None else number(said.reward)
            row.append(Cell(cell.text, small=[f"reward {reward}"], full=cell.full))
        rows.append(row)
    names = [arm.name for arm in page.study.arms]
    return section(
        "Held-out samples",
        [
            Table(
                ["Cluster, user", "Prompt", *names],
                rows,
                dict.fromkeys(range(1, 2 + len(names)), "text"),
            )
        ],
        "Completions of one seed of each arm at its last evaluation, of every cluster in turn.",
    )


def settings(page: Context) -> Section:
    """What the arms differ in, then all the rest."""
    arms, runs = page.study.arms, page.study.runs
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    differing = set(differing_settings(runs))
    seeds = [k for k in keys if k not in differing and len({r.settings.get(k) for r in runs}) > 1]

    def values(key: str, members: Sequence[Run]) -> str:
        return ", ".join(dict.fromkeys(run.settings.get(key, "–") for run in members))

    first = [*(key for key in keys if key in differing), *seeds]
    rows = [[key, *(values(key, arm.runs) for arm in arms)] for key in first]
    rest = [[key, values(key, runs)] for key in keys if key not in first]
    blocks: list[Block] = []
    if rows:
        blocks.append(Table(["Setting", *(arm.name for arm in arms)], rows, {0: "key"}))
    if rest:
        summary = f"{plural(len(rest), 'setting')} common to all runs"
        blocks.append(Folded(summary, Table(["Setting", "Value"], rest, {0: "key"})))
    return section("Settings", blocks, "What the runs differ in first." if rows else "")


def environment(page: Context) -> Section:
    """Where the runs ran, and the runs themselves."""
    infos = [run.info for run in page.study.runs]
    packages = dict.fromkeys(name for info in infos for name in info.versions)
    facts: dict[str, list[str]] = {
        "Processor": [info.processor for info in infos],
        "Threads": [str(info.num_threads or "–") for info in infos],
        "Precision": [info.precision for info in infos],
        "Parameters": [
            f"{info.num_parameters:,}" if info.num_parameters else "–" for info in infos
        ],
        **{name: [info.versions.get(name, "–") for info in infos] for name in packages},
    }
    runs = [
        [
            run.name,
            arm.name,
            run.settings.get("run.seed", "–"),
            f"{run.info.status}: {run.info.error}" if run.info.error else run.info.status,
            str(run.last_step),
            run.info.started.replace("T", " ")[:19],
        ]
        for arm in page.study.arms
        for run in arm.runs
    ]
    header = ["Run", "Arm", "Seed", "Status", "Steps", "Started"]
    machine = [[name, " / ".join(dict.fromkeys(found))] for name, found in facts.items()]
    return section("Environment", [Table(["", ""], machine), Table(header, runs, {2: "n", 4: "n"})])


def _sample(page: Context, arm: Arm, sample: SampleRecord) -> list[Cell | str]:
    cluster = "–" if sample.cluster_id is None else str(sample.cluster_id)
    return [
        Cell(arm.name, page.arm_colors[arm.name]),
        str(sample.step),
        Cell(
            figures.shorten(cluster, 18),
            page.cluster_colors.get(cluster, ""),
            small=[] if sample.user is None else [str(sample.user)],
        ),
        folded(sample.prompt, 160),
        folded(sample.completion, 120),
        "–" if sample.reward is None else number(sample.reward),
        "–" if sample.advantage is None else number(sample.advantage),
    ]
