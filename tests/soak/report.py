"""What a run has shown: tables of figures, and one sentence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from statistics import median
from typing import TYPE_CHECKING

from close_engine import CloseEngineConversation
from tests.soak import figures
from tests.soak.audit import Audit, tracebacks
from tests.soak.figures import EARLY, LATE, Autovacuum
from tests.soak.gauges import sizes

if TYPE_CHECKING:
    from tests.soak.course import Run

#: With what autovacuum goes by: the table's own options, or else the server's settings.
_TABLES = """
    SELECT schemaname, s.relname,
        coalesce(substring(o.own FROM 'vacuum_threshold=([0-9.]+)'), current_setting('autovacuum_vacuum_threshold')),
        coalesce(substring(o.own FROM 'vacuum_scale_factor=([0-9.]+)'),
            current_setting('autovacuum_vacuum_scale_factor')),
        (SELECT setting FROM pg_settings WHERE name = 'autovacuum_naptime')
    FROM pg_stat_user_tables s JOIN pg_class c ON c.oid = s.relid
        CROSS JOIN array_to_string(c.reloptions, ' ') AS o (own)
    WHERE schemaname IN ('close_engine', 'public') AND n_tup_ins > 100 ORDER BY s.relname
"""
_STAGES = "SELECT stage, count(*) FROM close_engine_conversations GROUP BY 1 ORDER BY 2 DESC"
_MESSAGES = "SELECT status, count(*) FROM close_engine.outbox GROUP BY 1 ORDER BY 2 DESC"
_TRIGGERS = "SELECT trigger, count(*) FROM close_engine.history GROUP BY 1 ORDER BY 2 DESC"


#: Sessions of one worker: those of one that was just killed may be seen beside those of its successor.
ONE_WORKERS = 8


class Report:
    """Audits a run that is over, and judges what was measured.

    Args:
        run: Run.
        tells: whether it was long enough to tell whether anything grows.
    """

    def __init__(self, run: Run, tells: bool) -> None:
        self.run = run
        self.tells = tells
        database, samples = run.database, run.gauges.samples
        self.audit = Audit(database, run.log, run.struck, run.drained_at)
        self.wrong = self.audit.problems + tracebacks(run.place)
        self.wrong += [f"{name} ended with status {code} on SIGTERM" for name, code in run.codes.items() if code]

        early, late = run.span.fifth(EARLY), run.span.fifth(LATE)
        lines = run.log.timed.lines()
        self.early, self.late = (figures.timings(lines, part, run.stirred) for part in (early, late))
        self.memory = {
            name: (figures.memory(samples, name, early), figures.memory(samples, name, late))
            for name in ("worker 1", "webhooks", "approvals")
        }
        tables = database.execute_sql(_TABLES).fetchall()
        self.dead = {
            name: figures.dead_rows(samples, name, Autovacuum(*map(float, rules))) for _, name, *rules in tables
        }
        self.sizes = sizes(database, [(schema, name) for schema, name, *_ in tables])
        self.idle = max(sample.idle_in_transaction for sample in samples)
        self.connections = [max(s.connections for s in samples if part.has(s.at)) for part in (early, late)]
        self.load = [median(sample.load for sample in samples if part.has(sample.at)) for part in (early, late)]
        self.most_connections = max(sample.connections for sample in samples)
        self.xmin_age = max(sample.xmin_age for sample in samples)
        self.growth = self._growth() if tells else []

    @property
    def problems(self) -> list[str]:
        return self.wrong + self.growth

    def _growth(self) -> list[str]:
        problems = figures.slower(self.early, self.late) + figures.bloated(self.sizes)
        for name, (early, late) in self.memory.items():
            problems += figures.larger(name, early, late)
        for name, dead in self.dead.items():
            if dead.too_many:
                problems.append(f"{name} had {dead.most} dead rows, and autovacuum keeps up with {dead.allowed:.0f}")
        if self.idle > figures.LONGEST_IDLE:
            problems.append(f"a session was idle in a transaction for {self.idle:.0f} seconds")
        if self.connections[1] > self.connections[0] + ONE_WORKERS:
            problems.append("the sessions went from {} to {}".format(*self.connections))
        return problems

    def show(self, say: Callable[[str], None]) -> None:
        self._show_counts(say)
        self._show_timings(say)
        self._show_tables(say)
        self._show_processes(say)
        say("")
        if not self.tells:
            say("So short a run cannot tell whether anything grows: neither calls, memory nor tables were judged.")
        for problem in self.problems:
            say(f"WRONG: {problem}.")
        if not self.problems:
            flat = ", and the end was as the beginning" if self.tells else ""
            say(f"Nothing was lost, nothing was recorded twice{flat}.")

    def _show_counts(self, say: Callable[[str], None]) -> None:
        run, audit = self.run, self.audit
        execute = run.database.execute_sql
        for title, query in (("Conversations", _STAGES), ("Messages", _MESSAGES), ("Stage changes", _TRIGGERS)):
            found = execute(query).fetchall()
            total = sum(count for _, count in found)
            say(f"\n{title}: {total:,} — " + ", ".join(f"{count:,} {name}" for name, count in found))
        done = Counter(line[0] for line in run.log.done.lines())
        say("Acknowledged: " + ", ".join(f"{count:,} × {what}" for what, count in done.most_common()))
        refused = Counter(line[0] for line in run.log.refused.lines())
        say("Rightly refused: " + ", ".join(f"{count:,} × {what}" for what, count in refused.most_common()))
        say(f"{run.kills} workers were killed and {run.suspensions} suspended.")
        say(f"{audit.delivered:,} texts were delivered, {audit.twice} of them again with the same key.")
        say(f"{audit.unrecorded} left with a worker that was struck, and were withdrawn before they were recorded.")

    def _show_timings(self, say: Callable[[str], None]) -> None:
        say(f"\n{'milliseconds':16} {'second fifth':>23} {'last fifth':>23}   p50    p99")
        say(f"{'':16} {'calls':>7} {'p50':>7} {'p99':>7} {'calls':>7} {'p50':>7} {'p99':>7}")
        for what in sorted(self.early.keys() & self.late.keys()):
            early, late = self.early[what], self.late[what]
            cells = [f"{t.count:7} {t.p50 * 1000:7.1f} {t.p99 * 1000:7.1f}" for t in (early, late)]
            say(f"{what:16} {' '.join(cells)}  {late.p50 / early.p50:4.2f}x  {late.p99 / early.p99:4.2f}x")

    def _show_tables(self, say: Callable[[str], None]) -> None:
        say(f"\n{'table':28} {'rows':>9} {'MB':>7} {'anew':>7}         {'most dead':>10} {'allowed':>8} autovacuums")
        for size in self.sizes:
            dead = self.dead[size.name]
            now, anew = (size.data + size.indexes) / 2**20, (size.fresh_data + size.fresh_indexes) / 2**20
            say(
                f"{size.name:28} {size.rows:9,} {now:7.1f} {anew:7.1f} {size.factor:5.2f}x  {dead.most:10,} "
                f"{dead.allowed:8,.0f} {dead.vacuums:11}"
            )

        thousands = CloseEngineConversation.select().count() / 1000
        of_a_thousand = {size.name: (size.data + size.indexes) / 2**20 / thousands for size in self.sizes}
        largest = sorted(of_a_thousand, key=of_a_thousand.__getitem__, reverse=True)[:5]
        shares = ", ".join(f"{name} {of_a_thousand[name]:.1f}" for name in largest)
        say(f"A thousand conversations take {sum(of_a_thousand.values()):.1f} MB: {shares}, and the rest.")

    def _show_processes(self, say: Callable[[str], None]) -> None:
        say("")
        for name, (early, late) in self.memory.items():
            say(f"Memory of {name}: {early / 2**20:.1f} MB in the second fifth, {late / 2**20:.1f} MB in the last.")
        say("The load of the whole machine was {:.1f} in the second fifth, and {:.1f} in the last.".format(*self.load))
        samples = self.run.gauges.samples
        cores = (samples[-1].cpu - samples[0].cpu) / (samples[-1].at - samples[0].at)
        say(
            f"{cores:.2f} cores were busy. There were {self.most_connections} sessions at most; the longest was"
            f" {self.idle:.1f} seconds idle in a transaction; the oldest snapshot was {self.xmin_age} transactions old."
        )
