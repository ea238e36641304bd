"""Texts compared by what they are about: a clusterer of people and a reward.

`encoder` makes vectors of texts, `clusterer` divides people by those of their histories, and `reward`
compares a completion with a text.
"""

from collections.abc import Callable
from typing import Any

from pgrpo.plugins import hookimpl

from .clusterer import TextEmbeddings
from .encoder import Encoder, EncoderConfig
from .reward import Similarity

__all__ = ["Encoder", "EncoderConfig", "Similarity", "TextEmbeddings"]


@hookimpl
def pgrpo_register_rewards(register: Callable[[str, Any], None]) -> None:
    """Offer the reward under the name that a config uses."""
    register("similarity", Similarity)


@hookimpl
def pgrpo_register_clusterers(register: Callable[[str, Any], None]) -> None:
    """Offer the clusterer under the name that a config uses."""
    register("text_embeddings", TextEmbeddings)
