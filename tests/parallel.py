"""Tests of modules that name this in `pytest_plugins` also run in several threads at once.

Each such test has two cases: `alone`, and `threads`, in which its body runs in four threads that
start together, with the same arguments and fixtures. The first failure of any thread is the test's.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

NUM_THREADS = 4


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "parallel" in getattr(metafunc.module, "pytest_plugins", ()):
        numbers = {"alone": 1, "threads": NUM_THREADS}
        metafunc.parametrize("num_threads", numbers.values(), ids=numbers, indirect=True)


@pytest.fixture(autouse=True)
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """In how many threads at once a test runs; several change every few bytecodes, not every 5 ms."""
    number: int = getattr(request, "param", 1)
    interval = sys.getswitchinterval()
    if number > 1:
        sys.setswitchinterval(1e-5)
    yield number
    sys.setswitchinterval(interval)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    number: Any = pyfuncitem.funcargs.get("num_threads", 1)
    if number == 1:
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    start, failures = threading.Barrier(number), list[BaseException]()

    def work() -> None:
        start.wait()
        try:
            pyfuncitem.obj(**arguments)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work) for _ in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return True
