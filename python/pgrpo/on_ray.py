"""The border to Ray, which places processes on the machines of a cluster.

In come names of Ray's modules; out go the modules, without types, for most of Ray has none. Nobody
imports Ray by itself, for it takes seconds and is not everywhere.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Generator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from pgrpo.errors import ConfigError, ParallelError

_log = logging.getLogger("pgrpo")

_STORE_BYTES = 200 * 2**20
"""What a Ray of our own has for objects between its processes, which are small here; left to itself it
takes a third of the memory."""
_KNOCK_S = 10.0
"""How long an address of a cluster may take to answer."""


def ray(module: str = "ray") -> Any:
    """One of Ray's modules.

    Raises:
        ConfigError: Ray is not installed.
    """
    # It is read when Ray is imported. Nobody is told of what runs here.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"Ray needs {error.name}; install it with pip install 'pgrpo[ray]'"
        ) from error


@contextmanager
def connected(address: str | None, num_cpus: int = 1) -> Generator[None]:
    """Within it this process is one of Ray's, unless it is one already.

    Args:
        address: of a cluster that this machine belongs to (`10.0.0.1:6379`); "auto" for the
            environment's RAY_ADDRESS, else one that runs here; "local" for one of our own, which ends
            with this; None for RAY_ADDRESS, else what `ray start` has left here, else "local".
        num_cpus: how many processors one of our own has at least.

    Raises:
        ParallelError: there is no such cluster.
    """
    module = ray()
    if module.is_initialized():
        yield
        return
    try:
        address = address or os.environ.get("RAY_ADDRESS")
        if address:
            _join(address, num_cpus)
        else:
            # "auto" would also take another run's own, which ends with that run.
            try:
                _join(ray("ray._private.utils").read_ray_address() or "local", num_cpus)
            except OSError:
                # What was left is no longer there.
                _join("local", num_cpus)
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ParallelError(f"there is no Ray to join at {address!r}: {reason[:300]}") from error
    try:
        yield
    finally:
        module.shutdown()


def _join(address: str, num_cpus: int) -> None:
    host, _, port = address.rpartition(":")
    if port.isdigit():
        # Ray itself would try for minutes.
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_S).close()
    own: dict[str, Any] = {}
    if address == "local":
        own = {
            "num_cpus": max(num_cpus, os.cpu_count() or 1),
            "object_store_memory": _STORE_BYTES,
            "include_dashboard": False,
        }
    # Lost processes would be told of on standard output, which is for what a command makes.
    ray("ray._private.worker").print_to_stdstream = _note
    ends = signal.getsignal(signal.SIGTERM)
    # What its processes say in its logs is for those who look after it.
    ray().init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own)
    if threading.current_thread() is threading.main_thread():
        # Ray would end this process at once.
        signal.signal(signal.SIGTERM, ends)


def _note(said: dict[str, Any], **_: object) -> None:
    """What Ray says of its processes, for whoever wants to know more."""
    _log.info("Ray: %s", " ".join(said["lines"]))
