"""`pgrpo serve`."""

import os
import shlex
from typing import Annotated

from typer import Option

from pgrpo.cli.arguments import ConfigFile, Overrides

REACH = (
    "address to listen on; whoever reaches it can replace the weights, for vLLM asks for its API key "
    "only where it generates"
)


def serve(
    config: ConfigFile,
    host: Annotated[str, Option(help=REACH)] = "127.0.0.1",
    port: Annotated[int, Option(help="port to listen on")] = 8000,
    overrides: Overrides = None,
) -> None:
    """Start vLLM as a server that a config's runs can use."""
    from pgrpo.runs.config import load_config

    settings = load_config(config, overrides or ())
    from pgrpo.rollout.engines.vllm.launch import serve_command

    command, environment = serve_command(settings.generation, settings.model, host=host, port=port)
    # Without the environment, for that may hold the API key.
    print(shlex.join(command), flush=True)
    os.execve(command[0], command, environment)
