"""What a report tells of the clusters that were found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import numpy as np

from pgrpo.clusters.features import standardised
from pgrpo.types import ClusterId, FloatArray

_NOTABLE_Z = 0.1
"""Nearer to the mean of all users than this, a feature tells nothing of a cluster."""


class Description(TypedDict):
    """What a report tells of a cluster."""

    num_users: int
    share: float
    """Share of all users."""
    about: str
    """How its users differ from all users, such as `above average in likes War`; empty where no
    feature tells them apart."""


def describe(
    features: FloatArray, assignment: Sequence[ClusterId], feature_names: Sequence[str]
) -> dict[ClusterId, Description]:
    """Describe the clusters of users with features [U, F], the largest first.

    `about` names up to two features each whose mean in the cluster lies furthest above and below
    the mean of all users, in standard deviations z; |z| under 0.1 is not worth a word.
    """
    z = standardised(features)
    members: dict[ClusterId, list[int]] = {}
    for index, cluster_id in enumerate(assignment):
        members.setdefault(cluster_id, []).append(index)
    descriptions: dict[ClusterId, Description] = {}
    for cluster_id, rows in sorted(members.items(), key=lambda item: -len(item[1])):
        means = z[rows].mean(axis=0)
        order = np.argsort(means, kind="stable")
        above = [feature_names[int(i)] for i in order[::-1][:2] if means[i] > _NOTABLE_Z]
        below = [feature_names[int(i)] for i in order[:2] if means[i] < -_NOTABLE_Z]
        sides = (("above", above), ("below", below))
        about = "; ".join(f"{side} average in {', '.join(names)}" for side, names in sides if names)
        descriptions[cluster_id] = {
            "num_users": len(rows),
            "share": len(rows) / len(assignment),
            "about": about,
        }
    return descriptions
