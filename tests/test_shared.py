"""Several processes, one table: whoever is killed, whenever, blocks nobody and corrupts nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pgrpo import ClusterNormalizer
from pgrpo.errors import ConfigError, DataError
from pgrpo.normalizer import Options, _core
from pgrpo.normalizer.shared_memory import mapped, shared_path

pytestmark = pytest.mark.skipif(os.name != "posix", reason="there are no shared tables")

TIMEOUT_S = 120
NURSERIES = 3
KILLS = 60


def open_table(path: str | Path, **options: Any) -> ClusterNormalizer:
    return ClusterNormalizer.shared(path, "pgrpo", **{"capacity": 65536, **options})


def total(normalizer: ClusterNormalizer) -> float:
    """Samples of all clusters, each of which must be as it is between two calls."""
    stats = normalizer.snapshot()
    for cluster, history in stats.items():
        # Every call adds {4, 6} to its clusters: m2 == count.
        assert (history.mean, history.std) == (5.0, 1.0), (cluster, history)
    return sum(history.count for history in stats.values())


def python(source: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(source), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def output(process: subprocess.Popen[str]) -> list[int]:
    """The numbers that a process printed, once it has ended well."""
    printed, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0
    return [int(number) for number in printed.split()]


@pytest.fixture(autouse=True)
def umask() -> Iterator[None]:
    """Files that tests write themselves are their owner's alone, whatever is usual here."""
    before = os.umask(0o077)
    yield
    os.umask(before)


@pytest.fixture
def name() -> Iterator[str]:
    name = f"test-{uuid.uuid4().hex}"
    yield name
    shared_path(name).unlink(missing_ok=True)


def test_processes_update_one_table(tmp_path: Path) -> None:
    source = """
        import sys
        from pgrpo import ClusterNormalizer
        normalizer = ClusterNormalizer.shared(sys.argv[1], "pgrpo", capacity=65536)
        for call in range(500):
            normalizer.update([4.0, 6.0, 4.0, 6.0], [call % 3, call % 3, "c1", "c1"])
    """
    processes = [python(source, tmp_path / "table") for _ in range(3)]
    for process in processes:
        output(process)
    stats = open_table(tmp_path / "table").snapshot()
    assert {cluster: history.count for cluster, history in stats.items()} == {
        "c1": 3000,
        **{number: 3 * 2 * len(range(number, 500, 3)) for number in range(3)},
    }
    assert total(open_table(tmp_path / "table")) == 6000


@pytest.mark.skipif(sys.platform != "linux", reason="names are files of their own elsewhere")
def test_name_is_shared_memory(name: str) -> None:
    one, other = open_table(name), open_table(name)
    one.update([4.0, 6.0], ["c1", "c1"])
    assert shared_path(name) == Path("/dev/shm", f"pgrpo-{name}")
    assert shared_path(name).exists()
    assert total(other) == 2


def test_table_outlives_its_processes(tmp_path: Path) -> None:
    for calls in range(1, 4):
        normalizer = open_table(tmp_path / "table")
        normalizer.update([4.0, 6.0], ["c1", "c1"])
        assert total(normalizer) == 2 * calls
        del normalizer


def test_only_who_comes_first_is_alone(tmp_path: Path) -> None:
    def alone() -> bool:
        with mapped(tmp_path / "file", 4096, b"header") as (memory, alone):
            assert memory.tobytes() == b"header".ljust(4096, b"\0")
            kept.append(memory)
        return alone

    kept: list[object] = []
    expected = sys.platform != "win32"
    assert alone() is expected
    assert alone() is False
    kept.clear()
    assert alone() is expected
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_failed_opening_holds_up_nobody(tmp_path: Path) -> None:
    file = tmp_path / "file"
    with pytest.raises(ConfigError) as kept, mapped(file, 4096, b"header") as (memory, _):
        raise ConfigError(f"refused at {memory[:6].tobytes()}")
    assert str(kept.value) == f"{file}: refused at b'header'"
    with mapped(file, 4096, b"header") as (_, alone):
        # `memory` keeps the file mapped.
        assert alone is False


def test_threads_make_one_file(tmp_path: Path) -> None:
    start, failures = threading.Barrier(8), []

    def make() -> None:
        start.wait()
        try:
            open_table(tmp_path / "table").update([4.0, 6.0], ["c1", "c1"])
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert total(open_table(tmp_path / "table")) == 16
    assert [path.name for path in tmp_path.iterdir()] == ["table"]


