"""Contenders take turns, and are compared within a round: what slows the machine down slows all of them.

>>> import itertools
>>> times = interleave({"floor": lambda: None, "ours": lambda: sum(range(2000))}, rounds=5, repeat=20)
>>> sorted(times)
['floor', 'ours']
>>> ratio(times["ours"], times["floor"]) > 1
True
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

#: The seconds that each operation took, round by round.
Times = list[list[float]]


def timed(operation: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """The seconds that it takes."""
    started = clock()
    operation()
    return clock() - started


def measured_itself(operation: Callable[[], float]) -> float:
    """The seconds that it returns."""
    return operation()


def nothing() -> None:
    """What is done before a round, unless there is more to do."""


def interleave(
    contenders: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    repeat: int = 1,
    before: Mapping[str, Callable[[], object]] | None = None,
    warm_up: bool = True,
    timer: Callable[[Callable[[], Any]], float] = timed,
) -> dict[str, Times]:
    """Let the contenders take turns, in another order each round.

    Args:
        contenders: name to one operation.
        rounds: how often each has its turn.
        repeat: how many operations in a turn.
        before: name to what restores the ground before its turn; it is not timed.
        warm_up: have one round more, which does not count.
        timer: runs an operation and returns its seconds; the default is `timed`. An operation that returns them itself
            is run with `measured_itself`.

    Returns:
        name to its times.
    """
    times: dict[str, Times] = {name: [] for name in contenders}
    shuffled, order = random.Random(4), list(contenders)
    for _ in range(rounds + warm_up):
        shuffled.shuffle(order)
        for name in order:
            (before or {}).get(name, nothing)()
            times[name].append([timer(contenders[name]) for _ in range(repeat)])
    return {name: turns[warm_up:] for name, turns in times.items()}


def median(times: Times) -> float:
    """The median of all operations."""
    return statistics.median(second for turn in times for second in turn)


def percentile(times: Times, percent: float) -> float:
    """What so many percent of all operations do not exceed."""
    ordered = sorted(second for turn in times for second in turn)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def ratio(times: Times, floor: Times) -> float:
    """How many times as long as the floor: the median, over the rounds, of the ratio of the round's medians."""
    return statistics.median(
        statistics.median(turn) / statistics.median(turn_of_floor)
        for turn, turn_of_floor in zip(times, floor, strict=True)
    )
