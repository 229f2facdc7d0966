"""Run the same work in several processes at once, and time it."""

from __future__ import annotations

import logging
import multiprocessing
import time
from collections.abc import Callable
from typing import Any


def in_processes(work: Callable[[], object], count: int) -> float:
    """Return the seconds from when all processes are ready until the last is done. Each opens its own connections.

    Raises:
        RuntimeError: one of them failed.
    """
    context = multiprocessing.get_context("spawn")
    ready, finished = context.Barrier(count + 1), context.Queue()
    processes = [context.Process(target=_work, args=(work, ready, finished), daemon=True) for _ in range(count)]
    for process in processes:
        process.start()
    ready.wait()
    started = time.monotonic()
    ended = [finished.get() for _ in processes]
    for process in processes:
        process.join()
    for end in ended:
        if isinstance(end, str):
            raise RuntimeError(f"a process failed: {end}")
    return max(ended) - started


def _work(work: Callable[[], object], ready: Any, finished: Any) -> None:
    logging.disable()
    ready.wait()
    try:
        work()
    except Exception as error:
        finished.put(repr(error))
        raise
    finished.put(time.monotonic())  # all processes of the machine share this clock
