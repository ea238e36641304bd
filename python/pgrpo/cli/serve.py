"""`pgrpo serve`."""

import os
import shlex
from typing import Annotated

from typer import Option

from pgrpo.cli.arguments import ConfigFile, Overrides
from pgrpo.errors import ConfigError

REACH = (
    "whoever reaches it can replace the weights, for vLLM asks for its API key "
    "(generation.vllm.api_key_env) only where it generates"
)


def serve(
    config: ConfigFile,
    host: Annotated[
        str | None,
        Option(help=f"address to listen on; {REACH}  [default: 127.0.0.1]", show_default=False),
    ] = None,
    port: Annotated[
        int | None, Option(help="port to listen on  [default: 8000]", show_default=False)
    ] = None,
    ray: Annotated[
        str | None,
        Option(
            metavar="ADDRESS",
            help="start servers on a Ray cluster, and again when they die: HOST:PORT, auto (the one of "
            "RAY_ADDRESS, or that runs here) or local (one of its own); each listens at the address of "
            f"its machine: {REACH}",
        ),
    ] = None,
    num_servers: Annotated[
        int | None, Option(min=1, help="servers on Ray  [default: 1]", show_default=False)
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Start vLLM as a server that a config's runs can use."""
    from pgrpo.runs.config import load_config

    settings = load_config(config, overrides or ())
    if ray is not None:
        if host is not None or port is not None:
            raise ConfigError("--host and --port have no effect with --ray, which finds places")
        from pgrpo.on_ray import connected
        from pgrpo.rollout.engines.vllm.on_ray import serve_on_ray

        with connected(ray):
            serve_on_ray(settings.generation, settings.model, num_servers or 1, _say)
    if num_servers is not None:
        raise ConfigError("--num-servers has no effect without --ray")
    from pgrpo.rollout.engines.vllm.launch import serve_command

    command, environment = serve_command(
        settings.generation, settings.model, host=host or "127.0.0.1", port=port or 8000
    )
    # Without the environment, for that may hold the API key.
    print(shlex.join(command), flush=True)
    os.execve(command[0], command, environment)


def _say(text: str) -> None:
    print(text, flush=True)
