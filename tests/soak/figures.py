"""From what was measured to what can be said of it: whether the end is as the beginning was."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from tests.soak.gauges import Sample, Size, TableState

#: Compared are the second fifth of a run, when it has warmed up, and the last one.
EARLY, LATE = 2, 5

#: A median may become half as long again: more than that, and something grows. What is below a millisecond is noise.
SLOWER, NOISE = 1.5, 0.001
#: A p99 is a hundredth of a fifth: a few calls, which a checkpoint or a neighbour on the machine can hit. So it may
#: differ by that much, too; what grows with the tables is longer than this within days.
P99_NOISE = 0.010
#: Memory may grow by a twentieth: allocators settle slowly, and a leak in each message is more than this in an hour.
LARGER = 1.05
#: The tables may take twice as much as when they are loaded anew, as half-empty pages do, and what is small anything.
BLOATED, SMALL = 2.0, 4 * 2**20
#: Seconds. A worker may be suspended in a transaction, but not for longer than the run suspends it.
LONGEST_IDLE = 15.0


@dataclass(frozen=True)
class Span:
    """A part of the run, from one moment to another."""

    begin: float
    end: float

    def fifth(self, number: int) -> Span:
        length = (self.end - self.begin) / 5
        return Span(self.begin + length * (number - 1), self.begin + length * number)

    def has(self, at: float) -> bool:
        return self.begin <= at < self.end

    def meets(self, other: Span) -> bool:
        return self.begin < other.end and other.begin < self.end


@dataclass(frozen=True)
class Timing:
    """How long calls took in a part of the run, in seconds."""

    count: int
    p50: float
    p99: float

    @classmethod
    def of(cls, seconds: Iterable[float]) -> Timing | None:
        """The timing of calls; None if they are too few to tell."""
        ordered = sorted(seconds)
        if len(ordered) < 20:
            return None
        return cls(len(ordered), ordered[len(ordered) // 2], ordered[int(len(ordered) * 0.99)])


def timings(lines: Iterable[Sequence[str]], part: Span, stirred: Sequence[Span]) -> dict[str, Timing]:
    """How long each kind of call took in a part of the run, without those that met what the run itself stirred up.

    Args:
        lines: what, when it began, how many seconds it took.
        part: Span.
        stirred: when the clock jumped, or a worker was suspended, perhaps with a lock.
    """
    found: dict[str, list[float]] = {}
    for what, began, took in lines:
        call = Span(float(began), float(began) + float(took))
        if part.has(call.begin) and not any(call.meets(span) for span in stirred):
            found.setdefault(what, []).append(float(took))
    return {what: timing for what, seconds in found.items() if (timing := Timing.of(seconds))}


def slower(early: dict[str, Timing], late: dict[str, Timing]) -> list[str]:
    """Say which calls took longer in the end."""
    problems = []
    for what in early.keys() & late.keys():
        before, after = early[what], late[what]
        for name, noise in (("p50", NOISE), ("p99", P99_NOISE)):
            first, last = getattr(before, name), getattr(after, name)
            if last > max(first * SLOWER, first + noise):
                problems.append(f"{name} of {what} went from {first * 1000:.1f} to {last * 1000:.1f} ms")
    return problems


def memory(samples: Sequence[Sample], name: str, part: Span) -> float:
    """The median of a process's memory in a part of the run, in bytes."""
    return median([sample.rss[name] for sample in samples if part.has(sample.at) and name in sample.rss] or [0])


def larger(name: str, early: float, late: float) -> list[str]:
    """Say whether a process has grown."""
    if late <= early * LARGER:
        return []
    return [f"the memory of {name} went from {early / 2**20:.1f} to {late / 2**20:.1f} MB"]


@dataclass(frozen=True)
class Autovacuum:
    """Settings of the server: a table is due beyond `threshold + scale * rows`, and is looked at every `naptime`."""

    threshold: float
    scale: float
    naptime: float

    def allows(self, state: TableState, written: int) -> float:
        """How many dead rows a table may have if autovacuum keeps up: what makes it due, and what came meanwhile.

        Args:
            state: of the table.
            written: how many rows were updated or deleted within the last two rounds: autovacuum may have looked just
                before, and needs some time.
        """
        return self.threshold + self.scale * state.live + written


@dataclass(frozen=True)
class Dead:
    """The dead rows of a table: the most of them, how many were allowed then, and how often it was vacuumed."""

    most: int
    allowed: float
    vacuums: int

    @property
    def too_many(self) -> bool:
        return self.most > self.allowed


def dead_rows(samples: Sequence[Sample], name: str, rules: Autovacuum) -> Dead:
    """The moment of a table's most dead rows, as compared with what autovacuum allows."""
    found = []
    for sample in samples:
        state = sample.tables[name]
        before = [one.tables[name].written for one in samples if one.at <= sample.at - 2 * rules.naptime]
        allowed = rules.allows(state, state.written - (before[-1] if before else 0))
        found.append(Dead(state.dead, allowed, samples[-1].tables[name].vacuums))
    return max(found, key=lambda dead: dead.most / dead.allowed)


def bloated(sizes: Iterable[Size]) -> list[str]:
    """Say which tables take more room than they need."""
    return [
        f"{size.name} takes {size.factor:.1f} times what it needs ({size.waste / 2**20:.1f} MB too much)"
        for size in sizes
        if size.factor > BLOATED and size.waste > SMALL
    ]