def test_other_options_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "table"
    keep = open_table(path, forgetting=0.5)
    with pytest.raises(ConfigError, match=r"table: .*capacity 65536; expected 65$"):
        open_table(path, capacity=65, forgetting=0.5)
    with pytest.raises(ConfigError, match=r"table: .*forgetting=0\.5.*expected.*forgetting=1\.0"):
        open_table(path)
    del keep


@pytest.mark.parametrize(
    ("contents", "complaint"),
    [
        (b"", "cannot be a shared table"),
        (b"short", "length 5"),
        (b"\0" * 8192, "begins with"),
        (b"not a table " * 1000, "begins with"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, contents: bytes, complaint: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(contents)
    with pytest.raises(ConfigError, match=complaint):
        open_table(path)
    assert path.read_bytes() == contents


def test_truncated_and_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "table"
    open_table(path, capacity=64)
    intact = path.read_bytes()
    path.write_bytes(intact[: len(intact) // 2])
    with pytest.raises(ConfigError, match=f"size {len(intact) // 2}; expected {len(intact)}"):
        open_table(path, capacity=64)
    for position in range(80):
        path.write_bytes(
            intact[:position] + bytes([intact[position] ^ 0x10]) + intact[position + 1 :]
        )
        with pytest.raises(ConfigError, match="expected"):
            open_table(path, capacity=64)
    path.write_bytes(intact)
    open_table(path, capacity=64)


def test_paths_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="missing"):
        open_table(tmp_path / "missing" / "table")
    with pytest.raises(ConfigError, match="cannot be a shared table"):
        open_table(tmp_path)
    with pytest.raises(ConfigError, match="name is empty"):
        open_table("")


def test_symbolic_links_are_not_followed(tmp_path: Path, name: str) -> None:
    target = tmp_path / "target"
    open_table(target)
    for link in (tmp_path / "link", shared_path(name)):
        link.symlink_to(target)
        with pytest.raises(ConfigError, match=f"{link}: .*is a symbolic link; expected a regular"):
            open_table(link)
    shared_path(name).unlink()
    # Nor is one that leads to nothing, where a file would be made.
    shared_path(name).symlink_to(tmp_path / "missing")
    with pytest.raises(ConfigError, match="is a symbolic link"):
        open_table(name)
    assert not (tmp_path / "missing").exists()
    # Folders on the way may be links: people link /tmp, or a home.
    (tmp_path / "folder").symlink_to(tmp_path)
    open_table(tmp_path / "folder" / "target")


@pytest.mark.parametrize("mode", [0o666, 0o620, 0o602])
def test_what_others_may_write_to_is_refused(name: str, mode: int) -> None:
    open_table(name)
    shared_path(name).chmod(mode)
    for table in (name, shared_path(name)):
        with pytest.raises(ConfigError, match=f"pgrpo-{name}: .*mode {mode:04o}; expected .*0600"):
            open_table(table)
    shared_path(name).chmod(0o644)
    open_table(name)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_files_of_other_users_are_refused(name: str) -> None:
    open_table(name)
    os.chown(shared_path(name), 65534, -1)
    for table in (name, shared_path(name)):
        with pytest.raises(ConfigError, match=f"pgrpo-{name}: .*user 65534; expected user 0"):
            open_table(table)


def test_pipes_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="pipe: .*expected a regular file"):
        open_table(tmp_path / "pipe")


@pytest.mark.parametrize("unusual", [0o000, 0o777])
def test_new_files_are_their_makers_alone(tmp_path: Path, unusual: int) -> None:
    os.umask(unusual)
    open_table(tmp_path / "table")
    assert (tmp_path / "table").stat().st_mode & 0o7777 == 0o600


# A writer is forked, hammers, and is killed; its parent then makes a call of its own, which nothing
# may hold up. The writer counts in memory that its parent sees, after each call that has returned.
NURSERY = """
    import mmap, os, random, signal, struct, sys, time
    from pgrpo import ClusterNormalizer

    path, number, kills = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    ledger = mmap.mmap(-1, 8)
    rng = random.Random(number)
    own = ClusterNormalizer.shared(path, "pgrpo", capacity=65536)

    def call(normalizer, serial):
        # One cluster everybody writes to, and one that is often new.
        often_new = f"c{(serial // 20 * 3 + number) % 5000}"
        normalizer.update([4.0, 6.0, 4.0, 6.0], ["c5000", "c5000", often_new, often_new])

    def done():
        return struct.unpack("q", ledger[:])[0]

    longest = 0.0
    for kill in range(kills):
        before = done()
        writer = os.fork()
        if writer == 0:
            normalizer = own if kill % 2 else ClusterNormalizer.shared(path, "pgrpo", capacity=65536)
            serial = before
            while True:
                call(normalizer, serial)
                serial += 1
                ledger[:] = struct.pack("q", serial)
        while done() == before:
            time.sleep(0)
        time.sleep(rng.uniform(0, 0.02))
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
        begin = time.monotonic()
        call(own, done())
        longest = max(longest, time.monotonic() - begin)
        ledger[:] = struct.pack("q", done() + 1)
    print(done(), int(longest * 1e3))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="writers are forked")
def test_killed_writers_block_nobody_and_corrupt_nothing(name: str) -> None:
    checker = open_table(name)
    nurseries = [python(NURSERY, shared_path(name), number, KILLS) for number in range(NURSERIES)]
    seen, snapshots = 0.0, 0
    while any(nursery.poll() is None for nursery in nurseries):
        now = total(checker)
        assert now >= seen
        seen, snapshots = now, snapshots + 1
    reports = [output(nursery) for nursery in nurseries]
    calls = sum(calls for calls, _ in reports)
    assert snapshots > 10
    # No call that returned is lost; of one that was killed, all, half or nothing is there.
    assert 4 * calls <= total(checker) <= 4 * (calls + NURSERIES * KILLS)
    assert max(longest_ms for _, longest_ms in reports) < 10_000
    # Alone again, and repaired: nothing but that has changed.
    before = checker.snapshot()
    del checker
    assert open_table(name).snapshot() == before


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="writers are stopped")
def test_stopped_writers_block_nobody(name: str) -> None:
    source = """
        import sys
        from pgrpo import ClusterNormalizer
        normalizer = ClusterNormalizer.shared(sys.argv[1], "pgrpo", capacity=65536)
        while True:
            normalizer.update([4.0, 6.0], [0, 0])
    """
    normalizer = open_table(name)
    writers = [python(source, shared_path(name)) for _ in range(2)]
    try:
        deadline = time.monotonic() + TIMEOUT_S
        while total(normalizer) < 200:
            assert time.monotonic() < deadline
        for _ in range(50):
            for writer in writers:
                writer.send_signal(signal.SIGSTOP)
            before = total(normalizer)
            for _ in range(100):
                normalizer.update([4.0, 6.0], [0, 0])
            # The kernel may let a writer end its call before it stops.
            assert before + 200 <= total(normalizer)
            for writer in writers:
                writer.send_signal(signal.SIGCONT)
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()
    assert total(normalizer) > 200


def test_other_sums_are_another_table(tmp_path: Path) -> None:
    # As many sums, but not the same: those of a regression would be taken for those of advantages.
    ClusterNormalizer.shared(tmp_path / "table", "auto")
    with pytest.raises(ConfigError, match="regression"):
        ClusterNormalizer.shared(tmp_path / "table", "pgrpo", track_diagnostics=True)


@pytest.mark.parametrize("wrong", [{"eps": -1.0}, {"forgetting": "abc"}, {"capacity": 0}])
def test_wrong_options_make_no_file(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        ClusterNormalizer.shared(tmp_path / "table", **wrong)
    assert not (tmp_path / "table").exists()


def test_reading_takes_no_room(tmp_path: Path) -> None:
    normalizer = ClusterNormalizer.shared(tmp_path / "table", capacity=8)
    for cluster in range(300):
        assert normalizer.normalize([1.0], [f"c{cluster}"]) == [0.0]
        with pytest.raises(DataError, match="nan"):
            normalizer.update([float("nan")], [f"d{cluster}"])
    normalizer.update([1.0] * 8, list(range(8)))
    assert len(normalizer.snapshot()) == 8


def test_restoring_brings_what_is_pending(tmp_path: Path) -> None:
    source = ClusterNormalizer(track_delta=True)
    source.update([1.0, 2.0], ["a", "b"])
    source.delta()
    source.update([3.0], ["a"])
    shared = ClusterNormalizer.shared(tmp_path / "table", track_delta=True)
    shared.load_state_dict(source.state_dict())
    assert shared.state_dict()["pending"] == source.state_dict()["pending"]
    with pytest.raises(ConfigError, match="empty one"):
        shared.load_state_dict(source.state_dict())


def test_ranks_do_not_exchange_what_they_share(tmp_path: Path) -> None:
    from pgrpo.normalizer.collectives import all_reduce

    with pytest.raises(ConfigError, match="is shared"):
        all_reduce(ClusterNormalizer.shared(tmp_path / "table", track_delta=True))


def test_read_only_memory_is_refused() -> None:
    memory = np.zeros(1 << 25, np.uint8)
    memory.flags.writeable = False
    for bytes_ in (memory, np.zeros(1 << 26, np.uint8)[::2]):
        with pytest.raises(ConfigError, match="not contiguous, or read-only"):
            _core.Normalizer(Options(), ("table", bytes_, 65536, "", False))


# Threads call, and another process truncates the file meanwhile: every thread must meet the error
# within a few calls, and so must every other method from then on.
TRUNCATED = """
    import os, sys, threading
    import numpy as np
    from pgrpo import ClusterNormalizer
    from pgrpo.errors import DataError

    path, length, rounds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    refused = 0

    def call(normalizer, begun, refusals, number):
        rng = np.random.default_rng(number)
        size = [64, 8192, 40_000][number]
        try:
            while True:
                clusters = rng.integers(0, 4000, size)
                normalizer.advantages(rng.random(size), clusters)
                begun[number].set()
        except DataError as error:
            refusals.append(str(error))

    for round in range(rounds):
        normalizer = ClusterNormalizer.shared(path, "pgrpo", capacity=5000)
        normalizer.update(np.arange(4000) % 7, np.arange(4000))
        begun, refusals = [threading.Event() for _ in range(3)], []
        threads = [
            threading.Thread(target=call, args=(normalizer, begun, refusals, number), daemon=True)
            for number in range(3)
        ]
        for thread in threads:
            thread.start()
        for event in begun:
            event.wait(60)
        arguments = ["-S", "-c", f"import os; os.truncate({path!r}, {length})"]
        assert os.spawnl(os.P_WAIT, sys.executable, sys.executable, *arguments) == 0
        for thread in threads:
            thread.join(60)
        assert len(refusals) == 3, refusals
        methods = [
            normalizer.snapshot,
            normalizer.state_dict,
            lambda: normalizer.num_nonfinite,
            lambda: normalizer.update([1.0], [1]),
            lambda: normalizer.normalize([1.0], [1]),
            lambda: normalizer.retract([1.0], [1]),
            lambda: normalizer.forget([1]),
            lambda: normalizer.keep([1]),
            lambda: normalizer.merge(ClusterNormalizer("pgrpo")),
            lambda: normalizer.load_state_dict(ClusterNormalizer("pgrpo").state_dict()),
        ]
        for method in methods:
            try:
                method()
            except DataError as error:
                refusals.append(str(error))
        assert len(refusals) == 3 + len(methods), refusals
        for refusal in refusals:
            assert refusal.startswith(path) and "became shorter" in refusal, refusal
        # Another table in its place is as good as ever.
        os.unlink(path)
        refused += 1
    print(refused)
"""


@pytest.mark.parametrize("length", [0, 4096])
def test_truncation_is_an_error_and_kills_nobody(tmp_path: Path, length: int) -> None:
    process = python(TRUNCATED, tmp_path / "table", length, 10)
    assert output(process) == [10]


# A fault that is none of a table's goes on to the handler that was there before, or came after.
OTHER_FAULT = """
    import faulthandler, mmap, os, sys
    from pgrpo import ClusterNormalizer

    path, order = sys.argv[1], sys.argv[2]

    def open_table(name):
        tables.append(ClusterNormalizer.shared(path + name, "pgrpo", capacity=64))
        tables[-1].update([1.0, 2.0], [1, 1])

    tables = []
    for step in order:
        if step == "f":
            faulthandler.enable()
        elif step == "d":
            faulthandler.disable()
        elif step == "t":
            os.truncate(path + "o", 0)
            try:
                tables[0].update([1.0], [1])
            except ValueError:
                pass
            else:
                sys.exit("no error")
        else:
            open_table(step)
    with open(path, "w+b") as file:
        file.truncate(4096)
        memory = mmap.mmap(file.fileno(), 4096)
        file.truncate(0)
    print("before", flush=True)
    memory[0]
"""


@pytest.mark.parametrize("order", ["o", "fo", "of", "fot", "ofO", "ofOt", "ofOdf", "ofOd"])
def test_faults_elsewhere_are_others(tmp_path: Path, order: str) -> None:
    source = textwrap.dedent(OTHER_FAULT)
    done = subprocess.run(
        [sys.executable, "-c", source, tmp_path / "file", order],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.stdout == "before\n", done.stderr
    assert done.returncode == -signal.SIGBUS
    is_enabled = order.rfind("f") > order.rfind("d")
    assert ("Fatal Python error: Bus error" in done.stderr) is is_enabled, done.stderr


def test_a_shared_table_is_not_reset(tmp_path: Path) -> None:
    normalizer = open_table(tmp_path / "table")
    normalizer([1.0, 2.0], [0, 1], [0, 1])
    with pytest.raises(ConfigError, match=r"not this process's alone to reset; keep\(\[\]\) drops"):
        normalizer.reset()
    assert len(normalizer.snapshot()) == 2
