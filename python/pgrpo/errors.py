"""The errors a user can meet.

Every message is one sentence that names the value met and what was expected; the command line
prints it on stderr and exits with code 2. Anything else that escapes is a bug of ours and keeps its
traceback.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager


class PgrpoError(Exception):
    """Base of every error that is the input's, the environment's or a plugin's doing."""


class ConfigError(PgrpoError, ValueError, TypeError):
    """A setting is unknown, of the wrong type, out of range or without effect.

    Also a ValueError and a TypeError, which is what users of numbers catch.
    """


class DataError(PgrpoError, ValueError, TypeError):
    """Data are missing, empty, malformed or lack what is asked of them: a data set, or a batch.

    Also a ValueError and a TypeError, as above.
    """


class ModelError(PgrpoError):
    """A model or tokenizer cannot be loaded, or cannot do what the run asks of it."""


class EngineError(PgrpoError):
    """Generation failed: vLLM or a server of it died, hung, or answers nonsense."""


class PluginError(PgrpoError):
    """A reward or clustering plugin is unknown, misconfigured or failed on named rollouts."""


class UnreadableError(PluginError):
    """A reward was answered, and the answer holds no reward: a judge's reply without a verdict."""


class CheckpointError(PgrpoError):
    """A checkpoint is damaged, incomplete or belongs to another run."""


class RunFolderError(PgrpoError):
    """A run folder is in use, already holds a run, or is not a run folder."""


class ParallelError(PgrpoError):
    """Processes of a run do not find each other, one of them is lost, or another one tells of what
    went wrong: then the sentence is empty."""


class RemoteError(Exception):
    """What another process says of where an error came from: the cause of the same error here."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


@contextmanager
def engine_errors(what: str) -> Generator[None]:
    """Whatever vLLM raises, which is whatever its layers raise, as an EngineError about `what`."""
    try:
        yield
    except EngineError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or "no reason given"
        raise EngineError(f"{what}: {type(error).__name__}: {reason[:500]}") from error
