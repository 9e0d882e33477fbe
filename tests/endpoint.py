"""A chat-completions endpoint on the loopback interface, with faults to order."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Reply:
    """One response. `cut`: bytes of the body that are announced but not sent. `hang`: waits until it is set."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    cut: int = 0
    hang: threading.Event | None = None


def says(content: Any, tokens: int = 7) -> Reply:
    """An answer in the right form."""
    form = {"choices": [{"message": {"role": "assistant", "content": content}}], "usage": {"total_tokens": tokens}}
    return Reply(json.dumps(form).encode())


class Handler(http.server.BaseHTTPRequestHandler):
    server: Stub

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append({"path": self.path, "headers": dict(self.headers), "body": body})
            number = len(self.server.requests) - 1
        reply = self.server.answer(json.loads(body["messages"][-1]["content"]), number)
        if reply.hang is not None:
            reply.hang.wait()
        with contextlib.suppress(OSError):  # who hung up reads nothing
            self.send_response(reply.status)
            for name, value in {**reply.headers, "Content-Length": str(len(reply.body) + reply.cut)}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(reply.body)

    def log_message(self, *_):
        pass


class Stub(http.server.ThreadingHTTPServer):
    """answer: from a question and its number to a reply."""

    daemon_threads = True

    def __init__(self, answer: Callable[[dict[str, Any], int], Reply]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.lock = answer, threading.Lock()
        self.requests: list[dict[str, Any]] = []
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is part of the tests."""
