"""`pgrpo evaluate`."""

import json
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from pgrpo.cli.arguments import AsJson, Best, numbers
from pgrpo.errors import ConfigError
from pgrpo.runs.terminal import printable


def evaluate(
    folder: Annotated[Path, Argument(metavar="RUN", help="run folder")],
    candidates: Annotated[
        str | None, Option(help="numbers of candidates, with commas (MovieLens)")
    ] = None,
    prompts: Annotated[int, Option(help="held-out prompts")] = 500,
    as_json: AsJson = False,
    best: Best = False,
) -> None:
    """Held-out reward of a run's last checkpoint."""
    counts = None if candidates is None else numbers(candidates, "--candidates")
    if prompts < 1:
        raise ConfigError(f"--prompts is {prompts}; expected 1 or more")
    from pgrpo.train.evaluation import evaluate_run

    results = evaluate_run(folder, counts, prompts, best=best)
    if as_json:
        print(json.dumps(results, indent=2))
        return
    for result in results:
        count = result["candidates"]
        what = "" if count is None else f"{count} candidates (chance {1 / count:.3f}): "
        samples = result["num_samples"]
        how = f", {samples} samples each: best of them {result['best']:.3f}" if samples else ""
        print(
            f"{what}reward {result['reward']:.3f} +- {result['standard_error']:.3f}, "
            f"{result['num_prompts']} prompts{how}"
        )
        for cluster, values in result["clusters"].items():
            reward = "none" if values["reward"] is None else f"{values['reward']:.3f}"
            print(f"  cluster {printable(cluster)}: {reward}, {values['num_prompts']} prompts")
