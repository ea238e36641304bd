"""The `pgrpo` command.

What goes wrong through the input, the environment or a plugin is one sentence on stderr and exit
code 2; an interrupt is exit code 130.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pgrpo.errors import ConfigError, PgrpoError, RunFolderError

if TYPE_CHECKING:
    from pgrpo.report import Verdict
    from pgrpo.runs.config import Config


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        _quiet_libraries()
        return int(options.run(options) or 0)
    except PgrpoError as error:
        # What a plugin or a library said may have line breaks of its own.
        print("pgrpo:", " ".join(str(error).splitlines()), file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name and error.name.partition(".")[0] == "pgrpo":
            raise
        print(
            f"pgrpo: this command needs {error.name}; install it with pip install 'pgrpo[train]'",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("pgrpo: interrupted; what was saved can be continued", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pgrpo", description="Reinforcement learning that is fair where users differ."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo", help="GRPO against P-GRPO on generated personas, in two minutes"
    )
    demo.add_argument("--out", type=Path, help="folder for the runs and the report")
    demo.set_defaults(run=_demo)

    train = commands.add_parser("train", help="train one run")
    train.add_argument("config", nargs="?", type=Path, help="TOML file")
    train.add_argument("--out", type=Path, help="run folder (default: runs/CONFIG)")
    train.add_argument("--resume", type=Path, metavar="RUN", help="continue the run in this folder")
    _add_set(train)
    train.set_defaults(run=_train)

    compare = commands.add_parser("compare", help="train several estimators and seeds side by side")
    compare.add_argument("config", type=Path, help="TOML file")
    compare.add_argument(
        "--estimators",
        default="grpo,pgrpo",
        help="arms, with commas: names, or NAME:one and NAME:shuffled for control arms",
    )
    compare.add_argument("--seeds", default="0", help="seeds, with commas")
    compare.add_argument(
        "--out", type=Path, required=True, help="folder for the runs and the report"
    )
    _add_set(compare)
    compare.set_defaults(run=_compare)

    evaluate = commands.add_parser("evaluate", help="held-out reward of a run's last checkpoint")
    evaluate.add_argument("folder", type=Path, metavar="RUN", help="run folder")
    evaluate.add_argument("--candidates", help="numbers of candidates, with commas (MovieLens)")
    evaluate.add_argument(
        "--prompts", type=int, default=500, help="held-out prompts (default: 500)"
    )
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    evaluate.set_defaults(run=_evaluate)

    report = commands.add_parser("report", help="one HTML page over one or more runs")
    report.add_argument("folders", nargs="+", type=Path, metavar="RUN", help="run folders")
    report.add_argument("--out", type=Path, default=Path("report.html"), help="file to write")
    report.set_defaults(run=_report)

    serve = commands.add_parser("serve", help="start vLLM as a server that a config's runs can use")
    serve.add_argument("config", type=Path, help="TOML file")
    serve.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default: 127.0.0.1); whoever reaches it can replace the weights, "
        "for vLLM asks for its API key only where it generates",
    )
    serve.add_argument("--port", type=int, default=8000, help="port to listen on (default: 8000)")
    _add_set(serve)
    serve.set_defaults(run=_serve)

    plugins = commands.add_parser("plugins", help="list the installed rewards and clusterers")
    plugins.set_defaults(run=_plugins)
    return parser


def _add_set(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="SECTION.KEY=VALUE",
        help="override a setting; may be repeated",
    )


def _demo(options: argparse.Namespace) -> None:
    from importlib import resources

    from pgrpo.experiments.compare import compare
    from pgrpo.runs.config import load_config

    with resources.as_file(resources.files("pgrpo.experiments") / "demo.toml") as path:
        config = load_config(path)
    out = options.out or _fresh(Path("runs/demo"))
    print(DEMO_TEXT)
    _say(compare(config, ["grpo", "pgrpo", "pgrpo:one"], [0, 1, 2], out), out / "report.html")


DEMO_TEXT = """\
Seven generated personas (a linguistic style and a music genre each) rate on scales of their own, and
one of them is a small minority. A tiny transformer learns from two completions per prompt. Theory
expects P-GRPO to do better than GRPO here: groups are small and rewards continuous, so that one
group's own spread says little. The control arm pgrpo-one keeps a single history for everybody, which
the personas with wide scales should dominate.
"""


def _train(options: argparse.Namespace) -> None:
    from pgrpo.runs.folder import RunFolder

    if (options.config is None) == (options.resume is None):
        raise ConfigError("train needs a config file, or --resume RUN")
    if options.resume is not None:
        if options.overrides or options.out:
            raise ConfigError("--resume continues a run as it was; --set and --out have no effect")
        folder = RunFolder(options.resume)
        config = folder.config()
        if folder.is_finished:
            raise RunFolderError(
                f"the run in {options.resume} is finished; pgrpo report {options.resume} writes its "
                "report again"
            )
    else:
        config = _load(options)
        folder = RunFolder(options.out or _fresh(Path("runs") / options.config.stem))
        folder.require_new()
    # Only now, for it takes seconds, and what is wrong with a config should be told at once.
    from pgrpo.runs.display import Display
    from pgrpo.train.trainer import train

    display = Display(config.estimator.name, config.run.num_steps)
    with folder, display:
        verdict = train(config, folder, display)
    _say(verdict, folder.path / "report.html")


def _compare(options: argparse.Namespace) -> None:
    seeds = _numbers(options.seeds, "--seeds")
    arms = [arm.strip() for arm in options.estimators.split(",") if arm.strip()]
    if not arms:
        raise ConfigError("--estimators names no arm")
    config = _load(options)
    from pgrpo.experiments.compare import compare

    _say(compare(config, arms, seeds, options.out), options.out / "report.html")


def _evaluate(options: argparse.Namespace) -> None:
    counts = [None] if options.candidates is None else _numbers(options.candidates, "--candidates")
    if options.prompts < 1:
        raise ConfigError(f"--prompts is {options.prompts}; expected 1 or more")
    from pgrpo.train.evaluation import evaluate_run

    results = evaluate_run(options.folder, counts, options.prompts)
    if options.json:
        print(json.dumps(results, indent=2))
        return
    for result in results:
        candidates = result["candidates"]
        what = (
            "" if candidates is None else f"{candidates} candidates (chance {1 / candidates:.3f}): "
        )
        print(
            f"{what}reward {result['reward']:.3f} +- {result['standard_error']:.3f}, "
            f"{result['num_prompts']} prompts"
        )
        for cluster, values in result["clusters"].items():
            reward = "none" if values["reward"] is None else f"{values['reward']:.3f}"
            print(f"  cluster {cluster}: {reward}, {values['num_prompts']} prompts")


def _report(options: argparse.Namespace) -> None:
    from pgrpo.report import write_report

    _say(write_report(options.folders, options.out), options.out)


def _serve(options: argparse.Namespace) -> None:
    import os
    import shlex

    config = _load(options)
    from pgrpo.rollout.engines.vllm.launch import serve_command

    command, environment = serve_command(
        config.generation, config.model, host=options.host, port=options.port
    )
    # Without the environment, for that may hold the API key.
    print(shlex.join(command), flush=True)
    os.execve(command[0], command, environment)


def _plugins(options: argparse.Namespace) -> None:
    from pgrpo.plugins.registry import load_registry

    for plugin in load_registry().listing():
        print(f"{plugin.kind} {plugin.name} ({plugin.distribution}): {plugin.doc}")
        for name, text in plugin.settings.items():
            print(f"    {name}: {text}")


def _load(options: argparse.Namespace) -> Config:
    from pgrpo.runs.config import load_config

    return load_config(options.config, options.overrides)


def _numbers(text: str, option: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = []
    if not numbers:
        raise ConfigError(f"{option} is {text!r}; expected whole numbers with commas")
    return numbers


def _fresh(path: Path) -> Path:
    """The path, or the first of path-2, path-3, ... that does not exist yet."""
    number = 1
    fresh = path
    while fresh.exists():
        number += 1
        fresh = path.with_name(f"{path.name}-{number}")
    return fresh


def _say(verdict: Verdict, report: Path) -> None:
    """The outcome in words, and where to look at it."""
    print("\n".join(["", verdict.headline, *verdict.sentences]))
    print(f"report: {report.resolve().as_uri()}")


def _quiet_libraries() -> None:
    """Other libraries' progress bars and notices would tear our own display."""
    import logging
    import os
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.basicConfig(format="pgrpo: %(message)s", level=logging.WARNING)
    warnings.filterwarnings("ignore", module="torch|transformers")


if __name__ == "__main__":
    sys.exit(main())
