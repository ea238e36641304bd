"""What the plugin promises, and what a run asks of any; needs it installed."""

from collections.abc import Mapping

import numpy as np
from pgrpo.train import conformance
from pgrpo.types import Example, Json, Prompt, Rollout

from my_plugin import LIKED, Halves, Liked, Tastes

NAME = "my-plugin"
"""By which all three are registered."""


def said(completion: str, columns: Mapping[str, Json]) -> Rollout:
    """A rollout with what this plugin's reward reads of it; the rest is made up."""
    example = Example(text="Go on.", user="somebody", columns=columns)
    return Rollout(
        prompt=Prompt(example, cluster_id=0, token_ids=(0,)),
        group_id=0,
        completion_ids=(0,),
        completion=completion,
        rollout_logprobs=(0.0,),
        truncated=False,
    )


def test_liked_words_are_counted_among_the_first() -> None:
    reward, sea = Liked(Liked.Config(num_words=2)), {"liked": LIKED["sea"]}
    rollouts = [said("wave rock sail", sea), said("", sea), said("wave", {})]
    assert reward(rollouts) == [0.5, 0.0, None]


def test_users_are_parted_at_the_median() -> None:
    clusterer = Halves(Halves.Config())
    users, features = ["a", "b", "c"], np.array([[1.0], [5.0], [2.0]])
    clusterer.fit(users, features, [])
    assert clusterer.assign(users, features) == ["low", "high", "low"]


def test_prompts_are_words_that_the_person_likes() -> None:
    dataset = Tastes(Tastes.Config(num_people=2))()
    assert (len(dataset.train), len(dataset.evaluation)) == (16, 4)
    for example in dataset.train:
        taste = "sea" if example.user == "user 0" else "hills"
        assert set(example.text.split()) <= set(LIKED[taste])


def test_runs_can_use_what_is_installed() -> None:
    dataset = Tastes(Tastes.Config())()
    for checks in (
        conformance.check_reward(NAME, dataset=dataset),
        conformance.check_clusterer(NAME, dataset=dataset),
        conformance.check_dataset(NAME),
    ):
        assert conformance.failed(checks) == []
