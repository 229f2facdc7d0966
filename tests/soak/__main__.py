"""Run it: `python -m tests.soak --minutes 30`."""

from __future__ import annotations

import argparse
import signal
import sys
import warnings
from datetime import timedelta
from functools import partial

from tests.soak import course
from tests.soak.report import Report

#: Below this, a run cannot tell whether anything grows: autovacuum looks once a minute, and a fifth has few calls.
TELLS = 5.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=course.__doc__)
    parser.add_argument("--minutes", type=float, default=30, help="how long it runs; at least 1, by default 30")
    minutes = parser.parse_args().minutes
    if minutes < 1:
        parser.error("--minutes must be at least 1")
    warnings.filterwarnings("ignore", "XDG_RUNTIME_DIR is not set")
    say = partial(print, flush=True)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # as after any other end
    for place in course.clear_old_runs():
        say(f"Removed what a run that was killed had left: {place}")
    days = int(minutes * 60 // course.EVERY) * course.JUMP
    say(f"{minutes:g} minutes, in which {days / timedelta(days=1):.1f} days pass.")
    try:
        with course.Run(minutes, say) as run:
            run.play()
            report = Report(run, tells=minutes >= TELLS)
            report.show(say)
            return 1 if report.problems else 0
    except course.Failed as error:
        say(f"It failed. {error}")
        return 1
    except KeyboardInterrupt:
        say("Stopped; everything is removed.")
        return 130


if __name__ == "__main__":
    sys.exit(main())
