"""Does a stage change, a claim or a worker cost more than at another commit?

    python -m bench.against fc8225f

Both versions are installed side by side, each with its own database on one server, and take turns for 20 rounds. A
ratio below one means that this checkout is cheaper.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from bench.claims import EACH, refill_outbox
from bench.driver import counting_proxy
from bench.ground import DEST, fill
from bench.report import Table, microseconds, per_second, show, times
from bench.server import Server, private_server, processor_seconds

ROOT = Path(__file__).parent.parent

#: How many conversations exist, and how many messages are claimed in one round.
CONVERSATIONS, MESSAGES = 2000, 500

#: How many conversations have messages for a worker.
DRAINED = 200

#: At older commits, a message copies its lead.
LEAD_MAY_BE_MISSING = """
    DO $$ BEGIN
        IF EXISTS (SELECT FROM pg_attribute
                   WHERE attrelid = 'close_engine.outbox'::regclass AND attname = 'lead_id') THEN
            ALTER TABLE close_engine.outbox ALTER lead_id DROP NOT NULL;
        END IF;
    END $$
"""


class Side:
    """A process that runs one of the two versions."""

    def __init__(self, directory: str, url: str) -> None:
        command = [sys.executable, "-m", "bench.driven", directory, url]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def tell(self, verb: str, *arguments: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([verb, *arguments]) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError("one of the two processes ended early; its error is above")
        return json.loads(answer)

    def close(self) -> None:
        self.process.communicate()  # it ends when its input ends


@contextmanager
def installed(commit: str) -> Iterator[dict[str, str]]:
    """Install another commit (`before`) and this checkout (`now`), and yield the directory of each."""
    with tempfile.TemporaryDirectory(prefix="close_engine_against_") as place:
        source = f"{place}/source"
        archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(source)
        directories = {"before": f"{place}/before", "now": f"{place}/now"}
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--target", directories["before"], source], check=True)
        subprocess.run([*pip, "--target", directories["now"], str(ROOT)], check=True)
        yield directories


def compare(server: Server, directories: dict[str, str], rounds: int, changes: int) -> Iterator[Table]:
    urls = {name: server.url(server.copy("template0", f"against_{name}")) for name in directories}
    with ExitStack() as stack:
        sides: dict[str, Side] = {}
        for name, directory in directories.items():
            sides[name] = Side(directory, urls[name])
            stack.callback(sides[name].close)
            found = sides[name].tell("migrate")
            assert found.startswith(directory), f"{found} was imported instead of the package in {directory}"
            server.execute(LEAD_MAY_BE_MISSING, database=f"against_{name}")
            fill(server, f"against_{name}", CONVERSATIONS, stages=list(DEST), history=5)
        server.set("synchronous_commit", "off")
        yield table("One stage change", server, directories, sides, "stage change", rounds, changes, 1)
        yield table("One message claimed by ten and sent", server, directories, sides, "claim", rounds, MESSAGES, 10)
        yield drained(server, sides, max(2, rounds // 2), (1, 4, 16))
        alone: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(rounds):
            for name, side in sides.items():
                alone[name].append(side.tell("alone", changes))
        yield Table(
            "Python alone, one stage change",
            ["version", "seconds on the processor", "to before"],
            [[name, microseconds(median(alone[name])), times(ratio(alone[name], alone["before"]))] for name in sides],
            f"the driver's cursor replays the server's answers; median of {rounds} rounds",
        )


def table(
    title: str,
    server: Server,
    directories: dict[str, str],
    sides: dict[str, Side],
    operation: str,
    rounds: int,
    count: int,
    at_once: int,
) -> Table:
    backends = {name: side.tell("backend") for name, side in sides.items()}
    client: dict[str, list[float]] = {name: [] for name in sides}
    backend: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name in sides if number % 2 else reversed(sides):
            if operation == "claim":
                refill_outbox(server, f"against_{name}", CONVERSATIONS)
            before = processor_seconds(backends[name])
            spent = sides[name].tell("run", operation, count // at_once)
            if number:  # the first round warms up
                client[name].append(spent / count)
                backend[name].append((processor_seconds(backends[name]) - before) / count)
    return Table(
        title,
        ["version", "statements", "round trips", "client's processor", "to before", "server's processor", "to before"],
        [
            [
                name,
                *on_the_wire(server, directories[name], name, operation, at_once),
                microseconds(median(client[name])),
                times(ratio(client[name], client["before"])),
                microseconds(median(backend[name])),
                times(ratio(backend[name], backend["before"])),
            ]
            for name in sides
        ],
        f"median of {rounds} interleaved rounds of {count}; synchronous_commit off, Unix socket",
    )


def drained(server: Server, sides: dict[str, Side], rounds: int, concurrencies: tuple[int, ...]) -> Table:
    """Compare how fast one worker in one process sends what waits, if sending does nothing."""
    rates: dict[int, dict[str, list[float]]] = {count: {name: [] for name in sides} for count in concurrencies}
    for number in range(rounds + 1):
        for count, of_side in rates.items():
            for name in sides if number % 2 else reversed(sides):
                refill_outbox(server, f"against_{name}", DRAINED)
                seconds = sides[name].tell("drain", count)
                if number:  # the first round warms up
                    of_side[name].append(DRAINED * EACH / seconds)
    return Table(
        "Messages that one worker sends",
        ["version", *(heading for count in concurrencies for heading in (f"concurrency {count}", "to before"))],
        [
            [
                name,
                *(
                    cell
                    for of_side in rates.values()
                    for cell in (per_second(median(of_side[name])), times(ratio(of_side[name], of_side["before"])))
                ),
            ]
            for name in sides
        ],
        f"median of {rounds} interleaved rounds of {DRAINED * EACH}; synchronous_commit off, Unix socket",
    )


def ratio(these: list[float], those: list[float]) -> float:
    """Return the median of the rounds' ratios."""
    return median(this / that for this, that in zip(these, those, strict=True))


def on_the_wire(server: Server, directory: str, name: str, operation: str, at_once: int) -> list[str]:
    """Count statements and round trips."""
    if operation == "claim":
        refill_outbox(server, f"against_{name}", CONVERSATIONS)
    with counting_proxy(server) as proxy:
        side = Side(directory, proxy.url(f"against_{name}"))
        side.tell("run", operation, 1)
        before = proxy.counts()
        side.tell("run", operation, 10)
        counts = [f"{(after - first) / 10 / at_once:g}" for after, first in zip(proxy.counts(), before, strict=True)]
        side.close()
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.against", description="Compare with another commit.")
    parser.add_argument("commit", help="the commit, as git names it")
    parser.add_argument("--quick", action="store_true", help="do a small smoke run")
    given = parser.parse_args()
    with installed(given.commit) as directories, private_server() as server:
        rounds, changes = (2, 50) if given.quick else (20, 1000)
        for shown in compare(server, directories, rounds, changes):
            show(shown)


if __name__ == "__main__":
    main()
