"""The reward that a trained sequence classifier gives; torch is imported when one is built."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from pgrpo.config import Section
from pgrpo.errors import ConfigError, DataError, ModelError
from pgrpo.types import Rollout

if TYPE_CHECKING:
    from torch import Tensor


class RewardModel:
    """What a reward model makes of prompt and completion: a sequence classifier of transformers.

    One with a single label gives its logit, one with several the named label's log-odds
    log(p / (1 - p)), or p itself. Rollouts are computed in batches of similar length, and a score
    depends on its own rollout alone, up to rounding. Calls are computed one after the other, and what
    waits for its turn does so within its `timeout_s`: where a model is slow, `batch = "step"` makes one
    call of a step.
    """

    class Config(Section):
        """Which model, and how it is asked."""

        model: str
        """A folder or a hub name."""
        revision: str | None = None
        """Branch, tag or commit of a hub model."""
        format: Literal["auto", "chat", "pair", "text"] = "auto"
        """`chat` renders the prompt's turns and the completion with the reward model's own chat
        template, `pair` hands prompt and completion to its tokenizer as two texts, `text` as one, the
        completion right behind the prompt; `auto` is chat where there is a template, else text."""
        label: str | None = None
        """Which of several labels is good; required there, and of a single one there is no choice."""
        output: Literal["log_odds", "probability"] = "log_odds"
        """What is taken of the named label."""
        too_long: Literal["error", "no_reward"] = "error"
        """What becomes of a rollout with more tokens than the model takes, for nothing is cut off: it
        fails as `on_error` says, or gets no reward."""
        token_budget: int = Field(default=8192, ge=1)
        """Most tokens of one forward pass, padding included, unless a single rollout has more. Models
        whose config names no padding token are asked about one rollout at a time."""
        precision: Literal["fp32", "bf16"] = "fp32"
        """Of weights and computation; bf16 halves the memory, and scores keep two or three digits."""
        device: str = "auto"
        """Where it computes, as torch says it: `cpu`, `cuda:1`; `auto` is a GPU where there is one."""

        def inactive(self) -> set[str]:
            return {"output"} if self.label is None else set()

    def __init__(self, config: Config) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification

        from pgrpo.model.gguf import model_folder
        from pgrpo.model.tokenizer import model_errors, pretrained_tokenizer

        self._config = config
        device = config.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            place = torch.device(device)
        except RuntimeError:
            raise ConfigError(
                f"device is {device!r}; expected auto, cpu, cuda, cuda:1, ..."
            ) from None
        folder = model_folder(config.model)
        self._tokenizer: Any = pretrained_tokenizer(folder, config.revision)
        with model_errors(folder):
            model, found = AutoModelForSequenceClassification.from_pretrained(
                folder,
                revision=config.revision,
                dtype=torch.float32 if config.precision == "fp32" else torch.bfloat16,
                output_loading_info=True,
            )
            self._model: Any = model.to(place).eval()
        if found["missing_keys"]:
            raise ModelError(
                f"model {config.model!r} has no weights for {min(found['missing_keys'])}; expected a "
                "trained sequence classifier, and what is missing would be random numbers"
            )
        self._label = self._place_of_label()
        text: Any = self._model.config.get_text_config()
        # Tokenizers that know no limit name a huge one.
        self._longest = min(
            getattr(text, "max_position_embeddings", None) or math.inf,
            self._tokenizer.model_max_length,
        )
        self._pad_id: int | None = text.pad_token_id
        template = self._tokenizer.chat_template
        self._format = config.format
        if config.format == "auto":
            self._format = "chat" if template else "text"
        if self._format == "chat" and not template:
            raise ModelError(
                f"model {config.model!r} has no chat template; set format to text or pair"
            )
        self._lock = threading.Lock()

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float | Exception | None]:
        with self._lock:
            return self._score(rollouts)

    def _score(self, rollouts: Sequence[Rollout]) -> list[float | Exception | None]:
        encoded = [self._encode(rollout) for rollout in rollouts]
        lengths = [len(one["input_ids"]) for one in encoded]
        scores: list[float | Exception | None] = [None] * len(rollouts)
        if self._config.too_long == "error":
            for place, length in enumerate(lengths):
                if length > self._longest:
                    scores[place] = DataError(
                        f"prompt and completion have {length} tokens, more than the {self._longest} "
                        f"that model {self._config.model!r} takes; nothing is cut off"
                    )
        fitting = [place for place, length in enumerate(lengths) if length <= self._longest]
        fitting.sort(key=lengths.__getitem__, reverse=True)
        while fitting:
            # The first is the longest, and all others are padded to it.
            size = max(1, self._config.token_budget // max(1, lengths[fitting[0]]))
            size = 1 if self._pad_id is None else size
            batch, fitting = fitting[:size], fitting[size:]
            logits = self._logits([encoded[place] for place in batch])
            for place, score in zip(batch, self._read(logits).tolist(), strict=True):
                scores[place] = score
        return scores

    def _encode(self, rollout: Rollout) -> dict[str, list[int]]:
        """What the model is asked, without padding: `input_ids` and what else its tokenizer gives."""
        example, completion = rollout.prompt.example, rollout.completion
        if self._format == "pair":
            return dict(self._tokenizer(example.text, completion))
        if self._format == "text":
            return dict(self._tokenizer(example.text + completion))
        turns = [*(example.turns or [("user", example.text)]), ("assistant", completion)]
        text = self._tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in turns], tokenize=False
        )
        # The template has put the special tokens in already.
        return dict(self._tokenizer(text, add_special_tokens=False))

    def _logits(self, encoded: Sequence[dict[str, list[int]]]) -> Tensor:
        """[B, K] of a batch, padded on the right, where positions count from the first token."""
        import torch

        longest = len(encoded[0]["input_ids"])

        def padded(name: str, fill: int) -> Tensor:
            rows = [one[name] + [fill] * (longest - len(one[name])) for one in encoded]
            return torch.tensor(rows, device=self._model.device)

        inputs = {
            name: padded(name, (self._pad_id or 0) if name == "input_ids" else 0)
            for name in encoded[0]
        }
        with torch.inference_mode():
            return self._model(**inputs).logits

    def _read(self, logits: Tensor) -> Tensor:
        """[B, K] logits -> [B] rewards."""
        logits = logits.double()
        if self._label is None:
            return logits[:, 0]
        log_odds = logits[:, self._label]
        if self._model.config.problem_type != "multi_label_classification":
            others = [k for k in range(logits.shape[1]) if k != self._label]
            log_odds = log_odds - logits[:, others].logsumexp(1)
        return log_odds if self._config.output == "log_odds" else log_odds.sigmoid()

    def _place_of_label(self) -> int | None:
        """Which of the logits counts; None where there is one."""
        config, wanted = self._model.config, self._config.label
        names = [str(config.id2label[place]) for place in range(config.num_labels)]
        if len(names) == 1 and wanted is None:
            return None
        if len(names) == 1:
            raise ConfigError(
                f"label is {wanted!r}, and model {self._config.model!r} has a single label, whose "
                "logit is the reward; remove it"
            )
        if wanted not in names:
            raise ConfigError(
                f"label is {wanted!r}; model {self._config.model!r} has {', '.join(names)}"
            )
        return names.index(wanted)
