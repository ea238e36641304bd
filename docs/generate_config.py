"""Writes config.md, the reference of all settings, from the docstrings under them.

Also renews the tables of estimators.md that tell what the core says of estimators and options. Run it
as `python docs/generate_config.py` after changing one of them; a test compares what it writes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from types import NoneType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pgrpo.clusters import builtin as clusterers
from pgrpo.config import sections
from pgrpo.data import DataPluginConfig
from pgrpo.data.feedback import FeedbackConfig
from pgrpo.data.movielens import MovieLensConfig
from pgrpo.data.panel import AttributeWords, PanelConfig, WordRule
from pgrpo.data.personas import PersonasConfig
from pgrpo.data.table import TableConfig
from pgrpo.normalizer import RULES, Options
from pgrpo.normalizer.options import expected, meaning
from pgrpo.rewards import builtin as rewards
from pgrpo.rollout.engines.vllm.settings import VllmConfig
from pgrpo.rollout.settings import GenerationConfig

TABLES: list[tuple[str, type[BaseModel]]] = [
    ("[run]", sections.RunConfig),
    ("[model]", sections.ModelConfig),
    ("[model.lora]", sections.LoraConfig),
    ('[data] with name = "movielens"', MovieLensConfig),
    ('[data] with name = "panel"', PanelConfig),
    ("[[data.words]]", AttributeWords),
    ("[[data.words]], its rules", WordRule),
    ('[data] with name = "personas"', PersonasConfig),
    ('[data] with name = "jsonl", "csv", "parquet" or "datasets"', TableConfig),
    ('[data] with name = "feedback"', FeedbackConfig),
    ("[data] of a plugin", DataPluginConfig),
    ("[clustering]", sections.ClusteringConfig),
    ("[[rewards]] and [[evaluation]]", sections.RewardConfig),
    ("[rewards.shift]", sections.ShiftConfig),
    ("[generation]", GenerationConfig),
    ("[generation.vllm]", VllmConfig),
    ("[estimator]", sections.EstimatorConfig),
    ("[loss]", sections.LossConfig),
    ("[optimizer]", sections.OptimizerConfig),
    ("[parallel]", sections.ParallelConfig),
]
SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "multiple_of": "a multiple of"}
OPTIONS = {field.name: field for field in dataclasses.fields(Options)}
NAMES = {bool: "true or false", int: "integer", float: "number", str: "string", dict: "table"}

HEAD = """\
# Settings of a run

<!-- Written by docs/generate_config.py from the docstrings in the code; change them there. -->

A run is one TOML file. Whatever is not in it takes the default below; settings without a default are
required. The file is checked before anything is loaded: an unknown key, a wrong type, a value out
of range and a setting that would have no effect are refused with one sentence and exit code 2.

On the command line `--set section.key=value` overrides a setting; `rewards.0.weight=2` reaches into
a list, counted from 0. A value is read as TOML (`8`, `true`, `[1, 2]`), else as a string.

These would have no effect, and are therefore refused:

- `model.system_prompt` without `model.chat = true`
- `model.revision` of `tiny` and of a `pypi:` model
- `run.keep_best` without `run.eval_every`
- `run.resample` with an estimator that does not compare within the group
@ESTIMATORS@
- `max_unreadable` of a reward with `on_error = "no_reward"`
- `shift` of a reward in `[[evaluation]]`, or one that begins after the last step
- `frequency_weight` of `[estimator]` with `history = "one"`
- `[estimator]` with an objective other than `policy_gradient`, and in `[loss]`:
  - with `objective = "dpo"` all but `beta` and `mask_truncated`
  - with `objective = "sft"` all but `aggregation` and `mask_truncated`
  - with `objective = "policy_gradient"` `beta`
- `importance_cap`, `mask_below` and `mask_above` of `[loss]` with `importance = "off"`
- `importance` and these three with `old_logprobs = "rollout"`
- `generation.overlong_penalty` without `generation.overlong_buffer`
- `[generation.vllm]` without `engine = "vllm"`, and in it:
  - `api_key_env`, `transfer`, `data_parallel_size` and `retry_s` without `servers`
  - `transfer_folder` without `servers` or `tensor_parallel_size` > 1, and where no file is the means
  - `sleep` with `servers`

A relative `data.path` or `data.evaluation_path`, the `path` of saved clusters, and a relative folder
of `model.name` or of a reward model, is looked for beside the config file first, then in the working
folder. `pgrpo train` writes the complete config to `config.toml` of the run folder, which can be run
again as it is.

`[model]`, `[data]`, `[clustering]` and one `[[rewards]]` are required; the other tables may be left
out. [examples](../examples) holds whole files.
"""

PLUGINS = """\
## Plugins that are built in

