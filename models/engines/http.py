"""An engine over HTTP as `dts.lm.Completer`.

A request carries its own seed, so one that is sent again after a failure gives the tail that the first one would have
given, and only the answer that came is counted. The key comes from the environment, goes into a header and nowhere
else.
"""

from __future__ import annotations

import math
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any
from urllib.parse import urlsplit

from dts.errors import EngineError, UnavailableError, UsageError
from dts.lm import Tail, TailRequest
from dts.models.engines.dialects import Dialect
from dts.rewards.judge import LOOPBACK

REACH_SECONDS = 10.0
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds before a request is sent again; doubled each time
DOUBLES = 512  # tokens of a tail that may take twice as long as a short one
OVERLOADED = (429, 502, 503, 504)  # statuses that say nothing about a request
CLOSED = (401, 403, 404)  # statuses of a server that answers nobody


class _Passing(Exception):
    """A failure that may pass. wait: seconds that the server asks for. own: whether the request may be what the server
    cannot do. option: of `Server`, to try."""

    def __init__(self, reason: str, *, wait: float = 0.0, own: bool = False, option: str = "wait") -> None:
        super().__init__(reason)
        self.wait, self.own, self.option = wait, own, option


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
        timeout: float = 120.0,
        wait: float = 60.0,
        key_env: str = "OPENAI_API_KEY",
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Any] | None = None,
    ) -> None:
        """url: such as http://host:8000/v1. model: its name there. top: tokens that a row lists. concurrency: requests
        under way together. timeout: seconds for the answer to a short request; one for 512 tokens has twice as long.
        wait: seconds for which a request is sent again after 429, 5xx, a timeout or a broken connection. key_env: the
        environment variable that holds the key; where it is not set, none is sent. clock, sleep: for tests."""
        self._url, self._dialect, self._model, self._top = dialect.url(url), dialect, model, top
        self._timeout, self._wait, self._clock, self._sleep = timeout, wait, clock, sleep
        self._answered = -math.inf  # when the last answer came
        self._key = os.environ.get(key_env, "")
        self._host = urlsplit(url).netloc
        self._client = _client(url, self._key, key_env, concurrency)
        self._pool = futures.ThreadPoolExecutor(concurrency, thread_name_prefix="engine")

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

    def complete(self, requests: Sequence[TailRequest]) -> list[Tail | Exception]:
        given_up = threading.Event()
        under_way = [self._pool.submit(self._one, request, given_up) for request in requests]
        try:
            done, _ = futures.wait(under_way, return_when=futures.FIRST_EXCEPTION)
            for error in filter(None, map(futures.Future.exception, done)):
                raise error
            return [future.result() for future in under_way]
        except BaseException:  # nobody is answered, or Ctrl-C: what waits for the server does so no longer
            given_up.set()
            for future in under_way:
                future.cancel()
            raise

    def _one(self, request: TailRequest, given_up: threading.Event) -> Tail | Exception:
        """Its tail, or why it gets none. Raises `EngineError` where the others would get none either."""
        body = self._dialect.body(request, self._model)

        def ask(**changed: Any) -> Any:
            return self._answer(body | changed, request.limit, given_up)

        try:
            return self._dialect.tail(ask(), request, ask)
        except EngineError as error:
            if given_up.is_set():  # another one has said why
                return error
            given_up.set()
            raise
        except UnavailableError as error:
            return error
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            return UnavailableError(
                f"engine at {self._host} gave an answer without token ids and log-probabilities of each token "
                f"({type(error).__name__}: {error}); is it the right preset, and was the server started with "
                f"{self._dialect.start}?"
            )

    def _answer(self, body: dict[str, Any], limit: int, given_up: threading.Event) -> Any:
        """limit: of tokens. Raises `UnavailableError` where none can be had for this request, `EngineError` where for
        none."""
        seconds = self._timeout * (1 + limit / DOUBLES)
        began, failed, tries = self._clock(), math.inf, 0  # failed: when it did so first
        wait, sleep = FIRST_WAIT, self._sleep or given_up.wait
        while not given_up.is_set():
            try:
                tries += 1
                answer = self._send(body, seconds)
                self._answered = self._clock()
                return answer
            except _Passing as failure:
                failed = min(failed, self._clock())
                pause = max(failure.wait, wait * random.uniform(0.5, 1.0))  # apart, after all of them failed at once
                if self._clock() - failed + pause > self._wait:
                    raise self._lost(failure, tries, began) from None
                sleep(pause)
                wait = min(2 * wait, LONGEST_WAIT)
        raise EngineError(f"engine at {self._host} was given up")

    def _lost(self, failure: _Passing, tries: int, began: float) -> UnavailableError:
        """What to raise where a request is not sent again."""
        said = f"engine at {self._host} {failure}, {tries} times in {self._clock() - began:.0f} seconds"
        if failure.own and self._answered > began:
            return UnavailableError(f"{said}, and answered other requests; look at this one, or give a longer "
                                    f"{failure.option}=")  # fmt: skip
        return EngineError(f"{said}; start it again, or give a longer {failure.option}=")

    def _send(self, body: dict[str, Any], seconds: float) -> Any:
        """seconds: to wait for the answer."""
        import httpx

        try:
            timeout = httpx.Timeout(seconds, connect=min(seconds, REACH_SECONDS))
            response = self._client.post(self._url, json=body, timeout=timeout)
        except httpx.ReadTimeout:
            raise _Passing(f"did not answer within {seconds:.3g} seconds", own=True, option="timeout") from None
        except httpx.RequestError as error:
            raise _Passing(f"could not be reached ({type(error).__name__})") from None
        status = response.status_code
        if status in OVERLOADED or status >= 500:
            wait_for = _seconds(response.headers)
            raise _Passing(f"answered with status {status}", wait=wait_for, own=status not in OVERLOADED)
        if status != 200:
            refuses = EngineError if status < 400 or status in CLOSED else UnavailableError
            raise refuses(f"engine at {self._host} answered with status {status}: {self._said(response.text)}")
        try:
            return response.json()
        except ValueError:
            raise UnavailableError(f"engine at {self._host} answered with something else than JSON") from None

    def _said(self, text: str) -> str:
        """An error message of the server, in one line and without the key."""
        said = " ".join(text.split())
        return (said.replace(self._key, "[key]") if self._key else said)[:300]


def _client(url: str, key: str, key_env: str, concurrency: int) -> Any:
    try:
        import httpx
    except ImportError as error:
        raise UnavailableError("engines over HTTP need httpx; run: pip install 'maxent-decoding[engines]'") from error
    if not (key.isascii() and key.isprintable()):
        raise UsageError(f"the key in {key_env} has characters that no header may have")
    return httpx.Client(
        headers={"Authorization": f"Bearer {key}"} if key else {},
        limits=httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
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
