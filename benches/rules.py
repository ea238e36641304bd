"""The rules of TRL and verl themselves, cut out of their files.

To import the one takes long, and the other wants other versions of what is here. Their functions need
torch and each other.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

import numpy as np
import torch


def folder_of(package: str) -> Path | None:
    """Where a package is installed; None if it is not."""
    found = find_spec(package)
    places = found.submodule_search_locations if found else None
    return Path(places[0]) if places else None


def functions_in(file: Path, **names: Any) -> dict[str, Any]:
    """The functions of a file, without what decorates them, which would enter them into registries.

    Args:
        file: a Python file.
        names: what the functions know besides each other.
    """
    tree = ast.parse(file.read_text("utf-8"))
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    for node in found:
        node.decorator_list.clear()
    # Annotations name types that are not here.
    future = ast.parse("from __future__ import annotations").body
    namespace = {"torch": torch, "np": np, "Optional": Optional, **names}
    exec(compile(ast.Module([*future, *found], []), str(file), "exec"), namespace)
    return namespace


def trl_rule(trl: Path) -> Callable[..., torch.Tensor]:
    """The lines of TRL's trainer between rewards [N, R] and advantages [N], as a function of those, of
    the number of completions of a prompt, and of settings of the trainer by name."""
    file = trl / "trainer" / "grpo_trainer.py"
    nodes = ast.walk(ast.parse(file.read_text("utf-8")))
    functions = (node for node in nodes if isinstance(node, ast.FunctionDef))
    method = next(f for f in functions if f.name == "_generate_and_score_completions")
    lines = [ast.unparse(statement) for statement in method.body]
    first = next(i for i, line in enumerate(lines) if line.startswith("unscorable_mask ="))
    last = next(i for i, line in enumerate(lines) if "nan_to_num(advantages" in line)
    names = functions_in(trl / "trainer" / "utils.py")
    head = "def rule(self, rewards_per_func, num_generations, device):"
    body = [*"\n".join(lines[first : last + 1]).split("\n"), "return advantages"]
    exec(compile("\n    ".join([head, *body]), str(file), "exec"), names)

    def advantages(rewards: torch.Tensor, num_generations: int, **settings: Any) -> torch.Tensor:
        usual = {
            "multi_objective_aggregation": "sum_then_normalize",
            "scale_rewards": "group",
            "reward_funcs": [None] * rewards.shape[1],
            "reward_weights": torch.ones(rewards.shape[1], dtype=rewards.dtype),
        }
        trainer = SimpleNamespace(**{**usual, **settings})
        return names["rule"](trainer, rewards, num_generations, rewards.device)

    return advantages


def verl_rules(verl: Path) -> SimpleNamespace:
    """The functions of verl that turn rewards of tokens [N, T] into advantages [N, T]."""
    groupwise = functions_in(verl / "utils" / "groupwise.py")
    of_tensors = SimpleNamespace(**functions_in(verl / "utils" / "torch_functional.py"))
    names = {"verl_F": of_tensors, "defaultdict": defaultdict}
    names |= {name: groupwise[name] for name in ("as_torch_index", "group_mean_std")}
    return SimpleNamespace(**functions_in(verl / "trainer" / "ppo" / "core_algos.py", **names))