Keys of `[clustering]` and `[[rewards]]` beyond those above belong to the plugin that `name` names.
`pgrpo plugins` lists these and everything else that is installed; [plugins.md](plugins.md) tells
how to write one.
"""


def reference() -> str:
    """The whole page."""
    parts = [HEAD.replace("@ESTIMATORS@", _without_effect())]
    for title, section in TABLES:
        parts.append(f"## {title}\n\n{_prose(section.__doc__)}\n\n{_table(section)}")
    parts.append(PLUGINS)
    for kind, register_all in (
        ("Clusterer", clusterers.pgrpo_register_clusterers),
        ("Reward", rewards.pgrpo_register_rewards),
    ):
        found: dict[str, Any] = {}
        register_all(found.__setitem__)
        for name, plugin in found.items():
            text = f"### {kind} `{name}`\n\n{_prose(plugin.__doc__)}\n"
            settings = getattr(plugin, "Config", None)
            parts.append(f"{text}\n{_table(settings)}" if settings else text)
    return "\n".join(parts)


def estimators(page: str) -> str:
    """estimators.md with its tables of estimators and options renewed."""
    tables = {
        "estimators": [(f"`{rule.name}`", rule.formula, rule.source) for rule in RULES.values()],
        "options": [
            (
                f"`{name}`",
                expected(name),
                "none" if option.default is None else f"`{json.dumps(option.default)}`",
                _readers(name),
                meaning(name),
            )
            for name, option in OPTIONS.items()
        ],
    }
    for title, rows in tables.items():
        head, rest = page.split(f"<!-- {title} ", 1)
        rest, tail = rest.split("<!-- end -->", 1)
        lines = [*rest.split("\n")[:4], *(_row(cells) for cells in rows), "", ""]
        page = f"{head}<!-- {title} " + "\n".join(lines) + f"<!-- end -->{tail}"
    return page


def _idle(option: str) -> tuple[list[str], list[str]]:
    """Estimators under which an option has no effect, without `frequency_weight` and with it."""
    without, weighted = (
        [
            name
            for name in RULES
            if option in sections.EstimatorConfig(name=name, frequency_weight=weight).inactive()
        ]
        for weight in (0.0, 0.5)
    )
    return without, weighted


def _readers(option: str) -> str:
    """Estimators under which an option has an effect."""
    without, weighted = _idle(option)
    if not without:
        return "all"
    others = _names(name for name in RULES if name not in without)
    return others if weighted else f"{others}; with `frequency_weight` all"


def _without_effect() -> str:
    """The entries about estimators in the list of settings without effect."""
    options: dict[str, list[str]] = {}
    for option in sections.EstimatorConfig.model_fields:
        without, weighted = _idle(option)
        if without:
            when = "" if weighted else ", and no `frequency_weight`"
            options.setdefault(_names(without) + when, []).append(option)
    return "\n".join(
        f"- {_names(idle)} of `[estimator]` with {when}" for when, idle in options.items()
    )


def _names(words: Iterable[str]) -> str:
    *others, last = (f"`{word}`" for word in words)
    return f"{', '.join(others)} and {last}" if others else last


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _table(section: type[BaseModel]) -> str:
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key, field in section.model_fields.items():
        if field.description is None:
            continue  # a discriminator or a section: the headings tell
        option = {"name": "estimator"}.get(key, key)
        if section is sections.EstimatorConfig and option in OPTIONS:
            kind = expected(option)
        else:
            kind = _type(field)
        rows.append(_row([f"`{key}`", kind, _default(field), _prose(field.description)]))
    return "\n".join(rows) + "\n"


def _type(field: FieldInfo) -> str:
    limits = [
        f"{sign} {getattr(limit, name):g}"
        for limit in field.metadata
        for name, sign in SIGNS.items()
        if hasattr(limit, name)
    ]
    return ", ".join([_type_name(field.annotation), *limits])


def _type_name(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(f'`"{value}"`' for value in arguments)
    if origin is list:
        literal = get_origin(arguments[0]) is Literal
        return f"list of {_type_name(arguments[0])}{'' if literal else 's'}"
    if arguments and origin is not dict:
        assert origin in (Union, type(int | str)), annotation
        return " or ".join(_type_name(part) for part in arguments if part is not NoneType)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "table"
    return NAMES[origin or annotation]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default()
    if default is None:
        return "none"
    if isinstance(default, dict) and default:
        inner = ", ".join(f"{key} = {json.dumps(value)}" for key, value in default.items())
        return f"`{{ {inner} }}`"
    return f"`{json.dumps(default)}`"


def _prose(text: str | None) -> str:
    assert text, "every section, setting and plugin explains itself"
    return " ".join(text.split())


if __name__ == "__main__":
    folder = Path(__file__).parent
    (folder / "config.md").write_text(reference(), encoding="utf-8")
    page = folder / "estimators.md"
    page.write_text(estimators(page.read_text(encoding="utf-8")), encoding="utf-8")
