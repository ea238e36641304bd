"""Examples as the model gets them."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import members, tiny_tokenizer

from pgrpo.config.sections import ModelConfig
from pgrpo.errors import DataError, ModelError
from pgrpo.rollout.prompts import PromptBuilder
from pgrpo.rollout.settings import GenerationConfig
from pgrpo.types import Example

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] == 'user' and 'w10' or 'w11' }} {{ m['content'] }} "
    "{% endfor %}{% if add_generation_prompt %}w12{% endif %}"
)


def make_builder(
    max_prompt_tokens: int = 100, template: str = "", **model: object
) -> PromptBuilder:
    tokenizer = tiny_tokenizer()
    if template:
        tokenizer.chat_template = template
    return PromptBuilder(
        tokenizer,
        ModelConfig.model_validate({"name": "m", **model}),
        GenerationConfig(max_prompt_tokens=max_prompt_tokens),
        members({"u": "c", "v": 3}),
    )


def test_plain_text() -> None:
    prompt = make_builder().build(Example("w5 w9 never", "v"))
    assert (prompt.token_ids, prompt.cluster_id, prompt.choices) == ((5, 9, 2), 3, None)


def test_a_chat_goes_through_the_template() -> None:
    example = Example("w5", "u")
    builder = make_builder(template=TEMPLATE, chat=True)
    assert builder.build(example).token_ids == (10, 5, 12)
    builder = make_builder(template=TEMPLATE, chat=True, system_prompt="w7 w8")
    assert builder.build(example).token_ids == (11, 7, 8, 10, 5, 12)
    turns = (("user", "w5"), ("user", "w6"))
    assert builder.build(Example("", "u", turns=turns)).token_ids == (11, 7, 8, 10, 5, 10, 6, 12)
    turns = (("system", "w4"), *turns)
    assert builder.build(Example("", "u", turns=turns)).token_ids == (11, 4, 10, 5, 10, 6, 12)
    with pytest.raises(DataError, match="'u' is a chat, and model.chat is false; expected true"):
        make_builder().build(Example("w5", "u", turns=turns))
    told: Any = {"chat": True, "chat_template_kwargs": {"more": "w3"}}
    builder = make_builder(template=TEMPLATE + " {{ more }}", **told)
    assert builder.build(example).token_ids == (10, 5, 12, 3)
    # Without chat the template has no part.
    assert make_builder(template=TEMPLATE).build(example).token_ids == (5,)


def test_a_prompt_may_name_the_cluster() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    people = members({"u": 7, "v": "8"})

    def ids(example: Example, template: str, *, chat: bool) -> tuple[int, ...]:
        model = ModelConfig(name="m", chat=chat, prompt_template=template)
        return PromptBuilder(tokenizer, model, GenerationConfig(), people).build(example).token_ids

    named = "w{cluster} {prompt} w9 w{cluster}"
    assert ids(Example("w5", "u"), named, chat=False) == (7, 5, 9, 7)
    assert ids(Example("w5", "v"), named, chat=False) == (8, 5, 9, 8)
    assert ids(Example("w5", "v"), "{prompt} w9", chat=False) == (5, 9)
    # What looks like a field in a prompt is none.
    odd = Example("{cluster} w5", "u")
    assert ids(odd, named, chat=False) == (7, 2, 5, 9, 7)
    turns = (("system", "w4"), ("user", "w5"), ("assistant", "w6"), ("user", "w5"))
    found = ids(Example("", "v", turns=turns), "w{cluster} {prompt}", chat=True)
    assert found == (11, 4, 10, 8, 5, 11, 6, 10, 5, 12)


def test_clusters_that_are_the_same_to_the_model_are_refused() -> None:
    with pytest.raises(ModelError, match="to model 'm' 'c' and '3' are the same|'3' and 'c' are"):
        make_builder(prompt_template="{cluster} {prompt}")


def test_special_tokens_are_not_added_twice() -> None:
    """A tokenizer that begins every text with a token of its own must not do so behind a template."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "w20 " + TEMPLATE
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="w20 $A", special_tokens=[("w20", 20)]
    )
    settings = GenerationConfig()
    plain = PromptBuilder(tokenizer, ModelConfig(name="m"), settings, members({"u": 0}))
    chat = PromptBuilder(tokenizer, ModelConfig(name="m", chat=True), settings, members({"u": 0}))
    example = Example("w5", "u", choices=("w6", "w7"))
    assert plain.build(example).token_ids == (20, 5)
    assert chat.build(example).token_ids == (20, 10, 5, 12)
    assert chat.build(example).choices == ((6,), (7,))


def test_a_chat_needs_a_template() -> None:
    with pytest.raises(ModelError, match="model 'm' has no chat template; set model.chat = false"):
        make_builder(chat=True)


@pytest.mark.parametrize(
    ("example", "words"),
    [
        (Example("w5 w5 w5 w5", "u"), "of user 'u' has 4 tokens, more than generation.max_prompt"),
        (Example("  ", "u"), "the prompt of user 'u' has no tokens: '  '"),
        (Example("w5", "nobody"), "user 'nobody' has no cluster"),
        (Example("w5", "u", choices=("w5",)), r"the choices are \('w5',\); expected at least two"),
        (Example("w5", "u", choices=("w5", "")), "cannot tell the choices"),
        (Example("w5", "u", choices=("rain", "shine")), "cannot tell the choices"),
    ],
)
def test_what_cannot_be_a_prompt(example: Example, words: str) -> None:
    with pytest.raises(DataError, match=words):
        make_builder(max_prompt_tokens=3).build(example)


def test_choices() -> None:
    builder = make_builder()
    example = Example("w5", "u", choices=("w6 w7", "w8", "w6 w9"))
    assert builder.build(example).choices == ((6, 7), (8,), (6, 9))
    # Where one begins another, only an end tells them apart.
    example = Example("w5", "u", choices=("w6", "w6 w7", "w8"))
    assert builder.build(example).choices == ((6, 1), (6, 7, 1), (8, 1))


def test_choices_that_begin_one_another_need_an_end_token() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    builder = PromptBuilder(tokenizer, ModelConfig(name="m"), GenerationConfig(), members({"u": 0}))
    with pytest.raises(DataError, match="begins another, and there is no end token"):
        builder.build(Example("w5", "u", choices=("w6", "w6 w7")))


def test_choices_are_remembered_and_the_memory_is_bounded() -> None:
    builder = make_builder()
    first = builder.build(Example("w5", "u", choices=("w6", "w7"))).choices
    for n in range(5000):
        choices = (f"w{3 + n % 94} w{3 + n // 94}", "w6")
        prompt = builder.build(Example("w5", "u", choices=choices))
        assert prompt.choices is not None
        assert prompt.choices[0][:2] == (3 + n % 94, 3 + n // 94)
        assert len(builder._choice_ids) <= 4097
    assert builder.build(Example("w5", "u", choices=("w6", "w7"))).choices == first
