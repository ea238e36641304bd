"""The report: what it says is checked against NumPy, what it shows against the parsed page."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from plotly import graph_objects
from scipy import stats

from pgrpo.errors import RunFolderError
from pgrpo.report import figures, write_report
from pgrpo.report.runs import READ_STEPS, read_runs
from pgrpo.report.statistics import mean_and_band, mean_change, moving_mean, tukey_difference
from pgrpo.report.study import EACH, Study
from pgrpo.report.verdict import NO_RANKING, WITHIN_NOISE, number
from pgrpo.runs.folder import RunFolder
from pgrpo.runs.metrics import fairness

CLUSTERS = {"0": 0.42, "1": 0.27, "2": 0.17, "3": 0.1, "4": 0.04}
GENRES = ("Drama", "Comedy", "Action", "Horror", "Film-Noir")
PROMPTS, GROUP = 16, 8

Tree = dict[str, Any]


def make_run(
    folder: Path,
    estimator: str = "pgrpo",
    seed: int = 0,
    *,
    gain: float = 0.3,
    minority_gain: float | None = None,
    num_steps: int = 40,
    evaluate: bool = True,
    samples: bool = True,
    config: Mapping[str, Any] | None = None,
    info: Mapping[str, Any] | None = None,
    names: Mapping[str, str] | None = None,
    text: str = "",
) -> Path:
    """A run whose 0/1 rewards rise by `gain` from chance, drawn rollout by rollout."""
    rng = np.random.default_rng([seed, *estimator.encode()])
    folder.mkdir(parents=True)
    name = {c: (names or {}).get(c, c) for c in CLUSTERS}
    minority_gain = gain if minority_gain is None else minority_gain
    settings: Tree = {
        "run": {"num_steps": num_steps, "prompts_per_step": PROMPTS, "seed": seed},
        "model": {"name": "tiny"},
        "data": {"name": "movielens", "path": "ml-1m", "candidates": 4},
        "clustering": {"name": "kmeans", "num_clusters": len(CLUSTERS)},
        "rewards": [{"name": "choice", "weight": 1.0}],
        "generation": {"group_size": GROUP},
        "estimator": {"name": estimator, "eps": 1e-4}
        | ({"history": "cluster"} if estimator == "pgrpo" else {}),
        "optimizer": {"learning_rate": 1e-4},
    }
    for key, value in (config or {}).items():
        section, _, leaf = key.partition(".")
        settings[section][leaf] = value
    (folder / "config.toml").write_text(tomli_w.dumps(settings), encoding="utf-8")
    description: Tree = {
        "status": "finished",
        "processor": "Example CPU @ 2.6 GHz",
        "num_threads": 2,
        "precision": "fp32",
        "versions": {"pgrpo": "0.1.0", "torch": "2.9.0", "transformers": "5.16.0"},
        "num_parameters": 1_234_567,
        "started": "2026-01-05T10:20:30+00:00",
        "chance": 0.25,
        "reward_name": "choice",
        "clusters": {
            name[c]: {"num_users": round(1000 * share), "share": share, "about": f"mostly {genre}"}
            for (c, share), genre in zip(CLUSTERS.items(), GENRES, strict=True)
        },
    } | dict(info or {})
    (folder / "run.json").write_text(json.dumps(description), encoding="utf-8")

    def chance_of(cluster: str, step: int) -> float:
        reach = minority_gain if cluster == "4" else gain
        return 0.25 + reach * (1 - math.exp(-3 * step / 40))

    steps: list[Tree] = []
    logged: list[Tree] = []
    history: dict[str, list[float]] = {c: [] for c in CLUSTERS}
    for step in range(1, num_steps + 1):
        drawn = rng.choice(list(CLUSTERS), size=PROMPTS, p=list(CLUSTERS.values()))
        rewards = {
            c: rng.binomial(1, chance_of(c, step), (int((drawn == c).sum()), GROUP)).astype(float)
            for c in CLUSTERS
            if (drawn == c).any()
        }
        clusters: dict[str, Tree] = {}
        for c, r in rewards.items():
            history[c].extend(r.ravel().tolist())
            mean, std = float(np.mean(history[c])), float(np.std(history[c]))
            clusters[name[c]] = {
                "reward": float(r.mean()),
                "num_rollouts": r.size,
                "count": float(len(history[c])),
                "mean": mean,
                "std": std,
                "advantage": float(((r - mean) / (std + 1e-4)).mean()),
                "scale_ratio": float(((r.std(axis=1) + 1e-4) / (std + 1e-4)).mean()),
                "bias": float(((r.mean(axis=1) - mean) / (std + 1e-4)).mean()),
            }
        if seed % 2:
            # The other permitted way to say that a cluster had no rollout.
            clusters |= {
                name[c]: dict.fromkeys(("reward", "bias")) for c in CLUSTERS.keys() - rewards.keys()
            }
        of_clusters = [float(r.mean()) for r in rewards.values()]
        everything = np.concatenate(list(rewards.values()))
        update = 1.1 + 0.1 * rng.random()
        steps.append(
            {
                "step": step,
                "reward": float(everything.mean()),
                "loss": 0.01,
                "grad_norm": float(0.5 + 0.2 * rng.random()),
                "learning_rate": 1e-4,
                "num_rollouts": everything.size,
                "completion_tokens": float(2 + rng.random()),
                "truncated": 0.0,
                "equal_groups": float((np.ptp(everything, axis=1) == 0).mean()),
                "kl": None,
                "clipped": float(0.02 * rng.random()),
                "policy_version": step,
                "peak_memory_bytes": 1_500_000_000,
                "clusters": clusters,
                "fairness": fairness(of_clusters).model_dump(),
                "timing_s": {
                    "generate": 0.8,
                    "reward": 0.05,
                    "update": update,
                    "total": 0.9 + update,
                },
            }
        )
        logged += [
            {
                "step": step,
                "prompt": text or f"The user liked 9 {GENRES[int(c)]} films. Next?\nA) B) C) D)",
                "completion": text or "B",
                "reward": float(rewards[c][0, 0]),
                "advantage": float(rng.normal()),
                "cluster_id": name[c],
                "user": int(rng.integers(6000)),
            }
            for c in list(rewards)[:2]
        ]
    write_lines(folder / "metrics.jsonl", steps)
    if samples:
        write_lines(folder / "samples.jsonl", logged)
    if evaluate:
        counts = {c: round(500 * share) for c, share in CLUSTERS.items()}
        evaluations: list[Tree] = []
        for step in dict.fromkeys((0, *range(10, num_steps, 10), num_steps)):
            right = {c: int(rng.binomial(n, chance_of(c, step))) for c, n in counts.items()}
            evaluations.append(
                {
                    "step": step,
                    **score(sum(right.values()), sum(counts.values())),
                    "num_prompts": sum(counts.values()),
                    "clusters": {
                        name[c]: {**score(right[c], n), "num_prompts": n} for c, n in counts.items()
                    },
                }
            )
        write_lines(folder / "evaluations.jsonl", evaluations)
    return folder


def score(right: int, n: int) -> Tree:
    """Mean and standard deviation of n rewards, `right` of them 1 and the others 0."""
    return {"reward": right / n, "std": float(np.std([1.0] * right + [0.0] * (n - right)))}


def write_lines(path: Path, records: list[Tree]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def edit_lines(path: Path, edit: Callable[[Tree], None]) -> None:
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for record in records:
        edit(record)
    write_lines(path, records)


def two_arms(folder: Path, gains: tuple[float, float], num_seeds: int = 3, **kw: Any) -> list[Path]:
    return [
        make_run(folder / f"{arm}-{seed}", arm, seed, gain=gain, **kw)
        for arm, gain in zip(("pgrpo", "grpo"), gains, strict=True)
        for seed in range(num_seeds)
    ]


@dataclass
class Parsed(HTMLParser):
    """The page as a browser would see it."""

    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    scripts: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    _open: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self._open.append(tag)
        if tag == "script":
            self.scripts.append("")
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "script" in self._open:
            self.scripts[-1] += data
        elif "style" not in self._open:
            self.words.append(data)
            if "td" in self._open or "th" in self._open:
                self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    @property
    def figures(self) -> dict[str, Tree]:
        return json.loads(self.scripts[0])

    def attributes(self, name: str) -> list[str]:
        return [
            value or "" for _, attrs in self.tags for key, value in attrs.items() if key == name
        ]

    @property
    def verdict(self) -> str:
        start = self.text.index("reward: choice")
        ends = [self.text.find(heading, start) for heading in ("Who is served", "Summary")]
        return self.text[start : min(end for end in ends if end >= 0)]


def parse(path: Path) -> Parsed:
    page = Parsed()
    page.feed(path.read_text(encoding="utf-8"))
    page.close()
    assert page._open == []
    return page


def report(runs: list[Path], folder: Path) -> Parsed:
    out = folder / "report.html"
    write_report(runs, out)
    return parse(out)


def test_page_is_self_contained(tmp_path: Path) -> None:
    page = report(two_arms(tmp_path, (0.4, 0.3)), tmp_path)
    assert page.attributes("src") == page.attributes("href") == []
    assert not any(tag in ("link", "img", "iframe", "object") for tag, _ in page.tags)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    css = html[html.index("<style>") : html.index("</style>")]
    assert "grid" in css and "url(" not in css and "@import" not in css
    data, plotly, script = page.scripts
    assert plotly.count("Plotly") > 10 and "Plotly" not in data and "Plotly.react" in script


def test_only_the_own_scripts_may_run(tmp_path: Path) -> None:
    page = report([make_run(tmp_path / "run")], tmp_path)
    policy = next(attrs["content"] for _, attrs in page.tags if "http-equiv" in attrs) or ""
    for script in page.scripts[1:]:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy and "script-src 'unsafe" not in policy


def test_every_arm_and_cluster_is_on_the_page(tmp_path: Path) -> None:
    names = dict(zip(CLUSTERS, ("drama", "comedy", "action", "horror", "noir"), strict=True))
    page = report(two_arms(tmp_path, (0.4, 0.3), names=names), tmp_path)
    panels = [name for name in names.values() if f"{name} " in page.text]
    assert panels == list(names.values())
    assert page.text.count("smallest") >= 2 and "noir 4.0 % smallest" in page.text
    arms = [row[0] for row in page.rows if len(row) == 10][1:]
    assert arms == ["pgrpo", "grpo"]
    places = {attrs["id"] for _, attrs in page.tags if attrs.get("class") == "figure"}
    assert places == page.figures.keys()


def test_figures_are_valid_plotly(tmp_path: Path) -> None:
    page = report(two_arms(tmp_path, (0.4, 0.3)), tmp_path)
    for figure in page.figures.values():
        drawn: Any = graph_objects.Figure(figure)
        assert len(drawn.data) > 0


def test_an_arm_has_one_colour_everywhere(tmp_path: Path) -> None:
    page = report(two_arms(tmp_path, (0.4, 0.3)), tmp_path)
    colors: dict[str, set[str]] = {"pgrpo": set(), "grpo": set()}
    for figure in page.figures.values():
        for trace in figure["data"]:
            if trace.get("name") in colors:
                colors[trace["name"]].add(trace["line"]["color"])
    assert [len(found) for found in colors.values()] == [1, 1]
    assert colors["pgrpo"] != colors["grpo"]


HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&lt;b&gt;</td>$css %{x}"


def test_untrusted_text_is_shown_not_run(tmp_path: Path) -> None:
    run = make_run(
        tmp_path / "run",
        names={"4": HOSTILE, "0": "<b>bold</b>"},
        text=HOSTILE,
        info={
            "processor": HOSTILE,
            "reward_name": HOSTILE,
            "status": HOSTILE,
            "warnings": [f"cluster {HOSTILE}: lags"],
        },
        config={"data.path": HOSTILE},
    )
    out = tmp_path / "report.html"
    write_report([run], out)
    page = parse(out)
    assert [tag for tag, _ in page.tags if tag in ("script", "img", "b")] == ["script"] * 3
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert sum(HOSTILE in cell for row in page.rows for cell in row) >= 6
    labels = [t for f in page.figures.values() for t in f["layout"]["yaxis"].get("ticktext", [])]
    assert "&lt;b&gt;bold&lt;/b&gt;" in labels
    names = {trace.get("name", "") for f in page.figures.values() for trace in f["data"]}
    assert not any("<" in text for text in [*labels, *names])


def test_verdict_in_the_clear_case(tmp_path: Path) -> None:
    said = report(two_arms(tmp_path, (0.6, 0.1)), tmp_path).verdict
    assert "pgrpo ended higher than grpo." in said
    assert "(3 seeds)" in said and "held-out prompts at step 40" in said
    assert WITHIN_NOISE not in said.partition("In the smallest")[0]


def test_verdict_in_the_tie_case(tmp_path: Path) -> None:
    said = report(two_arms(tmp_path, (0.3, 0.3)), tmp_path).verdict
    assert WITHIN_NOISE in said and "higher" not in said


def test_verdict_needs_more_than_one_seed(tmp_path: Path) -> None:
    said = report(two_arms(tmp_path, (0.7, 0.0), num_seeds=1), tmp_path).verdict
    assert NO_RANKING in said and "higher" not in said


def test_verdict_leaves_out_the_arm_with_one_seed(tmp_path: Path) -> None:
    runs = two_arms(tmp_path, (0.6, 0.1))
    runs.append(make_run(tmp_path / "rloo", "rloo", 0, gain=0.74))
    said = report(runs, tmp_path).verdict
    assert "pgrpo ended higher than grpo." in said and f"{NO_RANKING}: rloo." in said


def test_verdict_among_many_arms_names_those_it_cannot_part(tmp_path: Path) -> None:
    runs = two_arms(tmp_path, (0.6, 0.1))
    runs += [make_run(tmp_path / f"rloo-{s}", "rloo", s, gain=0.6) for s in range(3)]
    page = report(runs, tmp_path)
    best = "pgrpo" if "pgrpo ended" in page.verdict else "rloo"
    other = {"pgrpo": "rloo", "rloo": "pgrpo"}[best]
    assert f"{best} ended higher than grpo; to {other} {WITHIN_NOISE}." in page.verdict
    assert "Differences" in page.text and f"{best} minus" in page.text


def test_verdict_does_not_compare_unlike_rewards(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"a{s}", seed=s, gain=0.6) for s in range(3)]
    runs += [
        make_run(tmp_path / f"b{s}", seed=s, gain=0.1, config={"data.candidates": 9})
        for s in range(3)
    ]
    said = report(runs, tmp_path).verdict
    assert "do not compare" in said and "higher" not in said


def test_verdict_is_not_fooled_by_seeds_that_agree(tmp_path: Path) -> None:
    runs = two_arms(tmp_path, (0.3, 0.3), num_seeds=2)
    for run in runs:
        right = 10 if "pgrpo" in run.name else 11
        write_lines(
            run / "evaluations.jsonl", [{"step": 40, "reward": right / 20, "num_prompts": 20}]
        )
    said = report(runs, tmp_path).verdict
    assert WITHIN_NOISE in said and "higher" not in said


def test_verdict_of_one_arm(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / str(seed), seed=seed) for seed in range(3)]
    assert "pgrpo: reward rose." in report(runs, tmp_path).verdict
    said = report(runs[:1], tmp_path).verdict
    assert "one seed" in said and "rose" not in said and NO_RANKING in said


def test_warnings_stand_by_arm_and_seed(tmp_path: Path) -> None:
    lags, flat = "cluster 4: the history lags behind", "cluster 0: all rewards nearly equal"
    runs = [
        make_run(tmp_path / "a", "pgrpo", 0, info={"warnings": [lags, flat]}),
        make_run(tmp_path / "b", "pgrpo", 1, info={"warnings": [lags]}),
        make_run(tmp_path / "c", "grpo", 0),
    ]
    page = report(runs, tmp_path)
    assert "3 warnings: see “Warnings” in the report." in page.verdict
    found = [row for row in page.rows if row[-1].startswith("Cluster ")]
    assert found == [
        ["pgrpo", "0", "Cluster 4: the history lags behind."],
        ["pgrpo", "0", "Cluster 0: all rewards nearly equal."],
        ["pgrpo", "1", "Cluster 4: the history lags behind."],
    ]
    assert "Warnings" not in report(runs[2:], tmp_path).text


def test_verdict_falls_back_on_training(tmp_path: Path) -> None:
    said = report(two_arms(tmp_path, (0.6, 0.1), evaluate=False), tmp_path).verdict
    assert "training reward over the last 10 steps" in said and "pgrpo ended higher" in said


def test_evaluation_before_training_alone_is_no_outcome(tmp_path: Path) -> None:
    runs = two_arms(tmp_path, (0.6, 0.1), info={"status": "running"})
    for run in runs:
        path = run / "evaluations.jsonl"
        path.write_text(path.read_text(encoding="utf-8").splitlines()[0] + "\n", encoding="utf-8")
    said = report(runs, tmp_path).verdict
    assert "training reward over the last 10 steps" in said
    assert "6 of 6 runs had not finished." in said


def test_runs_of_different_length_are_compared_where_all_have_been(tmp_path: Path) -> None:
    runs = two_arms(tmp_path, (0.4, 0.3), evaluate=False)
    path = runs[-1] / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()[:25]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    study = Study.of(read_runs(runs))
    assert study.last_step == 25
    expected = [run.steps["reward"][15:25].mean() for run in read_runs(runs[:3])]
    assert study.last(study.arms[0], "reward").mean == pytest.approx(np.mean(expected))
    assert "Runs differ in length; all are compared up to step 25." in report(runs, tmp_path).text


def test_summary_row_agrees_with_numpy(tmp_path: Path) -> None:
    runs = two_arms(tmp_path, (0.4, 0.3))
    row = next(row for row in report(runs, tmp_path).rows if row[0] == "pgrpo" and len(row) == 10)
    steps = [read_lines(run / "metrics.jsonl") for run in runs[:3]]
    held_out = [read_lines(run / "evaluations.jsonl") for run in runs[:3]]

    def cell(values: Sequence[Any], binomial: float = 0.0) -> str:
        se = max(np.std(values, ddof=1) / np.sqrt(len(values)), binomial)
        return f"{np.mean(values):.3f}± {se:.3f}"

    assert row[1] == "30, 1, 2"
    assert row[2] == cell([np.mean([s["reward"] for s in run[:10]]) for run in steps])
    assert row[3] == cell([np.mean([s["reward"] for s in run[-10:]]) for run in steps])
    for column, index in ((4, 0), (5, -1)):
        values = [run[index]["reward"] for run in held_out]
        variance = np.mean([p * (1 - p) for p in values])
        assert row[column] == cell(values, np.sqrt(variance / 500))
    clusters = {
        c: np.mean([run[-1]["clusters"][c]["reward"] for run in held_out]) for c in CLUSTERS
    }
    v = np.array(list(clusters.values()))
    worst = min(clusters, key=lambda c: clusters[c])
    assert row[6].startswith(f"{v.min():.3f}±") and row[6].endswith(worst)
    assert row[7].startswith(f"{v.max() - v.min():.3f}±")
    assert row[8] == f"{np.abs(np.subtract.outer(v, v)).sum() / (2 * len(v) ** 2 * v.mean()):.3f}"
    totals = [np.mean([s["timing_s"]["total"] for s in run]) for run in steps]
    assert row[9] == f"{np.mean(totals):.3f}"


def test_curve_agrees_with_numpy(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / str(seed), seed=seed) for seed in range(3)]
    study = Study.of(read_runs(runs))
    curve = study.curve(study.arms[0], "reward")
    assert curve is not None and study.smoothing == 5
    raw = np.array([[s["reward"] for s in read_lines(run / "metrics.jsonl")] for run in runs])
    smooth = np.stack([[row[max(0, t - 2) : t + 3].mean() for t in range(40)] for row in raw])
    np.testing.assert_allclose(curve.raw, raw.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(curve.mean, smooth.mean(axis=0), rtol=1e-12)
    reach = 1.96 * smooth.std(axis=0, ddof=1) / np.sqrt(3)
    np.testing.assert_allclose(curve.high, smooth.mean(axis=0) + reach, rtol=1e-12)
    np.testing.assert_allclose(curve.low, smooth.mean(axis=0) - reach, rtol=1e-12)


def test_a_cluster_without_rollouts_is_a_gap_not_a_zero(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", evaluate=False)

    def leave_out(record: Tree) -> None:
        if record["step"] % 3 == 0:
            record["clusters"].pop("0")

    edit_lines(run / "metrics.jsonl", leave_out)
    study = Study.of(read_runs([run]))
    curve = study.curve(study.arms[0], "clusters/0/reward")
    assert curve is not None
    present = {
        s["step"]: s["clusters"]["0"]["reward"]
        for s in read_lines(run / "metrics.jsonl")
        if "0" in s["clusters"]
    }
    assert np.isnan(curve.raw).sum() == 40 - len(present)
    expected = np.mean([present[step] for step in range(8, 13) if step in present])
    assert curve.mean[9] == pytest.approx(expected)


def test_moving_mean() -> None:
    nan = math.nan
    values = np.array([nan, 1.0, nan, 3.0, 5.0, nan])
    np.testing.assert_array_equal(moving_mean(values, 3), [nan, 1.0, 2.0, 4.0, 4.0, nan])
    np.testing.assert_array_equal(moving_mean(values, 1), values)
    np.testing.assert_array_equal(moving_mean(np.array([2.0]), 5), [2.0])


def test_band_is_the_range_of_two_and_absent_for_one() -> None:
    values = np.array([[1.0, 4.0, 7.0], [3.0, math.nan, 7.0], [5.0, math.nan, math.nan]])
    mean, low, high = mean_and_band(values)
    np.testing.assert_allclose(mean, [3.0, 4.0, 7.0])
    reach = 1.96 * stats.sem([1.0, 3.0, 5.0])
    np.testing.assert_allclose(low, [3 - reach, math.nan, 7.0])
    np.testing.assert_allclose(high, [3 + reach, math.nan, 7.0])


def test_difference_is_that_of_tukey() -> None:
    groups = {"a": [0.61, 0.64, 0.66], "b": [0.52, 0.57, 0.5, 0.55], "c": [0.6, 0.59]}
    expected = stats.tukey_hsd(*groups.values()).confidence_interval(0.95)
    found = tukey_difference(groups, "a", "b")
    assert (found.low, found.high) == pytest.approx((expected.low[0, 1], expected.high[0, 1]))
    assert found.clear and not tukey_difference(groups, "a", "c").clear


def test_change_is_that_of_a_paired_t_test() -> None:
    before, after = [0.2, 0.25, 0.3, math.nan], [0.5, 0.45, 0.4, 0.9]
    expected = stats.ttest_rel(after[:3], before[:3]).confidence_interval(0.95)
    found = mean_change(before, after)
    assert found is not None
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert mean_change(before[:1], after[:1]) is None


def test_held_out_error_is_at_least_that_of_the_prompts(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / str(seed), seed=seed) for seed in range(3)]
    last = [read_lines(run / "evaluations.jsonl")[-1] for run in runs]
    alone = Study.of(read_runs([runs[0]]))
    p = last[0]["reward"]
    assert alone.held_out(alone.arms[0], 40).se == pytest.approx(np.sqrt(p * (1 - p) / 500))
    study = Study.of(read_runs(runs))
    expected = np.sqrt(np.mean([e["reward"] * (1 - e["reward"]) for e in last]) / 500)
    assert stats.sem([e["reward"] for e in last]) < expected
    assert study.held_out(study.arms[0], 40).se == pytest.approx(expected)
    edit_lines(runs[0] / "evaluations.jsonl", lambda e: e.update(reward=0.0))
    study = Study.of(read_runs(runs))
    rewards = [0.0, last[1]["reward"], last[2]["reward"]]
    assert study.held_out(study.arms[0], 40).se == pytest.approx(stats.sem(rewards))


def test_held_out_rewards_of_their_own_have_no_chance_line(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    page = report([run], tmp_path)
    assert page.text.count("chance, 0.250") == 2 and "Grey: | chance." in page.text
    assert [level["y"] for level in levels(page)] == [0.25]
    with open(run / "config.toml", "a", encoding="utf-8") as file:
        file.write('[[evaluation]]\nname = "overlap"\n')
    page = report([run], tmp_path)
    assert page.text.count("chance, 0.250") == 2 and "scored by rewards of their own" in page.text
    assert "Grey:" not in page.text and levels(page) == []


def levels(page: Parsed) -> list[Tree]:
    """The named lines of the chart of held-out rewards over the steps."""
    found = [
        f["layout"]["annotations"] for f in page.figures.values() if "annotations" in f["layout"]
    ]
    return max(found, key=len, default=[])


BASELINES = {
    "chance": 0.25,
    "most popular": 0.45,
    "one rule for all": 0.42,
    "one rule per person": 0.66,
}


def with_baselines(runs: list[Path], **of_clusters: Mapping[str, float]) -> list[Path]:
    for run in runs:
        info = json.loads((run / "run.json").read_text())
        info["baselines"] = BASELINES
        for name, cluster in info["clusters"].items():
            cluster["baselines"] = {**BASELINES, **of_clusters.get(f"c{name}", {})}
        (run / "run.json").write_text(json.dumps(info))
    return runs


def test_baselines_are_lines_marks_and_columns(tmp_path: Path) -> None:
    runs = with_baselines(two_arms(tmp_path, (0.4, 0.3)), c3={"one rule for all": 0.11})
    page = report(runs, tmp_path)
    assert {level["text"]: level["y"] for level in levels(page)} == {
        "one rule per person 0.660": 0.66,
        "most popular 0.450": 0.45,
        "one rule for all 0.420": 0.42,
        "chance 0.250": 0.25,
    }
    (header,) = (row for row in page.rows if row[:4] == ["Cluster", "Users", "Share", "Prompts"])
    assert header[4:8] == ["one rule per person", "most popular", "one rule for all", "chance"]
    rows = {row[0].split("mostly")[0].strip(): row for row in page.rows if len(row) == len(header)}
    assert rows["3"][6] == "0.110" and rows["2"][6] == "0.420"
    assert rows["4"][3] == "20"
    marks = {
        trace["name"]: trace["x"]
        for figure in page.figures.values()
        for trace in figure["data"]
        if trace.get("name") in BASELINES
    }
    assert marks["one rule for all"] == [0.42, 0.42, 0.42, 0.11, 0.42]
    assert set(marks) == {"chance", "one rule for all", "one rule per person"}


def test_a_baseline_that_one_run_lacks_is_not_shown(tmp_path: Path) -> None:
    runs = with_baselines(two_arms(tmp_path, (0.4, 0.3), 2))
    info = json.loads((runs[0] / "run.json").read_text())
    del info["baselines"]["most popular"]
    (runs[0] / "run.json").write_text(json.dumps(info))
    assert "most popular" not in str(levels(report(runs, tmp_path)))


def test_the_first_sentence_says_who_is_served_how_well(tmp_path: Path) -> None:
    runs = with_baselines(two_arms(tmp_path, (0.6, 0.3)), c3={"one rule for all": 0.11})
    for run in runs[3:]:
        # Cluster 1 is served worse than by guessing by grpo, cluster 2 not by more than its error.
        edit_lines(
            run / "evaluations.jsonl",
            lambda e: e["clusters"].update(
                {
                    "1": {**score(20, 135), "num_prompts": 135},
                    "2": {**score(20, 85), "num_prompts": 85},
                }
            ),
        )
    verdict = write_report(runs, tmp_path / "report.html")
    study = Study.of(read_runs(runs))
    pgrpo, grpo = (round(100 * study.held_out(arm, 40).mean) for arm in study.arms)
    assert verdict.lead == (
        f"Of the choices that people made and that were held out, pgrpo gets {pgrpo} % and grpo gets "
        f"{grpo} % right; guessing 25 %, one rule for everybody 42 % and a rule for each person 66 %. "
        "Served worse than by guessing: nobody by pgrpo, 27 % by grpo and 10 % by one rule for everybody."
    )
    page = parse(tmp_path / "report.html")
    assert page.text.index(verdict.lead) < page.text.index(verdict.headline)
    without = report(two_arms(tmp_path / "other", (0.6, 0.3)), tmp_path)
    assert "Of the choices that people made" not in without.text


def test_the_gain_is_told_apart_into_history_and_clusters(tmp_path: Path) -> None:
    def arm(name: str, gains: Sequence[float], **config: str) -> list[Path]:
        return [
            make_run(
                tmp_path / f"{name}-{seed}",
                name.split(":")[0],
                seed,
                gain=gain,
                config={f"estimator.{key}": value for key, value in config.items()},
            )
            for seed, gain in enumerate(gains)
        ]

    runs = [
        *arm("grpo", (0.0, 0.0, 0.02), history="cluster"),
        *arm("pgrpo:one", (0.5, 0.5, 0.52), history="one"),
        *arm("pgrpo", (0.5, 0.52, 0.5)),
        *arm("pgrpo:shuffled", (0.3, 0.2, 0.25), history="shuffled"),
    ]
    study = Study.of(read_runs(runs))
    outcome = {
        arm.name: [run.evaluations.at(40, "reward") for run in arm.runs] for arm in study.arms
    }
    wanted = [
        ("having a history", "pgrpo (one history)", "grpo"),
        ("whose history it is", "pgrpo", "pgrpo (one history)"),
        ("both together", "pgrpo", "grpo"),
        ("clusters that are not of random users", "pgrpo", "pgrpo (shuffled clusters)"),
    ]
    assert [(gain.what, gain.after.name, gain.before.name) for gain in study.gains] == wanted
    for gain in study.gains:
        each = np.array(outcome[gain.after.name]) - np.array(outcome[gain.before.name])
        assert gain.paired.each == pytest.approx(each)
        low, high = stats.t.interval(0.95, 2, each.mean(), stats.sem(each))
        assert gain.paired.difference is not None
        assert gain.paired.difference.low == pytest.approx(low)
        assert gain.paired.difference.high == pytest.approx(high)
    verdict = write_report(runs, tmp_path / "report.html")
    (sentence,) = (s for s in verdict.sentences if s.startswith("Seed by seed"))
    gain = study.gains[0].paired.difference
    assert gain is not None and f"having a history gives {number(gain.mean, sign=True)}" in sentence
    assert sentence.count(WITHIN_NOISE) == 1
    assert "Where the gain comes from" in parse(tmp_path / "report.html").text
    assert not Study.of(read_runs(runs[:3])).gains


def test_held_out_rewards_are_drawn_over_rollouts_and_time_as_well(tmp_path: Path) -> None:
    page = report(two_arms(tmp_path, (0.4, 0.3)), tmp_path)
    over = {
        figure["layout"]["xaxis"]["title"]["text"]: figure["data"]
        for figure in page.figures.values()
        if figure["data"][0].get("mode") == "lines+markers" and "title" in figure["layout"]["xaxis"]
    }
    steps = [0, 10, 20, 30, 40]
    assert over["rollouts"][0]["x"] == pytest.approx([step * PROMPTS * GROUP for step in steps])
    runs = read_runs([tmp_path / f"pgrpo-{seed}" for seed in range(3)])
    totals = [
        np.mean([run.steps["timing_s/total"][:step].sum() / 60 for run in runs]) for step in steps
    ]
    assert over["minutes"][0]["x"] == pytest.approx(totals)
    alone = report([make_run(tmp_path / "alone")], tmp_path).text
    assert "Over the minutes" not in alone
    assert "At equal cost" not in alone


def test_arms_are_compared_at_the_cost_of_the_cheapest(tmp_path: Path) -> None:
    paths = two_arms(tmp_path, (0.4, 0.3))
    slow, quick = (read_runs(paths)[i : i + 3] for i in (0, 3))
    for path in paths[:3]:
        edit_lines(path / "metrics.jsonl", lambda m: m["timing_s"].update(total=3.0))
    for path in paths[3:]:
        edit_lines(path / "metrics.jsonl", lambda m: m["timing_s"].update(total=1.5))
    # In the minute of 40 quick steps a slow run takes 20.
    at_20, at_40 = (
        np.mean([run.evaluations.at(step, "reward") for run in runs])
        for step, runs in ((20, slow), (40, quick))
    )
    text = report(paths, tmp_path).text
    assert f"at 1.0 minutes, pgrpo {at_20:.3f} and grpo {at_40:.3f}" in text
    assert (
        f"at 40 steps, pgrpo {np.mean([r.evaluations.at(40, 'reward') for r in slow]):.3f}" in text
    )


def test_equal_clusters_have_no_smallest_one(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    info = json.loads((run / "run.json").read_text())
    for cluster in info["clusters"].values():
        cluster["share"] = 0.2
    (run / "run.json").write_text(json.dumps(info))
    assert "smallest" not in report([run], tmp_path).text


def test_samples_are_of_every_cluster_and_held_out_ones_stand_side_by_side(tmp_path: Path) -> None:
    runs = two_arms(tmp_path, (0.4, 0.3), 1)
    for run in runs:
        logged = [
            {"step": step, "prompt": f"{c}, {k}", "completion": f"{run.name} at {step}", "reward": 1.0, "cluster_id": c, "user": k}
            for step in (0, 40)
            for c in ("0", "0", "0", "1")
            for k in range(2)
        ]  # fmt: skip
        write_lines(run / "held_out.jsonl", logged)
        write_lines(run / "samples.jsonl", [{**record, "step": 1} for record in logged])
    page = report(runs, tmp_path)
    start = page.rows.index(["Cluster, user", "Prompt", "pgrpo", "grpo"])
    rows = page.rows[start + 1 : start + 5]
    assert [row[1] for row in rows] == ["0, 0", "1, 0", "0, 1", "1, 1"]
    assert rows[0][2:] == ["pgrpo-0 at 40reward 1.000", "grpo-0 at 40reward 1.000"]
    start = next(
        i for i, row in enumerate(page.rows) if row[:3] == ["Arm", "Step", "Cluster, user"]
    )
    assert [row[2][0] for row in page.rows[start + 1 : start + 3]] == ["0", "1"]


LONG, MANY = 3 * READ_STEPS + 7, 60


def make_long_run(folder: Path, seed: int) -> Path:
    """A run of LONG steps and MANY clusters whose rewards tell step and cluster."""
    run = make_run(folder, seed=seed, num_steps=2, evaluate=False)
    info = json.loads((run / "run.json").read_text())
    info["clusters"] = {f"c{c}": {"share": (MANY - c) / 2000} for c in range(MANY)}
    (run / "run.json").write_text(json.dumps(info))
    with open(run / "metrics.jsonl", "w", encoding="utf-8") as file:
        for step in range(1, LONG + 1):
            # The worst ones are neither the largest nor the smallest.
            clusters = {
                f"c{c}": {
                    "reward": step + seed + (-1e6 if 20 <= c < 28 else c),
                    "mean": 1.0,
                    "std": 0.5,
                }
                for c in range(MANY)
            }
            record = {"step": step, "reward": step**2 + seed, "clusters": clusters}
            file.write(json.dumps(record) + "\n")
    return run


def unpacked(values: Any) -> np.ndarray:
    """A column of a figure, packed or not."""
    if isinstance(values, dict):
        return np.frombuffer(base64.b64decode(values["bdata"]), "<f4").astype(float)
    return np.array(values, float)


def test_long_runs_of_many_clusters_give_a_bounded_page_that_says_so(tmp_path: Path) -> None:
    runs = [make_long_run(tmp_path / str(seed), seed) for seed in (0, 1)]
    page = report(runs, tmp_path)
    size = (tmp_path / "report.html").stat().st_size - len(page.scripts[1])
    assert size < 1_000_000
    lengths = [len(unpacked(t["y"])) for f in page.figures.values() for t in f["data"]]
    # A band has its points twice.
    assert figures.POINTS / 2 < max(lengths) <= 2 * figures.POINTS
    assert "one in 4 was read, and all of the first and the last ten." in page.text
    assert "moving mean over 51 steps of those read" in page.text
    assert f"at most {figures.POINTS} points" in page.text
    shown = [f"c{c}" for c in (*range(EACH), *range(20, 20 + EACH), *range(60 - EACH, 60))]
    assert [name for name in (f"c{c}" for c in range(MANY)) if f"{name} " in page.text] == shown
    assert (
        f"Of {MANY} clusters {3 * EACH} are drawn: the {EACH} largest, the {EACH} smallest and the {EACH} with "
        "the lowest reward at the end." in page.text
    )
    # The first and the last steps are all there, and the ones between at their places.
    study = Study.of(read_runs(runs))
    (arm,) = study.arms
    assert study.first(arm, "reward").mean == np.mean(np.arange(1, 11) ** 2) + 0.5
    assert study.last(arm, "reward").mean == np.mean(np.arange(LONG - 9, LONG + 1) ** 2) + 0.5
    # They have no more weight than others; a run with none in between is taken as it is.
    even = np.arange(4, LONG + 1, 4)
    assert study.throughout(arm, "reward") == np.mean(even**2) + 0.5
    assert study._even(np.array([1.0, 2.0, 3.0])).all()
    curve = study.curve(arm, "reward")
    assert curve is not None
    np.testing.assert_array_equal(curve.steps, even)
    np.testing.assert_array_equal(curve.raw, curve.steps**2 + 0.5)
    panel = next(f for f in page.figures.values() for t in f["data"] if t.get("x0"))
    line = next(trace for trace in panel["data"] if trace.get("x0"))
    x = line["x0"] + line["dx"] * np.arange(len(unpacked(line["y"])))
    assert x[-1] == curve.steps[-1]


def test_runs_of_unlike_length_are_read_at_the_same_steps(tmp_path: Path) -> None:
    long, short = (make_long_run(tmp_path / str(seed), seed) for seed in (0, 1))
    path = short / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[:1001]
    path.write_text("".join(lines), encoding="utf-8")
    found = read_runs([long, short])
    wanted = {*range(4, 1002, 4), *range(1, 11), *range(992, 1002)}
    assert set(found[1].steps.steps) == wanted
    assert set(found[0].steps.steps) == wanted | set(range(1004, LONG + 1, 4))
    study = Study.of(found)
    assert study.last(study.arms[0], "reward").mean == np.mean(np.arange(992, 1002) ** 2) + 0.5


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "Advantages are read from the history shown."),
        ({"history": "one"}, "from: one history of all clusters (pgrpo (one history))."),
        (
            {"history": "user", "prior_count": 16.0},
            "from: the person's own history, with 16 of the cluster's history, itself with 16 rewards of "
            "all clusters pooled added (pgrpo (a history each)).",
        ),
        ({"history": "shuffled"}, "from: histories of shuffled users (pgrpo (shuffled clusters))."),
        (
            {"prior_count": 16.0, "sigma_floor": 0.1},
            "from: the history shown, with 16 rewards of all clusters pooled added, with a σ of 0.1 at "
            "least (pgrpo).",
        ),
        ({"min_count": 8.0}, "from: the history shown, once it has 8 rewards (pgrpo)."),
        ({"name": "grpo"}, "from: no history (grpo)."),
        ({"name": "grpo", "frequency_weight": 0.5}, "from: no history, but for weights (grpo)."),
        ({"name": "shrinkage"}, "from: the history shown and the group (shrinkage)."),
    ],
)
def test_it_says_what_advantages_are_read_from(
    tmp_path: Path, changes: Mapping[str, Any], said: str
) -> None:
    settings = {f"estimator.{key}": value for key, value in changes.items()}
    text = report([make_run(tmp_path / "run", config=settings)], tmp_path).text
    assert text.count(said) == 2


def test_arms_are_estimator_history_and_whatever_else_shapes_training(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "a", seed=0),
        make_run(tmp_path / "b", seed=1, config={"run.num_steps": 80, "data.seed": 1}),
        make_run(tmp_path / "c", seed=0, config={"estimator.history": "one"}),
        make_run(tmp_path / "d", seed=0, config={"estimator.history": "shuffled"}),
        make_run(tmp_path / "e", "grpo", seed=0),
        make_run(tmp_path / "f", "grpo", seed=0, config={"generation.group_size": 2}),
    ]
    study = Study.of(read_runs(runs))
    assert {arm.name: len(arm.runs) for arm in study.arms} == {
        "pgrpo": 2,
        "pgrpo (one history)": 1,
        "pgrpo (shuffled clusters)": 1,
        "grpo · group_size 8": 1,
        "grpo · group_size 2": 1,
    }


def test_settings_that_differ_come_first(tmp_path: Path) -> None:
    page = report(two_arms(tmp_path, (0.4, 0.3)), tmp_path)
    text = page.text[page.text.index("Settings What the runs differ in first.") :]
    common = text.index("settings common to all runs")
    assert text.index("estimator.name") < text.index("run.seed") < common
    assert common < text.index("generation.group_size")


def test_same_arm_and_seed_twice_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with pytest.raises(RunFolderError, match="/run and .*/run are both pgrpo with run.seed 0"):
        write_report([run, run], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_short_run_without_optional_files(tmp_path: Path, num_steps: int) -> None:
    run = make_run(tmp_path / "run", num_steps=num_steps, evaluate=False, samples=False)
    page = report([run], tmp_path)
    assert "Held-out" not in page.text and "Samples" not in page.text
    assert ("One step says nothing" in page.text) == (num_steps == 1)
    assert any(trace["mode"] == "lines+markers" for trace in page.figures["figure-0"]["data"]) == (
        num_steps < 3
    )


def test_run_of_nulls(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", num_steps=5, evaluate=False)

    def clear(record: Tree) -> None:
        for key in record.keys() - {"step"}:
            record[key] = {} if isinstance(record[key], dict) else None

    edit_lines(run / "metrics.jsonl", clear)
    page = report([run], tmp_path)
    assert "No reward was recorded" in page.verdict and page.figures == {}


def test_incomplete_last_line_is_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", names={"0": "d\u00e9j\u00e0"})
    path = run / "metrics.jsonl"
    data = path.read_bytes().replace(b"\\u00e9", "\u00e9".encode())
    torn = data[: data.rindex("\u00e9".encode()) + 1]
    path.write_bytes(torn)
    assert read_runs([run])[0].steps.steps.tolist() == list(range(1, 40))
    # One rule for the report and a resumed run: without its newline a line is not there.
    path.write_bytes(data.rstrip(b"\n"))
    assert read_runs([run])[0].steps.steps.tolist() == list(range(1, 40))
    folder = RunFolder(run)
    assert [record.step for record in folder.metrics] == list(range(1, 40))
    folder.rewind(39)
    assert path.read_bytes() == data[: data.rstrip(b"\n").rindex(b"\n") + 1]


@pytest.mark.parametrize(
    ("name", "line", "complaint"),
    [
        ("metrics.jsonl", "{", "line 3 is damaged"),
        ("metrics.jsonl", "", "line 3 is damaged"),
        ("metrics.jsonl", "[1]", "line 3 is damaged"),
        ("metrics.jsonl", '{"reward": 1.0}', "line 3 is damaged: step"),
        ("metrics.jsonl", '{"step": 3, "reward": "high"}', "line 3 is damaged: reward is 'high'"),
        ("evaluations.jsonl", '{"step": 3, "clusters": []}', "line 3 is damaged: clusters"),
        ("samples.jsonl", '{"step": 1}', "line of step 1 is damaged: prompt"),
    ],
)
def test_damaged_line_is_named(tmp_path: Path, name: str, line: str, complaint: str) -> None:
    run = make_run(tmp_path / "run")
    lines = (run / name).read_text(encoding="utf-8").splitlines()
    # Of the samples only those of the first and of the last step are read.
    lines[0 if name == "samples.jsonl" else 2] = line
    (run / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(RunFolderError, match=complaint) as caught:
        write_report([run], tmp_path / "report.html")
    assert name in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "report.html").exists()


def test_complete_but_damaged_last_line_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", num_steps=2)
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 3, "rew\n')
    with pytest.raises(RunFolderError, match="metrics.jsonl line 3 is damaged"):
        read_runs([run])


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.toml", "run.json"])
def test_folder_without_an_essential_file(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path / "run", num_steps=1)
    (run / name).unlink()
    with pytest.raises(RunFolderError, match=f"is not a run folder: it has no {name}"):
        read_runs([run])


def test_other_refusals(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", num_steps=1)
    with pytest.raises(RunFolderError, match="no run folder was given"):
        write_report([], tmp_path / "report.html")
    with pytest.raises(RunFolderError, match="nowhere does not exist"):
        write_report([tmp_path / "nowhere"], tmp_path / "report.html")
    with pytest.raises(RunFolderError, match="is a folder"):
        write_report([run], tmp_path)
    (run / "metrics.jsonl").write_text('{"step": 1', encoding="utf-8")
    with pytest.raises(RunFolderError, match="holds no finished step"):
        write_report([run], tmp_path / "report.html")
    run = make_run(tmp_path / "other", num_steps=1)
    (run / "config.toml").write_text("name = ", encoding="utf-8")
    with pytest.raises(RunFolderError, match="config.toml is not valid TOML"):
        write_report([run], tmp_path / "report.html")


def test_failed_write_leaves_the_old_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = make_run(tmp_path / "run", num_steps=2), tmp_path / "reports" / "report.html"
    write_report([run], out)
    before = out.read_bytes()

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(RunFolderError, match="report.html cannot be written: Permission denied"):
        write_report([run], out)
    assert out.read_bytes() == before and list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (0.0, "0.000"),
        (-0.0004, "−4.0e-04"),
        (-0.25, "−0.250"),
        (1e-17, "0.000"),
        (12.34, "12.3"),
        (12345.6, "12,346"),
        (math.nan, "–"),
    ],
)
def test_number(x: float, text: str) -> None:
    assert number(x) == text
    assert number(abs(x), sign=True).startswith("+") == (abs(x) > 1e-12)


def read_lines(path: Path) -> list[Tree]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
