"""Examples made ready for the model: chat template, token ids, permitted completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from transformers import PreTrainedTokenizerFast

from pgrpo.clusters.membership import Membership
from pgrpo.config.sections import ModelConfig
from pgrpo.errors import DataError, ModelError
from pgrpo.rollout.settings import GenerationConfig
from pgrpo.types import ClusterId, Example, Prompt


class PromptBuilder:
    """Turns examples into prompts.

    Args:
        tokenizer: of the policy.
        model: whether and how to apply the chat template.
        generation: the longest prompt that is accepted.
        members: knows every user's cluster.

    Raises:
        ModelError: a chat template is asked for and the tokenizer has none, or two clusters that
            prompts are to name are the same to it.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        model: ModelConfig,
        generation: GenerationConfig,
        members: Membership,
    ) -> None:
        require_template(tokenizer, model)
        self._tokenizer = tokenizer
        self._model = model
        self._longest = generation.max_prompt_tokens
        self._members = members
        self._choice_ids: dict[tuple[str, ...], tuple[tuple[int, ...], ...]] = {}
        if model.names_cluster:
            self._require_different(list(members.about))

    def build(self, example: Example) -> Prompt:
        """One prompt.

        Raises:
            DataError: the prompt is empty or longer than max_prompt_tokens, its user has no
                cluster, or its choices cannot be told apart as tokens.
        """
        cluster = self._members.cluster(example.user)
        ids = token_ids(example, self._tokenizer, self._model, cluster)
        if not ids:
            raise DataError(f"the prompt of user {example.user!r} has no tokens: {example.text!r}")
        if len(ids) > self._longest:
            raise DataError(
                f"the prompt of user {example.user!r} has {len(ids)} tokens, more than "
                f"generation.max_prompt_tokens = {self._longest}; generation.long_prompts = 'drop' "
                "leaves such prompts out"
            )
        choices = None if example.choices is None else self._choices(example.choices)
        return Prompt(example, cluster, ids, choices)

    def _require_different(self, clusters: Sequence[str]) -> None:
        """See that prompts which name clusters tell them apart, where a tokenizer knows few words."""
        first: dict[tuple[int, ...], str] = {}
        for name in clusters:
            same = first.setdefault(
                token_ids(Example("", ""), self._tokenizer, self._model, name), name
            )
            if same != name:
                raise ModelError(
                    f"model.prompt_template names clusters, and to model {self._model.name!r} "
                    f"{same!r} and {name!r} are the same; expected one whose tokens tell them apart"
                )

    def _choices(self, texts: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
        if texts not in self._choice_ids:
            if len(self._choice_ids) > 4096:
                self._choice_ids.clear()
            self._choice_ids[texts] = self._encode_choices(texts)
        return self._choice_ids[texts]

    def _encode_choices(self, texts: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
        ids = tuple(_encode(self._tokenizer, text) for text in texts)
        if len(ids) < 2:
            raise DataError(f"the choices are {texts!r}; expected at least two")
        if len(set(ids)) < len(ids) or not all(ids):
            raise DataError(
                f"the model cannot tell the choices {texts!r} apart: as tokens, two of them are equal "
                "or one is empty"
            )
        # Where one choice is the beginning of another, only an end token tells them apart.
        if any(a != b and b[: len(a)] == a for a in ids for b in ids):
            end = self._tokenizer.eos_token_id
            if end is None:
                raise DataError(
                    f"one of the choices {texts!r} begins another, and there is no end token"
                )
            ids = tuple((*choice, cast(int, end)) for choice in ids)
        return ids


def require_template(tokenizer: PreTrainedTokenizerFast, model: ModelConfig) -> None:
    """See that there is a chat template where one is asked for.

    Raises:
        ModelError: there is none.
    """
    if model.chat and not tokenizer.chat_template:
        raise ModelError(
            f"model {model.name!r} has no chat template; set model.chat = false or use an "
            "instruction-tuned model"
        )


def token_ids(
    example: Example,
    tokenizer: PreTrainedTokenizerFast,
    model: ModelConfig,
    cluster: ClusterId | None = None,
) -> tuple[int, ...]:
    """The prompt of an example as the model reads it, by its chat template if it is wanted; `cluster`
    is its user's, needed where `model.prompt_template` names it.

    Raises:
        DataError: the prompt is a chat, and `model.chat` is false.
    """
    if example.turns and not model.chat:
        raise DataError(
            f"the prompt of user {example.user!r} is a chat, and model.chat is false; expected true"
        )
    before, after = (
        part.replace("{cluster}", str(cluster)) for part in model.prompt_template.split("{prompt}")
    )
    if not model.chat:
        return tuple(cast(Any, tokenizer)(f"{before}{example.text}{after}").input_ids)
    turns = list(example.turns) or [("user", example.text)]
    for place, (role, content) in enumerate(turns):
        if role == "user":
            turns[place] = (role, f"{before}{content}{after}")
            break
    if model.system_prompt is not None and turns[0][0] != "system":
        turns.insert(0, ("system", model.system_prompt))
    text = cast(
        str,
        tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in turns],
            tokenize=False,
            add_generation_prompt=True,
            **model.chat_template_kwargs,
        ),
    )
    # The template has put the special tokens in already.
    return _encode(tokenizer, text)


def _encode(tokenizer: PreTrainedTokenizerFast, text: str) -> tuple[int, ...]:
    return tuple(cast(Any, tokenizer)(text, add_special_tokens=False).input_ids)
