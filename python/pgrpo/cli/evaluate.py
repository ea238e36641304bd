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
    ability: Annotated[
        bool, Option("--ability", help="general ability in the place of the held-out reward")
    ] = False,
    as_json: AsJson = False,
    best: Best = False,
) -> None:
    """Held-out reward of a run's last checkpoint, or its general ability."""
    if ability:
        if candidates is not None:
            raise ConfigError("--candidates varies held-out prompts, of which --ability has none")
        _ability(folder, as_json=as_json, best=best)
        return
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


def _ability(folder: Path, *, as_json: bool, best: bool) -> None:
    """Measure, and compare with what the run itself measured before its first step."""
    from pgrpo.report.ability import PARTS, changes, told, values
    from pgrpo.runs.folder import RunFolder
    from pgrpo.train.ability import ability_of_run

    record = ability_of_run(folder, best=best)
    if as_json:
        print(record.model_dump_json(indent=2))
        return
    before = next((each for each in RunFolder(folder).ability if each.step == 0), None)
    compared = {} if before is None else {each.name: each for each in changes(before, record)}
    print(f"general ability after step {record.step}, {record.seconds:.0f} s")
    for part, found in values(record):
        name = PARTS[part]
        error = "" if found.standard_error is None else f" +- {found.standard_error:.3f}"
        unit = " nats a token" if part == "text" else ""
        change = compared.get(name)
        against = "" if change is None else f"; before {change.before}: {change.verdict}"
        print(
            f"  {name} {told(part, found)} ({found.value:.3f}{error}{unit}, "
            f"{found.num_items} items){against}"
        )
