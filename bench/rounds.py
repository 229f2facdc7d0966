"""Let contenders take turns and compare them within a round, so that a slow moment of the machine slows all of them.

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

#: Seconds of each operation, in a list for each round.
Times = list[list[float]]


def timed(operation: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Return how many seconds an operation takes."""
    started = clock()
    operation()
    return clock() - started


def measured_itself(operation: Callable[[], float]) -> float:
    """Return the seconds that the operation itself measured."""
    return operation()


def nothing() -> None:
    """Do nothing, the default before a turn."""


def interleave(
    contenders: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    repeat: int = 1,
    before: Mapping[str, Callable[[], object]] | None = None,
    warm_up: bool = True,
    timer: Callable[[Callable[[], Any]], float] = timed,
) -> dict[str, Times]:
    """Let the contenders take turns, in a different order each round.

    Args:
        contenders: name to operation.
        rounds: int, number of rounds.
        repeat: int, operations per turn.
        before: name to a function that prepares the contender's turn; not timed.
        warm_up: bool, whether to run one more round first, which does not count.
        timer: function that runs an operation and returns its seconds; the default is `timed`. Use `measured_itself`
            for operations that return their seconds.

    Returns:
        dict of name to Times.
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
    """Return the median of all operations."""
    return statistics.median(second for turn in times for second in turn)


def percentile(times: Times, percent: float) -> float:
    """Return the seconds that this percentage of all operations does not exceed."""
    ordered = sorted(second for turn in times for second in turn)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def ratio(times: Times, floor: Times) -> float:
    """Return the ratio to the floor: divide the medians of each round, and take the median of that."""
    return statistics.median(
        statistics.median(turn) / statistics.median(turn_of_floor)
        for turn, turn_of_floor in zip(times, floor, strict=True)
    )
