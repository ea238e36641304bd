"""Rewards whose calls processes on several raylets answer, which stand for several machines."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import install_plugin

from pgrpo.config.sections import RewardConfig
from pgrpo.errors import PgrpoError, PluginError
from pgrpo.on_ray import connected, ray
from pgrpo.rewards import on_ray
from pgrpo.rewards.on_ray import RewardOnRay
from pgrpo.rewards.scorer import Scorer
from pgrpo.types import Example, Group, Prompt, Rollout

PLUGIN = """
import asyncio, os, signal, time
from pathlib import Path
from pgrpo.config import Section
from pgrpo.plugins import hookimpl

here = Path(__file__).parent

def note(what):
    with open(here / "calls.txt", "a") as file:
        file.write(f"{what} {os.getpid()} {os.environ['RAY_NODE_ID']}\\n")

def length(rollouts):
    import ray
    with open(here / "calls.txt", "a") as file:
        file.write(f"{os.getpid()} {ray.get_runtime_context().get_node_id()}\\n")
    time.sleep(0.2)
    return [float(len(r.completion)) for r in rollouts]

async def in_loop(rollouts):
    await asyncio.sleep(0.01)
    return [float(len(r.completion)) for r in rollouts]

def mortal(rollouts):
    killed = here / f"killed {rollouts[0].group_id}"
    if rollouts[0].group_id % 3 == 0 and not killed.exists():
        killed.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return [float(len(r.completion)) for r in rollouts]

def deadly(rollouts):
    if rollouts[0].group_id == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return [float(len(r.completion)) for r in rollouts]

def hanging(rollouts):
    if rollouts[0].group_id == 1:
        time.sleep(600)
    return [float(len(r.completion)) for r in rollouts]

class Strange(Exception):
    def __init__(self, one, two):
        super().__init__(one)

def raising(rollouts):
    for rollout in rollouts:
        if rollout.completion == "bb":
            raise Strange("out of paper", 2)
    return [1.0 for _ in rollouts]

class Told:
    class Config(Section):
        scale: float
        seed: int = 0
    def __init__(self, config):
        self.config = config
    def __call__(self, rollouts):
        return [self.config.scale * self.config.seed for _ in rollouts]

class Unbuilt:
    def __init__(self):
        raise OSError("no such model")
    def __call__(self, rollouts):
        return [0.0 for _ in rollouts]

class Slow:
    def __init__(self):
        if (here / "slow").exists():
            time.sleep(600)
        (here / "slow").touch()
    def __call__(self, rollouts):
        os.kill(os.getpid(), signal.SIGKILL)

