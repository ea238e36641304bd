"""Runs whose vLLM is served: real `vllm serve` processes, killed and restarted."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from models import SMOLLM2, Tree, config_of, small_model, write
from serving import KEY, SMALL, START_S, Served, metrics

from pgrpo.cli import main
from pgrpo.errors import ConfigError, EngineError
from pgrpo.model.language_model import load_language_model
from pgrpo.rollout.engines.vllm.backend import Request
from pgrpo.rollout.engines.vllm.server import Server, Unavailable
from pgrpo.rollout.engines.vllm.servers import Servers
from pgrpo.rollout.engines.vllm.settings import VllmConfig
from pgrpo.train.parallel import SINGLE

pytest_plugins = ["serving"]


def rewards_and_losses(run: Path) -> list[tuple[float, float]]:
    return [(r["reward"], round(r["loss"], 4)) for r in metrics(run)]


def when_done(
    run: Path, step: int, act: Callable[[], None], told: Callable[[], bool] = lambda: True
) -> threading.Thread:
    """Act, in the background, once a step is in the log, and what is waited for was told."""

    def watch() -> None:
        while len(metrics(run)) < step or not told():
            time.sleep(0.05)
        act()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def holds_key(folder: Path) -> list[str]:
    return [
        str(path)
        for path in folder.rglob("*")
        if path.is_file() and KEY.encode() in path.read_bytes()
    ]


def test_a_server_is_killed_and_restarted_in_mid_run(
    tmp_path: Path, start_vllm: Callable[..., Served], capfd: Any, caplog: pytest.LogCaptureFixture
) -> None:
    changes: Tree = {
        "model.name": SMOLLM2,
        "optimizer.learning_rate": 5e-5,
        "run.num_steps": 4,
        "run.samples_per_step": 16,
    }
    server = start_vllm(changes)
    whole = tmp_path / "whole" / "run"
    config = write(tmp_path / "whole", changes)
    assert main(["train", str(config), "--out", str(whole)]) == 0  # vLLM in this process
    server.wait()
    # A trainer that was killed left the server in the midst of an update.
    headers = {"Authorization": f"Bearer {KEY}"}
    assert httpx.post(f"{server.url}/start_weight_update", headers=headers).is_success
    capfd.readouterr()

    remote = {**changes, "generation.vllm": {"servers": [server.url], "retry_s": START_S}}
    run = tmp_path / "remote" / "run"

    def restart() -> None:
        server.kill()
        server.start()

    restarted = when_done(run, 2, restart)
    assert main(["train", str(write(tmp_path / "remote", remote)), "--out", str(run)]) == 0
    restarted.join()
    said = capfd.readouterr()
    assert f"{server.url}/" in caplog.text and "; trying again" in caplog.text
    records = metrics(run)
    assert [r["step"] for r in records] == [1, 2, 3, 4]
    assert all(r["mismatch"]["max"] < 1e-4 for r in records), "always the newest weights"
    assert all(r["rollout_version"] == r["policy_version"] - 1 for r in records)
    assert rewards_and_losses(run) == rewards_and_losses(whole), "nothing lost, nothing twice"
    assert KEY not in said.out + said.err + caplog.text
    assert holds_key(tmp_path) == []


def test_served_samples_are_cut_and_stopped_as_in_this_process(
    tmp_path: Path, start_vllm: Callable[..., Served]
) -> None:
    sampling = {"top_k": 40, "top_p": 0.9, "min_p": 0.01, "stop": ["7", "2 w"]}
    changes: Tree = {**SMALL, **{f"generation.{name}": v for name, v in sampling.items()}}
    server = start_vllm(changes)
    whole, run = tmp_path / "whole" / "run", tmp_path / "remote" / "run"
    assert main(["train", str(write(tmp_path / "whole", changes)), "--out", str(whole)]) == 0
    server.wait()
    remote = {**changes, "generation.vllm": {"servers": [server.url]}}
    assert main(["train", str(write(tmp_path / "remote", remote)), "--out", str(run)]) == 0
    assert rewards_and_losses(run) == rewards_and_losses(whole)
    for record in metrics(run):
        assert record["mismatch"]["weight"] < 0.99, "what was cut is corrected for"
        assert record["completion_tokens"] < 8, "some were stopped"


def test_servers_that_stay_away_stop_the_run_and_it_can_go_on(
    tmp_path: Path,
    start_vllm: Callable[..., Served],
    capfd: Any,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two servers: the loss of one is survived, that of both is not."""
    one, two = start_vllm(SMALL), start_vllm(SMALL)
    one.wait()
    two.wait()
    check_what_does_not_fit(tmp_path, one, capfd, monkeypatch)
    servers = {"servers": [one.url, two.url], "retry_s": 1.0}
    # Steps may be faster than a kill, so that there are many, and the second one waits for the first.
    num_steps = 40
    changes = {**SMALL, "generation.vllm": servers, "run.num_steps": num_steps}
    config, run = write(tmp_path / "run", changes), tmp_path / "run" / "run"
    first = when_done(run, 1, one.kill)
    goes_on = "going on with the other servers"
    second = when_done(run, 3, two.kill, lambda: goes_on in caplog.text)
    assert main(["train", str(config), "--out", str(run)]) == 2
    first.join()
    second.join()
    assert f"{one.url}/" in caplog.text and goes_on in caplog.text
    said = capfd.readouterr().err
    assert "pgrpo: no vLLM server could be used for retry_s = 1" in said
    done = len(metrics(run))
    assert 3 <= done < num_steps
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step-{done:06d}"]

    two.start()
    two.wait()
    assert main(["train", "--resume", str(run)]) == 0
    assert [r["step"] for r in metrics(run)] == list(range(1, num_steps + 1))
    assert all(r["mismatch"]["max"] < 1e-4 for r in metrics(run))


