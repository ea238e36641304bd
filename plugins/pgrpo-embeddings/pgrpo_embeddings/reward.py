"""How near a completion comes to a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from pgrpo.types import Rollout

from .encoder import Encoder, EncoderConfig, Vectors, direction, texts_of


class Similarity:
    """Cosine similarity of a completion with texts of its example, on a scale from 0 to 1.

    With c the cosine of the completion's vector and the texts' one, the score is
    clip((c - low) / (high - low), 0, 1). A blank completion has no score, nor has one with nothing to
    compare it with.
    """

    class Config(EncoderConfig):
        """Which texts, and which similarities are worth 0 and 1."""

        several: Literal["mean", "nearest"] = "mean"
        """What is compared with where there are several texts, as in a person's history: the mean of
        their vectors, or the nearest of them."""
        low: float = Field(0.0, ge=-1, le=1)
        """Cosine that is worth 0, as everything below it; unrelated texts have about 0."""
        high: float = Field(1.0, ge=-1, le=1)
        """Cosine that is worth 1, as everything above it."""

        @model_validator(mode="after")
        def _check_range(self) -> Similarity.Config:
            if self.low >= self.high:
                raise ValueError(f"low is {self.low:g} and high {self.high:g}; expected low < high")
            return self

    def __init__(self, config: Config) -> None:
        self._config = config
        self._encoder = Encoder(config)

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        completions = [rollout.completion for rollout in rollouts]
        texts = [texts_of(rollout.prompt.example, self._config.columns) for rollout in rollouts]
        different = list(dict.fromkeys([*completions, *(text for one in texts for text in one)]))
        row_of = {text: row for row, text in enumerate(different)}
        vectors = self._encoder(different)
        return [
            self._score(vectors[row_of[completion]], vectors[[row_of[text] for text in one]])
            if completion.strip() and one
            else None
            for completion, one in zip(completions, texts, strict=True)
        ]

    def _score(self, said: Vectors, texts: Vectors) -> float | None:
        """Of vectors [D] and [N, D]; None where one of them is of no token."""
        low, high = self._config.low, self._config.high
        mean = self._config.several == "mean"
        against = direction(texts)[None] if mean else texts.astype(np.float64)
        if not said.any() or not against.any():
            return None
        cosine = float((against @ said.astype(np.float64)).max())
        return min(1.0, max(0.0, (cosine - low) / (high - low)))
