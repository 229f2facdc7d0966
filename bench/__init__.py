"""Benchmarks: what a guarantee costs, compared with the minimum that a database needs and with what people use instead.

    python -m bench                     # every question; prints tables and writes bench/results.json
    python -m bench stage_change sweeps # some of them
    python -m bench --quick             # all of them, small, in about a minute; writes nothing
    python -m bench --page              # measures nothing; quotes bench/results.json in docs/performance.md

Each question has its own file, and each contender in it is a small function. The contenders take turns on one server,
and the result is the ratio between them, because absolute times drift on shared machines. Nothing here is a timed test.
"""

import warnings

# The server's package warns about this when it is imported, but works without it.
warnings.filterwarnings("ignore", "XDG_RUNTIME_DIR is not set")
