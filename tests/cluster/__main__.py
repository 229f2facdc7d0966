"""`python -m tests.cluster [--changes N]`: see `run`."""

from __future__ import annotations

import argparse
import signal
import sys
import traceback
from types import FrameType

from tests.cluster.run import run


def _takes_too_long(number: int, frame: FrameType | None) -> None:
    raise RuntimeError(f"it takes too long, and is here:\n{''.join(traceback.format_stack(frame))}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.cluster", description=__doc__)
    parser.add_argument(
        "--changes", type=int, default=30_000, help="how many must be acknowledged; default %(default)s"
    )
    changes = parser.parse_args().changes
    # A run that hangs says where, and ends.
    signal.signal(signal.SIGALRM, _takes_too_long)
    signal.alarm(600 + changes // 100)
    # Whatever ends the run, its hosts are removed.
    signal.signal(signal.SIGTERM, lambda *signalled: sys.exit(1))
    try:
        return run(changes)
    except KeyboardInterrupt:
        return 1


if __name__ == "__main__":
    sys.exit(main())