def check_what_does_not_fit(
    tmp_path: Path, server: Served, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = {
        **SMALL,
        "generation.vllm": {"servers": [server.url], "retry_s": 1.0},
        "generation.max_prompt_tokens": 256,
    }
    config = write(tmp_path / "misfit", remote)
    assert main(["train", str(config), "--out", str(tmp_path / "misfit" / "a")]) == 2
    said = capfd.readouterr().err
    assert "takes sequences of 192 tokens; generation.max_prompt_tokens and max_new_tokens" in said
    with monkeypatch.context() as wrong:
        wrong.setenv("VLLM_API_KEY", "another")
        assert main(["train", str(config), "--out", str(tmp_path / "misfit" / "b")]) == 2
    assert "status 401" in capfd.readouterr().err


def test_no_server_is_told_within_retry_s(tmp_path: Path, capfd: Any) -> None:
    remote = {**SMALL, "generation.vllm": {"servers": ["http://127.0.0.1:9"], "retry_s": 0.5}}
    start = time.monotonic()
    run = tmp_path / "run"
    assert main(["train", str(write(tmp_path, remote)), "--out", str(run)]) == 2
    assert time.monotonic() - start < 30
    said = capfd.readouterr().err
    assert "no vLLM server could be used for retry_s = 0.5: http://127.0.0.1:9/" in said


@pytest.fixture
def hung() -> Iterator[str]:
    """The address of a port that takes connections and never says anything."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(256)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_a_server_that_hangs_is_found(
    tmp_path: Path, hung: str, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Server, "control_s", 0.3)
    remote = {**SMALL, "generation.vllm": {"servers": [hung], "retry_s": 1.0}}
    start = time.monotonic()
    assert main(["train", str(write(tmp_path, remote)), "--out", str(tmp_path / "run")]) == 2
    assert time.monotonic() - start < 30
    assert f"{hung}/v1/models timed out" in capfd.readouterr().err


def servers_at(url: str, **settings: Any) -> Servers:
    config = config_of(small_model(), {"generation.vllm": {"servers": [url], **settings}})
    return Servers(config.generation, load_language_model(config.model), config.model, SINGLE)


def test_retry_s_begins_with_the_first_failure() -> None:
    """Not with the attempt, which may have taken longer; and the last attempt is at its end."""
    servers = servers_at("http://127.0.0.1:9", retry_s=0.3)
    attempts: list[float] = []
    start = time.monotonic()

    def attempt() -> None:
        attempts.append(time.monotonic() - start)
        if len(attempts) == 1:
            time.sleep(0.5)
        raise Unavailable("out of order")

    with pytest.raises(EngineError, match="be used for retry_s = 0.3: out of order"):
        servers._persist(attempt)
    # Pauses of 0.2 s, and of what is left of retry_s.
    np.testing.assert_allclose(attempts, [0.0, 0.7, 0.8], atol=0.09)


def test_an_interrupt_is_not_missed_between_two_results(hung: str) -> None:
    servers = servers_at(hung, retry_s=100.0)
    servers.submit(0, Request((5, 6), {"n": 1}))
    servers.interrupt()
    with pytest.raises(EngineError, match="abandoned"):
        servers.next()
    servers.close()


def test_requests_to_a_server_that_hangs_can_be_abandoned(
    hung: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The thread that waits for them is woken, those that pause too, and nobody waits for the server."""
    monkeypatch.setattr(Server, "control_s", 0.3)
    monkeypatch.setattr("pgrpo.rollout.engines.vllm.servers._FIRST_PAUSE_S", 60.0)
    monkeypatch.setattr("pgrpo.rollout.engines.vllm.servers._LONGEST_PAUSE_S", 60.0)
    servers = servers_at(hung, retry_s=100.0)
    errors: list[BaseException] = []

    def take() -> None:
        try:
            servers.next()
        except EngineError as error:
            errors.append(error)

    for key in range(64):
        servers.submit(key, Request((5, 6), {"n": 1}))
    waiting = threading.Thread(target=take)
    waiting.start()
    deadline = time.monotonic() + 20
    while not caplog.records and time.monotonic() < deadline:
        time.sleep(0.01)  # on a busy machine it takes longer than control_s to find out
    time.sleep(0.5)
    start = time.monotonic()
    servers.close()
    waiting.join(timeout=10)
    for thread in servers._threads:
        thread.join(timeout=10)
    assert not any(thread.is_alive() for thread in servers._threads)
    assert time.monotonic() - start < 10
    assert str(errors[0]) == "the requests were abandoned"
    assert len(caplog.records) == 1, "one server's outage is told once"


def test_a_version_is_announced_when_nothing_of_other_weights_is_cached() -> None:
    """A server that restarted unnoticed has answered requests with weights of its own, and is at work on
    others when it gets ours: its cache cannot be reset then."""
    asked: list[str] = []
    known = {"/weight_info": {"weight_version": "default"}, "/v1/models": {"data": []}}
    resets = [False, True]

    class Restarted(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or "{}")
            asked.append(self.path)
            if self.path == "/update_weight_version":
                known["/weight_info"]["weight_version"] = body["new_version"]
            self._answer({"success": resets.pop(0)} if "reset" in self.path else {})

        def do_GET(self) -> None:
            self._answer(known[self.path])

        def _answer(self, found: object) -> None:
            said = json.dumps(found).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Restarted) as listener:
        threading.Thread(target=listener.serve_forever, daemon=True).start()
        servers = servers_at(f"http://127.0.0.1:{listener.server_port}")
        (server,) = servers._servers
        # As the last sync left it, before the server restarted and a request met other weights.
        servers._wanted = server.clean = "run-1"
        server.version = None
        with pytest.raises(Unavailable, match="cannot reset its prefix cache"):
            servers._renew(server)
        assert known["/weight_info"]["weight_version"] == "default", "nobody takes it for ready"
        servers._renew(server)
        assert known["/weight_info"]["weight_version"] == "run-1"
        assert asked[-2:] == ["/reset_prefix_cache", "/update_weight_version"]
        servers.close()
        listener.shutdown()


@pytest.mark.parametrize(("key", "sent"), [("k-123\n", "Bearer k-123"), ("", None)])
def test_keys_are_sent_without_space_around_them(
    key: str, sent: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", key)
    server = Server("http://127.0.0.1:9/", VllmConfig())
    assert server._client.headers.get("Authorization") == sent
    monkeypatch.setenv("VLLM_API_KEY", "k-12\n3")
    with pytest.raises(ConfigError) as caught:
        Server("http://127.0.0.1:9/", VllmConfig())
    assert "k-12" not in str(caught.value)
