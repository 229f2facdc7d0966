"""How a run ends: by itself, by Ctrl-C or SIGTERM, or because it takes too long. Its hosts are removed in any case."""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Callable
from types import FrameType

__all__ = ["bounded"]


def bounded(run: Callable[[], int], seconds: int) -> int:
    """Do a run, and return its exit status. One that hangs says where, and ends.

    Args:
        run: what to do.
        seconds: how long it may take.
    """
    signal.signal(signal.SIGALRM, _takes_too_long)
    signal.alarm(seconds)
    signal.signal(signal.SIGTERM, lambda *signalled: sys.exit(1))
    try:
        return run()
    except KeyboardInterrupt:
        return 1


def _takes_too_long(number: int, frame: FrameType | None) -> None:
    raise RuntimeError(f"it takes too long, and is here:\n{''.join(traceback.format_stack(frame))}")
