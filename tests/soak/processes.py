"""What every process of a run begins with."""

from __future__ import annotations

import ctypes
import logging
import os
import random
import signal
import sys
from contextlib import suppress
from pathlib import Path

import close_engine
from tests.soak.clock import Calendar
from tests.soak.notes import Log

#: What `prctl` is told to have the kernel kill a process when its parent dies. Only Linux has it.
_PR_SET_PDEATHSIG = 1


def begin(name: str, url: str, place: Path, calendar: Calendar) -> Log:
    """Connect, log into a file of its own, and end with the process that runs it all, however that ends."""
    with suppress(AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.dup2(os.open(place / f"{name}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND), sys.stderr.fileno())
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    random.seed(name)
    close_engine.connect(url, clock=calendar)
    return Log(place)
