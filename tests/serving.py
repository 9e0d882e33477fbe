"""A server on a free port of the loopback interface, for tests: the tiny model and rewards by name."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import uvicorn

from dts.doors.app import Service, build_app
from dts.doors.bodies import Limits
from dts.doors.serve import CONNECTIONS, hosts_of
from dts.doors.worker import Worker


@dataclass
class Gate:
    """A reward that waits at each text until it is opened, and counts the texts."""

    open: threading.Event = field(default_factory=threading.Event)
    reached: threading.Event = field(default_factory=threading.Event)
    texts: int = 0

    def __call__(self, text: str) -> float:
        self.texts += 1
        self.reached.set()
        assert self.open.wait(60)
        return float(self.texts)


@contextlib.contextmanager
def serving(
    lm: Any, rewards: Mapping[str, Any], *, limits: Limits | None = None, key: str | None = None
) -> Iterator[tuple[str, Worker]]:
    """The address, and the worker behind it."""
    limits = limits or Limits(seconds=600)
    worker = Worker(lm, waiting=limits.waiting, new_tokens=limits.new_tokens, together=limits.together)
    app = build_app(Service(worker, "tiny", rewards, limits, key, hosts_of("127.0.0.1")))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", **CONNECTIONS))
    started = threading.Event()
    startup = server.startup

    async def announced(*arguments: Any, **options: Any) -> None:
        await startup(*arguments, **options)
        started.set()

    server.startup = announced  # type: ignore[method-assign]
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        assert started.wait(60)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}", worker
    finally:
        server.should_exit = True
        thread.join()
