"""A chat endpoint on this machine that fails as it is told to, over real sockets."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, dict[str, str], str]
"""Status, headers and body. With a Content-Length of its own the connection ends behind the body."""


class Server:
    """Answers chat requests by a function of the question and of how often it has been asked; those
    that have a field which it refuses, by 400, and without counting them."""

    def __init__(self, answer: Callable[[str, int], Answer], refuses: str | None = None) -> None:
        self.num_refused = 0
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.most_at_once = self.at_once = self.num_connections = 0
        lock = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"  # which keeps connections open

            def setup(handler) -> None:
                super().setup()
                with lock:
                    self.num_connections += 1

            def finish(handler) -> None:
                super().finish()
                with lock:
                    self.num_connections -= 1

            def do_POST(handler) -> None:
                body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
                question = body["messages"][0]["content"]
                with lock:
                    self.at_once += 1
                    self.most_at_once = max(self.most_at_once, self.at_once)
                    times = sum(r[2]["messages"][0]["content"] == question for r in self.requests)
                    refused = refuses in body
                    self.num_refused += refused
                    if not refused:
                        self.requests.append((handler.path, dict(handler.headers), body))
                answered = (400, {}, f"no {refuses} here") if refused else answer(question, times)
                status, headers, text = answered
                with lock:
                    self.at_once -= 1
                handler.send_response(status)
                for name, value in headers.items():
                    handler.send_header(name, value)
                if "Content-Length" not in headers:
                    handler.send_header("Content-Length", str(len(text.encode())))
                handler.close_connection = "Content-Length" in headers
                handler.end_headers()
                # Whom it would answer may have been killed.
                with suppress(OSError):
                    handler.wfile.write(text.encode())

            def log_message(handler, *_: Any, **__: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def say(text: str, **fields: Any) -> Answer:
    message = {"role": "assistant", "content": text}
    return 200, {}, json.dumps({"choices": [{"message": message}], **fields})
