"""`pgrpo reproduce`."""

import json
from contextlib import ExitStack
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from pgrpo.cli.arguments import AsJson, Quiet, checked, numbers, say
from pgrpo.errors import ConfigError
from pgrpo.runs.terminal import InterruptedRunError


def reproduce(
    name: Annotated[
        str | None, Argument(help="what to reproduce; without it they are listed")
    ] = None,
    out: Annotated[Path | None, Option(help="folder for runs, figures and pages")] = None,
    seeds: Annotated[str, Option(help="seeds, with commas")] = "0,1,2,3,4",
    base: Annotated[
        Path | None,
        Option("--on", help="config that the settings change, in the place of the packaged one"),
    ] = None,
    settings: Annotated[str, Option(help="only these settings, with commas")] = "",
    arms: Annotated[str, Option(help="only these arms, with commas")] = "",
    figures: Annotated[
        Path | None,
        Option(help="figures.jsonl of another folder: what was measured there is not run again"),
    ] = None,
    only_estimate: Annotated[
        bool, Option("--estimate", help="tell how much is left to run, and run nothing")
    ] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Run a figure of the paper, or one of ours, as a grid of arms, settings and seeds.

    What is there already is not run again: the same command goes on where it was. Checkpoints are
    deleted once their policy was measured on all held-out prompts.
    """
    from pgrpo.config.checks import suggest
    from pgrpo.experiments.design import Reproduction
    from pgrpo.experiments.reproductions import REPRODUCTIONS

    seed_numbers = numbers(seeds, "--seeds")
    if name is None:
        of_one = {"--out": out, "--settings": settings, "--arms": arms}
        of_one |= {"--figures": figures, "--json": as_json}
        for option, given in {**of_one, "--estimate": only_estimate}.items():
            if given:
                raise ConfigError(f"{option} has no effect without the name of what to reproduce")
    if name is not None and name not in REPRODUCTIONS:
        raise ConfigError(f"there is no reproduction {name!r}{suggest(name, list(REPRODUCTIONS))}")
    with ExitStack() as stack:
        from pgrpo.experiments.reproduce import estimate, load_base, plans, reproduce, restricted

        def base_of(reproduction: Reproduction) -> Path:
            packaged = resources.files("pgrpo.experiments") / reproduction.base
            return base or stack.enter_context(resources.as_file(packaged))

        if name is None:
            for found in REPRODUCTIONS.values():
                try:
                    planned = plans(found, load_base(base_of(found)), seed_numbers)
                except ConfigError as error:
                    print(f"{found.name} (not with this config: {error}): {found.about}")
                    continue
                num_runs = len({plan.run_key for plan in planned})
                print(f"{found.name} ({num_runs} runs): {found.about}")
            return
        config = load_base(base_of(REPRODUCTIONS[name]))
        if out is None:
            raise ConfigError("--out is missing; expected a folder for runs, figures and pages")
        chosen = restricted(REPRODUCTIONS[name], _words(settings), _words(arms))
        planned = plans(chosen, config, seed_numbers)
        if only_estimate:
            cost = estimate(planned, out, figures)
            if as_json:
                print(json.dumps(asdict(cost), indent=2))
                return
            print(f"{name}: {cost.num_measured} of {cost.num_runs} runs are measured in {out}")
            if cost.minutes is None:
                print("how long one takes is not known: the first one will tell")
            else:
                print(f"the others are expected to take {cost.minutes:.0f} minutes")
            return
        for each in {plan.setting: plan.config for plan in planned}.values():
            checked(each)
        from pgrpo.runs.display import console

        try:
            shown_on = console(quiet=quiet, stderr=as_json)
            verdict = reproduce(chosen, config, seed_numbers, out, known=figures, shown_on=shown_on)
        except KeyboardInterrupt as error:
            raise InterruptedRunError(
                f"the same command goes on with what is saved in {out}"
            ) from error
    say(verdict, out / "report.html", as_json=as_json)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]
