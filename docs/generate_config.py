"""Writes config.md, the reference of all settings, from the docstrings under them.

Run it as `python docs/generate_config.py` after changing a setting; a test compares the two.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import NoneType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pgrpo.clusters import builtin as clusterers
from pgrpo.config import sections
from pgrpo.data.movielens import MovieLensConfig
from pgrpo.data.personas import PersonasConfig
from pgrpo.data.table import TableConfig
from pgrpo.rewards import builtin as rewards
from pgrpo.rollout.engines.vllm.settings import VllmConfig
from pgrpo.rollout.settings import GenerationConfig

TABLES: list[tuple[str, type[BaseModel]]] = [
    ("[run]", sections.RunConfig),
    ("[model]", sections.ModelConfig),
    ("[model.lora]", sections.LoraConfig),
    ('[data] with name = "movielens"', MovieLensConfig),
    ('[data] with name = "personas"', PersonasConfig),
    ('[data] with name = "jsonl" or "parquet"', TableConfig),
    ("[clustering]", sections.ClusteringConfig),
    ("[[rewards]] and [[evaluation]]", sections.RewardConfig),
    ("[generation]", GenerationConfig),
    ("[generation.vllm]", VllmConfig),
    ("[estimator]", sections.EstimatorConfig),
    ("[loss]", sections.LossConfig),
    ("[optimizer]", sections.OptimizerConfig),
]
SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "multiple_of": "a multiple of"}
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
- `history`, `order`, `forgetting`, `prior_count`, `sigma_floor` and `min_count` of `[estimator]` with
  an estimator that reads no histories: `grpo`, `dr_grpo`, `rloo` and `batch`
- `estimator.ddof` and `estimator.eps` with `dr_grpo` and `rloo`
- `estimator.frequency_weight` with `history = "one"`
- `importance_cap`, `mask_below` and `mask_above` of `[loss]` with `importance = "off"`
- `importance` and these three with `old_logprobs = "rollout"`
- `[generation.vllm]` without `engine = "vllm"`, and in it:
  - `api_key_env`, `transfer`, `data_parallel_size` and `retry_s` without `servers`
  - `transfer_folder` without `servers` or `tensor_parallel_size` > 1, and where no file is the means
  - `sleep` with `servers`

A relative `data.path`, `data.evaluation_path` or `model.name` folder is looked for beside the config
file first, then in the working folder. `pgrpo train` writes the complete config to `config.toml` of
the run folder, which can be run again as it is.

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
    parts = [HEAD]
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


def _table(section: type[BaseModel]) -> str:
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key, field in section.model_fields.items():
        if field.description is None:
            continue  # a discriminator or a section: the headings tell
        cells = [f"`{key}`", _type(field), _default(field), _prose(field.description)]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
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
    Path(__file__).with_name("config.md").write_text(reference(), encoding="utf-8")
