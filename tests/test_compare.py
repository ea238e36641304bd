"""Arms side by side: the same prompts, folders of their own, and no run lost or mixed up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import contents, start, tiny_run, trace, write_config
from test_cli import refused

from pgrpo.cli import main
from pgrpo.config.toml import flat, resolved_tree
from pgrpo.errors import ConfigError
from pgrpo.experiments.compare import arm_config, arm_folder, compare
from pgrpo.normalizer import RULES
from pgrpo.report.study import shapes_training
from pgrpo.runs.config import load_config, parse_config

Capture = pytest.CaptureFixture[str]
CHANGES = {"run.num_steps": 3, "run.samples_per_step": 8, "run.eval_every": 3}
ARMS = ["--estimators", "grpo,pgrpo,pgrpo:one", "--seeds", "0,1"]
FOLDERS = [f"{arm}/seed-{seed}" for arm in ("grpo", "pgrpo", "pgrpo-one") for seed in (0, 1)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    config = write_config(folder, CHANGES)
    assert main(["compare", str(config), *ARMS, "--out", str(folder / "out")]) == 0
    return folder / "out"


def prompts(run: Path) -> list[tuple[str, str]]:
    lines = (run / "samples.jsonl").read_text("utf-8").splitlines()
    return [(sample["user"], sample["prompt"]) for sample in map(json.loads, lines)]


def test_every_arm_and_seed_has_a_run_folder(whole: Path) -> None:
    for name in FOLDERS:
        arm, seed = name.split("/seed-")
        config = load_config(whole / name / "config.toml")
        assert config.run.seed == int(seed)
        assert config.estimator.name == arm.partition("-")[0]
        assert config.estimator.history == ("one" if arm == "pgrpo-one" else "cluster")
        assert (whole / name / "report.html").exists()
    assert (whole / "report.html").stat().st_size > 10_000


def test_arms_of_a_seed_see_the_same_prompts_and_start_alike(whole: Path) -> None:
    for seed in (0, 1):
        runs = [whole / arm / f"seed-{seed}" for arm in ("grpo", "pgrpo", "pgrpo-one")]
        assert prompts(runs[0]) == prompts(runs[1]) == prompts(runs[2])
        first = [trace(run)["metrics"][0]["reward"] for run in runs]
        assert first[0] == first[1] == first[2], "before the first update nothing differs"
        ends = [trace(run)["weights"] for run in runs]
        assert ends[0] != ends[1]
        assert ends[1] != ends[2]
    assert prompts(whole / FOLDERS[0]) != prompts(whole / FOLDERS[1])


@pytest.mark.parametrize("victim", ["grpo/seed-0", "pgrpo/seed-0", "pgrpo-one/seed-1"])
def test_an_interrupted_comparison_goes_on_where_it_was(
    whole: Path, tmp_path: Path, victim: str
) -> None:
    out = tmp_path / "out"
    command = ["compare", str(write_config(tmp_path, CHANGES)), *ARMS, "--out", str(out)]
    process = start(*command, kill_at=60, folder=out / victim)
    process.join()
    assert process.exitcode == -9
    done = [n for n in FOLDERS if (out / n / "report.html").exists()]
    before = {name: contents(out / name) for name in done}
    assert not (out / "report.html").exists()
    assert main(command) == 0
    assert {name: contents(out / name) for name in done} == before, "finished runs are left alone"
    for name in FOLDERS:
        assert trace(out / name) == trace(whole / name)
    assert (out / "report.html").exists()


def test_an_arm_can_be_added(whole: Path, tmp_path: Path, capsys: Capture) -> None:
    config, out = write_config(tmp_path, CHANGES), tmp_path / "out"
    assert main(["compare", str(config), "--estimators", "pgrpo", "--out", str(out)]) == 0
    before = contents(out / "pgrpo")
    capsys.readouterr()
    assert main(["compare", str(config), "--estimators", "pgrpo,rloo", "--out", str(out)]) == 0
    assert f"finished earlier: {out / 'pgrpo' / 'seed-0'}" in capsys.readouterr().out
    assert contents(out / "pgrpo") == before
    assert trace(out / "pgrpo" / "seed-0") == trace(whole / "pgrpo" / "seed-0")


def test_runs_of_other_settings_are_not_mixed_in(
    whole: Path, tmp_path: Path, capsys: Capture
) -> None:
    before = contents(whole)
    config = write_config(tmp_path, {**CHANGES, "optimizer.learning_rate": 1e-3})
    said = refused(capsys, "compare", config, *ARMS, "--out", whole)
    assert said == (
        f"{whole / 'grpo' / 'seed-0'} holds a run with optimizer.learning_rate = 0.005, not 0.001; "
        "choose another --out"
    )
    assert contents(whole) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--estimators", "grpo,pgpro"], "there is no estimator 'pgpro'; did you mean 'pgrpo'?"),
        (["--estimators", "grpo:one"], "arm 'grpo:one': estimator: history has no effect here"),
        (["--estimators", "pgrpo:two"], "estimator.history is 'two': input should be 'cluster'"),
        (["--estimators", "pgrpo:"], "estimator.history is '': input should be 'cluster'"),
        (["--estimators", ","], "--estimators names no arm"),
        (
            ["--estimators", "pgrpo@run.seed=5"],
            "arm 'pgrpo@run.seed=5' sets run.seed; expected seeds by",
        ),
        (
            ["--estimators", "grpo,grpo@run.num_steps=9"],
            "arms 'grpo' and 'grpo@run.num_steps=9' train the same, but for length and bookkeeping",
        ),
        (
            ["--estimators", "dpo,dpo@loss.beta=0.1"],
            "arms 'dpo' and 'dpo@loss.beta=0.1' train the same",
        ),
        (["--seeds", "0,x"], "--seeds is '0,x'; expected whole numbers with commas"),
        (["--seeds", ""], "--seeds is ''; expected whole numbers with commas"),
        (["--seeds", "-1"], "run.seed is -1: input should be greater than or equal to 0"),
        (["--set", "run.num_stpes=3"], "unknown key run.num_stpes; did you mean 'num_steps'?"),
    ],
)
def test_what_cannot_be_compared(
    tmp_path: Path, capsys: Capture, options: list[str], words: str
) -> None:
    config = write_config(tmp_path)
    assert words in refused(capsys, "compare", config, "--out", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_a_comparison_another_process_works_on(tmp_path: Path, capsys: Capture) -> None:
    from filelock import FileLock

    out = tmp_path / "out"
    out.mkdir()
    with FileLock(out / ".lock"):
        said = refused(capsys, "compare", write_config(tmp_path), "--out", out)
    assert said == f"{out} is in use by another process"
    assert [path.name for path in out.iterdir()] in ([".lock"], [])


@pytest.mark.parametrize(
    ("override", "idle"),
    [
        ("loss.old_logprobs=rollout", "loss.importance"),
        ("loss.importance=off", "loss.importance_cap"),
        ("run.eval_every=0", "run.keep_best"),
    ],
)
def test_an_arm_may_leave_other_settings_without_effect(override: str, idle: str) -> None:
    """As long as the config does not state them itself."""
    base = parse_config(tiny_run())
    found = dict(flat(resolved_tree(arm_config(base, f"pgrpo@{override}", 3))))
    name, _, value = override.partition("=")
    assert (found[name], found["run.seed"]) == (value, "3")
    assert idle not in found


def test_arms_that_draw_prompts_otherwise_are_told_apart() -> None:
    assert shapes_training("run.resample")
    assert shapes_training("run.pipeline")
    assert not shapes_training("run.num_steps")


def test_settings_an_estimator_does_not_know_are_dropped() -> None:
    base = parse_config(
        tiny_run({"estimator": {"name": "pgrpo", "history": "shuffled", "ddof": 1, "eps": 0.5}})
    )
    assert arm_config(base, "grpo", 4).estimator.ddof == 1
    assert arm_config(base, "rloo", 4).estimator.name == "rloo"
    assert arm_config(base, "pgrpo", 4).estimator.history == "cluster"
    shuffled = arm_config(base, "pgrpo:shuffled", 4)
    assert (shuffled.estimator.history, shuffled.estimator.eps, shuffled.run.seed) == (
        "shuffled",
        0.5,
        4,
    )
    assert arm_folder("pgrpo:shuffled") == "pgrpo-shuffled"
    assert arm_config(base, "pgrpo:user", 4).estimator.history == "user"
    with pytest.raises(ConfigError):
        arm_config(base, "batch:one", 0)


def test_arms_of_a_base_that_reads_histories() -> None:
    options = {"forgetting": 0.9, "prior_count": 4.0, "clip": 5.0, "frequency_weight": 0.5}
    base = parse_config(tiny_run({"estimator": {"name": "auto", **options}}))
    shrinkage = arm_config(base, "shrinkage:shuffled", 0).estimator
    assert shrinkage.model_dump(include=set(options)) == options
    assert (shrinkage.name, shrinkage.history) == ("shrinkage", "shuffled")
    # What has an effect stays, also on how clusters are weighed; the rest goes.
    batch = arm_config(base, "batch", 0).estimator
    idle = {"history", "prior_count", "sigma_floor", "min_count"}
    assert batch.model_fields_set == {"name", *options} - idle
    assert (batch.forgetting, batch.prior_count, batch.clip) == (0.9, 0.0, 5.0)
    unweighted = base.model_copy(
        update={"estimator": base.estimator.model_copy(update={"frequency_weight": 0.0})}
    )
    assert arm_config(unweighted, "batch", 0).estimator.forgetting == 1.0
    # One history for all leaves no cluster rarer than another.
    assert arm_config(base, "two_way:one", 0).estimator.frequency_weight == 0.0
    with pytest.raises(ConfigError, match="arm 'batch:one': estimator: history has no effect"):
        arm_config(base, "batch:one", 0)


def test_all_arms_weigh_clusters_alike() -> None:
    """The settings that q_p^-frequency_weight depends on are those of the base in every arm."""
    weighing = {"order": "normalize_then_update", "forgetting": 0.8, "frequency_weight": 1.5}
    base = parse_config(tiny_run({"estimator": {"name": "pgrpo", **weighing}}))
    for name in RULES:
        assert arm_config(base, name, 0).estimator.model_dump(include=set(weighing)) == weighing


def test_arms_resample_where_groups_can_be_without_signal() -> None:
    base = parse_config(tiny_run({"estimator": {"name": "grpo"}, "run.resample": 2}))
    found = {name: arm_config(base, name, 0).run.resample for name in RULES}
    within = {"grpo", "dr_grpo", "rloo", "two_way", "lite", "max_rl", "opo", "gdpo_multi"}
    assert found == {name: 2 if name in within else 0 for name in RULES}


def test_gains_are_of_arms_that_differ_by_their_estimators_alone(tmp_path: Path) -> None:
    """What another learning rate does is not owed to a history."""
    base = parse_config(tiny_run({"run.num_steps": 2}))
    told: list[bool] = []
    for other in ("pgrpo", "pgrpo@optimizer.learning_rate=0.001"):
        compare(base, ["grpo", other], [0, 1], tmp_path / arm_folder(other))
        page = (tmp_path / arm_folder(other) / "report.html").read_text("utf-8")
        told.append("both together" in page)
    assert told == [True, False]
