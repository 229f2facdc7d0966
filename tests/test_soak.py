"""The soak finds what it is for: what grows. What a run shows is up to `make soak`."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import peewee

import close_engine
from close_engine.database.binding import moment, utc_now
from tests.soak.clock import Calendar, DatabaseClock
from tests.soak.figures import Autovacuum, Span, Timing, bloated, dead_rows, larger, memory, slower, timings
from tests.soak.gauges import Sample, Size, TableState, sizes
from tests.soak.notes import Log

RULES = Autovacuum(threshold=50, scale=0.2, naptime=60)


def calls(begin: float, count: int, took: float) -> list[tuple[str, str, str]]:
    return [("claim", str(begin + number / 1000), str(took)) for number in range(count)]


def test_a_call_that_takes_longer_in_the_end_is_found() -> None:
    run = Span(0, 100)
    lines = [*calls(20, 100, 0.004), *calls(80, 98, 0.004), *calls(81, 2, 0.050)]
    early, late = (timings(lines, run.fifth(number), []) for number in (2, 5))
    assert early == {"claim": Timing(100, 0.004, 0.004)}
    assert slower(early, early) == []
    assert slower(early, late) == ["p99 of claim went from 4.0 to 50.0 ms"]
    assert slower(early, {"claim": Timing(100, 0.007, 0.007)}) == ["p50 of claim went from 4.0 to 7.0 ms"]


def test_a_call_that_meets_a_jump_of_the_clock_says_nothing() -> None:
    lines = [*calls(20, 100, 0.004), ("claim", "29.5", "1.0")]
    assert timings(lines, Span(0, 100), [Span(30, 31)]) == {"claim": Timing(100, 0.004, 0.004)}
    assert timings(lines, Span(0, 100), [])["claim"].count == 101


def sample(at: float, dead: int = 0, written: int = 0, rss: int = 0) -> Sample:
    return Sample(at, {"worker": rss}, 0.0, {"outbox": TableState(0, 0, 1000, dead, written, 0)}, 1, 0.0, 0, 0.0)


def test_a_process_that_grows_is_found() -> None:
    samples = [sample(at, rss=rss * 2**20) for at, rss in ((25, 50), (30, 51), (35, 90), (85, 60))]
    early, late = (memory(samples, "worker", Span(0, 100).fifth(number)) for number in (2, 5))
    assert larger("the worker", early, early) == []
    assert larger("the worker", early, late) == ["the memory of the worker went from 51.0 to 60.0 MB"]


def test_dead_rows_that_autovacuum_cannot_keep_up_with_are_found() -> None:
    # 50 and a fifth of a thousand make the table due, and two minutes may pass until it is done.
    writes = [sample(0), sample(60, written=40), sample(200, dead=310, written=100)]
    kept_up = dead_rows(writes, "outbox", RULES)
    assert (kept_up.most, kept_up.allowed, kept_up.too_many) == (310, 310.0, False)
    assert dead_rows([*writes[:2], sample(200, dead=311, written=100), sample(210)], "outbox", RULES).too_many


def test_a_table_that_takes_too_much_room_is_found() -> None:
    small, large = (Size("outbox", 10, data, 0, data // 3, 0) for data in (3 * 2**20, 30 * 2**20))
    assert bloated([small]) == []
    assert bloated([large]) == ["outbox takes 3.0 times what it needs (20.0 MB too much)"]


def test_a_table_is_compared_with_a_copy_that_is_loaded_anew(postgres: peewee.Database) -> None:
    postgres.execute_sql("INSERT INTO leads (id) SELECT 'lead-' || n FROM generate_series(1, 2000) n")
    postgres.execute_sql("DELETE FROM leads WHERE id <> 'lead-1'")
    (found,) = sizes(postgres, [("public", "leads")])
    assert (found.name, found.rows) == ("leads", 1)
    assert found.factor > 5
    assert postgres.execute_sql("SELECT to_regnamespace('soak_copies')").fetchone() == (None,)


def test_the_clock_runs_in_the_past_and_is_the_librarys_own_in_the_end(postgres: peewee.Database) -> None:
    calendar = Calendar(SimpleNamespace(value=0.0))
    clock = DatabaseClock(postgres, calendar)
    clock.be_behind(timedelta(days=3))
    before = utc_now() - timedelta(days=3, seconds=1)
    assert before < moment() < before + timedelta(minutes=1)
    assert before < calendar() < before + timedelta(minutes=1)
    clock.be_behind(timedelta(0))
    assert close_engine.verify() == []


def test_what_is_noted_is_read_once_and_only_if_it_is_whole(tmp_path: Path) -> None:
    log, reader = Log(tmp_path), Log(tmp_path)
    log.done.write("text", 1)
    with log.done.path.open("a") as file:
        file.write("te")
        file.flush()
        assert reader.done.news() == [["text", "1"]]
        file.write("xt\t2\n")
    assert reader.done.news() == [["text", "2"]]
    assert reader.done.news() == []
