"""The command line: run the questions, print their tables and store them in bench/results.json."""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
import time

from bench import page
from bench.report import Results, show
from bench.server import private_server

QUESTIONS = (
    "stage_change",
    "sweeps",
    "claims",
    "latency",
    "transcript",
    "growth",
    "contention",
    "carries",
    "sqlite",
    "console",
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure Close Engine.")
    parser.add_argument("names", nargs="*", metavar="name", help=f"{', '.join(QUESTIONS)}; default: all")
    parser.add_argument("--quick", action="store_true", help="do a small smoke run and write nothing")
    parser.add_argument("--page", action="store_true", help="only quote bench/results.json in docs/performance.md")
    given = parser.parse_args()
    if given.page:
        page.quote()
        return
    if unknown := set(given.names) - set(QUESTIONS):
        parser.error(f"there is no question {', '.join(sorted(unknown))}; the questions are {', '.join(QUESTIONS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the server stops too
    with private_server() as server:
        results = Results(server)
        for name in given.names or QUESTIONS:
            started, tables = time.monotonic(), []
            for table in importlib.import_module(f"bench.{name}").measure(server, quick=given.quick):
                show(table)
                tables.append(table)
            if not given.quick:
                results.keep(name, tables, seconds=time.monotonic() - started)


if __name__ == "__main__":
    main()
