"""`python -m tests.cluster [--changes N]`: see `run`."""

from __future__ import annotations

import argparse
import sys

from tests.cluster.bounded import bounded
from tests.cluster.run import run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.cluster", description=__doc__)
    parser.add_argument(
        "--changes", type=int, default=30_000, help="how many stages must be changed; default %(default)s"
    )
    changes = parser.parse_args().changes
    return bounded(lambda: run(changes), seconds=600 + changes // 100)


if __name__ == "__main__":
    sys.exit(main())
