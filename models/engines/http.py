"""An engine over HTTP as `dts.lm.Completer`.

A request carries its own seed, so one that is sent again after a failure gives the tail that the first one would have
given, and only the answer that came is counted. The key comes from the environment, goes into a header and nowhere
else.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

from dts.errors import UnavailableError, UsageError
from dts.lm import Tail, TailRequest
from dts.models.engines.dialects import Dialect
from dts.rewards.judge import LOOPBACK

REACH_SECONDS = 10.0
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds before a request is sent again; doubled each time


class _Passing(Exception):
    """A failure that may pass. `wait`: seconds that the server asks for."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class Server:
    """Tails from a server."""

    def __init__(
        self,
        url: str,
        dialect: Dialect,
        model: str,
        *,
        top: int,
        concurrency: int = 64,
        timeout: float = 600.0,
        wait: float = 60.0,
        key_env: str = "OPENAI_API_KEY",
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Any] | None = None,
    ) -> None:
        """url: such as http://host:8000/v1. model: its name there. top: tokens that a row lists. concurrency: requests
        under way together. timeout: seconds without a sign of life. wait: seconds for which a request is sent again
        after 429, 5xx, a timeout or a broken connection. key_env: the environment variable that holds the key; where it
        is not set, none is sent. clock, sleep: for tests."""
        self._url, self._dialect, self._model, self._top = dialect.url(url), dialect, model, top
        self._wait, self._clock, self._sleep = wait, clock, sleep
        self._key = os.environ.get(key_env, "")
        self._host = urlsplit(url).netloc
        self._client = _client(url, self._key, key_env, concurrency, timeout)
        self._pool = ThreadPoolExecutor(concurrency, thread_name_prefix="engine")

    @property
    def max_top(self) -> int:
        return self._top

    def reach(self) -> None:
        """One short request. Raises `UnavailableError` where nothing answers at this address, without the wait."""
        import httpx

        try:
            self._client.get(self._url, timeout=REACH_SECONDS)
        except httpx.RequestError as error:
            raise UnavailableError(
                f"engine at {self._host} could not be reached ({type(error).__name__}); start it, or check the address"
            ) from None

    def complete(self, requests: Sequence[TailRequest]) -> list[Tail]:
        given_up = threading.Event()
        under_way = [self._pool.submit(self._one, request, given_up) for request in requests]
        try:
            problems = [problem for future in under_way if (problem := future.exception()) is not None]
        except BaseException:  # Ctrl-C: what waits for the server does so no longer
            given_up.set()
            for future in under_way:
                future.cancel()
            raise
        if problems:
            raise problems[0]
        return [future.result() for future in under_way]

    def _one(self, request: TailRequest, given_up: threading.Event) -> Tail:
        answer = self._answer(self._dialect.body(request, self._model), given_up)
        try:
            return self._dialect.tail(answer, request)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise UnavailableError(
                f"engine at {self._host} gave an answer without token ids and log-probabilities of each token "
                f"({type(error).__name__}: {error}); is it the right preset, and was the server started with "
                f"{self._dialect.start}?"
            ) from error

    def _answer(self, body: dict[str, Any], given_up: threading.Event) -> Any:
        """Raises `UnavailableError` where none can be had."""
        failed: float | None = None  # when it did so first
        wait, sleep = FIRST_WAIT, self._sleep or given_up.wait
        while True:
            try:
                return self._send(body)
            except _Passing as failure:
                failed = self._clock() if failed is None else failed
                pause = max(failure.wait, wait * random.uniform(0.5, 1.0))  # apart, after all of them failed at once
                if given_up.is_set() or self._clock() - failed + pause > self._wait:
                    raise UnavailableError(
                        f"engine at {self._host} {failure}, for {self._wait:g} seconds; start it again, or give a "
                        "longer wait="
                    ) from None
                sleep(pause)
                wait = min(2 * wait, LONGEST_WAIT)

    def _send(self, body: dict[str, Any]) -> Any:
        import httpx

        try:
            response = self._client.post(self._url, json=body)
        except httpx.RequestError as error:
            raise _Passing(f"could not be reached ({type(error).__name__})") from None
        if response.status_code == 429 or response.status_code >= 500:
            raise _Passing(f"answered with status {response.status_code}", _seconds(response.headers))
        if response.status_code != 200:
            raise UnavailableError(
                f"engine at {self._host} answered with status {response.status_code}: {self._said(response.text)}"
            )
        try:
            return response.json()
        except ValueError:
            raise UnavailableError(f"engine at {self._host} answered with something else than JSON") from None

    def _said(self, text: str) -> str:
        """An error message of the server, in one line and without the key."""
        said = " ".join(text.split())
        return (said.replace(self._key, "[key]") if self._key else said)[:300]


def _client(url: str, key: str, key_env: str, concurrency: int, timeout: float) -> Any:
    try:
        import httpx
    except ImportError as error:
        raise UnavailableError("engines over HTTP need httpx; run: pip install 'maxent-decoding[engines]'") from error
    if not (key.isascii() and key.isprintable()):
        raise UsageError(f"the key in {key_env} has characters that no header may have")
    return httpx.Client(
        headers={"Authorization": f"Bearer {key}"} if key else {},
        limits=httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
        timeout=httpx.Timeout(timeout, connect=min(timeout, 10.0)),
        follow_redirects=False,  # one would carry the key to another host
        trust_env=urlsplit(url).hostname not in LOOPBACK,  # proxies of the environment are for other machines
    )


def _seconds(headers: Any) -> float:
    """What Retry-After asks for, up to the longest wait; 0 where it gives no number."""
    try:
        wait = float(headers.get("Retry-After", 0))
    except ValueError:
        return 0.0
    return min(wait, LONGEST_WAIT) if wait > 0 else 0.0
