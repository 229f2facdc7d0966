"""Benchmarks: what a guarantee costs beside the least that a database asks for, and beside what people use instead.

    python -m bench                     # every question; prints tables and writes bench/results.json
    python -m bench stage_change sweeps # some of them
    python -m bench --quick             # all of them, small, in about a minute; nothing is written
    python -m bench --page              # measures nothing: quotes bench/results.json in docs/performance.md

One file a question, and each contender in it is a small function. Contenders take turns in one run on one server, and
what is compared is the ratio between them: absolute times drift on shared machines. Nothing here is a timed test.
"""

import warnings

# The server's package says so while it is imported, and does well without it.
warnings.filterwarnings("ignore", "XDG_RUNTIME_DIR is not set")
