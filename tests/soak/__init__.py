"""A soak: an agency in the small works for days of simulated time, is hurt, and must stay as it was in the beginning.

`python -m tests.soak --minutes 30`, or `make soak MINUTES=30`. It needs neither root nor a package of the system: the
PostgreSQL is the one of the tests, with its safe defaults.
"""
