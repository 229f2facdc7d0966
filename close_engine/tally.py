"""What this process has counted since it began, because no table does: conflicts, and what its workers reported.

`close_engine.metrics` shows it. Counting takes less than a microsecond, and needs no package.

>>> counts = Counts()
>>> counts.add("build_site", "sent")
>>> counts.read()
{('build_site', 'sent'): 1}
>>> seconds = Histogram(0.1, 1)
>>> for observed in (0.05, 0.5, 0.5, 30):
...     seconds.observe("build_site", observed)
>>> seconds.read()
{'build_site': ([1, 3, 4], 31.05)}
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from itertools import accumulate
from threading import Lock

__all__ = ["ATTEMPTS", "CONFLICTS", "REPORTS", "SEND_SECONDS", "Counts", "Histogram"]


class Counts:
    """How often something happened, by what tells one kind from another."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._counts: Counter[tuple[str, ...]] = Counter()

    def add(self, *kind: str) -> None:
        """Count one more."""
        with self._lock:
            self._counts[kind] += 1

    def read(self) -> dict[tuple[str, ...], int]:
        """Return the counts so far."""
        with self._lock:
            return dict(self._counts)


class Histogram:
    """How many values of each kind were at most so large.

    Args:
        bounds: the bounds, ascending.
    """

    def __init__(self, *bounds: float) -> None:
        self.bounds = bounds
        self._lock = Lock()
        self._counts: dict[str, list[int]] = defaultdict(lambda: [0] * (len(bounds) + 1))
        self._sums: Counter[str] = Counter()

    def observe(self, kind: str, value: float) -> None:
        """Count a value."""
        place = bisect_left(self.bounds, value)
        with self._lock:
            self._counts[kind][place] += 1
            self._sums[kind] += value  # type: ignore[assignment]

    def read(self) -> dict[str, tuple[list[int], float]]:
        """Return for each kind how many values were within each bound, and last how many there were; and their sum."""
        with self._lock:
            return {kind: (list(accumulate(counts)), self._sums[kind]) for kind, counts in self._counts.items()}


#: Conflicts that this process has met, by the operation that was refused.
CONFLICTS = Counts()

#: What became of the messages that workers of this process have claimed, by topic and by how their log says it.
REPORTS = Counts()

#: How long the sender took, in seconds, by topic, whether it failed or not.
SEND_SECONDS = Histogram(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800)

#: How many attempts it took until a message was sent, by topic.
ATTEMPTS = Histogram(1, 2, 3, 5, 8, 13, 21, 36)
