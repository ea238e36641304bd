"""Configs: what is written is what is read, and what would have no effect is refused."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import pytest
import tomli_w
from conftest import Tree, tiny_run
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field

import pgrpo.rollout.engines.vllm.settings as vllm_settings
import pgrpo.rollout.settings as rollout_settings
from pgrpo.config import Section, sections
from pgrpo.config.checks import check
from pgrpo.config.sections import EstimatorConfig, reward_names
from pgrpo.config.toml import apply_override, resolved_toml, resolved_tree
from pgrpo.data import movielens, personas, table
from pgrpo.data.table import TableConfig
from pgrpo.errors import ConfigError
from pgrpo.normalizer import RULES, ClusterNormalizer, Options
from pgrpo.normalizer.several import COMBINATIONS, RewardOptions
from pgrpo.runs.config import Config, load_config, parse_config

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
SHIPPED = [
    *sorted((ROOT / "examples").glob("*.toml")),
    *sorted((ROOT / "python" / "pgrpo" / "experiments").glob("*.toml")),
]
SECTIONS = [
    thing
    for thing in {
        **vars(sections),
        **vars(movielens),
        **vars(personas),
        **vars(table),
        **vars(rollout_settings),
        **vars(vllm_settings),
    }.values()
    if inspect.isclass(thing) and issubclass(thing, Section)
]


def reload(config: Config, folder: Path) -> Config:
    path = folder / "config.toml"
    path.write_text(resolved_toml(config), "utf-8")
    return load_config(path)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configs_are_valid_and_written_back(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    assert reload(config, tmp_path) == config


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_setting_explains_itself(section: type[BaseModel]) -> None:
    assert section.__doc__
    for name, field in section.model_fields.items():
        # The sections of a config explain themselves, and the discriminator is known by its section.
        annotations = [field.annotation, *get_args(field.annotation)]
        is_section = any(isinstance(a, type(BaseModel)) for a in annotations)
        if not is_section and name != "data" and not (name == "name" and "Literal" in str(field)):
            assert field.description, f"{section.__name__}.{name}"


def number(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False, exclude_min=True, exclude_max=True)


def some(**entries: st.SearchStrategy[Any]) -> st.SearchStrategy[Tree]:
    return st.fixed_dictionaries({}, optional=entries)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
DATA = st.one_of(
    st.fixed_dictionaries(
        {"name": st.just("personas")},
        optional={"words": st.integers(2, 9), "minority_share": number(0, 1)},
    ),
    st.fixed_dictionaries(
        {"name": st.just("movielens"), "path": TEXT},
        optional={
            "candidates": st.integers(2, 26),
            "negatives": st.sampled_from(["uniform", "popularity"]),
            "template": st.sampled_from(["facts", "titles", "both"]),
        },
    ),
    st.fixed_dictionaries(
        {"name": st.sampled_from(["jsonl", "parquet"]), "path": TEXT},
        optional={"choices_column": TEXT, "feature_columns": st.lists(TEXT, max_size=3)},
    ),
)
OPTIONS = st.dictionaries(
    st.from_regex("[a-z][a-z0-9_]{6,}", fullmatch=True).filter(
        lambda name: name not in vllm_settings._NO_VLLM_OPTIONS
    ),
    st.one_of(st.booleans(), st.integers(-(2**63), 2**63 - 1), number(-9, 9), TEXT),
    max_size=3,
)
VLLM = st.one_of(
    some(
        precision=st.sampled_from(["auto", "fp32", "bf16"]),
        kv_cache_gib=number(0, 99),
        sleep=st.booleans(),
        probe_tolerance=number(0, 1),
        options=OPTIONS,
    ),
    st.fixed_dictionaries(
        {"tensor_parallel_size": st.integers(2, 8)},
        optional={"transfer_folder": TEXT.map("/{}".format)},
    ),
    st.fixed_dictionaries(
        {
            "servers": st.lists(
                st.integers(1, 99).map("http://host-{}:8000".format), min_size=1, unique=True
            )
        },
        optional={
            "api_key_env": st.just("SOME_KEY"),
            "transfer": st.sampled_from(["auto", "file"]),
            "transfer_folder": TEXT.map("/{}".format),
            "retry_s": st.floats(0, 99),
            "options": OPTIONS,
        },
    ),
)
GENERATION = st.one_of(
    some(
        engine=st.just("transformers"),
        group_size=st.integers(2, 9),
        top_k=st.integers(0, 99),
        top_p=st.floats(0, 1, exclude_min=True),
        min_p=st.floats(0, 1, exclude_max=True),
        stop=st.lists(TEXT.filter(bool), max_size=3),
    ),
    st.fixed_dictionaries({"engine": st.just("vllm")}, optional={"vllm": VLLM}),
)
LOSS = st.one_of(
    some(
        ratio=st.sampled_from(["token", "sequence"]),
        clipping=st.sampled_from(["ppo", "cispo"]),
        clip_low=st.floats(0, 1, exclude_min=True),
        mask_truncated=st.booleans(),
        entropy_coef=st.floats(0, 1),
        kl_coef=st.floats(0, 1),
        importance=st.sampled_from(["auto", "token", "sequence"]),
        importance_cap=number(1, 9),
        mask_below=st.floats(0, 0.9),
        mask_above=number(9, 99),
    ),
    st.just({"importance": "off"}),
    st.just({"old_logprobs": "rollout"}),
)
ESTIMATOR = st.one_of(
    st.fixed_dictionaries(
        {"name": st.sampled_from(["pgrpo", "two_way", "shrinkage", "auto"])},
        optional={
            "history": st.sampled_from(["cluster", "user", "one", "shuffled"]),
            "order": st.sampled_from(["update_then_normalize", "normalize_then_update"]),
            "eps": st.floats(1e-100, 9),
            "forgetting": st.floats(0, 1, exclude_min=True),
            "prior_count": st.floats(0, 99),
            "sigma_floor": st.floats(0, 9),
            "min_count": st.floats(0, 99),
        },
    ),
    st.fixed_dictionaries({"name": st.just("grpo")}, optional={"ddof": st.integers(0, 1)}),
    st.fixed_dictionaries(
        {"name": st.sampled_from(["rloo", "dr_grpo", "batch"])},
        optional={"clip": number(0, 9), "frequency_weight": st.floats(-10, 10)},
    ),
)
TREES = st.fixed_dictionaries(
    {
        "model": st.one_of(
            st.fixed_dictionaries(
                {"name": TEXT, "chat": st.just(True)}, optional={"system_prompt": TEXT}
            ),
            st.fixed_dictionaries(
                {"name": TEXT},
                optional={
                    "precision": st.sampled_from(["auto", "fp32", "bf16", "autocast"]),
                    "lora": some(
                        rank=st.integers(1, 64),
                        targets=st.one_of(TEXT, st.lists(TEXT, min_size=1, max_size=3)),
                    ),
                },
            ),
        ),
        "data": DATA,
        "clustering": st.fixed_dictionaries(
            {"name": TEXT}, optional={"num_clusters": st.integers(1, 9), "deep": some(x=TEXT)}
        ),
        "rewards": st.lists(
            st.fixed_dictionaries(
                {"name": TEXT},
                optional={
                    "weight": st.floats(-9, 9),
                    "on_error": st.sampled_from(["fail", "retry", "no_reward"]),
                    "batch": st.sampled_from(["group", "step"]),
                    "pattern": TEXT,
                },
            ),
            min_size=1,
            max_size=3,
        ),
    },
    optional={
        "run": some(num_steps=st.integers(1, 10**6), seed=st.integers(0, 2**32)),
        "estimator": ESTIMATOR,
        "generation": GENERATION,
        "loss": LOSS,
        "optimizer": some(learning_rate=number(0, 1), epochs=st.integers(1, 4)),
        "evaluation": st.lists(st.fixed_dictionaries({"name": TEXT}), max_size=2),
    },
)


@settings(max_examples=150, deadline=None)
@given(TREES)
def test_any_config_is_written_back_to_an_equal_one(tree: Tree) -> None:
    config = parse_config(tree)
    again = parse_config(tomllib.loads(resolved_toml(config)))
    assert again == config
    assert resolved_toml(again) == resolved_toml(config)


def test_the_resolved_config_is_complete() -> None:
    config = parse_config(tiny_run())
    tree = resolved_tree(config)
    # A project has no effect without a tracker that has them.
    assert tree["run"].keys() | {"project"} == type(config.run).model_fields.keys()
    assert tree["optimizer"].keys() == type(config.optimizer).model_fields.keys()
    assert tree["rewards"] == [
        {
            "name": "persona",
            "weight": 1.0,
            "clusters": [],
            "timeout_s": 60.0,
            "on_error": "fail",
            "max_unreadable": 0.1,
            "batch": "group",
            "num_workers": 4,
            "workers": "threads",
        }
    ]
    assert "system_prompt" not in tree["model"], "it has no effect without a chat"
    idle = {"vllm", "overlong_penalty"}
    assert tree["generation"].keys() | idle == type(config.generation).model_fields.keys()
    assert not idle & tree["generation"].keys(), "they have no effect here"


def test_histories_of_each_reward_need_several() -> None:
    changes: Tree = {"estimator.combine": "normalize_then_sum"}
    with pytest.raises(ConfigError, match="there is one reward; expected at least two"):
        parse_config(tiny_run(changes))
    rewards = [{"name": "persona"}, {"name": "judge"}, {"name": "persona"}]
    config = parse_config(tiny_run({**changes, "rewards": rewards}))
    assert reward_names(config.rewards) == ["persona", "judge", "persona 2"]
    with pytest.raises(
        ConfigError, match="overlong_buffer takes a penalty off the sum of the rewar"
    ):
        parse_config(tiny_run({**changes, "rewards": rewards, "generation.overlong_buffer": 2}))


@pytest.mark.parametrize(
    ("shift", "words"),
    [
        ({"after": 2}, "rewards.0.shift: a scale of 1 and an offset of 0 change nothing"),
        ({"offset": 1.0}, "rewards.0.shift.after is missing"),
        ({"after": 0, "offset": 1.0}, "rewards.0.shift.after is 0: input should be greater than"),
        ({"after": 2, "ofset": 1.0}, "unknown key rewards.0.shift.ofset; did you mean 'offset'?"),
        (
            {"after": 4, "offset": 1.0},
            "reward 'persona' shifts after step 4 of 4; expected an earlier",
        ),
    ],
)
def test_a_shift_that_changes_nothing_is_refused(shift: Tree, words: str) -> None:
    with pytest.raises(ConfigError) as told:
        parse_config(tiny_run({"rewards": [{"name": "persona", "shift": shift}]}))
    assert words in str(told.value)


def test_a_shift_is_of_training_alone() -> None:
    reward = {"name": "persona", "shift": {"after": 2, "offset": -1.0}}
    config = parse_config(tiny_run({"rewards": [reward], "evaluation": [{"name": "persona"}]}))
    assert parse_config(resolved_tree(config)) == config
    with pytest.raises(ConfigError, match="evaluation reward 'persona' has a shift, which is of"):
        parse_config(tiny_run({"evaluation": [reward]}))


def vllm(**settings: object) -> Tree:
    return {"generation": {"engine": "vllm", "vllm": settings}}


@pytest.mark.parametrize(
    ("changes", "idle"),
    [
        ({"model.system_prompt": "Be brief."}, "model: system_prompt"),
        ({"model.revision": "main"}, "model: revision"),
        ({"run": {"keep_best": True}}, "run: keep_best"),
        ({"model": {"name": "pypi:x==1", "revision": "main"}}, "model: revision"),
        ({"estimator": {"name": "grpo", "history": "cluster"}}, "estimator: history"),
        ({"estimator": {"name": "batch", "order": "update_then_normalize"}}, "estimator: order"),
        ({"estimator": {"name": "grpo", "forgetting": 0.9}}, "estimator: forgetting"),
        ({"estimator": {"name": "rloo", "prior_count": 16}}, "estimator: prior_count"),
        ({"estimator": {"name": "batch", "sigma_floor": 0.1}}, "estimator: sigma_floor"),
        ({"estimator": {"name": "dr_grpo", "min_count": 2}}, "estimator: min_count"),
        ({"estimator": {"name": "rloo", "ddof": 0}}, "estimator: ddof"),
        ({"estimator": {"name": "dr_grpo", "eps": 1e-4}}, "estimator: eps"),
        (
            {"estimator": {"history": "one", "frequency_weight": 0.5}},
            "estimator: frequency_weight",
        ),
        ({"generation": {"overlong_penalty": 0.5}}, "generation: overlong_penalty"),
        ({"generation.vllm": {"block_size": 64}}, "generation: vllm"),
        ({"generation": {"engine": "transformers", "vllm": {}}}, "generation: vllm"),
        (vllm(api_key_env="KEY"), "generation.vllm: api_key_env"),
        (vllm(transfer="nccl"), "generation.vllm: transfer"),
        (vllm(transfer_folder="/x"), "generation.vllm: transfer_folder"),
        (vllm(data_parallel_size=2), "generation.vllm: data_parallel_size"),
        (vllm(retry_s=5.0), "generation.vllm: retry_s"),
        (vllm(tensor_parallel_size=2, transfer="ipc"), "generation.vllm: transfer"),
        (vllm(servers=["http://a"], sleep=False), "generation.vllm: sleep"),
        (
            vllm(servers=["http://a"], transfer="nccl", transfer_folder="/x"),
            "generation.vllm: transfer_folder",
        ),
        ({"loss": {"importance": "off", "importance_cap": 3.0}}, "loss: importance_cap"),
        ({"loss": {"importance": "off", "mask_below": 0.5}}, "loss: mask_below"),
        ({"loss": {"importance": "off", "mask_above": 2.0}}, "loss: mask_above"),
        ({"loss": {"old_logprobs": "rollout", "importance": "token"}}, "loss: importance"),
        ({"loss": {"old_logprobs": "rollout", "mask_above": 2.0}}, "loss: mask_above"),
    ],
)
def test_settings_without_effect_are_refused(changes: Tree, idle: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(tiny_run(changes), "run.toml")
    said = f"run.toml: {idle} has no effect here: remove it, or change what it depends on"
    assert str(caught.value) == said


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ({"servrs": []}, "unknown key generation.vllm.servrs; did you mean 'servers'?"),
        ({"block_size": 24}, "generation.vllm.block_size is 24: .* multiple of 16"),
        ({"precision": "autocast"}, "generation.vllm.precision is 'autocast': .* 'fp32' or 'bf16'"),
        ({"servers": "http://a"}, "generation.vllm.servers is 'http://a': .* list"),
        ({"timeout_s": 0}, "generation.vllm.timeout_s is 0: .* greater than 0"),
        (
            {"servers": ["localhost:8000"]},
            "generation.vllm: 'localhost:8000' is no server's address",
        ),
        ({"servers": ["http://me:key@a"]}, "generation.vllm: .* holds credentials; .* api_key_env"),
        ({"servers": ["http://a", "http://a"]}, "generation.vllm: an address .* twice"),
        (
            {"servers": ["http://a"], "api_key_env": "sk-12"},
            "generation.vllm.api_key_env is 'sk-12'",
        ),
        (
            {"servers": ["http://a"], "transfer_folder": "x"},
            "generation.vllm: transfer_folder is 'x'; expected an absolute path",
        ),
        ({"options": {"api-key": "x"}}, "generation.vllm: options.api-key is no argument's name"),
        ({"options": {"dtype": "half"}}, "generation.vllm: options.dtype is not free"),
        ({"probe_every": 0}, "generation.vllm.probe_every is 0: .* greater than or equal to 1"),
    ],
)
def test_settings_of_vllm_are_checked(setting: Tree, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        parse_config(tiny_run(vllm(**setting)))


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ({"top_k": -1}, "generation.top_k is -1: .* greater than or equal to 0"),
        ({"top_p": 0.0}, "generation.top_p is 0.0: .* greater than 0"),
        ({"top_p": 1.1}, "generation.top_p is 1.1: .* less than or equal to 1"),
        ({"min_p": 1.0}, "generation.min_p is 1.0: .* less than 1"),
        ({"stop": "x"}, "generation.stop is 'x': .* list"),
        ({"stop": ["x", ""]}, r"generation.stop: stop is \['x', ''\]; expected texts .* not empty"),
    ],
)
def test_settings_of_sampling_are_checked(setting: Tree, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        parse_config(tiny_run({"generation": setting}))


def test_further_options_of_vllm_are_passed_on(tmp_path: Path) -> None:
    options = {"enforce_eager": False, "max_num_seqs": 64, "hf_overrides": {"rope_theta": 1e4}}
    config = parse_config(tiny_run(vllm(options=options)))
    assert config.generation.vllm.options == options
    assert resolved_tree(config)["generation"]["vllm"]["options"] == options
    assert reload(config, tmp_path).generation.vllm.options == options


def test_a_server_can_be_named_on_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(tomli_w.dumps(tiny_run()), "utf-8")
    overrides = ["generation.engine=vllm", 'generation.vllm.servers=["http://a:8000"]']
    assert load_config(path, overrides).generation.vllm.servers == ["http://a:8000"]


ONE_STEP_OFF = {"run.pipeline": "one_step_off", "generation.engine": "vllm"}


def test_one_step_off_needs_weights_of_the_engine_s_own_and_a_correction() -> None:
    with pytest.raises(ConfigError, match="generation.engine must be 'vllm'"):
        parse_config(tiny_run({"run.pipeline": "one_step_off"}))
    with pytest.raises(ConfigError, match="loss.importance must not be 'off'"):
        parse_config(tiny_run(ONE_STEP_OFF | {"loss": {"importance": "off"}}))
    for loss in ({}, {"importance": "sequence"}, {"old_logprobs": "rollout"}):
        config = parse_config(tiny_run(ONE_STEP_OFF | {"loss": loss}))
        assert config.run.pipeline == "one_step_off"


@pytest.mark.parametrize(
    ("generation", "loss", "importance"),
    [
        ({"engine": "transformers"}, {}, "off"),
        ({"engine": "vllm"}, {}, "token"),
        ({"engine": "vllm"}, {"old_logprobs": "rollout"}, "off"),
        ({"engine": "vllm"}, {"importance": "off"}, "off"),
        ({"engine": "transformers"}, {"importance": "sequence"}, "sequence"),
        ({"top_k": 5}, {}, "token"),
        ({"top_p": 0.9}, {}, "token"),
        ({"min_p": 0.1}, {}, "token"),
        ({"min_p": 0.1}, {"importance": "off"}, "off"),
        ({"top_p": 0.9}, {"old_logprobs": "rollout"}, "off"),
        ({"top_k": 0, "top_p": 1.0, "min_p": 0.0, "stop": ["x"]}, {}, "off"),
    ],
)
def test_the_correction_depends_on_the_sampling(
    generation: Tree, loss: Tree, importance: str
) -> None:
    config = parse_config(tiny_run({"generation": generation, "loss": loss}))
    resolved = config.resolved_loss()
    assert resolved.importance == importance
    assert resolved.model_copy(update={"importance": config.loss.importance}) == config.loss


@pytest.mark.parametrize(
    ("setting", "range_of_it"),
    [
        ({"forgetting": 0.0}, "a number above 0, up to 1"),
        ({"forgetting": 1.1}, "a number above 0, up to 1"),
        ({"prior_count": -1.0}, "a number of at least 0"),
        ({"sigma_floor": -0.1}, "a number of at least 0"),
        ({"min_count": -1.0}, "a number of at least 0"),
        ({"clip": 0.0}, "a positive number or None"),
        ({"frequency_weight": -10.5}, "a number from -10 to 10"),
        ({"frequency_weight": 10.5}, "a number from -10 to 10"),
    ],
)
def test_options_of_estimators_have_the_ranges_of_the_normalizer(
    setting: Tree, range_of_it: str
) -> None:
    ((key, value),) = setting.items()
    words = f"{key} is {value}; expected {range_of_it}"
    with pytest.raises(ConfigError, match=f"estimator.{key}: {words}"):
        parse_config(tiny_run({"estimator": setting}))
    with pytest.raises(ConfigError, match=words):
        ClusterNormalizer(**setting)


def test_settings_of_estimators_are_options_of_the_normalizer() -> None:
    hints = get_type_hints(Options)
    for key, field in EstimatorConfig.model_fields.items():
        if key == "combine":
            # Of several rewards, which an option of the normalizer tells apart.
            assert get_args(field.annotation) == COMBINATIONS
            assert field.default == RewardOptions.combine
        elif key != "history":
            option = {"name": "estimator"}.get(key, key)
            assert field.default == getattr(Options, option)
            assert field.annotation == hints[option]


@pytest.mark.parametrize("name", [name for name in RULES if not RULES[name].reads_histories])
@pytest.mark.parametrize(
    "setting", [{"history": "shuffled"}, {"order": "normalize_then_update"}, {"forgetting": 0.9}]
)
def test_weighing_by_frequency_reads_histories_under_every_estimator(
    name: str, setting: Tree
) -> None:
    estimator = {"name": name, **setting}
    ((key, value),) = setting.items()
    with pytest.raises(ConfigError, match=f"{key} has no effect"):
        parse_config(tiny_run({"estimator": estimator}))
    config = parse_config(tiny_run({"estimator": estimator | {"frequency_weight": 0.5}}))
    assert resolved_tree(config)["estimator"][key] == value


def test_whatever_a_config_allows_the_normalizer_takes() -> None:
    """Under each estimator, all settings that have an effect at once."""
    settings = {
        "ddof": 1,
        "eps": 0.5,
        "order": "normalize_then_update",
        "forgetting": 0.9,
        "prior_count": 16,
        "sigma_floor": 0.1,
        "min_count": 2,
        "clip": 5,
        "frequency_weight": 0.5,
    }
    assert settings.keys() == EstimatorConfig.model_fields.keys() - {"name", "history", "combine"}
    for name in RULES:
        idle = EstimatorConfig.model_validate({"name": name}).inactive()
        chosen = {key: value for key, value in settings.items() if key not in idle}
        config = parse_config(tiny_run({"estimator": {"name": name} | chosen})).estimator
        made = repr(ClusterNormalizer(name, **config.model_dump(exclude={"name", "history"})))
        assert all(f"{key}=" in made for key in chosen), made


@pytest.mark.parametrize("name", [name for name in RULES if RULES[name].zero_alone])
def test_estimators_that_compare_within_groups_need_some(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name!r} learns nothing from groups of one"):
        parse_config(tiny_run({"estimator.name": name, "generation.group_size": 1}))


def test_estimators_can_all_be_chosen() -> None:
    for name in RULES:
        assert parse_config(tiny_run({"estimator.name": name})).estimator.name == name


class Unions(Section):
    """Settings whose complaints pydantic locates by more than their keys."""

    number: int | float = 0
    names: str | list[str] = "x"
    steps: list[int | str] = Field([])
    table: dict[str, int | float] = Field({})
    either: int | dict[str, int] = 0
    inner: Inner | None = None
    data: Annotated[Inner | Other, Field(discriminator="name")] | None = None


class Inner(Section):
    name: Literal["inner"] = "inner"
    width: int | float = 1
    lists: list[list[int] | Literal["none"]] = Field([])
    str: int = 1  # a key that is called like a type


class Other(Section):
    name: Literal["other"] = "other"
    depth: int


Unions.model_rebuild()


@pytest.mark.parametrize(
    ("tree", "complaint"),
    [
        ({"number": "many"}, "number is 'many': input"),
        ({"names": 3}, "names is 3: input"),
        ({"names": ["a", 3]}, "names is ['a', 3]: input"),
        ({"steps": [1, 2.5]}, "steps.1 is 2.5: input"),
        ({"table": {"str": "x"}}, "table.str is 'x': input"),
        ({"table": {"int": "x"}}, "table.int is 'x': input"),
        ({"table": {"list[str]": None}}, "table.list[str] is None: input"),
        ({"either": {"int": "x"}}, "either is {'int': 'x'}: input"),
        ({"inner": {"width": "x"}}, "inner.width is 'x': input"),
        ({"inner": {"str": "x"}}, "inner.str is 'x': input"),
        ({"inner": {"lists": [[1], [2, "x"]]}}, "inner.lists.1.1 is 'x': input"),
        ({"inner": {"Inner": 1}}, "unknown key inner.Inner; known:"),
        ({"data": {"name": "inner", "width": "x"}}, "data.width is 'x': input"),
        ({"data": {"name": "inner", "inner": 1}}, "unknown key data.inner; known:"),
        ({"data": {"name": "inner", "str": "x"}}, "data.str is 'x': input"),
        ({"data": {"name": "other"}}, "data.depth is missing"),
        ({"data": {"name": "other", "other": 1}}, "unknown key data.other; known:"),
        ({"data": {"depth": 1}}, "data.name is missing"),
        ({"data": {"name": "othre"}}, "data.name is 'othre'; did you mean 'other'?"),
    ],
)
def test_a_complaint_names_keys_and_no_types(tree: Tree, complaint: str) -> None:
    """Pydantic also locates the members of a union it tried, and the tag of a section."""
    with pytest.raises(ConfigError) as caught:
        check(Unions, tree, "here")
    assert str(caught.value).startswith(f"here: {complaint}")


def test_configs_are_frozen() -> None:
    config = parse_config(tiny_run())
    with pytest.raises(ValueError, match="frozen"):
        config.run.seed = 3


# Overrides.


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("run.num_steps=7", ("run", "num_steps"), 7),
        (" run.num_steps = 7", ("run", "num_steps"), 7),
        ("model.chat=true", ("model", "chat"), True),
        ("optimizer.learning_rate=1e-3", ("optimizer", "learning_rate"), 1e-3),
        ("model.name=some/folder", ("model", "name"), "some/folder"),
        ("model.name=", ("model", "name"), ""),
        ("model.name=pypi:x==1.2", ("model", "name"), "pypi:x==1.2"),
        ('model.name="8"', ("model", "name"), "8"),
        ("rewards.1.weight=-2.5", ("rewards", 1, "weight"), -2.5),
        ('data.feature_columns=["a", "b"]', ("data", "feature_columns"), ["a", "b"]),
        ("data={name = 'personas', words = 3}", ("data",), {"name": "personas", "words": 3}),
        ("loss.kl_coef=0.1", ("loss", "kl_coef"), 0.1),
    ],
)
def test_overrides(override: str, path: tuple[str | int, ...], value: object) -> None:
    tree = tiny_run({"rewards": [{"name": "a"}, {"name": "b"}]})
    apply_override(tree, override)
    node: Any = tree
    for part in path:
        node = node[part]
    assert node == value
    assert type(node) is type(value)


def test_later_overrides_win_and_everything_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(tomli_w.dumps(tiny_run()), "utf-8")
    config = load_config(path, ["run.seed=3", "run.seed=4", "rewards.0.weight=2"])
    assert (config.run.seed, config.rewards[0].weight) == (4, 2.0)
    with pytest.raises(ConfigError, match=f"{path}: run.seed is -1: "):
        load_config(path, ["run.seed=-1"])


# Where relative paths are.


def table_run(**data: str) -> Tree:
    return tiny_run({"data": {"name": "jsonl", **data}, "model.name": "weights"})


def test_paths_are_relative_to_the_config_then_to_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside, here = tmp_path / "beside", tmp_path / "here"
    for folder in (beside, here):
        folder.mkdir()
        (folder / "both.jsonl").touch()
    (here / "later.jsonl").touch()
    (here / "weights").mkdir()
    path = beside / "run.toml"
    monkeypatch.chdir(here)
    path.write_text(tomli_w.dumps(table_run(path="both.jsonl", evaluation_path="later.jsonl")))
    config = load_config(path)
    assert isinstance(config.data, TableConfig)
    assert config.data.path == str(beside / "both.jsonl")
    assert config.data.evaluation_path == str(here / "later.jsonl")
    assert config.model.name == str(here / "weights")
    rewards = [
        {"name": "reward_model", "model": "both.jsonl"},
        {"name": "judge", "model": "weights"},
    ]
    tables = {**table_run(path="both.jsonl"), "rewards": rewards, "evaluation": rewards}
    path.write_text(tomli_w.dumps(tables))
    config = load_config(path)
    for section in (config.rewards, config.evaluation):
        assert [one.options["model"] for one in section] == [str(beside / "both.jsonl"), "weights"]
    # The run goes on from wherever it is resumed.
    monkeypatch.chdir("/")
    assert reload(config, tmp_path) == config


def test_what_does_not_exist_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    (tmp_path / "tiny").mkdir()
    path.write_text(tomli_w.dumps(table_run(path="pypi:recbole==1.2.1")))
    config = load_config(path)
    assert isinstance(config.data, TableConfig)
    assert (config.data.path, config.model.name) == ("pypi:recbole==1.2.1", "weights")
    path.write_text(tomli_w.dumps(tiny_run()))
    assert load_config(path).model.name == "tiny", "a folder of that name does not take its place"
    path.write_text(tomli_w.dumps(table_run(path="")))
    assert load_config(path).data == config.data.model_copy(update={"path": ""})