@hookimpl
def pgrpo_register_rewards(register):
    for reward in (length, in_loop, mortal, deadly, hanging, raising):
        register(reward.__name__, reward)
    register("told", Told)
    register("unbuilt", Unbuilt)
    register("slow", Slow)
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Generator[Path]:
    site = tmp_path_factory.mktemp("site")
    install_plugin(site, PLUGIN)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(site))
        # What raylets start inherits it, as what a user installs on every machine is there.
        patch.setenv("PYTHONPATH", os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")]))
        # Ray kills what it has started when others take the machine's memory.
        patch.setenv("RAY_memory_monitor_refresh_ms", "0")
        yield site


@pytest.fixture(scope="module", autouse=True)
def cluster(site: Path) -> Generator[Any]:
    """Three raylets, of which each stands for a machine."""
    started = ray("ray.cluster_utils").Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    for _ in range(2):
        started.add_node(num_cpus=1)
    with connected(started.address):
        yield started
    started.shutdown()


def groups(number: int) -> list[Group]:
    return [
        Group.sampled(
            [
                Rollout(
                    prompt=Prompt(Example(f"Question {n}?", user="u"), 0, (1,)),
                    group_id=n,
                    completion_ids=(1,),
                    completion=text,
                    rollout_logprobs=(0.0,),
                    truncated=False,
                )
                for text in ("a", "bb", "c" * n)
            ]
        )
        for n in range(number)
    ]


def scored(section: RewardConfig, number: int) -> np.ndarray:
    """[N] rewards."""
    reward = RewardOnRay(section, seed=0)
    try:
        with Scorer([(section, reward)]) as scorer:
            return np.concatenate([group.rewards for group in scorer.score(groups(number))])
    finally:
        reward.close()


def section(name: str, **settings: Any) -> RewardConfig:
    return RewardConfig.model_validate({"name": name, "workers": "ray", **settings})


def lengths(number: int) -> list[float]:
    return [float(len(r.completion)) for group in groups(number) for r in group.rollouts]


def test_several_machines_answer(site: Path) -> None:
    assert scored(section("length", num_workers=3), 12).tolist() == lengths(12)
    calls = [line.split() for line in (site / "calls.txt").read_text().splitlines()]
    assert len(calls) == 12
    assert len({pid for pid, _ in calls}) == 3
    assert len({node for _, node in calls}) > 1


def test_an_async_reward() -> None:
    assert scored(section("in_loop", num_workers=2), 6).tolist() == lengths(6)


def test_a_process_that_is_killed_is_replaced_and_its_call_made_again(site: Path) -> None:
    assert scored(section("mortal", num_workers=2), 9).tolist() == lengths(9)
    assert sorted(path.name for path in site.glob("killed *")) == [
        "killed 0",
        "killed 3",
        "killed 6",
    ]


def test_rollouts_that_kill_whoever_scores_them_meet_on_error() -> None:
    found = scored(section("deadly", num_workers=2, on_error="no_reward"), 4)
    expected = np.array(lengths(4))
    expected[3:6] = np.nan
    np.testing.assert_array_equal(found, expected)
    with pytest.raises(
        PluginError, match=r"reward 'deadly' failed on a rollout of group 1, .*Actor"
    ):
        scored(section("deadly", num_workers=2), 4)


def test_a_call_that_hangs_ends_with_its_process() -> None:
    found = scored(section("hanging", num_workers=1, on_error="no_reward", timeout_s=5.0), 4)
    expected = np.array(lengths(4))
    expected[3:6] = np.nan
    np.testing.assert_array_equal(found, expected)


def test_a_reward_that_is_not_there_in_time_is_told_from_an_answer_that_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """When its process is replaced."""
    reward = RewardOnRay(section("slow", num_workers=1), seed=0)
    monkeypatch.setattr(on_ray, "_START_S", 5.0)
    try:
        with pytest.raises(TimeoutError, match="a new process did not have the reward within 5 s"):
            reward(groups(1)[0].rollouts)
    finally:
        reward.close()


def test_gpus_that_are_waited_for_are_told_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(on_ray, "_START_S", 1.0)
    with pytest.raises(PluginError, match="reward 'length' could not be built on Ray"):
        RewardOnRay(section("length", num_workers=3, num_gpus=0.5), seed=0)
    assert caplog.messages == ["Ray has 0 GPUs free, and reward length waits for 1.5"]


def test_an_error_names_its_rollout() -> None:
    with pytest.raises(
        PluginError,
        match="'raising' failed on a rollout of group 0, .*completion 'bb'.*out of paper",
    ) as caught:
        scored(section("raising"), 1)
    assert "in raising" in str(caught.value.__cause__.__cause__)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("unbuilt", "reward 'unbuilt' of my-plugin 1.0 could not be built: OSError: no such model"),
        ("absent", "there is no reward 'absent'"),
    ],
)
def test_what_cannot_be_built_is_told_before_the_first_call(name: str, sentence: str) -> None:
    with pytest.raises(PgrpoError, match=sentence):
        RewardOnRay(section(name, num_workers=2), seed=0)


def test_what_the_plugin_is_told() -> None:
    """The run's seed and the settings of its section, as without Ray."""
    reward = RewardOnRay(section("told", num_workers=1, scale=0.5), seed=3)
    try:
        assert reward(groups(1)[0].rollouts) == [1.5, 1.5, 1.5]
    finally:
        reward.close()
