"""The `pgrpo` command.

In come words of a command line; out go exit codes and text. What the commands do is done below.
"""

from pgrpo.cli.main import main

__all__ = ["main"]
