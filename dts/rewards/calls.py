"""Slow functions: several texts at once in threads, in processes, or in the event loop of async functions."""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
import queue
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Executor, Future
from typing import Any

Workers = int | Executor | None


def is_async(function: Any) -> bool:
    """Whether this is a function, or an object with a `__call__`, defined by `async def`."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


def awaited(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """What a coroutine returns, also where this thread has an event loop that runs (a notebook)."""
    future = asyncio.run_coroutine_threadsafe(_contained(coroutine), _loop(os.getpid()))
    try:
        return future.result()
    finally:
        future.cancel()


def begun(function: Callable[[str], Any], texts: Sequence[str], workers: Workers) -> list[Future[Any]]:
    """A call for each text, under way in threads, in the given executor, or, of an async function, in the event loop.

    workers: how many at a time; None: all.
    """
    if isinstance(workers, Executor):
        return [workers.submit(function, text) for text in texts]
    if is_async(function):
        return _in_loop(function, texts, workers or max(len(texts), 1))
    return _in_threads(function, texts, workers or len(texts))


def _in_loop(
    function: Callable[[str], Coroutine[Any, Any, Any]], texts: Sequence[str], count: int
) -> list[Future[Any]]:
    free = asyncio.Semaphore(count)

    async def call(text: str) -> Any:
        async with free:
            return await _contained(function(text))

    return [asyncio.run_coroutine_threadsafe(call(text), _loop(os.getpid())) for text in texts]


async def _contained(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """What it returns. These two would end the event loop, and every later call would wait for ever."""
    try:
        return await coroutine
    except (SystemExit, KeyboardInterrupt) as error:
        raise RuntimeError(f"{type(error).__name__}: {error}") from error


def _in_threads(function: Callable[[str], Any], texts: Sequence[str], count: int) -> list[Future[Any]]:
    """The threads take texts in order. They are daemons: one that hangs does not keep the process from ending."""
    futures: list[Future[Any]] = [Future() for _ in texts]
    waiting: queue.SimpleQueue[tuple[Future[Any], str]] = queue.SimpleQueue()
    for pair in zip(futures, texts, strict=True):
        waiting.put(pair)

    def work() -> None:
        while True:
            try:
                future, text = waiting.get_nowait()
            except queue.Empty:
                return
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(text))
                except BaseException as error:
                    future.set_exception(error)

    for _ in range(min(count, len(texts))):
        threading.Thread(target=work, name="reward", daemon=True).start()
    return futures


@functools.cache
def _loop(process: int) -> asyncio.AbstractEventLoop:
    """The event loop of this process, in a thread of its own. One for all calls, because clients of async libraries
    keep connections that belong to a loop."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="async rewards", daemon=True).start()
    return loop
