"""`python -m tests.cluster [--changes N]`: see `run`."""

from __future__ import annotations

import argparse
import signal
import sys

from tests.cluster.run import run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.cluster", description=__doc__)
    parser.add_argument(
        "--changes", type=int, default=30_000, help="how many must be acknowledged; default %(default)s"
    )
    changes = parser.parse_args().changes
    # Whatever ends the run, its hosts are removed.
    signal.signal(signal.SIGTERM, lambda *signalled: sys.exit(1))
    try:
        return run(changes)
    except KeyboardInterrupt:
        return 1


if __name__ == "__main__":
    sys.exit(main())
