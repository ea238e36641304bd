"""Between a process and whoever started it: signals that end it, output that nobody reads any more, and
text that a terminal would obey.

Ctrl-C, SIGTERM of a scheduler and SIGHUP of a closed terminal raise a KeyboardInterrupt where the main
thread is, or at the end of what may not be cut short.
"""

from __future__ import annotations

import gc
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Generator
from contextlib import contextmanager, suppress

_SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class InterruptedRunError(Exception):
    """An interrupted command's last words.

    Args:
        rest: where its work is, and how to go on with it; None where another process tells.
    """

    def __init__(self, rest: str | None) -> None:
        super().__init__(rest)
        self.rest = rest


class _State:
    holds = 0
    received: int | None = None
    """The first signal."""
    waiting = False
    """Whether it came in the middle of what may not be cut short."""


_state = _State()


@contextmanager
def interrupts() -> Generator[None]:
    """Within it signals raise KeyboardInterrupt. Those that the process was told to ignore, as `nohup`
    does, stay ignored; outside the main thread nothing changes, for Python allows no handlers there.
    At its end what an interrupt left half made is freed in silence, if the exception is over by then.
    """
    _state.holds, _state.received, _state.waiting = 0, None, False
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    hook = sys.unraisablehook
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _receive)
    try:
        yield
    finally:
        if _state.received is not None:
            gc.collect()
        sys.unraisablehook = hook
        for number, handler in before.items():
            # One that was not installed from Python cannot be installed again from there.
            if handler is not None:
                signal.signal(number, handler)


@contextmanager
def held() -> Generator[None]:
    """What is within it is done before an interrupt is raised; a second one does not wait."""
    _state.holds += 1
    try:
        yield
    finally:
        _state.holds -= 1
    if _state.waiting and not _state.holds:
        _state.waiting = False
        raise KeyboardInterrupt


def take_interrupt() -> bool:
    """Whether an interrupt waits for the end of what is held; it waits no longer, for whoever asks
    sees to it."""
    waiting, _state.waiting = _state.waiting, False
    return waiting


def interrupt_waits() -> bool:
    """Whether an interrupt waits for the end of what is held, which may then be brought about."""
    return _state.waiting


def interrupt() -> None:
    """Do what a signal does that comes in the middle of what is held, for a process in which another
    thread than the main one, where Python hears signals, does the work."""
    _state.waiting = True


def exit_code() -> int:
    """Of a process that was interrupted: 128 and the signal's number, as shells have it."""
    return 128 + (_state.received or signal.SIGINT)


def discard_output() -> None:
    """Let nothing that is printed from now on be an error, for nobody reads it any more."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    # What stands in for the stream in a test or a notebook has no descriptor.
    with suppress(OSError, ValueError):
        os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def printable(text: str) -> str:
    """The text with escape sequences and whatever else a terminal would obey written out, for names and
    completions come from others."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def _receive(number: int, _frame: object) -> None:
    again = _state.waiting
    _state.received = _state.received or number
    if _state.holds and not again:
        _state.waiting = True
        return
    _state.waiting = False
    # What it finds half made, such as a coroutine before its start, is not worth a word.
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    sys.unraisablehook = lambda _: None
    raise KeyboardInterrupt
